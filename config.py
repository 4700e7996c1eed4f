"""Bit widths, recipes and defaults: the only place where a constant of a method lives.

Command-line flags override what stands here; a checkpoint stores what was used.
"""
from dataclasses import dataclass, replace

weight_bit = 4  # 2 to 8
act_bit = 8  # 4 to 8, or 16 to leave activations alone
default_recipe = "ditas"
default_model = "DiT-XL/2"

# The data-free calibration trajectory: the model's own sampling with classifier-free guidance.
calibration_labels = (207, 360, 387, 974, 88, 979, 417, 279, 27, 336, 177, 594, 748, 718, 447, 613)  # ImageNet
calibration_cfg_scale = 1.5
factor_floor = 1e-4  # activation maxima, weight maxima and smoothing factors are at least this
alpha_grid = tuple(0.05 * i for i in range(21))
sample_images, sample_tokens = 256, 4096  # and tokens of them all, of every layer's input, on which static ranges are found
reconstruction_samples = 800  # images at some step, on which blocks are reconstructed
replay_tokens = 1024  # tokens of several timesteps that the search sends through the model at once


@dataclass(frozen=True)
class Recipe:
    """A quantisation method as independent choices. Every one of them is a flag of QuantDiT.py.

    Attributes:
        scope: ``blocks``: the four linears of every block; ``adaln``: its modulation too; ``all``: every linear and the patch embedding.
        balance: where smoothing factors come from. ``none``; ``smoothquant``: maxima at one timestep; ``tas``: over all;
            ``salience``: PTQ4DiT's; ``reparameterise``: RepQ-ViT's, factors and shifts that make a range per channel one per tensor.
        timestep: the index, in sampling order (0 is the noisiest), that ``smoothquant`` looks at.
        alphas: migration strengths to try per layer, of ``smoothquant`` and ``tas``; the one of least loss is kept, a single one needs no search.
        weight: how weights are rounded: ``nearest``, ``gptq``, or ``adaround``: learned, block by block.
        weight_range: of the weights that share a scale: ``minmax``, or the best of several: ``shrink`` (Q-DiT), ``percentile`` (PTQ4DiT).
        weight_granularity, weight_group: what shares a weight scale (see ``quant.numerics.uniform.QuantSpec``).
        weight_scales: ``float``, or ``two-level``: integer group scales inside one floating scale per output channel.
        act_granularity: what shares an activation scale; groups are those of the weight.
        act_range: ``dynamic``, or ``static``: found once, one per layer, in the way that ``act_clip`` names (as ``weight_range``; it goes
            for attention's operands and for RepQ-ViT's channels too).
        act_steps: what static ranges are found on: timesteps drawn ``uniform`` or ``normal`` (PTQ4DM); ``each``: uniform ones, but what
            depends on the timestep embedding alone gets a range per timestep (TFMQ-DM).
        attention: quantises the operands of attention: ``none``, ``uniform``, or ``log-sqrt2``, which differs for the softmax output (RepQ-ViT).
        convention: rounding convention of both quantisers.
        rank: of the low-rank branch; 0 is none, None is 32 at width 1152 and the same share elsewhere.
        rounds: alternations of the low-rank branch.
        keep: which of them is kept, ``best`` or ``last``.
        metric: what the branch makes small: errors of the ``weight``, or of the ``output`` on calibration inputs.
        order: ``smooth-first`` quantises ``W diag(s)``; ``lowrank-first`` quantises W and scales what came out.
        adaln_bits: of the adaLN modulation weights (weight-only, per output channel); 16 leaves them in floating point (float16 in the file).
        iterations, rounding_rate: of ``adaround`` for each block, and its learning rate.
        group_sizes: to choose from for every layer by evolution (Q-DiT); empty: ``weight_group`` for all.
        population, generations: of that evolution.
        constraint: on the sizes: ``mean``: their mean, as the published code has it, or ``bitops``, of the paper: no more than with one size
            as large as that mean.
        judge: what evolution makes small: ``sqnr``, minus that of the latents in dB, or ``fid`` of 500 images, as published.
    """

    scope: str = "blocks"
    balance: str = "none"
    timestep: int = 0
    alphas: tuple[float, ...] = ()
    weight: str = "nearest"
    weight_range: str = "minmax"
    weight_granularity: str = "channel"
    weight_group: int = 0
    weight_scales: str = "float"
    act_granularity: str = "image"
    act_range: str = "dynamic"
    act_clip: str = "minmax"
    act_steps: str = "uniform"
    attention: str = "none"
    convention: str = "affine"
    rank: int | None = 0
    rounds: int = 10
    keep: str = "best"
    metric: str = "weight"
    order: str = "smooth-first"
    adaln_bits: int = 16
    iterations: int = 20_000
    rounding_rate: float = 1e-3
    group_sizes: tuple[int, ...] = ()
    population: int = 50
    generations: int = 10
    constraint: str = "mean"
    judge: str = "sqnr"


_STATIC = Recipe(scope="all", act_granularity="tensor", act_range="static", act_clip="percentile", weight_range="percentile")
_GROUPS = dict(weight_granularity="group", weight_group=64, weight_scales="two-level", act_granularity="token", adaln_bits=8)

RECIPES: dict[str, Recipe] = {
    # Round to nearest: the baseline every paper starts from.
    "rtn": Recipe(),
    # Xiao et al., 2023, at a single timestep, as the DiTAS paper compares against (appendix, figures 10 to 12).
    "smoothquant": Recipe(balance="smoothquant", alphas=(0.5,)),
    # Shang et al., 2023: static ranges from timesteps drawn by a normal distribution.
    "ptq4dm": replace(_STATIC, act_steps="normal"),
    # Li et al., 2023: ranges per channel made one per tensor; softmax in powers of the square root of 2. The published code has act_clip="percentile".
    "repq-vit": replace(_STATIC, balance="reparameterise", attention="log-sqrt2", act_clip="minmax"),
    # Huang et al., 2024: what depends on the timestep alone, adaLN included, has ranges per timestep.
    "tfmq-dm": replace(_STATIC, act_steps="each", weight="adaround"),
    # GPTQ weights (Frantar et al., 2023) with PTQ4DM's activations, as Q-DiT compares against.
    "g4w-p4a": replace(_STATIC, weight="gptq", weight_range="minmax", act_steps="normal"),
    # Wu et al., 2024: salience balancing, then block reconstruction.
    "ptq4dit": replace(_STATIC, balance="salience", attention="uniform", weight="adaround"),
    # Chen et al., 2025: groups along the inputs of weights and activations, a size per layer.
    "qdit": Recipe(scope="adaln", weight="gptq", weight_granularity="group", weight_group=128, act_granularity="group",
                   group_sizes=(32, 64, 128, 192, 288)),
    # Dong & Zhang, 2025, as its published code computes it, which can only be simulated.
    "ditas-published": Recipe(balance="tas", alphas=alpha_grid, weight_granularity="strided", weight_group=32,
                              act_granularity="tensor", convention="published", rank=32, keep="last", order="lowrank-first"),
    # The same method on a layout that integer kernels can run.
    "ditas": Recipe(balance="tas", alphas=alpha_grid, rank=None, **_GROUPS),
    # Ours: GPTQ inside the alternation, which fits the branch to the layer's output, smaller groups, and no search, which gains nothing then.
    "ditas-plus": replace(Recipe(balance="tas", alphas=(0.5,), rank=None, weight="gptq", metric="output", **_GROUPS), weight_group=32),
}

# Evolution of group sizes (Q-DiT, section 5.1): shares of the population, and the chance that a mutation draws a layer's size anew.
evolution_parents, evolution_crossovers, evolution_mutations, evolution_probability = 0.2, 0.5, 0.5, 0.1
mean_group_share = 128 / 140.8  # the published code wants a mean group size of 128, where 140.8 is the mean of all it chooses from

judge_images = 8  # by whose latents group sizes are judged
judge_fid_images = 500  # and by FID, as published

# AdaRound with learned activation steps (PTQ4DiT, appendix, and the code it builds on).
step_rate, rounding_weight, rounding_beta, rounding_warmup, reconstruction_batch = 4e-5, 0.01, (20.0, 2.0), 0.2, 32


def lowrank_rank(recipe: Recipe, width: int) -> int:
    """The branch's rank for a layer whose smaller dimension is ``width``."""
    return max(1, round(width * 32 / 1152)) if recipe.rank is None else recipe.rank


def default_labels(num_classes: int, count: int = len(calibration_labels)) -> list[int]:
    """Labels of the calibration trajectory: the paper's for ImageNet, ``i mod num_classes`` for other models."""
    if num_classes == 1000:
        return list(calibration_labels[:count])
    return [i % num_classes for i in range(count)]
