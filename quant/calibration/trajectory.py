"""The calibration trajectory, and the observers that ride on it (DiTAS, section 4.1).

The data is the model's own guided sampling. The first pass samples, records the maxima of every quantised linear's input
and keeps the latents, which are small. The second pass replays these latents, several timesteps at a time, so that observers
which need the maxima first (the grid search) see every input once, as it passes by.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from diffusion import Schedule, guided_denoiser, sample_loop
from quant.numerics.tokens import as_tokens, matrix

Observer = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class Trajectory:
    """Model inputs of a guided sampling run.

    Attributes:
        latents: (steps, N, C, H, W), noisiest first.
        timesteps: (steps,) int64, what the model was called with.
        labels: (N,) int64; every image also ran with the null label.
    """

    latents: Tensor
    timesteps: Tensor
    labels: Tensor


@contextmanager
def hooked(layers: dict[str, nn.Module], see: Callable[[str, Tensor, Tensor], None]) -> Iterator[None]:
    """While open, ``see(name, input, output)`` is called whenever one of the layers runs."""
    def watch(name):
        return lambda module, inputs, output: see(name, inputs[0], output)
    handles = [layer.register_forward_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.inference_mode()
def record(model: nn.Module, layers: dict[str, nn.Module], schedule: Schedule, labels: Tensor, cfg_scale: float,
           x: Tensor, draw: Callable[[], Tensor], desc: str = "trajectory") -> tuple[Trajectory, dict[str, Tensor]]:
    """Sample once and observe the maxima.

    Args:
        labels: (N,); x: (N, C, H, W) pure noise; draw: as in ``sample_loop``.

    Returns:
        The trajectory and, per layer, ``max |input_j|`` over images and tokens at every step, (steps, I) float32.

    Raises:
        ValueError: an input was not finite.
    """
    absmax = {name: torch.zeros(len(schedule), matrix(layer).shape[1], device=x.device) for name, layer in layers.items()}
    step = 0

    def see(name, inputs, _):
        absmax[name][step] = as_tokens(layers[name], inputs).abs().amax((0, 1))

    latents = [x]
    with hooked(layers, see):
        loop = sample_loop(guided_denoiser(model, labels, cfg_scale), schedule, x, draw)
        for x in tqdm(loop, total=len(schedule), desc=desc, unit="step"):
            latents.append(x)
            step += 1
    bad = {name: ~torch.isfinite(values).all(1) for name, values in absmax.items()}  # (steps,) each
    if any(steps.any() for steps in bad.values()):
        first = min((int(steps.nonzero()[0]), i, name) for i, (name, steps) in enumerate(bad.items()) if steps.any())
        raise ValueError(f"the input of {first[2]} is not finite at step {first[0]} of the calibration trajectory: the weights are damaged")
    timesteps = torch.from_numpy(schedule.timestep_map[::-1].copy()).to(x.device)
    return Trajectory(torch.stack(latents[:-1]), timesteps, labels), absmax


@torch.inference_mode()
def replay(model: nn.Module, layers: dict[str, nn.Module], trajectory: Trajectory, observers: dict[str, list[Observer]],
           tokens: int, desc: str) -> None:
    """Run the recorded latents through the model once more, with and without label.

    Each of a layer's observers gets its input (K, 2N, T, I) and output (K, 2N, T, O) for K timesteps at a time, where
    K is as many as fit ``tokens`` tokens, at least one. ``desc`` names the progress bar.
    """
    steps, n = trajectory.latents.shape[:2]
    per_step = 2 * n * (model.input_size // model.patch_size) ** 2
    both = torch.cat([trajectory.labels, torch.full_like(trajectory.labels, model.num_classes)])
    with tqdm(total=steps, desc=desc, unit="step") as bar:
        for chunk in torch.arange(steps, device=both.device).split(max(1, tokens // per_step)):
            k = len(chunk)

            def see(name, inputs, output):
                output = output.flatten(2).transpose(1, 2) if output.dim() == 4 else as_tokens(layers[name], output)
                inputs = as_tokens(layers[name], inputs).unflatten(0, (k, -1))
                for observer in observers[name]:
                    observer(inputs, output.unflatten(0, (k, -1)))

            x = torch.cat([trajectory.latents[chunk]] * 2, dim=1).flatten(0, 1)  # (K * 2N, C, H, W)
            with hooked(layers, see):
                model(x, trajectory.timesteps[chunk].repeat_interleave(2 * n), both.repeat(k))
            bar.update(k)
