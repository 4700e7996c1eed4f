"""The story of quantising: load, quantise, save, draw, report, and say what comes next.

Memory holds one whole model at a time. The float model's half of the picture is sampled before
that model goes, and both halves are decoded when no model is left.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from architectures.sites import Site
from cli.export import export_checkpoint
from cli.memory import large_blocks_apart
from cli.settings import QuantizeSettings
from cli.stages import stage
from cli.values import one_of, user_value
from diffusion import Schedule, ddpm_step, make_schedule
from diffusion.decoding import Decoder
from diffusion.generate import (
    Sampling,
    device_of,
    generate_latents,
    guided_drive,
    latent_noise,
)
from download import load_decoder, load_model
from evaluation.judge import Judge, fid_judge, sqnr_judge
from evaluation.networks import load_extractor, load_reference, load_video_reference
from evaluation.video import load_video_extractor
from evaluation.video_judge import fvd_judge
from examples.bundles import find_videos
from files.atomic import atomic
from files.images import grid, side_by_side, to_bytes
from quant import checkpoint
from quant.calibration.trajectory import Drive
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.refinement.allocation import GroupSearch
from quant.refinement.group_sizes import mean_group_size
from report.layers import IMAGES, Observed, default_layers, observe, places_of
from report.page import Section, write_page

PICTURE_IMAGES = 16
PICTURE_BATCH = 8  # images at a time, for what activations take of memory
PICTURE_COLUMNS = 4


@dataclass(frozen=True)
class QuantizedFile:
    """A quantised model as it was written.

    Attributes:
        path: of the checkpoint, or of a pipeline's folder.
        seconds: that quantisation took; loading, picture and report are not counted.
        search_seconds: of these the choice of group sizes; None where there was none.
    """

    path: Path
    seconds: float
    search_seconds: float | None


@dataclass(frozen=True)
class Shown:
    """What a report shows of a quantised model, without its weights."""

    observed: Observed
    result: Result  # the layers are those that are drawn


def quantize(settings: QuantizeSettings) -> QuantizedFile:
    """Write a quantised checkpoint, a picture, and the figures that the settings ask for.

    Prints what was written, the time of every stage, and the command that comes next.

    Raises:
        UserError: weights are missing or damaged, or do not fit the settings.
    """
    torch.set_num_threads(settings.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    schedule = make_schedule(settings.steps)
    with stage("load"):
        model = load_float(settings, device)
        decoder = load_decoder(settings.model.card, settings.model.vae, device)
    shown_layers = report_layers(settings.report_layers, places_of(model))

    # Quantise, and save what was found.
    with stage("quantise") as quantising:
        result = run_method(settings, model, decoder, schedule)
    with stage("save"), large_blocks_apart():
        checkpoint.save(settings.output, model, result, header(settings, result))
    tell_of_groups(settings, model, result)
    search_seconds = None if result.allocation is None else result.allocation.seconds
    size = settings.output.stat().st_size / 1e6
    print(f"wrote {settings.output} ({size:.1f} MB), quantised in {quantising.seconds:.1f} s")
    if settings.export is not None:
        with stage("export"):
            export_checkpoint(settings.output, settings.export, settings.model.vae)

    # Let the float model do its part of the report and of the picture, then let go of it.
    shown = None
    if settings.report is not None:
        with stage("observe"):
            shown = look_at_layers(settings, model, result, schedule, shown_layers)
    del result
    with stage("float samples"):
        float_latents = draw_latents(settings, model, schedule)
    del model

    with stage("quantised samples"):
        latents = draw_latents(settings, load_quantised(settings, device), schedule)
    with stage("decode"):
        pair = decode_pair(settings, decoder, float_latents, latents)
    save_picture(settings, pair)
    if shown is not None:
        write_report(settings, shown, pair, len(schedule))
    print(f"next: {settings.sampling_command}")
    return QuantizedFile(settings.output, quantising.seconds, search_seconds)


@large_blocks_apart()
def load_float(settings: QuantizeSettings, device: torch.device) -> nn.Module:
    """Load the float model in eval mode."""
    choice = settings.model
    return load_model(choice.name, choice.card, choice.image_size, choice.num_classes,
                      choice.weights, device)


@large_blocks_apart()
def load_quantised(settings: QuantizeSettings, device: torch.device) -> nn.Module:
    """Load the model from the checkpoint that was just written, so that the picture proves it."""
    _, model = checkpoint.load(settings.output, device)
    return model


def report_layers(given: tuple[str, ...] | None, places: dict[str, Site]) -> list[str]:
    """Choose the layers whose inputs a report draws, among those of ``places``.

    Raises:
        UserError: there is no layer of a name that was given.
    """
    if given is None:
        return default_layers(places)
    return [one_of(name, places, "--report-layers") for name in given]


def run_method(
    settings: QuantizeSettings, model: nn.Module, decoder: Decoder, schedule: Schedule,
) -> Result:
    """Quantise the model, which is left as it was."""
    search = None
    if settings.recipe.group_sizes:
        judge = make_judge(settings, model, decoder, schedule)
        search = GroupSearch(judge, settings.output.with_suffix(".evolution.json"))
    method = partial(quantize_model, svd=settings.svd, search=search)
    bits = BitWidths(settings.weight_bits, settings.act_bits)
    drive = calibration_drive(settings, model, schedule, len(settings.labels))
    return user_value(method, model, settings.recipe, bits, drive)


def make_judge(
    settings: QuantizeSettings, model: nn.Module, decoder: Decoder, schedule: Schedule,
) -> Judge:
    """Make the loss that group sizes are chosen by."""
    recipe = settings.recipe
    sampling = Sampling(schedule, settings.seed, recipe.judge_cfg_scale, recipe.judge_sampler)
    if recipe.judge == "sqnr":
        return sqnr_judge(model, sampling)
    if recipe.judge == "fvd":
        return make_video_judge(settings, model, decoder, sampling)
    card = settings.model.card
    extractor = load_extractor(card.features, settings.inception, device_of(model))
    reference = load_reference(card, settings.reference, settings.output.parent)
    return user_value(fid_judge, decoder, extractor, reference, sampling)


def make_video_judge(
    settings: QuantizeSettings, model: nn.Module, decoder: Decoder, sampling: Sampling,
) -> Judge:
    """Make a loss that looks at videos, which the model's family makes of images that follow."""
    card = settings.model.card
    videos = find_videos(card.bundle)
    extractor = load_video_extractor(card.features, settings.i3d, device_of(model))
    reference = load_video_reference(card, settings.reference, settings.output.parent)
    sample = partial(videos.sample, decode=decoder, sampling=sampling)
    return user_value(fvd_judge, sample, extractor, reference, str(sampling))


def calibration_drive(
    settings: QuantizeSettings, model: nn.Module, schedule: Schedule, images: int,
) -> Drive:
    """Make a function that samples once with the first ``images`` labels."""
    device = device_of(model)
    labels = torch.tensor(settings.labels, device=device)[:images]
    noise = latent_noise(model, settings.seed, range(len(labels)))
    return guided_drive(schedule, noise(), noise, labels, config.calibration_cfg_scale)


def header(settings: QuantizeSettings, result: Result) -> checkpoint.Header:
    """Write down what the checkpoint was made from, and how."""
    return checkpoint.Header(
        model=settings.model.name,
        image_size=settings.model.image_size,
        num_classes=settings.model.num_classes,
        weight_bit=settings.weight_bits,
        act_bit=settings.act_bits,
        recipe_name=settings.label,
        recipe=settings.recipe,
        seed=settings.seed,
        num_sampling_steps=settings.steps,
        svd=settings.svd,
        alphas=result.alphas,
        groups=result.groups,
    )


def tell_of_groups(settings: QuantizeSettings, model: nn.Module, result: Result) -> None:
    """Say how group sizes were chosen, and draw how evolution did, if they were."""
    if result.allocation is None:
        return
    recipe, found = settings.recipe, result.allocation
    print(f"group sizes by {recipe.allocate}: {found.seconds:.1f} s, mean size "
          f"{mean_group_size(found.groups):.1f}, {judgement(recipe.judge, found.loss)}")
    if found.history:
        draw_evolution(model, result, settings.output)


def judgement(judge: str, loss: float) -> str:
    """Write the loss of a judge as what it measures: ``18.3 dB SQNR``, ``FID 7.2``."""
    # It makes minus the SQNR small.
    return f"{-loss:.1f} dB SQNR" if judge == "sqnr" else f"{judge.upper()} {loss:.1f}"


def draw_evolution(model: nn.Module, result: Result, output: Path) -> None:
    """Draw how group sizes were chosen."""
    # matplotlib takes a second to import.
    from report.figures import group_allocation
    sites = architecture_of(model).sites(model, "all")
    places = {site.name: site for site in sites}
    figure = output.with_suffix(".evolution.png")
    best = [generation.best for generation in result.evolution]
    mean = [generation.mean for generation in result.evolution]
    with atomic(figure) as temporary:
        temporary.write_bytes(group_allocation(best, mean, result.groups, places))
    print(f"wrote {figure}: the choice of group sizes; {output.stem}.evolution-….json lets the "
          "same command go on after an interruption")


def draw_latents(settings: QuantizeSettings, model: nn.Module, schedule: Schedule) -> Tensor:
    """Sample the picture's images as latents (N, C, H, W)."""
    indices = range(len(settings.labels))[:PICTURE_IMAGES]
    labels = torch.tensor(settings.labels[:PICTURE_IMAGES], device=device_of(model))
    batches = [
        generate_latents(
            model, schedule, indices[start:start + PICTURE_BATCH],
            labels[start:start + PICTURE_BATCH], settings.seed, settings.cfg_scale, ddpm_step)
        for start in range(0, len(indices), PICTURE_BATCH)]
    return torch.cat(batches)


def look_at_layers(
    settings: QuantizeSettings,
    model: nn.Module,
    result: Result,
    schedule: Schedule,
    names: list[str],  # of the layers whose inputs are kept
) -> Shown:
    """Observe what a report shows, and keep no more of the result than that."""
    drive = calibration_drive(settings, model, schedule, IMAGES)
    observed = observe(model, result.layers, drive, names)
    layers = {name: result.layers[name] for name in names}
    return Shown(observed, replace(result, layers=layers, operands={}))


@torch.inference_mode()
def decode_pair(
    settings: QuantizeSettings, decoder: Callable[[Tensor], Tensor],
    float_latents: Tensor, latents: Tensor,
) -> Image.Image:
    """Show the images of the float and the quantised model side by side.

    Raises:
        UserError: a model produced NaN.
    """
    pictures = []
    for of_model in (float_latents, latents):
        images = user_value(to_bytes, decoder(of_model))
        pictures.append(grid(images, columns=PICTURE_COLUMNS))
    title = f"W{settings.weight_bits}A{settings.act_bits} {settings.label}"
    return side_by_side(pictures, ["float", title])


def save_picture(settings: QuantizeSettings, pair: Image.Image) -> None:
    """Write the picture beside the checkpoint."""
    path = settings.output.with_suffix(".png")
    with atomic(path) as temporary:
        pair.save(temporary, format="PNG")
    print(f"wrote {path}: the same seeds from the float and the quantised model, "
          f"guidance {settings.cfg_scale:g}")


def write_report(
    settings: QuantizeSettings, shown: Shown, pair: Image.Image, steps: int,
) -> None:
    """Write the figures and the page that shows them."""
    # matplotlib takes a second to import.
    from report.quantisation import quantisation_figures
    figures = quantisation_figures(shown.observed, settings.recipe, shown.result, pair)
    choice = settings.model
    title = f"{choice.name}, W{settings.weight_bits}A{settings.act_bits}, {settings.label}"
    intro = (f"{choice.image_size} pixels, {steps} steps, seed {settings.seed}, calibrated on "
             f"{len(settings.labels)} images. {choice.card.origin}")
    page = write_page(settings.report, title, intro, [Section("", "", figures)])
    print(f"wrote {page} and its {len(figures)} figures")
