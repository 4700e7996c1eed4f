"""Calls of a model, recorded and made again: compared with the calls themselves."""
from dataclasses import replace

import pytest
import torch
from conftest import (
    LATENT_SHAPE,
    TEXT_TOKENS,
    TEXT_WIDTH,
    block_linears,
    noise_drive,
    random_model,
    random_pixart,
    relative,
    scope_linears,
)
from torch import Tensor, nn

from architectures.registry import architecture_of
from architectures.sites import Call, single
from config import RECIPES
from quant.calibration.calls import can_stack, recorded_calls, stack, take
from quant.calibration.trajectory import record, replay
from quant.calibration.watch import Watch
from quant.pipeline import quantize_model
from quant.recipe import BitWidths

IMAGES = 2
W4A8 = BitWidths(4, 8)


@pytest.fixture(scope="module")
def pixart() -> nn.Module:
    """PixArt that reads text, and size and shape of its images from a dict."""
    return random_pixart(
        attention_head_dim=12, cross_attention_dim=48, use_additional_conditions=True)


def sizes(images: int) -> dict[str, Tensor]:
    """Draw what PixArt reads of each image beside the text."""
    return {
        "resolution": 100 + torch.randint(900, (images, 2)),
        "aspect_ratio": torch.rand(images, 1),
    }


def run(model: nn.Module, latents: Tensor, text: Tensor, timestep: int, added: dict) -> Tensor:
    """Call PixArt with two positional arguments and two by keyword, one of them a dict."""
    timesteps = torch.full((len(latents),), timestep)
    return model(latents, text, timestep=timesteps, added_cond_kwargs=added).sample


def draw_text(images: int = IMAGES) -> Tensor:
    return torch.randn(images, TEXT_TOKENS, TEXT_WIDTH)


def test_arguments_are_recorded_by_name_and_give_the_output_again(pixart):
    text, outputs = draw_text(), []
    with recorded_calls(pixart) as calls:
        for timestep in (900, 20):
            latents = torch.randn(IMAGES, *LATENT_SHAPE)
            outputs.append(run(pixart, latents, text, timestep, sizes(IMAGES)))
    run(pixart, latents, text, 0, sizes(IMAGES))
    assert len(calls) == 2
    names = {"hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs"}
    for call, output in zip(calls, outputs):
        assert call.keys() == names
        assert torch.equal(pixart(**call).sample, output)


def test_a_tensor_that_stays_is_kept_once(pixart):
    text, added = draw_text(), sizes(IMAGES)
    with recorded_calls(pixart) as calls:
        for timestep in (900, 400, 20):
            run(pixart, torch.randn(IMAGES, *LATENT_SHAPE), text, timestep, added)
    kept = calls[0]["encoder_hidden_states"]
    kept_resolution = calls[0]["added_cond_kwargs"]["resolution"]
    assert kept is not text
    assert torch.equal(kept, text)
    for call in calls:
        assert call["encoder_hidden_states"] is kept
        assert call["added_cond_kwargs"]["resolution"] is kept_resolution


def test_a_tensor_that_changes_in_place_is_copied(pixart):
    latents, text, added = torch.randn(IMAGES, *LATENT_SHAPE), draw_text(), sizes(IMAGES)
    expected_latents, expected_ratios = [], []
    with recorded_calls(pixart) as calls:
        for timestep in (900, 400, 20):
            expected_latents.append(latents.clone())
            expected_ratios.append(added["aspect_ratio"].clone())
            run(pixart, latents, text, timestep, added)
            latents.mul_(0.5)
            added["aspect_ratio"].add_(1)
    for call, values, ratios in zip(calls, expected_latents, expected_ratios):
        assert torch.equal(call["hidden_states"], values)
        assert torch.equal(call["added_cond_kwargs"]["aspect_ratio"], ratios)


def dit_call(images: int = IMAGES, **changes) -> Call:
    """Draw the arguments of a DiT."""
    call = {
        "x": torch.randn(images, *LATENT_SHAPE),
        "t": torch.randint(1000, (images,)),
        "y": torch.arange(images),
    }
    return {**call, **changes}


def pixart_call(images: int = IMAGES) -> Call:
    """Draw the arguments of a PixArt, each image's own size included."""
    return {
        "hidden_states": torch.randn(images, *LATENT_SHAPE),
        "encoder_hidden_states": draw_text(images),
        "timestep": torch.randint(1000, (images,)),
        "added_cond_kwargs": sizes(images),
        "return_dict": False,
    }


def output(model: nn.Module, call: Call) -> Tensor:
    """Make a call, and return the tensor that it gives."""
    result = model(**call)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_stacked_calls_give_what_single_ones_give(family, pixart):
    model = random_model() if family == "dit" else pixart
    new_call = dit_call if family == "dit" else pixart_call
    batched = architecture_of(model).batched
    calls = [new_call() for _ in range(3)]
    assert can_stack(calls, batched)
    expected = torch.cat([output(model, call) for call in calls])
    assert relative(output(model, stack(calls, batched)), expected) < 1e-6


@pytest.mark.parametrize("family", ["dit", "pixart"])
def test_images_taken_from_several_calls_give_what_they_gave_there(family, pixart):
    model = random_model() if family == "dit" else pixart
    new_call = dit_call if family == "dit" else pixart_call
    calls = [new_call() for _ in range(3)]
    outputs = torch.stack([output(model, call) for call in calls])
    picks = torch.tensor([[2, 0], [0, 1], [2, 1]])
    call = take(calls, picks, architecture_of(model).batched)
    assert relative(output(model, call), outputs[picks[:, 0], picks[:, 1]]) < 1e-6


MASK = torch.ones(IMAGES, TEXT_TOKENS)


@pytest.mark.parametrize("other", [
    dit_call(images=3),
    dit_call(x=torch.randn(IMAGES, 4, 4, 4)),
    dit_call(mask=MASK),
    {name: value for name, value in dit_call().items() if name != "y"},
], ids=["images", "latents", "more arguments", "fewer arguments"])
def test_calls_that_differ_in_more_than_values_are_not_stacked(other):
    batched = ("x", "t", "y")
    assert can_stack([dit_call(), dit_call()], batched)
    assert not can_stack([dit_call(), other], batched)
    with pytest.raises(ValueError, match="differ in their images only"):
        take([dit_call(), other], torch.tensor([[0, 0]]), batched)


@pytest.mark.parametrize("first, other, stacks", [
    ({"scale": 1.0}, {"scale": 1.0}, True),
    ({"scale": 1.0}, {"scale": 2.0}, False),
    ({"scale": None}, {"scale": 2.0}, False),
    ({"shared": MASK}, {"shared": MASK.clone()}, True),
    ({"shared": MASK}, {"shared": 0 * MASK}, False),
    ({"shared": {"mask": MASK}}, {"shared": {"mask": MASK.clone()}}, True),
    ({"shared": {"mask": MASK}}, {"shared": {"mask": 0 * MASK}}, False),
    ({"shared": {"mask": MASK}}, {"shared": {}}, False),
])
def test_arguments_for_all_images_have_to_be_the_same(first, other, stacks):
    calls = [dit_call(**first), dit_call(**other)]
    assert can_stack(calls, ("x", "t", "y")) == stacks


def test_a_pixart_that_reads_the_sizes_of_its_images_is_quantised(pixart):
    """Pipelines give the same sizes, one per image, in every call."""
    def drive(model):
        text, added = draw_text(), sizes(IMAGES)
        for timestep in (900, 400, 20):
            run(model, torch.randn(IMAGES, *LATENT_SHAPE), text, timestep, added)

    recipe = replace(RECIPES["ditas"], rounds=1, weight_group=16)
    result = quantize_model(pixart, recipe, W4A8, drive)
    assert set(scope_linears(pixart, "blocks")) <= result.layers.keys()


class Inputs:
    """Keeps what an observer of a linear is shown."""

    def __init__(self):
        self.values: list[Tensor] = []

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.values.append(x.clone())


class Queries:
    """Keeps the queries that an observer of an attention is shown."""

    def __init__(self):
        self.values: list[Tensor] = []

    def __call__(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        self.values.append(query.clone())


def two_then_three_images(model: nn.Module) -> None:
    """Call the model with two images, then with three."""
    torch.manual_seed(1)
    model(**dit_call(images=2))
    model(**dit_call(images=3))


def three_then_two_images(model: nn.Module) -> None:
    """Call the model with three images, then with two."""
    torch.manual_seed(1)
    model(**dit_call(images=3))
    model(**dit_call(images=2))


def test_calls_of_different_shape_are_replayed_singly():
    model = random_model()
    linears, straight = block_linears(model), {}
    handles = []

    def hook_of(name):
        straight[name] = []
        return lambda module, inputs, output: straight[name].append(inputs[0])

    for name, linear in linears.items():
        handles.append(linear.register_forward_hook(hook_of(name)))
    sites = architecture_of(model).sites(model, "blocks")
    trajectory, absmax = record(model, sites, two_then_three_images)
    for handle in handles:
        handle.remove()

    watch = Watch()
    seen = {name: watch.add(name, "test", Inputs) for name in linears}
    queries = watch.add("blocks.1.attn", "test", Queries)
    replay(model, trajectory, watch, 10 ** 6, "test")
    for name in linears:
        shapes = [inputs.shape[:2] for inputs in seen[name].values]
        assert shapes == [(1, 2), (1, 3)]
        for inputs, expected in zip(seen[name].values, straight[name]):
            assert relative(inputs[0], expected) < 1e-6
        maxima = torch.stack([inputs.abs().amax((0, 1)) for inputs in straight[name]])
        assert torch.equal(absmax[name], maxima)
    assert [query.shape[:2] for query in queries.values] == [(1, 2), (1, 3)]


@pytest.mark.parametrize("drive", [two_then_three_images, three_then_two_images])
@pytest.mark.parametrize("recipe_name", ["smoothquant", "ptq4dm", "repq-vit"])
def test_a_model_called_with_different_numbers_of_images_is_quantised(recipe_name, drive):
    model = random_model()
    result = quantize_model(model, RECIPES[recipe_name], W4A8, drive)
    assert set(block_linears(model)) <= result.layers.keys()


def test_a_drive_that_never_calls_the_model_is_refused():
    with pytest.raises(ValueError, match="the calibration run never called the model"):
        quantize_model(random_model(), RECIPES["ditas"], W4A8, lambda model: None)


def test_a_drive_that_calls_another_model_is_refused():
    other = random_model(depth=1)
    with pytest.raises(ValueError, match="the calibration run never called the model"):
        quantize_model(
            random_model(), RECIPES["ditas"], W4A8,
            lambda model: noise_drive(1, torch.arange(IMAGES))(other))


class Detour(nn.Module):
    """Runs a linear in all calls but the first ``skipped``, and gives zeros instead."""

    def __init__(self, linear: nn.Linear, skipped: int):
        super().__init__()
        self.linear = linear
        self.skipped = skipped

    def forward(self, x: Tensor) -> Tensor:
        self.skipped -= 1
        if self.skipped >= 0:
            return x.new_zeros(*x.shape[:-1], self.linear.out_features)
        return self.linear(x)


@pytest.mark.parametrize("skipped", [1, 3])
def test_a_site_that_does_not_run_in_every_call_is_named(skipped):
    model = random_model()
    linear = model.blocks[1].mlp.fc1
    model.blocks[1].mlp.fc1 = Detour(linear, skipped)
    drive = noise_drive(3, torch.arange(IMAGES))
    with pytest.raises(ValueError, match=f"blocks.1.mlp.fc1.linear ran in {3 - skipped} of the 3"):
        record(model, [single("blocks.1.mlp.fc1.linear", "fc1", "blocks.1")], drive)


def test_a_choice_of_group_sizes_without_a_search_is_refused_before_the_model_runs():
    def drive(model: nn.Module) -> None:
        raise AssertionError("the model is sampled from")

    with pytest.raises(ValueError, match="several group sizes: give quantize_model a search"):
        quantize_model(random_model(), RECIPES["qdit"], W4A8, drive)
