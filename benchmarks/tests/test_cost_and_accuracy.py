# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of cost and accuracy: their arithmetic, and committed tables."""

import json
import pathlib
import shutil
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import benchmarks
from benchmarks import networks
from benchmarks.accuracy import measure
from benchmarks.accuracy import report as accuracy_report
from benchmarks.accuracy.networks import Net, Run, digits
from benchmarks.ahead_of_time import report as ahead_of_time_report
from benchmarks.cost import __main__ as cost
from benchmarks.cost import report as cost_report
from benchmarks.cost import timing
from benchmarks.cost.contenders import prepare, recipes
from benchmarks.models import Mlp

RESULTS = pathlib.Path(benchmarks.__file__).parent / "results"
SMALL = Net(Mlp((4, 10), jnp.tanh), partial(digits, 14), 8, 1e-2)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("step_cost", cost_report.write),
        ("estimator_accuracy", accuracy_report.write),
        ("control_variates", accuracy_report.write_batch_sizes),
        ("ahead_of_time", ahead_of_time_report.write),
    ],
)
def test_committed_table_is_that_of_the_committed_result(name, write, tmp_path):
    """And a figure is drawn, where there is one."""
    path = tmp_path / f"{name}.json"
    shutil.copy(RESULTS / path.name, path)
    write(path)
    committed = (RESULTS / path.name).with_suffix(".md").read_text("utf-8")
    assert path.with_suffix(".md").read_text("utf-8") == committed
    for figure in RESULTS.glob(f"{name}.png"):
        assert (tmp_path / figure.name).stat().st_size > 10_000


def test_every_step_is_described_and_can_be_timed():
    """On a small network, where the baseline is itself."""
    net = networks.mlp((8, 8, 3), batch=4)
    chosen = recipes(net)
    assert list(chosen) == [k for k in cost_report.CONTENDERS if k in chosen]
    contenders = [prepare(k, v, net.params, net.batch) for k, v in chosen.items()]
    for contender in contenders:
        contender.time()
    assert contenders[0].costs["flops"] < contenders[1].costs["flops"]
    branching = {c.name for c in contenders if c.costs["flops"] is None}
    expected = {"soap", "newton", "newton, own rate", "davda54, every 10, cond"}
    assert branching == expected | {"optax sophia", "optax sophia, every 10"}
    turning = (c for c in contenders if c.name in ("soap", "newton"))
    assert all(p.cycle == 10 for c in turning for p in c._programs)


def test_a_step_measured_again_leaves_the_baseline_of_the_others(tmp_path, monkeypatch):
    """Their ratios are to that of their own run."""
    monkeypatch.setattr(timing, "default_platform", lambda: "none to pin")
    first, second = {"optax.adam": 2.0, "soap": 3.0}, {"optax.adam": 9.0, "paper": 4.0}
    for ms, only in ((first, []), (second, ["--only", "paper"])):
        rows = {k: {"ms": x, "ratio": x / 2, "rounds": 9} for k, x in ms.items()}
        tables = {"steps": lambda _, rows=rows: iter([("MLP", rows)])}
        monkeypatch.setattr(cost, "TABLES", tables)
        monkeypatch.setattr(sys, "argv", ["cost", "--out", str(tmp_path), *only])
        cost.main()
    saved = json.loads((tmp_path / "step_cost.json").read_text("utf-8"))
    got = {k: row["ms"] for k, row in saved["steps"]["cases"]["MLP"].items()}
    assert got == {"optax.adam": 2.0, "soap": 3.0, "paper": 4.0}


def test_exact_diagonals():
    """Of the Hessian, and of the Gauss-Newton matrix by its Jacobians."""
    run = Run(SMALL, 0)
    flat, unravel = jax.flatten_util.ravel_pytree(run.params)

    def predict(w):
        return run.predict(unravel(w), run.batch.inputs)

    where = np.arange(0, flat.size, 3)
    got = measure.exact_diagonals(run, run.params, where)
    hessian = jax.hessian(lambda w: run.loss(unravel(w), run.batch))(flat)
    np.testing.assert_allclose(got["hessian"], jnp.diag(hessian)[where], atol=1e-6)
    p = jax.nn.softmax(predict(flat))
    inner = jax.vmap(jnp.diag)(p) - p[:, :, None] * p[:, None, :]
    jacobian = jax.jacobian(predict)(flat)
    expected = jnp.einsum("nip,nij,njp->p", jacobian, inner, jacobian) / len(p)
    np.testing.assert_allclose(got["gauss_newton"], expected[where], atol=1e-6)


def test_accuracy_is_measured_at_each_stage():
    """All estimators, and control variates in batches of any size."""
    settings = measure.Settings(draws=8, early=1, late=4, tracked=2)
    result = measure.measure_net(SMALL, settings, 0)
    assert list(result["stages"]) == ["init", "early", "late"]
    for measured in result["stages"].values():
        rows = measured["estimators"]
        assert rows.keys() == measure.ESTIMATORS.keys()
        assert rows["gauss_newton"]["relative_error"] < 2
        assert abs(rows["hutchinson"]["bias_overall_in_se"]) < 6
    costs = result["cost_beyond_gradient"]
    assert 0 < costs["gauss_newton"] < costs["hutchinson"] < costs["hutchinson n=4"]
    rows = measure.measure_batch_size(SMALL, 16, (1, 2), 4, 0)
    assert [row["step"] for row in rows] == [1, 2]
    assert rows[0]["estimators"].keys() == set(measure.CONTROLLED)
