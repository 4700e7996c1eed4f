"""The story of ``--export diffusers``: a checkpoint goes out as the folder of a pipeline."""
import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from cards import ModelCard
from cli.parser import find_card, refuse_flags
from cli.quantize_flags import PIPELINE_FLAGS, make_parser
from cli.recipe_flags import given_flags
from cli.settings import cpu_threads, export_folder
from cli.stages import stage
from cli.threads import default_threads
from cli.values import new_folder
from download import stable_diffusion_vae
from errors import UserError
from examples.bundles import find_bundle
from files.atomic import atomic_folder
from quant import checkpoint

# What only quantising reads.
UNREAD = (
    "model", "image_size", "num_classes", "ckpt", "weight_bit", "act_bit", "recipe", "seed",
    "num_sampling_steps", "cfg_scale", "class_labels", "svd", "inspect", "report", "report_layers",
    "reference", "inception", "i3d", *PIPELINE_FLAGS)


@dataclass(frozen=True)
class ExportSettings:
    """The checked command line of QuantDiT.py with ``--path``."""

    path: Path  # of the checkpoint
    folder: Path  # that is written
    vae: str  # ema or mse: which Stable Diffusion VAE decodes the latents
    threads: int  # CPU threads


def export_settings(args: argparse.Namespace) -> ExportSettings:
    """Check the command line.

    Raises:
        UserError: there is no such checkpoint, the folder is there already, or a flag has no effect
            on an export.
    """
    if args.export is None:
        raise UserError("--path names a checkpoint that is there: "
                        "add --export diffusers, or sample from it with sample_merge_TAS.py")
    quantising = f"quantising, and '{args.path}' is quantised already"
    refuse_flags(args, make_parser(), UNREAD, quantising)
    for flag in given_flags(args):
        raise UserError(f"--{flag.name} is for {quantising}: drop it")
    path = checkpoint.find(args.path)
    folder = Path(args.output) if args.output else export_folder(path)
    return ExportSettings(
        path, new_folder(folder), args.vae, cpu_threads(args.threads, default_threads()))


def export(settings: ExportSettings) -> None:
    """Write the folder, and say how to load it.

    Raises:
        UserError: the checkpoint is damaged or cannot be exported, or there is no VAE.
    """
    torch.set_num_threads(settings.threads)
    with stage("export"):
        export_checkpoint(settings.path, settings.folder, settings.vae)


@torch.no_grad()
def export_checkpoint(path: Path, folder: Path, vae: str) -> None:
    """Write a checkpoint as the folder of a pipeline, which samples as the checkpoint does.

    Raises:
        UserError: as ``export``.
    """
    # They load diffusers.
    from ditas.dit import DitasDiTPipeline, packed_dit
    from ditas.scheduler import PUBLISHED, DitasDDPMScheduler
    stored = checkpoint.read(path)
    card = find_card(stored.header.model)
    transformer = packed_dit(stored)
    pipeline = DitasDiTPipeline(
        transformer, load_vae(card, vae), DitasDDPMScheduler(**PUBLISHED))
    with atomic_folder(folder) as temporary:
        pipeline.save_pretrained(temporary)
    print(f"wrote {folder}, in Python: import ditas; from diffusers import DiffusionPipeline; "
          f"DiffusionPipeline.from_pretrained({str(folder)!r})(class_labels=[0, 1]).images")


def load_vae(card: ModelCard, vae: str) -> nn.Module:
    """Load what turns a model's latents into images, as a part of a pipeline.

    Raises:
        UserError: as ``download.load_decoder``.
    """
    bundle = find_bundle(card.bundle)
    if bundle is not None:
        return bundle.pipeline_decoder()
    return stable_diffusion_vae(vae)
