"""Rebuild the bundled emoji from the npm package, and write the skin tones beside the results.

    npm pack emoji-datasource-google@16.0.0
    python -m examples.emoji.rebuild emoji-datasource-google-16.0.0.tgz

It writes ``examples/emoji/emoji.npz`` and ``results/emoji/tones.npz``.
"""
import argparse
import io
import json
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from cli.parser import make_script_parser, run
from errors import UserError
from examples.emoji.data import BUNDLED, IMAGE_SIZE, TONES
from files.atomic import atomic

FOLDER = "package/img/google/64"
# Archives carry dates; a fixed one makes the same bytes every time.
DATE = (1980, 1, 1, 0, 0, 0)


def read_package(path: Path) -> dict[str, bytes]:
    """Read the list of emoji and the PNGs of a package, by their names in it.

    Raises:
        UserError: it is missing or no such package.
    """
    files = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                if member.name == "package/emoji.json" or member.name.startswith(FOLDER):
                    files[member.name] = archive.extractfile(member).read()
    except (OSError, tarfile.TarError, AttributeError) as error:
        raise UserError(f"cannot read package '{path}' ({error}): expected npm's .tgz") from None
    if "package/emoji.json" not in files:
        raise UserError(f"'{path}' holds no emoji.json: expected emoji-datasource-google 16.0.0")
    return files


def on_white(png: bytes) -> NDArray:
    """Decode a PNG and lay it on white, uint8 (64, 64, 3)."""
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    canvas = Image.new("RGBA", (IMAGE_SIZE, IMAGE_SIZE), "white")
    canvas.alpha_composite(picture)
    return np.asarray(canvas.convert("RGB"))


def bundled_arrays(files: dict[str, bytes]) -> dict[str, NDArray]:
    """Make what ``emoji.npz`` holds, in Unicode's order; see ``data.Emoji``."""
    entries = _entries(files)
    return {
        "images": _images(files, [entry["image"] for entry in entries]),
        "names": np.array([entry["name"].lower() for entry in entries]),
        "keywords": np.array([_keywords(entry) for entry in entries]),
        "categories": np.array([entry["category"] for entry in entries]),
        "subcategories": np.array([entry["subcategory"] for entry in entries]),
    }


def tone_arrays(files: dict[str, bytes]) -> dict[str, NDArray]:
    """Make what ``tones.npz`` holds: images, and the index of the emoji that each one varies."""
    names, base = [], []
    for index, entry in enumerate(_entries(files)):
        for variation in entry.get("skin_variations", {}).values():
            names.append(variation["image"])
            base.append(index)
    return {"images": _images(files, names), "base": np.array(base)}


def _entries(files: dict[str, bytes]) -> list[dict]:
    entries = json.loads(files["package/emoji.json"])
    return sorted(entries, key=lambda entry: (entry["sort_order"], entry["image"]))


def _images(files: dict[str, bytes], names: list[str]) -> NDArray:
    return np.stack([on_white(files[f"{FOLDER}/{name}"]) for name in names])


def _keywords(entry: dict) -> str:
    """Join an emoji's short names, such as "heart_eyes_cat", as words."""
    return " ".join(entry["short_names"]).replace("_", " ").replace("-", " ")


def write_arrays(path: Path, arrays: dict[str, NDArray]) -> None:
    """Write an ``.npz`` packed with LZMA, a fifth smaller than numpy's own packing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", DATE)
            archive.writestr(member, buffer.getvalue(), zipfile.ZIP_LZMA)
    print(f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB)")


def main(args: argparse.Namespace) -> None:
    files = read_package(args.package)
    write_arrays(args.out, bundled_arrays(files))
    write_arrays(args.tones, tone_arrays(files))


if __name__ == "__main__":
    parser = make_script_parser(__doc__)
    parser.add_argument("package", type=Path, help="emoji-datasource-google-16.0.0.tgz")
    parser.add_argument("--out", type=Path, default=BUNDLED)
    parser.add_argument("--tones", type=Path, default=TONES)
    run(main, parser)
