"""Which arithmetic a quantised model runs in, and the modules for it."""
import statistics
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch

from errors import UserError
from quant.install import _linear, _unnumbered
from quant.layers.quantised import QuantizedLayer

BACKENDS = ("fake", "integer", "auto")
MARGIN = 2.0  # so much faster has the simulation to be: noise in close calls (0.9 to 1.5 on small models) must not choose the backend of a run
ROUNDS = 5


def resolve(backend: str, reason: str | None, device: torch.device, measure: Callable[[], str]) -> str:
    """``fake`` or ``integer``. ``auto`` is what ``measure`` finds, where the checkpoint allows integers and the device has instructions for them.

    Warns on stderr where ``integer`` was asked for and the device has no integer instructions: there it is ``fake``.

    Args:
        reason: why the checkpoint cannot run on integers, if it cannot (see ``quant.integer.weight.integer_obstacle``).
        measure: ``fake`` or ``integer``, whichever is faster (see ``faster``).

    Raises:
        UserError: ``integer`` was asked for and there is such a reason.
    """
    if backend == "fake":
        return "fake"
    if reason:
        if backend == "integer":
            raise UserError(f"--backend integer cannot run this checkpoint: {reason}, or --backend fake")
        return "fake"
    if _fast(device):
        return "integer" if backend == "integer" else measure()
    if backend == "integer":
        print(f"warning: no int8 instructions on {device.type}: --backend fake instead", file=sys.stderr)
    return "fake"


def _fast(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0) and find_spec("triton") is not None
    from quant.integer.cpu import supported
    return supported()


@torch.no_grad()
def faster(layers: list[QuantizedLayer], tokens: int, dtype: torch.dtype, device: torch.device, packed: bool) -> str:
    """``integer``, unless simulating these layers is faster by ``MARGIN``.

    Both are timed in turn, uncompiled, on random input of that many tokens; medians of ``ROUNDS``. Other arguments as in ``install``.
    """
    device = _unnumbered(device)
    inputs = [torch.randn(1, tokens, layer.weight.right.shape[1]).to(device, dtype) for layer in layers]
    rivals = {backend: [_linear(layer, None, backend, dtype, device, packed, None).to(device) for layer in layers] for backend in ("fake", "integer")}
    times: dict[str, list[float]] = {backend: [] for backend in rivals}
    for _ in range(1 + ROUNDS):
        for backend, modules in rivals.items():
            _wait_for(device)
            began = time.perf_counter()
            for module, x in zip(modules, inputs):
                module(x)
            _wait_for(device)
            times[backend].append(time.perf_counter() - began)
    fake, integer = (statistics.median(times[backend][1:]) for backend in ("fake", "integer"))  # the first call prepares, or compiles kernels
    return "fake" if fake * MARGIN < integer else "integer"


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
