"""Golden values recorded from the published implementations, and small models that tests share."""
import os
import tempfile
from pathlib import Path

if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    # make test: the cores are shared among the workers, since two processes with all of them crawl.
    # A number that was asked for stays, as in make test-processors.
    share = max(1, (os.cpu_count() or 1) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    os.environ.setdefault("OMP_NUM_THREADS", str(share))
if "ATEN_CPU_CAPABILITY" in os.environ:
    # PyTorch's cache of compiled code hands out that of another instruction set, which then fails
    # to build.
    cache = f"torchinductor-{os.getuid()}-{os.environ['ATEN_CPU_CAPABILITY']}"
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", os.path.join(tempfile.gettempdir(), cache))
if not Path("/dev/nvidia0").exists():
    # Kernels run under Triton's interpreter. It is read when triton is imported: torch may do that.
    os.environ["TRITON_INTERPRET"] = "1"

import hypothesis
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from architectures.registry import architecture_of
from architectures.sites import linears_of, modulations
from cards import DiT_models
from cli.memory import keep_freed_memory
from cli.parser import run
from config import RECIPES, Recipe
from diffusion import ImageNoise, make_schedule, sample_loop
from diffusion.generate import guided_drive
from download import load_model
from models import DiT
from quant import checkpoint
from quant.calibration.trajectory import Drive

GOLDEN = Path(__file__).parent / "golden"
LATENT_SHAPE = (4, 8, 8)
GUIDANCE = 1.5

# As the scripts do.
keep_freed_memory()
# A busy machine is not a failure.
hypothesis.settings.register_profile("untimed", deadline=None)
hypothesis.settings.load_profile("untimed")


def relative(value: Tensor, expected) -> float:
    """Return ``|value - expected| / |expected|``."""
    if not isinstance(expected, Tensor):
        expected = torch.as_tensor(np.asarray(expected))
    return float((value.double() - expected.double()).norm() / expected.double().norm())


def golden(name: str) -> dict[str, np.ndarray]:
    """Load recorded arrays by name."""
    with np.load(GOLDEN / f"{name}.npz") as file:
        return dict(file)


def golden_model() -> DiT:
    """Build the model whose tensors and outputs were recorded."""
    shape = {}
    state = {}
    for key, value in golden("dit").items():
        kind, _, name = key.partition("/")
        if kind == "cfg":
            shape[name] = int(value)
        elif kind == "sd":
            state[name] = torch.tensor(value)
    model = DiT(**shape)
    model.load_state_dict(state)
    return model.eval()


def scope_linears(model: nn.Module, scope: str) -> dict[str, nn.Module]:
    """Find the linears that a scope quantises, by name, in the order of a forward pass."""
    names = linears_of(architecture_of(model).sites(model, scope))
    return {name: model.get_submodule(name) for name in names}


def block_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Find the linears of attention and MLP in every block."""
    return scope_linears(model, "blocks")


def modulation_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Find the linears that give the blocks' LayerNorms their shift and scale."""
    names = linears_of(modulations(architecture_of(model).sites(model, "adaln")))
    return {name: model.get_submodule(name) for name in names}


def replayed(noise: np.ndarray):
    """Make a ``draw`` that hands out recorded noise (steps, N, C, H, W) in order."""
    draws = iter(noise)
    return lambda: torch.tensor(next(draws))


def sample(*args) -> Tensor:
    """Return the final latents of ``sample_loop``, whose arguments these are."""
    return list(sample_loop(*args))[-1]


# Begun last, they would run alone while the other workers are done.
LONGEST = ("test_survival", "test_whole_pipelines")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the files that take longest."""
    items.sort(key=lambda item: item.path.stem not in LONGEST)


def random_model(seed: int = 0, **kwargs) -> DiT:
    """Make a small DiT whose every tensor is random."""
    torch.manual_seed(seed)
    small = {"input_size": 8, "hidden_size": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
    return randomise(DiT(**{**small, **kwargs}))


# The same widths in diffusers' words.
DIFFUSERS_SHAPE = {
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "patch_size": 2,
}
# PixArt reads text of five tokens.
TEXT_TOKENS, TEXT_WIDTH = 5, 24


def random_diffusers_dit() -> nn.Module:
    """Make diffusers' DiT, small and random."""
    from diffusers import DiTTransformer2DModel
    model = DiTTransformer2DModel(**DIFFUSERS_SHAPE, num_embeds_ada_norm=10)
    torch.manual_seed(0)
    return randomise(model)


def random_pixart(**changes) -> nn.Module:
    """Make diffusers' PixArt, small and random; ``changes`` override its configuration."""
    from diffusers import PixArtTransformer2DModel
    small = {
        **DIFFUSERS_SHAPE,
        "cross_attention_dim": 64,
        "caption_channels": TEXT_WIDTH,
        "use_additional_conditions": False,
    }
    model = PixArtTransformer2DModel(**{**small, **changes})
    torch.manual_seed(0)
    return randomise(model)


def randomise(model: nn.Module) -> nn.Module:
    """Draw every parameter that can learn anew, those of modulation and output included."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.08)
    return model.eval()


def bundled_digits(depth: int | None = None) -> DiT:
    """Load the trained model of this repository, or its first blocks alone."""
    model = load_model("DiT-Digits", DiT_models["DiT-Digits"], 16, 10, None, torch.device("cpu"))
    model.blocks = model.blocks[:depth]
    return model


def noise_drive(steps: int, labels: Tensor) -> Drive:
    """Make a drive that samples latents of these labels from noise, with guidance."""
    noise = ImageNoise(0, range(len(labels)), LATENT_SHAPE, labels.device)
    return guided_drive(make_schedule(str(steps)), noise(), noise, labels, GUIDANCE)


def checkpoint_header(recipe_name: str, recipe: Recipe | None = None, **fields):
    """Make the header of a W4A8 checkpoint of the bundled model's shape; ``fields`` override."""
    defaults = {
        "model": "DiT-Digits",
        "image_size": 16,
        "num_classes": 10,
        "weight_bit": 4,
        "act_bit": 8,
        "recipe_name": recipe_name,
        "recipe": recipe or RECIPES[recipe_name],
        "seed": 0,
        "num_sampling_steps": "2",
        "svd": "fast",
        "alphas": {},
    }
    return checkpoint.Header(**{**defaults, **fields})


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def call(script, *argv) -> None:
    """Run a script (its module) with a command line, in this process.

    Starting one takes longer than most of what is tested.
    """
    threads = torch.get_num_threads()
    try:
        run(script.main, script.make_parser(), [str(word) for word in argv])
    finally:
        torch.set_num_threads(threads)


def error_line(capsys, call) -> str:
    """Return the one line that a wrong command line leaves on stderr, progress bars aside.

    Its exit status is 2.
    """
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        call()
    assert caught.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    lines = [line for line in lines if not is_progress(line)]
    assert len(lines) == 1, lines
    return lines[0]


def is_progress(line: str) -> bool:
    """Tell whether a line is a progress bar's, or the empty one behind a bar of diffusers."""
    rates = ("it/s", "s/it", "image/s")
    is_bar = any(rate in line for rate in rates) or "step" in line.split(":")[0]
    return not line.strip() or is_bar
