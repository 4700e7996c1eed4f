"""One safetensors file per quantised model: packed codes, scales, factors, all other tensors and a JSON header.

Per quantised linear ``NAME``: ``NAME.codes`` (packed bit stream, uint8), ``NAME.scale`` (float32), ``NAME.zero`` (uint8 where it
fits, else int32), ``NAME.left``, ``NAME.right``, ``NAME.smooth`` (float32, absent where the recipe does not balance). Everything
else keeps its published name. Reading never unpickles.
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import Recipe, UserError
from download import load_into
from models import DiT_models
from quant.files import atomic
from quant.linear import QuantizedLayer, block_linears, install
from quant.lowrank import LowRankWeight
from quant.pipeline import act_spec, weight_spec
from quant.quantizer import ACT_BITS, WEIGHT_BITS, Quantized, QuantSpec, grouped, pack, unpack

FORMAT_VERSION = 1
HEADER_KEY = "ditas"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Header:
    """What a checkpoint was made from and how; ``alphas`` is the migration strength of each layer."""

    model: str
    image_size: int
    num_classes: int
    weight_bit: int
    act_bit: int
    recipe_name: str
    recipe: Recipe
    seed: int
    num_sampling_steps: str
    svd: str
    alphas: dict[str, float]
    format_version: int = FORMAT_VERSION


def default_name(model: str, image_size: int, weight_bit: int, act_bit: int, recipe_name: str) -> str:
    return f"{model.replace('/', '-')}-{image_size}-W{weight_bit}A{act_bit}-{recipe_name}{SUFFIX}"


def _layer_tensors(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    weight = layer.weight.weight
    low, high = weight.zero.aminmax()
    tensors = {"codes": pack(weight.codes, weight.spec.bits), "scale": weight.scale, "left": layer.weight.left, "right": layer.weight.right,
               "zero": weight.zero.to(torch.uint8 if low >= 0 and high <= 255 else torch.int32)}
    if layer.smooth is not None:
        tensors["smooth"] = layer.smooth
    return {f"{name}.{key}": value for key, value in tensors.items()}


def save(path: Path, model: nn.Module, layers: dict[str, QuantizedLayer], header: Header) -> None:
    """Write the checkpoint of a float ``model`` whose linears became ``layers``; complete or not at all."""
    tensors = {key: value for key, value in model.state_dict().items() if key.removesuffix(".weight") not in layers}
    for name, layer in layers.items():
        tensors |= _layer_tensors(name, layer)
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER_KEY: json.dumps(asdict(header))})


def find(path: str) -> Path:
    """The file meant by ``path``, with or without extension.

    Raises:
        UserError: there is none.
    """
    for candidate in (Path(path), Path(path + SUFFIX)):
        if candidate.is_file():
            return candidate
    raise UserError(f"checkpoint '{path}' does not exist: give the {SUFFIX} file that QuantDiT.py wrote")


def read_header(path: Path) -> Header:
    """Raises:
        UserError: not a checkpoint of ours, truncated, or of another format version.
    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read checkpoint '{path}': truncated, or not a safetensors file ({error}); make it again with QuantDiT.py") from None
    if text is None:
        raise UserError(f"'{path}' is a safetensors file but not a quantised checkpoint: expected the '{HEADER_KEY}' header that QuantDiT.py writes")
    try:
        fields = json.loads(text)
        version = fields["format_version"]
        if version == FORMAT_VERSION:
            recipe = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.pop("recipe").items()}
            header = Header(recipe=Recipe(**recipe), **fields)
            _check(header)
            return header
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"checkpoint '{path}' has a damaged header ({error}); make it again with QuantDiT.py") from None
    raise UserError(f"checkpoint '{path}' has format version {version}, expected {FORMAT_VERSION}: make it again with this QuantDiT.py")


def _check(header: Header) -> None:
    if header.model not in DiT_models or header.weight_bit not in WEIGHT_BITS or header.act_bit not in ACT_BITS:
        raise ValueError(f"{header.model} W{header.weight_bit}A{header.act_bit} is unknown here")
    if not isinstance(header.num_classes, int) or not 1 <= header.num_classes <= 1_000_000:
        raise ValueError(f"{header.num_classes} classes")
    weight_spec(header.recipe, header.weight_bit), act_spec(header.recipe, header.act_bit)


def _read_layer(tensors: dict[str, Tensor], name: str, shape: torch.Size, spec: QuantSpec) -> QuantizedLayer:
    def take(key: str, expected: tuple[int, ...]) -> Tensor:
        value = tensors.pop(f"{name}.{key}")
        if tuple(value.shape) != expected:
            raise ValueError(f"{name}.{key} is {tuple(value.shape)}, expected {expected}")
        return value

    rows, columns = shape
    view, dims = grouped(torch.empty(shape, device="meta"), spec)
    per_group = tuple(view.amin(dims, keepdim=True).shape)
    codes = unpack(tensors.pop(f"{name}.codes"), spec.bits, (rows, columns))
    weight = Quantized(codes, take("scale", per_group).float(), take("zero", per_group).float(), spec)
    rank = len(tensors[f"{name}.right"])
    low_rank = LowRankWeight(weight, take("left", (rows, rank)).float(), take("right", (rank, columns)).float())
    smooth = take("smooth", (columns,)).float() if f"{name}.smooth" in tensors else None
    return QuantizedLayer(low_rank, smooth)


def load(path: Path, device: torch.device | str = "cpu") -> tuple[Header, nn.Module]:
    """Header and model, quantised linears installed, smoothing factors not folded (see ``quant.merge``).

    Raises:
        UserError: as ``read_header``, or the tensors are not those of the model that the header names.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}
        with torch.device("meta"):
            model = DiT_models[header.model].build(header.image_size, header.num_classes)
        spec = weight_spec(header.recipe, header.weight_bit)
        layers = {name: _read_layer(tensors, name, linear.weight.shape, spec) for name, linear in block_linears(model).items()}
        for name in layers:  # the float weights are not there, and not needed: keep the skeleton without them
            model.get_submodule(name).weight = None
        load_into(model, tensors, str(path), f"{header.model} at {header.image_size} pixels")
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint '{path}' is damaged or of another model than its header says ({error}); make it again with QuantDiT.py") from None
    return header, install(model, layers, act_spec(header.recipe, header.act_bit)).to(device)
