"""Sample images from a quantised DiT, smoothing factors folded, on any number of processes: PNGs and an .npz for ADM's evaluator.

    torchrun --nnodes=1 --nproc_per_node=N sample_merge_TAS.py --image-size 256 --model DiT-XL/2 --num-fid-samples 10000 \\
        --act-bit 8 --weight-bit 4 --path /path/DiTAS_Model --num-sampling-steps 100
    python sample_merge_TAS.py --path results/DiT-Digits-16-W4A8-ditas --num-fid-samples 64      # one process, no torchrun
    python sample_merge_TAS.py --model DiT-Digits --num-fid-samples 64                           # the float model
    python sample_merge_TAS.py --path … --shard 3/16                                             # one job of an array of 16
    python sample_merge_TAS.py --path … --assemble                                               # the .npz of what 16 shards made

The same command again continues where a killed one stopped.
"""
import os

LAUNCHER = os.getppid()  # before the imports take their seconds: torchrun may be gone after them

import argparse
import sys
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import PartialState
from torch import nn

import config
from architectures.dit import BLOCK_LINEARS
from cli.parser import Parser, add_model_flags, find_card, run
from cli.values import at_least, class_labels, user_value
from diffusion import ddim_step, ddpm_step, make_schedule
from diffusion.generate import batch_indices, decode_images, generate_latents, labels_for
from download import load_decoder, load_model
from errors import UserError
from files.atomic import writable_folder
from files.digests import sha256, weights_sha256
from models import ModelCard
from quant import checkpoint
from quant.backend import BACKENDS, faster
from sampling import manifest
from sampling.folder import ImageFolder
from sampling.job import Job, sample_all
from sampling.ranks import Ranks, Stopped, join
from sampling.stop import STATUS, StopFlag, die_with_launcher

TIMED_TOKENS = 4096  # at most, so that choosing a backend takes seconds


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


def describe(args: argparse.Namespace) -> tuple[ModelCard, str, manifest.Settings]:
    """The model's card, the name of its output folder, and what is known of its images before it is loaded."""
    if args.path is not None:
        path = checkpoint.find(args.path)
        header = open_checkpoint(args, path)
        return find_card(header.model), path.stem, {
            "model": header.model, "image_size": header.image_size, "num_classes": header.num_classes, "fold": args.fold,
            "steps": args.num_sampling_steps or header.num_sampling_steps}
    if args.weight_bit is not None or args.act_bit is not None:
        raise UserError("--weight-bit and --act-bit describe a quantised checkpoint: give it with --path (without, the float model is sampled)")
    name = args.model or config.default_model
    card = find_card(name)
    image_size = card.image_sizes[0] if args.image_size is None else args.image_size
    num_classes = card.num_classes if args.num_classes is None else at_least(args.num_classes, 1, "--num-classes")
    return card, f"{name.replace('/', '-')}-{image_size}-float", {
        "model": name, "image_size": image_size, "num_classes": num_classes, "steps": args.num_sampling_steps or "50"}


def choose(args: argparse.Namespace, stored: checkpoint.Stored, made: Path | None, device: torch.device) -> str:
    """The backend; ``auto`` goes on with that of the images in folder ``made``, if there are any, and times the first block's linears if not."""
    def measure() -> str:
        if made is not None and (made / manifest.NAME).exists() and (before := manifest.read(made).get("backend")) in ("fake", "integer"):
            return before
        batch = 2 * args.per_proc_batch_size if args.cfg_scale > 1 else args.per_proc_batch_size
        tokens = min(batch * stored.model.x_embedder.num_patches, TIMED_TOKENS)
        first = [stored.layers[f"blocks.0.{name}"] for name in BLOCK_LINEARS]
        return faster(first, tokens, getattr(torch, args.dtype), device, args.cpu_weights == "packed")
    return checkpoint.backend_for(stored.header, args.backend, device, measure)


def load(args: argparse.Namespace, card: ModelCard, about: manifest.Settings, made: Path | None, ranks: Ranks,
         device: torch.device) -> tuple[nn.Module, manifest.Settings]:
    """The model, and what to write down about it: the SHA-256 of its weights and what it computes in."""
    dtype = getattr(torch, args.dtype)
    if args.path is not None:
        path = checkpoint.find(args.path)
        stored = checkpoint.read(path)
        backend = ranks.share("backend", lambda: choose(args, stored, made, device))
        model, digest = checkpoint.build(stored, device, args.fold, backend, dtype, args.cpu_weights == "packed"), sha256(path)
    else:
        if args.backend == "integer":
            raise UserError("--backend integer needs a quantised checkpoint: give one with --path")
        backend = "float"
        model = load_model(about["model"], card, about["image_size"], about["num_classes"], args.ckpt, device)
        digest = weights_sha256(model)
        model = model.to(dtype)
    if args.compile:
        for block in model.blocks:  # they share one compilation
            block.compile()
    return model, {"weights_sha256": digest, "backend": backend, "dtype": args.dtype, "compile": args.compile}


def parse_shard(text: str | None) -> tuple[int, int] | None:
    """``k/K`` as (k, K), 0 <= k < K.

    Raises:
        UserError: it is not that.
    """
    if text is None:
        return None
    parts = text.split("/")
    if len(parts) != 2 or not all(part.isdecimal() for part in parts) or int(parts[0]) >= int(parts[1]):
        raise UserError(f"bad --shard '{text}': expected k/K with k from 0 to K - 1, such as 0/16")
    return int(parts[0]), int(parts[1])


def check(args: argparse.Namespace) -> None:
    """Raises:
        UserError: a flag is out of range.
    """
    at_least(args.cfg_scale, 1.0, "--cfg-scale")
    for flag, minimum in (("num_fid_samples", 1), ("per_proc_batch_size", 1), ("global_seed", 0), ("threads", 1), ("decode_batch_size", 1)):
        if getattr(args, flag) is not None:
            at_least(getattr(args, flag), minimum, f"--{flag.replace('_', '-')}")
    if not 0.0 <= args.eta <= 1.0:
        raise UserError(f"--eta {args.eta} is out of range: expected 0 to 1")
    if args.num_sampling_steps is not None:
        user_value(make_schedule, args.num_sampling_steps)
    if args.shard is not None and (args.assemble or int(os.environ.get("WORLD_SIZE", "1")) > 1):
        raise UserError("--shard is for jobs of one process each, before --assemble: drop one of them, or torchrun")
    if args.overwrite and (args.shard is not None or args.assemble):
        raise UserError("--overwrite would delete what other shards made: remove the folder by hand, or give another --sample-dir")
    if args.log_file is not None:
        try:
            open(args.log_file, "a").close()
        except OSError as error:
            raise UserError(f"cannot write --log-file '{args.log_file}': {error.strerror}; give another one") from None


def main(args: argparse.Namespace) -> None:
    check(args)
    shard = parse_shard(args.shard)
    stopped = StopFlag()
    cuda = torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_launcher(LAUNCHER)
        join(cuda)
    state = PartialState(cpu=not cuda)
    ranks = Ranks(state.process_index, state.num_processes, stopped)
    # Products on a CPU change bits with the thread count. torchrun sets one thread for several processes, and none for a single one.
    threads = args.threads or (1 if cuda else max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    torch.set_num_threads(threads)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.tf32

    card, stem, about = describe(args)
    schedule = user_value(make_schedule, about["steps"])
    path = Path(args.sample_dir) / f"{stem}-cfg-{args.cfg_scale:g}-{args.sampler}-{about['steps']}-seed-{args.global_seed}"
    log_file = None if args.log_file is None else Path(args.log_file)
    # a restart by torchrun repeats the command line, but must not delete what was made before it
    overwrite = args.overwrite and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0"

    def job(settings: manifest.Settings, overwrite: bool) -> Job:
        folder = ImageFolder(path, manifest.fingerprint(settings), settings["image_size"])
        return Job(folder, settings, args.num_fid_samples, settings["batch"], shard, overwrite, args.assemble, log_file)

    try:
        if args.assemble:  # needs no model, and no machine like those that made the images
            stored = manifest.read(path)
            if not {"batch", "image_size"} <= stored.keys():
                raise UserError(f"'{path / manifest.NAME}' is not a manifest of ours: give the --path and --sample-dir that the shards had")
            sample_all(job(stored, False), None, ranks, stopped)
        else:
            named = {"random": None, "balanced": range(about["num_classes"])}
            listed = named[args.class_labels] if args.class_labels in named else class_labels(args.class_labels, about["num_classes"])
            model, computed = load(args, card, about, None if overwrite else path, ranks, state.device)
            decoder = load_decoder(card, args.vae, state.device)
            writable_folder(path)
            settings = {**about, **computed, "cfg_scale": args.cfg_scale, "sampler": args.sampler, "eta": args.eta,
                        "seed": args.global_seed, "class_labels": args.class_labels, "decoder": decoder.name, "batch": args.per_proc_batch_size,
                        "decode_batch": args.decode_batch_size, "threads": threads,
                        "device": state.device.type, "tf32": args.tf32 and cuda, "torch": torch.__version__}
            step = partial(ddim_step, eta=args.eta) if args.sampler == "ddim" else ddpm_step

            def make(batch: int) -> np.ndarray:
                indices = batch_indices(batch, args.per_proc_batch_size)
                labels = labels_for(indices, args.global_seed, model.num_classes, listed)
                latents = generate_latents(
                    model, schedule, indices, labels, args.global_seed, args.cfg_scale, step)
                return decode_images(decoder, latents, args.decode_batch_size)

            sample_all(job(settings, overwrite), make, ranks, stopped)
    except Stopped:
        if state.is_main_process:
            print(f"stopped by SIGTERM; the same command continues in {path}", file=sys.stderr)
        sys.exit(STATUS)
    except OSError as error:
        print(f"sample_merge_TAS.py: error: cannot write to '{path}': {error.strerror or error}; make room, then run the same command again",
              file=sys.stderr)
        sys.exit(1)
    state.destroy_process_group()


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_flags(parser)
    parser.add_argument("--path", help="quantised checkpoint written by QuantDiT.py (default: sample the float model)")
    parser.add_argument("--num-fid-samples", type=int, default=50_000, help="how many images; may grow later (default: 50000)")
    parser.add_argument("--per-proc-batch-size", type=int, default=64,
                        help="images in a batch; part of what fixes an image's bytes (default: 64)")
    parser.add_argument("--decode-batch-size", type=int, help="latents the VAE decodes at once (default: the whole batch)")
    parser.add_argument("--sample-dir", default="samples", help="where folders of images go (default: samples)")
    parser.add_argument("--overwrite", action="store_true", help="delete what the folder holds and start anew")
    parser.add_argument("--shard", metavar="k/K", help="make only every K-th batch, beginning with the k-th (0 to K-1); no .npz")
    parser.add_argument("--assemble", action="store_true", help="make no image, only the .npz of those that are there")
    parser.add_argument("--log-file", help="append a line whenever images were made: time, images done, images per second")
    parser.add_argument("--cfg-scale", type=float, default=1.5, help="classifier-free guidance, 1 for none (default: 1.5)")
    parser.add_argument("--num-sampling-steps", help="1 to 1000, 'ddimN' or a list (default: the checkpoint's, or 50)")
    parser.add_argument("--sampler", choices=("ddpm", "ddim"), default="ddpm")
    parser.add_argument("--eta", type=float, default=0.0, help="of ddim: 0 is deterministic (default), 1 as noisy as ddpm")
    parser.add_argument("--class-labels", default="random", metavar="random|balanced|LIST",
                        help="random (default), balanced: image i is of class i modulo their number, or classes separated by commas, used in turn")
    parser.add_argument("--global-seed", type=int, default=0, help="with an image's index, all that its noise depends on (default: 0)")
    parser.add_argument("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 matrix products on NVIDIA GPUs (default: on)")
    parser.add_argument("--fold", action=argparse.BooleanOptionalAction, default=True, help="fold the smoothing factors (default: on)")
    parser.add_argument("--backend", choices=BACKENDS, default="auto",
                        help="fake simulates, integer computes on int8, auto (default) times both where checkpoint and processor allow integers")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all that is not integer (default: float32)")
    parser.add_argument("--compile", action="store_true", help="fuse what lies around the products; takes a minute at the start")
    parser.add_argument("--cpu-weights", choices=("expanded", "packed"), default="expanded",
                        help="of --backend integer on a CPU: int8 (default), or kept at 4 bits, smaller and slower; same images")
    parser.add_argument("--threads", type=int, help="CPU threads per process; part of what fixes an image's bytes on a CPU (default: all cores, shared)")
    return parser


if __name__ == "__main__":
    run(main, make_parser())
