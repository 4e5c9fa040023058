# SPDX-License-Identifier: Apache-2.0
"""Small problems with known or easily computed Hessians, and which are at once."""

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from adahessian_jax._src.orthogonal import Reflectors, multiply_along


class Problem(NamedTuple):
    params: dict
    loss: callable


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def dense_hessian(loss, params):
    """The whole Hessian as a matrix, in the order of ``jax.flatten_util``."""
    flat, unravel = ravel_pytree(params)
    return np.asarray(jax.jit(jax.hessian(lambda w: loss(unravel(w))))(flat))


def dense_ggn(output_loss, predict, params):
    """J' H J as a matrix, with H from ``jax.hessian`` of the loss in the outputs."""
    flat, unravel = ravel_pytree(params)

    @jax.jit
    def matrix(w):
        outputs = predict(unravel(w))
        jacobian = jax.jacobian(lambda w: predict(unravel(w)).ravel())(w)
        hessian = jax.hessian(lambda f: output_loss(f.reshape(outputs.shape)))
        return jacobian.T @ hessian(outputs.ravel()) @ jacobian

    return np.asarray(matrix(flat))


def all_signs(n):
    """Every vector of n signs, as rows: the mean over them is an expectation."""
    return np.array(list(itertools.product([-1.0, 1.0], repeat=n)))


def dense(q):
    """An orthogonal matrix as an array."""
    n = len(q.left) if isinstance(q, Reflectors) else len(q)
    return np.asarray(multiply_along(q, jnp.eye(n), 0, transpose=False))


def quadratic(dtype=None, seed=0, diagonal=False):
    """Two leaves of equal shape, 1/2 w'Hw with a known H."""
    dtype = dtype or jnp.zeros(()).dtype
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(8, 8))
    h = np.diag(rng.uniform(-2, 3, size=8)) if diagonal else (a + a.T) / 2
    h = jnp.asarray(h, dtype)
    params = {k: jnp.asarray(rng.normal(size=4), dtype) for k in "ab"}

    def loss(p):
        w = jnp.concatenate([p["a"], p["b"]])
        return jnp.sum(w * jnp.dot(h, w)) / 2

    return Problem(params, loss), h


def mlp(dtype=None, seed=0):
    """Two hidden layers of equal width, so that two leaves have equal shapes."""
    dtype = dtype or jnp.zeros(()).dtype
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    shapes = {"w1": (4, 5), "b1": (5,), "w2": (5, 5), "w3": (5, 5), "w4": (5, 3)}
    params = {name: array(*shape) for name, shape in shapes.items()}
    x, y = array(16, 4) * 4, jnp.asarray(rng.integers(0, 3, size=16))

    def loss(p):
        h = jnp.tanh(jnp.dot(x, p["w1"]) + p["b1"])
        h = jnp.tanh(jnp.dot(jnp.tanh(jnp.dot(h, p["w2"])), p["w3"]))
        return cross_entropy(jnp.dot(h, p["w4"]), y)

    return Problem(params, loss)


@jax.custom_vjp
def opaque(x):
    """A tangent has no way through: there is a rule for going back only."""
    return jnp.tanh(x)


opaque.defvjp(lambda x: (opaque(x), x), lambda x, c: (c / jnp.cosh(x) ** 2,))


def at_once(values, some):
    """Mark values as slow but for some."""
    slow = {"marks": pytest.mark.slow}
    return [pytest.param(x, **({} if x in some else slow)) for x in values]
