"""Figures and their page: what is drawn, and that a real browser shows it.

The page needs nothing but itself.
"""
import io
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import block_linears, random_model
from PIL import Image

import config
from architectures.sites import single
from config import RECIPES
from diffusion import ImageNoise, guided_denoiser, make_schedule, sample_loop
from diffusion.generate import guided_drive
from quant.layers.linear import QuantLinear
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from report import distributions, figures
from report.canvas import thinned
from report.layers import default_layers, observe, places_of
from report.page import Figure, Section, html_table, write_page
from report.places import blocks_of, by_role
from report.quantisation import quantisation_figures
from report.spreads import QUANTILES

STEPS = 3


def start(model, count=2):
    """Noise to start from, noise for the steps, and labels."""
    shape = (model.in_channels, model.input_size, model.input_size)
    noise = ImageNoise(0, range(count), shape)
    return noise(), noise, torch.arange(count)


def drive(model, schedule):
    return guided_drive(schedule, *start(model), config.calibration_cfg_scale)


@pytest.fixture(scope="module")
def quantised():
    model, schedule, recipe = random_model(), make_schedule(str(STEPS)), RECIPES["ditas"]
    result = quantize_model(model, recipe, BitWidths(4, 8), drive(model, schedule))
    return model, schedule, recipe, result


def test_layer_errors_use_the_ranges_of_their_timestep():
    """The error over all steps is that of one model per step, which has the ranges of that step."""
    model, schedule = random_model(), make_schedule(str(STEPS))
    recipe = replace(RECIPES["tfmq-dm"], weight="nearest")
    result = quantize_model(model, recipe, BitWidths(8, 4), drive(model, schedule))
    observed = observe(model, result.layers, drive(model, schedule), [])
    assert observed.watched == list(range(STEPS))

    name = "blocks.1.mlp.fc2"
    linear, layer = block_linears(model)[name], result.layers[name]
    inputs = []
    linear.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    drive(model, schedule)(model)
    signal = noise = 0.0
    for step, x in enumerate(inputs):
        act = replace(
            layer.act, scale=layer.act.scale[step], zero=layer.act.zero[step], timesteps=None)
        product = x @ linear.weight.T
        error = QuantLinear(replace(layer, act=act), None)(x) - product
        signal += float(product.square().sum())
        noise += float(error.square().sum())
    assert observed.error_db[name] == pytest.approx(10 * np.log10(signal / noise), abs=0.05)


def test_layer_errors_equal_those_of_the_installed_layers(quantised):
    model, schedule, recipe, result = quantised
    name = "blocks.1.mlp.fc2"
    observed = observe(model, result.layers, drive(model, schedule), [name])

    # The layer's inputs in the same run of the float model.
    linear = block_linears(model)[name]
    inputs = []
    handle = linear.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    x, draw, labels = start(model)
    denoiser = guided_denoiser(model, labels, config.calibration_cfg_scale)
    list(sample_loop(denoiser, schedule, x, draw))
    handle.remove()

    module = QuantLinear(result.layers[name], linear.bias)
    signal = sum(F.linear(x, linear.weight).square().sum() for x in inputs)
    noise = sum((module(x) - linear(x)).square().sum() for x in inputs)
    expected_db = float(10 * torch.log10(signal / noise))
    maxima = torch.stack([x.abs().amax((0, 1)) for x in inputs])
    assert observed.watched == [0, 1, 2] and observed.steps == STEPS
    assert observed.error_db[name] == pytest.approx(expected_db, abs=1e-3)
    torch.testing.assert_close(observed.absmax[name], maxima)

    # What is shown of the layer, by numpy.
    assert list(observed.shown) == [name]
    shown = observed.shown[name]
    assert torch.equal(shown.weight, linear.weight.abs())
    torch.testing.assert_close(shown.inputs, inputs[1][0].abs(), rtol=1e-4, atol=1e-5)
    images = [x.numpy().reshape(len(x), -1) for x in inputs]
    deviations = np.stack([image.std(1, ddof=1) for image in images])
    assert np.allclose(observed.deviations[name], deviations, rtol=1e-4)
    first = np.stack([np.quantile(image[0], QUANTILES, method="nearest") for image in images])
    assert np.allclose(shown.step_quantiles, first, rtol=1e-3, atol=1e-4)
    middle = np.quantile(images[1], QUANTILES, axis=1, method="nearest").T
    assert np.allclose(shown.image_quantiles, middle, rtol=1e-3, atol=1e-4)
    assert observed.deviations.keys() == block_linears(model).keys()
    assert observed.error_db.keys() == block_linears(model).keys()


def test_all_figures_of_a_run_are_drawn(quantised):
    model, schedule, recipe, result = quantised
    layers = default_layers(places_of(model))
    assert layers == ["blocks.1.mlp.fc2", "blocks.1.attn.qkv"]
    observed = observe(model, result.layers, drive(model, schedule), layers)
    pair = Image.new("RGB", (40, 20), "red")
    drawn = quantisation_figures(observed, recipe, result, pair)
    names = ["images", "layer-errors", "alpha-losses"]
    for layer in observed.shown:
        kinds = ("channel-magnitude", "channel-maxima", "weight-magnitude", "input-over-steps",
                 "input-over-images")
        names += [f"{kind}-{layer}" for kind in kinds]
    names += ["deviation-over-steps", "deviation-over-images"]
    assert [figure.name for figure in drawn] == names
    for figure in drawn[1:]:
        image = pixels(figure.png)
        assert min(image.shape[:2]) > 200, figure.name
        assert len(np.unique(image.reshape(-1, 3), axis=0)) > 20, figure.name
    assert Image.open(io.BytesIO(drawn[0].png)).getpixel((0, 0)) == (255, 0, 0)


def test_a_figure_has_a_line_per_role_and_leaves_out_what_is_outside_the_blocks():
    places = {
        "a.0": single("a", "first", "block 0"),
        "b.0": single("b", "second", "block 0"),
        "a.1": single("c", "first", "block 1"),
        "last": single("d", "last", None),
    }
    values = {"a.0": 1.0, "b.0": 2.0, "a.1": 3.0, "last": 4.0}
    assert blocks_of(values, places) == ["block 0", "block 1"]
    assert by_role(values, places) == {
        "first": {"block 0": 1.0, "block 1": 3.0},
        "second": {"block 0": 2.0},
    }
    sizes = dict(zip(values, (32, 64, 128, 256)))
    with_last = figures.group_allocation([1.0], [2.0], sizes, places)
    del sizes["last"]
    assert figures.group_allocation([1.0], [2.0], sizes, places) == with_last
    del sizes["b.0"]
    assert figures.group_allocation([1.0], [2.0], sizes, places) != with_last


@pytest.mark.parametrize("draw", [
    distributions.deviations_over_steps, distributions.deviations_over_images])
def test_deviations_have_a_panel_per_role_and_leave_out_what_is_outside_the_blocks(draw):
    places = {
        "a.0": single("a", "first", "block 0"),
        "a.1": single("b", "first", "block 1"),
        "b.0": single("c", "second", "block 0"),
        "last": single("d", "last", None),
    }
    rng = np.random.default_rng(0)
    values = {name: rng.random(6) for name in places}
    whole = draw(values, places)
    without = {name: values[name] for name in ("a.0", "a.1", "b.0")}
    assert draw(without, places) == whole
    # Two roles stand side by side, three in two lines.
    third = {"c.0": single("e", "third", "block 0")}
    more = pixels(draw({**without, "c.0": values["a.0"]}, places | third))
    assert more.shape[0] > 1.5 * pixels(whole).shape[0]


def orange_columns(png: bytes) -> int:
    """Count the medians of a box plot."""
    red, green, blue = np.moveaxis(pixels(png), 2, 0)
    is_orange = (red > 200) & (red - green > 60) & (green - blue > 60)
    columns = is_orange.any(0).astype(int)
    return int((np.diff(columns, prepend=0) == 1).sum())


@pytest.mark.parametrize("rows, drawn", [(8, 8), (333, 50)])
def test_a_box_stands_for_every_row_up_to_fifty(rows, drawn):
    quantiles = np.tile([-9.0, -3, -1, 0, 1, 3, 9], (rows, 1))
    assert orange_columns(distributions.boxes("title", "row", quantiles)) == drawn


@pytest.mark.parametrize("shape", [(3, 5), (64, 512), (100, 700), (256, 4608)])
def test_thinning_keeps_every_outlier(shape):
    rng = np.random.default_rng(0)
    values = rng.random(shape)
    row, column = rng.integers(shape[0]), rng.integers(shape[1])
    values[row, column] = 9.0
    thin = thinned(values, 64, 512)
    assert thin.shape == (min(64, shape[0]), min(512, shape[1]))
    y, x = np.unravel_index(thin.argmax(), thin.shape)
    assert thin.max() == 9.0
    assert abs(y / thin.shape[0] - row / shape[0]) < 2 / thin.shape[0]
    assert abs(x / thin.shape[1] - column / shape[1]) < 2 / thin.shape[1]


def test_the_dot_is_on_the_chosen_alpha():
    alphas = tuple(np.linspace(0, 1, 21))
    losses = {f"blocks.{i}.attn.qkv": np.linspace(1, 2, 21) for i in range(4)}

    def centre(alpha):
        drawn = figures.alpha_losses(losses, alphas, dict.fromkeys(losses, alpha))
        is_cyan = (pixels(drawn) == (0, 255, 255)).all(-1)
        return np.nonzero(is_cyan)[1].mean()

    low, middle, high = centre(0.0), centre(0.5), centre(1.0)
    assert middle - low == pytest.approx(high - middle, abs=2) and low < middle


def test_same_seeds_shows_a_row_per_model_and_needs_no_equal_counts():
    rows = {
        "float": np.full((3, 16, 16, 3), 50, np.uint8),
        "rtn": np.full((2, 16, 16, 3), 200, np.uint8),
    }
    image = np.asarray(Image.open(io.BytesIO(figures.same_seeds(rows))).convert("L"))

    def lines(grey):
        # Lettering has stray pixels of any grey.
        return ((image == grey).sum(1) > 50).nonzero()[0]

    dark, light = lines(50), lines(200)
    assert len(dark) and len(light) and dark.max() < light.min()


def pixels(png: bytes) -> np.ndarray:
    """Decode a picture to (H, W, 3)."""
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def magenta(width=200, height=100) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 255)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_page_is_self_contained_and_escapes_text(tmp_path):
    table = html_table(["a<"], [["1 & 2"]])
    section = Section("part <i>", table, [Figure("one", magenta(), "x < y")])
    folder = tmp_path / "deep" / "report"
    page = write_page(folder, "A <b> & C", "intro <script>", [section])
    text = page.read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|<script|<link|<b>|<i>", text)
    sources = []

    class Images(HTMLParser):
        def handle_starttag(self, tag, attributes):
            if tag == "img":
                sources.append(dict(attributes)["src"])

    Images().feed(text)
    assert len(sources) == 1 and sources[0].startswith("data:image/png;base64,")
    assert (page.parent / "one.png").read_bytes() == magenta()
    assert sorted(file.name for file in page.parent.iterdir()) == ["one.png", "report.html"]


@pytest.mark.skipif(
    shutil.which("chromium") is None,
    reason="no chromium on this machine (Debian's package 'chromium')")
def test_a_browser_shows_the_figures(tmp_path):
    shown = [Figure("one", magenta(), "caption"), Figure("two", magenta(), "caption")]
    page = write_page(tmp_path, "title", "intro", [Section("", "", shown)])
    shot = tmp_path / "shot.png"
    command = [
        "chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,900",
        f"--screenshot={shot}", page.as_uri()]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    is_magenta = (pixels(shot.read_bytes()) == (255, 0, 255)).all(-1)
    assert is_magenta.sum() == pytest.approx(2 * 200 * 100, rel=0.05)
