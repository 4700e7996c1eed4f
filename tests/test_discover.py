"""Blocks, sites and folds that are found without naming a model, against those that are known."""
from dataclasses import replace
from functools import cache

import pytest
import torch
from conftest import random_diffusers_dit, random_model, random_pixart, relative
from torch import Tensor, nn

from architectures.discover import Discovery, discover, find_blocks
from architectures.examples import EXAMPLES, Example, build, draw_call
from architectures.registry import architecture_of
from architectures.sites import Call, Modulation, SharedModulation, Site
from architectures.tracing import random_parameters, tensors_of
from quant.activations.quantisers import Activation
from quant.install import install
from quant.layers.fold import fold_sites
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec
from quant.numerics.tokens import matrix
from quant.weights.low_rank import without_branch
from quant.weights.rounding import quantize_weight

BY_NAME = {example.name: example for example in EXAMPLES}
# Those of the classes that the docs promise; the others are alike, and take another half minute.
QUICK = list(BY_NAME)[:17]
ALL = [pytest.param(name, marks=[] if name in QUICK else [pytest.mark.slow]) for name in BY_NAME]
FAMILIES = {
    "dit": random_model,
    "diffusers-dit": random_diffusers_dit,
    "pixart": random_pixart,
}
# Why linears of a class divide at run time; None: all of them fold.
AT_RUN_TIME = {
    "SD3Transformer2DModel": "gelu",
    "FluxTransformer2DModel": "gelu",
    "MochiTransformer3DModel": None,
    "AuraFlowTransformer2DModel": None,
    "ZImageTransformer2DModel": None,
}


def call_of_family(family: str) -> Call:
    if family == "pixart":
        return draw_call(BY_NAME["PixArtTransformer2DModel"])
    call = draw_call(BY_NAME["DiTTransformer2DModel"])
    if family == "diffusers-dit":
        return call
    return {"x": call["hidden_states"], "t": call["timestep"], "y": call["class_labels"]}


@cache
def found_in(name: str) -> Discovery:
    example = BY_NAME[name]
    return discover(build(example), draw_call(example))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_known_of_a_family_is_found(family):
    model = FAMILIES[family]().eval()
    architecture = architecture_of(model)
    found = discover(model, call_of_family(family))
    assert list(found.blocks) == architecture.blocks(model)
    expected = [(site.linears, site.folds) for site in architecture.sites(model, "blocks")]
    assert [(site.linears, site.folds) for site in found.scope("blocks")] == expected
    assert [attention.name for attention in found.attentions] == [
        attention.name for attention in architecture.attentions(model)]
    for scope in ("adaln", "all"):
        known = {name for site in architecture.sites(model, scope) for name in site.linears}
        assert {name for site in found.scope(scope) for name in site.linears} == known
        for site in found.scope(scope):
            same = [other for other in architecture.sites(model, scope)
                    if site.linears[0] in other.linears]
            assert site.per_image == same[0].per_image


def random_layers(model: nn.Module, sites: list[Site]) -> dict[str, QuantizedLayer]:
    """Make layers with random factors whose activations stay as they are."""
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for site in sites:
        columns = model.get_submodule(site.linears[0]).in_features
        smoothing = Smoothing(torch.exp(torch.randn(columns, generator=generator)))
        if site.follows_norm:
            smoothing = replace(smoothing, shift=torch.randn(columns, generator=generator))
        for name in site.linears:
            weight = smoothing.of_weight(matrix(model.get_submodule(name)))
            quantised = without_branch(quantize_weight(weight, QuantSpec(8, "channel")))
            layers[name] = QuantizedLayer(quantised, Activation(QuantSpec(16, "token")), smoothing)
    return layers


def random_copy(example: Example) -> nn.Module:
    """Make an example whose every parameter is random, those of modulation and output too."""
    model = build(example)
    model.load_state_dict(random_parameters(model, seed=3), strict=False)
    return model


@torch.no_grad()
def output(model: nn.Module, example: Example) -> Tensor:
    return torch.cat([value.flatten() for value in tensors_of(model(**draw_call(example)))])


@pytest.mark.parametrize("name", ALL)
def test_folded_equals_divided_at_run_time(name):
    example, sites = BY_NAME[name], found_in(name).scope("blocks")
    assert any(site.folds for site in sites)
    layers = random_layers(random_copy(example), sites)
    expected = output(install(random_copy(example), layers), example)
    folded = random_copy(example)
    folded = install(folded, fold_sites(folded, layers, sites))
    for site in sites:
        for linear in site.linears:
            assert (folded.get_submodule(linear).smooth is None) == bool(site.folds)
    assert relative(output(folded, example), expected) < 1e-5
    # The factors of a site that folds would be missed.
    assert relative(output(random_copy(example), example), expected) > 1e-4


def test_three_quarters_fold():
    folding, linears = 0, 0
    for name in QUICK:
        for site in found_in(name).scope("blocks"):
            linears += len(site.linears)
            folding += len(site.linears) if site.folds else 0
    assert folding >= 0.75 * linears


@pytest.mark.parametrize("name, reason", AT_RUN_TIME.items())
def test_only_gelu_stops_these(name, reason):
    assert set(found_in(name).reasons.values()) == ({reason} if reason else set())


def test_streams_that_meet_in_attention_share_a_factor():
    sites = {site.name: site for site in found_in("SD3Transformer2DModel").sites}
    block = "transformer_blocks.0"
    joint = sites[f"{block}.attn.to_add_out+to_out.0"]
    assert {place.linear for place in joint.folds} == {
        f"{block}.attn.to_v", f"{block}.attn.add_v_proj"}
    queries = sites[f"{block}.attn.to_q+to_k+to_v"]
    assert queries.folds == (Modulation(f"{block}.norm1.linear", shift=0, scale=1),)


def test_channels_in_pieces_say_which_they_are():
    """One linear reads attention and MLP side by side: each of them divides its own channels."""
    sites = {site.name: site for site in found_in("Flux2Transformer2DModel").sites}
    block = "single_transformer_blocks.0.attn"
    width, hidden = 32, 96
    places = {(place.channel, place.stop - place.start) for place in
              sites[f"{block}.to_out"].folds}
    assert {place.linear for place in sites[f"{block}.to_out"].folds} == {
        f"{block}.to_qkv_mlp_proj"}
    assert places == {(0, width), (width, hidden)}


def test_a_vector_without_a_table_is_divided():
    sites = found_in("Flux2Transformer2DModel").scope("blocks")
    tables = [place.table for site in sites for place in site.folds
              if isinstance(place, SharedModulation)]
    assert tables and not any(tables)


class Modulated(nn.Module):
    """A block with a table, which a vector per image is added to."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8, elementwise_affine=False)
        self.table = nn.Parameter(torch.randn(2, 8))
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, vector: Tensor) -> Tensor:
        shift, scale = (self.table + vector).chunk(2, dim=1)
        return x + self.after(self.before(self.norm(x) * (1 + scale) + shift).tanh())


class Embedded(nn.Module):
    """Gives its blocks the sum of what two linears make; ``is_plain``: nothing else is added."""

    def __init__(self, is_plain: bool):
        super().__init__()
        self.time, self.size = nn.Linear(4, 16), nn.Linear(4, 16)
        self.layers = nn.ModuleList([Modulated(), Modulated()])
        self.is_plain = is_plain

    def forward(self, x: Tensor, time: Tensor, size: Tensor) -> Tensor:
        vector = self.time(time).unflatten(1, (2, 8)) + self.size(size).unflatten(1, (2, 8))
        if not self.is_plain:
            vector = vector + x.mean(1, keepdim=True)
        for layer in self.layers:
            x = layer(x, vector)
        return x


@pytest.mark.parametrize("is_plain", [False, True])
def test_a_sum_of_vectors_is_divided_if_linears_made_all_of_them(is_plain):
    torch.manual_seed(0)
    call = {"x": torch.randn(2, 3, 8), "time": torch.randn(2, 4), "size": torch.randn(2, 4)}
    found = discover(Embedded(is_plain), call)
    sites = {site.name: site for site in found.sites}
    assert sites["time"].role == sites["size"].role == "vector"
    if not is_plain:
        assert found.reasons["layers.0.before"] == "vector enters the block"
        return
    assert sites["layers.1.before"].folds == (
        SharedModulation("layers.1.table", 0, 1, "layers.1", "vector"),)
    layers = random_layers(Embedded(is_plain), found.scope("blocks"))
    divided, folded = (Embedded(is_plain) for _ in range(2))
    folded.load_state_dict(divided.state_dict())
    folded = install(folded, fold_sites(folded, layers, found.scope("blocks")))
    with torch.no_grad():
        expected = install(divided, layers)(**call)
        assert relative(folded(**call), expected) < 1e-5


class Block(nn.Module):
    """Squares what it reads beside folding it: no factor may go into ``before``."""

    def __init__(self, is_shared: bool):
        super().__init__()
        self.before, self.after = nn.Linear(8, 8), nn.Linear(8, 8)
        self.is_shared = is_shared

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.before(x)
        rest = hidden.square() if self.is_shared else x
        return rest + self.after(hidden)


class Stack(nn.Module):
    def __init__(self, blocks: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("is_shared", [False, True])
def test_a_fold_that_others_would_notice_is_refused(is_shared):
    model = Stack([Block(is_shared), Block(is_shared)])
    found = discover(model, {"x": torch.randn(2, 3, 8)})
    folding = {site.name for site in found.sites if site.folds}
    assert folding == (set() if is_shared else {"layers.0.after", "layers.1.after"})
    if is_shared:
        assert found.reasons["layers.0.after"] == "shared with others"


def test_a_model_without_repeated_blocks_is_refused():
    with pytest.raises(ValueError, match="Sequential has no repeated blocks"):
        find_blocks(nn.Sequential(nn.Linear(2, 2), nn.ReLU()))


def test_a_call_that_looks_at_its_numbers_is_refused():
    class Curious(Stack):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if x.sum().item() > 1e9 else super().forward(x / 2)

    with pytest.raises(ValueError, match="cannot be traced"):
        discover(Curious([Block(False), Block(False)]), {"y": torch.randn(2, 3, 8)})
