"""The ``.npz`` that the ADM evaluator reads, written and read without ever holding all images in memory."""
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_LOCAL_HEADER = struct.Struct("<26xHH")  # of a zip member: lengths of the name and the extra field that follow it
_CRC_BLOCK = 2 ** 22


def write_npz(path: Path, images: Iterable[np.ndarray], shape: tuple[int, int, int, int]) -> None:
    """Write ``arr_0``, uint8 ``shape`` (N, H, W, 3), one image at a time; byte for byte what ``np.savez(arr_0=…)`` writes.

    Raises:
        ValueError: an image is not uint8 (H, W, 3), or there are not N of them.
    """
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for image in images:
                if image.dtype != np.uint8 or image.shape != shape[1:]:
                    raise ValueError(f"image {count} is {image.dtype} {image.shape}, expected uint8 {shape[1:]}")
                member.write(np.ascontiguousarray(image).tobytes())
                count += 1
    if count != shape[0]:
        raise ValueError(f"got {count} images, expected {shape[0]}")


def read_arrays(path: Path) -> dict[str, NDArray]:
    """Every array of an ``.npz``; uncompressed ones are mapped (numpy's own ``mmap_mode`` ignores them), checksums verified.

    Raises:
        ValueError: missing, damaged, or holding anything but plain arrays.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return {info.filename.removesuffix(".npy"): _read(archive, info, path) for info in archive.infolist()}
    except FileNotFoundError:
        raise ValueError(f"'{path}' does not exist: give an .npz file") from None
    except Exception as error:  # zipfile, its decompressors and numpy's header parser raise a dozen types on damaged files
        raise ValueError(f"cannot read '{path}' ({error}): expected an undamaged .npz of plain arrays") from None


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> NDArray:
    with archive.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(member, allow_pickle=False)
        version = np.lib.format.read_magic(member)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = read_header(member)
        header_bytes = member.tell()
    if dtype.hasobject:
        raise ValueError(f"'{info.filename}' holds Python objects")
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        start = info.header_offset + 30 + sum(_LOCAL_HEADER.unpack(file.read(30)))
    if header_bytes + dtype.itemsize * int(np.prod(shape)) != info.file_size:
        raise ValueError(f"'{info.filename}' is not as long as its shape {shape} says")
    if not info.file_size - header_bytes:
        return np.empty(shape, dtype)
    if _crc(path, start, info.file_size) != info.CRC:
        raise ValueError(f"'{info.filename}' has a wrong checksum")
    return np.memmap(path, dtype, "r", start + header_bytes, shape, order="F" if fortran else "C")


def _crc(path: Path, start: int, size: int) -> int:
    """CRC-32 of ``size`` bytes of a file; read, not mapped, so that they do not count as memory in use."""
    crc = 0
    with open(path, "rb") as file:
        file.seek(start)
        while size and (block := file.read(min(size, _CRC_BLOCK))):
            crc, size = zlib.crc32(block, crc), size - len(block)
    return crc


def read_images(path: Path, arrays: dict[str, NDArray]) -> NDArray:
    """``arr_0`` of what ``read_arrays`` gave: uint8 (N, H, W, 3).

    Raises:
        ValueError: missing, empty, or of another type or shape.
    """
    if "arr_0" not in arrays:
        raise ValueError(f"'{path}' holds no 'arr_0' (it has {', '.join(sorted(arrays)) or 'nothing'}): expected uint8 images (N, H, W, 3)")
    images = arrays["arr_0"]
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or not images.size:
        raise ValueError(f"'arr_0' of '{path}' is {images.dtype} {images.shape}: expected uint8 images (N, H, W, 3), at least one")
    return images
