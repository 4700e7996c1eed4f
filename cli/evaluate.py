"""The story of evaluate.py: look at files of images or videos, print their numbers."""
import argparse
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli.values import at_least, user_value
from config import FRAMES
from errors import UserError
from evaluation.features import load_set
from evaluation.networks import load_extractor
from evaluation.scores import HEADINGS, cells, score
from evaluation.video import fvd, load_video_extractor, load_video_set


@dataclass(frozen=True)
class EvaluateSettings:
    """The checked command line of evaluate.py."""

    reference: Path            # .npz of real images, or of their statistics
    samples: tuple[Path, ...]  # .npz files of generated images
    features: str              # the network that looks at them
    inception: str | None      # its weights; None: fetched on first use
    half: bool                 # distances of precision and recall in float16
    batch: int                 # images sent through the network at once
    cache: bool                # keep the features beside each file
    json: bool                 # print JSON instead of a table
    fvd: bool                  # the files hold videos
    i3d: str | None            # the video network; None: the digits' stand-in


def evaluate_settings(args: argparse.Namespace) -> EvaluateSettings:
    """Check the command line of evaluate.py.

    Raises:
        UserError: a flag is out of range, or has no effect on what is measured.
    """
    check_video_flags(args)
    return EvaluateSettings(
        reference=Path(args.reference),
        samples=tuple(map(Path, args.samples)),
        features=args.features,
        inception=args.inception,
        half=args.pr_dtype == "float16",
        batch=at_least(args.batch_size, 1, "--batch-size"),
        cache=args.cache,
        json=args.json,
        fvd=args.fvd,
        i3d=args.i3d)


def check_video_flags(args: argparse.Namespace) -> None:
    """Check that no flag for images was given with videos, nor the other way round.

    Raises:
        UserError: one was.
    """
    if not args.fvd:
        if args.i3d is not None:
            raise UserError("--i3d is the network of --fvd: give that, too, or drop it")
        return
    of_images = {
        "--cache": args.cache,
        "--inception": args.inception is not None,
        "--pr-dtype float16": args.pr_dtype == "float16",
    }
    for flag, is_given in of_images.items():
        if is_given:
            raise UserError(f"{flag} is for images: drop it, or --fvd")


def evaluate(settings: EvaluateSettings) -> None:
    """Print the numbers of every file.

    Raises:
        UserError: a file or a network cannot be had, or does not fit.
    """
    # The numbers are to be those of full float32 products.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.fvd:
        judge_videos(settings, device)
    else:
        judge_images(settings, device)


def judge_images(settings: EvaluateSettings, device: torch.device) -> None:
    """Print ADM's five numbers of every file."""
    # Look at the images.
    extractor = load_extractor(settings.features, settings.inception, device)
    load = partial(load_set, extractor=extractor, batch=settings.batch, cache=settings.cache)
    reference = user_value(load, settings.reference)
    rows = []
    for path in settings.samples:
        samples = user_value(load, path)
        rows.append((str(path), user_value(score, reference, samples, settings.half, device)))

    # Show their numbers.
    if settings.json:
        entries = [(path, dataclasses.asdict(scores)) for path, scores in rows]
        print(as_json(entries, str(settings.reference), extractor.name))
        return
    print(as_table(HEADINGS, [(path, cells(scores)) for path, scores in rows]))
    print(f"\nreference: {settings.reference} (N = {reference.count or 'n/a'}), "
          f"features {extractor.name}, distances of precision and recall in "
          f"{'float16' if settings.half else 'float32'}")
    width = extractor.widths[0]
    if any(scores.n is not None and scores.n < width for _, scores in rows):
        print(f"fewer images than the {width} features: "
              "FID is biased upwards, compare it at equal N only")


def judge_videos(settings: EvaluateSettings, device: torch.device) -> None:
    """Print the FVD of every file."""
    # Look at the videos.
    extractor = load_video_extractor(settings.features, settings.i3d, device)
    batch = max(1, settings.batch // FRAMES)
    load = partial(load_video_set, extractor=extractor, batch=batch)
    reference = user_value(load, settings.reference)
    rows = []
    for path in settings.samples:
        samples = user_value(load, path)
        rows.append((str(path), samples.count, user_value(fvd, reference, samples)))

    # Show their numbers.
    if settings.json:
        entries = [(path, {"n": count, "fvd": distance}) for path, count, distance in rows]
        print(as_json(entries, str(settings.reference), extractor.name))
        return
    lines = [(path, [str(count), f"{distance:.3f}"]) for path, count, distance in rows]
    print(as_table(("N", "FVD"), lines))
    print(f"\nreference: {settings.reference} (N = {reference.count}), features {extractor.name}, "
          f"the first {FRAMES} frames")
    width = len(reference.features.mean)
    if any(count < width for _, count, _ in rows):
        print(f"fewer videos than the {width} features: "
              "FVD is biased upwards, compare it at equal N only")


def as_json(rows: list[tuple[str, dict]], reference: str, features: str) -> str:
    """Write each file with its numbers as an entry of a JSON list."""
    entries = []
    for path, numbers in rows:
        source = {"reference": reference, "samples": path, "features": features}
        entries.append(source | numbers)
    return json.dumps(entries, indent=2)


def as_table(headings: tuple[str, ...], rows: list[tuple[str, list[str]]]) -> str:
    """Write each file with its numbers as a row of a Markdown table."""
    lines = [f"| samples | {' | '.join(headings)} |", f"|{'---|' * (len(headings) + 1)}"]
    for path, numbers in rows:
        lines.append(f"| {path} | {' | '.join(numbers)} |")
    return "\n".join(lines)
