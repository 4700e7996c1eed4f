"""Choose the arithmetic that a quantised model runs in."""
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from errors import Part, Setting, UserError
from quant.install import make_linear, unnumbered
from quant.layers.quantised import QuantizedLayer

# How much faster the simulation has to be. Noise in close calls (0.9 to 1.5 on small models) must
# not choose the backend of a run.
MARGIN = 2.0
ROUNDS = 5


def resolve(
        backend: str, reason: tuple[Part, ...] | None, device: torch.device,
        measure: Callable[[], str]) -> str:
    """Choose ``fake`` or ``integer``.

    ``auto`` is what ``measure`` finds, where the checkpoint allows integers and the device has
    instructions for them. Where ``integer`` is asked for and the device has none, the choice is
    ``fake``, with a warning on stderr.

    Args:
        backend: one of ``config.BACKENDS``.
        reason: why the checkpoint cannot run on integers, if it cannot (see
            ``quant.integer.weight.integer_obstacle``).
        device: where the model runs.
        measure: ``fake`` or ``integer``, whichever is faster (see ``faster``).

    Raises:
        UserError: ``integer`` was asked for and there is such a reason.
    """
    if backend == "fake":
        return "fake"
    if reason:
        if backend == "integer":
            raise UserError(
                Setting("backend", "integer"), " cannot run this checkpoint: ", *reason, ", or ",
                Setting("backend", "fake"))
        return "fake"
    if _has_int8(device):
        return "integer" if backend == "integer" else measure()
    if backend == "integer":
        print(
            f"warning: no int8 instructions on {device.type}: simulating instead",
            file=sys.stderr)
    return "fake"


def _has_int8(device: torch.device) -> bool:
    """Tell whether a device has int8 instructions and, if it is a GPU, Triton to use them."""
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return False
        return find_spec("triton") is not None
    from quant.integer.cpu import supported
    return supported()


@torch.no_grad()
def faster(
        layers: list[QuantizedLayer], tokens: int, dtype: torch.dtype, device: torch.device,
        packed: bool) -> str:
    """Choose ``integer``, unless simulating these layers is faster by ``MARGIN``.

    Both are timed in turn, uncompiled, on random input; medians of ``ROUNDS``.

    Args:
        layers: what is timed.
        tokens: rows of the input.
        dtype, device, packed: as in ``install``.
    """
    device = unnumbered(device)
    inputs = [_random_input(layer, tokens).to(device, dtype) for layer in layers]
    modules: dict[str, list[nn.Module]] = {}
    for backend in ("fake", "integer"):
        modules[backend] = [
            make_linear(layer, None, backend, dtype, device, packed, None).to(device)
            for layer in layers]
    times: dict[str, list[float]] = {"fake": [], "integer": []}
    for _ in range(1 + ROUNDS):
        for backend in times:
            times[backend].append(_seconds(modules[backend], inputs, device))
    # The first call prepares, or compiles kernels.
    fake = statistics.median(times["fake"][1:])
    integer = statistics.median(times["integer"][1:])
    return "fake" if fake * MARGIN < integer else "integer"


def _random_input(layer: QuantizedLayer, tokens: int) -> Tensor:
    """Draw an input (1, T, I) of a layer from the normal distribution."""
    # The model's user may have seeded PyTorch's own generator.
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, tokens, layer.weight.right.shape[1], generator=generator)


def _seconds(modules: list[nn.Module], inputs: list[Tensor], device: torch.device) -> float:
    """Measure how long the modules take, each on its input."""
    _wait_for(device)
    start = time.perf_counter()
    for module, x in zip(modules, inputs):
        module(x)
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: torch.device) -> None:
    """Let a GPU finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
