"""The checked command line of QuantDiT.py, and which model a command line means.

argparse's namespace goes no further than this. Every function that makes settings raises a
``UserError`` which names the flag at fault.
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import config
from cards import ModelCard
from cli.next_command import sampling_command
from cli.parser import DEFAULT_VAE, find_card, refuse_flags
from cli.quantize_flags import PIPELINE_FLAGS, PIPELINES, make_parser
from cli.recipe_flags import bit_widths, build_recipe, recipe_label
from cli.threads import default_threads
from cli.values import at_least, class_labels, new_folder, user_value
from config import Recipe
from diffusion import make_schedule
from errors import UserError
from examples.bundles import find_videos
from files.atomic import writable_folder
from quant import checkpoint
from quant.balancing.maxima import check_step
from quant.recipe import check_recipe

# Guidance of the picture, if the command line does not say.
PICTURE_CFG_SCALE = 4.0
# Images that the next command makes: as many as papers judge, or what a CPU makes in a minute.
IMAGES = 10_000
SMALL_MODEL_IMAGES = 200


@dataclass(frozen=True)
class ModelChoice:
    """A float model, and how its latents become images."""

    name: str  # a key of cards.DiT_models
    card: ModelCard
    image_size: int  # pixels per side
    num_classes: int  # classes the model knows
    weights: str | None  # file or folder of float weights; None: the published or bundled ones
    vae: str  # ema or mse: which Stable Diffusion VAE decodes the latents


@dataclass(frozen=True)
class QuantizeSettings:
    """The checked command line of QuantDiT.py."""

    model: ModelChoice
    recipe: Recipe
    label: str  # the recipe's name with the flags that were given
    weight_bits: int
    act_bits: int
    svd: str  # how the low-rank branch is found
    steps: str  # of the calibration trajectory, as make_schedule takes them
    labels: tuple[int, ...]  # classes to calibrate on, one an image
    seed: int  # of the calibration noise and the picture
    cfg_scale: float  # guidance of the picture only
    output: Path  # the checkpoint
    export: Path | None  # folder of a pipeline that is written too
    report: Path | None  # folder of figures
    report_layers: tuple[str, ...] | None  # whose inputs are drawn; None: the default ones
    reference: str | None  # .npz of real images that group sizes are judged by
    inception: str | None  # file of Inception weights for that
    i3d: str | None  # file of a video network for that
    threads: int  # CPU threads

    @property
    def sampling_command(self) -> str:
        """The command that samples from the checkpoint."""
        images = SMALL_MODEL_IMAGES if self.model.card.is_small else IMAGES
        # The decoder is all that a checkpoint does not say.
        vae = () if self.model.vae == DEFAULT_VAE else ("--vae", self.model.vae)
        return sampling_command(self.output, images, *vae)


def quantize_settings(args: argparse.Namespace) -> QuantizeSettings:
    """Check the command line of QuantDiT.py, and make the folders that it writes to.

    Raises:
        UserError: a flag is unknown, out of range, or contradicts another.
    """
    model = choose_model(args, PIPELINES)
    others = f"the folder of a diffusers pipeline, and {model.name} is a model of this repository"
    refuse_flags(args, make_parser(), PIPELINE_FLAGS, others)
    bits = bit_widths(args)

    # What the parts of the recipe and the trajectory say of each other.
    recipe = build_recipe(args)
    label = recipe_label(args)
    user_value(check_recipe, recipe, bits.activations)
    _check_video_judge(recipe, model)
    cfg_scale = PICTURE_CFG_SCALE if args.cfg_scale is None else args.cfg_scale
    at_least(cfg_scale, 1.0, "--cfg-scale")
    at_least(args.seed, 0, "--seed")
    steps = args.num_sampling_steps or config.sampling_steps
    schedule = user_value(make_schedule, steps)
    user_value(check_step, recipe.timestep, len(schedule))

    # Where it all goes.
    name = checkpoint.default_name(
        model.name, model.image_size, bits.weights, bits.activations, label)
    output = _checkpoint_path(args.output, name)
    writable_folder(output.parent)
    report = None if args.report is None else writable_folder(Path(args.report))
    return QuantizeSettings(
        model=model,
        recipe=recipe,
        label=label,
        weight_bits=bits.weights,
        act_bits=bits.activations,
        svd=args.svd,
        steps=steps,
        labels=_calibration_labels(args.class_labels, model.num_classes, recipe),
        seed=args.seed,
        cfg_scale=cfg_scale,
        output=output,
        export=new_folder(export_folder(output)) if args.export else None,
        report=report,
        report_layers=_names(args.report_layers),
        reference=args.reference,
        inception=args.inception,
        i3d=args.i3d,
        threads=cpu_threads(args.threads, default_threads()),
    )


def choose_model(args: argparse.Namespace, otherwise: str) -> ModelChoice:
    """Complete the flags that say which float model is meant by what its card says.

    Args:
        otherwise: what else a command takes, for the message.

    Raises:
        UserError: no such model, or too few classes.
    """
    name = args.model or config.default_model
    card = find_card(name, otherwise)
    num_classes = args.num_classes
    if num_classes is None:
        num_classes = card.num_classes
    return ModelChoice(
        name=name,
        card=card,
        image_size=card.image_sizes[0] if args.image_size is None else args.image_size,
        num_classes=at_least(num_classes, 1, "--num-classes"),
        weights=args.ckpt,
        vae=args.vae,
    )


def _check_video_judge(recipe: Recipe, model: ModelChoice) -> None:
    if recipe.judge == "fvd" and find_videos(model.card.bundle) is None:
        raise UserError(f"--judge fvd looks at videos, and {model.name} makes images: "
                        "give --judge fid (of all models the digits alone have videos, which "
                        "stand in)")


def _calibration_labels(text: str | None, num_classes: int, recipe: Recipe) -> tuple[int, ...]:
    if text:
        named = class_labels(text, num_classes)
        return tuple(named[i % len(named)] for i in range(recipe.images or len(named)))
    count = recipe.images or len(config.calibration_labels)
    return tuple(config.default_labels(num_classes, count))


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(text.split(","))


def _checkpoint_path(given: str | None, default_name: str) -> Path:
    """Add the suffix of checkpoints to the path that was given, or take the default."""
    path = Path(given or Path("results") / default_name)
    suffix = checkpoint.SUFFIX
    if path.name in ("", ".."):
        raise UserError(f"--output '{given}' names no file: "
                        f"give one such as results/model{suffix}")
    return path if path.suffix == suffix else path.with_name(path.name + suffix)


def export_folder(checkpoint_path: Path) -> Path:
    """Name the folder of a pipeline that a checkpoint is exported to."""
    return checkpoint_path.with_name(f"{checkpoint_path.stem}-diffusers")


def cpu_threads(given: int | None, default: int) -> int:
    """Return what ``--threads`` says, or the default.

    Raises:
        UserError: it is below 1.
    """
    return default if given is None else at_least(given, 1, "--threads")
