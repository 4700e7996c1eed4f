"""``--export diffusers``: a checkpoint as a folder, which samples what the checkpoint does."""
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import call, error_line
from test_hand_over import in_a_fresh_process

import ditas
import QuantDiT
import sample_merge_TAS
from diffusion import ImageNoise
from ditas.scheduler import PUBLISHED, DitasDDPMScheduler
from ditas.switching import switch_backend
from models import GUIDED_CHANNELS
from quant import checkpoint

LABELS = [3, 0, 7]
STEPS, SEED, GUIDANCE = 6, 5, 4.0


@pytest.fixture(autouse=True)
def _in_a_fresh_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """Write a checkpoint of DiT-Digits and its folder; they are not to be changed."""
    folder = tmp_path_factory.mktemp("export")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call(QuantDiT, "--model", "DiT-Digits-Outliers", "--recipe", "smoothquant",
             "--adaln-weight-bit", "8", "--num-sampling-steps", "2", "--class-labels", "3,7",
             "--output", "digits", "--export", "diffusers")
    return folder / "digits.safetensors", folder / "digits-diffusers"


def load(folder: Path):
    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sampled_files(path: Path) -> np.ndarray:
    """Sample with sample_merge_TAS.py: (N, H, W, 3) uint8."""
    call(sample_merge_TAS, "--path", path, "--num-fid-samples", len(LABELS), "--class-labels",
         ",".join(map(str, LABELS)), "--num-sampling-steps", STEPS, "--global-seed", SEED,
         "--cfg-scale", GUIDANCE, "--per-proc-batch-size", len(LABELS), "--backend", "fake")
    return np.load(next(Path("samples").glob("*.npz")))["arr_0"]


def draw_as_ours(monkeypatch, shape: tuple[int, ...]) -> None:
    """Let a pipeline draw the noise that sample_merge_TAS.py gives these images."""
    noise = ImageNoise(SEED, range(len(LABELS)), shape)
    for place in ("ditas.dit", "ditas.scheduler"):
        monkeypatch.setattr(f"{place}.randn_tensor", lambda *args, **kwargs: noise())


# At 8 bits a value that is rounded elsewhere gets another code, and the image is another one.
@pytest.mark.parametrize("name, shape, recipe", [
    ("DiT-Digits-Outliers", (4, 8, 8), "smoothquant"),
    ("DiT-Emoji-Outliers", (4, 16, 16), "ditas-plus"),
])
def test_a_folder_draws_the_images_of_its_checkpoint(name, shape, recipe, monkeypatch):
    call(QuantDiT, "--model", name, "--recipe", recipe, "--class-labels", "1",
         "--num-sampling-steps", "2", "--output", "made")
    call(QuantDiT, "--path", "made", "--export", "diffusers", "--output", "folder")
    expected = sampled_files(Path("made.safetensors"))

    pipeline = load(Path("folder"))
    switch_backend(pipeline.transformer, "fake")
    draw_as_ours(monkeypatch, shape)
    images = pipeline(LABELS, guidance_scale=GUIDANCE, num_inference_steps=STEPS).images
    assert np.array_equal(np.stack(images), expected)

    draw_as_ours(monkeypatch, shape)
    values = pipeline(
        LABELS, guidance_scale=GUIDANCE, num_inference_steps=STEPS, output_type="np").images
    assert np.abs(values * 255 - expected[..., :values.shape[-1]]).max() <= 1
    assert expected.std() > 20


def test_its_transformer_computes_what_the_checkpoint_does(digits):
    path, folder = digits
    transformer = load(folder).transformer
    switch_backend(transformer, "fake")
    _, model = checkpoint.load(path, folded=True)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 8, generator=generator)
    t, labels = torch.tensor([700, 300, 20]), torch.tensor([1, 2, 10])
    assert torch.equal(transformer(x, t, labels), model(x, t, labels))


def test_ranges_per_timestep_and_operands_are_exported():
    call(QuantDiT, "--model", "DiT-Digits", "--recipe", "ptq4dm", "--act-steps", "each",
         "--attention", "uniform", "--num-sampling-steps", "3", "--class-labels", "3,7",
         "--output", "made")
    call(QuantDiT, "--path", "made", "--export", "diffusers", "--output", "folder")
    transformer = load(Path("folder")).transformer
    _, model = checkpoint.load(Path("made.safetensors"), folded=True)
    assert torch.equal(transformer.timestep_index.timesteps, model.timestep_index.timesteps)
    x, labels = torch.randn(3, 4, 8, 8), torch.tensor([1, 2, 10])
    for t in model.timestep_index.timesteps:
        assert torch.equal(transformer(x, t.expand(3), labels), model(x, t.expand(3), labels))


def test_codes_are_packed_and_embedders_are_there_once(digits):
    from safetensors.torch import load_file
    tensors = load_file(digits[1] / "transformer/diffusion_pytorch_model.safetensors")
    assert tensors["blocks.0.attn.qkv.weight"].dtype == torch.uint8
    assert tensors["blocks.0.attn.qkv.weight"].numel() == 3 * 128 * 128 // 2
    assert [key for key in tensors if key.endswith("t_embedder.mlp.2.weight")] == [
        "t_embedder.mlp.2.weight"]


def test_guidance_leaves_the_last_channel_alone(digits):
    pipeline = load(digits[1])
    x, labels = torch.randn(2, 4, 8, 8), torch.tensor([1, 2])
    t, none = torch.tensor(300), torch.full((2,), 10)
    guided = pipeline._predict(x, t, labels, 4.0)
    # Both halves in one batch, as guidance computes them: no code falls another way.
    with_label, without = pipeline.transformer(
        torch.cat([x, x]), t.expand(4), torch.cat([labels, none])).chunk(2)
    moved = without + 4 * (with_label - without)
    torch.testing.assert_close(guided[:, :GUIDED_CHANNELS], moved[:, :GUIDED_CHANNELS])
    assert torch.equal(guided[:, GUIDED_CHANNELS:], with_label[:, GUIDED_CHANNELS:])


@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_other_schedulers_sample(scheduler, digits):
    import diffusers
    pipeline = load(digits[1])
    kind = getattr(diffusers, scheduler)
    pipeline.scheduler = kind.from_config({**pipeline.scheduler.config, "variance_type": None})
    sample = [pipeline(LABELS, generator=torch.Generator().manual_seed(seed),
                       num_inference_steps=4, output_type="pt").images for seed in (1, 1, 2)]
    assert torch.equal(sample[0], sample[1])
    assert not torch.equal(sample[0], sample[2])


@pytest.mark.parametrize("changed, message", [
    ({"beta_end": 0.03}, "has beta_end 0.03, expected 0.02"),
    ({"prediction_type": "v_prediction"}, "has prediction_type 'v_prediction'"),
    ({"trained_betas": [0.1] * 1000}, "has trained_betas"),
])
def test_a_scheduler_of_another_schedule_is_refused(changed, message):
    scheduler = DitasDDPMScheduler(**PUBLISHED | changed)
    with pytest.raises(ValueError, match=message):
        scheduler.set_timesteps(4)


def test_a_timestep_of_another_run_is_refused():
    scheduler = DitasDDPMScheduler(**PUBLISHED)
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="timestep 500 is none of the 4"):
        scheduler.step(torch.zeros(1, 8, 8, 8), 500, torch.zeros(1, 4, 8, 8))


LOAD = """
import sys
import torch
import ditas
from diffusers import AutoModel, DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained(sys.argv[1])
images = pipeline([3, 0], num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images
print(type(pipeline).__name__, [image.size for image in images])
print(type(AutoModel.from_pretrained(sys.argv[1], subfolder="transformer")).__name__)
"""


def test_a_fresh_process_loads_it(digits):
    printed = in_a_fresh_process(LOAD, str(digits[1]))
    assert printed.split("\n")[:2] == ["DitasDiTPipeline [(16, 16), (16, 16)]", "DitasDiT"]


def test_a_folder_is_saved_again(digits, tmp_path):
    pipeline = load(digits[1])
    pipeline.save_pretrained(tmp_path / "again")
    for name in ("transformer", "vae"):
        file = f"{name}/diffusion_pytorch_model.safetensors"
        assert (tmp_path / "again" / file).read_bytes() == (digits[1] / file).read_bytes()


@pytest.mark.parametrize("argv, message", [
    (("--path", "{path}"), "add --export diffusers"),
    (("--path", "none", "--export", "diffusers"), "checkpoint 'none' does not exist"),
    (("--path", "{path}", "--export", "diffusers"), "digits-diffusers' is there already"),
    (("--path", "{path}", "--export", "diffusers", "--model", "DiT-Digits"),
     "--model is for quantising"),
    (("--path", "{path}", "--export", "diffusers", "--recipe", "rtn"),
     "--recipe is for quantising"),
    (("--path", "{path}", "--export", "diffusers", "--lowrank", "4"),
     "--lowrank is for quantising"),
    (("--path", "{path}", "--export", "diffusers", "--inspect"), "--inspect is for quantising"),
])
def test_a_mistake_is_one_line(argv, message, digits, capsys):
    words = [word.format(path=digits[0]) for word in argv]
    assert message in error_line(capsys, lambda: call(QuantDiT, *words))


def test_a_pipelines_folder_is_one_already(digits, capsys):
    line = error_line(
        capsys, lambda: call(QuantDiT, "--model", digits[1], "--export", "diffusers"))
    assert "--export is for the models of this repository" in line


def test_labels_of_checkpoints_are_read():
    from ditas.request import request_of_label
    request = request_of_label("qdit:group-sizes=32,64,population=4", 4, 8)
    assert request.recipe.group_sizes == (32, 64)
    assert request.recipe.population == 4
    with pytest.raises(ditas.UserError, match="recipe none is not available"):
        request_of_label("none", 4, 8)
