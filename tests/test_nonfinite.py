# SPDX-License-Identifier: Apache-2.0
"""What has no second derivative or overflows, long runs, and full counters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from adahessian_jax._src import xla
from adahessian_jax._src.curvature_state import saturating_sum

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


@EMA
@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: "-".join(s) or "every")
def test_follows_the_rule(schedule, hessian_ema, x64):
    """A mean over finite terms takes the place of those that are not."""
    d, order = estimates(), 2 if hessian_ema == "rms" else 1
    grads = np.random.default_rng(1).normal(size=d.shape)
    params = {"a": jnp.zeros(8), "b": {"c": jnp.zeros((2, 2))}}

    def tree(row):
        return {"a": jnp.asarray(row[:8]), "b": {"c": row[8:].reshape(2, 2)}}

    tx = ah.scale_by_adahessian(B1, B2, eps=0.0, hessian_ema=hessian_ema, **schedule)
    step = jax.jit(lambda g, s, d: tx.update(g, s, params, hessian_diag=d))
    state, m, mean = tx.init(params), 0.0, np.full(12, np.nan)
    terms = left_out = 0
    for t, (g, row) in enumerate(zip(grads, d, strict=True)):
        m = B1 * m + (1 - B1) * g
        refresh = t % schedule.get("update_interval", 1) == 0
        if refresh or t < schedule.get("initial_refreshes", 0):
            terms += 1
            left_out += int(np.sum(~np.isfinite(row)))
            # The weights of all terms so far, and of the new one.
            before, after = 1 - B2 ** (terms - 1), 1 - B2**terms
            new = np.where(np.isfinite(row), row, np.nan) ** order
            old = np.where(np.isnan(mean), new, mean)
            moved = (B2 * before * old + (1 - B2) * new) / after
            mean = np.where(np.isnan(new), mean, moved)
        h = np.sqrt(mean) if order == 2 else np.abs(mean)
        expected = np.nan_to_num(m / (1 - B1 ** (t + 1)) / h)  # none: no step
        updates, state = step(tree(g), state, tree(row))
        chex.assert_trees_all_close(updates, tree(expected), rtol=1e-9)
        assert state.curvature.nonfinite == left_out
    never = np.isnan(mean[:8])
    assert any(never)
    unset = state.curvature.nu["a"] == jnp.finfo("float64").max
    np.testing.assert_array_equal(unset, never)
    assert ah.diagnostics(state)["nonfinite"] == left_out > 20


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
    w, d = jnp.ones(2), jnp.array([1e20, 300.0], jnp.float32)
    mean, narrow = {"hessian_ema": "mean"}, {"nu_dtype": jnp.float16}
    for options, left_out in (({}, 1), (mean, 0), (narrow, 2)):
        tx = ah.scale_by_adahessian(**options)
        updates, state = tx.update(w, tx.init(w), w, hessian_diag=d)
        chex.assert_tree_all_finite(updates)
        assert state.curvature.nonfinite == left_out


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
        lengths = state.control_variate.lengths
        d, state = estimate(state, scale)
        if t == 5:  # squares overflow, and nothing of it is taken
            new = state.control_variate.lengths
            np.testing.assert_allclose(new, 0.98**0.5 * lengths, rtol=1e-3)
        chex.assert_tree_all_finite(state)
        assert t == 5 or (np.isfinite(d) == ~bad).all()
    assert state.control_variate.lengths[0] > 1


def test_a_gradient_that_is_nan_is_one_for_adam_too():
    """From the first step on, and in its own entries only."""
    w = jnp.array([1.0, 2.0])
    for tx in (ah.adahessian(0.1), ah.adahessian(0.1, clip_threshold=1.0)):
        for first_diag in (w, jnp.full(2, jnp.nan)):
            state, of_adam = tx.init(w), optax.adam(0.1).init(w)
            for diag, bad in ((first_diag, 0), (w, 0), (w, 1)):
                g = jnp.ones(2).at[bad].set(jnp.nan)
                u, state = tx.update(g, state, w, hessian_diag=diag)
                with jax.numpy_dtype_promotion("standard"):
                    expected, of_adam = optax.adam(0.1).update(g, of_adam, w)
                np.testing.assert_array_equal(jnp.isnan(u), jnp.isnan(expected))


def test_a_gradient_without_curvature_is_told():
    """By a warning where values can be seen, and by a count anywhere."""
    w = {"linear": jnp.ones(3), "curved": jnp.ones(2)}

    def loss(w):
        return jnp.sum(w["linear"]) + jnp.sum(w["curved"] ** 2)

    tx = ah.adahessian(0.1)
    grads, state = jax.grad(loss)(w), tx.init(w)
    with pytest.warns(UserWarning, match=r"params\['linear'\] is zero") as caught:
        tx.update(grads, state, w, obj_fn=loss)
    assert len(caught) == 1
    _, state = jax.jit(lambda s: tx.update(grads, s, w, obj_fn=loss))(state)
    assert ah.diagnostics(state)["flat"] == 3


def test_counters_saturate():
    """After 2**31 updates the averages go on, and no bias is left to correct."""
    tx = ah.scale_by_adahessian(eps=0.0, update_interval=2)
    w = jnp.array([1.0, 2.0, 3.0])
    full = dict.fromkeys(("count", "refreshes", "nonfinite"), jnp.int32(LARGEST - 1))
    curvature = tx.init(w).curvature._replace(nu=w**2, **full)
    state = tx.init(w)._replace(mu=w, curvature=curvature)
    for _ in range(3):
        updates, state = tx.update(w, state, w, hessian_diag=w.at[2].set(jnp.nan))
        np.testing.assert_allclose(updates, jnp.ones(3), rtol=1e-6)
        assert state.curvature.count == state.curvature.nonfinite == LARGEST
        assert state.curvature.refreshes >= LARGEST - 1


def test_a_leaf_of_more_entries_than_the_count_can_hold():
    """Nothing is run: the program can be made."""
    w, tx = jax.ShapeDtypeStruct((2**31 + 8,), jnp.float32), ah.scale_by_adahessian()
    update = jax.eval_shape(lambda w: tx.update(w, tx.init(w), w, hessian_diag=w)[0], w)
    assert update.shape == w.shape


@EMA
@pytest.mark.slow
@pytest.mark.parametrize("case", [(1, "float32"), (7, "float64")])
def test_a_hundred_thousand_updates(case, hessian_ema, x64):
    """Counters are exact, averages as exact as rounding once a step lets them be."""
    interval, dtype = case
    steps, b1, b2, order = 100_000, 0.9, 0.999, 2 if hessian_ema == "rms" else 1

    def row(t, cos):  # gradients and curvature, the last with a mean above zero
        return cos(0.01 * t + np.arange(4.0)), 2 + cos(0.37 * t + np.arange(4.0))

    options = {"hessian_ema": hessian_ema, "update_interval": interval}
    tx, params = ah.scale_by_adahessian(b1, b2, **options), jnp.zeros(4, dtype)

    def step(state, t):
        g, d = (x.astype(dtype) for x in row(jnp.float64(t), jnp.cos))
        return tx.update(g, state, params, hessian_diag=d)[::-1]

    times = jnp.arange(steps)
    state, updates = jax.jit(lambda s: jax.lax.scan(step, s, times))(tx.init(params))
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
    v /= 1 - b2**refreshes
    np.testing.assert_allclose(state.curvature.nu, v, rtol=2 * eps / (1 - b2))
    h = v ** (1 / order)
    tolerance = 2 * eps / (1 - b1) + 2 * eps / (1 - b2)
    np.testing.assert_allclose(updates[-1], m / h, atol=tolerance)


@pytest.mark.parametrize(
    "shape", [(7,), (37, 5), (300, 7), (3, 3, 70, 4), (1, 0), (0, 4), ()], ids=str
)
@pytest.mark.parametrize(
    "how", [lambda f: f, jax.jit, jax.vmap], ids=["eager", "jit", "vmap"]
)
def test_entries_left_out_are_counted_in_any_shape(shape, how, monkeypatch):
    """All or none of them too: no block of a sum is longer than its dtype can hold."""
    monkeypatch.setattr(xla, "_MANY", 1)
    x = np.random.default_rng(0).normal(size=(3, *shape))
    x[1], x[2] = np.nan, 0
    x[0] = np.where(x[0] < 0, np.inf, x[0])

    def counted(x):
        usable = {"a": jnp.isfinite(x), "b": jnp.isfinite(jnp.zeros(3))}
        return saturating_sum(jnp.int32(5), usable)

    expected = 5 + np.sum(~np.isfinite(x), axis=tuple(range(1, x.ndim)))
    got = how(counted)(x) if how is jax.vmap else list(map(how(counted), x))
    np.testing.assert_array_equal(got, expected)
