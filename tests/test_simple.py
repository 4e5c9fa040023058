# SPDX-License-Identifier: Apache-2.0
"""The library against the algorithms on one page, in double precision."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from adahessian_jax._src.probes import rademacher_like
from docs import simple

STEPS = 25  # estimates on the first ten and number 20, turns also on 19
CLASSES = 4
# Bases are unique from the second step on: no axis has two vectors without curvature.
UNIQUE = {
    "tensor": (2, 3, 4),
    "matrix": (4, 3),
    "vector": (2,),
    "row": (1, 2),
    "scalar": (),
    "last": (3, CLASSES),
}
# Here axes have, until there are as many estimates, vectors without curvature, and
# rounding errors turn those by as much as 1e-8.
WIDE = UNIQUE | {
    "tensor": (2, 3, 5),
    "matrix": (5, 6),
    "vector": (6,),
    "row": (1, 6),
    "last": (6, CLASSES),
}


def problem(shapes):
    """Return parameters, outputs as their function, and labels."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.normal(size=(24, 2, 3)))
    labels = jnp.asarray(rng.integers(0, CLASSES, size=24))
    params = {k: jnp.asarray(rng.normal(size=s) * 0.6) for k, s in shapes.items()}

    def predict(p):
        h = jnp.tanh(jnp.einsum("bij,ijk->bk", x, p["tensor"]))
        h = h @ p["matrix"]
        h = h.at[:, : len(p["vector"])].add(p["vector"])
        h = jnp.tanh(h.at[:, : p["row"].size].multiply(p["row"]))
        return (h @ p["last"]) * p["scalar"]

    return params, predict, labels


def signs_like(key, tree):
    """Draw signs as estimators do; return also the key that they keep."""
    key, subkey = jax.random.split(key)
    return key, rademacher_like(jax.random.split(subkey, 1)[0], tree)


def largest_difference(a, b):
    return max(float(jnp.max(jnp.abs(a[k] - b[k]))) for k in b)


def library_step(tx, grad_fn, **functions):
    @jax.jit
    def step(params, state):
        updates, state = tx.update(grad_fn(params), state, params, **functions)
        return optax.apply_updates(params, updates), state

    return step


def test_adahessian(x64):
    params, predict, labels = problem(WIDE)

    def loss_fn(p):
        return simple.cross_entropy(predict(p), labels)

    def probe(key, params):
        return rademacher_like(key, params)

    tx = ah.adahessian(0.1, estimator=ah.hutchinson(probe=probe))
    step = library_step(tx, jax.grad(loss_fn), obj_fn=loss_fn)
    ours, theirs, key = params, params, jax.random.PRNGKey(0)
    state, oracle = tx.init(ours), simple.init(theirs)
    for _ in range(STEPS):
        key, z = signs_like(key, theirs)
        ours, state = step(ours, state)
        theirs, oracle = simple.adahessian(loss_fn, theirs, oracle, z, 0.1)
        assert largest_difference(ours, theirs) < 1e-12
    assert largest_difference(ours, params) > 0.1


@pytest.mark.skipif(
    not hasattr(jax, "shard_map"),
    reason="older versions round otherwise where bases are not unique",
)
@pytest.mark.parametrize(
    ("shapes", "learning_rate", "tolerance"),
    [
        (UNIQUE, 0.1, 1e-11),
        pytest.param(UNIQUE, None, 1e-10, marks=pytest.mark.slow),
        pytest.param(WIDE, 0.1, 1e-7, marks=pytest.mark.slow),
    ],
    ids=["given-rate", "own-rate", "wide"],
)
def test_newton(x64, shapes, learning_rate, tolerance):
    params, predict, labels = problem(shapes)
    loss = ah.losses.softmax_cross_entropy
    tx = ah.newton(learning_rate, loss, max_dim=100)
    grad_fn = jax.grad(lambda p: loss(predict(p), labels))
    step = library_step(tx, grad_fn, predict_fn=predict)
    ours, theirs, key = params, params, jax.random.PRNGKey(0)
    state, oracle = tx.init(ours), simple.init(theirs)
    for count in range(STEPS):
        if count < 10 or count == 20:
            key, signs = signs_like(key, predict(params))
        ours, state = step(ours, state)
        theirs, oracle = simple.newton(
            predict, labels, theirs, oracle, signs, learning_rate
        )
        assert largest_difference(ours, theirs) < tolerance
    assert oracle.estimates == 11
    assert largest_difference(ours, params) > 0.1
