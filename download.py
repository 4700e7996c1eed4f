"""Finds, fetches and verifies weights; loads decoders and the networks that judge images.

Published DiT-XL/2 weights (CC BY-NC 4.0) come from the DiT authors' server or, with ``--ckpt FOLDER``, from a copy of the hub's
``facebook/DiT-XL-2-256`` (a diffusers ``DiTTransformer2DModel``). Nothing is ever unpickled beyond plain tensors.
"""
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from config import UserError
from evaluation.features import Extractor
from evaluation.fidelity import Perceptual
from models import DiT, ModelCard
from quant.files import sha256, weights_sha256

FOLDER = Path("pretrained_models")
PUBLISHED_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
VAE_SCALE = 0.18215  # latents are this many times what the VAE decodes


@dataclass(frozen=True)
class Decoder:
    """Turns latents (N, C, H, W) into images (N, 1 or 3, H', W') in [-1, 1]; ``name`` identifies it, weights included."""

    name: str
    run: Callable[[Tensor], Tensor]

    def __call__(self, latents: Tensor) -> Tensor:
        return self.run(latents)


def load_model(name: str, card: ModelCard, image_size: int, num_classes: int, ckpt: str | None, device: torch.device) -> DiT:
    """The float model in eval mode.

    Raises:
        UserError: image size and model do not fit, or the weights are missing, unreadable or of another model.
    """
    with torch.device("meta"):
        try:
            model = card.build(image_size, num_classes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    source, state = find_state_dict(name, image_size, ckpt)
    state.setdefault("pos_embed", model.pos_embed.data)  # fixed, and not in diffusers' files
    return load_into(model, state, source, f"{name} at {image_size} pixels and {num_classes} classes").to(device).eval()


def load_into(model: torch.nn.Module, state: dict[str, Tensor], source: str, wanted: str) -> torch.nn.Module:
    """Give a skeleton (on the meta device) its float32 tensors.

    Raises:
        UserError: names or shapes differ.
    """
    expected = model.state_dict()
    missing, surplus = expected.keys() - state.keys(), state.keys() - expected.keys()
    if missing or surplus:
        odd = f"lacks '{min(missing)}'" if missing else f"has the unexpected '{min(surplus)}'"
        raise UserError(f"'{source}' does not hold the weights of {wanted}: it {odd}; give matching --model, --image-size and weights")
    for key, value in expected.items():
        if state[key].shape != value.shape:
            raise UserError(f"'{source}' does not hold the weights of {wanted}: '{key}' is {tuple(state[key].shape)}, "
                            f"expected {tuple(value.shape)}; give matching --model, --image-size and weights")
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model


def find_state_dict(name: str, image_size: int, ckpt: str | None) -> tuple[str, dict[str, Tensor]]:
    """Where the weights came from, and the weights."""
    if ckpt is not None:
        return ckpt, read_state_dict(Path(ckpt))
    if name == "DiT-Digits":
        from examples.digits.outliers import plain_weights
        return "examples/digits", plain_weights()
    if name == "DiT-Digits-Outliers":
        from examples.digits.outliers import outlier_weights
        return "examples/digits", outlier_weights()
    if name != "DiT-XL/2":
        raise UserError(f"there are no published weights of {name}: give a file with --ckpt")
    path = FOLDER / f"DiT-XL-2-{image_size}x{image_size}.pt"
    if not path.exists():
        fetch(PUBLISHED_URL + path.name, path, "--ckpt")
    return str(path), read_state_dict(path)


def fetch(url: str, path: Path, flag: str | None = None, sha256_prefix: str | None = None) -> None:
    """Download to a temporary name, then rename; shows a progress bar.

    Args:
        flag: the command-line flag that takes such a file, if one does.
        sha256_prefix: how the SHA-256 of what arrives has to begin.

    Raises:
        UserError: the download failed; says where to put the file by hand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    alternative = f", or give one with {flag}" if flag else ""
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix)
    except (OSError, RuntimeError) as error:
        raise UserError(f"cannot download {url} ({error}): put the file at '{path}' by hand{alternative}") from None


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Weights by published name from a .pt or .safetensors file or a diffusers folder; the ``ema`` entry if there is one.

    Raises:
        UserError: missing, truncated, or holding anything but tensors.
    """
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        found = [folder / f"diffusion_pytorch_model{end}" for end in (".safetensors", ".bin")]
        path = next((file for file in found if file.is_file()), found[0])
    if not path.is_file():
        raise UserError(f"weights '{path}' do not exist: give a .pt or .safetensors file, or a diffusers folder")
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        raise UserError(f"cannot read weights '{path}': truncated, or not a file of plain tensors ({type(error).__name__})") from None
    if isinstance(state, dict) and isinstance(state.get("ema"), dict):
        state = state["ema"]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"'{path}' holds no weights: expected tensors by name, or such a table under 'ema'")
    return convert_diffusers(state) if "proj_out_2.weight" in state else state


_DIFFUSERS = (
    (r"pos_embed\.proj\.", "x_embedder.proj."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_1\.", "t_embedder.mlp.0."),
    (r"transformer_blocks\.0\.norm1\.emb\.timestep_embedder\.linear_2\.", "t_embedder.mlp.2."),
    (r"transformer_blocks\.0\.norm1\.emb\.class_embedder\.embedding_table\.", "y_embedder.embedding_table."),
    (r"transformer_blocks\.(\d+)\.norm1\.linear\.", r"blocks.\1.adaLN_modulation.1."),
    (r"transformer_blocks\.(\d+)\.attn1\.to_out\.0\.", r"blocks.\1.attn.proj."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj\.", r"blocks.\1.mlp.fc1."),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2\.", r"blocks.\1.mlp.fc2."),
    (r"proj_out_1\.", "final_layer.adaLN_modulation.1."),
    (r"proj_out_2\.", "final_layer.linear."),
)


def convert_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a diffusers ``DiTTransformer2DModel``.

    Its per-block copies of the embedders are one, and it does not store the fixed position embedding.
    """
    converted = {}
    for key, value in state.items():
        for pattern, name in _DIFFUSERS:
            renamed, count = re.subn("^" + pattern, name, key)
            if count:
                converted[renamed] = value
                break
        else:
            if match := re.fullmatch(r"transformer_blocks\.(\d+)\.attn1\.to_q\.(weight|bias)", key):
                block, kind = match.groups()
                parts = [state[f"transformer_blocks.{block}.attn1.to_{part}.{kind}"] for part in "qkv"]
                converted[f"blocks.{block}.attn.qkv.{kind}"] = torch.cat(parts)
    return converted


def load_decoder(card: ModelCard, vae: str, device: torch.device) -> Decoder:
    """What turns latents into images.

    Raises:
        UserError: the VAE's weights cannot be had; says where to put them by hand.
    """
    if card.decoder == "digits":
        from examples.digits.data import decode
        return Decoder("digits", decode)
    from diffusers.models import AutoencoderKL
    local = FOLDER / f"sd-vae-ft-{vae}"
    source = str(local) if local.is_dir() else f"stabilityai/sd-vae-ft-{vae}"
    try:
        model = AutoencoderKL.from_pretrained(source).to(device).eval()
    except Exception as error:  # the hub client raises types of several libraries
        raise UserError(f"cannot load the VAE from '{source}' ({type(error).__name__}): put config.json and "
                        f"diffusion_pytorch_model.safetensors into '{local}' by hand") from None
    return Decoder(f"vae-{vae}-{weights_sha256(model)[:16]}", lambda latents: model.decode(latents / VAE_SCALE).sample)


FEATURES = ("inception", "digits")


def load_extractor(kind: str, weights: str | None, device: torch.device) -> Extractor:
    """The network that judges images: a value of ``FEATURES``; ``weights`` overrides the fetched file of ``inception``.

    Raises:
        UserError: its weights cannot be had, or are not the published ones.
    """
    if kind == "digits":
        from examples.digits.classifier import digits_extractor
        return digits_extractor(device)
    from evaluation.inception import SHA256, URL, build_network, inception_extractor
    path = Path(weights) if weights is not None else FOLDER / URL.rsplit("/", 1)[1]
    if weights is None and not path.exists():
        fetch(URL, path, "--inception", SHA256)
    if not path.is_file():
        raise UserError(f"Inception weights '{path}' do not exist: give {URL.rsplit('/', 1)[1]} (from {URL})")
    found = sha256(path)
    if found != SHA256:
        raise UserError(f"'{path}' has SHA-256 {found[:16]}…, expected {SHA256[:16]}…: give {URL.rsplit('/', 1)[1]} (from {URL})")
    return inception_extractor(build_network(read_state_dict(path)), device)


def load_reference(card: ModelCard, given: str | None, folder: Path) -> Path:
    """The ``.npz`` of real images that samples of a model are compared with: the one given, or the bundled model's data.

    Raises:
        UserError: none was given and none is bundled.
    """
    if given is not None:
        return Path(given)
    if card.features == "digits":
        from examples.digits.data import write_reference
        path = folder / "digits-reference.npz"
        return path if path.exists() else write_reference(path)
    raise UserError("--reference is missing: give ADM's file of real images and their statistics, for 256 pixels "
                    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/VIRTUAL_imagenet256_labeled.npz")


ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


def load_lpips(device: torch.device) -> Perceptual:
    """LPIPS (Zhang et al., 2018) with AlexNet; the calibrated linear layers come with the package, the trunk is fetched.

    Raises:
        UserError: the trunk's weights cannot be had, or are not the published ones.
    """
    path = FOLDER / ALEXNET_URL.rsplit("/", 1)[1]
    if not path.exists():
        fetch(ALEXNET_URL, path, sha256_prefix=path.stem.rsplit("-", 1)[1])
    if not sha256(path).startswith(path.stem.rsplit("-", 1)[1]):
        raise UserError(f"'{path}' is not the published file (its SHA-256 does not begin as its name ends): delete it")
    model = build_lpips(read_state_dict(path)).to(device)
    return lambda a, b: model(a.to(device), b.to(device))


def build_lpips(trunk: dict[str, Tensor]) -> torch.nn.Module:
    """LPIPS on torchvision's AlexNet weights: images (N, 3, H, W) in [-1, 1], twice, to distances."""
    from lpips import LPIPS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it calls torchvision the old way
        model = LPIPS(net="alex", pnet_rand=True, verbose=False)
    model.net.load_state_dict({key: trunk[f"features.{key.split('.', 1)[1]}"] for key in model.net.state_dict()})  # slice1.0.weight
    return model.eval()
