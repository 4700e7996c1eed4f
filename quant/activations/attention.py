"""Quantising the operands of attention: queries, keys, values and the softmax output.

PTQ4DiT (section 3) and RepQ-ViT (section 3) quantise what enters attention's two products. They are
reached by intercepting ``scaled_dot_product_attention`` while a block's attention runs, so that any
library's attention class will do.
"""
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from errors import UserError
from quant.activations.quantisers import Activation, TimestepIndex, activation_module
from quant.activations.softmax import LogSqrt2, PowersOfRootTwo


@dataclass(frozen=True)
class Operands:
    """Quantisers of one attention.

    Attributes:
        query, key, value: static, one range per tensor, or one per tensor and timestep.
        probabilities: of the softmax output, static.
        factors: (D,) float32, divide the value before it is quantised and multiply it afterwards,
            where the next linear divides its input by them; None for ones, and after folding.
    """

    query: Activation
    key: Activation
    value: Activation
    probabilities: Activation | PowersOfRootTwo
    factors: Tensor | None = None

    @property
    def timesteps(self) -> Tensor | None:
        """What the model is called with at each step, where ranges depend on it, (S,) int64."""
        return self.query.timesteps

    def fold(self) -> "Operands":
        """Return the quantisers for values that come already divided."""
        return replace(self, factors=None)


class Interception(TorchFunctionMode):
    """Lets ``compute`` stand in for ``scaled_dot_product_attention``."""

    def __init__(self, compute: Callable[..., Tensor]):
        super().__init__()
        self._compute = compute

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self._compute(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def by_token(operand: Tensor) -> Tensor:
    """Put the heads of an operand (N, heads, T, D / heads) side by side, (N, T, D)."""
    return operand.transpose(1, 2).flatten(2)


def by_head(tokens: Tensor, heads: int) -> Tensor:
    """Split tokens (N, T, D) into heads (N, heads, T, D / heads)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """Compute ``softmax(q k^T scale + mask)`` from queries and keys (N, heads, T, D / heads).

    A mask of truth values lets a key through where it is true.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = query * scale @ key.transpose(-2, -1)  # (N, heads, T, T)
    if mask is not None and mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    elif mask is not None:
        logits = logits + mask
    return logits.softmax(-1)


class QuantOperands(nn.Module):
    """Simulates quantised operands inside an attention, whose linears stay as they are.

    Args:
        timestep_index: the sampling step, for ranges that depend on it.
    """

    def __init__(self, operands: Operands, timestep_index: TimestepIndex | None = None):
        super().__init__()
        self.query = activation_module(operands.query, timestep_index)
        self.key = activation_module(operands.key, timestep_index)
        self.value = activation_module(operands.value, timestep_index)
        if isinstance(operands.probabilities, PowersOfRootTwo):
            self.probabilities = LogSqrt2(operands.probabilities)
        else:
            self.probabilities = activation_module(operands.probabilities, timestep_index)
        self.register_buffer("factors", operands.factors)
        self._open: Interception | None = None
        self._has_computed = False

    def forward(
        self,
        query: Tensor,                   # (N, heads, T, D / heads)
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None, # added to the logits, or false where there is none
        dropout_p: float = 0.0,          # of training, which does not happen here
        is_causal: bool = False,         # not met in diffusion transformers
        scale: float | None = None,
        **sharing: bool,                 # enable_gqa, which shapes tell
    ) -> Tensor:
        """Compute attention as ``scaled_dot_product_attention`` does, (N, heads, T, D / heads)."""
        self._has_computed = True
        if is_causal or query.shape[1] != key.shape[1]:
            raise ValueError("causal attention, and one whose heads share keys, "
                             "cannot have quantised operands")
        heads = query.shape[1]
        query = by_head(self._seen(self.query, by_token(query)), heads)
        key = by_head(self._seen(self.key, by_token(key)), heads)
        value = by_head(self._seen_value(by_token(value)), heads)
        probabilities = attention_probabilities(query, key, attn_mask, scale)
        return self._seen(self.probabilities, probabilities) @ value

    def _seen_value(self, value: Tensor) -> Tensor:
        if self.factors is None:
            return self._seen(self.value, value)
        return (self._seen(self.value, value / self.factors) * self.factors).to(value.dtype)

    @staticmethod
    def _seen(module: nn.Module, values: Tensor) -> Tensor:
        """Compute what a product sees of its operand."""
        codes, scale = module(values.float())
        return (codes if scale is None else codes * scale).to(values.dtype)

    def open(self) -> None:
        """Begin to stand in for ``scaled_dot_product_attention``."""
        self._has_computed = False
        self._open = Interception(self)
        self._open.__enter__()

    def close(self) -> None:
        """End what ``open`` began."""
        self._open.__exit__(None, None, None)
        self._open = None

    def check_use(self) -> None:
        """Make sure that the attention computed with quantised operands since ``open``.

        Raises:
            UserError: it did not, so that its operands stayed in floating point.
        """
        if not self._has_computed:
            raise UserError(
                "an attention with quantised operands never called scaled_dot_product_attention, "
                "where they are quantised: let it")


def quantize_operands(attention: nn.Module, operands: QuantOperands) -> None:
    """Quantise what enters the two products of an attention module, in place.

    Its submodule ``operands`` does it; a second call replaces that.
    """
    is_hooked = hasattr(attention, "operands")
    attention.operands = operands
    if not is_hooked:
        attention.register_forward_pre_hook(_open_operands)
        attention.register_forward_hook(_close_operands, always_call=True)
        attention.register_forward_hook(_check_operands)


# Hooks reach the operands through the module they are called for: a copy of the model has its own.

def _open_operands(attention: nn.Module, inputs: tuple) -> None:
    attention.operands.open()


def _close_operands(attention: nn.Module, inputs: tuple, output: Tensor) -> None:
    attention.operands.close()


def _check_operands(attention: nn.Module, inputs: tuple, output: Tensor) -> None:
    attention.operands.check_use()


@contextmanager
def intercepted_attention(
    model: nn.Module, names: Sequence[str], see: Callable[[str, Tensor, Tensor, Tensor], None]
) -> Iterator[None]:
    """Call ``see(name, query, key, value)`` whenever a named attention multiplies, while open."""
    modes: dict[str, Interception] = {}

    def open_mode(name):
        def compute(query, key, value, *args, **kwargs):
            see(name, query, key, value)
            return F.scaled_dot_product_attention(query, key, value, *args, **kwargs)

        def hook(module, inputs):
            modes[name] = Interception(compute)
            modes[name].__enter__()
        return hook

    def close_mode(name):
        return lambda module, inputs, output: modes.pop(name).__exit__(None, None, None)

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(open_mode(name)))
        handles.append(module.register_forward_hook(close_mode(name), always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
