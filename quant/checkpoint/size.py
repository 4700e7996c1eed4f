"""How large a quantised model is by the count of Q-DiT's tables (table 2)."""
from torch import nn

from architectures.registry import architecture_named, empty_model
from quant.checkpoint.header import Header
from quant.checkpoint.store import layer_specs
from quant.numerics.spec import QuantSpec
from quant.numerics.tokens import matrix
from quant.numerics.uniform import grouped

FLOAT_BITS = 16  # the paper's models of full precision are of float16
TWO_LEVEL_SCALE_BITS = 8  # of two-level scales, the integer inside an output channel's


def counted_bytes(header: Header) -> int:
    """Count a quantised model as the paper does: every weight at its width, and its scales.

    Weights are those of linears, patches and label tables. Biases, zero points, smoothing factors,
    low-rank branches and activation ranges are left out.
    """
    model = empty_model(architecture_named(header.architecture), header.configuration)
    specs = {name: weight for name, (weight, _) in layer_specs(header, model).items()}
    bits = 0
    for name, module in _weights(model).items():
        count = module.weight.numel()
        bits += quantised_bits(module, specs[name]) if name in specs else FLOAT_BITS * count
    return bits // 8


def float_bytes(model: nn.Module) -> int:
    """Count a float model as the paper does, at float16."""
    return sum(FLOAT_BITS * module.weight.numel() for module in _weights(model).values()) // 8


def quantised_bits(module: nn.Module, spec: QuantSpec) -> int:
    """Count the bits of a weight's codes and scales."""
    weight = matrix(module)
    codes = spec.bits * weight.numel()
    if spec.bits == FLOAT_BITS:
        return codes
    view, dims = grouped(weight, spec)
    scales = view.amin(dims).numel()
    scale_bits = TWO_LEVEL_SCALE_BITS if spec.convention == "two-level" else FLOAT_BITS
    return codes + scale_bits * scales


def _weights(model: nn.Module) -> dict[str, nn.Module]:
    """Find the modules that multiply by a weight or look it up, by name."""
    kinds = nn.Linear | nn.Conv2d | nn.Embedding
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}
