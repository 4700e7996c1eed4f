"""The recipes, and the numbers behind them that several files read.

A constant of a single formula stands beside that formula. A flag overrides a recipe's field or a
default; a checkpoint stores the recipe that was used.
"""
from dataclasses import dataclass, replace

# What is quantised, if the command line does not say.
default_model = "DiT-XL/2"
default_recipe = "ditas"
weight_bit = 4                 # 2 to 8, or 16 to leave weights alone
act_bit = 8                    # 4 to 8, or 16 to leave activations alone

# How it is sampled, if the command line does not say.
sampling_steps = "50"
sampling_cfg_scale = 1.5       # guidance scale

# Where a recipe may look: the four linears of every block ("blocks"); its modulation too ("adaln");
# every linear and the patch embedding ("all"); all but this one and the last linear ("inner").
SCOPES = ("blocks", "adaln", "inner", "all")

# What is reconstructed at once: the transformer blocks ("blocks"); these, every linear before them,
# and what comes after them (PTQ4DiT, "whole"); all that timestep and condition alone decide, then
# the blocks without it (TFMQ-DM, "temporal").
UNITS = ("blocks", "whole", "temporal")

# What a quantised model computes in: floating point that simulates integers, integers, or the
# faster of the two.
BACKENDS = ("fake", "integer", "auto")

# The calibration trajectory, which needs no data: the model's own guided sampling.
calibration_labels = (         # ImageNet classes, the paper's
    207, 360, 387, 974, 88, 979, 417, 279, 27, 336, 177, 594, 748, 718, 447, 613)
calibration_cfg_scale = 1.5    # guidance scale
replay_tokens = 1024           # tokens, of several timesteps, in one call of the replay

# Smoothing factors.
factor_floor = 1e-4            # least activation maximum, weight maximum and smoothing factor
alpha_grid = tuple(0.05 * i for i in range(21))  # migration strengths that a search tries

# Where Hessians are sequential, these images run through the model as it is quantised.
hessian_images = 256           # images, each at one of the timesteps, as many as in Q-DiT's code

# Static ranges are found on a sample of every layer's input.
sample_images = 256            # images, each at one of the timesteps
sample_tokens = 4096           # tokens of all these images together
least_step_tokens = 16         # of every timestep, where each has a range of its own


@dataclass(frozen=True)
class Recipe:
    """A quantisation method as independent choices. Nearly all are flags of QuantDiT.py.

    ``rounds``, ``keep`` and ``order`` are not. Checkpoints store these names, so they stay as they
    are.
    """

    scope: str = "blocks"                # one of SCOPES

    # Balancing: factors that move outliers from activations into weights.
    # "smoothquant": from maxima at one timestep; "tas": from maxima over all timesteps;
    # "salience": PTQ4DiT's; "salience-equal": the same, all timesteps counted alike;
    # "reparameterise": RepQ-ViT's, factors and shifts that make a range per channel one per tensor.
    balance: str = "none"
    # The weight whose product with RepQ-ViT's shifts is taken out of the bias: "quantised" or
    # "float".
    bias_correction: str = "quantised"
    # The timestep of "smoothquant", in sampling order: 0 is the noisiest.
    timestep: int = 0
    # Migration strengths that "smoothquant" and "tas" try in each layer. The one of least loss is
    # kept; a single one needs no search.
    alphas: tuple[float, ...] = ()
    # Timesteps whose losses the search of several sums: "all", or "published", the 50 noisiest.
    search_steps: str = "all"

    # Weights.
    weight: str = "nearest"              # "gptq"; "adaround": rounding learned unit by unit
    # "shrink" (Q-DiT), "shrink-far" (TFMQ-DM), "percentile" (PTQ4DiT): best of several
    weight_range: str = "minmax"
    weight_granularity: str = "channel"  # what shares a scale (quant.numerics.uniform.QuantSpec)
    weight_group: int = 0                # inputs that share a scale, where groups do
    weight_scales: str = "float"         # "two-level": integers inside one float per output
    # "allow": the last group of a row may be shorter, of weights and activations; "refuse".
    group_tail: str = "refuse"
    # Inputs whose second moment GPTQ and a low-rank branch fitted to outputs look at: those of the
    # "float" model, or "sequential": what the blocks before, quantised, make of them.
    hessian: str = "float"

    # Activations.
    act_granularity: str = "image"       # what shares a scale; groups are those of the weights
    act_range: str = "dynamic"           # measured in every call; "static": found once per layer
    # How static ranges are chosen, as weight_range says for weights; "search" is PTQ4DM's of scale
    # and zero point. It goes for attention's operands and for RepQ-ViT's channels too.
    act_clip: str = "minmax"
    # Timesteps on which static ranges are found: drawn "uniform" or "normal" (PTQ4DM). With "each"
    # every range is one per timestep (TFMQ-DM's code); with "embedding", only those of what
    # timestep and condition alone decide.
    act_steps: str = "uniform"
    # Operands of attention's products: "none", "uniform", or "log-sqrt2", which differs from
    # "uniform" for the softmax output (RepQ-ViT).
    attention: str = "none"

    # Inputs of adaLN and the timestep embedder: "quantised" as others are, or left in "float".
    adaln_input: str = "quantised"

    # How a range becomes scale and zero point, of weights and activations. "affine": widened to
    # include 0; "free": the range as it is; "clamped": that with zero points moved to a code;
    # "published": DiTAS's code (quant.numerics.uniform.QuantSpec).
    convention: str = "affine"

    # Low-rank branch: runs beside the quantised weight and takes up its error.
    rank: int | None = 0                 # 0: none; None: 32 at width 1152, the same share elsewhere
    rounds: int = 10                     # alternations of quantising and decomposing
    keep: str = "best"                   # the round that is kept; "last"
    metric: str = "weight"               # whose error is small: the weight's; the "output"'s
    order: str = "smooth-first"          # "lowrank-first": W is quantised before it is smoothed

    # Modulation weights of adaLN, weight-only and per output; 16: float16 in the file.
    adaln_bits: int = 16

    # Training of "adaround".
    units: str = "blocks"                # what is learned at once, one of UNITS
    learned: str = "both"                # rounding and activation steps; "rounding": that alone
    iterations: int = 20_000             # for each unit
    rounding_rate: float = 1e-3          # learning rate

    # Tuning from end to end (ours): iterations in which codes and branches of all layers learn what
    # the float model gives; 0: none.
    tuning: int = 0

    # Images that calibration samples, of classes or prompts in turn; None: 16, or one a prompt.
    images: int | None = None

    # A group size per layer (Q-DiT).
    group_sizes: tuple[int, ...] = ()    # to choose from; empty: weight_group for all layers
    # How sizes are found: by "evolution", or as the integer program that makes the sum of the
    # layers' output errors small ("ilp"), or of their Hessian traces times weight errors
    # ("hessian").
    allocate: str = "evolution"
    population: int = 50                 # configurations in a generation of evolution
    generations: int = 10
    # What the sizes must keep to. "mean": their mean, as the published code has it; "bitops", of
    # the paper: no more bit operations than one size as large as that mean.
    constraint: str = "mean"
    # What evolution makes small: "sqnr": minus the latents' SQNR in dB; "fid": FID of 500 images,
    # as published; "fvd": FVD of 100 videos. Integer programs are judged once, in the end.
    judge: str = "sqnr"
    judge_sampler: str = "ddim"          # "ddpm"; the published code samples by DDIM
    judge_cfg_scale: float = 1.0         # guidance; 1, as in the published code, is none

    @property
    def is_static(self) -> bool:
        """Whether activation ranges are found once, before sampling."""
        return self.act_range == "static"


# Static ranges of every linear's input: what the baselines below share.
_STATIC = Recipe(
    scope="all",
    weight_range="percentile",
    act_granularity="tensor",
    act_range="static",
    act_clip="percentile",
)

# A layout that integer kernels can run: groups of weights, tokens of activations.
_GROUPS = {
    "weight_granularity": "group",
    "weight_group": 64,
    "weight_scales": "two-level",
    "act_granularity": "token",
    "adaln_bits": 8,
}

# Ours: GPTQ inside the alternation that fits the branch to the layer's output, and smaller groups.
# Without a search, which gains nothing then.
_PLUS = Recipe(
    balance="tas",
    alphas=(0.5,),
    weight="gptq",
    rank=None,
    metric="output",
    **(_GROUPS | {"weight_group": 32}),
)

RECIPES: dict[str, Recipe] = {
    # The baseline that every paper starts from: round to nearest.
    "rtn": Recipe(),

    # Xiao et al., 2023: outliers move from activations into weights. At a single timestep, as the
    # DiTAS paper compares against it (appendix, figures 10 to 12).
    "smoothquant": Recipe(
        balance="smoothquant",
        alphas=(0.5,),
    ),

    # Shang et al., 2023: static ranges from timesteps that are drawn by a normal distribution.
    "ptq4dm": replace(
        _STATIC,
        act_steps="normal",
    ),

    # Li et al., 2023: ranges per channel made one per tensor; softmax outputs in powers of the
    # square root of 2. The published code has act_clip="percentile".
    "repq-vit": replace(
        _STATIC,
        balance="reparameterise",
        bias_correction="float",
        act_clip="minmax",
        attention="log-sqrt2",
    ),

    # Huang et al., 2024: what timestep and condition alone decide, adaLN included, is reconstructed
    # on its own; every activation has a range for each timestep. The first and last layer stay.
    "tfmq-dm": Recipe(
        scope="inner",
        weight="adaround",
        weight_range="shrink-far",
        act_granularity="tensor",
        act_range="static",
        act_clip="shrink-far",
        act_steps="each",
        attention="uniform",
        units="temporal",
        learned="rounding",
    ),

    # Frantar et al., 2023: GPTQ corrects later weights for the rounding of earlier ones. With the
    # activations of PTQ4DM, as Q-DiT compares against it.
    "g4w-p4a": replace(
        _STATIC,
        weight="gptq",
        weight_range="minmax",
        act_steps="normal",
    ),

    # Wu et al., 2024 (PTQ4DiT): channels balanced by their salience, then reconstruction of the
    # embedders layer by layer, the blocks and the final layer.
    "ptq4dit": replace(
        _STATIC,
        balance="salience",
        weight="adaround",
        attention="uniform",
        units="whole",
    ),

    # Chen et al., 2025 (Q-DiT): groups along the inputs of weights and activations, whose size is
    # searched for in every layer. The paper's sizes are those of all weights; inputs computed from
    # the timestep stay in floating point, as in its code. The code has convention="clamped".
    "qdit": Recipe(
        scope="all",
        weight="gptq",
        weight_granularity="group",
        weight_group=128,
        hessian="sequential",
        act_granularity="group",
        adaln_input="float",
        convention="free",
        group_sizes=(32, 64, 128, 192, 288),
    ),

    # Dong & Zhang, 2025 (DiTAS): outliers smoothed over all timesteps by factors from a search,
    # low-rank branches for what is left. As the published code computes it, which can only be
    # simulated.
    "ditas-published": Recipe(
        balance="tas",
        alphas=alpha_grid,
        search_steps="published",
        weight_granularity="strided",
        weight_group=32,
        act_granularity="tensor",
        convention="published",
        rank=32,
        keep="last",
        order="lowrank-first",
    ),

    # Dong & Zhang, 2025: the method of DiTAS on a layout that integer kernels can run.
    "ditas": Recipe(
        balance="tas",
        alphas=alpha_grid,
        rank=None,
        **_GROUPS,
    ),

    "ditas-plus": _PLUS,

    # Ours, too: that, tuned from end to end, on more images, because what is learned has to hold
    # for others.
    "ditas-tuned": replace(
        _PLUS,
        tuning=500,
        images=96,
    ),
}

# Flags with which compare.py scales a published search or training down to a bundled model.
small_model_budgets = {
    "ptq4dit": "iterations=150,rounding-rate=0.03",
    "tfmq-dm": "iterations=150,rounding-rate=0.03",
    "qdit": "population=10,generations=4",
}

# Evolution of group sizes (Q-DiT, section 5.1): shares of the population, and mutations.
evolution_parents = 0.2            # the best so far, from which the next generation descends
evolution_crossovers = 0.5         # children that mix two parents
evolution_mutations = 0.5          # children that change one parent
evolution_probability = 0.1        # that a mutation draws a layer's size anew
# The published code wants a mean size of 128, where all sizes it chooses from have a mean of 140.8.
mean_group_share = 128 / 140.8

# What group sizes are judged by.
judge_images = 8                   # whose latents' SQNR is measured
judge_fid_images = 500             # whose FID is measured, as published
FRAMES = 16                        # of a video that FVD looks at, the first ones
judge_fvd_videos = 100             # whose FVD is measured, as published

# AdaRound with learned activation steps (PTQ4DiT, appendix, and the code it builds on).
step_rate = 4e-5                   # learning rate of the activation steps
rounding_weight = 0.01             # weight of the regulariser
rounding_beta = (20.0, 2.0)        # its exponent, after warm-up and at the end
rounding_warmup = 0.2              # share of the iterations before it sets in
reconstruction_batch = 32          # samples per iteration
reconstruction_samples = 800       # images, each at one of the timesteps, to reconstruct blocks on


# Tuning from end to end.
tuning_batch = 32                  # images per iteration
tuning_rate = 0.01                 # size of a step, in codes


def lowrank_rank(recipe: Recipe, width: int) -> int:
    """Return the branch's rank for a layer whose smaller dimension is ``width``."""
    if recipe.rank is None:
        return max(1, round(width * 32 / 1152))
    return recipe.rank


def default_labels(num_classes: int, count: int = len(calibration_labels)) -> list[int]:
    """Return labels to calibrate with: the paper's for ImageNet, else spread over all classes."""
    if num_classes == 1000 and count <= len(calibration_labels):
        return list(calibration_labels[:count])
    if num_classes > count:
        return [i * num_classes // count for i in range(count)]
    return [i % num_classes for i in range(count)]
