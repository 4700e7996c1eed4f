"""Sample images from a quantised DiT, smoothing factors folded, on any number of processes: PNGs and an .npz for ADM's evaluator.

    torchrun --nnodes=1 --nproc_per_node=N sample_merge_TAS.py --image-size 256 --model DiT-XL/2 --num-fid-samples 10000 \\
        --act-bit 8 --weight-bit 4 --path /path/DiTAS_Model --num-sampling-steps 100
    python sample_merge_TAS.py --path results/DiT-Digits-16-W4A8-ditas --num-fid-samples 64      # one process, no torchrun
    python sample_merge_TAS.py --model DiT-Digits --num-fid-samples 64                           # the float model
"""
import argparse
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from torch import nn
from tqdm import tqdm

import config
from config import UserError
from diffusion import ddim_step, ddpm_step, make_schedule
from diffusion.generate import batch_indices, generate_images, labels_for
from diffusion.images import grid
from diffusion.npz import write_npz
from download import load_decoder, load_model
from models import ModelCard
from quant import checkpoint
from quant.cli import Parser, add_model_flags, at_least, class_labels, find_card, run, user_value
from quant.files import atomic, writable_folder
from quant.merge import fold


def open_checkpoint(args: argparse.Namespace, path: Path) -> checkpoint.Header:
    """The header of ``--path``, with no flag contradicting it.

    Raises:
        UserError: unreadable, or an explicit flag contradicts it.
    """
    header = checkpoint.read_header(path)
    if args.ckpt is not None:
        raise UserError("--ckpt gives float weights and --path a quantised checkpoint that needs none: give one of them")
    for flag in ("model", "image_size", "num_classes", "weight_bit", "act_bit"):
        given, stored = getattr(args, flag), getattr(header, flag)
        if given is not None and given != stored:
            raise UserError(f"--{flag.replace('_', '-')} {given} contradicts '{path}', which has {stored}: drop the flag or give another --path")
    return header


def load(args: argparse.Namespace, device: torch.device) -> tuple[nn.Module, ModelCard, str, str]:
    """Model, its card, the name of its output folder and its default number of steps."""
    if args.path is not None:
        path = checkpoint.find(args.path)
        open_checkpoint(args, path)
        header, model = checkpoint.load(path, device)
        return (fold(model) if args.fold else model), find_card(header.model), path.stem, header.num_sampling_steps
    if args.weight_bit is not None or args.act_bit is not None:
        raise UserError("--weight-bit and --act-bit describe a quantised checkpoint: give it with --path (without, the float model is sampled)")
    name = args.model or config.default_model
    card = find_card(name)
    image_size = args.image_size or card.image_sizes[0]
    model = load_model(name, card, image_size, args.num_classes or card.num_classes, args.ckpt, device)
    return model, card, f"{name.replace('/', '-')}-{image_size}-float", "50"


def read_image(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def main(args: argparse.Namespace) -> None:
    at_least(args.cfg_scale, 1.0, "--cfg-scale")
    for flag, minimum in (("num_fid_samples", 1), ("per_proc_batch_size", 1), ("global_seed", 0)):
        at_least(getattr(args, flag), minimum, f"--{flag.replace('_', '-')}")
    if args.threads is not None:
        torch.set_num_threads(at_least(args.threads, 1, "--threads"))
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32
    if args.num_sampling_steps is not None:
        user_value(make_schedule, args.num_sampling_steps)
    if not 0.0 <= args.eta <= 1.0:
        raise UserError(f"--eta {args.eta} is out of range: expected 0 to 1")
    step = partial(ddim_step, eta=args.eta) if args.sampler == "ddim" else ddpm_step

    state = PartialState(cpu=not torch.cuda.is_available())
    model, card, stem, steps = load(args, state.device)
    steps = args.num_sampling_steps or steps
    schedule = user_value(make_schedule, steps)
    listed = None if args.class_labels == "random" else class_labels(args.class_labels, model.num_classes)
    decode = load_decoder(card, args.vae, state.device)
    folder = writable_folder(Path(args.sample_dir) / f"{stem}-cfg-{args.cfg_scale:g}-{args.sampler}-{steps}-seed-{args.global_seed}")

    size, wanted = args.per_proc_batch_size, args.num_fid_samples
    batches = range(-(-wanted // size))[state.process_index::state.num_processes]
    for batch in tqdm(batches, desc="sampling", unit="batch", disable=not state.is_main_process):
        indices = batch_indices(batch, size)
        labels = labels_for(indices, args.global_seed, model.num_classes, listed)
        images = user_value(generate_images, model, decode, schedule, indices, labels, args.global_seed, args.cfg_scale, step)
        for index, image in zip(indices, images):
            if index < wanted:
                with atomic(folder / f"{index:06d}.png") as temporary:
                    Image.fromarray(image).save(temporary, format="PNG")

    state.wait_for_everyone()
    if state.is_main_process:
        files = [folder / f"{index:06d}.png" for index in range(wanted)]
        first = read_image(files[0])
        npz = folder.with_name(folder.name + ".npz")
        with atomic(npz) as temporary:
            write_npz(temporary, map(read_image, tqdm(files, desc="npz", unit="image")), (wanted, *first.shape))
        with atomic(folder / "samples.png") as temporary:
            grid(np.stack([read_image(file) for file in files[:16]]), columns=4).save(temporary, format="PNG")
        print(f"wrote {wanted} images to {folder}, a grid of the first to {folder / 'samples.png'} and all of them to {npz}")
    state.destroy_process_group()


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--path", help="quantised checkpoint written by QuantDiT.py (default: sample the float model)")
    parser.add_argument("--num-fid-samples", type=int, default=50_000, help="images to make (default: 50000)")
    parser.add_argument("--per-proc-batch-size", type=int, default=64, help="images per batch; part of what fixes an image's bytes (default: 64)")
    parser.add_argument("--sample-dir", default="samples", help="where folders of images go (default: samples)")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="classifier-free guidance, 1 for none (default: 1.5)")
    parser.add_argument("--num-sampling-steps", help="1 to 1000, 'ddimN' or a list (default: the checkpoint's, or 50)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm")
    parser.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 is deterministic (default), 1 as noisy as ddpm")
    parser.add_argument("--class-labels", default="random", help="'random' (default), or classes separated by commas, used in turn")
    parser.add_argument("--global-seed", type=int, default=0, help="with an image's index, all that its noise depends on (default: 0)")
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on NVIDIA GPUs (default: on)")
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True, help="fold the smoothing factors (default: on)")
    parser.add_argument("--threads", type=int, help="CPU threads per process (default: PyTorch's)")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
