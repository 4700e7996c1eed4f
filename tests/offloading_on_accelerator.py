"""A model on the CPU whose inputs are on a pretended accelerator: its blocks go there, one a time.

Run by ``test_devices.py`` in a process of its own.
"""
import gc
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import partial

import pytest
import torch
from accelerator import MEMORY, accelerator
from diffusers import AutoModel, DiffusionPipeline
from diffusers.hooks import apply_group_offloading
from test_hand_over import emoji_pipeline
from test_pipelines import PLAIN, WORDS, name_the_tokenizer
from tiny_pipelines import PIPELINES, flux
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import ditas
from architectures.sites import Call
from benchmarks.memory import calls, random_pixart
from cli.pipelines import run_from_the_cpu
from config import RECIPES
from evaluation.metrics import sqnr_db
from quant.streaming import following

CPU = torch.device("cpu")
WIDTH, DEPTH = 64, 4

# Search, sequential Hessian, codes or rounding that are learned, operands, group sizes: all that
# looks at a model.
FLAGS = {
    "rtn": {},
    "ditas": {"group_size": 32, "lowrank": 4},
    "ditas-tuned": {"group_size": 32, "lowrank": 4, "hessian": "sequential", "tune": 2},
    "ptq4dit": {"iterations": 2},
    "qdit": {"group_sizes": "32,64", "population": 2, "generations": 1},
}
# Those that look at what copies of the model give, and keep it.
COPYING = ("ditas-tuned", "ptq4dit", "qdit")


@pytest.fixture(scope="module")
def device() -> torch.device:
    return accelerator()[0]


@pytest.fixture(autouse=True)
def same_attention():
    """Let both ways take the same kernel: a code at a rounding tie would turn."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Make every step short, and keep samples small beside the weights."""
    for name in ("sample_images", "reconstruction_samples", "hessian_images"):
        monkeypatch.setattr(f"config.{name}", 4)
    monkeypatch.setattr("config.sample_tokens", 32)
    for name in ("ditas", "ditas-tuned"):
        recipe = replace(RECIPES[name], rounds=1)
        alphas = (0.1, 0.9) if len(recipe.alphas) > 1 else recipe.alphas
        monkeypatch.setitem(RECIPES, name, replace(recipe, alphas=alphas))


def nbytes(*modules: nn.Module) -> int:
    return sum(value.nbytes for module in modules for value in module.parameters())


def quantised(home: torch.device, device: torch.device, recipe: str, depth: int) -> tuple:
    """Quantise a model that lies at home while its inputs are on the device.

    Returns:
        The model, and the most bytes that were on the device.
    """
    gc.collect()
    before = MEMORY.used
    model = random_pixart(WIDTH, depth, torch.float32, head=32).to(home)
    inputs = [on(device, call) for call in calls(torch.float32)]
    MEMORY.forget_peak()
    ditas.quantize(model, lambda: [model(**call) for call in inputs], recipe, backend="fake",
                   **FLAGS[recipe])
    return model, MEMORY.peak - before


def on(device: torch.device, call: Call) -> Call:
    return pytree.tree_map_only(torch.Tensor, lambda value: value.to(device), call)


def check_equal(model: nn.Module, expected: nn.Module) -> None:
    tensors, wanted = model.state_dict(), expected.state_dict()
    assert tensors.keys() == wanted.keys()
    for name, value in wanted.items():
        assert tensors[name].device == CPU
        assert torch.equal(tensors[name], value.to(CPU)), name


@pytest.mark.parametrize("recipe", FLAGS)
def test_blocks_come_one_at_a_time_and_give_the_same_codes(device, recipe):
    depth = 2 if recipe in COPYING else DEPTH
    expected, beside_whole = quantised(device, device, recipe, depth)
    model, peak = quantised(CPU, device, recipe, depth)
    check_equal(model, expected)
    if recipe in COPYING:
        return
    whole = random_pixart(WIDTH, depth, torch.float32, head=32)
    block, blocks = nbytes(whole.transformer_blocks[0]), nbytes(whole.transformer_blocks)
    rest = nbytes(whole) - blocks
    # What is there of weights is a block, what lies outside the blocks, and one weight's copy.
    assert peak <= beside_whole - nbytes(whole) + 1.5 * block + rest
    assert peak < beside_whole - 0.5 * nbytes(whole)


@pytest.mark.parametrize("make, arguments", [
    (emoji_pipeline, PLAIN), (flux, PIPELINES["Flux"][1])])
def test_a_pipeline_calibrates_from_the_cpu(device, make, arguments):
    def sampling(pipeline) -> Callable[[], None]:
        pipeline.set_progress_bar_config(disable=True)
        generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
        return lambda: pipeline(WORDS[:2], generator=generators, output_type="latent",
                                num_inference_steps=2, **arguments)

    pipelines = []
    for _ in range(2):
        torch.manual_seed(0)
        pipelines.append(make())
    whole, parted = pipelines
    for part in whole.components.values():
        if isinstance(part, nn.Module):
            part.to(device)
    ditas.quantize(whole.transformer, sampling(whole), "smoothquant", backend="fake")
    run_from_the_cpu(parted, "transformer", device)
    ditas.quantize(parted.transformer, sampling(parted), "smoothquant", backend="fake")
    check_equal(parted.transformer, whole.transformer)


class Scaled(nn.Module):
    """A block that may fail."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.isnan().any():
            raise ArithmeticError
        return x * self.weight


def test_what_came_goes_whatever_happens(device):
    model = nn.Sequential(Scaled(), Scaled())
    parameters = list(model.parameters())
    x = torch.ones(3)
    with following(model, ["0", "1"]):
        assert model(x.to(device)).device == device
        assert model(x).device == CPU
        with pytest.raises(ArithmeticError):
            model((x * float("nan")).to(device))
        with torch.enable_grad():
            model(x.to(device)).sum().backward()
        assert all(map(lambda new, old: new is old, model.parameters(), parameters))
    # Gradients reach what lies on the CPU.
    assert all(torch.equal(value.grad, x) for value in parameters)
    with pytest.raises(RuntimeError):
        model(x.to(device))


# A quantised pipeline on the device.

@pytest.fixture(scope="module")
def emoji():
    """Quantise a pipeline whose blocks' vectors are divided on their way in; it is to be copied."""
    pipeline = emoji_pipeline()
    drive = partial(latents, pipeline)
    ditas.quantize(pipeline.transformer, drive, "smoothquant", backend="fake")
    return pipeline


@pytest.fixture(scope="module")
def folder(emoji, tmp_path_factory):
    path = tmp_path_factory.mktemp("quantised")
    emoji.save_pretrained(path)
    name_the_tokenizer(path)
    return path


@torch.no_grad()
def latents(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(WORDS[0], generator=generator, output_type="latent", num_inference_steps=2,
                    **PLAIN)[0]


def check_latents(pipeline, expected: torch.Tensor, device: torch.device) -> None:
    for _ in range(2):
        # Linears are expanded by the first call, and moved before the second.
        given = latents(pipeline)
        assert given.device == device
        assert sqnr_db(expected, given.to(CPU)) > 60


def send_whole(pipeline, device: torch.device) -> None:
    pipeline.to(device)


def send_models(pipeline, device: torch.device) -> None:
    pipeline.enable_model_cpu_offload(device=device)


def send_groups(pipeline, device: torch.device) -> None:
    for part in (pipeline.text_encoder, pipeline.transformer, pipeline.vae):
        apply_group_offloading(part, onload_device=device, num_blocks_per_group=1)


def send_parts(pipeline, device: torch.device) -> None:
    """As where another part of the pipeline is quantised from the CPU."""
    run_from_the_cpu(pipeline, "transformer_2", device)


@pytest.mark.parametrize("is_loaded", [False, True])
@pytest.mark.parametrize("send", [send_whole, send_models, send_groups, send_parts])
def test_a_quantised_pipeline_runs_where_diffusers_sends_it(
    device, emoji, folder, send, is_loaded
):
    expected = latents(deepcopy(emoji))
    pipeline = DiffusionPipeline.from_pretrained(folder) if is_loaded else deepcopy(emoji)
    send(pipeline, device)
    check_latents(pipeline, expected, device)


def test_a_quantised_folder_is_loaded_onto_a_device(device, emoji, folder):
    transformer = AutoModel.from_pretrained(f"{folder}/transformer", device_map={"": str(device)})
    assert {value.device for value in transformer.parameters()} == {device}
    pipeline = DiffusionPipeline.from_pretrained(folder, transformer=transformer)
    for part in (pipeline.text_encoder, pipeline.vae):
        part.to(device)
    check_latents(pipeline, latents(deepcopy(emoji)), device)


def test_a_quantised_part_is_on_the_device_only_while_it_runs(device, emoji):
    pipeline = deepcopy(emoji)
    gc.collect()
    before = MEMORY.used
    send_parts(pipeline, device)
    latents(pipeline)
    gc.collect()
    expanded = sum(value.nbytes for value in pipeline.transformer.buffers())
    assert MEMORY.used - before < 0.05 * expanded
