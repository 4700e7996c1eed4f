"""The loop behind ``train.py``: state on disk every few minutes, and on from there."""
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from examples.training import learning_rate
from files.atomic import atomic

SAVE_SECONDS = 180


@dataclass
class Run:
    """What one training changes: all of it is saved, and read again.

    Attributes:
        name: of the progress bar.
        state: file outside git that keeps the rest.
        model: what is trained.
        average: moving average of its weights; ``model`` itself where none is kept.
        optimizer: its steps' sizes are set by ``learning_rate``.
        curves: numbers logged over training, by name: (step, number) each.
    """

    name: str
    state: Path
    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    curves: dict[str, list[tuple[int, float]]]


def train(
    run: Run,
    loss: Callable[[], Tensor],         # of a fresh batch, a scalar
    steps: int,
    peak: float,                        # learning rate, see ``learning_rate``
    decay: float,                       # of the moving average of weights; 0 keeps none
    watch: Callable[[Run, int], None],  # called at first and before each save, to log curves
) -> None:
    """Train to ``steps`` steps, from where an earlier call stopped; save the state meanwhile."""
    first = _resume(run)
    if first == 0:
        watch(run, 0)
    saved = time.monotonic()
    shown = None
    bar = tqdm(range(first, steps), desc=run.name, unit="step", initial=first, total=steps)
    for step in bar:
        for group in run.optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak, warmup=100, floor=0.02)
        value = loss()
        run.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
        run.optimizer.step()

        # Moving averages: of the weights, faster at first, and of the loss that is shown.
        _average(run, min(decay, (step + 1) / (step + 10)))
        shown = value.item() if shown is None else 0.99 * shown + 0.01 * value.item()
        bar.set_postfix(loss=f"{shown:.4f}")

        if time.monotonic() - saved > SAVE_SECONDS or step + 1 == steps:
            run.curves.setdefault("loss", []).append((step + 1, shown))
            watch(run, step + 1)
            _save(run, step + 1)
            saved = time.monotonic()


def _average(run: Run, decay: float) -> None:
    if run.average is run.model:
        return
    with torch.no_grad():
        old = list(run.average.parameters())
        torch._foreach_lerp_(old, list(run.model.parameters()), 1 - decay)


def _save(run: Run, step: int) -> None:
    """Write the state; the file appears whole or not at all."""
    run.state.parent.mkdir(parents=True, exist_ok=True)
    with atomic(run.state) as temporary:
        torch.save({
            "step": step,
            "model": run.model.state_dict(),
            "average": run.average.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "curves": run.curves,
            "random": torch.get_rng_state(),
        }, temporary)


def _resume(run: Run) -> int:
    """Read the state if there is one; returns the step that comes next."""
    if not run.state.exists():
        return 0
    state = torch.load(run.state, weights_only=True)
    run.model.load_state_dict(state["model"])
    run.average.load_state_dict(state["average"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.curves.update(state["curves"])
    torch.set_rng_state(state["random"])
    return state["step"]
