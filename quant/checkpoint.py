"""One safetensors file per quantised model: packed codes, scales, factors, all other tensors and a JSON header.

Per quantised linear ``NAME``: ``NAME.codes`` and ``NAME.zero`` (packed bit streams, uint8; zero points that are no codes: int32),
``NAME.scale`` (float32; with two-level scales uint8, beside ``NAME.step``, bfloat16), ``NAME.left``, ``NAME.right`` (where there is a
branch: bfloat16 and int8, in the published order float32), ``NAME.smooth`` and ``NAME.shift`` (float32, where the recipe has them). Static
activation ranges: ``NAME.act`` (float32: scale, zero; with a range per timestep one of each per entry of ``timesteps``), and of the
operands of attention ``blocks.I.attn.operands`` (rows query, key, value and probabilities; powers of the square root of 2 have a zero of 0). Everything else keeps its
published name, rounded to float16 unless that overflows. Reading never unpickles.

Formats 1 to 3 are still read. 1 had zero points in a byte each, float32 factors and scales, and adaLN modulation always in float32;
2 knew no static ranges, shifts, scopes or group sizes that differ from layer to layer; in 3 powers of the square root of 2 began at 1.
"""
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from config import Recipe, UserError
from download import load_into
from models import DiT_models
from quant.activation import Activation
from quant.attention import Operands
from quant.backend import install, resolve
from quant.files import atomic, file_stem
from quant.flags import ADALN_BITS
from quant.integer.weight import why_not
from quant.linear import SCOPES, QuantizedLayer, matrix, modulation_linears, scope_linears
from quant.lowrank import LowRankWeight
from quant.merge import fold
from quant.pipeline import Result
from quant.quantizer import ACT_BITS, OFF_BITS, WEIGHT_BITS, Quantized, QuantSpec, grouped, pack, unpack
from quant.recipe import act_spec, adaln_spec, weight_spec
from quant.softmax import PowersOfRootTwo

FORMAT_VERSION = 4
READABLE = (1, 2, 3, 4)
HEADER_KEY = "ditas"
SUFFIX = ".safetensors"


@dataclass(frozen=True)
class Header:
    """What a checkpoint was made from and how; ``alphas`` is the migration strength of each layer, ``groups`` its group size where they differ."""

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
    groups: dict[str, int] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def default_name(model: str, image_size: int, weight_bit: int, act_bit: int, recipe_name: str) -> str:
    return f"{file_stem(f'{model}-{image_size}-W{weight_bit}A{act_bit}-{recipe_name}')}{SUFFIX}"


def _layer_tensors(name: str, layer: QuantizedLayer) -> dict[str, Tensor]:
    weight, left, right = layer.weight.weight, layer.weight.left, layer.weight.right
    low, high = weight.zero.aminmax()
    tensors = {"codes": pack(weight.codes, weight.spec.bits), "scale": weight.scale,
               "zero": pack(weight.zero.to(torch.uint8), weight.spec.bits) if low >= 0 and high <= weight.spec.top else weight.zero.to(torch.int32)}
    if weight.step is not None:
        tensors |= {"scale": weight.scale.to(torch.uint8), "step": weight.step.bfloat16()}
    if len(right):
        whole = torch.equal(right, right.round())  # what LowRankWeight.integer_branch made
        tensors |= {"left": left.bfloat16(), "right": right.to(torch.int8)} if whole else {"left": left, "right": right}
    if layer.act is not None and layer.act.static:
        tensors["act"] = torch.stack([layer.act.scale, layer.act.zero])
    tensors |= {key: value for key in ("smooth", "shift") if (value := getattr(layer, key)) is not None}
    return {f"{name}.{key}": value for key, value in tensors.items()}


def _half(value: Tensor) -> Tensor:
    """Float16 unless a value overflows."""
    return half if torch.isfinite(half := value.half()).all() else value


def save(path: Path, model: nn.Module, result: Result, header: Header) -> None:
    """Write the checkpoint of a float ``model`` whose linears became those of ``result``; complete or not at all."""
    layers = result.layers
    tensors = {key: _half(value) for key, value in model.state_dict().items() if key.removesuffix(".weight") not in layers}
    for name, layer in layers.items():
        tensors |= _layer_tensors(name, layer)
        if layer.act is not None and layer.act.timesteps is not None:
            tensors["timesteps"] = layer.act.timesteps
    for name, each in result.operands.items():
        rows = [(act.scale, torch.zeros_like(act.scale) if isinstance(act, PowersOfRootTwo) else act.zero)
                for act in (each.query, each.key, each.value, each.probabilities)]
        tensors[f"{name}.operands"] = torch.stack([torch.stack(row) for row in rows])
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER_KEY: json.dumps(asdict(replace(header, format_version=FORMAT_VERSION)))})


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
        if version in READABLE:
            recipe = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.pop("recipe").items()}
            header = Header(recipe=Recipe(**recipe), **fields)
            _check(header)
            return header
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"checkpoint '{path}' has a damaged header ({error}); make it again with QuantDiT.py") from None
    raise UserError(f"checkpoint '{path}' has format version {version}, expected {' or '.join(map(str, READABLE))}: make it again with this QuantDiT.py")


def _check(header: Header) -> None:
    if header.model not in DiT_models or header.weight_bit not in WEIGHT_BITS or header.act_bit not in ACT_BITS:
        raise ValueError(f"{header.model} W{header.weight_bit}A{header.act_bit} is unknown here")
    if not isinstance(header.num_classes, int) or not 1 <= header.num_classes <= 1_000_000:
        raise ValueError(f"{header.num_classes} classes")
    if header.recipe.adaln_bits not in ADALN_BITS or header.recipe.scope not in SCOPES:
        raise ValueError(f"{header.recipe.adaln_bits} bits for adaLN, scope {header.recipe.scope}")
    weight_spec(header.recipe, header.weight_bit), act_spec(header.recipe, header.act_bit)


def _taker(tensors: dict[str, Tensor], name: str) -> Callable[[str, tuple[int, ...]], Tensor]:
    def take(key: str, expected: tuple[int, ...]) -> Tensor:
        value = tensors.pop(f"{name}.{key}")
        if tuple(value.shape) != expected:
            raise ValueError(f"{name}.{key} is {tuple(value.shape)}, expected {expected}")
        return value.float()
    return take


def _read_layer(tensors: dict[str, Tensor], name: str, shape: torch.Size, spec: QuantSpec, act: Activation | None) -> QuantizedLayer:
    take = _taker(tensors, name)
    rows, columns = shape
    view, dims = grouped(torch.empty(shape, device="meta"), spec)
    per_group = tuple(view.amin(dims, keepdim=True).shape)
    codes = unpack(tensors.pop(f"{name}.codes"), spec.bits, (rows, columns))
    if tensors[f"{name}.zero"].dim() == 1:
        zero = unpack(tensors.pop(f"{name}.zero"), spec.bits, per_group).float()
    else:
        zero = take("zero", per_group)
    step = take("step", (rows, 1)) if spec.convention == "two-level" else None
    weight = Quantized(codes, take("scale", per_group), zero, spec, step)
    rank = len(tensors.get(f"{name}.right", ()))
    left = take("left", (rows, rank)) if f"{name}.left" in tensors else torch.zeros(rows, 0)
    right = take("right", (rank, columns)) if f"{name}.right" in tensors else torch.zeros(0, columns)
    smooth, shift = (take(key, (columns,)) if f"{name}.{key}" in tensors else None for key in ("smooth", "shift"))
    if f"{name}.act" in tensors:
        each_step = tensors["timesteps"] if tensors[f"{name}.act"].dim() == 2 else None
        act = replace(act, **_range(take("act", (2,) if each_step is None else (2, len(each_step)))), timesteps=each_step)
    return QuantizedLayer(LowRankWeight(weight, left, right), act, smooth, shift=shift)


def _range(pair: Tensor) -> dict[str, Tensor]:
    return {"scale": pair[0], "zero": pair[1]}


def _read_operands(tensors: dict[str, Tensor], layers: dict[str, QuantizedLayer], depth: int, header: Header) -> dict[str, Operands]:
    recipe, spec = header.recipe, act_spec(header.recipe, header.act_bit)
    if recipe.attention == "none" or spec.bits == OFF_BITS:
        return {}
    powers, found = recipe.attention == "log-sqrt2", {}
    count = 3 if powers and header.format_version < 4 else 4
    for name in (f"blocks.{i}.attn" for i in range(depth)):
        acts = [Activation(spec, **_range(pair)) for pair in _taker(tensors, name)("operands", (count, 2))]
        probabilities = PowersOfRootTwo(spec.bits, acts[3].scale if count == 4 else torch.tensor(1.0)) if powers else acts[3]
        found[name] = Operands(*acts[:3], probabilities, layers[f"{name}.proj"].smooth)
    return found


def layer_specs(header: Header, model: nn.Module) -> dict[str, tuple[QuantSpec, Activation | None]]:
    """How the weight and the input of every quantised layer are, by its name; of static ranges without the range."""
    recipe, specs = header.recipe, {}
    for name in scope_linears(model, recipe.scope):
        group = header.groups.get(name)
        specs[name] = weight_spec(recipe, header.weight_bit, group), Activation(act_spec(recipe, header.act_bit, name, group))
    if recipe.adaln_bits != OFF_BITS:
        specs |= {name: (adaln_spec(recipe.adaln_bits, linear.in_features), None) for name, linear in modulation_linears(model).items()}
    return specs


@dataclass(frozen=True)
class Stored:
    """A checkpoint in memory: ``model`` lacks the weights of its quantised ``layers``; on the CPU, nothing folded."""

    header: Header
    model: nn.Module
    layers: dict[str, QuantizedLayer]
    operands: dict[str, Operands]


def read(path: Path) -> Stored:
    """Raises:
        UserError: as ``read_header``, or the tensors are not those of the model that the header names.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # a view that is kept would keep the whole file in memory
        with torch.device("meta"):
            model = DiT_models[header.model].build(header.image_size, header.num_classes)
        layers = {name: _read_layer(tensors, name, matrix(model.get_submodule(name)).shape, *specs)
                  for name, specs in layer_specs(header, model).items()}
        operands = _read_operands(tensors, layers, len(model.blocks), header)
        tensors.pop("timesteps", None)
        for name in layers:  # the float weights are not there, and not needed: keep the skeleton without them
            model.get_submodule(name).weight = None
        load_into(model, tensors, str(path), f"{header.model} at {header.image_size} pixels")
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise UserError(f"checkpoint '{path}' is damaged or of another model than its header says ({error}); make it again with QuantDiT.py") from None
    return Stored(header, model, layers, operands)


def backend_for(header: Header, backend: str, device: torch.device, measure: Callable[[], str]) -> str:
    """``quant.backend.resolve`` for a checkpoint.

    Raises:
        UserError: ``integer`` was asked for and the checkpoint cannot run on it.
    """
    reason = why_not(header.recipe, weight_spec(header.recipe, header.weight_bit), act_spec(header.recipe, header.act_bit))
    if header.format_version == 1 and header.recipe.rank != 0:
        reason = reason or "its low-rank branch is of an older format: quantise again with this QuantDiT.py"
    return resolve(backend, reason, device, measure)


def build(stored: Stored, device: torch.device | str = "cpu", folded: bool = False, backend: str = "fake", dtype: torch.dtype = torch.float32,
          packed: bool = False) -> nn.Module:
    """The model to sample from; ``stored.model`` becomes it.

    Args:
        folded: fold the smoothing factors (see ``quant.merge``).
        backend, dtype, packed: as in ``quant.backend.install``.
    """
    layers, operands = stored.layers, stored.operands
    if folded:
        layers, operands = fold(stored.model, layers), {name: each.fold() for name, each in operands.items()}
    return install(stored.model, layers, backend, dtype, device, packed, operands)


def load(path: Path, device: torch.device | str = "cpu", folded: bool = False, backend: str = "fake", dtype: torch.dtype = torch.float32,
         packed: bool = False) -> tuple[Header, nn.Module]:
    """Header and a model to sample from; arguments as in ``build``.

    Raises:
        UserError: as ``read``.
    """
    stored = read(path)
    return stored.header, build(stored, device, folded, backend, dtype, packed)
