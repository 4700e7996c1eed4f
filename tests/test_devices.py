"""Every recipe on a pretended accelerator: a tensor on the wrong device is noticed without a GPU.

The device runs the CPU's own kernels (see ``accelerator``), so results have to be those of the CPU.
Two things may differ in last bits: the search of migration strengths, which is compiled for the CPU
alone, and gradients, which go through other operators. So the strengths offered are far apart.
AdaRound also learns ranges, and then a few codes may lie on the other side of a rounding tie.
"""
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerator import NAME, accelerator
from conftest import random_model
from metrics import sqnr_db
from safetensors.torch import load_file
from torch import Tensor, nn

from config import RECIPES, Recipe, calibration_cfg_scale
from diffusion import ImageNoise, ddpm_step, make_schedule
from diffusion.generate import generate_latents, guided_drive
from evaluation.judge import sqnr_judge
from models import DiT_models, ModelCard
from quant import checkpoint
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.refinement.allocation import GroupSearch

MODEL, WIDTH, DEPTH, HEADS, CLASSES = "DiT-Tiny", 64, 2, 4, 10
STEPS, LABELS = "2", (1, 7)
CPU = torch.device("cpu")


# The product's API, in one place.

def quick(recipe: Recipe) -> Recipe:
    """Every step of the recipe, as short as can be, on groups that divide the width."""
    alphas = (0.1, 0.9) if len(recipe.alphas) > 1 else recipe.alphas
    sizes = (32, 64) if recipe.group_sizes else ()
    group = min(recipe.weight_group, 32)
    return replace(recipe, alphas=alphas, rounds=2, iterations=2, weight_group=group,
                   group_sizes=sizes, population=2, generations=1)


def quantise(recipe: Recipe, device: torch.device) -> tuple[nn.Module, Result]:
    """A small random model, and its quantised layers: everything on the device."""
    model, schedule = random_model(hidden_size=WIDTH, depth=DEPTH).to(device), make_schedule(STEPS)
    noise = ImageNoise(0, range(len(LABELS)), (4, 8, 8), device)
    labels = torch.tensor(LABELS, device=device)
    drive = guided_drive(schedule, noise(), noise, labels, calibration_cfg_scale)
    judge = sqnr_judge(model, schedule, 0)
    return model, quantize_model(
        model, recipe, BitWidths(4, 8), drive, search=GroupSearch(judge))


def save(path: Path, model: nn.Module, result: Result, recipe: Recipe) -> None:
    header = checkpoint.Header(
        model=MODEL, image_size=16, num_classes=CLASSES, weight_bit=4, act_bit=8,
        recipe_name="quick", recipe=recipe, seed=0, num_sampling_steps=STEPS, svd="fast", alphas=result.alphas,
        groups=result.groups)
    checkpoint.save(path, model, result, header)


def load(path: Path, device: torch.device, folded: bool) -> nn.Module:
    return checkpoint.load(path, device, folded)[1]


def sample(model: nn.Module) -> Tensor:
    """Latents after all steps, where the model is."""
    labels, schedule = torch.tensor(LABELS), make_schedule(STEPS)
    return generate_latents(model, schedule, range(len(labels)), labels, 0, 1.5, ddpm_step)


def learned(recipe: Recipe) -> bool:
    return recipe.weight == "adaround"


# The tests.

@pytest.fixture(scope="module")
def device() -> torch.device:
    return accelerator()[0]


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """The small model has a card, so that its checkpoints can be read."""
    monkeypatch.setitem(DiT_models, MODEL, ModelCard(DEPTH, WIDTH, HEADS, 2, CLASSES, (16,), 2))


def test_the_accelerator_refuses_cpu_tensors(device):
    ours, theirs = torch.ones(2, 2).to(device), torch.ones(2, 2)
    assert ours.device == device and (ours + 1).device == device
    for wrong in (lambda: ours + theirs, lambda: theirs + ours,
                  lambda: ours.add_(theirs), lambda: theirs.add_(ours),
                  lambda: torch.cat([ours, theirs]), lambda: theirs[ours.long()],
                  lambda: nn.functional.linear(theirs, ours)):
        with pytest.raises(RuntimeError, match=NAME):
            wrong()
    with pytest.raises(RuntimeError, match="numpy"):
        ours.numpy()
    assert torch.equal((ours + theirs.to(device)).cpu(), theirs + 1)
    assert torch.equal((ours * torch.tensor(2.0)).cpu(), theirs + 1)


def test_gradients_work_on_the_accelerator(device):
    x = torch.randn(3, 4)
    grads = []
    for place in (CPU, device):
        torch.manual_seed(0)
        layer = nn.Linear(4, 2).to(place)
        with torch.enable_grad():
            layer(x.to(place)).sigmoid().square().sum().backward()
        torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()
        grads.append(layer.weight.grad.cpu())
    assert torch.allclose(*grads)


def test_a_buffer_left_behind_is_noticed(device):
    model = random_model(hidden_size=WIDTH, depth=DEPTH).to(device)
    timesteps, labels = torch.tensor([10, 800], device=device), torch.tensor(LABELS, device=device)
    inputs = torch.randn(2, 4, 8, 8, device=device), timesteps, labels
    assert model(*inputs).device == device
    model.blocks[1].mlp.fc2.bias = nn.Parameter(model.blocks[1].mlp.fc2.bias.cpu())
    with pytest.raises(RuntimeError, match=NAME):
        model(*inputs)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_do_on_an_accelerator_what_they_do_on_a_cpu(name, device, tmp_path):
    recipe, paths = quick(RECIPES[name]), {}
    for place in (CPU, device):
        model, result = quantise(recipe, place)
        assert {layer.weight.left.device for layer in result.layers.values()} == {place}
        paths[place] = tmp_path / f"{place.type}.safetensors"
        save(paths[place], model, result, recipe)
    assert_same_files(paths[CPU], paths[device])

    for folded in (False, True):
        expected, model = sample(load(paths[CPU], CPU, folded)), load(paths[CPU], device, folded)
        assert {value.device for value in model.state_dict().values()} == {device}
        assert sqnr_db(expected, sample(model).cpu()) >= 90
        found = sample(load(paths[device], device, folded))
        assert found.device == device
        assert sqnr_db(expected, found.cpu()) >= (30 if learned(recipe) else 90)


def assert_same_files(first: Path, second: Path) -> None:
    """Equal codes but for one in a hundred, and floats that differ by rounding errors alone."""
    expected, found = load_file(first), load_file(second)
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        if value.is_floating_point():
            assert torch.allclose(value.float(), found[key].float(), rtol=1e-4, atol=1e-6), key
        else:
            assert (value != found[key]).float().mean() <= 0.01, key
