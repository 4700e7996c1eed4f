"""Outlier channels: how many DiT-Emoji grows by itself, and a twin that has them by construction.

DiT-Emoji-Outliers is made as the digits' twin is (``examples/digits/outliers.py``). Its seed was
chosen before any number of it was seen.

    python -m examples.emoji.outliers    # how the outliers of DiT-Emoji grew while it was trained
"""
import json
import statistics
from pathlib import Path

import torch
from torch import Tensor, nn

from architectures.hooked import hooked
from architectures.registry import architecture_of
from diffusion import Schedule
from errors import UserError
from examples.digits.outliers import add_outliers
from files.weights import read_state_dict

WEIGHTS = Path(__file__).with_name("dit.safetensors")
CURVES = Path(__file__).with_name("dit-curves.json")
SEED = 19
NOISES = 8  # timesteps at which channels are looked at, from the noisiest to the cleanest


def bundled_weights(name: str) -> dict[str, Tensor]:
    """Load the weights of DiT-Emoji, or make those of DiT-Emoji-Outliers, float32.

    Raises:
        UserError: the model was not trained yet.
    """
    if not WEIGHTS.exists():
        raise UserError(f"{name} has no weights yet ('{WEIGHTS}' is missing): "
                        "train it, as docs/emoji.md says, or take DiT-Digits-Outliers")
    state = {key: value.float() for key, value in read_state_dict(WEIGHTS).items()}
    return add_outliers(state, SEED) if name == "DiT-Emoji-Outliers" else state


@torch.no_grad()
def outlier_ratios(
    model: nn.Module,
    schedule: Schedule,
    latents: Tensor,
    labels: Tensor,
) -> dict[str, float]:
    """Compute every linear's largest input channel over its median channel.

    A channel's size is its largest magnitude over images, tokens and noise levels.

    Args:
        latents: clean ones (N, C, H, W); the first 1/8 is made noisiest.
        labels: (N,).
    """
    generator = torch.Generator().manual_seed(SEED)
    noise = torch.randn(latents.shape, generator=generator)
    t = torch.linspace(len(schedule) - 1, 0, NOISES).round().long()
    t = t.repeat_interleave(-(-len(latents) // NOISES))[:len(latents)]
    a = torch.from_numpy(schedule.alphas_cumprod).float()[t].view(-1, 1, 1, 1)

    largest = {}

    def see(name: str, inputs: Tensor, _: Tensor) -> None:
        largest[name] = inputs.abs().flatten(0, -2).amax(0)  # (I,)

    names = [site.linears[0] for site in architecture_of(model).sites(model, "blocks")]
    with hooked(model, names, see):
        model(a.sqrt() * latents + (1 - a).sqrt() * noise, t, labels)
    return {name: float(channels.max() / channels.median()) for name, channels in largest.items()}


def curve_table(curves: dict[str, list[tuple[int, float]]], rows: int = 12) -> str:
    """Write a Markdown table: over training, the ratio of each kind of linear.

    Args:
        curves: (step, ratio) of every linear; other curves are left out.
        rows: how many of the steps are shown, spread evenly.

    Returns:
        The median and the largest ratio over the blocks, in each row for one step.
    """
    roles = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
    steps = [step for step, _ in curves["blocks.0.attn.qkv"]]
    stride = max(1, -(-len(steps) // rows))
    shown = sorted({*range(0, len(steps), stride), len(steps) - 1})
    lines = [f"| step | {' | '.join(roles)} |", f"|{'---|' * (len(roles) + 1)}"]
    for index in shown:
        cells = [str(steps[index])]
        for role in roles:
            ratios = [curve[index][1] for name, curve in curves.items() if name.endswith(role)]
            cells.append(f"{statistics.median(ratios):.1f} (at most {max(ratios):.1f})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(curve_table(json.loads(CURVES.read_text())))
