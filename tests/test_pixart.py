"""PixArt-Emoji: its words, its parts trained as one, and its folder through diffusers."""
import numpy as np
import pytest
import torch
from PIL import Image

from errors import UserError
from examples.emoji import pixart
from examples.emoji import prompts as sheet
from examples.emoji.autoencoder import build_autoencoder
from examples.emoji.data import drawn_emoji


@pytest.fixture(scope="module")
def prompts():
    return pixart.prompts_of(drawn_emoji())


@pytest.fixture(scope="module")
def tokenizer(prompts):
    return pixart.build_tokenizer(pixart.words_of(prompts))


@pytest.fixture(scope="module")
def model(tokenizer):
    """Return parts with random weights."""
    torch.manual_seed(0)
    model = pixart.TextToNoise(
        pixart.build_text_encoder(len(tokenizer)), pixart.build_transformer())
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.1)
    return model.eval()


def test_a_prompt_becomes_its_words_and_an_end(tokenizer):
    ids = tokenizer("my RED-Apple, quixotic!").input_ids
    words = tokenizer.convert_ids_to_tokens(ids)
    assert words == [pixart.UNKNOWN, "red", "apple", pixart.UNKNOWN, pixart.END]
    # As T5 has them, which masks by zero.
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)


def test_every_word_of_the_names_is_known(tokenizer, prompts):
    tokens = pixart.all_tokens(tokenizer, prompts)
    assert tokens.shape[:2] == (459, 3) and tokens.shape[2] <= pixart.LONGEST_PROMPT
    assert not (tokens == tokenizer.unk_token_id).any()
    # The third prompt is empty: an end and nothing else.
    assert (tokens[:, 2, 0] == 1).all() and (tokens[:, 2, 1:] == 0).all()


def test_prompts_are_drawn_of_the_emoji_that_was_picked(tokenizer, prompts):
    torch.manual_seed(0)
    tokens = pixart.all_tokens(tokenizer, prompts)
    # Of some emoji the short name is the name.
    differ = (tokens[:, 0] != tokens[:, 1]).any(1).nonzero()[:, 0]
    pick = differ[torch.randint(len(differ), (1000,))]
    drawn = pixart.draw_tokens(tokens, pick)
    assert (drawn != 0).any(0).all()  # no column is all padding
    width = drawn.shape[1]
    matches = (drawn[:, None] == tokens[pick][:, :, :width]).all(2)  # (1000, kinds)
    assert (matches.sum(1) == 1).all()
    assert torch.allclose(matches.float().mean(0), torch.tensor(pixart.KINDS), atol=0.08)


def test_padding_changes_nothing(model, tokenizer):
    x, t = torch.randn(2, 4, 16, 16), torch.tensor([10, 900])
    texts = ["red apple", "red apple"]
    short = tokenizer(texts, return_tensors="pt").input_ids
    padded = tokenizer(texts, padding="max_length", return_tensors="pt").input_ids
    assert padded.shape[1] == pixart.LONGEST_PROMPT > short.shape[1]
    with torch.no_grad():
        assert torch.allclose(model(x, t, short), model(x, t, padded), atol=1e-5)


def test_the_folder_that_is_written_is_a_pipeline_of_diffusers(model, tokenizer, tmp_path):
    pixart.save_pipeline(build_autoencoder(), tokenizer, model, tmp_path)
    pipeline = pixart.load_pipeline(tmp_path)
    assert type(pipeline).__name__ == "PixArtAlphaPipeline"
    assert {part.dtype for part in (
        pipeline.transformer, pipeline.text_encoder, pipeline.vae)} == {torch.float32}
    draw = [pixart.draw_prompts(pipeline, ["red apple", "lion"], seed, steps=2)
            for seed in (0, 0, 1)]
    assert draw[0].shape == (2, 64, 64, 3)
    assert np.array_equal(draw[0], draw[1]) and not np.array_equal(draw[0], draw[2])
    # An image does not depend on the prompts beside it.
    alone = pixart.draw_prompts(pipeline, ["red apple"], 0, steps=2)
    assert np.abs(alone[0].astype(int) - draw[0][0]).max() <= 1


def test_a_folder_that_is_no_pipeline_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="expected a folder that PixArtAlphaPipeline saved"):
        pixart.load_pipeline(tmp_path)


def test_the_bundled_pipeline_draws_what_it_is_told():
    size = sum(path.stat().st_size for path in pixart.FOLDER.rglob("*.safetensors"))
    transformer = pixart.FOLDER / "transformer/diffusion_pytorch_model.safetensors"
    assert transformer.stat().st_size <= 10e6 and size <= 16e6
    pipeline = pixart.load_pipeline()
    red, blue = pixart.draw_prompts(
        pipeline, ["heavy black heart", "blue heart"], steps=20)[:, 24:40, 24:40].mean((1, 2))
    assert red[0] > red[2] + 50 and blue[2] > blue[0] + 50


def test_prompts_from_the_command_line_become_a_picture(tmp_path):
    path = tmp_path / "new" / "picture.png"
    parser = sheet.make_parser()
    sheet.main(parser.parse_args(["red apple", "blue apple", "--steps", "2", "--out", str(path)]))
    width, height = Image.open(path).size
    assert width > height > 64
