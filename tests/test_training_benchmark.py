# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training: its search, its arithmetic, a run of each contender."""

import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytest.importorskip("flax")
pytest.importorskip("matplotlib")

from benchmarks.training import protocol, report
from benchmarks.training.__main__ import main
from benchmarks.training.contenders import (
    CONTENDERS,
    VARIANTS,
    WEIGHT_DECAY,
    WarmupCosine,
    sophia,
)
from benchmarks.training.rate_per_tensor import scale_by_rate_per_tensor
from benchmarks.training.tasks import TASKS, quadratic

pytestmark = pytest.mark.skipif(
    not hasattr(jax, "shard_map"), reason="the benchmark is for JAX 0.8 or newer"
)


@pytest.fixture(autouse=True)
def standard_promotion():
    """Parts of optax need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("best", [1e-4, 1e-2, 1.0, 50.0])
def test_search_ends_around_the_best_rate(best):
    found = protocol.search(lambda rate: math.log(rate / best) ** 2, 1e-2)
    rate = protocol.best_rate(found)
    assert abs(math.log(rate / best)) <= math.log(protocol.FACTOR) / 2 + 1e-9
    assert min(found) < rate < max(found)


def test_search_reaches_as_far_as_asked():
    tried = protocol.search(lambda rate: math.log(rate / 2e-2) ** 2, 1e-2, reach=3)
    np.testing.assert_allclose(list(tried), 10.0 ** np.arange(-3.5, -0.4, 0.5))


def test_search_does_not_try_again_what_is_known():
    def score(rate):
        tried.append(rate)
        return math.log(rate / 3e-2) ** 2 if rate < 1 else math.inf

    tried = []
    wide = protocol.search(score, 1e-2, reach=4)
    known = {float(f"{rate:.4g}"): loss for rate, loss in wide.items()}
    tried.clear()
    assert protocol.search(score, 1e-2, known=known) == wide
    assert not tried
    del known[max(known)], known[min(known)]
    assert protocol.search(score, 1e-2, reach=4, known=known) == wide
    assert tried == [min(wide), max(wide)]


def test_search_survives_divergence():
    """Also where all but the least rates diverge."""
    found = protocol.search(lambda rate: rate if rate < 1e-3 else math.inf, 1e-2)
    assert protocol.best_rate(found) < 1e-3


@pytest.mark.parametrize("width", [1.0, 10.0, 100.0])
def test_good_width(width):
    """Of a loss that is flat over a known range, and steep beside it."""
    rates = 10.0 ** np.arange(-4, 4.25, 0.25)

    def loss(rate):
        outside = max(0.0, abs(math.log10(rate)) - math.log10(width) / 2)
        return math.exp(10 * outside)

    found = {float(r): loss(r) for r in rates}
    expected = math.log10(width) + 2 * math.log(1.05) / 10
    got = math.log10(protocol.good_width(found))
    np.testing.assert_allclose(got, expected, atol=2 * 8 / 2000)  # of the fine grid


def test_schedule_rises_and_falls():
    values = np.array([WarmupCosine(2.0, 100)(jnp.array(t)) for t in range(101)])
    assert (np.diff(values)[:4] > 0).all()
    assert (np.diff(values)[5:] < 0).all()
    np.testing.assert_allclose(values[[0, 4, 5, 100]], [0.4, 2.0, 2.0, 0.0], atol=1e-6)


def test_difference_is_of_pairs():
    ratios = np.array([1.1, 1.1, 1.2])
    baseline = [{"validation": [5.0, x]} for x in (1.0, 20.0, 300.0)]
    runs = [
        {"validation": [9.0, r * run["validation"][-1]]}
        for r, run in zip(ratios, baseline, strict=True)
    ]
    error = np.log(ratios).std(ddof=1) / math.sqrt(3)
    expected = np.exp(np.log(ratios).mean() + error * np.array([0, -2, 2])) - 1
    np.testing.assert_allclose(report.difference(runs, baseline), expected)
    runs[1]["validation"] = [math.nan]
    assert report.difference(runs, baseline)[0] == math.inf


def test_files_have_null_for_what_is_not_finite():
    text = report.dumps({"a": [1.0, math.nan, {"b": -math.inf}], "c": 2})
    assert json.loads(text) == {"a": [1.0, None, {"b": None}], "c": 2}


def test_other_contenders_are_kept_under_the_same_conditions():
    earlier = {"steps": 10, "first_seed": 0, "contenders": {"SGD": 1, "AdamW": 2}}
    later = {**earlier, "contenders": {}}
    assert report.others(earlier, later) == {"SGD": 1, "AdamW": 2}
    del earlier["first_seed"]
    with pytest.raises(ValueError, match=r"^first_seed is None there and 0 here$"):
        report.others(earlier, later)


def test_contenders_are_added_to_a_file(tmp_path, monkeypatch, capsys):
    def run(*options):
        options = ["quadratic", "--steps", "20", "--seeds", "1", *options]
        monkeypatch.setattr("sys.argv", ["training", *options, "--out", str(tmp_path)])
        main()
        result = json.loads((tmp_path / "quadratic.json").read_text(encoding="utf-8"))
        return result["contenders"]

    first = run("--only", "SGD")
    second = run("--only", "Muon")
    assert list(second) == ["SGD", "AdamW", "Muon"]
    assert second["SGD"] == first["SGD"]
    for options in (("--depth", "2"), ("--batch-size", "8")):
        with pytest.raises(SystemExit):
            run("--only", "Muon", *options)
        assert f"argument {options[0]}: quadratic has one" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run("--only", "Muon", "--first-seed", "5")
    error = capsys.readouterr().err
    assert "first_seed is 0 there and 5 here. Give another --out" in error
    third = run("--only", "SGD", "eigenbasis, own rate", "--rate", "0.005")
    assert third["SGD"]["rate"] == 0.005
    assert list(third["SGD"]["search"]) == ["0.005"]
    assert list(third["eigenbasis, own rate"]["search"]) == ["1"]
    assert third["AdamW"]["search"] == first["AdamW"]["search"]
    assert not list(tmp_path.glob("*_rates.png"))
    wide = run("--only", "SGD", "eigenbasis, own rate", "--reach", "2")["AdamW"]
    assert len(wide["search"]) > len(first["AdamW"]["search"])
    for only, expected in (("Muon", wide), ("AdamW", first["AdamW"])):
        again = run("--only", only)["AdamW"]
        for key in ("search", "rate", "width"):
            assert again[key] == expected[key], only
    assert (tmp_path / "quadratic_rates.png").stat().st_size > 10_000
    monkeypatch.setattr("benchmarks.training.__main__.CONTENDERS", {"SGD"})
    assert list(run("--first-seed", "5")) == ["SGD", "AdamW"]  # all anew


RESULTS = pathlib.Path(protocol.__file__).parent.parent / "results" / "training"


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("*.json")), ids=lambda p: f"{p.parent.stem}-{p.stem}"
)
def test_committed_table_is_that_of_the_committed_result(path):
    result = json.loads(path.read_text(encoding="utf-8"))
    assert report.dumps(result) == path.read_text(encoding="utf-8")
    assert report.table(result) == path.with_suffix(".md").read_text(encoding="utf-8")


def test_tables_of_the_docs_are_those_of_the_committed_results():
    page = RESULTS.parents[2] / "docs" / "training.md"
    text = page.read_text(encoding="utf-8")
    order = ["cnn", "resnet8", "transformer", "autoencoder", "poisson", "burgers"]
    order += ["diamonds"]

    def read(path):
        return json.loads((RESULTS / path).read_text(encoding="utf-8"))

    results = {task: read(f"{task}.json") for task in order}
    assert report.of_one(results, "Gauss-Newton in eigenbasis") in text
    assert report.of_one(results, "eigenbasis, own rate") in text
    limited = {task: r for task, r in results.items() if task != "resnet8"}
    assert report.of_one(limited, "eigenbasis, limited rate") in text
    assert report.across_tasks(results, report.at_equal_time) in text
    assert report.across_tasks(results, report.rate) in text
    fresh = {task: read(f"fresh/{task}.json") for task in order}
    changed = {
        f"{task}, {what}": read(f"{directory}/{task}.json")
        for directory, task, what in (
            ("batch_32", "autoencoder", "batches of 32"),
            ("batch_512", "autoencoder", "batches of 512"),
            ("batch_32", "diamonds", "batches of 32"),
            ("batch_2048", "diamonds", "batches of 2048"),
            ("depth_2", "transformer", "depth 2"),
            ("depth_2", "autoencoder", "depth 2"),
            ("depth_4", "autoencoder", "depth 4"),
            ("depth_2", "diamonds", "depth 2"),
            ("depth_4", "diamonds", "depth 4"),
        )
    }
    for tables in (fresh, changed):
        assert report.of_one(tables, "Gauss-Newton in eigenbasis") in text
        assert report.of_one(tables, "eigenbasis, own rate") in text
    fast_pools = {
        "seeds 0 to 4": read("fast_pools/cnn.json"),
        "seeds 200 to 204": read("fast_pools_fresh/cnn.json"),
    }
    assert report.of_one(fast_pools, "eigenbasis, own rate") in text
    settings = {}
    for task in ("cnn", "resnet8", "transformer", "autoencoder"):
        safe = read(f"safe/{task}.json")["contenders"]
        settings[task] = {"contenders": results[task]["contenders"] | safe}
    delayed = {
        "AdaHessian, paper": "paper, delayed",
        "AdaHessian, davda54": "davda54, delayed",
        "Zack-Dugue, eps=0.01": "Zack-Dugue, eps=0.01, delayed",
    }
    for found in settings.values():
        rates = {
            found["contenders"][n]["rate"] for pair in delayed.items() for n in pair
        }
        np.testing.assert_allclose(sorted(rates), 0.3)
    assert report.of_delay(settings, delayed) in text
    for task in ("autoencoder", "diamonds", "transformer"):
        variants = read(f"variants/{task}.json")
        assert report.beside(variants, "Gauss-Newton in eigenbasis") in text


def test_cost_to_reach():
    """Curves 2 ** -(steps / 10), of steps that cost 1.5 times AdamW's."""

    def runs(steps, seeds=(1.0, 3.0)):
        losses = [2.0 ** -(s / 10) for s in steps]
        return [{"steps": steps, "validation": [c * x for x in losses]} for c in seeds]

    adamw = {"equal steps": runs([20, 45]), "equal time": runs([20, 45])}
    slow = {
        "equal steps": runs([20, 40, 60]),
        "equal time": runs([10, 30]),
        "cost": 1.5,
    }
    share = report.cost_to_reach(slow, adamw, 100)
    np.testing.assert_allclose(share, 1.5 * 45 / 100, rtol=1e-12)
    slow["equal steps"] = runs([20, 40, 46])
    np.testing.assert_allclose(report.cost_to_reach(slow, adamw, 100), 0.675)
    early = {**slow, "equal time": runs([30, 50], seeds=(0.1, 0.3))}
    np.testing.assert_allclose(report.cost_to_reach(early, adamw, 100), 0.45)
    never = {**slow, "equal steps": runs([20, 44])}
    assert report.cost_to_reach(never, adamw, 100) == math.inf
    assert report.time_to_loss(never, adamw, 100) == "never"
    slow["equal steps"][1]["validation"][-1] = math.nan
    assert report.cost_to_reach(slow, adamw, 100) == math.inf


@pytest.mark.parametrize("name", ["autoencoder", "diamonds", "transformer"])
def test_depth_is_how_often_each_hidden_layer_is_there(name):
    """The first layers and the last are there once, blocks in between are the same."""
    pytest.importorskip("plotnine" if name == "diamonds" else "flax")
    counts = [
        len(
            jax.tree.leaves(
                jax.eval_shape(TASKS[name](depth=k).init, jax.random.key(0))
            )
        )
        for k in (1, 2, 3)
    ]
    hidden = {"autoencoder": 5 * 2, "diamonds": 2 * 2, "transformer": 2 * 16}[name]
    assert np.diff(counts).tolist() == [hidden] * 2


def test_rates_are_judged_by_all_tuning_seeds():
    losses = {1000: 1.0, 1001: 4.0, 1002: 2.0}

    def train(peak, seed, steps):
        return protocol.Run([steps], [0.0], [peak * losses[seed]], 0.0)

    task = quadratic()._replace(tuning_seeds=3)
    np.testing.assert_allclose(protocol.tuning_loss(train, task, 3.0, 7), 6.0)
    losses[1001] = math.nan
    assert protocol.tuning_loss(train, task, 3.0, 7) == math.inf


@pytest.mark.filterwarnings("ignore:averaging applies to none")  # no embeddings
@pytest.mark.parametrize("name", CONTENDERS | VARIANTS)
def test_contender_trains(name):
    """A few steps make the quadratic smaller, and the same seed is the same run."""
    task = quadratic()
    contender = (CONTENDERS | VARIANTS)[name]
    train = protocol.make_train(task, contender)
    runs = [train(contender.start / 30, 0, 60) for _ in range(2)]
    assert runs[0].steps[-1] == 60
    assert runs[0].validation[-1] < runs[0].validation[0]
    assert runs[0].validation == runs[1].validation


@pytest.mark.parametrize("name", ["davda54, delayed", "relative curvature", "Sophia"])
def test_steps_one_by_one_are_those_of_the_loop(name):
    task, contender = quadratic(), CONTENDERS[name]
    looped = protocol.make_train(task._replace(loops=True), contender)
    compiled = protocol.make_train(task, contender)
    one_by_one, in_one = (train(contender.start, 3, 60) for train in (looped, compiled))
    np.testing.assert_allclose(one_by_one.validation, in_one.validation, rtol=1e-4)


def test_sophia_is_that_of_optax():
    """The estimate is made outside of it, by the same estimator at the same counts."""
    task, steps = quadratic(), 45
    gamma = 100.0  # so that the clip leaves most entries to the estimate
    contender = CONTENDERS["Sophia"]._replace(make=sophia(gamma))
    train = protocol.make_train(task, contender)
    tx = optax.contrib.sophia(
        WarmupCosine(1e-2, steps),
        gamma=gamma,
        weight_decay=WEIGHT_DECAY,
        update_interval=10,
    )
    init_key, _, _ = jax.random.split(jax.random.key(0), 3)
    params = task.init(init_key)

    def loss(p):
        return task.loss_fn(p, task.train)[0]

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    run = train(1e-2, 0, steps)
    np.testing.assert_allclose(run.train[-1], loss(params), rtol=1e-4)


def test_rates_per_tensor_reach_the_minimum_along_all_updates():
    """Of a loss that is its quadratic model, in one step without damping."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = {"a": (6, 3), "b": (4, 3), "c": (3,)}
    x, z, y = (
        jax.random.normal(k, (16, n)) for k, n in zip(keys, (6, 4, 3), strict=False)
    )

    def predict(p):
        return x @ p["a"] + z @ p["b"] + p["c"] - y

    def loss(p):
        return jnp.mean(predict(p) ** 2)

    params = {name: jax.random.normal(keys[3], shapes[name]) for name in shapes}
    grads = jax.grad(loss)(params)
    tx = scale_by_rate_per_tensor("squared_error", 1.0, decay=0.0, damping=0.0)
    state = tx.init(params)
    steps, _ = tx.update(grads, state, params, grad=grads, predict_fn=predict)
    reached = jax.tree.map(jnp.subtract, params, steps)
    for name, slope in jax.grad(loss)(reached).items():
        along = jnp.vdot(slope, grads[name])
        assert abs(along) < 1e-4 * jnp.vdot(grads[name], grads[name])
        assert (steps[name] / grads[name]).ravel()[0] > 0


SMALL = [name for name in TASKS if name not in ("diamonds", "resnet8", "cnn")]


@pytest.mark.parametrize("name", SMALL)
def test_task_has_losses_that_gauss_newton_knows(name):
    """The estimator's loss is the one that is trained with, of the same scale."""
    import adahessian_jax as ah

    task = TASKS[name]()
    batch = jax.tree.map(lambda x: jnp.asarray(x[:8]), task.train)
    params = task.init(jax.random.key(0))
    loss, outputs = task.loss_fn(params, batch)
    kind = task.loss["loss"]

    def output_loss(f):
        if kind == "squared_error":
            # Up to terms that are linear in the outputs.
            total = jnp.sum(f**2)
            return total if task.loss.get("reduction") == "sum" else total / f.size
        labels = batch.labels
        return optax.softmax_cross_entropy_with_integer_labels(f, labels).mean()

    ah.check_output_loss(**task.loss, output_loss=output_loss, outputs=outputs)
    if kind != "squared_error":
        np.testing.assert_allclose(output_loss(outputs), loss, rtol=1e-5)
