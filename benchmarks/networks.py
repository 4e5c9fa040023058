# SPDX-License-Identifier: Apache-2.0
"""The networks that step costs are measured on, in plain JAX.

Each function returns a :class:`Network`: initial parameters, the arrays of one batch,
and a loss of ``(params, *batch)`` that returns ``((loss, outputs), new_statistics)``.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import adahessian_jax as ah

Params = Any
LOSS = ah.losses.softmax_cross_entropy


class Network(NamedTuple):
    """A network with one batch of made-up data."""

    params: Params
    batch: tuple[jax.Array, ...]
    loss_fn: Callable[..., Any]
    stacked: Callable[..., int] | None = None


def mlp(widths: tuple[int, ...] = (784, 512, 512, 10), batch: int = 128) -> Network:
    """Return a ReLU network of dense layers."""
    keys = iter(jax.random.split(jax.random.key(0), 2 * len(widths)))
    params = [
        {"w": _dense(next(keys), m, n), "b": jnp.zeros(n)}
        for m, n in itertools.pairwise(widths)
    ]
    x = jax.random.normal(next(keys), (batch, widths[0]))
    y = jax.random.randint(next(keys), (batch,), 0, widths[-1])

    def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> Any:
        for layer in params[:-1]:
            x = jax.nn.relu(jnp.dot(x, layer["w"]) + layer["b"])
        logits = jnp.dot(x, params[-1]["w"]) + params[-1]["b"]
        return (LOSS(logits, y), logits), ()

    return Network(params, (x, y), loss_fn)


def gpt(layers: int = 2) -> Network:
    """Return a decoder-only transformer with learned positions."""
    width, heads, batch, length, vocabulary = 128, 4, 8, 128, 65
    keys = iter(jax.random.split(jax.random.key(0), 6 * layers + 4))

    def block() -> Params:
        return {
            "qkv": _dense(next(keys), width, 3 * width),
            "out": _dense(next(keys), width, width),
            "up": _dense(next(keys), width, 4 * width),
            "down": _dense(next(keys), 4 * width, width),
            "norm1": jnp.ones(width),
            "norm2": jnp.ones(width),
        }

    params = {
        "embedding": jax.random.normal(next(keys), (vocabulary, width)) / 10,
        "positions": jax.random.normal(next(keys), (length, width)) / 10,
        "blocks": [block() for _ in range(layers)],
        "norm": jnp.ones(width),
        "head": _dense(next(keys), width, vocabulary),
    }
    tokens = jax.random.randint(next(keys), (batch, length + 1), 0, vocabulary)
    mask = jnp.tril(jnp.ones((length, length), bool))

    def attend(*qkv: jax.Array) -> jax.Array:
        q, k, v = (x.swapaxes(1, 2) for x in qkv)
        scores = jnp.einsum("bhtd,bhsd->bhts", q, k) / (width // heads) ** 0.5
        weights = jax.nn.softmax(jnp.where(mask, scores, -1e9), axis=-1)
        return jnp.einsum("bhts,bhsd->bhtd", weights, v).swapaxes(1, 2)

    def loss_fn(params: Params, tokens: jax.Array) -> Any:
        x = params["embedding"][tokens[:, :-1]] + params["positions"]
        for p in params["blocks"]:
            x = _block(x, p, width // heads, attend)
        logits = jnp.dot(_layer_norm(x, params["norm"]), params["head"])
        return (LOSS(logits, tokens[:, 1:]), logits), ()

    return Network(params, (tokens,), loss_fn)


def gpt2() -> Network:
    """Return GPT-2 small with stacked layers, as shapes only; it computes in bfloat16.

    Without biases, and its vocabulary is made a multiple of 128.
    """
    layers, width, batch, length, vocabulary = 12, 768, 8, 1024, 50304
    shapes = {
        "embedding": (vocabulary, width),
        "positions": (length, width),
        "blocks": {
            "qkv": (layers, width, 3 * width),
            "out": (layers, width, width),
            "up": (layers, width, 4 * width),
            "down": (layers, 4 * width, width),
            "norm1": (layers, width),
            "norm2": (layers, width),
        },
        "norm": (width,),
    }
    params = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    tokens = jax.ShapeDtypeStruct((batch, length + 1), jnp.int32)
    attend = partial(jax.nn.dot_product_attention, is_causal=True)

    def block(x: jax.Array, p: Params) -> tuple[jax.Array, None]:
        p = jax.tree.map(lambda w: w.astype(x.dtype), p)
        return _block(x, p, 64, attend), None

    def loss_fn(params: Params, tokens: jax.Array) -> Any:
        embedding = params["embedding"].astype(jnp.bfloat16)
        x = embedding[tokens[:, :-1]] + params["positions"].astype(jnp.bfloat16)
        x, _ = jax.lax.scan(jax.checkpoint(block), x, params["blocks"])
        x = _layer_norm(x, params["norm"].astype(x.dtype))
        logits = jnp.dot(x, embedding.T)
        return (LOSS(logits, tokens[:, 1:]), logits), ()

    def stacked(path: Any, leaf: Any) -> int:
        return int("blocks" in jax.tree_util.keystr(path))

    return Network(params, (tokens,), loss_fn, stacked)


def resnet(blocks_per_stage: int = 1) -> Network:
    """Return a CIFAR ResNet of 6n + 2 layers with batch normalisation."""
    keys, batch = iter(jax.random.split(jax.random.key(0), 100)), 32
    widths = [16, *(n for n in (16, 32, 64) for _ in range(blocks_per_stage))]

    def unit(size: int, m: int, n: int) -> Params:
        conv = jax.random.normal(next(keys), (size, size, m, n))
        conv *= (2 / (size * size * m)) ** 0.5
        return {"conv": conv, "scale": jnp.ones(n), "bias": jnp.zeros(n)}

    def block(m: int, n: int) -> Params:
        both = {"a": unit(3, m, n), "b": unit(3, n, n)}
        return both if m == n else both | {"skip": unit(1, m, n)}

    params = {
        "residual": [block(m, n) for m, n in itertools.pairwise(widths)],
        "stem": unit(3, 3, 16),
        "head": {"w": _dense(next(keys), 64, 10), "b": jnp.zeros(10)},
    }
    x = jax.random.normal(next(keys), (batch, 32, 32, 3))
    y = jax.random.randint(next(keys), (batch,), 0, 10)

    def loss_fn(params: Params, x: jax.Array, y: jax.Array) -> Any:
        statistics = []

        def apply(p: Params, x: jax.Array, stride: int = 1) -> jax.Array:
            strides, axes = (stride, stride), ("NHWC", "HWIO", "NHWC")
            x = jax.lax.conv_general_dilated(
                x, p["conv"], strides, "SAME", dimension_numbers=axes
            )
            mean = jnp.mean(x, axis=(0, 1, 2))
            variance = jnp.mean(jnp.square(x), axis=(0, 1, 2)) - jnp.square(mean)
            statistics.append((mean, variance))
            x = (x - mean) * jax.lax.rsqrt(variance + 1e-5)
            return x * p["scale"] + p["bias"]

        x = jax.nn.relu(apply(params["stem"], x))
        for p in params["residual"]:
            stride = 2 if "skip" in p else 1
            skip = apply(p["skip"], x, stride) if "skip" in p else x
            hidden = jax.nn.relu(apply(p["a"], x, stride))
            x = jax.nn.relu(apply(p["b"], hidden) + skip)
        x = jnp.mean(x, axis=(1, 2))
        logits = jnp.dot(x, params["head"]["w"]) + params["head"]["b"]
        return (LOSS(logits, y), logits), statistics

    return Network(params, (x, y), loss_fn)


NETWORKS: dict[str, Callable[[], Network]] = {
    "MLP": mlp,
    "GPT": gpt,
    "ResNet-8": resnet,
    "ResNet-20": partial(resnet, 3),
}


def _block(
    x: jax.Array, p: Params, head: int, attend: Callable[..., jax.Array]
) -> jax.Array:
    """Apply a block of a transformer, with heads of so many entries."""
    b, t, width = x.shape
    qkv = jnp.dot(_layer_norm(x, p["norm1"]), p["qkv"]).reshape(b, t, 3, -1, head)
    mixed = attend(*(qkv[:, :, i] for i in range(3)))
    x = x + jnp.dot(mixed.reshape(b, t, width), p["out"])
    hidden = jax.nn.gelu(jnp.dot(_layer_norm(x, p["norm2"]), p["up"]))
    return x + jnp.dot(hidden, p["down"])


def _dense(key: jax.Array, m: int, n: int) -> jax.Array:
    return jax.random.normal(key, (m, n)) / m**0.5


def _layer_norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    variance = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(variance + 1e-5) * scale
