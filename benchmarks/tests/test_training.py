# SPDX-License-Identifier: Apache-2.0
"""The benchmark of training: its search, its arithmetic, a run of each contender."""

import json
import math

import jax
import numpy as np
import optax
import pytest

from adahessian_jax.demo.image_files import DataError
from benchmarks.training import protocol, report
from benchmarks.training.__main__ import main
from benchmarks.training.contenders import (
    ALL,
    CONTENDERS,
    VARIANTS,
    WarmupCosine,
    sophia,
)
from benchmarks.training.published import PUBLISHED_TASKS
from benchmarks.training.tasks import all_images, quadratic

RESULTS = report.RESULTS


@pytest.mark.parametrize("best", [1e-4, 1e-2, 1.0, 50.0])
def test_search_ends_around_the_best_rate(best):
    """Between two rates that are worse."""
    found = protocol.search(lambda rate: math.log(rate / best) ** 2, 1e-2, {})
    rate = protocol.best_rate(found)
    assert abs(math.log(rate / best)) <= math.log(protocol.FACTOR) / 2 + 1e-9
    assert min(found) < rate < max(found)


def test_search_goes_no_further_than_needed():
    """What is known is not tried again; where all diverge, the least rate is taken."""

    def score(rate):
        tried.append(rate)
        return math.log(rate / 2e-2) ** 2 if rate < 1 else math.inf

    tried = []
    whole = protocol.search(score, 1e-2, {})
    np.testing.assert_allclose(list(whole), 10.0 ** np.arange(-2.5, -0.9, 0.5))
    known = {float(f"{rate:.4g}"): loss for rate, loss in whole.items()}
    del known[max(known)], known[min(known)]
    tried.clear()
    assert protocol.search(score, 1e-2, known) == whole
    assert tried == [min(whole), max(whole)]
    found = protocol.search(lambda rate: rate if rate < 1e-3 else math.inf, 1e-2, {})
    assert protocol.best_rate(found) < 1e-3


def test_difference_is_of_pairs():
    """Bounds are two standard errors of the logarithm of ratios away."""
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


def test_cost_to_reach():
    """Curves 2 ** -(steps / 10), of steps that cost 1.5 times AdamW's."""

    def runs(steps, seeds=(1.0, 3.0)):
        losses = [2.0 ** -(s / 10) for s in steps]
        return [{"steps": steps, "validation": [c * x for x in losses]} for c in seeds]

    adamw = {"equal steps": runs([20, 45]), "equal time": runs([20, 45])}
    slow = {"equal time": runs([10, 30]), "cost": 1.5}
    for steps in ([20, 40, 60], [20, 40, 46]):
        slow["equal steps"] = runs(steps)
        np.testing.assert_allclose(report.cost_to_reach(slow, adamw, 100), 0.675)
    early = {**slow, "equal time": runs([30, 50], seeds=(0.1, 0.3))}
    np.testing.assert_allclose(report.cost_to_reach(early, adamw, 100), 0.45)
    never = {**slow, "equal steps": runs([20, 44])}
    assert report.cost_to_reach(never, adamw, 100) == math.inf
    result = {"steps": 100, "contenders": {"slow": never, "AdamW": adamw}}
    assert report.time_to_loss(result, "slow") == "never"
    slow["equal steps"][1]["validation"][-1] = math.nan
    assert report.cost_to_reach(slow, adamw, 100) == math.inf


def test_contenders_are_added_to_a_file(tmp_path, monkeypatch, capsys):
    """Under the same conditions only, and AdamW's search is made once."""

    def run(*options):
        options = ["quadratic", "--steps", "20", "--seeds", "1", *options]
        monkeypatch.setattr("sys.argv", ["training", *options, "--out", str(tmp_path)])
        main()
        return json.loads((tmp_path / "quadratic.json").read_text())["contenders"]

    first = run("--only", "SGD")
    second = run("--only", "Muon")
    assert list(second) == ["SGD", "AdamW", "Muon"]
    assert second["SGD"] == first["SGD"]
    with pytest.raises(SystemExit):
        run("--only", "Muon", "--first-seed", "5")
    assert "first_seed is 0 there and 5 here" in capsys.readouterr().err
    third = run("--only", "SGD", OWN_RATE, "--rate", "0.005")
    assert third["SGD"]["rate"] == 0.005
    assert list(third[OWN_RATE]["search"]) == ["1"]
    assert third["AdamW"]["search"] == first["AdamW"]["search"]
    again = run("--searched", "--only", "Muon")
    assert again["Muon"]["search"] == second["Muon"]["search"]
    alone = run("--only", "AdamW")["AdamW"]
    assert all(alone[key] == first["AdamW"][key] for key in ("search", "rate", "width"))
    monkeypatch.setattr("benchmarks.training.__main__.CONTENDERS", {"SGD"})
    assert list(run("--first-seed", "5")) == ["SGD", "AdamW"]  # all anew


def read(path):
    """Read a committed result."""
    return json.loads((RESULTS / f"{path}.json").read_text("utf-8"))


@pytest.mark.parametrize(
    "path", sorted(RESULTS.rglob("*.json")), ids=lambda p: f"{p.parent.stem}-{p.stem}"
)
def test_committed_table_is_that_of_the_committed_result(path):
    """Of contenders that there are."""
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["contenders"].keys() <= ALL.keys()
    assert report.dumps(result) == path.read_text(encoding="utf-8")
    assert report.table(result) == path.with_suffix(".md").read_text(encoding="utf-8")


NEWTON, OWN_RATE = "newton", "newton, own rate"
OURS = (NEWTON, "soap", OWN_RATE, "subspace_newton")
SOAPS = ("SOAP", "SOAP, 0.9 and 0.99")
ORDER = ["cnn", "resnet8", "transformer", "autoencoder", "poisson", "burgers"]
ORDER += ["diamonds"]
DELAYED = {f"AdaHessian, {x}": f"{x}, delayed" for x in ("paper", "davda54")}
DELAYED |= {"Zack-Dugue, eps=0.01": "Zack-Dugue, eps=0.01, delayed"}


def tables():
    """Make the tables of docs/training.md, by a name for each."""
    results = {task: read(task) for task in ORDER}
    safe = {task: read(f"safe/{task}") for task in ORDER[:4]}
    for task, result in safe.items():
        result["contenders"] |= results[task]["contenders"]
    made = {}
    for name in OURS + SOAPS:
        known = {task: r for task, r in results.items() if name in r["contenders"]}
        made[name] = report.of_one(known, name)
    for task in ("pinn_shallow", "long/pinn_shallow", "pinn_deep", "quadratic_deep"):
        made[task] = report.beside_published(read(task)).strip()
    return made | {
        "all": report.across_tasks(
            results, lambda r, name: report.to_adamw(r, name, "equal time")
        ),
        "to SOAP": report.across_tasks(results, report.to_best_of(SOAPS), OURS),
        "rates": report.across_tasks(results, report.rate),
        "delay": report.of_delay(safe, DELAYED),
    }


def test_tables_of_the_docs_are_those_of_the_committed_results():
    """All of them, and all on the page."""
    text = (RESULTS.parents[2] / "docs" / "training.md").read_text("utf-8")
    assert [name for name, table in tables().items() if table not in text] == []


@pytest.mark.filterwarnings("ignore:averaging applies to none")  # no embeddings
@pytest.mark.parametrize(
    "name", [*CONTENDERS, *(pytest.param(n, marks=pytest.mark.slow) for n in VARIANTS)]
)
def test_contender_trains(name):
    """A few steps make the quadratic smaller, and the same seed is the same run."""
    train = protocol.make_train(quadratic(), ALL[name])
    runs = [train(ALL[name].start / 30, 0, 60) for _ in range(2)]
    assert runs[0].steps[-1] == 60
    assert runs[0].validation[-1] < runs[0].validation[0]
    assert runs[0].validation == runs[1].validation


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED_TASKS)
def test_published_task_trains(name):
    """A few steps bring what is reported down, in the precision that it asks for."""
    task = PUBLISHED_TASKS[name]()._replace(evaluated=200)
    with jax.enable_x64(task.x64):
        run = protocol.make_train(task, ALL["soap"])(3e-3, 0, 40)
    assert run.validation[-1] < run.validation[0]


def test_images_of_a_directory(tmp_path, monkeypatch):
    """One that is named and lacks them is not passed over for others."""
    monkeypatch.setenv("ADAHESSIAN_DATA", str(tmp_path))
    with pytest.raises(DataError, match="has no file train-images"):
        all_images()


def test_loss_and_error_of_a_network_that_is_constant():
    """The residual is the source inside, and the constant on the boundary."""
    task = PUBLISHED_TASKS["pinn_shallow"]()
    x, flag = task.train[0][:, :2], task.train[0][:, 2] > 0
    edge = np.any((x == 0) | (x == 1), axis=1)
    np.testing.assert_array_equal(edge, flag)
    waves = np.prod(np.sin(np.pi * x), axis=1)
    params = [(np.ones((2, 3)), np.ones(3)), (np.zeros((3, 1)), np.full(1, 0.7))]
    inside = np.mean((2 * np.pi**2 * waves[~edge]) ** 2)
    loss, _ = task.loss_fn(params, task.train)
    np.testing.assert_allclose(loss, (inside + 0.7**2) / 2, rtol=1e-5)
    exact = np.prod(np.sin(np.pi * task.validation[0][:, :2]), axis=1)
    expected = np.sqrt(np.mean((0.7 - exact) ** 2) / np.mean(exact**2))
    got = task.metric(params, task.validation)
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["davda54, delayed", NEWTON, "Sophia"])
def test_steps_one_by_one_are_those_of_the_loop(name):
    """Whether to estimate is chosen on the host there."""
    task, contender = quadratic(), CONTENDERS[name]
    looped = protocol.make_train(task._replace(loops=True), contender)
    compiled = protocol.make_train(task, contender)
    one_by_one, in_one = (train(contender.start, 3, 60) for train in (looped, compiled))
    np.testing.assert_allclose(one_by_one.validation, in_one.validation, rtol=1e-4)


def test_sophia_is_that_of_optax():
    """The estimate is made outside of it, by the same estimator at the same counts."""
    task, steps = quadratic(), 45
    options = {"gamma": 100.0}  # so that the clip leaves most entries to the estimate
    train = protocol.make_train(task, sophia(start=1e-2, **options))
    options |= {"weight_decay": task.weight_decay, "update_interval": 10}
    tx = optax.contrib.sophia(WarmupCosine(1e-2, steps), **options)
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
