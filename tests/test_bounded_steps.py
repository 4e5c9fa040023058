# SPDX-License-Identifier: Apache-2.0
"""Curvature near zero or below: what keeps a step bounded where one asks for it.

``relative_damping`` bounds each entry by ``|m| / (damping * mean(h)) ** power`` of its
tensor, and ``optax.clip`` after the transformation by its threshold. The published
optimizer has neither.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from tests.problems import cross_entropy

DAMPING = 0.1


def train(tx, loss, params, steps, noise=0.0):
    """Train; return the history of parameters, and of updates and states."""

    def step(params, state, key):
        grads = jax.tree.map(
            lambda g: g + noise * jax.random.normal(key, g.shape),
            jax.grad(loss)(params),
        )
        updates, state = tx.update(grads, state, params, obj_fn=loss)
        return updates, state

    step, state, history = jax.jit(step), tx.init(params), []
    for t in range(steps):
        updates, state = step(params, state, jax.random.key(t))
        params = optax.apply_updates(params, updates)
        history.append((params, updates, ah.diagnostics(state), state))
    return history


def momentum(state, b1=0.9):
    inner = state[0]
    return jax.tree.map(lambda m: m / (1 - b1**inner.count), inner.mu)


def assert_damped(history, power=1.0, b2=0.999):
    """Check the bound in every step, from the state alone."""
    for _, updates, _, state in history:
        scale = 1 / (1 - b2 ** state[0].count)
        for u, m, v in zip(
            *map(jax.tree.leaves, (updates, momentum(state), state[0].nu)), strict=True
        ):
            bound = jnp.abs(m) / (DAMPING * jnp.mean(jnp.abs(v * scale))) ** power
            assert (jnp.abs(u) <= bound * (1 + 1e-4)).all()


def saddle(p):
    """A minimum at 0, and no curvature at pi / 2, where the slope is steepest."""
    return jnp.sum(1 - jnp.cos(p))


SADDLE = jnp.array([np.pi / 2 - 1e-4, 0.5, -0.3, 2.0])  # the last curves downwards


def test_saddle():
    def transformation(**options):
        return ah.scale_by_adahessian(hessian_ema="mean", **options)

    down = optax.scale(-0.05)
    published = train(optax.chain(transformation(), down), saddle, SADDLE, 1)
    assert jnp.abs(published[0][1]).max() > 100  # it takes the step that it was told to
    damped = optax.chain(transformation(relative_damping=DAMPING), optax.scale(-1.0))
    assert_damped(train(damped, saddle, SADDLE, 30))
    clipped = optax.chain(transformation(), optax.clip(1.0), down)
    for limit, tx in (
        (np.pi, optax.chain(transformation(relative_damping=DAMPING), down)),
        (0.05 + 1e-6, clipped),
    ):
        history = train(tx, saddle, SADDLE, 150)
        assert max(jnp.abs(updates).max() for _, updates, *_ in history) <= limit
        assert saddle(history[-1][0]) < 1e-2


@pytest.mark.parametrize("power", [1.0, 0.5])
def test_flat_valley(power):
    """Along the valley there is noise but next to no curvature."""

    def valley(p):
        return p[0] ** 2 + 1e-6 * p[1] ** 2

    start = jnp.array([1.0, 1.0])

    def run(**options):
        tx = ah.adahessian(0.1, hessian_ema="mean", hessian_power=power, **options)
        return train(tx, valley, start, 100, noise=0.1)

    def farthest(history):
        return max(jnp.abs(params[1]) for params, *_ in history)

    damped = run(relative_damping=DAMPING)
    unscaled = [
        (p, jax.tree.map(lambda u: u / 0.1, u), report, state)
        for p, u, report, state in damped
    ]
    assert_damped(unscaled, power)
    assert farthest(damped) < 5
    assert farthest(run()) > 50
    assert abs(damped[-1][0][0]) < 0.2


@pytest.mark.parametrize("hessian_ema", ["rms", "mean"])
def test_dead_units(hessian_ema):
    """Half of the units never fire: no gradient, no curvature, and no update."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(32, 4)), jnp.float32)
    y = jnp.asarray(rng.integers(0, 3, size=32))
    params = {
        "w1": jnp.asarray(rng.normal(size=(4, 8)), jnp.float32),
        "b1": jnp.where(jnp.arange(8) < 4, -100.0, 0.0),
        "w2": jnp.asarray(rng.normal(size=(8, 3)), jnp.float32),
    }

    def loss(p):
        hidden = jax.nn.relu(jnp.dot(x, p["w1"]) + p["b1"])
        return cross_entropy(jnp.dot(hidden, p["w2"]), y)

    for options in ({}, {"relative_damping": DAMPING}):
        tx = ah.adahessian(0.05, hessian_ema=hessian_ema, **options)
        history = train(tx, loss, params, 30)
        for after, updates, report, _ in history:
            assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(after))
            assert not updates["w1"][:, :4].any()
            assert not updates["b1"][:4].any()
            assert not updates["w2"][:4].any()
            assert report["nonfinite"] == 0
    assert loss(history[-1][0]) < 0.8 * loss(params)
