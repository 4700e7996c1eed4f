"""The checked command line of compare.py, for a model of this repository."""
import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import config
from cards import ModelCard
from cli.parser import find_card, refuse_flags
from cli.threads import cores_per_process
from cli.values import at_least, one_of
from comparison.flags import PIPELINE_FLAGS, PIPELINES, make_parser
from errors import UserError
from evaluation.networks import load_reference
from files.atomic import writable_folder


@dataclass(frozen=True)
class TableSettings:
    """What the tables of any model have in common.

    Recipes and numbers of steps are checked where they are used, because they need each other.

    Attributes:
        model: its name, or its folder.
        recipes: rows, ``recipe[:flag=value,…]``; None for the default ones.
        bits: bit widths of every recipe, such as ``W4A8``.
        num_fid_samples: images per row.
        num_fidelity_samples: how many of them are compared with the float model's.
        per_proc_batch_size: images in a batch.
        threads: CPU threads per sampling process.
        nproc: sampling processes.
        seed: of the calibration noise.
        global_seed: of the samples.
        pr_dtype: of the distances behind precision and recall.
        output: folder of what was quantised, samples and tables.
        report: folder of figures and pages; None for none.
    """

    model: str
    recipes: tuple[str, ...] | None
    bits: tuple[str, ...]
    num_fid_samples: int
    num_fidelity_samples: int
    per_proc_batch_size: int
    threads: int
    nproc: int
    seed: int
    global_seed: int
    pr_dtype: str
    output: Path
    report: Path | None


@dataclass(frozen=True)
class CompareSettings(TableSettings):
    """The checked command line of compare.py, for a model of this repository.

    Attributes:
        card: what is known of the model.
        image_sizes: pixels per side; several give a table each.
        references: the ``.npz`` of real images for each of them.
        steps: of calibration and sampling, as ``make_schedule`` takes them; several give a table
            each.
        decode_batch_size: latents that the VAE decodes at once; None for the whole batch.
        cfg_scales: guidance of the samples; several give a table each.
        sampler: ``ddpm`` or ``ddim``.
        eta: of ddim.
        ckpt: float weights; None for the published or bundled ones.
        vae: which Stable Diffusion VAE.
        inception: Inception weights; None for the fetched ones.
        report_layers: as in QuantDiT.py.
    """

    card: ModelCard
    image_sizes: tuple[int, ...]
    references: tuple[Path, ...]
    steps: tuple[str, ...]
    decode_batch_size: int | None
    cfg_scales: tuple[float, ...]
    sampler: str
    eta: float
    ckpt: str | None
    vae: str
    inception: str | None
    report_layers: str | None


def compare_settings(args: argparse.Namespace) -> CompareSettings:
    """Check the command line and fill in what depends on the machine and the model.

    Raises:
        UserError: a value is not allowed, or the output folder cannot be written to.
    """
    card = find_card(args.model, PIPELINES)
    others = f"the folder of a pipeline, and {args.model} is none"
    refuse_flags(args, make_parser(""), PIPELINE_FLAGS, others)
    common = table_settings(args)
    image_sizes = args.image_size or [card.image_sizes[0]]
    cfg_scales = args.cfg_scale or [config.sampling_cfg_scale]

    # Check what was given.
    at_least(min(cfg_scales), 1.0, "--cfg-scale")
    at_least(args.eta, 0.0, "--eta")
    if args.eta > 1:
        raise UserError(f"--eta {args.eta} is out of range: expected 0 to 1")
    if args.decode_batch_size is not None:
        at_least(args.decode_batch_size, 1, "--decode-batch-size")
    for size in image_sizes:
        one_of(size, card.image_sizes, "--image-size")
    references = find_references(args.reference, image_sizes, card, Path(args.output))

    return CompareSettings(
        **common,
        card=card,
        image_sizes=tuple(image_sizes),
        references=references,
        steps=tuple(args.num_sampling_steps or [config.sampling_steps]),
        decode_batch_size=args.decode_batch_size,
        cfg_scales=tuple(cfg_scales),
        sampler=args.sampler,
        eta=args.eta,
        ckpt=args.ckpt or None,
        vae=args.vae,
        inception=args.inception or None,
        report_layers=args.report_layers or None)


def table_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Check what tables of any model need; returns the fields of ``TableSettings``.

    Raises:
        UserError: a number is too small.
    """
    cores = cores_per_process()
    nproc = (torch.cuda.device_count() or cores) if args.nproc is None else args.nproc
    threads = max(1, cores // max(1, nproc)) if args.threads is None else args.threads
    check_numbers(args, nproc, threads)
    return {
        "model": args.model,
        "recipes": tuple(args.recipes) if args.recipes else None,
        "bits": tuple(args.bits),
        "num_fid_samples": args.num_fid_samples,
        "num_fidelity_samples": args.num_fidelity_samples,
        "per_proc_batch_size": args.per_proc_batch_size,
        "threads": threads,
        "nproc": nproc,
        "seed": args.seed,
        "global_seed": args.global_seed,
        "pr_dtype": args.pr_dtype,
        "output": Path(args.output),
        "report": Path(args.report) if args.report else None,
    }


def check_numbers(args: argparse.Namespace, nproc: int, threads: int) -> None:
    """Check that no number is too small.

    Raises:
        UserError: one is.
    """
    limits = (
        ("--num-fid-samples", args.num_fid_samples, 4),
        ("--per-proc-batch-size", args.per_proc_batch_size, 1),
        ("--nproc", nproc, 1),
        ("--num-fidelity-samples", args.num_fidelity_samples, 0),
        ("--global-seed", args.global_seed, 0),
        ("--seed", args.seed, 0),
        ("--threads", threads, 1),
    )
    for flag, value, minimum in limits:
        at_least(value, minimum, flag)


def find_references(
    given: list[str] | None,
    image_sizes: list[int],
    card: ModelCard,
    output: Path,
) -> tuple[Path, ...]:
    """Choose a file of real images for every image size.

    Those of a bundled model are written into the folder ``output``.

    Raises:
        UserError: there are not as many files as sizes, or the folder cannot be written to.
    """
    if given is not None and len(given) != len(image_sizes):
        raise UserError(
            f"--reference has {len(given)} files and --image-size {len(image_sizes)} sizes: "
            "expected one file per size")
    folder = writable_folder(output)
    paths = given or [None] * len(image_sizes)
    return tuple(load_reference(card, path, folder) for path in paths)
