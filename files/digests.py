"""Fingerprints of files and models."""
import hashlib
from pathlib import Path

import torch
from torch import nn

BLOCK = 2 ** 20  # bytes read at a time


def sha256(path: Path) -> str:
    """Digest a file's bytes; returns 64 hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def text_sha256(text: str) -> str:
    """Digest a text; returns 64 hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def folder_sha256(folder: Path) -> str:
    """Digest a folder's files and their names, hidden ones left out; 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        place = path.relative_to(folder)
        if path.is_file() and not any(part.startswith(".") for part in place.parts):
            digest.update(f"{place.as_posix()} {sha256(path)}\n".encode())
    return digest.hexdigest()


def weights_sha256(model: nn.Module) -> str:
    """Digest a model's tensors and their names; returns 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        raw = value.detach().cpu().contiguous().view(torch.uint8)
        digest.update(name.encode())
        digest.update(raw.numpy().data)
    return digest.hexdigest()
