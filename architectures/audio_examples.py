"""Small models of diffusers that make sound, and their calls, as data."""
import torch

from architectures.example_parts import (
    HEADS,
    IMAGES,
    PARTS,
    POOLED,
    PROMPT,
    TEXT,
    TEXT_WIDTH,
    Example,
    Noise,
    ones,
)

BOOLEAN_MASK = ones(IMAGES, TEXT, dtype=torch.bool)
AUDIO = Noise((IMAGES, 16, 8))

AUDIO_EXAMPLES = (
    Example(
        "StableAudioDiTModel",
        {**HEADS, "sample_size": 16, "in_channels": 8, "out_channels": 8, "num_layers": 2,
         "num_key_value_attention_heads": 2, "cross_attention_dim": 32, "time_proj_dim": 16,
         "global_states_input_dim": 20, "cross_attention_input_dim": TEXT_WIDTH},
        {"hidden_states": Noise((IMAGES, 8, 16)), "timestep": PARTS,
         "encoder_hidden_states": PROMPT, "global_hidden_states": Noise((IMAGES, 1, 20)),
         "rotary_embedding": (Noise((17, 8)), Noise((17, 8)))}),
    Example(
        "StableAudio3DiTModel",
        {"io_channels": 8, "embed_dim": 32, "depth": 2, "num_heads": 2,
         "cond_token_dim": TEXT_WIDTH, "global_cond_dim": 20, "local_add_cond_dim": 6,
         "timestep_features_dim": 16, "ff_mult": 2.0, "num_memory_tokens": 4},
        {"hidden_states": Noise((IMAGES, 8, 16)), "timestep": PARTS,
         "encoder_hidden_states": PROMPT, "global_hidden_states": POOLED}),
    Example(
        "LongCatAudioDiTTransformer",
        {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": TEXT_WIDTH,
         "latent_dim": 8, "text_conv": False, "ff_mult": 2.0},
        {"hidden_states": AUDIO, "encoder_hidden_states": PROMPT,
         "encoder_attention_mask": BOOLEAN_MASK, "timestep": PARTS,
         "attention_mask": ones(IMAGES, 16, dtype=torch.bool), "latent_cond": AUDIO}),
    Example(
        "MiniMaxMusic3Transformer1DModel",
        {**HEADS, "in_channels": 8, "condition_dim": TEXT_WIDTH, "num_layers": 2,
         "ff_inner_dim": 48, "rotary_dim": 8, "fourier_embedding_dim": 16},
        {"hidden_states": Noise((IMAGES, 8, 16)), "timestep": PARTS,
         "encoder_hidden_states": Noise((IMAGES, 16, TEXT_WIDTH))}),
    Example(
        "AceStepTransformer1DModel",
        {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "in_channels": 24,
         "audio_acoustic_hidden_dim": 8, "sliding_window": 8},
        {"hidden_states": AUDIO, "timestep": PARTS, "timestep_r": PARTS,
         "encoder_hidden_states": Noise((IMAGES, TEXT, 32)),
         "context_latents": Noise((IMAGES, 16, 16))}),
)
