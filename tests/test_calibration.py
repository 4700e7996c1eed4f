"""How the method gets its data: trajectories, replay, and what a calibration holds."""
from dataclasses import replace

import pytest
import torch
from conftest import (
    block_linears,
    bundled_digits,
    noise_drive,
    random_model,
    relative,
)
from torch import Tensor, nn

import config
from architectures.registry import architecture_of
from benchmarks.calibration import alive_at_peak
from config import RECIPES, Recipe
from quant.calibration.trajectory import record, replay
from quant.calibration.watch import Watch
from quant.pipeline import quantize_model
from quant.recipe import BitWidths

W4A8 = BitWidths(4, 8)


def count_images(model: nn.Module) -> list[int]:
    """Note how many images every call of the first block gets, in a list that grows."""
    counts = []

    def note(module, inputs, output):
        counts.append(len(inputs[0]))

    model.blocks[0].register_forward_hook(note)
    return counts


def expected_layers(recipe: Recipe) -> int:
    """Count what a recipe quantises in a DiT of five blocks."""
    if recipe.scope == "blocks":
        return 20 if recipe.adaln_bits == 16 else 25
    return {"adaln": 25, "inner": 28, "all": 30}[recipe.scope]


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_calibration_runs_at_most_two_trajectories(name):
    model, steps, images = random_model(depth=5), 6, 3
    before = {key: value.clone() for key, value in model.state_dict().items()}
    counts = count_images(model)
    recipe = RECIPES[name]
    # Sequential moments run the model once more for every block, on few images; so does tuning.
    recipe = replace(recipe, alphas=recipe.alphas[:2], rounds=1, group_sizes=(), hessian="float",
                     tuning=0)
    if recipe.weight == "adaround":
        recipe = replace(recipe, weight="gptq")
    result = quantize_model(model, recipe, W4A8, noise_drive(steps, torch.arange(images)))
    trajectories = {"rtn": 0, "smoothquant": 1}.get(name, 2)
    assert sum(counts) == trajectories * steps * 2 * images
    assert len(result.layers) == expected_layers(recipe)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


class Passing:
    """Keeps inputs and outputs of a linear as an observer sees them."""

    def __init__(self):
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.inputs.append(x.clone())
        self.outputs.append(y.clone())


@pytest.mark.parametrize("tokens", [1, 200, 10 ** 6])
def test_replay_shows_the_same_inputs_however_many_timesteps_go_at_once(tokens):
    model, images, name = random_model(), 2, "blocks.1.mlp.fc2"
    linears = block_linears(model)
    straight = Passing()
    handle = linears[name].register_forward_hook(
        lambda module, inputs, output: straight(inputs[0], output))
    drive = noise_drive(7, torch.tensor([3, 5]))
    trajectory, absmax = record(model, architecture_of(model).sites(model, "blocks"), drive)
    handle.remove()

    watch = Watch()
    seen = {name: watch.add(name, "test", Passing) for name in linears}
    replay(model, trajectory, watch, tokens, "test")
    assert relative(torch.cat(seen[name].inputs), torch.stack(straight.inputs)) < 1e-5
    assert relative(torch.cat(seen[name].outputs), torch.stack(straight.outputs)) < 1e-5
    for linear in linears:
        inputs = torch.cat(seen[linear].inputs)
        assert inputs.shape[:2] == (7, 2 * images)
        assert relative(inputs.abs().amax((1, 2)), absmax[linear]) < 1e-5


def test_a_model_that_gives_nan_is_refused():
    model = random_model()
    model.blocks[1].mlp.fc1.bias[3] = float("nan")
    with pytest.raises(ValueError, match="blocks.1.mlp.fc2 is not finite"):
        quantize_model(model, RECIPES["ditas"], W4A8, noise_drive(3, torch.arange(2)))

def test_default_labels_are_the_papers():
    labels = config.default_labels(1000)
    assert labels[:3] == [207, 360, 387]
    assert len(labels) == 16
    assert config.default_labels(10) == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2, 3, 4, 5]
    # The classes of DiT-Emoji are sorted by category; a third of them are smileys.
    assert config.default_labels(31, 4) == [0, 7, 15, 23]


def test_calibration_holds_no_more_than_25_activations_beside_the_model():
    model, images = bundled_digits(), 16
    widest = max(linear.in_features for linear in block_linears(model).values())
    # MB, of 16 tokens per image in float32.
    largest = widest * 2 * images * 16 * 4 / 1e6
    drive = noise_drive(4, torch.arange(images) % 10)
    alive = alive_at_peak(lambda: quantize_model(model, RECIPES["ditas"], W4A8, drive))
    assert largest < alive < 25 * largest
