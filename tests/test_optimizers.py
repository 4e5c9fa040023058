# SPDX-License-Identifier: Apache-2.0
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from tests.problems import mlp


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's own schedules and wrappers mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def one_update(tx, params, grads, diag):
    return tx.update(grads, tx.init(params), params, hessian_diag=diag)[0]


def test_is_the_transform_with_decay_and_learning_rate(x64):
    del x64
    params, loss = mlp()
    options = {"b1": 0.8, "b2": 0.9, "eps": 1e-3, "hessian_power": 0.7}
    tx = ah.adahessian(0.3, weight_decay=0.1, **options)
    inner = ah.scale_by_adahessian(**options)
    grads = jax.grad(loss)(params)
    updates, _ = tx.update(grads, tx.init(params), params, obj_fn=loss)
    scaled, _ = inner.update(grads, inner.init(params), params, obj_fn=loss)
    expected = jax.tree.map(lambda u, p: -0.3 * (u + 0.1 * p), scaled, params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12), updates, expected
    )


@pytest.mark.parametrize(
    "mask",
    [{"a": True, "b": False}, lambda p: {"a": True, "b": False}],
    ids=["tree", "fn"],
)
def test_weight_decay_mask(mask):
    params = {"a": jnp.full(2, 10.0), "b": jnp.full(2, 10.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    ones = jax.tree.map(jnp.ones_like, params)
    tx = ah.adahessian(0.5, weight_decay=0.1, weight_decay_mask=mask)
    updates = one_update(tx, params, zeros, ones)
    np.testing.assert_allclose(updates["a"], -0.5)
    np.testing.assert_allclose(updates["b"], 0.0)


def test_weight_decay_spares_frozen_integers():
    params = {"w": jnp.ones(2), "n": jnp.asarray([100, 200])}
    tx = ah.adahessian(0.5, weight_decay=0.1)
    updates = one_update(tx, params, params, params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_array_equal(new["n"], params["n"])


def test_learning_rate_schedule():
    params = jnp.ones(2)
    tx = ah.adahessian(lambda count: 0.1 * (count + 1), eps=0.0)
    state = tx.init(params)
    for t in range(3):
        updates, state = tx.update(params, state, params, hessian_diag=2 * params)
        np.testing.assert_allclose(updates, -0.1 * (t + 1) / 2, rtol=1e-4)


def test_all_floats_can_be_injected():
    params, loss = mlp(jnp.float32)
    options = {
        "learning_rate": 0.1,
        "b1": 0.8,
        "b2": 0.95,
        "eps": 1e-3,
        "hessian_power": 0.8,
        "relative_damping": 0.1,
        "weight_decay": 0.01,
    }
    injected = optax.inject_hyperparams(ah.adahessian)(**options)
    static = ("update_interval", "initial_refreshes")
    injected_static = optax.inject_hyperparams(ah.adahessian, static)(**options)
    plain = ah.adahessian(**options)
    grads = jax.grad(loss)(params)
    results = []
    for tx in (plain, injected, injected_static):
        state, p = tx.init(params), params
        step = jax.jit(lambda g, s, p, tx=tx: tx.update(g, s, p, obj_fn=loss))
        for _ in range(3):
            updates, state = step(grads, state, p)
            p = optax.apply_updates(p, updates)
        results.append(p)
    for other in results[1:]:
        chex.assert_trees_all_close(results[0], other, rtol=1e-4)
    state = injected.init(params)
    state.hyperparams["learning_rate"] = jnp.asarray(0.0)
    updates, _ = injected.update(grads, state, params, obj_fn=loss)
    assert not any(np.any(u) for u in jax.tree.leaves(updates))


def test_update_interval_can_be_injected():
    tx = optax.inject_hyperparams(ah.adahessian)(learning_rate=0.1, update_interval=3)
    params = jnp.ones(2)
    state = tx.init(params)
    update = jax.jit(lambda s: tx.update(params, s, params, obj_fn=jnp.sum)[1])
    for refreshes in (1, 1, 1, 2, 2):
        state = update(state)
        assert state.inner_state[0].refreshes == refreshes


def test_composes_with_chain():
    params, loss = mlp(jnp.float32)
    tx = optax.chain(
        optax.clip_by_global_norm(1e-3),
        ah.scale_by_adahessian(),
        optax.scale_by_learning_rate(0.1),
    )
    alone = ah.adahessian(0.1)
    grads = jax.grad(loss)(params)
    clipped, _ = optax.clip_by_global_norm(1e-3).update(grads, None)
    updates, _ = tx.update(grads, tx.init(params), params, obj_fn=loss)
    expected, _ = alone.update(clipped, alone.init(params), params, obj_fn=loss)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


class Variants(chex.TestCase):
    """The same training with and without jit, and on a device axis."""

    @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
    def test_trains(self):
        params, loss = mlp(jnp.float32)
        tx = ah.adahessian(0.05, update_interval=2, initial_refreshes=3)

        def step(params, state):
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params, obj_fn=loss)
            return value, optax.apply_updates(params, updates), state

        def train(step):
            p, state, losses = params, tx.init(params), []
            for _ in range(6):
                value, p, state = step(p, state)
                if value.ndim:  # pmap adds an axis of devices
                    value, p, state = jax.tree.map(lambda x: x[0], (value, p, state))
                losses.append(float(value))
            return losses

        with jax.numpy_dtype_promotion("standard"):
            losses, expected = train(self.variant(step)), train(jax.jit(step))
        assert losses[-1] < losses[0]
        np.testing.assert_allclose(losses, expected, rtol=1e-4)
