"""The seam: DiT as data, and diffusers' DiT and PixArt quantised through the same code."""
from dataclasses import asdict, replace

import pytest
import torch
from conftest import (
    LATENT_SHAPE,
    TEXT_TOKENS,
    TEXT_WIDTH,
    checkpoint_header,
    random_diffusers_dit,
    random_model,
    random_pixart,
    relative,
    scope_linears,
)
from torch import Tensor, nn

from architectures.dit import convert_diffusers
from architectures.registry import architecture_named, architecture_of, empty_model
from architectures.sites import Modulation, Rows, SharedModulation
from config import RECIPES, Recipe
from evaluation.metrics import sqnr_db
from quant import checkpoint
from quant.activations.quantisers import Activation
from quant.calibration.trajectory import Drive
from quant.install import install
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.spec import QuantSpec
from quant.numerics.tokens import matrix
from quant.pipeline import Result, quantize_model
from quant.recipe import BitWidths
from quant.weights.low_rank import without_branch
from quant.weights.rounding import quantize_weight

TIMESTEPS, IMAGES = (900, 400, 20), 2
FAMILIES = ("diffusers-dit", "pixart")
W4A8 = BitWidths(4, 8)


def make(family: str) -> nn.Module:
    """Make a small random transformer of a family."""
    makers = {
        "dit": random_model,
        "diffusers-dit": random_diffusers_dit,
        "pixart": random_pixart,
    }
    return makers[family]()


def text_condition(images: int) -> dict:
    """Draw the text of some images; that of the first one is shorter."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.ones(images, TEXT_TOKENS)
    mask[0, 3:] = 0
    return {
        "encoder_hidden_states": torch.randn(
            images, TEXT_TOKENS, TEXT_WIDTH, generator=generator),
        "encoder_attention_mask": mask,
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def arguments(family: str, images: int, timestep: int) -> dict:
    """Draw the arguments of a call: latents drawn anew, and the condition, equal in every call."""
    call = {
        "hidden_states": torch.randn(images, *LATENT_SHAPE),
        "timestep": torch.full((images,), timestep),
    }
    if family == "diffusers-dit":
        return {**call, "class_labels": torch.arange(images)}
    return {**call, **text_condition(images)}


def drive_of(family: str) -> Drive:
    """Make a drive of three calls, on random latents."""
    def drive(model):
        torch.manual_seed(3)
        for timestep in TIMESTEPS:
            model(**arguments(family, IMAGES, timestep))

    return drive


def output(model: nn.Module, family: str) -> Tensor:
    """Compute the model's output for three images that no drive shows."""
    torch.manual_seed(5)
    return model(**arguments(family, 3, 321)).sample


def quantise(model: nn.Module, family: str, recipe: Recipe, bits: BitWidths = W4A8) -> Result:
    """Quantise a model, and check that it is left as it was."""
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = quantize_model(model, recipe, bits, drive_of(family))
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    return result


def save(path, model: nn.Module, result: Result, recipe_name: str, recipe: Recipe) -> None:
    """Write a checkpoint of a model that has no name on the command line."""
    header = checkpoint_header(
        recipe_name, recipe, model=type(model).__name__, image_size=None, num_classes=None,
        num_sampling_steps=str(len(TIMESTEPS)), alphas=result.alphas)
    checkpoint.save(path, model, result, header)


def linears_inside_blocks(model: nn.Module) -> set[str]:
    """Name every linear of the blocks but the modulation."""
    names = set()
    for name, module in model.named_modules():
        is_inside = name.startswith("transformer_blocks.") and ".norm1." not in name
        if is_inside and isinstance(module, nn.Linear):
            names.add(name)
    return names


def in_halves(model: nn.Module) -> nn.Module:
    """Round a model's tensors as a checkpoint does."""
    model.load_state_dict({key: value.half() for key, value in model.state_dict().items()})
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe_name, least_sqnr_db", [
    ("rtn", 12),
    ("ditas", 12),
    ("ditas-plus", 15),
])
def test_other_transformers_are_quantised_saved_and_reloaded(
    family, recipe_name, least_sqnr_db, tmp_path
):
    recipe = RECIPES[recipe_name]
    recipe = replace(recipe, rounds=2, weight_group=recipe.weight_group // 2)
    model = make(family)
    result = quantise(model, family, recipe)

    # Every linear of the blocks, and no other but the modulation, which recipes quantise at 8 bits.
    inside = linears_inside_blocks(model)
    assert inside == set(scope_linears(model, "blocks"))
    assert inside <= set(result.layers)
    assert (len(result.layers) > len(inside)) == (recipe.adaln_bits < 16)

    path = tmp_path / "model.safetensors"
    save(path, model, result, recipe_name, recipe)
    header, reloaded = checkpoint.load(path)
    assert header.architecture == family
    assert type(reloaded) is type(model)
    expected = output(install(in_halves(make(family)), result.layers), family)
    assert torch.equal(output(reloaded, family), expected)
    assert sqnr_db(output(model, family), expected) > least_sqnr_db


def without_rounding(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Make layers with random factors whose activations stay as they are."""
    generator = torch.Generator().manual_seed(2)
    layers = {}
    for site in architecture_of(model).sites(model, "blocks"):
        columns = model.get_submodule(site.linears[0]).in_features
        smoothing = Smoothing(torch.exp(torch.randn(columns, generator=generator)))
        if site.follows_norm:
            shift = torch.randn(columns, generator=generator)
            smoothing = replace(smoothing, shift=shift)
        for name in site.linears:
            weight = smoothing.of_weight(matrix(model.get_submodule(name)))
            quantised = without_branch(quantize_weight(weight, QuantSpec(8, "channel")))
            layers[name] = QuantizedLayer(quantised, Activation(QuantSpec(16, "token")), smoothing)
    return layers


@pytest.mark.parametrize("family", FAMILIES)
def test_folded_equals_unfolded(family):
    layers = without_rounding(make(family))
    expected = output(install(make(family), layers), family)
    folded = make(family)
    folded = install(folded, fold(folded, layers))
    assert relative(output(folded, family), expected) < 1e-5
    for site in architecture_of(folded).sites(folded, "blocks"):
        for name in site.linears:
            divides = folded.get_submodule(name).smooth is not None
            assert divides != bool(site.folds)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe_name", ["ptq4dit", "repq-vit", "tfmq-dm", "smoothquant", "qdit"])
def test_other_recipes_run_on_other_transformers(family, recipe_name):
    recipe = replace(RECIPES[recipe_name], iterations=2, group_sizes=(), weight_group=16)
    if recipe_name == "qdit":
        # The text's width is not one of whole groups.
        recipe = replace(recipe, group_tail="allow")
    model = make(family)
    result = quantise(model, family, recipe, BitWidths(8, 8))
    quantised = install(make(family), result.layers, operands=result.operands)
    assert sqnr_db(output(model, family), output(quantised, family)) > 15
    if recipe.attention != "none":
        expected = {site.name for site in architecture_of(model).attentions(model)}
        assert result.operands.keys() == expected


def test_ditas_folds_on_a_real_checkpoint(tmp_path):
    model = make("pixart")
    recipe = replace(RECIPES["ditas"], rounds=2, weight_group=32)
    result = quantise(model, "pixart", recipe)
    path = tmp_path / "model.safetensors"
    save(path, model, result, "ditas", recipe)
    _, plain = checkpoint.load(path)
    _, folded = checkpoint.load(path, folded=True)
    # A code may flip where a value lies on the middle between two.
    assert sqnr_db(output(plain, "pixart"), output(folded, "pixart")) > 40


def twins() -> tuple[nn.Module, nn.Module]:
    """Make our DiT and diffusers' with the same weights; there q, k and v are apart."""
    ours, theirs = random_model(), make("diffusers-dit")
    state = theirs.state_dict()
    for key, value in state.items():
        # Our only copy of the embedders is that of the first block.
        if key.startswith("transformer_blocks.1.norm1.emb."):
            value.copy_(state[key.replace("blocks.1", "blocks.0")])
    ours.load_state_dict({"pos_embed": ours.pos_embed.data, **convert_diffusers(state)})
    return ours, theirs


def test_diffusers_dit_is_quantised_like_ours():
    """The same weights give nearly the same factors.

    Timesteps are embedded slightly differently (see ``models.timestep_embedding``).
    """
    def drive(model):
        torch.manual_seed(3)
        for timestep in (900, 20):
            latents = torch.randn(2, *LATENT_SHAPE)
            model(latents, torch.full((2,), timestep), torch.arange(2))

    ours, theirs = twins()
    recipe = replace(RECIPES["smoothquant"], timestep=0)
    expected = quantize_model(ours, recipe, W4A8, drive).smoothing
    smoothing = quantize_model(theirs, recipe, W4A8, drive).smoothing
    differences = []
    for one, other in zip(expected.values(), smoothing.values(), strict=True):
        differences.append(relative(one.factors, other.factors))
    assert max(differences) < 0.2
    assert max(differences) > 1e-6


def test_sites_of_dit_are_the_papers():
    model = random_model()
    sites = architecture_of(model).sites(model, "blocks")
    assert [site.role for site in sites] == ["qkv", "proj", "fc1", "fc2"] * 2
    folds = [site.folds for site in sites[4:]]
    assert folds == [
        (Modulation("blocks.1.adaLN_modulation.1", shift=0, scale=1),),
        (Rows("blocks.1.attn.qkv", start=128, stop=192),),
        (Modulation("blocks.1.adaLN_modulation.1", shift=3, scale=4),),
        (),
    ]


def test_pixart_shares_its_modulation():
    model = make("pixart")
    sites = {site.name: site for site in architecture_of(model).sites(model, "blocks")}
    before_attention = SharedModulation(
        table="transformer_blocks.1.scale_shift_table",
        shift=0,
        scale=1,
        block="transformer_blocks.1",
        argument="timestep")
    assert sites["transformer_blocks.1.attn1.qkv"].folds == (before_attention,)
    assert not sites["transformer_blocks.0.attn2.to_q"].folds
    assert len(sites) == 2 * 7


def shapes_of(model: nn.Module) -> dict[str, torch.Size]:
    return {key: value.shape for key, value in model.state_dict().items()}


@pytest.mark.parametrize("family", ["dit", *FAMILIES])
def test_a_configuration_builds_the_same_skeleton(family):
    model = make(family)
    architecture = architecture_of(model)
    assert architecture is architecture_named(family)
    built = empty_model(architecture, architecture.configuration(model))
    assert shapes_of(built) == shapes_of(model)
    assert all(parameter.is_meta for parameter in built.parameters() if parameter.requires_grad)
    assert not any(buffer.is_meta for name, buffer in built.named_buffers())


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="a model of class Linear is unknown here"):
        quantize_model(nn.Linear(2, 2), RECIPES["rtn"], W4A8, lambda model: None)


def test_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'nope' is unknown"):
        architecture_named("nope")


def test_sites_are_hashable_plain_data():
    model = random_model()
    sites = architecture_of(model).sites(model, "all")
    assert len(set(sites)) == len(sites)
    assert asdict(sites[0])["name"] == "x_embedder.proj"
