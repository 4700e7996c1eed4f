"""Whole text-to-image and text-to-video pipelines of diffusers, tiny and random."""
from pathlib import Path

import torch
from test_pipelines import WORDS, name_the_tokenizer
from torch import nn

from architectures.tracing import random_parameters
from examples.emoji.pixart import TEXT_WIDTH, build_text_encoder, build_tokenizer

LENGTH = 24  # tokens of a prompt
HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}


def randomise(model: nn.Module) -> nn.Module:
    """Draw every parameter, those of modulation and output too."""
    model.load_state_dict(random_parameters(model, seed=3), strict=False)
    return model.eval()


def tokenizer():
    return build_tokenizer(sorted({word for words in WORDS for word in words.split()}))


def clip(kind: str):
    """Make a text encoder of CLIP, of class ``kind``, 16 values wide."""
    import transformers
    sizes = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer()), hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=LENGTH, projection_dim=16, pad_token_id=0,
        bos_token_id=2, eos_token_id=1)
    return getattr(transformers, kind)(sizes).eval()


def image_vae():
    from diffusers import AutoencoderKL
    return AutoencoderKL(
        block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4,
        use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.06,
        scaling_factor=1.5).eval()


def flow():
    from diffusers import FlowMatchEulerDiscreteScheduler
    return FlowMatchEulerDiscreteScheduler()


def stable_diffusion_3():
    """Make SD3: two CLIPs and T5, joint attention."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    transformer = SD3Transformer2DModel(
        **HEADS, sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=3,
        joint_attention_dim=TEXT_WIDTH, caption_projection_dim=32, pooled_projection_dim=32,
        pos_embed_max_size=16)
    names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    return StableDiffusion3Pipeline(
        transformer=randomise(transformer), scheduler=flow(), vae=image_vae(),
        text_encoder=clip("CLIPTextModelWithProjection"),
        text_encoder_2=clip("CLIPTextModelWithProjection"),
        text_encoder_3=build_text_encoder(len(tokenizer())),
        **{name: tokenizer() for name in names})


def flux():
    """Make Flux: CLIP and T5, double and single blocks, distilled guidance."""
    from diffusers import FluxPipeline, FluxTransformer2DModel
    transformer = FluxTransformer2DModel(
        **HEADS, patch_size=1, in_channels=16, num_layers=2, num_single_layers=2,
        joint_attention_dim=TEXT_WIDTH, pooled_projection_dim=16, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True)
    return FluxPipeline(
        transformer=randomise(transformer), scheduler=flow(), vae=image_vae(),
        text_encoder=clip("CLIPTextModel"), tokenizer=tokenizer(),
        text_encoder_2=build_text_encoder(len(tokenizer())), tokenizer_2=tokenizer())


def wan():
    """Make Wan: a video pipeline."""
    from diffusers import AutoencoderKLWan, WanPipeline
    torch.manual_seed(0)
    vae = AutoencoderKLWan(
        base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1,
        temperal_downsample=[False, True, True], latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return WanPipeline(
        transformer=wan_transformer(), scheduler=flow(), vae=vae.eval(),
        text_encoder=build_text_encoder(len(tokenizer())), tokenizer=tokenizer())


def wan_transformer(num_layers: int = 2):
    from diffusers import WanTransformer3DModel
    return randomise(WanTransformer3DModel(
        **HEADS, in_channels=4, out_channels=4, text_dim=TEXT_WIDTH, ffn_dim=48,
        num_layers=num_layers, freq_dim=32, rope_max_seq_len=32))


def two_wans():
    """Make Wan 2.2: one transformer for the noisier half of the steps, and one for the rest."""
    from diffusers import WanPipeline
    return WanPipeline(
        **{**wan().components, "transformer_2": wan_transformer(num_layers=3)}, boundary_ratio=0.5)


PIPELINES = {
    "SD3": (stable_diffusion_3, {
        "height": 16, "width": 16, "guidance_scale": 3.0, "max_sequence_length": LENGTH}),
    "Flux": (flux, {"height": 16, "width": 16, "max_sequence_length": LENGTH}),
    "Wan": (wan, {
        "height": 32, "width": 32, "num_frames": 5, "max_sequence_length": LENGTH}),
}


def save(name: str, folder: Path) -> None:
    """Write the folder of a pipeline."""
    torch.manual_seed(0)
    PIPELINES[name][0]().save_pretrained(folder)
    name_the_tokenizers(folder)


def name_the_tokenizers(folder: Path) -> None:
    """Give the tokenizers' class the name that all versions of transformers know."""
    for name in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        name_the_tokenizer(folder, name)
