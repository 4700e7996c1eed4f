"""The ``.npz`` that the ADM evaluator reads, without ever holding all images in memory."""
import struct
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# A zip member's header ends in the lengths of the name and the extra field that follow it.
_LOCAL_HEADER = struct.Struct("<26xHH")
_CRC_BLOCK = 2 ** 22  # bytes read at a time


def write_npz(
    path: Path,
    images: Iterable[np.ndarray],
    shape: tuple[int, int, int, int],
) -> None:
    """Write ``arr_0``, uint8 ``shape`` (N, H, W, 3), one image at a time.

    The file is byte for byte what ``np.savez(arr_0=…)`` writes.

    Raises:
        ValueError: an image is not uint8 (H, W, 3), or there are not N of them.
    """
    header = {"descr": "|u1", "fortran_order": False, "shape": shape}
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        with archive.open("arr_0.npy", "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, header)
            for image in images:
                if image.dtype != np.uint8 or image.shape != shape[1:]:
                    raise ValueError(
                        f"image {count} is {image.dtype} {image.shape}, expected uint8 {shape[1:]}")
                member.write(np.ascontiguousarray(image).tobytes())
                count += 1
    if count != shape[0]:
        raise ValueError(f"got {count} images, expected {shape[0]}")


def read_arrays(path: Path) -> dict[str, NDArray]:
    """Read every array of an ``.npz`` and verify its checksum.

    Uncompressed arrays are mapped; numpy's own ``mmap_mode`` ignores them.

    Raises:
        ValueError: missing, damaged, or holding anything but plain arrays.
    """
    arrays = {}
    try:
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                arrays[name] = _read_member(archive, member, path)
    except FileNotFoundError:
        raise ValueError(f"'{path}' does not exist: give an .npz file") from None
    # On damaged files zipfile, its decompressors and numpy's header parser raise a dozen types.
    except Exception as error:
        raise ValueError(
            f"cannot read '{path}' ({error}): expected an undamaged .npz of plain arrays"
        ) from None
    return arrays


def _read_member(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> NDArray:
    """Map one array of the archive at ``path``, or read it where it is compressed."""
    # Read its header.
    with archive.open(info) as member:
        if info.compress_type != zipfile.ZIP_STORED:
            return np.lib.format.read_array(member, allow_pickle=False)
        version = np.lib.format.read_magic(member)
        if version == (1, 0):
            shape, fortran, dtype = np.lib.format.read_array_header_1_0(member)
        else:
            shape, fortran, dtype = np.lib.format.read_array_header_2_0(member)
        header_bytes = member.tell()
    if dtype.hasobject:
        raise ValueError(f"'{info.filename}' holds Python objects")

    # Check that its bytes are all there, and the right ones.
    start = _data_offset(path, info)
    if header_bytes + dtype.itemsize * int(np.prod(shape)) != info.file_size:
        raise ValueError(f"'{info.filename}' is not as long as its shape {shape} says")
    if info.file_size == header_bytes:
        # An empty array cannot be mapped.
        return np.empty(shape, dtype)
    if _crc(path, start, info.file_size) != info.CRC:
        raise ValueError(f"'{info.filename}' has a wrong checksum")

    order = "F" if fortran else "C"
    return np.memmap(path, dtype, "r", start + header_bytes, shape, order=order)


def _data_offset(path: Path, info: zipfile.ZipInfo) -> int:
    """Find where in the archive the bytes of a stored member begin."""
    with open(path, "rb") as file:
        file.seek(info.header_offset)
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(file.read(_LOCAL_HEADER.size))
    return info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes


def _crc(path: Path, start: int, size: int) -> int:
    """Compute the CRC-32 of ``size`` bytes of a file from ``start`` on.

    They are read, not mapped, so that they do not count as memory in use.
    """
    crc = 0
    with open(path, "rb") as file:
        file.seek(start)
        while size and (block := file.read(min(size, _CRC_BLOCK))):
            crc = zlib.crc32(block, crc)
            size -= len(block)
    return crc


def read_images(path: Path, arrays: dict[str, NDArray]) -> NDArray:
    """Take the images ``arr_0``, uint8 (N, H, W, 3), from what ``read_arrays`` gave.

    Raises:
        ValueError: missing, empty, or of another type or shape.
    """
    return _read_pixels(path, arrays, "images (N, H, W, 3)", 4)


def read_videos(path: Path, arrays: dict[str, NDArray]) -> NDArray:
    """Take the videos ``arr_0``, uint8 (N, F, H, W, 3), from what ``read_arrays`` gave.

    Raises:
        ValueError: missing, empty, or of another type or shape.
    """
    return _read_pixels(path, arrays, "videos (N, F, H, W, 3)", 5)


def _read_pixels(path: Path, arrays: dict[str, NDArray], what: str, axes: int) -> NDArray:
    """Take ``arr_0``, uint8 of so many axes, the last one of 3 colours; errors call it ``what``."""
    if "arr_0" not in arrays:
        present = ", ".join(sorted(arrays)) or "nothing"
        raise ValueError(f"'{path}' holds no 'arr_0' (it has {present}): expected uint8 {what}")
    pixels = arrays["arr_0"]
    fits = pixels.dtype == np.uint8 and pixels.ndim == axes and pixels.shape[-1] == 3
    if not fits or not pixels.size:
        raise ValueError(
            f"'arr_0' of '{path}' is {pixels.dtype} {pixels.shape}: "
            f"expected uint8 {what}, at least one")
    return pixels
