"""How near to the float model the quantised one stays on the outlier twin.

The orderings are those that the paper claims.
"""
from dataclasses import replace

import pytest
import torch

from cards import DiT_models
from config import RECIPES
from diffusion import ImageNoise, ddpm_step, make_schedule
from diffusion.generate import generate_latents, guided_drive
from download import load_model
from evaluation.metrics import sqnr_db
from quant.install import install
from quant.layers.fold import fold
from quant.pipeline import quantize_model
from quant.recipe import BitWidths

STEPS = 50
COUNT = 16


def load_twin():
    name = "DiT-Digits-Outliers"
    return load_model(name, DiT_models[name], 16, 10, None, torch.device("cpu"))


def latents(model):
    labels = torch.arange(COUNT) % 10
    schedule = make_schedule(str(STEPS))
    return generate_latents(model, schedule, range(COUNT), labels, 1, 1.5, ddpm_step)


@pytest.fixture(scope="module")
def outliers():
    with torch.no_grad():
        model = load_twin()
        return model, latents(model)


def sqnr(outliers, name, weight_bits, **changes) -> float:
    model, reference = outliers
    recipe = replace(RECIPES[name], **changes)
    noise = ImageNoise(0, range(16), (4, 8, 8))
    labels = torch.arange(16) % 10
    drive = guided_drive(make_schedule(str(STEPS)), noise(), noise, labels, 1.5)
    result = quantize_model(model, recipe, BitWidths(weight_bits, 8), drive)
    fresh = load_twin()
    return sqnr_db(reference, latents(install(fresh, fold(fresh, result.layers))))


def test_the_papers_ordering_shows_on_the_outlier_twin(outliers):
    rtn, ditas = sqnr(outliers, "rtn", 4), sqnr(outliers, "ditas", 4)
    smoothquant = [sqnr(outliers, "smoothquant", 4, timestep=t) for t in (0, STEPS // 2, STEPS - 1)]
    print(f"rtn {rtn:.1f}, smoothquant {[round(s, 1) for s in smoothquant]}, ditas {ditas:.1f} dB")
    assert all(rtn < s < ditas for s in smoothquant)
    assert ditas > rtn + 12


def test_eight_bits_are_nearly_lossless(outliers):
    assert sqnr(outliers, "ditas", 8) > 35
