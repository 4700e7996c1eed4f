"""``ditas.quantize``: any module with repeated blocks, in place, or not at all."""
from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import relative
from torch import Tensor, nn

import ditas
from architectures.examples import IMAGE_EXAMPLES, VIDEO_EXAMPLES, Example, build, draw_call
from architectures.explored import ExploredArchitecture, explore
from architectures.registry import describe
from architectures.sites import Call
from architectures.tracing import random_parameters, tensors_of
from ditas import placing
from ditas.request import read_request
from evaluation.metrics import sqnr_db
from quant.calibration.arguments import batched_arguments, clock_of
from quant.install import install
from quant.layers.fold import fold
from quant.pipeline import quantize_model

# The classes that the docs promise; DiT and PixArt are known by hand.
BY_NAME = {example.name: example for example in (*IMAGE_EXAMPLES[:12], *VIDEO_EXAMPLES[:5])}
FLUX = "FluxTransformer2DModel"
# One group a row, whatever its length.
WHOLE_ROWS = 1024


def random_example(example: Example, **changes) -> nn.Module:
    """Make an example whose every parameter is random, those of modulation and output too."""
    model = build(example, **changes)
    model.load_state_dict(random_parameters(model, seed=3), strict=False)
    return model


@cache
def architecture(name: str) -> ExploredArchitecture:
    example = BY_NAME[name]
    model, call = random_example(example), draw_call(example)
    return explore(model, call, batched_arguments(model, call), clock_of(calls_of(example)))


def explored_example(name: str) -> nn.Module:
    """Make an example that was looked into before."""
    model = random_example(BY_NAME[name])
    describe(model, architecture(name))
    return model


def calls_of(example: Example) -> list[Call]:
    """Draw two calls of different latents."""
    call = draw_call(example)
    latents = next(iter(call))
    torch.manual_seed(4)
    if isinstance(call[latents], list):
        return [call, {**call, latents: [torch.randn_like(each) for each in call[latents]]}]
    return [call, {**call, latents: torch.randn_like(call[latents])}]


@torch.no_grad()
def output(model: nn.Module, name: str) -> Tensor:
    values = tensors_of(model(**draw_call(BY_NAME[name])))
    return torch.cat([value.flatten().float() for value in values])


def run_on(model: nn.Module, example: Example):
    """Make a drive of an example's calls."""
    def drive():
        for call in calls_of(example):
            model(**call)

    return drive


@pytest.mark.parametrize("name", BY_NAME)
def test_linears_of_any_transformer_are_quantised(name):
    model = explored_example(name)
    expected = output(model, name)
    done = ditas.quantize(model, run_on(model, BY_NAME[name]), "rtn", weight_bit=8, backend="fake")
    assert sqnr_db(expected, output(model, name)) > 30
    linears = [linear for site in done.sites for linear in site.site.linears]
    assert len(set(linears)) == len(linears) >= 8
    for linear in linears:
        assert not isinstance(model.get_submodule(linear), nn.Linear)


@pytest.mark.parametrize("recipe, flags", [("rtn", {}), ("ditas", {"group_size": WHOLE_ROWS})])
@pytest.mark.parametrize("name", BY_NAME)
def test_any_transformer_folds_computes_and_comes_back(name, recipe, flags, tmp_path):
    request = read_request(recipe, {**flags, "weight_bit": 8, "backend": "fake"})
    request = replace(request, recipe=replace(request.recipe, rounds=2))
    model = explored_example(name)
    result = quantize_model(
        model, request.recipe, request.bits, lambda _: run_on(model, BY_NAME[name])())

    def installed(backend: str, is_folded: bool = False) -> Tensor:
        copy = explored_example(name)
        layers = fold(copy, result.layers) if is_folded else result.layers
        return output(install(copy, layers, backend), name)

    simulated = installed("fake")
    kept = sqnr_db(output(model, name), simulated)
    assert kept > 30
    arithmetics = installed("reference"), installed("fake", is_folded=True)
    placing.put_in(model, request, result)
    given = output(model, name)
    # Codes flip where values lie on the middle between two, and others after them. Were all to
    # flip, the error would be that of two roundings that know nothing of each other.
    for other in (*arithmetics, given):
        assert sqnr_db(simulated, other) > kept - 6
    model.save_pretrained(tmp_path)
    assert torch.equal(output(type(model).from_pretrained(tmp_path), name), given)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.before, self.after = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor, scale: Tensor | None) -> Tensor:
        hidden = self.before(self.norm(x))
        return x + self.after(hidden if scale is None else hidden * scale)


class Stack(nn.Module):
    """Nobody's model: it is called with lists, dicts and None."""

    def __init__(self, depth: int = 3):
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(depth))

    def forward(self, images: list[Tensor], extra: dict, scale: Tensor | None = None) -> Tensor:
        x = torch.stack(images) + extra["offset"]
        for layer in self.layers:
            x = layer(x, scale)
        return x


def stack_and_drive(is_guided: bool = True) -> tuple[Stack, list[Call], object]:
    torch.manual_seed(0)
    model = Stack()
    calls = []
    for step in range(3):
        images = [torch.randn(5, 16), torch.randn(5, 16)]
        calls.append({"images": images, "extra": {"offset": torch.randn(2, 5, 16)}})
        if is_guided:
            # Another call in the same step, with other arguments.
            calls.append({**calls[-1], "scale": None if step else torch.tensor(0.5)})
    return model, calls, lambda: [model(**call) for call in calls]


@pytest.mark.parametrize("recipe", [
    "rtn", "smoothquant", "ditas", "ditas-plus", "qdit", "ptq4dm", "g4w-p4a", "ditas-published"])
def test_recipes_run_on_nobodys_model(recipe):
    # Q-DiT draws images from all calls, which then have to be alike.
    model, calls, drive = stack_and_drive(is_guided=recipe != "qdit")
    flags = {"qdit": {"population": 4, "generations": 1, "group_sizes": (8, 16)},
             "ditas": {"group_size": 16}, "ditas-plus": {"group_size": 16},
             "ditas-published": {"group_size": 8}}
    expected = model(**calls[0])
    done = ditas.quantize(model, drive, recipe, weight_bit=8, act_bit=8, **flags.get(recipe, {}))
    assert sqnr_db(expected, model(**calls[0])) > 25
    assert {row.site.pattern for row in done.sites} == {"layers.*.before", "layers.*.after"}
    # The second linear reads what the first one makes, times a number.
    places = {row.factors for row in done.sites}
    balanced = recipe in ("smoothquant", "ditas", "ditas-plus", "ditas-published")
    assert places == ({"norm.weight, norm.bias", "before"} if balanced else {""})


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_a_module_keeps_its_type(kind):
    example = BY_NAME["SD3Transformer2DModel"]
    model = explored_example(example.name).to(kind)
    calls = [{name: value.to(kind) if value.is_floating_point() else value
              for name, value in call.items() if isinstance(value, Tensor)}
             for call in calls_of(example)]
    with torch.no_grad():
        expected = model(**calls[0]).sample
        ditas.quantize(model, lambda: [model(**call) for call in calls], "ditas",
                       weight_bit=8, group_size=WHOLE_ROWS, backend="fake")
        given = model(**calls[0]).sample
    assert given.dtype == kind
    assert {parameter.dtype for parameter in model.parameters()} == {kind}
    assert relative(given, expected) < 0.05


def test_a_quantised_module_goes_to_bfloat16_but_for_its_steps():
    model, _, drive = stack_and_drive()
    ditas.quantize(model, drive, "ditas", group_size=16, backend="fake")
    linear, plain = (part.layers[0].before for part in (deepcopy(model), model))
    linear.bfloat16()
    x = torch.randn(2, 5, 16)
    given, expected = linear(x.bfloat16()), plain(x)
    assert given.dtype == linear.computing.weight.dtype == torch.bfloat16
    assert torch.equal(linear.computing.step, plain.computing.step)
    assert relative(given, expected) < 0.02


def test_the_outcome_is_readable():
    model, _, drive = stack_and_drive()
    done = ditas.quantize(model, drive, "ditas", group_size=16, weight_bit=4)
    text = str(done)
    assert "ditas:group-size=16: 6 linears in 6 sites" in text
    assert "| layers.*.before | 3 | W4A8 | norm.weight, norm.bias |" in text
    before, after = (sum(values) for values in zip(*((row.before, row.after)
                                                     for row in done.sites)))
    assert before == 6 * 16 * 32 * 4
    assert after < before / 3
    assert all(0 <= row.alpha <= 1 for row in done.sites)


@pytest.mark.parametrize("recipe", ["rtn", "smoothquant"])
def test_linears_can_be_chosen(recipe):
    name = "SD3Transformer2DModel"
    model = explored_example(name)
    expected = output(model, name)
    done = ditas.quantize(
        model, run_on(model, BY_NAME[name]), recipe, weight_bit=8, backend="fake",
        include=r"^context_embedder$", exclude=r"blocks\.0\.attn\.to_q|ff_context")
    linears = {linear for row in done.sites for linear in row.site.linears}
    assert "context_embedder" in linears
    assert "transformer_blocks.1.attn.to_k" in linears
    # It reads what the query reads.
    assert "transformer_blocks.0.attn.to_k" not in linears
    assert not any("ff_context" in linear for linear in linears)
    assert isinstance(model.transformer_blocks[0].ff_context.net[2], nn.Linear)
    assert sqnr_db(expected, output(model, name)) > 30


def test_rtn_needs_no_calls():
    model = explored_example("WanTransformer3DModel")
    del model.ditas_architecture
    expected = output(model, "WanTransformer3DModel")
    done = ditas.quantize(model, recipe="rtn", weight_bit=8, backend="fake")
    assert sqnr_db(expected, output(model, "WanTransformer3DModel")) > 30
    assert len(done.sites) == len(architecture("WanTransformer3DModel").discovery.scope("blocks"))


@pytest.mark.parametrize("flags, message", [
    ({"wieght_bit": 4}, "'wieght_bit' is no flag of a recipe: did you mean weight_bit?"),
    ({"weight_bit": 9}, "weight_bit 9 is not available: expected one of 2, 3"),
    ({"act_bit": "all"}, "act_bit all is not available"),
    ({"recipe": "ditto"}, "recipe ditto is not available: expected one of rtn"),
    ({"lowrank": "many"}, "lowrank 'many' is not a whole number"),
    ({"iterations": 5}, "iterations has no effect on this recipe: it is for weight='adaround'"),
    ({"act_clip": "search"}, "act_clip has no effect on this recipe: it is for act_range='static'"),
    ({"act_range": "static"}, "these parts do not go together: static ranges are one per layer: "
                              "give act_granularity='tensor', or act_range='dynamic'"),
    ({"act_bit": 16, "backend": "integer"},
     "backend='integer' cannot run this checkpoint: its activations are not quantised: quantise "
     "with act_bit 4 to 8, or backend='fake'"),
    ({"weight": "gptq", "weight_scales": "two-level"}, "these parts do not go together"),
    ({"backend": "gpu"}, "backend gpu is not available"),
    ({"exclude": "("}, "exclude '(' is no regular expression"),
    ({"exclude": "."}, "no linear of this Stack is left to be quantised"),
    ({"recipe": "ditas", "group_size": 7}, "group size 7 does not divide a row of 16 values"),
])
def test_flags_are_checked_as_on_the_command_line(flags, message):
    model, _, drive = stack_and_drive()
    with pytest.raises(ditas.UserError) as error:
        ditas.quantize(model, drive, **{"recipe": "rtn", **flags})
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def without_blocks() -> tuple[nn.Module, object]:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    return model, lambda: model(torch.randn(2, 4))


class Rows(Stack):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward([x], {"offset": 0})[0]


def of_vectors() -> tuple[nn.Module, object]:
    model = Rows()
    return model, lambda: model(torch.randn(2, 16))


@pytest.mark.parametrize("make, recipe, message", [
    (without_blocks, "rtn", "Sequential has no repeated blocks"),
    (of_vectors, "rtn", "no linear of a block of Rows reads tokens"),
    (lambda: (Stack(), lambda: None), "rtn", r"drive\(\) never called the Stack"),
    (lambda: (Stack(), None), "ditas", "recipe ditas looks at the calls of the model: give drive"),
    (lambda: (Stack(), None), "qdit", "recipe qdit looks at the calls of the model: give drive"),
    (lambda: (Stack().half(), None), "rtn", "the module's parameters are of type float16"),
    (lambda: (nn.ReLU(), None), "rtn", "a ReLU without parameters"),
])
def test_what_a_model_does_not_allow_is_refused(make, recipe, message):
    model, drive = make()
    with pytest.raises(ditas.UserError, match=message):
        ditas.quantize(model, drive, recipe)


@pytest.mark.parametrize("name, recipe, least_sqnr_db", [
    (FLUX, "ptq4dit", 25),
    (FLUX, "repq-vit", 25),
    # Its code asks the linears of its embedder for the type of their parameters.
    ("WanTransformer3DModel", "ptq4dit", 20),
])
def test_units_and_attentions_of_any_model_are_found(name, recipe, least_sqnr_db):
    model = explored_example(name)
    expected = output(model, name)
    flags = {"iterations": 2} if recipe == "ptq4dit" else {}
    ditas.quantize(model, run_on(model, BY_NAME[name]), recipe, weight_bit=8, **flags)
    assert sqnr_db(expected, output(model, name)) > least_sqnr_db
    attentions = architecture(name).attentions(model)
    assert attentions
    assert all(hasattr(model.get_submodule(site.name), "operands") for site in attentions)


@pytest.mark.parametrize("name, recipe, message", [
    # Frames stand beside images.
    ("LatteTransformer3DModel", "ptq4dit", "does not give an output for every image"),
])
def test_recipes_that_a_model_does_not_allow_are_refused(name, recipe, message):
    model = explored_example(name)
    with pytest.raises(ditas.UserError, match=message):
        ditas.quantize(model, run_on(model, BY_NAME[name]), recipe, iterations=1)


def test_recipes_that_run_copies_want_float32():
    model = explored_example(FLUX).bfloat16()
    with pytest.raises(ditas.UserError, match=r"is of bfloat16: convert it with \.float\(\) first"):
        ditas.quantize(model, lambda: None, "ptq4dit")


def test_calls_that_differ_are_refused_where_images_are_drawn_from_all():
    model, _, drive = stack_and_drive()
    with pytest.raises(ditas.UserError, match="calls that differ in their images only"):
        ditas.quantize(model, drive, "qdit", group_sizes="none", group_size=16)


def test_a_module_is_quantised_once():
    model, _, drive = stack_and_drive()
    ditas.quantize(model, drive, "rtn")
    with pytest.raises(ditas.UserError, match="this Stack is quantised already"):
        ditas.quantize(model, drive, "rtn")


def test_nan_is_refused_with_its_place():
    model, _, drive = stack_and_drive()
    with torch.no_grad():
        model.layers[1].before.weight[0, 0] = float("nan")
    with pytest.raises(ditas.UserError, match="the input of layers.1.after is not finite"):
        ditas.quantize(model, drive, "smoothquant")


def test_a_call_that_cannot_be_traced_is_divided_at_run_time():
    class Curious(Stack):
        def forward(self, images: list[Tensor]) -> Tensor:
            factor = 2 if images[0].sum().item() > 0 else 1
            return super().forward([image / factor for image in images], {"offset": 0})

    torch.manual_seed(0)
    model, images = Curious(), [torch.randn(5, 16), torch.randn(5, 16)]
    expected = model(images)
    done = ditas.quantize(model, lambda: model(images), "smoothquant", weight_bit=8)
    assert sqnr_db(expected, model(images)) > 25
    assert {row.factors for row in done.sites} == {"at run time (not traced)"}
