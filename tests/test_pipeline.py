"""The whole published method against golden values, and folding against not folding."""
from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import (
    LATENT_SHAPE,
    block_linears,
    golden,
    golden_model,
    random_model,
    relative,
    replayed,
    sample,
)
from torch import Tensor, nn

from architectures.registry import architecture_of
from architectures.sites import Site
from config import RECIPES, Recipe
from diffusion import guided_denoiser, make_schedule
from diffusion.generate import guided_drive
from evaluation.metrics import sqnr_db
from quant.activations.quantisers import Activation
from quant.install import install
from quant.layers.fold import fold
from quant.layers.linear import QuantLinear
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec
from quant.numerics.tokens import matrix
from quant.numerics.uniform import Quantized, quantize, signed_codes
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths, act_spec, weight_spec
from quant.weights.low_rank import LowRankWeight
from quant.weights.rounding import quantize_weight

W4A8 = BitWidths(4, 8)
RECIPE = replace(RECIPES["ditas-published"], rank=4)
# Of a code: float32 sums taken in another order move a value by about 1e-5.
TIE = 1e-4

# Answers which way a value on a rounding tie falls.
Flip = Callable[[], bool]


def start(values: dict) -> tuple[Tensor, Callable[[], Tensor], Tensor]:
    """Give noise to start from, noise for the steps, and labels, as they were recorded."""
    draw = replayed(values["noise"][:, :4])
    return torch.tensor(values["z"]), draw, torch.tensor(values["labels"])


@pytest.fixture(scope="module")
def published() -> Result:
    with torch.no_grad():
        drive = guided_drive(make_schedule("50"), *start(golden("diffusion")), 1.5)
        return quantize_model(golden_model(), RECIPE, W4A8, drive, svd="exact")


def latents(model: nn.Module) -> Tensor:
    """Sample from the recorded start."""
    x, draw, labels = start(golden("diffusion"))
    return sample(guided_denoiser(model, labels, 1.5), make_schedule("50"), x, draw)


def test_every_intermediate_matches_golden(published):
    values = golden("ditas")
    assert len(published.layers) == 8
    for name, layer in published.layers.items():
        assert relative(published.absmax[name].amax(0), values[f"{name}/act_absmax"]) < 1e-5
        assert np.allclose(published.losses[name], values[f"{name}/alpha_loss"], rtol=1e-4, atol=0)
        assert published.alphas[name] == float(values[f"{name}/alpha"])
        assert relative(layer.smoothing.factors, values[f"{name}/scale"]) < 1e-5
        low_rank = values[f"{name}/lora_left"] @ values[f"{name}/right"]
        expected = values[f"{name}/quant_weight"] + low_rank
        assert relative(layer.weight.dense(), expected) < 1e-4


class Undecided(nn.Module):
    """A dynamic quantiser that asks ``flip`` about every value within ``TIE`` of a rounding tie."""

    def __init__(self, spec: QuantSpec, flip: Flip):
        super().__init__()
        self.spec = spec
        self.flip = flip

    def forward(self, values: Tensor) -> tuple[Tensor, Tensor]:
        codes, scale, zero = signed_codes(values, self.spec)
        exact = values.double() / scale.double()
        below = exact.floor()
        is_tied = ((exact - below - 0.5).abs() < TIE) & (below < self.spec.top - zero)
        # The zero point is the rounded low end: it must not be undecided, too.
        assert not is_tied[values == values.amin()].any()
        for index in is_tied.nonzero():
            place = tuple(index)
            if self.flip():
                codes[place] = 2 * below[place] + 1 - codes[place]
        return codes, scale


class Answers:
    """Gives the answers that are known, then False; attribute ``given`` lists them."""

    def __init__(self, known: list[bool]):
        self._known = known
        self.given: list[bool] = []

    def __call__(self) -> bool:
        number = len(self.given)
        is_known = number < len(self._known)
        self.given.append(self._known[number] if is_known else False)
        return self.given[-1]


def every_way(run: Callable[[Flip], Tensor]) -> Iterator[Tensor]:
    """Yield ``run(flip)`` for every sequence of answers that ``flip`` can give in it.

    The first sequence is all False.
    """
    pending = [[]]
    while pending:
        known = pending.pop(0)
        flip = Answers(known)
        yield run(flip)
        for number in range(len(known), len(flip.given)):
            pending.append(flip.given[:number] + [True])


def folded(model: nn.Module, layers: dict[str, QuantizedLayer]) -> nn.Module:
    """Fold the layers' factors into the model and install them."""
    return install(model, fold(model, layers))


@pytest.mark.parametrize("state, put", [
    ("unmerged", install),
    ("merged", folded),
])
def test_quantised_model_matches_golden_before_and_after_folding(published, state, put):
    values = golden("ditas")
    inputs = [torch.tensor(golden("dit")[key]) for key in "xty"]
    model = put(golden_model(), published.layers)
    assert sqnr_db(torch.tensor(values[f"latents_{state}"]), latents(model)) > 90

    def run(flip):
        for module in model.modules():
            if isinstance(module, QuantLinear):
                module.act = Undecided(module.act.spec, flip)
        return model(*inputs)

    # Up to five values lie within rounding error of a tie. How the recording processor rounded
    # them is unknown: one of the 8 to 20 ways must give its output (and does to 5e-7).
    assert any(relative(output, values[f"forward_{state}"]) < 1e-5 for output in every_way(run))


def test_the_float_models_latents_match_golden():
    expected = torch.tensor(golden("ditas")["latents_float"])
    assert sqnr_db(expected, latents(golden_model())) > 90


def golden_layers(weight_of: Callable[[dict, str], np.ndarray]) -> dict[str, QuantizedLayer]:
    """Make layers with recorded factors whose effective weight is a recorded tensor.

    Their quantised weights are zeros: the tensor rides in the low-rank branch.
    """
    values = golden("ditas")
    layers = {}
    for name, linear in block_linears(golden_model()).items():
        zeros = quantize(torch.zeros_like(linear.weight), QuantSpec(4, "channel"))
        right = torch.tensor(weight_of(values, name))
        weight = LowRankWeight(zeros, torch.eye(len(right)), right)
        smoothing = Smoothing(torch.tensor(values[f"{name}/scale"]))
        layers[name] = QuantizedLayer(weight, None, smoothing)
    return layers


def recorded_quantised(values: dict, name: str) -> np.ndarray:
    return values[f"{name}/quant_weight"]


def recorded_low_rank(values: dict, name: str) -> np.ndarray:
    return values[f"{name}/lora_left"] @ values[f"{name}/right"]


def effective_weight(layer: QuantizedLayer) -> Tensor:
    """Compute what the layer multiplies its input by, (O, I)."""
    codes, step, left, right = layer.factored()
    return codes * step[:, None] + left @ right


def test_folding_the_golden_tensors_gives_the_golden_merged_ones():
    values = golden("ditas")
    model = golden_model()
    quantised = fold(model, golden_layers(recorded_quantised))
    low_rank = fold(golden_model(), golden_layers(recorded_low_rank))
    merged = [key for key in values if key.startswith("merged/")]
    assert len(merged) == 12
    for key in merged:
        name = key.removeprefix("merged/")
        expected = values[key]
        if name.endswith("quant.weight"):
            weight = effective_weight(quantised[name.removesuffix(".quant.weight")])
        elif name.endswith("left.weight"):
            layer = name.removesuffix(".left.weight")
            weight = effective_weight(low_rank[layer])
            expected = expected @ values[f"{layer}/right"]
        else:
            weight = model.state_dict()[name]
        assert relative(weight, expected) < 1e-5, name



def random_smoothing(site: Site, recipe: Recipe, columns: int, generator) -> Smoothing:
    """Draw factors and shifts for a site where the recipe has them."""
    if recipe.balance == "none" or not site.is_balanced:
        return Smoothing(None, None)
    factors = torch.exp(torch.randn(columns, generator=generator))
    if recipe.balance == "reparameterise" and site.follows_norm:
        return Smoothing(factors, torch.randn(columns, generator=generator))
    return Smoothing(factors, None)


def any_activation(site: Site, recipe: Recipe, bits: int) -> Activation:
    """Make an activation quantiser of the recipe's kind, with any range where it is static."""
    act = Activation(act_spec(recipe, bits, site.per_image))
    if recipe.act_range != "static":
        return act
    if recipe.act_steps == "each":
        return replace(
            act,
            scale=torch.tensor([0.03, 0.05]),
            zero=torch.tensor([120.0, 9.0]),
            timesteps=torch.tensor([900, 10]))
    return replace(act, scale=torch.tensor(0.05), zero=torch.tensor(120.0))


def random_layers(
    model: nn.Module, recipe: Recipe, bits: int, act_bits: int
) -> dict[str, QuantizedLayer]:
    """Draw factors, shifts and branches, with static ranges, where the recipe has them."""
    generator = torch.Generator().manual_seed(0)
    layers = {}
    for site in architecture_of(model).sites(model, recipe.scope):
        weight = matrix(model.get_submodule(site.name))
        rows, columns = weight.shape
        smoothing = random_smoothing(site, recipe, columns, generator)
        quantised = quantize_weight(smoothing.of_weight(weight), weight_spec(recipe, bits))
        left = torch.randn(rows, 3, generator=generator)
        right = torch.randn(3, columns, generator=generator)
        is_corrected = recipe.bias_correction == "float" and smoothing.shift is not None
        layers[site.name] = QuantizedLayer(
            LowRankWeight(quantised, 0.01 * left, 0.01 * right),
            any_activation(site, recipe, act_bits),
            smoothing,
            offset=weight @ smoothing.shift if is_corrected else None)
    return layers


# With rounding, a code may flip on a float32 tie.
@pytest.mark.parametrize("act_bits, bound", [(16, 1e-4), (8, 2e-2)])
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_folding_changes_no_output(name, act_bits, bound):
    recipe = RECIPES[name]
    inputs = torch.randn(3, *LATENT_SHAPE), torch.tensor([5, 400, 900]), torch.tensor([0, 3, 10])
    layers = random_layers(random_model(), recipe, 4, act_bits)
    before = install(random_model(), layers)(*inputs)
    model = folded(random_model(), layers)
    assert relative(model(*inputs), before) < bound
    for block in model.blocks:
        assert block.attn.qkv.smooth is None
        assert block.attn.qkv.shift is None
        assert block.attn.proj.smooth is None
        assert block.mlp.fc1.smooth is None
        assert block.mlp.fc1.shift is None
        assert (block.mlp.fc2.smooth is None) == (recipe.balance == "none")


def weight_by_hand(quantised: Quantized) -> np.ndarray:
    """Compute ``(code - zero) scale step`` in float64, group by group, (24, 64)."""
    scale = quantised.scale.reshape(24, -1, 1).double()
    if quantised.step is not None:
        scale = scale * quantised.step[:, :, None].double()
    codes = quantised.codes.reshape(24, scale.shape[1], -1).double()
    zero = quantised.zero.reshape(24, -1, 1)
    return ((codes - zero) * scale).reshape(24, 64).numpy()


def token_by_hand(token: np.ndarray) -> np.ndarray:
    """Quantise a token at 8 bits in its own range, and go back to values."""
    low = min(token.min(), 0)
    high = max(token.max(), 0)
    scale = (high - low) / 255
    zero = round(-low / scale)
    codes = np.clip(np.round(token / scale) + zero, 0, 255)
    return (codes - zero) * scale


@pytest.mark.parametrize("spec", [
    QuantSpec(4, "group", 32),
    QuantSpec(4, "group", 32, "two-level"),
    QuantSpec(4, "channel"),
])
def test_the_quantised_layer_is_the_papers_equation(spec):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 64), torch.randn(2, 5, 64)
    bias, factors = torch.randn(24), torch.rand(64) + 0.5
    quantised = quantize_weight(weight * factors, spec)
    left, right = torch.randn(24, 2), torch.randn(2, 64)
    layer = QuantizedLayer(
        LowRankWeight(quantised, left, right),
        Activation(QuantSpec(8, "token")),
        Smoothing(factors))
    output = QuantLinear(layer, bias)(x)

    weight = weight_by_hand(quantised)
    rows = []
    for token in (x / factors).reshape(-1, 64).double().numpy():
        seen = token_by_hand(token)
        low_rank = left.double().numpy() @ (right.double().numpy() @ seen)
        rows.append(weight @ seen + low_rank + bias.double().numpy())
    assert relative(output.reshape(-1, 24), np.stack(rows)) < 1e-5
