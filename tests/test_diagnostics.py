# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from tests.problems import quadratic

PARAMS = {"w": jnp.arange(1.0, 5.0), "b": [jnp.ones((2, 3))], "n": jnp.asarray(3)}
DIAG = {
    "w": jnp.array([1.0, -2.0, 4.0, 8.0]),
    "b": [jnp.full((2, 3), 2.0)],
    "n": jnp.asarray(0),
}


def after_one_update(tx, **kwargs):
    return tx.update(PARAMS, tx.init(PARAMS), PARAMS, hessian_diag=DIAG, **kwargs)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_values(jit):
    updates, state = after_one_update(ah.adahessian(0.5, eps=0.0))

    def report(state, updates):
        return ah.diagnostics(state, updates=updates, estimate=DIAG)

    values = (jax.jit(report) if jit else report)(state, updates)
    assert all(jnp.shape(v) == () for v in values.values())
    assert (values["count"], values["refreshes"]) == (1, 1)
    np.testing.assert_allclose(values["trace"], 11 + 12)
    np.testing.assert_allclose(values["negative_share"], 1 / 10)
    # A unit of momentum: lr / |D| over (1 - b1), which corrects m at the first step.
    steps = 0.5 / np.abs(DIAG["w"]) / (1 - 0.9)
    for q in (0.05, 0.5, 0.95):
        np.testing.assert_allclose(
            values[f"step_size/w/{q}"], np.quantile(steps, q), rtol=1e-4
        )
        np.testing.assert_allclose(values[f"step_size/b/0/{q}"], 2.5, rtol=1e-4)
    assert not any("n/" in name for name in values)


def test_clipped_share():
    tx = optax.chain(ah.scale_by_adahessian(eps=0.0), optax.clip(0.9))
    updates, state = after_one_update(tx)  # w / |D| = 1, 1, .75, .5; b / 2 = .5
    values = ah.diagnostics(state, updates=updates, clip_threshold=0.9)
    np.testing.assert_allclose(values["clipped_share"], 2 / 10)


def test_uses_the_estimate_that_the_state_keeps():
    _, state = after_one_update(ah.adahessian(0.1, update_interval=2))
    np.testing.assert_allclose(ah.diagnostics(state)["trace"], 23)
    _, state = after_one_update(ah.adahessian(0.1))
    assert "trace" not in ah.diagnostics(state)


def test_momentum_of_zero_is_left_out():
    zero = {**PARAMS, "w": jnp.array([0.0, 0.0, 1.0, 1.0])}
    tx = ah.adahessian(0.5, eps=0.0)
    updates, state = tx.update(zero, tx.init(PARAMS), PARAMS, hessian_diag=DIAG)
    values = ah.diagnostics(state, updates=updates)
    np.testing.assert_allclose(
        values["step_size/w/0.5"], np.median([5 / 4, 5 / 8]), rtol=1e-4
    )


def test_relative_error_of_independent_estimates():
    """Its square averages to the true one: H diagonal plus noise of known variance."""
    (params, loss), h = quadratic(jnp.float32, diagonal=False)
    h = np.asarray(h) + 8 * np.eye(8)
    _, state = (tx := ah.adahessian(0.1)).update(
        params, tx.init(params), params, obj_fn=loss
    )

    def shifted(p):
        return loss(p) + 4 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))

    def one(key):
        estimator = ah.hutchinson(seed=key)
        s = estimator.init(params)
        a, s = estimator.update(None, s, params, obj_fn=shifted)
        b, s = estimator.update(None, s, params, obj_fn=shifted)
        return ah.diagnostics(state, estimate=a, previous_estimate=b)["relative_error"]

    keys = jax.random.split(jax.random.PRNGKey(0), 4000)
    errors = np.asarray(jax.jit(jax.vmap(one))(keys))
    off_diagonal = np.sum(h**2) - np.sum(np.diag(h) ** 2)
    expected = off_diagonal / np.sum(np.diag(h) ** 2)
    squares = errors**2
    standard_error = squares.std() / np.sqrt(len(squares))
    # The ratio's own bias is of the order of expected**2.
    assert abs(squares.mean() - expected) < 4 * standard_error + 2 * expected**2


def test_estimates_that_disagree_have_an_infinite_error():
    _, state = after_one_update(ah.adahessian(0.1))
    opposite = jax.tree.map(lambda x: -x, DIAG)
    values = ah.diagnostics(state, estimate=DIAG, previous_estimate=opposite)
    assert np.isinf(values["relative_error"])
