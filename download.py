"""Find, fetch and verify weights; load float models and decoders.

Published DiT-XL/2 weights (CC BY-NC 4.0) come from the DiT authors' server. ``--ckpt FOLDER``
takes a copy of the hub's ``facebook/DiT-XL-2-256`` (a diffusers ``DiTTransformer2DModel``)
instead. Nothing is ever unpickled beyond plain tensors.
"""
from pathlib import Path

import torch
from torch import Tensor

from architectures.dit import convert_diffusers
from cards import ModelCard
from diffusion.decoding import Decoder, vae_decoder
from errors import UserError
from examples.bundles import find_bundle
from files.weights import load_into, read_state_dict
from models import DiT, build_model

FOLDER = Path("pretrained_models")
PUBLISHED_URL = "https://dl.fbaipublicfiles.com/DiT/models/"
VAE_SCALE = 0.18215  # latents are this many times what the VAE decodes


def load_model(
    name: str,
    card: ModelCard,
    image_size: int,  # pixels per side
    num_classes: int,
    ckpt: str | None,  # --ckpt; None: the published or bundled weights
    device: torch.device,
) -> DiT:
    """Load a float model in eval mode.

    Raises:
        UserError: image size and model do not fit, or the weights are missing, unreadable or of
            another model.
    """
    with torch.device("meta"):
        try:
            model = build_model(card, image_size, num_classes)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from None
    source, state = find_state_dict(name, card, image_size, ckpt)
    # The position embedding is fixed, and not in diffusers' files.
    state.setdefault("pos_embed", model.pos_embed.data)
    wanted = f"{name} at {image_size} pixels and {num_classes} classes"
    return load_into(model, state, source, wanted).to(device).eval()


def find_state_dict(
    name: str,
    card: ModelCard,
    image_size: int,
    ckpt: str | None,
) -> tuple[str, dict[str, Tensor]]:
    """Return where a model's weights came from, for messages, and the weights by published name.

    Raises:
        UserError: there are none for this model, or they cannot be read or fetched.
    """
    if ckpt is not None:
        return ckpt, _read_published(Path(ckpt))
    bundle = find_bundle(card.bundle)
    if bundle is not None:
        return bundle.folder, bundle.weights(name)
    if name != "DiT-XL/2":
        raise UserError(f"there are no published weights of {name}: give a file with --ckpt")
    path = FOLDER / f"DiT-XL-2-{image_size}x{image_size}.pt"
    if not path.exists():
        fetch(PUBLISHED_URL + path.name, path, "--ckpt")
    return str(path), _read_published(path)


def _read_published(path: Path) -> dict[str, Tensor]:
    """Read weights by their published names; those of diffusers are converted."""
    return convert_diffusers(read_state_dict(path))


def fetch(
    url: str,
    path: Path,
    flag: str,
    sha256_prefix: str | None = None,
) -> None:
    """Download to a temporary name, then rename; shows a progress bar.

    Args:
        flag: of the command line, which takes such a file.
        sha256_prefix: how the SHA-256 of what arrives has to begin.

    Raises:
        UserError: the download failed; says where to put the file by hand.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(path), hash_prefix=sha256_prefix)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"cannot download {url} ({error}): put the file at '{path}' by hand, or give one "
            f"with {flag}"
        ) from None


def load_decoder(card: ModelCard, vae: str, device: torch.device) -> Decoder:
    """Load what turns a model's latents into images.

    Args:
        vae: which Stable Diffusion VAE, ``ema`` or ``mse``; models with a decoder of their own
            ignore it.

    Raises:
        UserError: the VAE's weights cannot be had; says where to put them by hand.
    """
    bundle = find_bundle(card.bundle)
    if bundle is not None:
        return bundle.decoder(device)
    return vae_decoder(vae, stable_diffusion_vae(vae).to(device), VAE_SCALE)


def stable_diffusion_vae(vae: str) -> torch.nn.Module:
    """Load the VAE called ``vae`` from ``pretrained_models`` or the hub, in eval mode.

    Raises:
        UserError: its weights cannot be had; says where to put them by hand.
    """
    from diffusers.models import AutoencoderKL
    local = FOLDER / f"sd-vae-ft-{vae}"
    source = str(local) if local.is_dir() else f"stabilityai/sd-vae-ft-{vae}"
    try:
        return AutoencoderKL.from_pretrained(source).eval()
    # The hub's client raises types of several libraries.
    except Exception as error:
        raise UserError(
            f"cannot load the VAE from '{source}' ({type(error).__name__}): put config.json and "
            f"diffusion_pytorch_model.safetensors into '{local}' by hand") from None
