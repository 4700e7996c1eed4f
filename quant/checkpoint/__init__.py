"""Quantised models as files: one safetensors file per model, with a JSON header."""
from quant.checkpoint.header import (
    FORMAT_VERSION,
    SUFFIX,
    Header,
    default_name,
    default_stem,
    find,
    read_header,
)
from quant.checkpoint.store import Stored, backend_for, build, load, read, save

__all__ = [
    "FORMAT_VERSION",
    "SUFFIX",
    "Header",
    "Stored",
    "backend_for",
    "build",
    "default_name",
    "default_stem",
    "find",
    "load",
    "read",
    "read_header",
    "save",
]
