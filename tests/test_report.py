"""Figures and their page: what is drawn, that the page needs nothing but itself, and that a real browser shows it."""
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import block_linears, random_model
from PIL import Image

import config
from config import RECIPES
from diffusion import ImageNoise, guided_denoiser, make_schedule, sample_loop
from diffusion.generate import guided_drive
from quant.layers.linear import QuantLinear
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from report import figures
from report.layers import default_layers, observe, places_of
from report.page import Figure, Section, html_table, write_page
from report.quantisation import quantisation_figures

STEPS = 3


def start(model, count=2):
    """Noise to start from, noise for the steps, and labels."""
    noise = ImageNoise(0, range(count), (model.in_channels, model.input_size, model.input_size))
    return noise(), noise, torch.arange(count)


def drive(model, schedule):
    return guided_drive(schedule, *start(model), config.calibration_cfg_scale)


@pytest.fixture(scope="module")
def quantised():
    model, schedule, recipe = random_model(), make_schedule(str(STEPS)), RECIPES["ditas"]
    return model, schedule, recipe, quantize_model(
        model, recipe, BitWidths(4, 8), drive(model, schedule))


def test_layer_errors_equal_those_of_the_installed_layers(quantised):
    model, schedule, recipe, result = quantised
    seen = observe(model, result.layers, drive(model, schedule), ["blocks.1.mlp.fc2"])
    name, (x, draw, labels) = "blocks.1.mlp.fc2", start(model)
    linear = block_linears(model)[name]
    inputs = []
    handle = linear.register_forward_hook(lambda _, args, __: inputs.append(args[0]))
    with torch.no_grad():
        list(sample_loop(guided_denoiser(model, labels, config.calibration_cfg_scale), schedule, x, draw))
        handle.remove()
        module = QuantLinear(result.layers[name], linear.bias)
        signal = sum(F.linear(x, linear.weight).square().sum() for x in inputs)
        noise = sum((module(x) - linear(x)).square().sum() for x in inputs)
    assert seen.watched == [0, 1, 2] and seen.steps == STEPS
    assert seen.error_db[name] == pytest.approx(float(10 * torch.log10(signal / noise)), abs=1e-3)
    torch.testing.assert_close(seen.inputs[name], inputs[1][0].abs(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(seen.absmax[name], torch.stack([x.abs().amax((0, 1)) for x in inputs]))
    assert list(seen.inputs) == [name] and seen.error_db.keys() == block_linears(model).keys()


def test_all_figures_of_a_run_are_drawn(quantised):
    model, schedule, recipe, result = quantised
    layers = default_layers(places_of(model))
    assert layers == ["blocks.1.mlp.fc2", "blocks.1.attn.qkv"]
    observed = observe(model, result.layers, drive(model, schedule), layers)
    made = quantisation_figures(observed, recipe, result, Image.new("RGB", (40, 20), "red"))
    assert [figure.name for figure in made] == ["images", "layer-errors", "alpha-losses", *(
        f"channel-{kind}-{name}" for name in observed.inputs for kind in ("magnitude", "maxima"))]
    for figure in made[1:]:
        pixels = np.asarray(Image.open(io.BytesIO(figure.png)).convert("RGB"))
        assert min(pixels.shape[:2]) > 200 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, figure.name
    assert Image.open(io.BytesIO(made[0].png)).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("shape", [(3, 5), (64, 512), (100, 700), (256, 4608)])
def test_thinning_keeps_every_outlier(shape):
    rng = np.random.default_rng(0)
    values = rng.random(shape)
    row, column = rng.integers(shape[0]), rng.integers(shape[1])
    values[row, column] = 9.0
    thin = figures._thinned(values, 64, 512)
    assert thin.shape == (min(64, shape[0]), min(512, shape[1]))
    y, x = np.unravel_index(thin.argmax(), thin.shape)
    assert thin.max() == 9.0 and abs(y / thin.shape[0] - row / shape[0]) < 2 / thin.shape[0] and abs(x / thin.shape[1] - column / shape[1]) < 2 / thin.shape[1]


def test_the_dot_is_on_the_chosen_alpha():
    alphas = tuple(np.linspace(0, 1, 21))
    losses = {f"blocks.{i}.attn.qkv": np.linspace(1, 2, 21) for i in range(4)}

    def centre(alpha):
        drawn = figures.alpha_losses(losses, alphas, dict.fromkeys(losses, alpha))
        pixels = np.asarray(Image.open(io.BytesIO(drawn)).convert("RGB")).astype(int)
        return np.nonzero((pixels == (0, 255, 255)).all(-1))[1].mean()
    columns = [centre(alpha) for alpha in (0.0, 0.5, 1.0)]
    assert columns[1] - columns[0] == pytest.approx(columns[2] - columns[1], abs=2) and columns[0] < columns[1]


def test_same_seeds_shows_a_row_per_model_and_needs_no_equal_counts():
    rows = {name: np.full((count, 16, 16, 3), grey, np.uint8) for name, count, grey in (("float", 3, 50), ("rtn", 2, 200))}
    pixels = np.asarray(Image.open(io.BytesIO(figures.same_seeds(rows))).convert("L"))
    dark, light = (((pixels == grey).sum(1) > 50).nonzero()[0] for grey in (50, 200))  # lettering has stray pixels of any grey
    assert len(dark) and len(light) and dark.max() < light.min()


def magenta(width=200, height=100) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (255, 0, 255)).save(buffer, format="PNG")
    return buffer.getvalue()


def test_page_is_self_contained_and_escapes_text(tmp_path):
    page = write_page(tmp_path / "deep" / "report", "A <b> & C", "intro <script>", [Section("part <i>", html_table(["a<"], [["1 & 2"]]), [Figure("one", magenta(), "x < y")])])
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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine (Debian's package 'chromium')")
def test_a_browser_shows_the_figures(tmp_path):
    page = write_page(tmp_path, "title", "intro", [Section("", "", [Figure("one", magenta(), "caption"), Figure("two", magenta(), "caption")])])
    shot = tmp_path / "shot.png"
    subprocess.run(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
                    "--disable-component-update", "--disable-sync", f"--user-data-dir={tmp_path / 'profile'}", "--window-size=900,900",
                    f"--screenshot={shot}", page.as_uri()], check=True, capture_output=True, timeout=120)
    pixels = np.asarray(Image.open(shot).convert("RGB")).astype(int)
    assert (pixels == (255, 0, 255)).all(-1).sum() == pytest.approx(2 * 200 * 100, rel=0.05)
