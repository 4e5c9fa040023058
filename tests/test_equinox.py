# SPDX-License-Identifier: Apache-2.0
"""Equinox modules, as a user would train them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah

eqx = pytest.importorskip("equinox")

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6))
Y = RNG.normal(size=(16, 3))


@pytest.fixture(autouse=True)
def double_precision(x64):
    """So that only mistakes show; Equinox initialises in more than one dtype."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.parametrize("path", ["obj_fn", "fused"])
def test_equinox_module(path):
    """Arrays are the parameters, and the rest of the module is closed over."""
    model = eqx.nn.MLP(6, 3, 8, 2, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx = ah.adahessian(0.05, update_interval=2)

    def loss_fn(params, x, y):
        model = eqx.combine(params, static)
        return jnp.mean((jax.vmap(model)(x) - y) ** 2)

    fused = ah.value_and_grad_with_curvature(loss_fn, ah.hutchinson())

    @eqx.filter_jit
    def step(params, state, x, y):
        if path == "fused":
            loss, grads, curvature = fused(params, x, y, state=state)
            extra_args = {"curvature": curvature}
        else:
            loss, grads = eqx.filter_value_and_grad(loss_fn)(params, x, y)
            extra_args = {"obj_fn": lambda p: loss_fn(p, x, y)}
        updates, state = tx.update(grads, state, params, **extra_args)
        return eqx.apply_updates(params, updates), state, loss

    leaves, treedef = jax.tree.flatten(params)
    list_state = tx.init(leaves)

    def loss_of_list(leaves):
        return loss_fn(jax.tree.unflatten(treedef, leaves), X, Y)

    state, losses = tx.init(params), []
    for _ in range(6):
        params, state, loss = step(params, state, X, Y)
        losses.append(loss)
        updates, list_state = jax.jit(
            lambda leaves, state: tx.update(
                jax.grad(loss_of_list)(leaves), state, leaves, obj_fn=loss_of_list
            )
        )(leaves, list_state)
        leaves = optax.apply_updates(leaves, updates)
    chex.assert_trees_all_close(jax.tree.leaves(params), leaves, rtol=1e-8, atol=1e-10)
    trained = eqx.combine(params, static)
    assert jax.vmap(trained)(X).shape == (16, 3)
    assert loss_fn(params, X, Y) < losses[0]
