"""Figures and their page: what is drawn, and that a real browser shows it.

The page needs nothing but itself.
"""
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import block_linears, noise_drive, random_model
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from config import RECIPES
from models import DiT
from quant.calibration.trajectory import Drive
from quant.layers.linear import QuantLinear
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from report import figures
from report.layers import default_layers, observe, places_of
from report.page import Figure, Section, html_table, write_page
from report.quantisation import quantisation_figures

STEPS = 3
RECIPE = RECIPES["ditas"]
MAGENTA = (255, 0, 255)


def new_drive() -> Drive:
    """Make the drive that all of these tests sample with."""
    return noise_drive(STEPS, torch.arange(2))


@pytest.fixture(scope="module")
def model() -> DiT:
    return random_model()


@pytest.fixture(scope="module")
def result(model) -> Result:
    return quantize_model(model, RECIPE, BitWidths(4, 8), new_drive())


def inputs_of(linear: nn.Module, model: nn.Module) -> list[Tensor]:
    """Let the model sample, and return what the linear gets at each step."""
    inputs = []
    handle = linear.register_forward_hook(lambda module, args, output: inputs.append(args[0]))
    with torch.no_grad():
        new_drive()(model)
    handle.remove()
    return inputs


def output_sqnr_db(exact: nn.Module, quantised: nn.Module, inputs: list[Tensor]) -> float:
    """Compute the signal-to-noise ratio of a layer's outputs over several inputs, in dB."""
    signal = sum(F.linear(x, exact.weight).square().sum() for x in inputs)
    noise = sum((quantised(x) - exact(x)).square().sum() for x in inputs)
    return float(10 * torch.log10(signal / noise))


def test_layer_errors_equal_those_of_the_installed_layers(model, result):
    name = "blocks.1.mlp.fc2"
    linears = block_linears(model)
    seen = observe(model, result.layers, new_drive(), [name])
    assert seen.watched == [0, 1, 2]
    assert seen.steps == STEPS
    assert seen.error_db.keys() == linears.keys()
    assert list(seen.inputs) == [name]

    linear = linears[name]
    inputs = inputs_of(linear, model)
    quantised = QuantLinear(result.layers[name], linear.bias)
    expected = output_sqnr_db(linear, quantised, inputs)
    assert seen.error_db[name] == pytest.approx(expected, abs=1e-3)
    torch.testing.assert_close(seen.inputs[name], inputs[1][0].abs(), rtol=1e-4, atol=1e-5)
    maxima = torch.stack([x.abs().amax((0, 1)) for x in inputs])
    torch.testing.assert_close(seen.absmax[name], maxima)


def pixels_of(png: bytes, mode: str = "RGB") -> NDArray:
    """Decode a PNG, (H, W) or (H, W, 3) uint8."""
    return np.asarray(Image.open(io.BytesIO(png)).convert(mode))


def test_all_figures_of_a_run_are_drawn(model, result):
    layers = default_layers(places_of(model))
    assert layers == ["blocks.1.mlp.fc2", "blocks.1.attn.qkv"]
    observed = observe(model, result.layers, new_drive(), layers)
    samples = Image.new("RGB", (40, 20), "red")
    drawn = quantisation_figures(observed, RECIPE, result, samples)
    names = ["images", "layer-errors", "alpha-losses"]
    for name in observed.inputs:
        names += [f"channel-magnitude-{name}", f"channel-maxima-{name}"]
    assert [figure.name for figure in drawn] == names
    assert tuple(pixels_of(drawn[0].png)[0, 0]) == (255, 0, 0)
    for figure in drawn[1:]:
        pixels = pixels_of(figure.png)
        assert min(pixels.shape[:2]) > 200, figure.name
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20, figure.name


@pytest.mark.parametrize("shape", [
    (3, 5),
    (64, 512),
    (100, 700),
    (256, 4608),
])
def test_thinning_keeps_every_outlier(shape):
    rows, columns = shape
    rng = np.random.default_rng(0)
    values = rng.random(shape)
    row, column = rng.integers(rows), rng.integers(columns)
    values[row, column] = 9.0
    thin = figures._thinned(values, 64, 512)
    height, width = thin.shape
    assert (height, width) == (min(64, rows), min(512, columns))
    assert thin.max() == 9.0
    y, x = np.unravel_index(thin.argmax(), thin.shape)
    assert abs(y / height - row / rows) < 2 / height
    assert abs(x / width - column / columns) < 2 / width


def test_the_dot_is_on_the_chosen_alpha():
    alphas = tuple(np.linspace(0, 1, 21))
    losses = {f"blocks.{i}.attn.qkv": np.linspace(1, 2, 21) for i in range(4)}

    def centre(alpha):
        drawn = figures.alpha_losses(losses, alphas, dict.fromkeys(losses, alpha))
        pixels = pixels_of(drawn).astype(int)
        return np.nonzero((pixels == (0, 255, 255)).all(-1))[1].mean()

    left, middle, right = centre(0.0), centre(0.5), centre(1.0)
    assert left < middle
    assert middle - left == pytest.approx(right - middle, abs=2)


def rows_of_grey(pixels: NDArray, grey: int) -> NDArray:
    """Number the pixel rows that hold images of a grey; lettering has stray pixels of any."""
    return ((pixels == grey).sum(1) > 50).nonzero()[0]


def test_same_seeds_shows_a_row_per_model_and_needs_no_equal_counts():
    images = {
        "float": np.full((3, 16, 16, 3), 50, np.uint8),
        "rtn": np.full((2, 16, 16, 3), 200, np.uint8),
    }
    pixels = pixels_of(figures.same_seeds(images), "L")
    dark, light = rows_of_grey(pixels, 50), rows_of_grey(pixels, 200)
    assert len(dark)
    assert len(light)
    assert dark.max() < light.min()


def magenta(width: int = 200, height: int = 100) -> bytes:
    """Make a PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), MAGENTA).save(buffer, format="PNG")
    return buffer.getvalue()


class ImageSources(HTMLParser):
    """Lists in ``sources`` where a page takes its images from."""

    def __init__(self):
        super().__init__()
        self.sources: list[str] = []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.sources.append(dict(attrs)["src"])


def test_page_is_self_contained_and_escapes_text(tmp_path):
    table = html_table(["a<"], [["1 & 2"]])
    section = Section("part <i>", table, [Figure("one", magenta(), "x < y")])
    page = write_page(tmp_path / "deep" / "report", "A <b> & C", "intro <script>", [section])
    text = page.read_text("utf-8")
    assert not re.search(r"https?:|//[a-z]|<script|<link|<b>|<i>", text)
    parser = ImageSources()
    parser.feed(text)
    assert len(parser.sources) == 1
    assert parser.sources[0].startswith("data:image/png;base64,")
    assert (page.parent / "one.png").read_bytes() == magenta()
    assert sorted(file.name for file in page.parent.iterdir()) == ["one.png", "report.html"]


def screenshot(page: Path, folder: Path) -> NDArray:
    """Let a browser show a page, and return what it shows, (900, 900, 3)."""
    shot = folder / "shot.png"
    command = [
        "chromium",
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        f"--user-data-dir={folder / 'profile'}",
        "--window-size=900,900",
        f"--screenshot={shot}",
        page.as_uri(),
    ]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    return pixels_of(shot.read_bytes())


@pytest.mark.skipif(
    shutil.which("chromium") is None,
    reason="no chromium on this machine (Debian's package 'chromium')")
def test_a_browser_shows_the_figures(tmp_path):
    drawn = [Figure("one", magenta(), "caption"), Figure("two", magenta(), "caption")]
    page = write_page(tmp_path, "title", "intro", [Section("", "", drawn)])
    pixels = screenshot(page, tmp_path)
    shown = (pixels == MAGENTA).all(-1).sum()
    assert shown == pytest.approx(2 * 200 * 100, rel=0.05)
