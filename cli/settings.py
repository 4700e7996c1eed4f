"""The checked command lines of the scripts: argparse's namespace goes no further than this.

Every function that makes settings raises a ``UserError`` which names the flag at fault.
"""
import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from cli.parser import find_card
from cli.recipe_flags import bit_widths, build_recipe, recipe_label
from cli.threads import cores_per_process, default_threads, user_threads
from cli.values import at_least, class_labels, new_folder, user_value
from config import Recipe
from diffusion import make_schedule
from errors import UserError
from files.atomic import writable_folder
from models import ModelCard
from quant import checkpoint
from quant.balancing.maxima import check_step
from quant.recipe import check_recipe

# Guidance of the picture, if the command line does not say.
PICTURE_CFG_SCALE = 4.0


@dataclass(frozen=True)
class ModelChoice:
    """A float model, and how its latents become images."""

    name: str  # a key of models.DiT_models
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
        return ("torchrun --nnodes=1 --nproc_per_node=1 sample_merge_TAS.py "
                f"--image-size {self.model.image_size} --model {self.model.name} "
                f"--num-fid-samples 10000 --act-bit {self.act_bits} "
                f"--weight-bit {self.weight_bits} --path {self.output} "
                f"--num-sampling-steps {self.steps}")


@dataclass(frozen=True)
class SampleSettings:
    """The checked command line of sample_merge_TAS.py."""

    model: ModelChoice  # what is sampled, or what the checkpoint was made from
    path: Path | None  # quantised checkpoint; None: the float model is sampled
    steps: str  # as make_schedule takes them
    sampler: str  # ddpm or ddim
    eta: float  # of ddim: 0 is deterministic
    cfg_scale: float  # classifier-free guidance; 1 is none
    class_labels: str  # random, balanced or a list, as given
    listed: tuple[int, ...] | None  # labels used in turn; None: random ones
    seed: int  # with an image's index, all that its noise depends on
    images: int  # how many
    batch: int  # images in a batch
    decode_batch: int | None  # latents decoded at once; None: the whole batch
    sample_dir: Path  # where folders of images go
    overwrite: bool  # delete what the folder holds
    shard: tuple[int, int] | None  # (k, K): make batches k, k + K, …
    assemble: bool  # only the .npz of images that are there
    log_file: Path | None  # a line is appended to it whenever images were made
    backend: str  # fake, integer or auto
    fold: bool  # fold the smoothing factors
    dtype: str  # of all that is not integer
    compile: bool  # fuse what lies around the products
    packed: bool  # integer weights on a CPU stay at 4 bits
    tf32: bool  # TF32 products on NVIDIA GPUs
    threads: int  # CPU threads of each process


def quantize_settings(args: argparse.Namespace) -> QuantizeSettings:
    """Check the command line of QuantDiT.py, and make the folders that it writes to.

    Raises:
        UserError: a flag is unknown, out of range, or contradicts another.
    """
    model = choose_model(args)
    _refuse_flags_of_pipelines(args, model)
    bits = bit_widths(args)

    # What the parts of the recipe and the trajectory say of each other.
    recipe = build_recipe(args)
    label = recipe_label(args)
    user_value(check_recipe, recipe, bits.activations)
    _check_video_judge(recipe, model)
    cfg_scale = PICTURE_CFG_SCALE if args.cfg_scale is None else args.cfg_scale
    at_least(cfg_scale, 1.0, "--cfg-scale")
    at_least(args.seed, 0, "--seed")
    schedule = user_value(make_schedule, args.num_sampling_steps)
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
        steps=args.num_sampling_steps,
        labels=_calibration_labels(args.class_labels, model.num_classes),
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


def choose_model(args: argparse.Namespace) -> ModelChoice:
    """Complete the flags that say which float model is meant by what its card says.

    Raises:
        UserError: no such model, or too few classes.
    """
    name = args.model or config.default_model
    card = find_card(name)
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


def _refuse_flags_of_pipelines(args: argparse.Namespace, model: ModelChoice) -> None:
    for name in ("prompts", "component", "include", "exclude", "pipeline_args",
                 "offload"):
        if getattr(args, name) is not None:
            flag = name.replace("_", "-")
            raise UserError(f"--{flag} is for the folder of a diffusers pipeline, and {model.name} "
                            "is a model of this repository: drop it")


def _check_video_judge(recipe: Recipe, model: ModelChoice) -> None:
    if recipe.judge == "fvd" and model.card.features != "digits":
        raise UserError(f"--judge fvd looks at videos, and {model.name} makes images: "
                        "give --judge fid (the bundled models have videos that stand in)")


def _calibration_labels(text: str | None, num_classes: int) -> tuple[int, ...]:
    if text:
        return tuple(class_labels(text, num_classes))
    return tuple(config.default_labels(num_classes))


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


def sample_settings(args: argparse.Namespace) -> SampleSettings:
    """Check the command line of sample_merge_TAS.py, and read the checkpoint's header.

    Raises:
        UserError: a flag is out of range, or contradicts another or the checkpoint.
    """
    _check_ranges(args)
    shard = _parse_shard(args.shard)
    _check_what_is_made(args)
    _check_log_file(args.log_file)

    model, path, steps = _choose_source(args)
    user_value(make_schedule, steps)

    # A restart by torchrun repeats the command line: it must not delete what was made before.
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    return SampleSettings(
        model=model,
        path=path,
        steps=steps,
        sampler=args.sampler,
        eta=args.eta,
        cfg_scale=args.cfg_scale,
        class_labels=args.class_labels,
        listed=_listed_labels(args.class_labels, model.num_classes),
        seed=args.global_seed,
        images=args.num_fid_samples,
        batch=args.per_proc_batch_size,
        decode_batch=args.decode_batch_size,
        sample_dir=Path(args.sample_dir),
        overwrite=args.overwrite and first_start,
        shard=shard,
        assemble=args.assemble,
        log_file=None if args.log_file is None else Path(args.log_file),
        backend=args.backend,
        fold=args.fold,
        dtype=args.dtype,
        compile=args.compile,
        packed=args.cpu_weights == "packed",
        tf32=args.tf32,
        threads=cpu_threads(args.threads, _sampling_threads()),
    )


def _check_ranges(args: argparse.Namespace) -> None:
    at_least(args.cfg_scale, 1.0, "--cfg-scale")
    at_least(args.num_fid_samples, 1, "--num-fid-samples")
    at_least(args.per_proc_batch_size, 1, "--per-proc-batch-size")
    at_least(args.global_seed, 0, "--global-seed")
    cpu_threads(args.threads, 1)
    if args.decode_batch_size is not None:
        at_least(args.decode_batch_size, 1, "--decode-batch-size")
    if not 0.0 <= args.eta <= 1.0:
        raise UserError(f"--eta {args.eta} is out of range: expected 0 to 1")
    if args.num_sampling_steps is not None:
        user_value(make_schedule, args.num_sampling_steps)


def _parse_shard(text: str | None) -> tuple[int, int] | None:
    """Read ``k/K`` as (k, K), 0 <= k < K."""
    if text is None:
        return None
    parts = text.split("/")
    numbers = len(parts) == 2 and all(part.isdecimal() for part in parts)
    if not numbers or int(parts[0]) >= int(parts[1]):
        raise UserError(f"bad --shard '{text}': expected k/K with k from 0 to K - 1, such as 0/16")
    return int(parts[0]), int(parts[1])


def _check_what_is_made(args: argparse.Namespace) -> None:
    sharded = args.shard is not None
    if sharded and (args.assemble or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError("--shard is for jobs of one process each, before --assemble: "
                        "drop one of them, or torchrun")
    if args.overwrite and (sharded or args.assemble):
        raise UserError("--overwrite would delete what other shards made: "
                        "remove the folder by hand, or give another --sample-dir")


def _check_log_file(path: str | None) -> None:
    if path is None:
        return
    try:
        open(path, "a").close()
    except OSError as error:
        raise UserError(f"cannot write --log-file '{path}': {error.strerror}; "
                        "give another one") from None


def _open_checkpoint(args: argparse.Namespace, path: Path) -> checkpoint.Header:
    """Read the header of ``--path``, with no flag contradicting it."""
    header = checkpoint.read_header(path)
    if args.ckpt is not None:
        raise UserError("--ckpt gives float weights and --path a quantised checkpoint that needs "
                        "none: give one of them")
    for field in ("model", "image_size", "num_classes", "weight_bit", "act_bit"):
        given = getattr(args, field)
        stored = getattr(header, field)
        if given is not None and given != stored:
            flag = field.replace("_", "-")
            raise UserError(f"--{flag} {given} contradicts '{path}', which has {stored}: "
                            "drop the flag or give another --path")
    return header


def _choose_source(args: argparse.Namespace) -> tuple[ModelChoice, Path | None, str]:
    """Find the model, the checkpoint if one is sampled, and the sampling steps."""
    if args.path is None:
        return _choose_float_model(args), None, args.num_sampling_steps or "50"
    path = checkpoint.find(args.path)
    header = _open_checkpoint(args, path)
    model = ModelChoice(
        name=header.model,
        card=find_card(header.model),
        image_size=header.image_size,
        num_classes=header.num_classes,
        weights=None,
        vae=args.vae,
    )
    return model, path, args.num_sampling_steps or header.num_sampling_steps


def _choose_float_model(args: argparse.Namespace) -> ModelChoice:
    if args.weight_bit is not None or args.act_bit is not None:
        raise UserError("--weight-bit and --act-bit describe a quantised checkpoint: give it with "
                        "--path (without, the float model is sampled)")
    model = choose_model(args)
    if args.backend == "integer" and not args.assemble:
        raise UserError("--backend integer needs a quantised checkpoint: give one with --path")
    return model


def _listed_labels(text: str, num_classes: int) -> tuple[int, ...] | None:
    if text == "random":
        return None
    if text == "balanced":
        return tuple(range(num_classes))
    return tuple(class_labels(text, num_classes))


def _sampling_threads() -> int:
    """Choose the threads of a sampling process: part of what fixes an image's bytes on a CPU."""
    chosen = user_threads()
    if chosen is not None:
        return chosen
    return 1 if torch.cuda.is_available() else cores_per_process()
