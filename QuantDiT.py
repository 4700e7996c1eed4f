"""Quantise a DiT: float checkpoint in, quantised checkpoint and a picture out.

    python QuantDiT.py --image-size 256 --seed 1 --model DiT-XL/2 --act-bit 8 --weight-bit 4 --num-sampling-steps 100
    python QuantDiT.py --model DiT-Digits-Outliers                       # bundled, runs on a CPU in a minute
    python QuantDiT.py --model DiT-Digits-Outliers --recipe smoothquant --smooth-timestep 25
    python QuantDiT.py --model DiT-Digits-Outliers --recipe rtn --balance tas --alpha grid --act-granularity token    # any part of any recipe
"""
import argparse
import time
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import nn

import config
from architectures.dit import LayerPlace, block_linears, layer_places
from cli.parser import Parser, add_model_flags, find_card, run
from cli.recipe_flags import add_recipe_flags, build_recipe, recipe_label
from cli.values import at_least, class_labels, one_of, user_value
from config import RECIPES, Recipe
from diffusion import ImageNoise, Schedule, ddpm_step, make_schedule
from diffusion.generate import decode_images, generate_latents
from download import Decoder, load_decoder, load_model
from errors import UserError
from evaluation.judge import Judge, fid_judge, sqnr_judge
from evaluation.networks import load_extractor, load_reference
from files.atomic import atomic, writable_folder
from files.images import grid, side_by_side
from models import ModelCard
from quant import checkpoint
from quant.balancing.maxima import check_step
from quant.numerics.uniform import ACT_BITS, WEIGHT_BITS
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.refinement.allocation import GroupSearch
from diffusion.generate import guided_drive
from quant.recipe import check_recipe
from quant.weights.low_rank import SOLVERS
from report.figures import group_allocation
from report.layers import IMAGES, default_layers, observe
from report.page import Section, write_page
from report.quantisation import quantisation_figures


def report_layers(text: str | None, names: list[str], places: dict[str, LayerPlace]) -> list[str]:
    """The layers whose inputs a report draws."""
    return default_layers(places) if text is None else [one_of(name, names, "--report-layers") for name in text.split(",")]


def make_judge(args: argparse.Namespace, recipe: Recipe, card: ModelCard, model: nn.Module, decode: Decoder, schedule: Schedule,
               folder: Path) -> Judge:
    """What group sizes are chosen by."""
    if recipe.judge == "sqnr":
        return sqnr_judge(model, schedule, args.seed)
    extractor = load_extractor(card.features, args.inception, model.pos_embed.device)
    return user_value(fid_judge, decode, extractor, load_reference(card, args.reference, folder), schedule, args.seed)


def main(args: argparse.Namespace) -> float:
    """Returns the seconds that quantisation took, loading and picture not counted."""
    name = args.model or config.default_model
    card = find_card(name)
    image_size = card.image_sizes[0] if args.image_size is None else args.image_size
    num_classes = card.num_classes if args.num_classes is None else at_least(args.num_classes, 1, "--num-classes")
    weight_bit = one_of(config.weight_bit if args.weight_bit is None else args.weight_bit, WEIGHT_BITS, "--weight-bit")
    act_bit = one_of(config.act_bit if args.act_bit is None else args.act_bit, ACT_BITS, "--act-bit")
    recipe, label = build_recipe(args), recipe_label(args)
    user_value(check_recipe, recipe, act_bit)
    at_least(args.cfg_scale, 1.0, "--cfg-scale")
    at_least(args.seed, 0, "--seed")
    schedule = user_value(make_schedule, args.num_sampling_steps)
    user_value(check_step, recipe.timestep, len(schedule))
    labels = class_labels(args.class_labels, num_classes) if args.class_labels else config.default_labels(num_classes)
    output = Path(args.output or Path("results") / checkpoint.default_name(name, image_size, weight_bit, act_bit, label))
    if output.name in ("", ".."):
        raise UserError(f"--output '{args.output}' names no file: give one such as results/model{checkpoint.SUFFIX}")
    output = output if output.suffix == checkpoint.SUFFIX else output.with_name(output.name + checkpoint.SUFFIX)
    writable_folder(output.parent)
    if args.report is not None:
        writable_folder(Path(args.report))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(name, card, image_size, num_classes, args.ckpt, device)
    decode = load_decoder(card, args.vae, device)
    shown = report_layers(args.report_layers, list(block_linears(model)), layer_places(model))

    indices, labels = range(len(labels)), torch.tensor(labels, device=device)

    def start(count: int):
        noise = ImageNoise(args.seed, indices[:count], (model.in_channels, model.input_size, model.input_size), device)
        return guided_drive(schedule, noise(), noise, labels[:count], config.calibration_cfg_scale)

    judge, history = None, None
    if recipe.group_sizes:
        judge, history = make_judge(args, recipe, card, model, decode, schedule, output.parent), output.with_suffix(".evolution.json")
    began = time.perf_counter()
    result = user_value(partial(quantize_model, svd=args.svd, search=GroupSearch(judge, history)), model, recipe, BitWidths(weight_bit, act_bit), start(len(indices)))
    seconds = time.perf_counter() - began
    checkpoint.save(output, model, result, checkpoint.Header(
        model=name, image_size=image_size, num_classes=num_classes, weight_bit=weight_bit, act_bit=act_bit, recipe_name=label,
        recipe=recipe, seed=args.seed, num_sampling_steps=args.num_sampling_steps, svd=args.svd, alphas=result.alphas, groups=result.groups))
    if result.evolution:
        figure = output.with_suffix(".evolution.png")
        with atomic(figure) as temporary:
            temporary.write_bytes(group_allocation([each.best for each in result.evolution], [each.mean for each in result.evolution], result.groups, layer_places(model)))
        print(f"wrote {figure}: the choice of group sizes; {output.stem}.evolution-….json lets the same command go on after an interruption")
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB), quantised in {seconds:.1f} s")

    def picture() -> Image.Image:
        latents = generate_latents(
            model, schedule, indices[:16], labels[:16], args.seed, args.cfg_scale, ddpm_step)
        images = user_value(decode_images, decode, latents)
        return grid(images, columns=4)

    float_picture = picture()
    observed = None if args.report is None else observe(model, result.layers, schedule, start(IMAGES), shown)
    _, model = checkpoint.load(output, device)
    pair = side_by_side([float_picture, picture()], ["float", f"W{weight_bit}A{act_bit} {label}"])
    with atomic(output.with_suffix(".png")) as temporary:
        pair.save(temporary, format="PNG")
    print(f"wrote {output.with_suffix('.png')}: the same seeds from the float and the quantised model, guidance {args.cfg_scale:g}")
    if observed is not None:
        drawn = quantisation_figures(observed, recipe, result, pair)
        page = write_page(Path(args.report), f"{name}, W{weight_bit}A{act_bit}, {label}",
                          f"{image_size} pixels, {len(schedule)} steps, seed {args.seed}, calibrated on {len(indices)} images. "
                          f"{card.origin}", [Section("", "", drawn)])
        print(f"wrote {page} and its {len(drawn)} figures")
    print(f"next: torchrun --nnodes=1 --nproc_per_node=1 sample_merge_TAS.py --image-size {image_size} --model {name} --num-fid-samples 10000 "
          f"--act-bit {act_bit} --weight-bit {weight_bit} --path {output} --num-sampling-steps {args.num_sampling_steps}")
    return seconds


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--recipe", default=config.default_recipe, help=f"one of {', '.join(RECIPES)} (default: {config.default_recipe})")
    parser.add_argument("--seed", type=int, default=0, help="of the calibration noise and the picture (default: 0)")
    parser.add_argument("--num-sampling-steps", default="50", help="steps of the calibration trajectory: 1 to 1000, 'ddimN' or a list (default: 50)")
    parser.add_argument("--cfg-scale", type=float, default=4.0,
                        help=f"guidance of the picture (default: 4.0); calibration always uses {config.calibration_cfg_scale}")
    parser.add_argument("--class-labels", help="classes to calibrate on, separated by commas (default: the paper's 16, or 0 1 2 …)")
    parser.add_argument("--svd", choices=tuple(SOLVERS), default="fast", help="how the low-rank branch is found (default: fast)")
    parser.add_argument("--report", metavar="DIR", help="draw figures of what quantisation did into this folder, with a page report.html")
    parser.add_argument("--report-layers", help="layers whose inputs are drawn, separated by commas, such as blocks.9.mlp.fc2 (default: the last fc2 and qkv)")
    parser.add_argument("--reference", help="with --judge fid: .npz of real images (default: the bundled model's data)")
    parser.add_argument("--inception", help="with --judge fid: Inception weights (default: fetched on first use)")
    parser.add_argument("--output", help="where to write (default: results/<model>-<size>-W<w>A<a>-<recipe>.safetensors)")
    add_recipe_flags(parser)
    return parser


if __name__ == "__main__":
    run(main, make_parser())
