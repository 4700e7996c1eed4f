"""What the timestep decides in any model, run without its tokens."""
from functools import cache

import pytest
import torch
from test_ditas import BY_NAME, Stack, architecture, output, random_example, run_on
from test_units import FAMILIES, a_call, outputs_in_a_forward
from torch import Tensor, nn

import ditas
from architectures.examples import draw_call
from architectures.explored import ExploredArchitecture, explore
from architectures.registry import architecture_of, describe
from architectures.sites import Call, per_image_linears
from architectures.temporal import find_temporal, without_tokens
from evaluation.metrics import sqnr_db
from quant.calibration.arguments import batched_arguments, clock_of

# Modulations before the blocks, in them, and of lists of images.
NAMES = ("SD3Transformer2DModel", "FluxTransformer2DModel", "SanaTransformer2DModel",
         "Lumina2Transformer2DModel", "QwenImageTransformer2DModel", "WanTransformer3DModel",
         "ZImageTransformer2DModel")


@cache
def explored_family(family: str) -> ExploredArchitecture:
    """Find out about a model that is known by hand."""
    model, call = FAMILIES[family](), a_call(family)
    found = explore(model, call, batched_arguments(model, call), clock_of([call]))
    return found.with_temporal(model, call)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_found_is_what_is_known_by_hand(family):
    found, model, call = explored_family(family), FAMILIES[family](), a_call(family)
    known = architecture_of(model)
    assert set(found.temporal(model)) == set(known.temporal(model))
    outputs, expected = found.run_temporal(model, call), known.run_temporal(model, call)
    if family == "pixart":
        # The embedding runs before the modulation that reads it.
        expected = expected[::-1]
    assert len(outputs) == len(expected)
    assert all(map(torch.equal, outputs, expected))


@pytest.mark.parametrize("name", NAMES)
def test_it_computes_what_a_whole_call_does(name):
    model, call = random_example(BY_NAME[name]), draw_call(BY_NAME[name])
    found = architecture(name).with_temporal(model, call)
    names = found.timestep.outputs
    assert set(found.temporal(model)) == set(per_image_linears(found.sites(model, "all")))
    expected = outputs_in_a_forward(model, list(names), call)
    outputs = found.run_temporal(model, call)
    assert all(map(torch.equal, outputs, expected))
    # Tokens are not looked at.
    louder = {key: value + 1 if is_tokens(value) else value for key, value in call.items()}
    assert all(map(torch.equal, found.run_temporal(model, louder), expected))


def is_tokens(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 2


def test_all_its_linears_are_learned():
    """Gradients of the outputs reach the embedder, too, and nothing else."""
    name = "FluxTransformer2DModel"
    model, call = random_example(BY_NAME[name]), draw_call(BY_NAME[name])
    found = architecture(name).with_temporal(model, call)
    model.requires_grad_(True)
    with torch.enable_grad():
        outputs = found.run_temporal(model, call)
        sum(value.sum() for value in outputs).backward()
    reached = {path.removesuffix(".weight") for path, value in model.named_parameters()
               if value.grad is not None and path.endswith("weight")}
    assert reached == set(found.temporal(model))


@pytest.mark.parametrize("name", [
    "PixArtTransformer2DModel", "SanaTransformer2DModel",
    pytest.param("SD3Transformer2DModel", marks=pytest.mark.slow),
    pytest.param("FluxTransformer2DModel", marks=pytest.mark.slow),
    pytest.param("QwenImageTransformer2DModel", marks=pytest.mark.slow),
    pytest.param("Lumina2Transformer2DModel", marks=pytest.mark.slow)])
def test_tfmq_runs_on_any_model_that_has_it(name):
    example = BY_NAME[name]
    model = random_example(example)
    describe(model, architecture(name).with_temporal(model, draw_call(example)))
    expected = output(model, name)
    ditas.quantize(model, run_on(model, example), "tfmq-dm", weight_bit=8, iterations=2)
    assert sqnr_db(expected, output(model, name)) > 20
    inner = per_image_linears(architecture(name).sites(model, "inner"))
    assert len(inner) >= 2
    assert all(not isinstance(model.get_submodule(linear), nn.Linear) for linear in inner)


class Timed(nn.Module):
    """A stack whose blocks are modulated by what ``embed`` makes of timestep and tokens."""

    def __init__(self, is_curious: bool):
        super().__init__()
        self.embed = nn.Linear(16, 16)
        self.stack = Stack()
        self.is_curious = is_curious

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        vector = t[:, None].expand(-1, 16) / 1000
        vector = vector + x.mean(1) if self.is_curious else vector
        return self.stack(list(x), {"offset": 0}, 1 + self.embed(vector)[:, None, :1])


def timed_call() -> Call:
    torch.manual_seed(0)
    return {"x": torch.randn(2, 5, 16), "t": torch.tensor([900, 10])}


def test_a_vector_that_tokens_decide_is_none():
    for is_curious, linears in ((False, ("embed",)), (True, ())):
        found = find_temporal(Timed(is_curious), timed_call(), ["embed"])
        assert found.linears == found.outputs == linears


@pytest.mark.parametrize("is_curious", [False, True])
def test_a_model_without_it_is_refused(is_curious):
    model, call = Timed(is_curious), timed_call()
    later = {**call, "t": call["t"] // 2}

    def quantise():
        ditas.quantize(model, lambda: [model(**call), model(**later)], "tfmq-dm", iterations=1)

    if not is_curious:
        quantise()
        return
    with pytest.raises(ditas.UserError, match="what the timestep decides in a Timed cannot be run"):
        quantise()


def test_only_tokens_are_taken_out_of_a_call():
    call = {"tokens": torch.randn(2, 3, 4), "text": [torch.randn(3, 4)], "t": torch.ones(2),
            "pooled": torch.ones(2, 4), "more": {"mask": torch.ones(2, 3, 3, dtype=torch.bool)}}
    hidden = without_tokens(call)
    assert hidden["tokens"].shape == (2, 3, 4) and hidden["text"][0].shape == (3, 4)
    for value in (hidden["tokens"], hidden["text"][0]):
        with pytest.raises(RuntimeError):
            value.sum().item()
    assert hidden["t"] is call["t"] and hidden["pooled"] is call["pooled"]
    assert hidden["more"]["mask"] is call["more"]["mask"]
