"""What a checkpoint says of itself."""
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from architectures.registry import check_architecture, registered_configuration
from config import SCOPES, Recipe
from errors import UserError
from files.atomic import file_stem
from quant.numerics.spec import ACT_BITS, WEIGHT_BITS, check_quantiser
from quant.recipe import ADALN_BITS

FORMAT_VERSION = 6
READABLE = (1, 2, 3, 4, 5, 6)
HEADER_KEY = "ditas"
SUFFIX = ".safetensors"

# Formats before this one named a registered model; its architecture and shape followed from that.
FIRST_WITH_ARCHITECTURE = 5


@dataclass(frozen=True)
class Header:
    """What a checkpoint was made from, and how.

    Attributes:
        model: its name on the command line; of a model from elsewhere its class.
        image_size: pixels per side; None of a model from elsewhere.
        num_classes: that it knows; None where there are no classes.
        recipe_name: the recipe's name with the flags that were given.
        num_sampling_steps: of the calibration trajectory, as ``make_schedule`` takes them.
        svd: the low-rank solver.
        alphas: the migration strength of each site.
        groups: the group size of each site, where they differ.
        architecture: its name in ``architectures``.
        configuration: what that builds an empty model from.
    """

    model: str
    image_size: int | None
    num_classes: int | None
    weight_bit: int
    act_bit: int
    recipe_name: str
    recipe: Recipe
    seed: int
    num_sampling_steps: str
    svd: str
    alphas: dict[str, float]
    groups: dict[str, int] = field(default_factory=dict)
    architecture: str = ""
    configuration: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """Write the header as text."""
        return json.dumps(asdict(replace(self, format_version=FORMAT_VERSION)))


def default_name(
    model: str, image_size: int, weight_bit: int, act_bit: int, recipe_name: str
) -> str:
    """Make a file's name of what it will hold."""
    return default_stem(f"{model}-{image_size}", weight_bit, act_bit, recipe_name) + SUFFIX


def default_stem(model: str, weight_bit: int, act_bit: int, recipe_name: str) -> str:
    """Name what is made of a model; the recipe's name may hold flags (``ditas:lowrank=0``)."""
    return file_stem(f"{model}-W{weight_bit}A{act_bit}-{recipe_name}")


def find(path: str) -> Path:
    """Find the file meant by ``path``, with or without extension.

    Raises:
        UserError: there is none.
    """
    for candidate in (Path(path), Path(path + SUFFIX)):
        if candidate.is_file():
            return candidate
    raise UserError(f"checkpoint '{path}' does not exist: "
                    f"give the {SUFFIX} file that QuantDiT.py wrote")


def read_header(path: Path) -> Header:
    """Read the header of a checkpoint of any format that is still known.

    Raises:
        UserError: not a checkpoint of ours, truncated, or of another format version.
    """
    text = _header_text(path)
    try:
        fields = json.loads(text)
        version = fields["format_version"]
        if version in READABLE:
            return _parse(fields, version)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise UserError(f"checkpoint '{path}' has a damaged header ({error}); "
                        "make it again with QuantDiT.py") from None
    raise UserError(f"checkpoint '{path}' has format version {version}, "
                    f"expected {' or '.join(map(str, READABLE))}: "
                    "make it again with this QuantDiT.py")


def _header_text(path: Path) -> str:
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"cannot read checkpoint '{path}': truncated, or not a safetensors file "
                        f"({error}); make it again with QuantDiT.py") from None
    if text is None:
        raise UserError(f"'{path}' is a safetensors file but not a quantised checkpoint: "
                        f"expected the '{HEADER_KEY}' header that QuantDiT.py writes")
    return text


def _parse(fields: dict[str, Any], version: int) -> Header:
    parts = {key: tuple(value) if isinstance(value, list) else value
             for key, value in fields.pop("recipe").items()}
    header = Header(recipe=Recipe(**parts), **fields)
    if header.image_size is not None:
        _check_classes(header.num_classes)
        architecture, configuration = registered_configuration(
            header.model, header.image_size, header.num_classes)
        if version < FIRST_WITH_ARCHITECTURE:
            header = replace(header, architecture=architecture, configuration=configuration)
        if (header.architecture, header.configuration) != (architecture, configuration):
            raise ValueError(f"its configuration is not that of {header.model} at "
                             f"{header.image_size} pixels with {header.num_classes} classes, "
                             "but of another model")
    _check(header)
    return header


def _check_classes(count: Any) -> None:
    """Raise a ``ValueError`` if a model cannot have so many classes."""
    if not isinstance(count, int) or not 1 <= count <= 1_000_000:
        raise ValueError(f"{count} classes")


def _check(header: Header) -> None:
    """Raise a ``ValueError`` for a value that no QuantDiT.py writes."""
    check_architecture(header.architecture)
    if header.num_classes is not None:
        _check_classes(header.num_classes)
    if header.weight_bit not in WEIGHT_BITS or header.act_bit not in ACT_BITS:
        raise ValueError(f"{header.model} W{header.weight_bit}A{header.act_bit} is unknown here")
    recipe = header.recipe
    if recipe.adaln_bits not in ADALN_BITS or recipe.scope not in SCOPES:
        raise ValueError(f"{recipe.adaln_bits} bits for adaLN, scope {recipe.scope}")
    for granularity in (recipe.weight_granularity, recipe.act_granularity):
        check_quantiser(granularity, recipe.convention)
