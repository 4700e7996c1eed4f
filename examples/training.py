"""What the training scripts of the bundled models share."""
import math
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from files.atomic import atomic


def learning_rate(step: int, steps: int, peak: float, warmup: int, floor: float) -> float:
    """Return a step's rate: a linear warm-up, then a cosine from ``peak`` to ``floor`` of it."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress)))


def save_half(state: dict[str, Tensor], path: Path) -> None:
    """Write the weights as float16; the file appears whole or not at all."""
    with atomic(path) as temporary:
        save_file({name: value.half().contiguous() for name, value in state.items()}, temporary)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")
