"""Small models of diffusers that make images, and their calls, as data."""
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
    ones,
)

FLUX_SIZES = {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
              "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (4, 4, 8)}
FLUX_CALL = {"hidden_states": TOKENS, "timestep": PARTS, "encoder_hidden_states": PROMPT,
             "img_ids": Numbers((0, 1, 2, 3), (16, 3)), "txt_ids": Numbers((0,), (TEXT, 3))}
COG_VIEW_SIZES = {**IMAGE, **HEADS, "out_channels": 4, "num_layers": 2,
                  "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 20, "condition_dim": 16,
                  "pos_embed_max_size": 8}
COG_VIEW_CALL = {"hidden_states": LATENTS, "timestep": STEPS, "encoder_hidden_states": PROMPT,
                 "original_size": SIZES, "target_size": SIZES, "crop_coords": SIZES}
HUNYUAN_SIZES = {**HEADS, "num_layers": 2, "num_single_layers": 2, "num_refiner_layers": 2,
                 "text_embed_dim": TEXT_WIDTH}
MASK = ones(IMAGES, TEXT)
FLOAT_STEPS = Numbers((700, 20), (IMAGES,))

IMAGE_EXAMPLES = (
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
        "HunyuanImageTransformer2DModel",
        {**HUNYUAN_SIZES, "in_channels": 4, "out_channels": 4, "rope_axes_dim": (8, 8)},
        {"hidden_states": LATENTS, "timestep": FLOAT_STEPS, "encoder_hidden_states": PROMPT,
         "encoder_attention_mask": MASK}),
    Example(
        "ErnieImageTransformer2DModel",
        {"hidden_size": 32, "num_attention_heads": 2, "num_layers": 2, "ffn_hidden_size": 48,
         "in_channels": 4, "out_channels": 4, "text_in_dim": TEXT_WIDTH,
         "rope_axes_dim": (4, 4, 8)},
        {"hidden_states": LATENTS, "timestep": STEPS, "text_bth": PROMPT,
         "text_lens": Numbers((TEXT,), (IMAGES,), torch.int64)}),
    Example(
        "GlmImageTransformer2DModel",
        {**HEADS, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "text_embed_dim": TEXT_WIDTH, "time_embed_dim": 20, "condition_dim": 16,
         "prior_vq_quantizer_codebook_size": 8},
        {"hidden_states": LATENTS, "encoder_hidden_states": PROMPT,
         "prior_token_id": Numbers((1, 2), (IMAGES, 16), torch.int64),
         "prior_token_drop": ones(IMAGES, 16, dtype=torch.bool), "timestep": STEPS,
         "target_size": SIZES, "crop_coords": SIZES}),
    Example(
        "Ideogram4Transformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 2, "intermediate_size": 48, "adaln_dim": 8,
         "llm_features_dim": TEXT_WIDTH, "mrope_section": (4, 2, 2)},
        {"hidden_states": TOKENS, "timestep": PARTS,
         "encoder_hidden_states": Noise((IMAGES, 16, TEXT_WIDTH)),
         "position_ids": Numbers((0, 1, 2, 3), (IMAGES, 16, 3), torch.int64),
         "segment_ids": ones(IMAGES, 16, dtype=torch.int64),
         "indicator": Numbers((2,), (IMAGES, 16), torch.int64)}),
    Example(
        "JoyImageEditTransformer3DModel",
        {"hidden_size": 32, "num_attention_heads": 2, "in_channels": 4, "num_layers": 2,
         "text_dim": TEXT_WIDTH, "rope_dim_list": [4, 6, 6]},
        {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": PROMPT}),
    Example(
        "PRXTransformer2DModel",
        {"in_channels": 4, "context_in_dim": TEXT_WIDTH, "hidden_size": 32, "num_heads": 2,
         "depth": 2, "mlp_ratio": 2.0, "axes_dim": [8, 8]},
        {"hidden_states": LATENTS, "timestep": PARTS, "encoder_hidden_states": PROMPT}),
    Example(
        "Krea2Transformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 2, "num_key_value_heads": 1,
         "intermediate_size": 48, "timestep_embed_dim": 16, "text_hidden_dim": TEXT_WIDTH,
         "num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 2,
         "text_intermediate_size": 48, "axes_dims_rope": (4, 6, 6)},
        {"hidden_states": TOKENS, "encoder_hidden_states": Noise((IMAGES, TEXT, 2, TEXT_WIDTH)),
         "timestep": PARTS,
         "position_ids": Numbers((0, 1, 2, 3), (16 + TEXT, 3), torch.int64)}),
    Example(
        "LuminaNextDiT2DModel",
        {"sample_size": 8, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2,
         "num_kv_heads": 2, "multiple_of": 8, "cross_attention_dim": TEXT_WIDTH},
        {"hidden_states": LATENTS, "timestep": PARTS, "encoder_hidden_states": PROMPT,
         "encoder_mask": MASK, "image_rotary_emb": Noise((384, 384, 8)),
         "cross_attention_kwargs": {}}),
    Example(
        "Transformer2DModel",
        {**HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 8,
         "cross_attention_dim": TEXT_WIDTH},
        {"hidden_states": Noise((IMAGES, 32, 4, 4)), "encoder_hidden_states": PROMPT}),
    Example(
        "PriorTransformer",
        {**HEADS, "num_layers": 2, "embedding_dim": 20, "num_embeddings": TEXT,
         "additional_embeddings": 4},
        {"hidden_states": POOLED, "timestep": STEPS, "proj_embedding": POOLED,
         "encoder_hidden_states": Noise((IMAGES, TEXT, 20))}),
    Example(
        "NucleusMoEImageTransformer2DModel",
        {**HEADS, "in_channels": 16, "out_channels": 4, "num_layers": 2,
         "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": (8, 4, 4), "mlp_ratio": 8.0,
         "moe_enabled": False},
        {"hidden_states": Noise((IMAGES, 16, 16)), "timestep": PARTS,
         "encoder_hidden_states": PROMPT, "img_shapes": [(1, 4, 4)] * IMAGES}),
    Example(
        "BriaFiboTransformer2DModel",
        {**HEADS, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "joint_attention_dim": TEXT_WIDTH, "axes_dims_rope": [4, 4, 8], "text_encoder_dim": 12},
        {"hidden_states": TOKENS, "timestep": PARTS, "encoder_hidden_states": PROMPT,
         "text_encoder_layers": [Noise((IMAGES, TEXT, 12))] * 4,
         "img_ids": Numbers((0, 1, 2, 3), (16, 3)), "txt_ids": Numbers((0,), (TEXT, 3))}),
    Example(
        "Flux3Transformer2DModel",
        {**HEADS, "in_channels": 4, "cond_in_channels": 4, "num_layers": 2,
         "num_single_layers": 2, "joint_attention_dim": TEXT_WIDTH, "timestep_channels": 16,
         "axes_dims_rope": (4, 4, 4, 4)},
        {"hidden_states": TOKENS, "encoder_hidden_states": PROMPT, "timestep": PARTS,
         "img_ids": Numbers((0, 1, 2, 3), (16, 4)),
         "txt_ids": Numbers((0,), (TEXT, 4))}),
    Example(
        "DreamLiteTransformer2DModel",
        {**HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 8,
         "cross_attention_dim": TEXT_WIDTH, "use_linear_projection": True},
        {"hidden_states": Noise((IMAGES, 32, 4, 4)), "encoder_hidden_states": PROMPT}),
    Example(
        "JoyImageEditPlusTransformer3DModel",
        {"hidden_size": 32, "num_attention_heads": 2, "in_channels": 4, "num_layers": 2,
         "text_dim": TEXT_WIDTH, "rope_dim_list": [4, 6, 6]},
        {"hidden_states": Noise((IMAGES, 16, 4, 1, 2, 2)), "timestep": STEPS,
         "encoder_hidden_states": PROMPT, "encoder_hidden_states_mask": MASK,
         "shape_list": [[(1, 4, 4)]] * IMAGES}),
)
