# SPDX-License-Identifier: Apache-2.0
"""Small problems with known or easily computed Hessians."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adahessian_jax.orthogonal import Reflectors, multiply_along


class Problem(NamedTuple):
    params: dict
    loss: callable


def cross_entropy(logits, labels):
    picked = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)


def dense_hessian(loss, params):
    """The whole Hessian as a matrix, in the order of ``jax.flatten_util``."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return jax.jit(jax.hessian(lambda w: loss(unravel(w))))(flat)


def dense(q):
    """An orthogonal matrix as an array."""
    n = len(q.left) if isinstance(q, Reflectors) else len(q)
    return np.asarray(multiply_along(q, jnp.eye(n), 0, transpose=False))


def exact_diag(loss, params):
    """The Hessian's diagonal as a pytree, from ``jax.hessian``."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)
    return unravel(jnp.diagonal(dense_hessian(loss, params)).astype(flat.dtype))


def quadratic(dtype=None, seed=0, diagonal=False):
    """Two leaves of equal shape, 1/2 w'Hw with a known H."""
    dtype = dtype or jnp.zeros(()).dtype
    rng = np.random.default_rng(seed)
    a = rng.normal(size=(8, 8))
    h = np.diag(rng.uniform(-2, 3, size=8)) if diagonal else (a + a.T) / 2
    h = jnp.asarray(h, dtype)
    params = {
        "a": jnp.asarray(rng.normal(size=4), dtype),
        "b": jnp.asarray(rng.normal(size=4), dtype),
    }

    def loss(p):
        w = jnp.concatenate([p["a"], p["b"]])
        return jnp.sum(w * jnp.dot(h, w)) / 2

    return Problem(params, loss), h


def mlp(dtype=None, seed=0, activation=jnp.tanh):
    """Two hidden layers of equal width, so that two leaves have equal shapes."""
    dtype = dtype or jnp.zeros(()).dtype
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[0]), dtype)

    params = {
        "w1": array(4, 6),
        "b1": array(6),
        "w2": array(6, 6),
        "b2": array(6),
        "w3": array(6, 6),
        "w4": array(6, 3),
    }
    x = array(16, 4) * 4
    y = jnp.asarray(rng.integers(0, 3, size=16))

    def loss(p):
        h = activation(jnp.dot(x, p["w1"]) + p["b1"])
        h = activation(jnp.dot(h, p["w2"]) + p["b2"])
        h = activation(jnp.dot(h, p["w3"]))
        return cross_entropy(jnp.dot(h, p["w4"]), y)

    return Problem(params, loss)


def conv_net(dtype=None, seed=0, activation=jnp.tanh):
    """One HWIO convolution and a dense layer."""
    dtype = dtype or jnp.zeros(()).dtype
    rng = np.random.default_rng(seed)

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(shape[-1]), dtype)

    params = {"conv": {"kernel": array(3, 3, 2, 4)}, "dense": array(64, 3)}
    x = array(5, 6, 6, 2)
    y = jnp.asarray(rng.integers(0, 3, size=5))

    def loss(p):
        h = jax.lax.conv_general_dilated(
            x,
            p["conv"]["kernel"],
            (1, 1),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return cross_entropy(jnp.dot(activation(h).reshape(5, -1), p["dense"]), y)

    return Problem(params, loss)


def transformer(dtype=None, seed=0):
    """One block of causal attention over integer tokens, with normalisation."""
    dtype = dtype or jnp.zeros(()).dtype
    rng = np.random.default_rng(seed)
    d, heads, length, vocabulary = 8, 2, 5, 7

    def array(*shape):
        return jnp.asarray(rng.normal(size=shape) / np.sqrt(d), dtype)

    params = {
        "embed": array(vocabulary, d),
        "qkv": array(3, d, heads, d // heads),
        "out": array(heads, d // heads, d),
        "up": array(d, 2 * d),
        "down": array(2 * d, d),
        "scale": jnp.ones(d, dtype),
    }
    tokens = jnp.asarray(rng.integers(0, vocabulary, size=(3, length + 1)))
    mask = jnp.tril(jnp.ones((length, length), bool))

    def norm(x, scale):
        return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-3) * scale

    def loss(p):
        x = p["embed"][tokens[:, :-1]]
        q, k, v = jnp.einsum("btd,cdhe->cbthe", norm(x, p["scale"]), p["qkv"])
        logits = jnp.einsum("bthe,bshe->bhts", q, k) / np.sqrt(d // heads).item()
        logits = jnp.where(mask, logits, -1e9)
        attended = jnp.einsum("bhts,bshe->bthe", jax.nn.softmax(logits), v)
        x = x + jnp.einsum("bthe,hed->btd", attended, p["out"])
        hidden = jnp.tanh(jnp.dot(norm(x, p["scale"]), p["up"]))
        x = x + jnp.dot(hidden, p["down"])
        return cross_entropy(jnp.dot(x, p["embed"].T), tokens[:, 1:])

    return Problem(params, loss)


NETWORKS = {"mlp": mlp, "conv": conv_net, "transformer": transformer}
