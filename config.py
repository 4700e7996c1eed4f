"""Bit widths, recipes and defaults: the only place where a constant of a method lives.

Command-line flags override what stands here; a checkpoint stores what was used.
"""
from dataclasses import dataclass

weight_bit = 4  # 2 to 8
act_bit = 8  # 4 to 8, or 16 to leave activations alone
default_recipe = "ditas"
default_model = "DiT-XL/2"

# The data-free calibration trajectory: the model's own sampling with classifier-free guidance.
calibration_labels = (207, 360, 387, 974, 88, 979, 417, 279, 27, 336, 177, 594, 748, 718, 447, 613)  # ImageNet
calibration_cfg_scale = 1.5
factor_floor = 1e-4  # activation maxima, weight maxima and smoothing factors are at least this
alpha_grid = tuple(0.05 * i for i in range(21))
replay_tokens = 4096  # tokens of several timesteps that the search sends through the model at once


class UserError(Exception):
    """A mistake of the person at the terminal: one line saying what was given, what was expected and what to do.

    ``every_rank``: other processes of the run do not find the same one.
    """

    every_rank = False


@dataclass(frozen=True)
class Recipe:
    """A quantisation method as four independent choices: balance, weight, activation, search.

    Attributes:
        balance: where smoothing factors come from. ``none``; ``smoothquant``: maxima at one timestep; ``tas``: over all.
        timestep: the index, in sampling order (0 is the noisiest), that ``smoothquant`` looks at.
        alphas: migration strengths to try per layer; the one of least loss is kept, a single one needs no search.
        weight_granularity, weight_group: what shares a weight scale (see ``quant.quantizer.QuantSpec``).
        weight_scales: ``float``, or ``two-level``: integer group scales inside one floating scale per output channel.
        act_granularity: what shares an activation scale; ranges are dynamic.
        convention: rounding convention of both quantisers.
        rank: of the low-rank branch; 0 is none, None is 32 at width 1152 and the same share elsewhere.
        rounds: alternations of the low-rank branch.
        keep: which of them is kept, ``best`` or ``last``.
        order: ``smooth-first`` quantises ``W diag(s)``; ``lowrank-first`` quantises W and scales what came out.
        adaln_bits: of the adaLN modulation weights (weight-only, per output channel); 16 leaves them in floating point (float16 in the file).
    """

    balance: str = "none"
    timestep: int = 0
    alphas: tuple[float, ...] = ()
    weight_granularity: str = "channel"
    weight_group: int = 0
    weight_scales: str = "float"
    act_granularity: str = "image"
    convention: str = "affine"
    rank: int | None = 0
    rounds: int = 10
    keep: str = "best"
    order: str = "smooth-first"
    adaln_bits: int = 16


RECIPES: dict[str, Recipe] = {
    # Round to nearest: the baseline every paper starts from.
    "rtn": Recipe(),
    # Xiao et al., 2023, at a single timestep, as the DiTAS paper compares against (appendix, figures 10 to 12).
    "smoothquant": Recipe(balance="smoothquant", alphas=(0.5,)),
    # Dong & Zhang, 2025, on a layout that integer kernels can run.
    "ditas": Recipe(balance="tas", alphas=alpha_grid, weight_granularity="group", weight_group=64, weight_scales="two-level",
                    act_granularity="token", rank=None, adaln_bits=8),
    # The same as its published code computes it, which can only be simulated.
    "ditas-published": Recipe(balance="tas", alphas=alpha_grid, weight_granularity="strided", weight_group=32,
                              act_granularity="tensor", convention="published", rank=32, keep="last", order="lowrank-first"),
}


def lowrank_rank(recipe: Recipe, width: int) -> int:
    """The branch's rank for a layer whose smaller dimension is ``width``."""
    return max(1, round(width * 32 / 1152)) if recipe.rank is None else recipe.rank


def default_labels(num_classes: int, count: int = len(calibration_labels)) -> list[int]:
    """Labels of the calibration trajectory: the paper's for ImageNet, ``i mod num_classes`` for other models."""
    if num_classes == 1000:
        return list(calibration_labels[:count])
    return [i % num_classes for i in range(count)]
