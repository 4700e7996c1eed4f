"""PixArt-Emoji: a text-to-image pipeline of diffusers that draws emoji from their names.

A word-level tokenizer, a small T5 encoder and PixArt's transformer (Chen et al., 2023), the last
two trained together; the VAE is DiT-Emoji's.
"""
import json
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from cli.call_arguments import write as write_call
from errors import UserError
from examples.emoji.autoencoder import LATENT_CHANNELS
from examples.emoji.data import Emoji

FOLDER = Path(__file__).with_name("pixart")
BLOCKS = 7
HEADS = 6
HEAD_WIDTH = 32
TEXT_WIDTH = 128
LONGEST_PROMPT = 24      # tokens
# Of every ten prompts in training: six are the name, three the short names, one is empty.
KINDS = (0.6, 0.3, 0.1)
# How the pipeline is called: the last two are for models of 256 pixels and captions from the web.
CALL = {"num_inference_steps": 25, "use_resolution_binning": False, "clean_caption": False}
PAD, END, UNKNOWN = "<pad>", "</s>", "<unk>"


def prompts_of(emoji: Emoji) -> list[tuple[str, str, str]]:
    """List what each emoji is called: name, short names, nothing (learned for guidance)."""
    pairs = zip(emoji.names.tolist(), emoji.keywords.tolist())
    return [(name, keywords, "") for name, keywords in pairs]


def words_of(prompts: list[tuple[str, str, str]]) -> list[str]:
    """Return the words of all prompts, sorted."""
    text = " ".join(" ".join(prompt) for prompt in prompts).lower()
    return sorted(set(re.findall(r"\w+", text)))


def build_tokenizer(words: list[str]):
    """Make a tokenizer that has a number for each word; others are unknown."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    vocabulary = {word: number for number, word in enumerate([PAD, END, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    # Words and nothing else: "face-with-tears" is three of them.
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"\w+"), behavior="removed", invert=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {END}", special_tokens=[(END, vocabulary[END])])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, unk_token=UNKNOWN,
        model_max_length=LONGEST_PROMPT)


def build_text_encoder(words: int) -> nn.Module:
    """Make T5's encoder for a vocabulary of ``words``, with random weights."""
    from transformers import T5Config, T5EncoderModel
    return T5EncoderModel(T5Config(
        vocab_size=words, d_model=TEXT_WIDTH, d_kv=32, d_ff=2 * TEXT_WIDTH, num_layers=2,
        num_heads=4, dropout_rate=0.0, feed_forward_proj="gated-gelu", pad_token_id=0,
        eos_token_id=1))


def build_transformer() -> nn.Module:
    """Make PixArt's transformer with random weights (4.5 M parameters)."""
    from diffusers import PixArtTransformer2DModel
    model = PixArtTransformer2DModel(
        num_attention_heads=HEADS,
        attention_head_dim=HEAD_WIDTH,
        cross_attention_dim=HEADS * HEAD_WIDTH,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=BLOCKS,
        sample_size=16,
        patch_size=4,
        caption_channels=TEXT_WIDTH,
    )
    # Like DiT's: the model begins as one that predicts zero.
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    return model


class TextToNoise(nn.Module):
    """Text encoder and transformer, trained as one: (latents, timesteps, tokens) to noise."""

    def __init__(self, text_encoder: nn.Module, transformer: nn.Module):
        super().__init__()
        self.text_encoder = text_encoder
        self.transformer = transformer

    def forward(self, x: Tensor, t: Tensor, tokens: Tensor) -> Tensor:
        """Predict noise and variance.

        Args:
            x: noised latents (N, 4, 16, 16).
            t: timesteps (N,).
            tokens: (N, L) int64, padded with zeros.
        """
        mask = (tokens != 0).long()
        text = self.text_encoder(tokens, attention_mask=mask)[0]
        return self.transformer(
            x, encoder_hidden_states=text, encoder_attention_mask=mask, timestep=t,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None}, return_dict=False)[0]


def all_tokens(tokenizer, prompts: list[tuple[str, str, str]]) -> Tensor:
    """Turn the prompts of every emoji into tokens (N, kinds, L) int64, padded with zeros."""
    flat = [text for kinds in prompts for text in kinds]
    ids = tokenizer(flat, padding="longest", return_tensors="pt").input_ids
    return ids.view(len(prompts), len(KINDS), -1)


def draw_tokens(tokens: Tensor, pick: Tensor) -> Tensor:
    """Pick a prompt at random for each of the emoji ``pick`` (B,); returns tokens (B, L)."""
    kind = torch.multinomial(torch.tensor(KINDS), len(pick), replacement=True)
    chosen = tokens[pick, kind]
    longest = int((chosen != 0).sum(1).max())
    return chosen[:, :longest]


def make_pipeline(vae: nn.Module, tokenizer, model: TextToNoise):
    """Put the parts together as the pipeline that diffusers knows."""
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline
    scheduler = DPMSolverMultistepScheduler(
        num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    return PixArtAlphaPipeline(
        tokenizer=tokenizer, text_encoder=model.text_encoder, vae=vae,
        transformer=model.transformer, scheduler=scheduler)


def save_pipeline(vae: nn.Module, tokenizer, model: TextToNoise, folder: Path) -> None:
    """Write the pipeline's folder, VAE and transformer as float16.

    The text encoder stays float32: transformers would compute in the type that it was stored in.
    """
    vae.half()
    model.transformer.half()
    make_pipeline(vae, tokenizer, model).save_pretrained(folder)
    # The tokenizer's class has this name in all versions of transformers.
    index = folder / "model_index.json"
    entries = json.loads(index.read_text())
    entries["tokenizer"] = ["transformers", "PreTrainedTokenizerFast"]
    index.write_text(json.dumps(entries, indent=2) + "\n")
    write_call(folder, CALL)


def load_pipeline(folder: Path = FOLDER):
    """Load the pipeline in float32 (the transformer is stored as float16).

    Raises:
        UserError: the folder is missing or damaged.
    """
    from diffusers import PixArtAlphaPipeline
    try:
        return PixArtAlphaPipeline.from_pretrained(folder, local_files_only=True)
    # The loaders raise types of several libraries.
    except Exception as error:
        raise UserError(
            f"cannot load the pipeline from '{folder}' ({type(error).__name__}): expected a folder "
            "that PixArtAlphaPipeline saved; train it, as docs/emoji.md says") from None


@torch.no_grad()
def draw_prompts(
    pipeline,
    prompts: list[str],
    seed: int = 0,
    steps: int = 25,
    guidance_scale: float = 4.5,
) -> np.ndarray:
    """Draw one image per prompt, uint8 (N, 64, 64, 3); noise is seeded by the prompt's place."""
    generators = [torch.Generator().manual_seed(seed + place) for place in range(len(prompts))]
    arguments = {**CALL, "num_inference_steps": steps, "guidance_scale": guidance_scale}
    images = pipeline(prompts, generator=generators, output_type="np", **arguments).images
    return (images * 255).round().astype(np.uint8)
