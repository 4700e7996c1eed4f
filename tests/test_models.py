import pytest
import timm.models.vision_transformer as timm
import torch
from conftest import golden, golden_model, random_model, relative

from architectures.dit import convert_diffusers
from cards import DiT_models
from models import TanhGELU, build_model, sincos_position_embedding


def test_forward_and_guidance_match_the_published_model():
    values = golden("dit")
    model = golden_model()
    inputs = [torch.tensor(values[key]) for key in ("x", "t", "y")]
    assert relative(model(*inputs), values["out"]) < 1e-4
    inputs = [torch.tensor(values[key]) for key in ("cfg_x", "cfg_t", "cfg_y")]
    guided = model.forward_with_cfg(*inputs, float(values["cfg_scale"]))
    assert relative(guided, values["cfg_out"]) < 1e-4


def test_attention_mlp_and_patches_are_timms():
    model = random_model()
    block, side, width = model.blocks[0], model.input_size, model.pos_embed.shape[2]
    theirs = {
        block.attn: timm.Attention(width, num_heads=block.attn.num_heads, qkv_bias=True),
        block.mlp: timm.Mlp(width, 4 * width, act_layer=TanhGELU),
        model.x_embedder: timm.PatchEmbed(side, model.patch_size, model.in_channels, width),
    }
    for ours, module in theirs.items():
        module.load_state_dict(ours.state_dict())
        shape = (2, 4, side, side) if ours is model.x_embedder else (2, 16, width)
        x = torch.randn(shape)
        assert relative(ours(x), module(x)) < 1e-6


def test_position_embedding_matches_the_published_checkpoint():
    expected = golden("dit")["sd/pos_embed"][0]
    assert relative(sincos_position_embedding(32, 4), expected) < 1e-6


def test_guidance_touches_the_first_three_channels_only():
    model = random_model()
    x, t, y = torch.randn(4, 4, 8, 8), torch.full((4,), 300), torch.tensor([1, 2, 10, 10])
    x[2:] = x[:2]
    plain, guided = model(x, t, y), model.forward_with_cfg(x, t, y, 3.0)
    assert torch.equal(guided[:, 3:], plain[:, 3:])
    expected = plain[2:, :3] + 3.0 * (plain[:2, :3] - plain[2:, :3])
    assert torch.allclose(guided[:2, :3], expected, atol=1e-6)
    assert torch.equal(guided[:2, :3], guided[2:, :3])


def test_forward_hooks_see_guided_calls():
    """Calibration and fidelity watch a model from outside, also while it samples with guidance."""
    model, calls = random_model(), []
    handle = model.register_forward_hook(lambda module, inputs, output: calls.append(inputs))
    x, t, y = torch.randn(4, 4, 8, 8), torch.full((4,), 300), torch.tensor([1, 2, 10, 10])
    model.forward_with_cfg(x, t, y, 1.5)
    handle.remove()
    assert len(calls) == 1
    seen_x, seen_t, seen_y = calls[0]
    assert torch.equal(seen_x, torch.cat([x[:2], x[:2]]))
    assert torch.equal(seen_t, t) and torch.equal(seen_y, y)


def diffusers_twin(shift: float | None):
    """Make a random diffusers DiT; ``shift`` sets its timestep embedding's frequency spread."""
    from diffusers import DiTTransformer2DModel
    torch.manual_seed(1)
    theirs = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        patch_size=2,
        num_embeds_ada_norm=10,
        norm_eps=1e-6,
    ).eval()
    for parameter in theirs.parameters():
        parameter.normal_(std=0.08)
    first = theirs.transformer_blocks[0].norm1.emb
    for block in theirs.transformer_blocks:
        # One embedder for all blocks, as in the published model.
        block.norm1.emb.load_state_dict(first.state_dict())
        if shift is not None:
            block.norm1.emb.time_proj.downscale_freq_shift = shift
    return theirs


@pytest.mark.parametrize("shift, low, high", [(0.0, 0.0, 1e-4), (None, 1e-3, 0.5)])
def test_diffusers_model_converts_and_agrees_at_the_published_frequencies(shift, low, high):
    theirs = diffusers_twin(shift)
    ours = random_model()
    state = convert_diffusers(theirs.state_dict())
    assert ours.state_dict().keys() - state.keys() == {"pos_embed"}
    ours.load_state_dict(state, strict=False)
    x, t, y = torch.randn(3, 4, 8, 8), torch.tensor([999, 500, 3]), torch.tensor([0, 7, 10])
    assert low <= relative(ours(x, t, y), theirs(x, timestep=t, class_labels=y).sample) < high


@pytest.mark.parametrize("name, millions", [
    ("DiT-XL/2", 675),
    ("DiT-L/4", 458),
    ("DiT-B/2", 130),
    ("DiT-S/8", 33),
    ("DiT-Digits", 3.06),
])
def test_registry_has_the_parameter_counts_of_the_paper(name, millions):
    with torch.device("meta"):
        model = build_model(DiT_models[name], DiT_models[name].image_sizes[0])
    count = sum(p.numel() for p in model.parameters()) / 1e6
    if millions > 10:
        assert abs(count - millions) < max(1.0, 0.01 * millions)
    else:
        assert round(count, 2) == millions


def test_registry_is_complete_and_refuses_other_sizes():
    assert {f"DiT-{s}/{p}" for s in ("S", "B", "L", "XL") for p in (2, 4, 8)} < set(DiT_models)
    with pytest.raises(ValueError, match="expected 16"):
        build_model(DiT_models["DiT-Digits"], 256)


def test_compiled_gelu_is_the_same_function():
    x = torch.linspace(-12, 12, 4001)
    wide = x.double()
    expected = 0.5 * wide * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (wide + 0.044715 * wide ** 3)))
    for gelu in (TanhGELU(), torch.compile(TanhGELU(), backend="eager", fullgraph=True)):
        assert torch.allclose(gelu(x).double(), expected, rtol=1e-6, atol=2e-6)
