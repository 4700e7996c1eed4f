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
from conftest import LATENT_SHAPE, checkpoint_header, noise_drive, random_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cards import DiT_models, ModelCard
from config import RECIPES, Recipe
from diffusion import ddpm_step, make_schedule
from diffusion.generate import Sampling, generate_latents
from evaluation.judge import sqnr_judge
from evaluation.metrics import sqnr_db
from quant import checkpoint
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.refinement.allocation import GroupSearch

MODEL = "DiT-Tiny"
WIDTH, DEPTH, HEADS, CLASSES = 64, 2, 4, 10
STEPS = 2
LABELS = (1, 7)
CPU = torch.device("cpu")


# The product's API, in one place.

def quick(recipe: Recipe) -> Recipe:
    """Make every step of a recipe as short as can be, on groups that divide the width."""
    return replace(
        recipe,
        alphas=(0.1, 0.9) if len(recipe.alphas) > 1 else recipe.alphas,
        rounds=2,
        iterations=2,
        weight_group=min(recipe.weight_group, 32),
        group_sizes=(32, 64) if recipe.group_sizes else (),
        population=2,
        generations=1,
        tuning=min(recipe.tuning, 2))


def tiny_model(device: torch.device) -> nn.Module:
    """Make a small random model on a device."""
    return random_model(hidden_size=WIDTH, depth=DEPTH).to(device)


def two_calls(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Draw the arguments of a model: two images at two timesteps, with a label each."""
    timesteps, labels = torch.tensor([10, 800]), torch.tensor(LABELS)
    x = torch.randn(2, *LATENT_SHAPE)
    return x.to(device), timesteps.to(device), labels.to(device)


def quantise(recipe: Recipe, device: torch.device) -> tuple[nn.Module, Result]:
    """Return a small random model and its quantised layers, everything on the device."""
    model = tiny_model(device)
    drive = noise_drive(STEPS, torch.tensor(LABELS, device=device))
    judge = sqnr_judge(model, Sampling(make_schedule(str(STEPS)), 0, 1.0, "ddim"))
    result = quantize_model(model, recipe, BitWidths(4, 8), drive, search=GroupSearch(judge))
    return model, result


def save(path: Path, model: nn.Module, result: Result, recipe: Recipe) -> None:
    header = checkpoint_header(
        "quick", recipe, model=MODEL, num_classes=CLASSES, num_sampling_steps=str(STEPS),
        alphas=result.alphas, groups=result.groups)
    checkpoint.save(path, model, result, header)


def load(path: Path, device: torch.device, folded: bool) -> nn.Module:
    return checkpoint.load(path, device, folded)[1]


def sample(model: nn.Module) -> Tensor:
    """Return the latents after all steps, where the model is."""
    labels, schedule = torch.tensor(LABELS), make_schedule(str(STEPS))
    return generate_latents(model, schedule, range(len(labels)), labels, 0, 1.5, ddpm_step)


def least_sqnr_db(recipe: Recipe, equal_codes: bool) -> int:
    """Say how near two files must be that were computed on different devices.

    A weight's code at a tie falls either way there: one in a thousand costs 60 dB, and learned
    rounding turns more of them. Four bits against float have some 20 dB.
    """
    if recipe.weight == "adaround":
        return 30
    return 90 if equal_codes else 40


# The tests.

@pytest.fixture(scope="module")
def device() -> torch.device:
    return accelerator()[0]


@pytest.fixture(autouse=True)
def same_attention():
    """Let both devices take PyTorch's plain attention; a CPU's own kernel has other last bits.

    A code at a rounding tie would turn, and with a sequential Hessian all layers after it.
    """
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    """Give the small model a card, so that its checkpoints can be read."""
    monkeypatch.setitem(DiT_models, MODEL, ModelCard(DEPTH, WIDTH, HEADS, 2, CLASSES, (16,), 2))


@pytest.mark.parametrize("meet", [
    lambda ours, theirs: ours + theirs,
    lambda ours, theirs: theirs + ours,
    lambda ours, theirs: ours.add_(theirs),
    lambda ours, theirs: theirs.add_(ours),
    lambda ours, theirs: torch.cat([ours, theirs]),
    lambda ours, theirs: theirs[ours.long()],
    lambda ours, theirs: nn.functional.linear(theirs, ours),
])
def test_the_accelerator_refuses_cpu_tensors(device, meet):
    ours, theirs = torch.ones(2, 2).to(device), torch.ones(2, 2)
    with pytest.raises(RuntimeError, match=NAME):
        meet(ours, theirs)


def test_the_accelerator_computes_what_a_cpu_computes(device):
    ours, theirs = torch.ones(2, 2).to(device), torch.ones(2, 2)
    assert ours.device == device
    assert (ours + 1).device == device
    assert torch.equal((ours + theirs.to(device)).cpu(), theirs + 1)
    assert torch.equal((ours * torch.tensor(2.0)).cpu(), theirs + 1)
    with pytest.raises(RuntimeError, match="numpy"):
        ours.numpy()


def gradient_on(device: torch.device, x: Tensor) -> Tensor:
    """Return the weight's gradient of a small function, after an optimiser's step, on the CPU."""
    torch.manual_seed(0)
    layer = nn.Linear(4, 2).to(device)
    with torch.enable_grad():
        layer(x.to(device)).sigmoid().square().sum().backward()
    torch.optim.Adam(layer.parameters(), lr=0.1, fused=True).step()
    return layer.weight.grad.cpu()


def test_gradients_work_on_the_accelerator(device):
    x = torch.randn(3, 4)
    assert torch.allclose(gradient_on(CPU, x), gradient_on(device, x))


def test_a_buffer_left_behind_is_noticed(device):
    model, inputs = tiny_model(device), two_calls(device)
    assert model(*inputs).device == device
    fc2 = model.blocks[1].mlp.fc2
    fc2.bias = nn.Parameter(fc2.bias.cpu())
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
    equal_codes = have_equal_codes(paths[CPU], paths[device])

    for folded in (False, True):
        expected = sample(load(paths[CPU], CPU, folded))
        # The CPU's file, then its own.
        model = load(paths[CPU], device, folded)
        assert {value.device for value in model.state_dict().values()} == {device}
        assert sqnr_db(expected, sample(model).cpu()) >= 90
        latents = sample(load(paths[device], device, folded))
        assert latents.device == device
        assert sqnr_db(expected, latents.cpu()) >= least_sqnr_db(recipe, equal_codes)


def have_equal_codes(first: Path, second: Path) -> bool:
    """Check that codes are equal but for one in a hundred, floats but for rounding errors.

    Returns:
        Whether all codes are equal.
    """
    expected, tensors = load_file(first), load_file(second)
    equal = True
    assert expected.keys() == tensors.keys()
    for key, value in expected.items():
        if value.is_floating_point():
            assert torch.allclose(value.float(), tensors[key].float(), rtol=1e-4, atol=1e-6), key
        else:
            turned = (value != tensors[key]).float().mean()
            assert turned <= 0.01, key
            equal = equal and turned == 0
    return bool(equal)
