# SPDX-License-Identifier: Apache-2.0
"""Second derivatives that do not exist or overflow, where the gradient is fine."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah

JIT = pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
EMA = pytest.mark.parametrize("hessian_ema", ["rms", "mean"])
SCHEDULES = pytest.mark.parametrize(
    "schedule",
    [
        {},
        {"reuse_estimate": False},
        {"update_interval": 3},
        {"update_interval": 3, "reuse_estimate": False},
        {"update_interval": 3, "initial_refreshes": 5},
    ],
    ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "every-update",
)
B1, B2 = 0.9, 0.7


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

    def __init__(self, order, reuse):
        self.order, self.reuse = order, reuse
        self.m, self.mean, self.last, self.terms, self.left_out = 0.0, None, None, 0, 0

    def step(self, t, g, d, refresh):
        self.m = B1 * self.m + (1 - B1) * g
        if refresh and np.isfinite(d):
            self.last = d
        self.left_out += refresh and not np.isfinite(d)
        kept = self.last is not None and self.reuse
        if refresh or self.reuse:
            self.terms += 1
            if kept or (refresh and np.isfinite(d)):
                new = (self.last if kept else d) ** self.order
                # The weights of all terms so far, and of the new one.
                before, after = 1 - B2 ** (self.terms - 1), 1 - B2**self.terms
                old = new if self.mean is None else self.mean
                self.mean = (B2 * before * old + (1 - B2) * new) / after
        if self.mean is None:
            return 0.0
        h = np.sqrt(self.mean) if self.order == 2 else abs(self.mean)
        return self.m / (1 - B1**t) / h


@JIT
@EMA
@SCHEDULES
def test_follows_the_rule(schedule, hessian_ema, jit, x64):
    interval = schedule.get("update_interval", 1)
    d = estimates()
    # With an interval of 1 an entry left out has no last estimate to go on with.
    reuse = interval > 1 and schedule.get("reuse_estimate", True)
    entries = [Entry(2 if hessian_ema == "rms" else 1, reuse) for _ in d[0]]
    grads = np.random.default_rng(1).normal(size=d.shape)
    params = {"a": jnp.zeros(8), "b": {"c": jnp.zeros((2, 2))}}

    def tree(row):
        return {"a": jnp.asarray(row[:8]), "b": {"c": row[8:].reshape(2, 2)}}

    tx = ah.scale_by_adahessian(B1, B2, eps=0.0, hessian_ema=hessian_ema, **schedule)

    def step(grads, state, d):
        return tx.update(grads, state, params, hessian_diag=d)

    step = jax.jit(step) if jit else step
    state = tx.init(params)
    for t, (g, row) in enumerate(zip(grads, d, strict=True)):
        refresh = t % interval == 0 or t < schedule.get("initial_refreshes", 0)
        expected = [
            e.step(t + 1, *numbers, refresh)
            for e, *numbers in zip(entries, g, row, strict=True)
        ]
        updates, state = step(tree(g), state, tree(row))
        chex.assert_trees_all_close(updates, tree(np.array(expected)), rtol=1e-9)
        chex.assert_tree_all_finite(state)
        assert state.nonfinite == sum(e.left_out for e in entries)
    assert state.nonfinite > 20
    assert ah.diagnostics(state)["nonfinite"] == state.nonfinite


def rough(params):
    """Finite value and gradient everywhere, but no second derivative at zero."""
    return sum(jnp.sum(jnp.abs(p - 1) ** 1.5 + (p - 1) ** 2) for p in params.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("path", ["obj_fn", "fused"])
@EMA
@JIT
def test_entries_without_a_second_derivative(jit, hessian_ema, path, dtype):
    """One parameter starts where it has none; the others train as if it were not."""
    estimator = ah.hutchinson()
    tx = ah.adahessian(
        0.1, estimator=estimator, hessian_ema=hessian_ema, nu_dtype=jnp.float32
    )
    fused = ah.value_and_grad_with_curvature(rough, estimator)

    def step(params, state):
        if path == "fused":
            _, grads, curvature = fused(params, state=state)
            extra = {"curvature": curvature}
        else:
            grads, extra = jax.grad(rough)(params), {"obj_fn": rough}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    def train(params):
        state, run = tx.init(params), jax.jit(step) if jit else step
        for _ in range(5):
            params, state = run(params, state)
        return params, state

    start = {"w": jnp.array([1.0, 3.0, -1.0], dtype), "b": jnp.array([2.0], dtype)}
    assert not jnp.isfinite(ah.hessian_diag(rough, start)["w"][0])
    params, state = train(start)
    chex.assert_tree_all_finite((params, state))
    assert params["w"][0] == 1
    assert state[0].nonfinite == 5
    elsewhere, other = train({**start, "w": start["w"].at[0].set(0.5)})
    assert other[0].nonfinite == 0
    # The Hessian is diagonal, so that probes of another first entry change nothing.
    chex.assert_trees_all_equal(params["w"][1:], elsewhere["w"][1:])
    chex.assert_trees_all_equal(params["b"], elsewhere["b"])


@pytest.mark.parametrize("make", [ah.hutchinson, lambda: ah.hutchinson(2)])
def test_overflow_in_half_precision(make):
    """Curvature above 65,504 does not fit; the entry stays, its neighbour trains."""

    def loss(w):
        w = w.astype(jnp.float32)
        return jnp.sum(jnp.array([1e5, 10.0]) * w**2 / 2)

    tx = ah.adahessian(0.1, estimator=make(), nu_dtype=jnp.float32)
    w = jnp.array([0.01, 0.5], jnp.float16)
    state = tx.init(w)
    assert jnp.isfinite(jax.grad(loss)(w)).all()
    for t in range(20):
        updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
        w = optax.apply_updates(w, updates)
        assert state[0].nonfinite == t + 1
    chex.assert_tree_all_finite((w, state))
    assert w[0] == jnp.float16(0.01)
    assert abs(w[1]) < 0.3


def test_squares_that_overflow_are_left_out():
    """The average's dtype decides, not the estimate's."""
    w = jnp.ones(2)
    for options, left_out in (
        ({}, 1),
        ({"hessian_ema": "mean"}, 0),
        ({"nu_dtype": jnp.float16}, 2),
    ):
        tx = ah.scale_by_adahessian(**options)
        state = tx.init(w)
        d = jnp.array([1e20, 300.0], jnp.float32)
        updates, state = tx.update(w, state, w, hessian_diag=d)
        chex.assert_tree_all_finite((updates, state))
        assert state.nonfinite == left_out


@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.parametrize("bad_device", [None, 5])
def test_pmap(bad_device):
    """An entry that one device cannot estimate, none does; the replicas agree."""
    estimator = ah.hutchinson(axis_name="data")
    tx = ah.adahessian(0.1, estimator=estimator)
    w = jnp.array([1.0, 2.0])
    kink = np.full(8, 9.0, np.float32)
    if bad_device is not None:
        kink[bad_device] = 1.0  # where the first entry is

    def loss(w, kink):
        return jnp.sum(w**2 + jnp.abs(w - kink) ** 1.5)

    def step(w, state, kink):
        grads = jax.lax.pmean(jax.grad(loss)(w, kink), "data")
        updates, state = tx.update(grads, state, w, obj_fn=lambda p: loss(p, kink))
        return optax.apply_updates(w, updates), state

    run = jax.pmap(step, axis_name="data")
    w, state = jax.tree.map(lambda x: jnp.stack([x] * 8), (w, tx.init(w)))
    for _ in range(3):
        w, state = jax.block_until_ready(run(w, state, kink))
    chex.assert_tree_all_finite((w, state))
    assert (state[0].nonfinite == (0 if bad_device is None else 3)).all()
    for leaf in jax.tree.leaves((w, state)):
        assert (np.asarray(leaf) == np.asarray(leaf[0])).all()


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
    assert state.nonfinite == 0


def test_the_low_rank_control_forgets_what_it_cannot_use():
    """Products with bad entries spoil those of the estimate, and nothing later."""
    control = ah.low_rank_control(2)
    estimator = ah.hutchinson(control_variate=control)
    a = np.random.default_rng(0).normal(size=(6, 6))
    h = jnp.asarray(a @ a.T, jnp.float32)
    params = jnp.zeros(6)
    state = estimator.init(params)

    def estimate(state, scale):
        def loss(w):
            return jnp.sum(scale * w**3) + jnp.dot(w, jnp.dot(h, w)) / 2

        return estimator.update(None, state, params + 1e-3, obj_fn=loss)

    for t in range(30):
        bad = t in (0, 7, 8)
        scale = jnp.zeros(6).at[3].set(jnp.inf if bad else 0.0)
        scale = jnp.full(6, 1e22) if t == 15 else scale  # squares overflow
        d, state = estimate(state, scale)
        chex.assert_tree_all_finite(state)
        if t != 15:
            assert (np.isfinite(d) == (np.arange(6) != 3 if bad else True)).all()

    def variance(estimator, state):
        def draw(key):
            def loss(w):
                return jnp.dot(w, jnp.dot(h, w)) / 2

            keyed = state._replace(key=key)
            return estimator.update(None, keyed, params, obj_fn=loss)[0]

        draws = jax.vmap(draw)(jax.random.split(jax.random.PRNGKey(1), 400))
        return jnp.sum(jnp.var(draws, axis=0))

    plain = ah.hutchinson()
    ratio = variance(plain, plain.init(params)) / variance(estimator, state)
    print(f"variance falls {ratio:.2f} times")
    assert ratio > 1  # what it learnt from the other samples is of use


def test_the_count_saturates():
    tx = ah.scale_by_adahessian()
    w = jnp.ones(3)
    largest = jnp.iinfo(jnp.int32).max
    state = tx.init(w)._replace(nonfinite=jnp.int32(largest - 2))
    for _ in range(2):
        _, state = tx.update(w, state, w, hessian_diag=jnp.full(3, jnp.nan))
        assert state.nonfinite == largest


def test_zero_curvature_is_a_value_while_all_is_finite():
    """The published rule, m / eps; once there was a gap, zero means no estimate."""
    w = jnp.ones(2)
    for first, expected in ((0.0, 1e2), (jnp.nan, 0.0)):
        tx = ah.scale_by_adahessian(eps=1e-2)
        d = jnp.array([first, 1.0])
        updates, _ = tx.update(w, tx.init(w), w, hessian_diag=d)
        np.testing.assert_allclose(updates, [expected, 1 / 1.01], rtol=1e-5)


def test_a_leaf_of_more_entries_than_the_count_can_hold():
    """Nothing is run: the program can be made."""
    w = jax.ShapeDtypeStruct((2**31 + 8,), jnp.float32)
    tx = ah.scale_by_adahessian()
    state = jax.eval_shape(tx.init, w)

    def update(updates, state, params, diag):
        return tx.update(updates, state, params, hessian_diag=diag)

    updates, _ = jax.eval_shape(update, w, state, w, w)
    assert updates.shape == w.shape
