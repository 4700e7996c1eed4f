"""The checked command line of sample_merge_TAS.py, for a model of this repository.

What any long run of images has in common stands in ``RunSettings``; ``cli.pipeline_sampling`` has
what is said of a pipeline.
"""
import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch

import config
from cli.parser import find_card, refuse_flags
from cli.sample_flags import PIPELINE_FLAGS, QUANTISED, make_parser
from cli.settings import ModelChoice, choose_model, cpu_threads
from cli.threads import cores_per_process, user_threads
from cli.values import at_least, class_labels, user_value
from diffusion import make_schedule
from errors import UserError
from quant import checkpoint


@dataclass(frozen=True)
class RunSettings:
    """How a long run goes, whatever makes its images."""

    images: int  # how many
    batch: int  # images in a batch
    seed: int  # with an image's index, all that its noise depends on
    sample_dir: Path  # where folders of images go
    overwrite: bool  # delete what the folder holds
    shard: tuple[int, int] | None  # (k, K): make batches k, k + K, …
    assemble: bool  # only the .npz of images that are there
    log_file: Path | None  # a line is appended to it whenever images were made
    backend: str  # fake, integer or auto
    compile: bool  # fuse what lies around the products
    tf32: bool  # TF32 products on NVIDIA GPUs
    threads: int  # CPU threads of each process


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
    decode_batch: int | None  # latents decoded at once; None: the whole batch
    fold: bool  # fold the smoothing factors
    dtype: str  # of all that is not integer
    packed: bool  # integer weights on a CPU stay at 4 bits
    run: RunSettings


def sample_settings(args: argparse.Namespace) -> SampleSettings:
    """Check the command line of sample_merge_TAS.py, and read the checkpoint's header.

    Raises:
        UserError: a flag is out of range or for pipelines, or contradicts another or the
            checkpoint.
    """
    others = "the folder of a diffusers pipeline, given with --path"
    refuse_flags(args, make_parser(""), PIPELINE_FLAGS, others)
    _check_ranges(args)
    run = run_settings(args)
    model, path, steps = _choose_source(args)
    user_value(make_schedule, steps)
    return SampleSettings(
        model=model,
        path=path,
        steps=steps,
        sampler=args.sampler,
        eta=args.eta,
        cfg_scale=config.sampling_cfg_scale if args.cfg_scale is None else args.cfg_scale,
        class_labels=args.class_labels,
        listed=_listed_labels(args.class_labels, model.num_classes),
        decode_batch=args.decode_batch_size,
        fold=args.fold,
        dtype=args.dtype or "float32",
        packed=args.cpu_weights == "packed",
        run=run,
    )


def run_settings(args: argparse.Namespace) -> RunSettings:
    """Check the flags that any long run of images has.

    Raises:
        UserError: one is out of range, or contradicts another.
    """
    at_least(args.num_fid_samples, 1, "--num-fid-samples")
    at_least(args.per_proc_batch_size, 1, "--per-proc-batch-size")
    at_least(args.global_seed, 0, "--global-seed")
    shard = _parse_shard(args.shard)
    _check_what_is_made(args)
    _check_log_file(args.log_file)

    # A restart by torchrun repeats the command line: it must not delete what was made before.
    first_start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"
    return RunSettings(
        images=args.num_fid_samples,
        batch=args.per_proc_batch_size,
        seed=args.global_seed,
        sample_dir=Path(args.sample_dir),
        overwrite=args.overwrite and first_start,
        shard=shard,
        assemble=args.assemble,
        log_file=None if args.log_file is None else Path(args.log_file),
        backend=args.backend,
        compile=args.compile,
        tf32=args.tf32,
        threads=cpu_threads(args.threads, _sampling_threads()),
    )


def _check_ranges(args: argparse.Namespace) -> None:
    if args.cfg_scale is not None:
        at_least(args.cfg_scale, 1.0, "--cfg-scale")
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
    model = choose_model(args, QUANTISED)
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
