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
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from architectures.dit import modulation_linears, scope_linears
from errors import UserError
from files.atomic import atomic
from files.weights import load_into
from models import DiT_models
from quant.activations.attention import Operands
from quant.activations.quantisers import Activation
from quant.activations.softmax import PowersOfRootTwo
from quant.backend import resolve
from quant.checkpoint.header import FORMAT_VERSION, HEADER_KEY, Header, read_header
from quant.checkpoint.tensors import (
    _half,
    _layer_tensors,
    _read_layer,
    _read_operands,
)
from quant.install import install
from quant.integer.weight import integer_obstacle
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.numerics.tokens import matrix
from quant.numerics.uniform import OFF_BITS, QuantSpec
from quant.pipeline import Result
from quant.recipe import act_spec, adaln_spec, weight_spec


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
    reason = integer_obstacle(header.recipe, weight_spec(header.recipe, header.weight_bit), act_spec(header.recipe, header.act_bit))
    if header.format_version == 1 and header.recipe.rank != 0:
        reason = reason or "its low-rank branch is of an older format: quantise again with this QuantDiT.py"
    return resolve(backend, reason, device, measure)


def build(stored: Stored, device: torch.device | str = "cpu", folded: bool = False, backend: str = "fake", dtype: torch.dtype = torch.float32,
          packed: bool = False) -> nn.Module:
    """The model to sample from; ``stored.model`` becomes it.

    Args:
        folded: fold the smoothing factors (see ``quant.layers.fold``).
        backend, dtype, packed: as in ``quant.install.install``.
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
