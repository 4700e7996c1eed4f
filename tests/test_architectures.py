"""The seam: DiT as data, and diffusers' DiT and PixArt quantised through the same code."""
from dataclasses import asdict, replace

import pytest
import torch
from conftest import random_model, relative, scope_linears
from torch import nn

from architectures.dit import convert_diffusers
from architectures.registry import architecture_named, architecture_of, empty_model
from architectures.sites import Modulation, Rows, SharedModulation
from config import RECIPES
from evaluation.metrics import sqnr_db
from quant import checkpoint
from quant.activations.quantisers import Activation
from quant.install import install
from quant.layers.fold import fold
from quant.layers.quantised import QuantizedLayer
from quant.numerics.smoothing import Smoothing
from quant.numerics.tokens import matrix
from quant.numerics.uniform import QuantSpec
from quant.pipeline import quantize_model
from quant.recipe import BitWidths
from quant.weights.low_rank import without_branch
from quant.weights.rounding import quantize_weight

STEPS, IMAGES = 3, 2
FAMILIES = ("diffusers-dit", "pixart")


def randomise(model: nn.Module) -> nn.Module:
    """Give every parameter a random value, modulation and output included."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.08)
    return model.eval()


def make(family: str) -> nn.Module:
    from diffusers import DiTTransformer2DModel, PixArtTransformer2DModel
    shape = {"num_attention_heads": 4, "attention_head_dim": 16, "in_channels": 4, "num_layers": 2,
             "sample_size": 8, "patch_size": 2}
    if family == "diffusers-dit":
        return randomise(DiTTransformer2DModel(**shape, out_channels=8, num_embeds_ada_norm=10))
    return randomise(PixArtTransformer2DModel(
        **shape, out_channels=8, cross_attention_dim=64, caption_channels=24,
        use_additional_conditions=False))


def arguments(family: str, images: int, timestep: int) -> dict:
    """Arguments of a call: latents drawn anew, the condition the same object in every call."""
    call = {"hidden_states": torch.randn(images, 4, 8, 8),
            "timestep": torch.full((images,), timestep)}
    if family == "diffusers-dit":
        return {**call, "class_labels": torch.arange(images)}
    mask = torch.ones(images, 5)
    mask[0, 3:] = 0
    text = torch.randn(images, 5, 24, generator=torch.Generator().manual_seed(1))
    return {**call, "encoder_hidden_states": text, "encoder_attention_mask": mask,
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}


def drive_of(family: str):
    def drive(model):
        torch.manual_seed(3)
        for timestep in (900, 400, 20):
            model(**arguments(family, IMAGES, timestep))
    return drive


def output(model: nn.Module, family: str) -> torch.Tensor:
    torch.manual_seed(5)
    return model(**arguments(family, 3, 321)).sample


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe_name", ["rtn", "ditas", "ditas-plus"])
def test_other_transformers_are_quantised_saved_and_reloaded(family, recipe_name, tmp_path):
    recipe = RECIPES[recipe_name]
    recipe = replace(recipe, rounds=2, weight_group=recipe.weight_group // 2)
    model = make(family)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    result = quantize_model(model, recipe, BitWidths(4, 8), drive_of(family))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())

    # Every linear of the blocks, and no other but the modulation, which recipes quantise at 8 bits.
    inside = {name for name, module in model.named_modules()
              if isinstance(module, nn.Linear) and name.startswith("transformer_blocks.")
              and ".norm1." not in name}
    assert inside == set(scope_linears(model, "blocks"))
    assert inside <= set(result.layers)
    assert (len(result.layers) > len(inside)) == (recipe.adaln_bits < 16)

    path = tmp_path / "model.safetensors"
    header = checkpoint.Header(
        model=type(model).__name__, image_size=None, num_classes=None, weight_bit=4, act_bit=8,
        recipe_name=recipe_name, recipe=recipe, seed=0, num_sampling_steps=str(STEPS), svd="fast",
        alphas=result.alphas)
    checkpoint.save(path, model, result, header)
    back, reloaded = checkpoint.load(path)
    assert back.architecture == family and type(reloaded) is type(model)
    kept = make(family)
    kept.load_state_dict({key: value.half() for key, value in kept.state_dict().items()})
    expected = output(install(kept, result.layers), family)
    assert torch.equal(output(reloaded, family), expected)

    quality = sqnr_db(output(model, family), expected)
    assert quality > {"rtn": 12, "ditas": 12, "ditas-plus": 15}[recipe_name]


def without_rounding(model: nn.Module) -> dict[str, QuantizedLayer]:
    """Layers with random factors whose activations stay as they are."""
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
    sites = architecture_of(folded).sites(folded, "blocks")
    for site in sites:
        for name in site.linears:
            assert (folded.get_submodule(name).smooth is None) == bool(site.folds)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("recipe_name", ["ptq4dit", "repq-vit", "tfmq-dm", "smoothquant", "qdit"])
def test_other_recipes_run_on_other_transformers(family, recipe_name, tmp_path):
    recipe = replace(RECIPES[recipe_name], iterations=2, group_sizes=(), weight_group=16)
    if recipe_name == "qdit":
        recipe = replace(recipe, scope="blocks")
    model = make(family)
    result = quantize_model(model, recipe, BitWidths(8, 8), drive_of(family))
    quantised = install(make(family), result.layers, operands=result.operands)
    assert sqnr_db(output(model, family), output(quantised, family)) > 15
    if recipe.attention != "none":
        expected = {site.name for site in architecture_of(model).attentions(model)}
        assert result.operands.keys() == expected


def test_ditas_folds_on_a_real_checkpoint(tmp_path):
    model = make("pixart")
    recipe = replace(RECIPES["ditas"], rounds=2, weight_group=32)
    result = quantize_model(model, recipe, BitWidths(4, 8), drive_of("pixart"))
    path = tmp_path / "model.safetensors"
    header = checkpoint.Header(
        model="PixArtTransformer2DModel", image_size=None, num_classes=None, weight_bit=4,
        act_bit=8, recipe_name="ditas", recipe=recipe, seed=0, num_sampling_steps="3", svd="fast",
        alphas=result.alphas)
    checkpoint.save(path, model, result, header)
    plain, folded = (checkpoint.load(path, folded=fold)[1] for fold in (False, True))
    # A code may flip where a value lies on the middle between two.
    assert sqnr_db(output(plain, "pixart"), output(folded, "pixart")) > 40


def test_diffusers_dit_is_quantised_like_ours():
    """The same weights, q k v apart, give nearly the same factors.

    Timesteps are embedded slightly differently (see ``models.timestep_embedding``).
    """
    twin, ours = make("diffusers-dit"), random_model()
    for key, value in twin.state_dict().items():
        # Our only copy of the embedders is that of the first block.
        if key.startswith("transformer_blocks.1.norm1.emb."):
            value.copy_(twin.state_dict()[key.replace("blocks.1", "blocks.0")])
    ours.load_state_dict(
        {"pos_embed": ours.pos_embed.data, **convert_diffusers(twin.state_dict())})

    def drive(model):
        torch.manual_seed(3)
        for timestep in (900, 20):
            model(torch.randn(2, 4, 8, 8), torch.full((2,), timestep), torch.arange(2))

    recipe = replace(RECIPES["smoothquant"], timestep=0)
    one = quantize_model(ours, recipe, BitWidths(4, 8), drive)
    other = quantize_model(twin, recipe, BitWidths(4, 8), drive)
    pairs = list(zip(one.smoothing.values(), other.smoothing.values(), strict=True))
    assert all(relative(a.factors, b.factors) < 0.2 for a, b in pairs)
    assert any(relative(a.factors, b.factors) > 1e-6 for a, b in pairs)


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
    assert sites["transformer_blocks.1.attn1.qkv"].folds == (SharedModulation(
        "transformer_blocks.1.scale_shift_table", shift=0, scale=1, block="transformer_blocks.1",
        argument="timestep"),)
    assert not sites["transformer_blocks.0.attn2.to_q"].folds
    assert len(sites) == 2 * 7


@pytest.mark.parametrize("family", ["dit", *FAMILIES])
def test_a_configuration_builds_the_same_skeleton(family):
    model = random_model() if family == "dit" else make(family)
    architecture = architecture_of(model)
    assert architecture is architecture_named(family)
    built = empty_model(architecture, architecture.configuration(model))
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in built.state_dict().items()} == shapes
    assert all(parameter.is_meta for parameter in built.parameters() if parameter.requires_grad)
    assert not any(buffer.is_meta for name, buffer in built.named_buffers())


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="a model of class Linear is unknown here"):
        quantize_model(nn.Linear(2, 2), RECIPES["rtn"], BitWidths(4, 8), lambda model: None)
    with pytest.raises(ValueError, match="'nope' is unknown"):
        architecture_named("nope")


def test_sites_are_hashable_plain_data():
    model = random_model()
    sites = architecture_of(model).sites(model, "all")
    assert len(set(sites)) == len(sites)
    assert asdict(sites[0])["name"] == "x_embedder.proj"
