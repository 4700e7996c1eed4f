"""Quantise a DiT: float checkpoint in, quantised checkpoint and a picture out.

    python QuantDiT.py --image-size 256 --seed 1 --model DiT-XL/2 --act-bit 8 --weight-bit 4 --num-sampling-steps 100
    python QuantDiT.py --model DiT-Digits-Outliers                       # bundled, runs on a CPU in a minute
    python QuantDiT.py --model DiT-Digits-Outliers --recipe smoothquant --smooth-timestep 25
"""
import argparse
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image

import config
from config import RECIPES, Recipe, UserError
from diffusion import ImageNoise, ddpm_step, make_schedule
from diffusion.generate import generate_images
from diffusion.images import grid, side_by_side
from download import load_decoder, load_model
from quant import checkpoint
from quant.cli import Parser, add_model_flags, at_least, class_labels, find_card, one_of, run, user_value
from quant.files import atomic, writable_folder
from quant.linear import block_linears
from quant.lowrank import SOLVERS
from quant.pipeline import Start, act_spec, quantize_model
from quant.quantizer import ACT_BITS, WEIGHT_BITS
from quant.smoothing import check_step
from report.layers import IMAGES, default_layers, observe
from report.page import Section, write_page
from report.quantisation import quantisation_figures


def build_recipe(args: argparse.Namespace) -> Recipe:
    """The chosen row of ``config.RECIPES`` with the flags that were given on top."""
    recipe = RECIPES[one_of(args.recipe, RECIPES, "--recipe")]
    given = {"weight_group": args.group_size, "rank": args.rank, "timestep": args.smooth_timestep, "weight_scales": args.weight_scales,
             "adaln_bits": args.adaln_weight_bit}
    for flag, minimum in (("group_size", 1), ("rank", 0)):
        if getattr(args, flag) is not None:
            at_least(getattr(args, flag), minimum, f"--{flag.replace('_', '-')}")
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if recipe.weight_scales == "two-level" and recipe.weight_granularity != "group":
        raise UserError(f"--weight-scales two-level is for groups along the inputs, recipe {args.recipe} has none: drop the flag or use recipe ditas")
    return recipe


def report_layers(text: str | None, names: list[str]) -> list[str]:
    """The layers whose inputs a report draws."""
    return default_layers(names) if text is None else [one_of(name, names, "--report-layers") for name in text.split(",")]


def main(args: argparse.Namespace) -> float:
    """Returns the seconds that quantisation took, loading and picture not counted."""
    name = args.model or config.default_model
    card = find_card(name)
    image_size = card.image_sizes[0] if args.image_size is None else args.image_size
    num_classes = card.num_classes if args.num_classes is None else at_least(args.num_classes, 1, "--num-classes")
    weight_bit = one_of(config.weight_bit if args.weight_bit is None else args.weight_bit, WEIGHT_BITS, "--weight-bit")
    act_bit = one_of(config.act_bit if args.act_bit is None else args.act_bit, ACT_BITS, "--act-bit")
    recipe = build_recipe(args)
    at_least(args.cfg_scale, 1.0, "--cfg-scale")
    at_least(args.seed, 0, "--seed")
    schedule = user_value(make_schedule, args.num_sampling_steps)
    user_value(check_step, recipe.timestep, len(schedule))
    labels = class_labels(args.class_labels, num_classes) if args.class_labels else config.default_labels(num_classes)
    output = Path(args.output or Path("results") / checkpoint.default_name(name, image_size, weight_bit, act_bit, args.recipe))
    if output.name in ("", ".."):
        raise UserError(f"--output '{args.output}' names no file: give one such as results/model{checkpoint.SUFFIX}")
    output = output if output.suffix == checkpoint.SUFFIX else output.with_name(output.name + checkpoint.SUFFIX)
    writable_folder(output.parent)
    if args.report is not None:
        writable_folder(Path(args.report))

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(name, card, image_size, num_classes, args.ckpt, device)
    decode = load_decoder(card, args.vae, device)
    shown = report_layers(args.report_layers, list(block_linears(model)))

    indices, labels = range(len(labels)), torch.tensor(labels, device=device)

    def start(count: int) -> Start:
        noise = ImageNoise(args.seed, indices[:count], (model.in_channels, model.input_size, model.input_size), device)
        return Start(noise(), noise, labels[:count])

    began = time.perf_counter()
    result = user_value(partial(quantize_model, svd=args.svd), model, recipe, weight_bit, act_bit, schedule, start(len(indices)))
    seconds = time.perf_counter() - began
    checkpoint.save(output, model, result.layers, checkpoint.Header(
        model=name, image_size=image_size, num_classes=num_classes, weight_bit=weight_bit, act_bit=act_bit, recipe_name=args.recipe,
        recipe=recipe, seed=args.seed, num_sampling_steps=args.num_sampling_steps, svd=args.svd, alphas=result.alphas))
    print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB), quantised in {seconds:.1f} s")

    def picture() -> Image.Image:
        images = user_value(generate_images, model, decode, schedule, indices[:16], labels[:16], args.seed, args.cfg_scale, ddpm_step)
        return grid(images, columns=4)

    float_picture = picture()
    act = act_spec(recipe, act_bit)
    observed = None if args.report is None else observe(model, result.layers, act, schedule, start(IMAGES), shown)
    _, model = checkpoint.load(output, device)
    pair = side_by_side([float_picture, picture()], ["float", f"W{weight_bit}A{act_bit} {args.recipe}"])
    with atomic(output.with_suffix(".png")) as temporary:
        pair.save(temporary, format="PNG")
    print(f"wrote {output.with_suffix('.png')}: the same seeds from the float and the quantised model, guidance {args.cfg_scale:g}")
    if observed is not None:
        drawn = quantisation_figures(observed, recipe, result, pair)
        page = write_page(Path(args.report), f"{name}, W{weight_bit}A{act_bit}, {args.recipe}",
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
    parser.add_argument("--smooth-timestep", type=int, help="index in sampling order that recipe smoothquant looks at (default: 0, the noisiest)")
    parser.add_argument("--group-size", type=int, help="weights per scale in recipes with groups (default: the recipe's)")
    parser.add_argument("--rank", type=int, help="rank of the low-rank branch, 0 for none (default: the recipe's)")
    parser.add_argument("--weight-scales", choices=("float", "two-level"),
                        help="of groups: floating, which can only be simulated, or integers inside one scale per output channel (default: the recipe's)")
    parser.add_argument("--adaln-weight-bit", type=int, choices=checkpoint.ADALN_BITS,
                        help="of the adaLN modulation, weight-only; 16 is none (default: the recipe's)")
    parser.add_argument("--svd", choices=tuple(SOLVERS), default="fast", help="how the low-rank branch is found (default: fast)")
    parser.add_argument("--report", metavar="DIR", help="draw figures of what quantisation did into this folder, with a page report.html")
    parser.add_argument("--report-layers", help="layers whose inputs are drawn, separated by commas, such as blocks.9.mlp.fc2 (default: the last fc2 and qkv)")
    parser.add_argument("--output", help="where to write (default: results/<model>-<size>-W<w>A<a>-<recipe>.safetensors)")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
