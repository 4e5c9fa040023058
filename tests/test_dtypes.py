# SPDX-License-Identifier: Apache-2.0
"""Dtypes and shapes of state and parameters never change, so nothing is retraced."""

import functools

import chex
import jax
import jax.numpy as jnp
import optax
import pytest

import adahessian_jax as ah
from tests.test_composition import (
    INTERVAL,
    METHODS,
    PARAMS,
    PATHS,
    Y,
    loss_fn,
    predict,
)
from tests.test_composition import X as X64

X = X64.astype("float32")


@pytest.fixture(autouse=True)
def standard_promotion():
    """The network mixes half and single precision."""
    with jax.numpy_dtype_promotion("standard"):
        yield


MIXED = {
    "bfloat16": jax.tree.map(lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS),
    "mixed": {
        "encoder": jax.tree.map(
            lambda p: jnp.asarray(p, jnp.bfloat16), PARAMS["encoder"]
        ),
        "decoder": jax.tree.map(jnp.float32, PARAMS["decoder"]),
    },
    "leaves": {
        **jax.tree.map(jnp.float32, PARAMS),
        "n": jnp.int32(3),
        "empty": jnp.zeros((0, 2)),
        "scalar": jnp.float32(0.5),
        "none": None,
    },
}


@PATHS
@INTERVAL
@METHODS
@pytest.mark.parametrize("kind", MIXED)
def test_dtypes_are_stable_and_nothing_is_compiled_twice(kind, method, interval, path):
    """Half precision with float32 state; integer, empty, scalar and None leaves."""
    params = MIXED[kind]
    tx = ah.adahessian(
        0.05,
        estimator=method.estimator,
        update_interval=interval,
        mu_dtype=jnp.float32,
        nu_dtype=jnp.float32,
    )
    traced = []

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, y):
        traced.append(1)
        if path == "fused":
            grads, extra_args = method.fused(params, x, y, state)
        else:
            fun = jax.grad(loss_fn, allow_int=True)
            grads = jax.tree.map(
                lambda g, p: (
                    g if jnp.issubdtype(p.dtype, jnp.floating) else jnp.zeros_like(p)
                ),
                fun(params, x, y),
                params,
            )
            extra_args = {
                "obj_fn": lambda p: loss_fn(p, x, y),
                "predict_fn": lambda p: predict(p, x),
            }
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    params = jax.tree.map(jnp.copy, params)
    state = tx.init(params)
    before = jax.eval_shape(lambda: (params, state))
    for _ in range(4):
        params, state = step(params, state, X, Y)
    chex.assert_trees_all_equal_shapes_and_dtypes((params, state), before)
    chex.assert_tree_all_finite(params)
    assert len(traced) == 1
    assert step._cache_size() == 1
    assert state[0].nu["encoder"]["w"].dtype == jnp.float32
    if kind == "leaves":
        assert (params["n"], params["none"]) == (3, None)
        assert params["empty"].shape == (0, 2)
