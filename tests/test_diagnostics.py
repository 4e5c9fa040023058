# SPDX-License-Identifier: Apache-2.0
"""What a state shows, by numbers worked out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adahessian_jax as ah

PARAMS = {"w": jnp.arange(1.0, 5.0), "b": [jnp.ones((2, 3))], "n": jnp.asarray(3)}
DIAG = {"w": jnp.array([1.0, -2.0, 4.0, 8.0]), "b": [jnp.full((2, 3), 2.0)]}
DIAG["n"] = jnp.asarray(0)


def after_one_update(tx, grads=PARAMS):
    return tx.update(grads, tx.init(PARAMS), PARAMS, hessian_diag=DIAG)


def test_values():
    updates, state = after_one_update(ah.adahessian(0.5, eps=0.0))
    report = jax.jit(lambda s, u: ah.diagnostics(s, updates=u, estimate=DIAG))
    values = report(state, updates)
    assert all(jnp.shape(v) == () for v in values.values())
    assert (values["count"], values["refreshes"], values["nonfinite"]) == (1, 1, 0)
    np.testing.assert_allclose(values["trace"], 11 + 12)
    np.testing.assert_allclose(values["negative_share"], 1 / 10)
    # A unit of momentum: lr / |D| over (1 - b1), which corrects m at the first step.
    steps = 0.5 / np.abs(DIAG["w"]) / (1 - 0.9)
    for q in (0.05, 0.5, 0.95):
        expected = np.quantile(steps, q)
        np.testing.assert_allclose(values[f"step_size/w/{q}"], expected, rtol=1e-4)
        np.testing.assert_allclose(values[f"step_size/b/0/{q}"], 2.5, rtol=1e-4)
        every = np.quantile([*steps, *[2.5] * 6], q)
        np.testing.assert_allclose(values[f"step_size/{q}"], every, rtol=1e-4)
    assert not any("n/" in name for name in values)


def test_momentum_of_zero_is_left_out():
    for some, expected in ((1.0, [5 / 4, 5 / 8]), (0.0, [0.0])):
        zero = {**PARAMS, "w": jnp.array([0.0, 0.0, some, some])}
        updates, state = after_one_update(ah.adahessian(0.5, eps=0.0), zero)
        with jax.debug_nans(True):
            values = ah.diagnostics(state, updates=updates)
        for q in (0.05, 0.5, 0.95):
            got = values[f"step_size/w/{q}"]
            np.testing.assert_allclose(got, np.quantile(expected, q), rtol=1e-4)


def test_what_else_is_at_hand():
    """Sharpness, an estimate with its error, and the rate of a quadratic model."""
    x = jax.random.normal(jax.random.key(0), (8, 3))
    w, loss = jnp.ones((3, 2)), ah.losses.squared_error
    tx = ah.newton(None, loss)

    def fun(w, x):
        return loss(jnp.dot(x, w), jnp.zeros((len(x), 2)))

    @jax.jit
    def look(w):
        args = {"predict_fn": functools.partial(jnp.dot, x)}
        updates, state = tx.update(jax.grad(fun)(w, x), tx.init(w), w, **args)
        find = functools.partial(ah.largest_eigenvalues, lambda w: fun(w, x), rtol=1e-5)
        return updates, state, find(w), find(w, preconditioner=(tx, state))

    updates, state, top, scaled = look(w)
    np.testing.assert_allclose(top.values, np.linalg.eigvalsh(x.T @ x / 8)[-1:], 1e-4)
    hutchinson = ah.hutchinson()
    estimate = ah.estimate_diagonal(fun, w, [x[:4], x[4:]], hutchinson, n_samples=9)
    values = ah.diagnostics(
        state,
        updates=updates,
        estimate=estimate,
        sharpness=top,
        preconditioned_sharpness=scaled,
    )
    assert all(jnp.shape(v) == () for v in values.values())
    assert values["sharpness"] == top.values[0]
    assert values["preconditioned_sharpness"] == scaled.values[0]
    assert values["trace"] == jnp.sum(estimate.mean)
    assert values["trace_standard_error"] == estimate.trace_standard_error > 0
    assert values["relative_error"] == estimate.relative_error > 0
    assert values["learning_rate"] == state[2].learning_rate > 0
    assert {"step_size/0.5"} < values.keys()


def test_clipped_share():
    tx = optax.chain(ah.scale_by_adahessian(eps=0.0), optax.clip(0.9))
    updates, state = after_one_update(tx)  # w / |D| = 1, 1, .75, .5; b / 2 = .5
    values = ah.diagnostics(state, updates=updates, clip_threshold=0.9)
    np.testing.assert_allclose(values["clipped_share"], 2 / 10)
    # In turned axes, where some entries are at the bound; none in the parameters' own.
    options = {"clip_threshold": 1e-3, "turn_interval": 3}
    tx = ah.newton(1.0, ah.losses.squared_error, **options)
    x, w = jax.random.normal(jax.random.key(0), (8, 3)), jnp.ones((3, 2))
    state = tx.init(w)
    for _ in range(5):  # turned after the first three
        args = {"predict_fn": lambda w: jnp.dot(x, w)}
        updates, state = tx.update(jnp.dot(x.T, x @ w), state, w, **args)
    values = ah.diagnostics(state, updates=updates, clip_threshold=1e-3)
    left, right = state[0].curvature.estimator_state.bases[0]
    at_bound = np.abs(left.T @ updates @ right) > 1e-3 * (1 - 1e-5)
    np.testing.assert_allclose(values["clipped_share"], at_bound.mean())
    assert at_bound.any()
    assert not np.any(np.abs(updates) > 1e-3 * (1 - 1e-5))


def test_relative_error_of_independent_estimates():
    """Over all pairs of signs its square averages to nearly the true one."""
    rng = np.random.default_rng(0)
    h = rng.normal(size=(5, 5)) / 4
    h = h + h.T + 4 * np.eye(5)
    signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * 5), axis=-1).reshape(-1, 5)
    estimates = jnp.asarray(signs * (signs @ h), jnp.float32)
    state = ah.adahessian(0.1).init(jnp.zeros(5))

    def error(a, b):
        values = ah.diagnostics(state, estimate=a, previous_estimate=b)
        return values["relative_error"]

    pairs = jax.vmap(jax.vmap(error, (None, 0)), (0, None))
    errors = jax.jit(pairs)(estimates, estimates)
    expected = (np.sum(h**2) - np.sum(np.diag(h) ** 2)) / np.sum(np.diag(h) ** 2)
    # The ratio's own bias is of the order of expected**2.
    np.testing.assert_allclose(np.mean(errors**2), expected, atol=expected**2)
    assert np.isinf(error(estimates[0], -estimates[0]))


def test_the_last_estimate_of_parameters_that_are_averaged():
    """Of each entry, those alone that were ever estimated."""

    def fun(p):
        return jnp.sum(jnp.abs(p["w"]) ** 1.5) + jnp.sum(p["conv"] ** 2)

    params = {"w": jnp.array([0.0, 1.0, 4.0]), "conv": jnp.ones((3, 3, 2, 4))}
    tx = ah.published.davda54(0.1, update_each=2, average_conv_kernel=True)
    state = tx.init(params)
    assert ah.diagnostics(state)["trace"] == 0
    _, state = tx.update(jax.grad(fun)(params), state, params, obj_fn=fun)
    exact = ah.hessian_diag(fun, params)  # infinite at 0
    report = ah.diagnostics(state, previous_estimate=exact | {"w": 1.1 * exact["w"]})
    np.testing.assert_allclose(report["trace"], exact["w"][1:].sum() + 2 * 72)
    assert 0 < report["relative_error"] < 0.1


def test_of_a_masked_optimizer():
    """Trees of all parameters are looked at where they are its own."""
    masked = optax.masked(
        ah.adahessian(0.5, eps=0.0), {"w": True, "b": False, "n": False}
    )
    args = {"hessian_diag": DIAG}
    updates, state = masked.update(PARAMS, masked.init(PARAMS), PARAMS, **args)
    report = ah.diagnostics(state, updates=updates, estimate=DIAG)
    np.testing.assert_allclose(report["trace"], 11)
    assert "step_size/w/0.5" in report
    assert not any("b/" in name for name in report)
