"""Small models of diffusers' transformers and their calls; ``further_examples`` has more."""
import torch

from architectures.example_parts import (
    HEADS,
    IMAGE,
    IMAGES,
    LATENTS,
    PARTS,
    POOLED,
    PROMPT,
    SIZES,
    STEPS,
    TEXT,
    TEXT_WIDTH,
    TOKENS,
    VIDEO,
    Example,
    Noise,
    Numbers,
    build,
    draw_call,
    ones,
)
from architectures.further_examples import FURTHER

__all__ = ["EXAMPLES", "IMAGES", "TEXT", "TEXT_WIDTH", "Example", "Noise", "Numbers", "build",
           "draw_call", "examples_of"]

# What several classes share.
FLUX_SIZES = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
              "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 4, 8)}
FLUX_CALL = {"hidden_states": TOKENS, "timestep": PARTS, "encoder_hidden_states": PROMPT,
             "img_ids": Numbers((0, 1, 2, 3), (16, 3)), "txt_ids": Numbers((0,), (TEXT, 3))}
COG_VIEW_SIZES = {**IMAGE, **HEADS, "out_channels": 4, "num_layers": 2,
                  "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 20, "condition_dim": 16,
                  "pos_embed_max_size": 8}
COG_VIEW_CALL = {"hidden_states": LATENTS, "timestep": STEPS, "encoder_hidden_states": PROMPT,
                 "original_size": SIZES, "target_size": SIZES, "crop_coords": SIZES}

EXAMPLES = (
    Example(
        "DiTTransformer2DModel",
        {**IMAGE, **HEADS, "out_channels": 8, "num_layers": 2, "num_embeds_ada_norm": 10},
        {"hidden_states": LATENTS, "timestep": STEPS,
         "class_labels": Numbers((3, 1), (IMAGES,), torch.int64)}),
    Example(
        "PixArtTransformer2DModel",
        {**IMAGE, **HEADS, "out_channels": 8, "num_layers": 2, "cross_attention_dim": 32,
         "caption_channels": TEXT_WIDTH, "use_additional_conditions": False},
        {"hidden_states": LATENTS, "timestep": STEPS, "encoder_hidden_states": PROMPT,
         "encoder_attention_mask": ones(IMAGES, TEXT),
         "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}),
    Example(
        "SD3Transformer2DModel",
        {**IMAGE, **HEADS, "out_channels": 4, "num_layers": 3, "joint_attention_dim": TEXT_WIDTH,
         "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 16},
        {"hidden_states": LATENTS, "timestep": STEPS, "encoder_hidden_states": PROMPT,
         "pooled_projections": POOLED}),
    Example(
        "SD3Transformer2DModel",
        {**IMAGE, **HEADS, "out_channels": 4, "num_layers": 4, "joint_attention_dim": TEXT_WIDTH,
         "caption_projection_dim": 32, "pooled_projection_dim": 20, "pos_embed_max_size": 16,
         "dual_attention_layers": (0, 1), "qk_norm": "rms_norm"},
        {"hidden_states": LATENTS, "timestep": STEPS, "encoder_hidden_states": PROMPT,
         "pooled_projections": POOLED},
        variant="3.5"),
    Example(
        "FluxTransformer2DModel",
        {**FLUX_SIZES, "pooled_projection_dim": 20},
        {**FLUX_CALL, "pooled_projections": POOLED}),
    Example(
        "Flux2Transformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 4, 4, 4)},
        {"hidden_states": TOKENS, "timestep": PARTS, "encoder_hidden_states": PROMPT,
         "guidance": Numbers((4.0,), (IMAGES,)),
         "img_ids": Numbers((0, 1, 2, 3), (IMAGES, 16, 4)),
         "txt_ids": Numbers((0,), (IMAGES, TEXT, 4))}),
    Example(
        "SanaTransformer2DModel",
        {**HEADS, "sample_size": 8, "patch_size": 1, "in_channels": 4, "out_channels": 4,
         "num_layers": 2, "num_cross_attention_heads": 2, "cross_attention_head_dim": 16,
         "cross_attention_dim": 32, "caption_channels": TEXT_WIDTH},
        {"hidden_states": LATENTS, "timestep": STEPS, "encoder_hidden_states": PROMPT}),
    Example(
        "HunyuanDiT2DModel",
        {**IMAGE, **HEADS, "num_layers": 4, "hidden_size": 32, "cross_attention_dim": TEXT_WIDTH,
         "cross_attention_dim_t5": TEXT_WIDTH, "pooled_projection_dim": 20, "text_len": TEXT,
         "text_len_t5": TEXT},
        {"hidden_states": LATENTS, "timestep": Numbers((700, 20), (IMAGES,)),
         "encoder_hidden_states": PROMPT,
         "text_embedding_mask": ones(IMAGES, TEXT), "encoder_hidden_states_t5": PROMPT,
         "text_embedding_mask_t5": ones(IMAGES, TEXT),
         "image_meta_size": Numbers((64, 64, 64, 64, 0, 0), (IMAGES, 6)),
         "style": Numbers((0,), (IMAGES,), torch.int64),
         "image_rotary_emb": [Noise((16, 16)), Noise((16, 16))]}),
    Example(
        "Lumina2Transformer2DModel",
        {**IMAGE, "hidden_size": 64, "num_layers": 2, "num_refiner_layers": 2,
         "num_attention_heads": 4, "num_kv_heads": 2, "multiple_of": 2,
         "axes_dim_rope": (8, 4, 4), "axes_lens": (64, 64, 64), "cap_feat_dim": TEXT_WIDTH},
        {"hidden_states": LATENTS, "timestep": PARTS, "encoder_hidden_states": PROMPT,
         "encoder_attention_mask": ones(IMAGES, TEXT, dtype=torch.bool)}),
    Example(
        "AuraFlowTransformer2DModel",
        {**IMAGE, **HEADS, "out_channels": 4, "num_mmdit_layers": 2, "num_single_dit_layers": 2,
         "joint_attention_dim": TEXT_WIDTH, "caption_projection_dim": 32,
         "pos_embed_max_size": 16},
        {"hidden_states": LATENTS, "timestep": PARTS, "encoder_hidden_states": PROMPT}),
    Example(
        "QwenImageTransformer2DModel",
        {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 2,
         "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (8, 4, 4)},
        {"hidden_states": Noise((IMAGES, 16, 16)), "timestep": PARTS,
         "encoder_hidden_states": PROMPT,
         "encoder_hidden_states_mask": ones(IMAGES, TEXT, dtype=torch.int64),
         "img_shapes": [(1, 4, 4)] * IMAGES}),
    Example(
        "ZImageTransformer2DModel",
        {"in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 2, "n_heads": 2,
         "n_kv_heads": 2, "cap_feat_dim": TEXT_WIDTH, "axes_dims": [8, 4, 4],
         "axes_lens": [256, 32, 32]},
        {"x": [Noise((4, 1, 8, 8))] * IMAGES, "t": PARTS,
         "cap_feats": [Noise((TEXT, TEXT_WIDTH))] * IMAGES}),
    Example(
        "LatteTransformer3DModel",
        {**IMAGE, **HEADS, "out_channels": 8, "num_layers": 2, "caption_channels": TEXT_WIDTH,
         "cross_attention_dim": 32, "attention_bias": True, "activation_fn": "gelu-approximate",
         "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
         "norm_elementwise_affine": False, "norm_eps": 1e-6, "video_length": 2},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": PROMPT}),
    Example(
        "CogVideoXTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 20,
         "text_embed_dim": TEXT_WIDTH, "num_layers": 2, "sample_width": 8, "sample_height": 8,
         "sample_frames": 8, "patch_size": 2, "patch_size_t": 2, "patch_bias": False,
         "max_text_seq_length": TEXT, "use_rotary_positional_embeddings": True},
        {"hidden_states": Noise((IMAGES, 2, 4, 8, 8)), "timestep": STEPS,
         "encoder_hidden_states": PROMPT,
         "image_rotary_emb": (Noise((16, 16)), Noise((16, 16)))},
        variant="1.5"),
    Example(
        "WanTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH, "ffn_dim": 48,
         "num_layers": 2, "rope_max_seq_len": 32},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": PROMPT}),
    Example(
        "LTXVideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": TEXT_WIDTH},
        {"hidden_states": Noise((IMAGES, 32, 4)), "timestep": STEPS,
         "encoder_hidden_states": PROMPT,
         "encoder_attention_mask": ones(IMAGES, TEXT, dtype=torch.bool),
         "num_frames": 2, "height": 4, "width": 4}),
    Example(
        "MochiTransformer3DModel",
        {**HEADS, "patch_size": 2, "in_channels": 4, "num_layers": 3, "pooled_projection_dim": 20,
         "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 28, "max_sequence_length": TEXT},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": PROMPT,
         "encoder_attention_mask": ones(IMAGES, TEXT, dtype=torch.bool)}),
    Example(
        "BriaTransformer2DModel",
        FLUX_SIZES,
        FLUX_CALL),
    Example(
        "ChromaTransformer2DModel",
        {**FLUX_SIZES, "approximator_hidden_dim": 32, "approximator_layers": 2},
        FLUX_CALL),
    Example(
        "OvisImageTransformer2DModel",
        {**FLUX_SIZES, "out_channels": 4},
        FLUX_CALL),
    Example(
        "LongCatImageTransformer2DModel",
        FLUX_SIZES,
        FLUX_CALL),
    Example(
        "CogView3PlusTransformer2DModel",
        COG_VIEW_SIZES,
        COG_VIEW_CALL),
    Example(
        "CogView4Transformer2DModel",
        {**COG_VIEW_SIZES, "rope_axes_dim": (16, 16)},
        COG_VIEW_CALL),
    Example(
        "HunyuanVideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "text_embed_dim": TEXT_WIDTH, "pooled_projection_dim": 20, "rope_axes_dim": (4, 4, 8)},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": PROMPT,
         "encoder_attention_mask": ones(IMAGES, TEXT), "pooled_projections": POOLED,
         "guidance": Numbers((4.0,), (IMAGES,))}),
    Example(
        "SkyReelsV2Transformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH, "ffn_dim": 48,
         "num_layers": 2, "rope_max_seq_len": 32},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": PROMPT}),
    *FURTHER,
)


def examples_of(class_name: str) -> list[Example]:
    """List the examples of a class."""
    return [example for example in EXAMPLES if example.class_name == class_name]
