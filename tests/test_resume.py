# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax: training goes on as if it had not been interrupted."""

import functools
import inspect
import pathlib
import re
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

import adahessian_jax as ah
from adahessian_jax.transforms.soap import scale_by_soap
from tests.problems import at_once
from tests.test_devices import (
    LOSS,
    PARAMS,
    P,
    X,
    Y,
    loss_fn,
    make_estimator,
    make_optimizer,
    make_step,
    mesh_of,
    predict,
    train,
)

PARAMS = jax.tree.map(jnp.asarray, PARAMS)  # of single precision
AVERAGE = ah.block_average(0, 2, is_blocked=lambda path, x: x.ndim == 2)
CASES = {
    "hutchinson": make_optimizer("hutchinson", update_interval=4, averaging=AVERAGE),
    "published": ah.published.davda54(update_each=4),
    "low-rank": make_optimizer("low-rank", hessian_ema="mean", hessian_power=0.5),
    "newton": make_optimizer("newton"),
    "subspace": ah.subspace_newton(LOSS),
    "soap": ah.soap(0.1),
}


def through_checkpoint(path, tree, like):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path / "checkpoint", tree)
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path / "checkpoint", like)


@pytest.mark.parametrize("name", at_once(CASES, ["hutchinson", "newton"]))
def test_goes_on_bit_for_bit(name, tmp_path):
    """Cut after 6 of 11 steps, in the middle of a cycle of 4."""
    tx, params = CASES[name], PARAMS
    path = "function" if name in ("subspace", "soap") else "fused"
    step = jax.jit(make_step(tx, name, path))
    halfway = train(step, params, tx.init(params), X, Y, 6)
    undisturbed = train(step, *halfway, X, Y, 5)
    like = jax.tree.map(jnp.zeros_like, (params, tx.init(params)))
    restored = through_checkpoint(tmp_path, halfway, like)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, halfway)
    chex.assert_trees_all_equal(train(step, *restored, X, Y, 5), undisturbed)


@pytest.mark.slow
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_goes_on_with_another_number_of_devices(tmp_path, x64):
    """From 8 devices to 2, parameters and state sharded over them."""
    tx = CASES["low-rank"]
    step = jax.jit(make_step(tx, "low-rank", "fused"))

    def on(n, tree):
        split, whole = (NamedSharding(mesh_of(n), spec) for spec in (P("data"), P()))
        even = jax.tree.map(lambda x: x.ndim > 0 and x.shape[0] % 8 == 0, tree)
        return jax.device_put(tree, jax.tree.map(lambda x: split if x else whole, even))

    params, *batch = jax.tree.map(jnp.float64, (PARAMS, X, Y))
    start = params, tx.init(params)
    with jax.threefry_partitionable(True):
        halfway = train(step, *on(8, start), *on(8, batch), 6)
        undisturbed, _ = train(step, *jax.tree.map(np.asarray, halfway), *batch, 5)
        restored = through_checkpoint(tmp_path, halfway, on(2, start))
        assert all(len(x.sharding.device_set) == 2 for x in jax.tree.leaves(restored))
        chex.assert_trees_all_equal(restored, jax.tree.map(np.asarray, halfway))
        resumed, _ = train(step, *restored, *on(2, batch), 5)
    chex.assert_trees_all_close(resumed, undisturbed, rtol=1e-8, atol=1e-10)


def turned(of=None, **options):
    of = of or make_estimator("gauss-newton")
    return {"estimator": ah.in_eigenbasis(of, **options)}


def controlled(control):
    return {"estimator": ah.hutchinson(control_variate=control)}


SUM = LOSS.replace(reduction="sum")
MEAN = {"hessian_ema": "mean"}
GAUSS_NEWTON = {"estimator": make_estimator("gauss-newton")}
# Of the optimizer that made the state and of the one that gets it, and what it says.
REFUSED = {
    "interval-from-one": (
        {},
        {"update_interval": 2},
        "another update_interval \\(of 1",
    ),
    "interval-to-one": ({"update_interval": 2}, {}, "another update_interval"),
    "averaging": (
        {},
        {"averaging": lambda path, x: x.mean(0, keepdims=True)},
        "g: its",
    ),
    "estimator": ({}, GAUSS_NEWTON, "another estimator: its estimator_state is"),
    "low-rank": ({}, controlled(ah.low_rank_control(2)), "another estimator"),
    "rank": (*(controlled(ah.low_rank_control(n)) for n in (3, 2)), "another estimat"),
    "control-variate": ({}, controlled(ah.gauss_newton_control(LOSS)), "or loss"),
    "unbiased": (
        *(controlled(ah.ema_control(unbiased=b)) | MEAN for b in (False, True)),
        "or",
    ),
    "loss": (GAUSS_NEWTON, {"estimator": ah.gauss_newton(SUM)}, "estimator or loss"),
    "turned-loss": (turned(), turned(of=ah.gauss_newton(SUM)), "estimator or loss"),
    "axes_from": (turned(), turned(axes_from="factors"), "estimator or loss"),
    "squared": (turned(), turned(of=ah.squared_gradient()), "another estimator"),
    "eigenbasis": (GAUSS_NEWTON, turned(), "another estimator"),
    "max_dim": (turned(), turned(max_dim=16), "another estimator"),
    "n_vectors": (turned(max_dim=8), turned(max_dim=8, n_vectors=4), "another"),
    "hessian_ema": ({}, MEAN, "another hessian_ema, estimator or loss"),
}


@pytest.mark.parametrize(("before", "after", "says"), REFUSED.values(), ids=REFUSED)
def test_another_configuration_is_refused(before, after, says):
    state = ah.scale_by_adahessian(**before).init(PARAMS)
    tx = ah.scale_by_adahessian(**after)
    with pytest.raises(ValueError, match=says):
        tx.update(PARAMS, state, PARAMS, obj_fn=len)


def test_inside_jit_another_configuration_gives_nan():
    state = ah.adahessian(0.1).init(PARAMS)
    for hessian_ema, expected in (("rms", 0), ("mean", 1)):
        tx = ah.adahessian(0.1, hessian_ema=hessian_ema)
        update = jax.jit(
            lambda s, tx=tx: tx.update(PARAMS, s, PARAMS, hessian_diag=PARAMS)
        )
        assert all(
            np.isnan(u).mean() == expected for u in jax.tree.leaves(update(state)[0])
        )


def test_states_of_something_else_are_refused():
    tx, kept = ah.scale_by_adahessian(), ah.published.davda54(update_each=2)
    state, other = tx.init(PARAMS), tx.init({**PARAMS, "b": jnp.ones(3)})
    own_rate, every_2 = ah.newton(None, LOSS), ah.adahessian(0.1, update_interval=2)
    soap, model = scale_by_soap(), ah.scale_by_quadratic_model(LOSS)
    dicts = [x.init(PARAMS)._asdict() for x in (soap, model)]
    shape = r"must have the shape of the parameter, \(32,\), got \(3,\)"
    for refuses, wrong, error, says in (
        (tx, state._asdict(), TypeError, "state must be a ScaleByAdaHessianState"),
        (soap, dicts[0], TypeError, "state must be a ScaleBySoapState, got a dict"),
        (model, dicts[1], TypeError, "state must be a ScaleByQuadraticModelState"),
        (tx, state._replace(curvature={}), TypeError, "state must be a CurvatureState"),
        (tx, tx.init({"w": jnp.ones(2)}), ValueError, "state.mu must have the same"),
        (tx, other, ValueError, rf"state.mu\['b'\] {shape}"),
        (ah.newton(1.0, LOSS), own_rate.init(PARAMS), ValueError, "updates and states"),
        (kept, ah.adahessian(0.1).init(PARAMS), ValueError, "another update_interval"),
        (kept, every_2.init(PARAMS), ValueError, "another update_each"),
    ):
        with_extra = optax.with_extra_args_support(refuses)
        with pytest.raises(error, match=says):
            with_extra.update(PARAMS, wrong, PARAMS, obj_fn=len)


def table_of_the_docs():
    """Return for each argument the first word of what the docs say of it."""
    page = pathlib.Path(__file__).parents[1] / "docs" / "composition.md"
    table = page.read_text().split("| argument | with an old state |")[1]
    rows = re.findall(r"^\| (`.*?) \| (\w+)", table.split("\n\n")[0], re.M)
    return {n: word for names, word in rows for n in re.findall(r"`(\w+)`", names)}


CHANGED = {  # by what, beside an update_interval of 2
    ah.adahessian: {"learning_rate": 0.3, "b1": 0.8, "b2": 0.9, "eps": 0.1}
    | {"hessian_power": 0.5, "hessian_ema": "mean", "update_interval": 5}
    | {"initial_refreshes": 3, "clip_threshold": 0.1, "weight_decay": 0.1}
    | {
        "nesterov": True,
        "mu_dtype": "bfloat16",
        "nu_dtype": "bfloat16",
        "weight_decay_mask": {},
    }
    | {"averaging": lambda path, x: x.mean(0, keepdims=True), **GAUSS_NEWTON},
    ah.newton: {
        "loss": SUM,
        "decay": 0.5,
        "turn_interval": 3,
        "max_dim": 8,
        "n_vectors": 4,
        "seed": 5,
    }
    | {"axis_name": "data", "stacked": lambda path, x: x.ndim - 1}
    | {"schedule": optax.constant_schedule(0.5)},
    ah.subspace_newton: {"memory": 2, "damping": 0.5},
}
CHANGES = [(make, *x) for make, change in CHANGED.items() for x in change.items()]
# Of each verdict some.
SOON = "learning_rate", "hessian_ema", "update_interval", "nu_dtype", "averaging"
NOW = [x for x in CHANGES if x[0] is ah.adahessian and x[1] in SOON]
# Of these the first update tells nothing.
LATER = ("update_interval", "initial_refreshes", "decay", "turn_interval", "b1", "b2")


def test_the_table_has_every_argument():
    arguments = (inspect.signature(make).parameters for make in CHANGED)
    assert table_of_the_docs().keys() == set().union(*arguments)
    assert table_of_the_docs().keys() == {name for _, name, _ in CHANGES}


@pytest.mark.parametrize("change", at_once(CHANGES, NOW), ids=lambda x: str(x[1]))
def test_what_may_change_between_runs(change):
    """A free argument acts as if it had been there before, at the first update."""
    make, name, value = change
    first = {"learning_rate": 0.1, "update_interval": 2}
    if make is not ah.adahessian:
        first |= {"loss": LOSS, "max_dim": 16}
    if make is ah.subspace_newton:
        del first["learning_rate"]
    if name == "schedule":
        first |= {"learning_rate": None, "schedule": optax.constant_schedule(1.0)}
    value = jax.tree.map(lambda x: True, PARAMS) if value == {} else value
    old, new = make(**first), make(**{**first, name: value})
    state = old.init(PARAMS)

    def update(tx, state, jit=jax.jit):
        extra = {"obj_fn": lambda p: loss_fn(p, X, Y)}
        extra["predict_fn"] = lambda p: predict(p, X)
        one = functools.partial(tx.update, state=state, params=PARAMS, **extra)
        grads = jax.tree.map(lambda p: p[None], PARAMS)
        return jit(jax.vmap(one, axis_name="data"))(grads)[0]

    verdict = table_of_the_docs()[name]
    if verdict == "refused":
        with pytest.raises((ValueError, TypeError, AttributeError)):
            update(new, state, jit=lambda f: f)  # which can raise by values
        return
    expected = old if verdict == "without" else new
    expected, got = update(expected, expected.init(PARAMS)), update(new, state)
    if name != "axis_name":  # of other signs
        chex.assert_trees_all_equal(got, expected)
    if verdict == "free" and name not in LATER:
        assert not np.array_equal(got["w"], update(old, state)["w"])


def run(*paths):
    """Start the run in a process of its own."""
    program = pathlib.Path(__file__).parent / "resumable_run.py"
    argv, folder = [sys.executable, program, *paths], program.parent.parent
    return subprocess.Popen(argv, cwd=folder, stdout=subprocess.PIPE, text=True)


def kill_at(process, line):
    """Send SIGKILL as soon as the process says a line; return what it said first."""
    first = process.stdout.readline()
    assert line in map(str.strip, process.stdout)
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return first.strip()


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Killed between checkpoints, and twice while one is being written."""
    undisturbed = run(tmp_path / "undisturbed", tmp_path / "undisturbed.npz")
    killed = tmp_path / "killed"
    lines = ("step 10", "saving 20", "saving 32")
    starts = [kill_at(run(killed, tmp_path / "no.npz"), line) for line in lines]
    possible = {"from 0"}, {"from 4", "from 8"}, {"from 16", "from 20"}  # if whole
    assert all(s in p for s, p in zip(starts, possible, strict=True)), starts
    for process in (undisturbed, run(killed, tmp_path / "resumed.npz")):
        process.communicate()
        assert process.returncode == 0
    assert not (tmp_path / "no.npz").exists()
    names = ("undisturbed", "resumed")
    expected, got = (dict(np.load(tmp_path / f"{name}.npz")) for name in names)
    assert len(expected) > 10
    chex.assert_trees_all_equal(got, expected)
