"""Whether the compiled passes can run here."""
from importlib.util import find_spec

import torch


def compiled_available(device: torch.device) -> bool:
    """Tell whether ``quant.numerics.passes`` serves a device: a CPU, with numba installed."""
    return device.type == "cpu" and find_spec("numba") is not None
