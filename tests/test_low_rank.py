# SPDX-License-Identifier: Apache-2.0
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from adahessian_jax.low_rank import _eigenvalues


def spiked(n=24, strong=(50.0, -30.0), noise=0.3, seed=0):
    """A quadratic whose Hessian has a few large eigenvalues over small noise."""
    rng = np.random.default_rng(seed)
    directions, _ = np.linalg.qr(rng.normal(size=(n, len(strong))))
    a = noise * rng.normal(size=(n, n))
    h = directions @ np.diag(strong) @ directions.T + (a + a.T) / 2
    h = jnp.asarray(h)
    params = {"a": jnp.zeros((n // 2,)), "b": jnp.zeros((2, n // 4))}

    def loss(p):
        w = ravel_pytree(p)[0]
        return jnp.sum(w * jnp.dot(h, w)) / 2

    return params, loss, np.asarray(h)


def run(control, params, loss, steps, seed=0, state=None):
    """Return the estimates of successive updates, and the last state."""
    estimator = ah.hutchinson(control_variate=control, seed=seed)
    state = estimator.init(params) if state is None else state

    def step(state, _):
        diag, state = estimator.update(None, state, params, obj_fn=loss)
        return state, ravel_pytree(diag)[0]

    state, diags = jax.jit(lambda s: jax.lax.scan(step, s, length=steps))(state)
    return np.asarray(diags), state


def squared_error(diags, h):
    return np.mean(np.sum((diags - np.diag(h)) ** 2, axis=1))


def plain_variance(h):
    return np.sum(h**2) - np.sum(np.diag(h) ** 2)


def test_removes_the_dominant_eigenvectors(x64):
    """With the two large eigenvalues gone little but the noise is left."""
    del x64
    params, loss, h = spiked()
    diags, state = run(ah.low_rank_control(2), params, loss, 3000)
    q = np.concatenate(
        [
            np.asarray(x).reshape(2, -1)
            for x in jax.tree.leaves(state.control_variate.basis)
        ],
        axis=1,
    )
    np.testing.assert_allclose(q @ q.T, np.eye(2), atol=1e-10)
    projected = np.linalg.norm(q @ np.linalg.eigh(h)[1][:, [0, -1]], axis=0)
    assert np.all(projected > 0.99)
    assert squared_error(diags[1000:], h) < plain_variance(h) / 20


def test_is_unbiased_for_a_frozen_state(x64):
    """Mean and variance are those of H - C, from the closed form for that matrix."""
    del x64
    params, loss, h = spiked()
    _, state = run(ah.low_rank_control(3), params, loss, 50)
    cv = state.control_variate
    q = np.concatenate([x.reshape(3, -1) for x in jax.tree.leaves(cv.basis)], axis=1)
    eigenvalues = np.asarray(_eigenvalues(cv))
    assert np.count_nonzero(eigenvalues) >= 2
    rest = h - q.T @ np.diag(eigenvalues) @ q
    estimator = ah.hutchinson(control_variate=ah.low_rank_control(3))

    def one(key):
        start = state._replace(key=key)
        return ravel_pytree(estimator.update(None, start, params, obj_fn=loss)[0])[0]

    n = 20_000
    keys = jax.random.split(jax.random.PRNGKey(3), n)
    estimates = np.asarray(jax.jit(jax.vmap(one))(keys))
    variance = np.sum(rest**2, axis=1) - np.diag(rest) ** 2
    error = np.abs(estimates.mean(axis=0) - np.diag(h))
    assert np.max(error / np.sqrt(variance / n)) < 4
    np.testing.assert_allclose(
        np.sum(estimates.var(axis=0)), np.sum(variance), rtol=0.05
    )


@pytest.mark.parametrize("strong", [(50.0, -30.0), (), (5.0, 4, 3, 2, 1)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 8])
def test_never_worse_than_plain_while_it_warms_up(rank, strong, x64):
    """Variance at most plain / 0.95, from the average over 400 independent starts.

    Averaged over windows of 10 updates, whose relative standard error is below 2%.
    """
    del x64
    params, loss, h = spiked(strong=strong)
    control = ah.low_rank_control(rank)

    def one(key):
        estimator = ah.hutchinson(control_variate=control, seed=key)

        def step(state, _):
            diag, state = estimator.update(None, state, params, obj_fn=loss)
            return state, ravel_pytree(diag)[0]

        return jax.lax.scan(step, estimator.init(params), length=60)[1]

    keys = jax.random.split(jax.random.PRNGKey(0), 400)
    diags = np.asarray(jax.jit(jax.vmap(one))(keys))
    errors = np.mean(np.sum((diags - np.diag(h)) ** 2, axis=2), axis=0)
    windows = errors.reshape(6, 10).mean(axis=1)
    assert np.all(windows < plain_variance(h) / 0.95 * 1.02)


def test_degenerate_directions_stay_zero(x64):
    """H of rank one: the other directions have no products to point along."""
    del x64
    params = {"w": jnp.zeros(5)}
    v = jnp.arange(1.0, 6.0)

    def loss(p):
        return jnp.dot(v, p["w"]) ** 2 / 2

    diags, state = run(ah.low_rank_control(3), params, loss, 100)
    assert np.all(np.isfinite(diags))
    assert np.count_nonzero(state.control_variate.lengths) == 1
    h = np.outer(v, v)
    assert squared_error(diags[60:], h) < plain_variance(h) / 50


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16], ids=str)
def test_zero_hessian_and_half_precision_are_finite(dtype):
    params = {"w": jnp.ones(4, dtype), "n": jnp.asarray(1), "none": None}
    for loss in (
        lambda p: jnp.sum(p["w"]).astype(jnp.float32),
        lambda p: jnp.sum(jnp.square(p["w"].astype(jnp.float32))) ** 2,
    ):
        estimator = ah.hutchinson(control_variate=ah.low_rank_control(2))
        state = estimator.init(params)
        for _ in range(5):
            diag, new = estimator.update(None, state, params, obj_fn=loss)
            chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
            chex.assert_trees_all_equal_shapes_and_dtypes(diag, params)
            chex.assert_tree_all_finite((diag, new))
            state = new


@pytest.mark.parametrize("reuse", [True, False])
def test_lives_in_the_optimizer_state_under_cond(reuse):
    params, loss, _ = spiked()
    tx = ah.adahessian(
        0.1,
        hessian_ema="mean",
        update_interval=3,
        reuse_estimate=reuse,
        estimator=ah.hutchinson(control_variate=ah.low_rank_control(2)),
    )
    params = jax.tree.map(lambda x: x.astype(jnp.float32) + 1, params)
    state = tx.init(params)
    step = jax.jit(lambda s: tx.update(params, s, params, obj_fn=loss)[1])
    bases = []
    for _ in range(7):
        state = step(state)
        bases.append(np.asarray(state[0].estimator_state.control_variate.basis["a"]))
    changed = [not np.array_equal(a, b) for a, b in itertools.pairwise(bases)]
    assert changed == [False, False, True, False, False, True]


def test_memory_is_rank_copies_of_the_parameters():
    params, _, _ = spiked()
    state = ah.low_rank_control(5).init(params)
    jax.tree.map(lambda b, p: chex.assert_shape(b, (5, *p.shape)), state.basis, params)
