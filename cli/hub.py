"""Models that are named by their id on the hub: OWNER/NAME, from the local cache or the network.

``huggingface_hub`` knows where the cache is (HF_HOME) and whether there is a network to be asked
(HF_HUB_OFFLINE).
"""
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import TypeVar

from cards import DiT_models
from errors import UserError

# What a repository may hold beside a pipeline in float32: other formats and other types.
OTHER_FILES = ("*.bin", "*.ckpt", "*.h5", "*.msgpack", "*.onnx*", "*.fp16.*", "*.bf16.*")

Value = TypeVar("Value")


def is_hub_id(name: str | None) -> bool:
    """Tell whether a name is that of a model on the hub, and not one of this repository."""
    if name is None or Path(name).exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        return False
    # The names of this repository have a slash, too; a slip in one is no name of the hub.
    return not get_close_matches(name, DiT_models, cutoff=0.8)


def fetch_file(name: str, file: str) -> Path | None:
    """Fetch one file of a model; returns where it is.

    None: the model has no such file; or it is not in the cache, and there is nobody to ask.

    Raises:
        UserError: the hub does not give it.
    """
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    def fetch() -> Path | None:
        try:
            return Path(hf_hub_download(name, file))
        except EntryNotFoundError:
            return None

    return _ask(name, fetch)


def fetch_parts(name: str, parts: list[str]) -> Path:
    """Fetch the folders of a pipeline's parts, and what lies beside them; returns the whole folder.

    Raises:
        UserError: the hub does not give it.
    """
    from huggingface_hub import snapshot_download
    wanted = ["*.json", *(f"{part}/*" for part in parts)]
    return _ask(name, lambda: Path(
        snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(OTHER_FILES))))


def _ask(name: str, fetch: Callable[[], Value]) -> Value:
    from huggingface_hub.utils import logging
    # Its retries are not what the person at the terminal has to read.
    logging.set_verbosity_error()
    try:
        return fetch()
    except Exception as error:  # of the network, of the hub, of a name that is none
        raise not_given(name, type(error).__name__) from None


def not_given(name: str, reason: str) -> UserError:
    """Say that a model is not to be had."""
    return UserError(f"'{name}' is no folder, and the hub did not give it ({reason}): "
                     "download it, and give its folder with --model")
