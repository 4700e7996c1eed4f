"""One safetensors file per quantised model: packed codes, scales, factors, and a JSON header.

Per quantised linear ``NAME`` there are ``NAME.codes``, ``.zero``, ``.scale`` (at 16 bits
``.weight`` instead), and where they apply ``.step``, ``.left``, ``.right``, ``.smooth``,
``.shift``, ``.offset`` and ``.act``. An attention whose operands are quantised has
``NAME.operands``. Ranges per timestep refer to ``timesteps``. How each of them is written stands in
``tensors``. Everything else keeps the model's own name, rounded to float16 unless that overflows.
Reading never unpickles.

Formats 1 to 5 are still read:

1. Zero points in a byte each, float32 factors and scales, adaLN modulation always in float32.
2. No static ranges, shifts, scopes, or group sizes that differ from layer to layer.
3. Powers of the square root of 2 began at 1.
4. A registered model's name stood for its architecture and shape.
5. Ranges of attention's operands were the same at all timesteps.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from architectures.registry import architecture_named, architecture_of, empty_model
from architectures.sites import modulations
from errors import UserError
from files.atomic import atomic
from files.weights import load_into
from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.backend import resolve
from quant.checkpoint.header import HEADER_KEY, Header, read_header
from quant.checkpoint.tensors import (
    TIMESTEPS,
    read_layer,
    read_operands,
    write_layer,
    write_operands,
)
from quant.install import find_timestep_index, install
from quant.integer.weight import integer_obstacle
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.numerics.floating import half_unless_overflow
from quant.numerics.spec import OFF_BITS, QuantSpec
from quant.numerics.tokens import matrix_shape
from quant.pipeline import Result
from quant.recipe import act_spec, adaln_spec, has_weight_only_adaln, weight_spec

# Before this format the low-rank branch was not made of integers.
FIRST_WITH_INTEGER_BRANCH = 2

# Before this format the scale of powers of the square root of 2 was not stored.
FIRST_WITH_POWER_SCALE = 4


def save(path: Path, model: nn.Module, result: Result, header: Header) -> None:
    """Write the checkpoint of a float model whose linears became those of ``result``.

    The file is complete or not there. Architecture and configuration of the header are the model's.
    """
    architecture = architecture_of(model)
    header = replace(
        header, architecture=architecture.name, configuration=architecture.configuration(model))
    tensors = {key: half_unless_overflow(value) for key, value in model.state_dict().items()
               if key.removesuffix(".weight") not in result.layers}
    for name, layer in result.layers.items():
        tensors |= write_layer(name, layer)
    for name, operands in result.operands.items():
        tensors[f"{name}.operands"] = write_operands(operands)
    timestep_index = find_timestep_index(result.layers, result.operands)
    if timestep_index is not None:
        tensors[TIMESTEPS] = timestep_index.timesteps
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    with atomic(path) as temporary:
        save_file(tensors, temporary, metadata={HEADER_KEY: header.to_json()})


@dataclass(frozen=True)
class Stored:
    """A checkpoint in memory, on the CPU, with nothing folded.

    Attributes:
        model: lacks the weights of its quantised ``layers``.
        operands: of its attentions.
    """

    header: Header
    model: nn.Module
    layers: dict[str, QuantizedLayer]
    operands: dict[str, Operands]


def read(path: Path) -> Stored:
    """Read a checkpoint.

    Raises:
        UserError: as ``read_header``, or the tensors are not those of the model that the header
            names.
    """
    header = read_header(path)
    try:
        with safe_open(path, framework="pt") as file:
            # A view that is kept would keep the whole file in memory.
            tensors = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
        return _assemble(header, tensors, path)
    except (SafetensorError, KeyError, ValueError, RuntimeError, TypeError,
            AttributeError) as error:
        raise UserError(f"checkpoint '{path}' is damaged or of another model than its header says "
                        f"({error}); make it again with QuantDiT.py") from None


def _assemble(header: Header, tensors: dict[str, Tensor], path: Path) -> Stored:
    model = empty_model(architecture_named(header.architecture), header.configuration)
    layers = {}
    for name, (spec, act) in layer_specs(header, model).items():
        shape = matrix_shape(model.get_submodule(name))
        layers[name] = read_layer(tensors, name, shape, spec, act)
    operands = _read_operands(tensors, header, model, layers)
    tensors.pop(TIMESTEPS, None)
    # The float weights are not there, and not needed: keep the skeleton without them.
    for name in layers:
        model.get_submodule(name).weight = None
    size = f" at {header.image_size} pixels" if header.image_size else ""
    load_into(model, tensors, str(path), f"{header.model}{size}")
    return Stored(header, model, layers, operands)


def layer_specs(
    header: Header, model: nn.Module
) -> dict[str, tuple[QuantSpec, Activation | None]]:
    """Say how weight and input of every quantised layer are quantised, by its name.

    Static ranges are without the range, which the file holds.
    """
    recipe, architecture = header.recipe, architecture_named(header.architecture)
    specs = {}
    for site in architecture.sites(model, recipe.scope):
        group = header.groups.get(site.name)
        weight = weight_spec(recipe, header.weight_bit, group)
        act = Activation(act_spec(recipe, header.act_bit, site.per_image, group))
        specs |= dict.fromkeys(site.linears, (weight, act))
    if has_weight_only_adaln(recipe, header.weight_bit):
        for site in modulations(architecture.sites(model, "adaln")):
            for name in site.linears:
                columns = model.get_submodule(name).in_features
                specs[name] = adaln_spec(recipe.adaln_bits, columns), None
    return specs


def _read_operands(
    tensors: dict[str, Tensor], header: Header, model: nn.Module, layers: dict[str, QuantizedLayer]
) -> dict[str, Operands]:
    recipe, spec = header.recipe, act_spec(header.recipe, header.act_bit)
    if recipe.attention == "none" or spec.bits == OFF_BITS:
        return {}
    has_powers = recipe.attention == "log-sqrt2"
    rows = 3 if has_powers and header.format_version < FIRST_WITH_POWER_SCALE else 4
    operands = {}
    for attention in architecture_named(header.architecture).attentions(model):
        quantisers = read_operands(tensors, attention.name, rows, spec, has_powers)
        factors = layers[attention.output].smoothing.factors
        operands[attention.name] = replace(quantisers, factors=factors)
    return operands


def backend_for(
    header: Header, backend: str, device: torch.device, measure: Callable[[], str]
) -> str:
    """Resolve the backend of a checkpoint (see ``quant.backend.resolve``).

    Raises:
        UserError: ``integer`` was asked for and the checkpoint cannot run on it.
    """
    recipe = header.recipe
    obstacle = integer_obstacle(
        recipe, weight_spec(recipe, header.weight_bit), act_spec(recipe, header.act_bit))
    if header.format_version < FIRST_WITH_INTEGER_BRANCH and recipe.rank != 0:
        obstacle = obstacle or ("its low-rank branch is of an older format: "
                                "quantise again with this QuantDiT.py",)
    return resolve(backend, obstacle, device, measure)


def build(
    stored: Stored,
    device: torch.device | str = "cpu",
    folded: bool = False,
    backend: str = "fake",
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
) -> nn.Module:
    """Make the model to sample from; ``stored.model`` becomes it.

    Args:
        folded: fold the smoothing factors (see ``quant.layers.fold``).
        backend, dtype, packed: as in ``quant.install.install``.
    """
    layers, operands = stored.layers, stored.operands
    if folded:
        layers = fold(stored.model, layers)
        operands = {name: quantisers.fold() for name, quantisers in operands.items()}
    return install(stored.model, layers, backend, dtype, device, packed, operands)


def load(
    path: Path,
    device: torch.device | str = "cpu",
    folded: bool = False,
    backend: str = "fake",
    dtype: torch.dtype = torch.float32,
    packed: bool = False,
) -> tuple[Header, nn.Module]:
    """Read a checkpoint's header and make a model to sample from; arguments as in ``build``.

    Raises:
        UserError: as ``read``.
    """
    stored = read(path)
    return stored.header, build(stored, device, folded, backend, dtype, packed)
