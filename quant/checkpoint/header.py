"""What a checkpoint says of itself."""
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError, safe_open

from architectures.dit import SCOPES
from config import Recipe
from errors import UserError
from files.atomic import file_stem
from models import DiT_models
from quant.numerics.uniform import ACT_BITS, WEIGHT_BITS
from quant.recipe import ADALN_BITS, act_spec, weight_spec

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
