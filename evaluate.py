"""ADM's five numbers of generated images, without TensorFlow: FID, sFID, Inception Score, precision, recall.

    python evaluate.py VIRTUAL_imagenet256_labeled.npz samples/….npz
    python evaluate.py results/compare/digits-reference.npz samples/….npz --features digits      # the bundled model's samples
"""
import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import torch

from cli.parser import Parser, run
from cli.values import at_least, user_value
from evaluation.features import load_set
from evaluation.networks import FEATURES, load_extractor
from evaluation.scores import HEADINGS, cells, score


def main(args: argparse.Namespace) -> None:
    at_least(args.batch_size, 1, "--batch-size")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extractor = load_extractor(args.features, args.inception, device)
    load = partial(load_set, extractor=extractor, batch=args.batch_size, cache=args.cache)
    reference = user_value(load, Path(args.reference))
    rows = []
    for path in args.samples:
        samples = user_value(load, Path(path))
        rows.append((path, user_value(score, reference, samples, args.pr_dtype == "float16", device)))
    if args.json:
        print(json.dumps([{"reference": args.reference, "samples": path, "features": extractor.name, **dataclasses.asdict(scores)}
                          for path, scores in rows], indent=2))
        return
    print(f"| samples | {' | '.join(HEADINGS)} |\n|{'---|' * (len(HEADINGS) + 1)}")
    for path, scores in rows:
        print(f"| {path} | {' | '.join(cells(scores))} |")
    print(f"\nreference: {args.reference} (N = {reference.count or 'n/a'}), features {extractor.name}, "
          f"distances of precision and recall in {args.pr_dtype}")
    if any(scores.n is not None and scores.n < extractor.widths[0] for _, scores in rows):
        print(f"fewer images than the {extractor.widths[0]} features: FID is biased upwards, compare it at equal N only")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reference", help=".npz of real images (arr_0) and/or their statistics (mu sigma mu_s sigma_s)")
    parser.add_argument("samples", nargs="+", help=".npz of generated images; several give a row each")
    parser.add_argument("--features", choices=FEATURES, default="inception",
                        help="inception (default), or digits: the bundled classifier, for images of the bundled models")
    parser.add_argument("--inception", help="Inception weights (default: fetched on first use)")
    parser.add_argument("--pr-dtype", choices=("float32", "float16"), default="float32",
                        help="of the distances behind precision and recall; ADM's evaluator uses float16 (default: float32)")
    parser.add_argument("--batch-size", type=int, default=64, help="images sent through the network at once (default: 64)")
    parser.add_argument("--cache", action="store_true", help="keep the features next to each .npz and use them again")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
