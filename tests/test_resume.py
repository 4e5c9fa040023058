# SPDX-License-Identifier: Apache-2.0
"""Checkpoints by Orbax: training goes on as if it had not been interrupted."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding

import adahessian_jax as ah
from tests.test_devices import (
    ESTIMATORS,
    PARAMS,
    P,
    X,
    Y,
    make_estimator,
    make_step,
    mesh_of,
    train,
)


def save(path, tree):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)


def restore(path, like):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, like)


OPTIONS = {
    "every-step": {},
    "interval": {"update_interval": 4},
    "interval-without-reuse": {"update_interval": 4, "reuse_estimate": False},
    "initial-refreshes": {"update_interval": 4, "initial_refreshes": 3},
    "mean": {"hessian_ema": "mean", "hessian_power": 0.5},
    "block": {"averaging": ah.block_average(0, 2, is_blocked=lambda p, x: x.ndim == 2)},
}
CASES = [("hutchinson", options) for options in OPTIONS]
CASES += [(name, "interval") for name in ESTIMATORS if name != "hutchinson"]


@pytest.mark.parametrize("path", ["obj_fn", "fused"])
@pytest.mark.parametrize(("name", "options"), CASES)
def test_goes_on_bit_for_bit(name, options, path, tmp_path):
    """Cut after 6 of 11 steps, in the middle of a cycle of 4."""
    estimator = make_estimator(name)
    tx = ah.adahessian(0.02, estimator=estimator, **OPTIONS[options])
    step = jax.jit(make_step(tx, estimator, path))
    params = jax.tree.map(jnp.asarray, PARAMS)
    halfway = train(step, params, tx.init(params), X, Y, 6)
    save(tmp_path / "checkpoint", halfway)
    undisturbed = train(step, *halfway, X, Y, 5)

    like = jax.tree.map(jnp.zeros_like, (params, tx.init(params)))
    restored = restore(tmp_path / "checkpoint", like)
    chex.assert_trees_all_equal_shapes_and_dtypes(restored, halfway)
    resumed = train(step, *restored, X, Y, 5)
    chex.assert_trees_all_equal(resumed, undisturbed)


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("name", ["hutchinson", "low-rank"])
def test_goes_on_with_another_number_of_devices(name, tmp_path, x64):
    """From 8 devices to 2, parameters and state sharded over them."""
    estimator = make_estimator(name)
    tx = ah.adahessian(
        0.02, estimator=estimator, update_interval=4, relative_damping=0.1
    )
    step = jax.jit(make_step(tx, estimator, "fused"))

    def on(n, tree):
        sharding = NamedSharding(mesh_of(n), P("data"))
        whole = NamedSharding(mesh_of(n), P())
        return jax.tree.map(
            lambda x: jax.device_put(
                x, sharding if x.ndim and x.shape[0] % 8 == 0 else whole
            ),
            tree,
        )

    params, x, y = jax.tree.map(jnp.float64, (PARAMS, X, Y))
    with jax.threefry_partitionable(True):
        start = on(8, (params, tx.init(params)))
        halfway = train(step, *start, *on(8, (x, y)), 6)
        save(tmp_path / "checkpoint", halfway)
        undisturbed, _ = train(step, *jax.tree.map(np.asarray, halfway), x, y, 5)

        like = on(2, jax.tree.map(jnp.zeros_like, (params, tx.init(params))))
        restored = restore(tmp_path / "checkpoint", like)
        for leaf in jax.tree.leaves(restored):
            assert len(leaf.sharding.device_set) == 2
        chex.assert_trees_all_equal(restored, jax.tree.map(np.asarray, halfway))
        resumed, _ = train(step, *restored, *on(2, (x, y)), 5)
    chex.assert_trees_all_close(resumed, undisturbed, rtol=1e-8, atol=1e-10)


def a_state(params=PARAMS, **options):
    tx = ah.scale_by_adahessian(**options)
    return tx.init(params)


LOW_RANK = ah.hutchinson(control_variate=ah.low_rank_control(2))
OTHER = {
    "a-dictionary": (a_state()._asdict(), {}, "state must be a ScaleByAdaHessianState"),
    "other-parameters": (a_state({"w": jnp.ones(2)}), {}, r"state.mu must have the"),
    "other-shapes": (
        a_state({**PARAMS, "b": jnp.ones(3)}),
        {},
        r"state.mu\['b'\] must have the shape of the parameter, \(32,\), got \(3,\)",
    ),
    "interval-above-one": (
        a_state(),
        {"update_interval": 2},
        "another update_interval",
    ),
    "interval-of-one": (a_state(update_interval=2), {}, "another update_interval"),
    "reuse": (
        a_state(update_interval=2, reuse_estimate=False),
        {"update_interval": 2},
        "another reuse_estimate",
    ),
    "no-reuse": (
        a_state(update_interval=2),
        {"update_interval": 2, "reuse_estimate": False},
        "another reuse_estimate",
    ),
    "averaging": (
        a_state(),
        {"averaging": lambda path, leaf: jnp.mean(leaf, axis=0, keepdims=True)},
        "same averaging",
    ),
    "estimator": (
        a_state(),
        {"estimator": ah.gauss_newton("squared_error")},
        "state comes from another estimator than the optimizer's",
    ),
    "control-variate": (a_state(), {"estimator": LOW_RANK}, "another estimator"),
    "rank": (
        a_state(estimator=ah.hutchinson(control_variate=ah.low_rank_control(3))),
        {"estimator": LOW_RANK},
        "another estimator",
    ),
}


@pytest.mark.parametrize("case", OTHER)
def test_a_state_of_another_configuration_is_refused(case):
    state, options, message = OTHER[case]
    tx = ah.scale_by_adahessian(**options)
    kind = TypeError if case == "a-dictionary" else ValueError
    with pytest.raises(kind, match=message):
        tx.update(PARAMS, state, PARAMS, hessian_diag=PARAMS)


def test_what_may_change_between_runs():
    """Hyperparameters that leave the state as it is."""
    state = a_state(update_interval=2)
    tx = ah.scale_by_adahessian(
        b1=0.8,
        b2=0.9,
        eps=1e-4,
        hessian_power=0.5,
        hessian_ema="mean",
        update_interval=5,
        initial_refreshes=3,
        estimator=ah.hutchinson(4, seed=3),
    )
    updates, _ = tx.update(PARAMS, state, PARAMS, hessian_diag=PARAMS)
    chex.assert_trees_all_equal_shapes(updates, PARAMS)
