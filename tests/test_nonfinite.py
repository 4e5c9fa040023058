# SPDX-License-Identifier: Apache-2.0
"""What has no second derivative or overflows, long runs, and full counters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah

EMA = pytest.mark.parametrize("hessian_ema", ["rms", "mean"])
SCHEDULES = [{}, {"update_interval": 3}, {"update_interval": 3, "initial_refreshes": 5}]
B1, B2 = 0.9, 0.7
LARGEST = jnp.iinfo(jnp.int32).max


def estimates(steps=14, entries=12):
    """Estimates in which all that can be wrong is, at first, later, and for ever."""
    rng = np.random.default_rng(0)
    d = rng.normal(size=(steps, entries))
    bad = np.array([np.nan, np.inf, -np.inf])[rng.integers(0, 3, size=d.shape)]
    d = np.where(rng.uniform(size=d.shape) < 0.3, bad, d)
    d[0, :4] = np.nan
    d[:, 0] = np.nan
    d[:7, 1] = np.inf
    d[:, 2] = np.where(np.isfinite(d[:, 2]), d[:, 2], 1.5)  # right from the second on
    return d


class Entry:
    """What should become of one parameter: the rule, without any array."""

    def __init__(self, order):
        self.order, self.m, self.mean, self.terms, self.left_out = (
            order,
            0.0,
            None,
            0,
            0,
        )

    def step(self, t, g, d, refresh):
        self.m = B1 * self.m + (1 - B1) * g
        self.terms += refresh
        self.left_out += refresh and not np.isfinite(d)
        if refresh and np.isfinite(d):
            # The weights of all terms so far, and of the new one.
            before, after = 1 - B2 ** (self.terms - 1), 1 - B2**self.terms
            new = d**self.order
            old = new if self.mean is None else self.mean
            self.mean = (B2 * before * old + (1 - B2) * new) / after
        if self.mean is None:
            return 0.0
        h = np.sqrt(self.mean) if self.order == 2 else abs(self.mean)
        return self.m / (1 - B1**t) / h


@EMA
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(s) or "every")
def test_follows_the_rule(schedule, hessian_ema, x64):
    d = estimates()
    entries = [Entry(2 if hessian_ema == "rms" else 1) for _ in d[0]]
    grads = np.random.default_rng(1).normal(size=d.shape)
    params = {"a": jnp.zeros(8), "b": {"c": jnp.zeros((2, 2))}}

    def tree(row):
        return {"a": jnp.asarray(row[:8]), "b": {"c": row[8:].reshape(2, 2)}}

    tx = ah.scale_by_adahessian(B1, B2, eps=0.0, hessian_ema=hessian_ema, **schedule)
    step = jax.jit(lambda g, s, d: tx.update(g, s, params, hessian_diag=d))
    state = tx.init(params)
    for t, (g, row) in enumerate(zip(grads, d, strict=True)):
        refresh = t % schedule.get("update_interval", 1) == 0
        refresh |= t < schedule.get("initial_refreshes", 0)
        expected = [
            e.step(t + 1, *numbers, refresh)
            for e, *numbers in zip(entries, g, row, strict=True)
        ]
        updates, state = step(tree(g), state, tree(row))
        chex.assert_trees_all_close(updates, tree(np.array(expected)), rtol=1e-9)
        assert state.curvature.nonfinite == sum(e.left_out for e in entries)
    never = [e.mean is None for e in entries]
    assert any(never)
    np.testing.assert_array_equal(np.isinf(state.curvature.nu["a"]), never[:8])
    assert ah.diagnostics(state)["nonfinite"] == state.curvature.nonfinite > 20


def rough(params):
    """Finite value and gradient everywhere, but no second derivative at one."""
    return sum(jnp.sum(jnp.abs(p - 1) ** 1.5 + (p - 1) ** 2) for p in params.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_entries_without_a_second_derivative(dtype):
    """One parameter is where it has none; the others train as if it were not."""
    tx = ah.adahessian(0.1, nu_dtype=jnp.float32)
    fused = ah.value_and_grad_with_curvature(rough, tx)

    @jax.jit
    def first_update(params):
        _, grads, curvature = fused(params, state=tx.init(params))
        return tx.update(grads, tx.init(params), params, curvature=curvature)

    params = {"w": jnp.array([1.0, 3.0, -1.0], dtype), "b": jnp.array([2.0], dtype)}
    assert not jnp.isfinite(ah.hessian_diag(rough, params)["w"][0])
    updates, state = first_update(params)
    others, same = first_update({**params, "w": params["w"].at[0].set(0.5)})
    counts = (state[0].curvature.nonfinite, same[0].curvature.nonfinite)
    assert (updates["w"][0], *counts) == (0, 1, 0)
    assert (updates["w"][1:] != 0).all()
    # The Hessian is diagonal, so that probes of another first entry change nothing.
    chex.assert_trees_all_equal(updates, {**others, "w": others["w"].at[0].set(0)})


def test_what_overflows_is_left_out():
    """In the dtype of the estimate, or the average's where that holds squares."""
    w = jnp.ones(2)
    for options, left_out in (
        ({}, 1),
        ({"hessian_ema": "mean"}, 0),
        ({"nu_dtype": jnp.float16}, 2),
    ):
        tx = ah.scale_by_adahessian(**options)
        d = jnp.array([1e20, 300.0], jnp.float32)
        updates, state = tx.update(w, tx.init(w), w, hessian_diag=d)
        chex.assert_tree_all_finite(updates)
        assert state.curvature.nonfinite == left_out

    def loss(w):  # curvature above 65,504
        return jnp.sum(jnp.array([1e5, 10.0]) * w.astype(jnp.float32) ** 2 / 2)

    w = jnp.array([0.01, 0.5], jnp.float16)
    tx = ah.adahessian(0.1, estimator=ah.hutchinson(2), nu_dtype=jnp.float32)
    updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, obj_fn=loss)
    assert updates[0] == 0 > updates[1]
    assert state[0].curvature.nonfinite == 1


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
def test_an_entry_that_one_device_cannot_estimate_none_does():
    tx = ah.adahessian(0.1, estimator=ah.hutchinson(axis_name="data"))
    w, kink = jnp.array([1.0, 2.0]), jnp.full(8, 9.0).at[5].set(1.0)

    def loss(w, kink):
        return jnp.sum(w**2 + jnp.abs(w - kink) ** 1.5)

    def step(w, state, kink):
        grads = jax.lax.pmean(jax.grad(loss)(w, kink), "data")
        return tx.update(grads, state, w, obj_fn=lambda p: loss(p, kink))

    run = jax.pmap(step, axis_name="data", in_axes=(None, None, 0))
    updates, state = run(w, tx.init(w), kink)
    assert (updates[:, 0] == 0).all() & (updates[:, 1] < 0).all()
    assert (state[0].curvature.nonfinite == 1).all()


@jax.numpy_dtype_promotion("standard")  # Adam needs it
def test_gradients_that_are_not_finite_go_where_they_go_in_adam():
    tx, adam = ah.scale_by_adahessian(), optax.scale_by_adam()
    w = jnp.ones(4)
    state, adam_state = tx.init(w), adam.init(w)
    rows = [[1, 1, 1, 1], [jnp.nan, jnp.inf, 1, 1], [1, 1, 1, 1], [1, 1, -jnp.inf, 1]]
    for row in rows:
        grads = jnp.array(row, jnp.float32)
        updates, state = tx.update(grads, state, w, hessian_diag=jnp.ones(4))
        expected, adam_state = adam.update(grads, adam_state, w)
        np.testing.assert_array_equal(state.mu, adam_state.mu)
        np.testing.assert_array_equal(np.isfinite(updates), np.isfinite(expected))


def test_the_low_rank_control_forgets_what_it_cannot_use():
    """Products with bad entries spoil those of the estimate, and nothing later."""
    estimator = ah.hutchinson(control_variate=ah.low_rank_control(2))
    a = np.random.default_rng(0).normal(size=(6, 6))
    h = jnp.asarray(a @ a.T, jnp.float32)

    @jax.jit
    def estimate(state, scale):
        def loss(w):
            return jnp.sum(scale * w**3) + jnp.dot(w, jnp.dot(h, w)) / 2

        return estimator.update(None, state, jnp.full(6, 1e-3), obj_fn=loss)

    state = estimator.init(jnp.zeros(6))
    for t in range(12):
        bad = jnp.arange(6) == (3 if t in (0, 7, 8) else -1)
        scale = jnp.full(6, 1e22) if t == 5 else jnp.where(bad, jnp.inf, 0.0)
        d, state = estimate(state, scale)  # at 5 squares overflow
        chex.assert_tree_all_finite(state)
        assert t == 5 or (np.isfinite(d) == ~bad).all()
    assert state.control_variate.lengths[0] > 1


def test_counters_saturate():
    """After 2**31 updates the averages go on, and no bias is left to correct."""
    tx = ah.scale_by_adahessian(eps=0.0, update_interval=2)
    w = jnp.array([1.0, 2.0, 3.0])
    full = dict.fromkeys(("count", "refreshes", "nonfinite"), jnp.int32(LARGEST - 1))
    state = tx.init(w)
    curvature = state.curvature._replace(nu=w**2, **full)
    state = state._replace(mu=w, curvature=curvature)
    for _ in range(3):
        d = w.at[2].set(jnp.nan)
        updates, state = tx.update(w, state, w, hessian_diag=d)
        np.testing.assert_allclose(updates, jnp.ones(3), rtol=1e-6)
        assert state.curvature.count == state.curvature.nonfinite == LARGEST
        assert state.curvature.refreshes >= LARGEST - 1


def test_zero_curvature_is_a_value_and_no_estimate_is_none():
    """The published rule, m / eps; and zero."""
    for first, expected in ((0.0, 1e2), (jnp.nan, 0.0)):
        tx, w = ah.scale_by_adahessian(eps=1e-2), jnp.ones(2)
        d = jnp.array([first, 1.0])
        updates, _ = tx.update(w, tx.init(w), w, hessian_diag=d)
        np.testing.assert_allclose(updates, [expected, 1 / 1.01], rtol=1e-5)


def test_a_leaf_of_more_entries_than_the_count_can_hold():
    """Nothing is run: the program can be made."""
    w, tx = jax.ShapeDtypeStruct((2**31 + 8,), jnp.float32), ah.scale_by_adahessian()

    def update(w, state):
        return tx.update(w, state, w, hessian_diag=w)[0]

    assert jax.eval_shape(update, w, jax.eval_shape(tx.init, w)).shape == w.shape


@EMA
@pytest.mark.parametrize(("interval", "dtype"), [(1, "float32"), (7, "float64")])
def test_a_hundred_thousand_updates(interval, hessian_ema, dtype, x64):
    """Counters are exact, averages as exact as rounding once a step lets them be."""
    steps, b1, b2, order = 100_000, 0.9, 0.999, 2 if hessian_ema == "rms" else 1
    phases = np.array([0.0, 1.0, 2.0, 3.0])

    def row(t, cos):  # gradients and curvature, the last with a mean above zero
        return cos(0.01 * t + phases), 2 + cos(0.37 * t + phases)

    tx = ah.scale_by_adahessian(
        b1, b2, hessian_ema=hessian_ema, update_interval=interval
    )
    params = jnp.zeros(4, dtype)

    def step(carry, _):
        g, d = (
            x.astype(dtype) for x in row(jnp.float64(carry[1].curvature.count), jnp.cos)
        )
        return tx.update(g, carry[1], params, hessian_diag=d), None

    start = jnp.zeros(4, dtype), tx.init(params)
    run = jax.jit(lambda carry: jax.lax.scan(step, carry, length=steps)[0])
    updates, state = run(start)
    m = v = np.zeros(4)
    for t in range(steps):
        g, d = row(t, np.cos)
        m = b1 * m + (1 - b1) * g
        v = b2 * v + (1 - b2) * d**order if t % interval == 0 else v
    refreshes = -(-steps // interval)
    assert (state.curvature.count, state.curvature.refreshes) == (steps, refreshes)
    # A step rounds by at most 4 half units, and what it rounds decays with the average.
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(state.mu, m, atol=2 * eps / (1 - b1))
    np.testing.assert_allclose(state.curvature.nu, v, rtol=2 * eps / (1 - b2))
    v_hat = v / (1 - b2**refreshes)
    expected = m / (np.sqrt(v_hat) if order == 2 else v_hat)
    tolerance = 2 * eps / (1 - b1) + 2 * eps / (1 - b2)
    np.testing.assert_allclose(updates, expected, atol=tolerance)
