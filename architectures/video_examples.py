"""Small models of diffusers that make videos, and their calls, as data."""
import torch

from architectures.example_parts import (
    HEADS,
    IMAGE,
    IMAGES,
    POOLED,
    PROMPT,
    STEPS,
    TEXT,
    TEXT_WIDTH,
    VIDEO,
    Example,
    Noise,
    Numbers,
    ones,
)

WAN_SIZES = {**HEADS, "in_channels": 4, "out_channels": 4, "text_dim": TEXT_WIDTH, "ffn_dim": 48,
             "num_layers": 2}
WAN_CALL = {"hidden_states": VIDEO, "timestep": STEPS, "encoder_hidden_states": PROMPT}
MASK = ones(IMAGES, TEXT)

VIDEO_EXAMPLES = (
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
    Example(
        "AllegroTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": 32,
         "caption_channels": TEXT_WIDTH, "sample_width": 8, "sample_height": 8,
         "sample_frames": 2},
        {"hidden_states": VIDEO, "encoder_hidden_states": PROMPT, "timestep": STEPS,
         "attention_mask": ones(IMAGES, 2, 8, 8), "encoder_attention_mask": MASK,
         "image_rotary_emb": None}),
    Example(
        "AnyFlowTransformer3DModel",
        {**WAN_SIZES, "rope_max_seq_len": 32},
        {**WAN_CALL, "hidden_states": Noise((IMAGES, 2, 4, 8, 8)),
         "timestep": Numbers((700, 20), (IMAGES, 2)),
         "r_timestep": Numbers((600, 10), (IMAGES, 2))}),
    Example(
        "ChronoEditTransformer3DModel",
        {**WAN_SIZES, "rope_max_seq_len": 32, "rope_temporal_skip_len": 2},
        WAN_CALL),
    Example(
        "WanVACETransformer3DModel",
        {**WAN_SIZES, "rope_max_seq_len": 32, "vace_layers": [0, 1], "vace_in_channels": 8},
        {**WAN_CALL, "control_hidden_states": Noise((IMAGES, 8, 2, 8, 8)),
         "control_hidden_states_scale": Numbers((1.0,), (2,))}),
    Example(
        "HeliosTransformer3DModel",
        {**WAN_SIZES, "rope_dim": (4, 6, 6), "guidance_cross_attn": False,
         "zero_history_timestep": False, "has_multi_term_memory_patch": False},
        WAN_CALL),
    Example(
        "SanaVideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "num_cross_attention_heads": 2, "cross_attention_head_dim": 16, "cross_attention_dim": 32,
         "caption_channels": TEXT_WIDTH, "sample_size": 8, "rope_max_seq_len": 32},
        WAN_CALL),
    Example(
        "MotifVideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
         "text_embed_dim": TEXT_WIDTH, "rope_axes_dim": (4, 4, 8)},
        {**WAN_CALL, "encoder_attention_mask": MASK}),
    Example(
        "CosmosTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "num_layers": 2,
         "text_embed_dim": TEXT_WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32)},
        {**WAN_CALL, "fps": 16, "padding_mask": Numbers((0.0,), (1, 1, 64, 64))}),
    Example(
        "EasyAnimateTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "patch_size": 2, "num_layers": 2,
         "mmdit_layers": 1, "time_embed_dim": 20, "text_embed_dim": TEXT_WIDTH,
         "sample_width": 8, "sample_height": 8, "time_position_encoding_type": "3d_rope"},
        WAN_CALL),
    Example(
        "TransformerTemporalModel",
        {**HEADS, "in_channels": 32, "num_layers": 2, "norm_num_groups": 8},
        {"hidden_states": Noise((2 * IMAGES, 32, 4, 4)), "num_frames": 2}),
    Example(
        "ConsisIDTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 20,
         "text_embed_dim": TEXT_WIDTH, "num_layers": 2, "sample_width": 8, "sample_height": 8,
         "sample_frames": 5, "max_text_seq_length": TEXT},
        {"hidden_states": Noise((IMAGES, 2, 4, 8, 8)), "timestep": STEPS,
         "encoder_hidden_states": PROMPT}),
    Example(
        "LTX2VideoTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 32, "num_layers": 2,
         "caption_channels": TEXT_WIDTH, "audio_in_channels": 4, "audio_out_channels": 4,
         "audio_num_attention_heads": 2, "audio_attention_head_dim": 16,
         "audio_cross_attention_dim": 32},
        {"hidden_states": Noise((IMAGES, 32, 4)), "audio_hidden_states": Noise((IMAGES, 16, 4)),
         "encoder_hidden_states": PROMPT, "audio_encoder_hidden_states": PROMPT,
         "timestep": STEPS, "encoder_attention_mask": MASK, "audio_encoder_attention_mask": MASK,
         "num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 16}),
    Example(
        "Kandinsky5Transformer3DModel",
        {"in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT_WIDTH, "in_text_dim2": 20,
         "time_dim": 16, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 2,
         "num_visual_blocks": 2, "axes_dims": (4, 6, 6)},
        {"hidden_states": Noise((IMAGES, 2, 8, 8, 4)), "encoder_hidden_states": PROMPT,
         "timestep": STEPS, "pooled_projections": POOLED,
         "visual_rope_pos": [Numbers((0, 1), (2,), torch.int64),
                             Numbers((0, 1, 2, 3), (4,), torch.int64),
                             Numbers((0, 1, 2, 3), (4,), torch.int64)],
         "text_rope_pos": Numbers((0, 1, 2, 3, 4), (TEXT,), torch.int64)}),
    Example(
        "CogVideoXTransformer3DModel",
        {**HEADS, "in_channels": 4, "out_channels": 4, "time_embed_dim": 20,
         "text_embed_dim": TEXT_WIDTH, "num_layers": 2, "sample_width": 8, "sample_height": 8,
         "sample_frames": 5, "patch_size": 2, "max_text_seq_length": TEXT},
        {"hidden_states": Noise((IMAGES, 2, 4, 8, 8)), "timestep": STEPS,
         "encoder_hidden_states": PROMPT},
        variant="1.0"),
)
