# SPDX-License-Identifier: Apache-2.0
"""Workarounds for compilers, each with what it gains, so that it can be taken out.

All were measured on XLA:CPU, JAX 0.4.36 to 0.12.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.dtypes import is_differentiable, map_floats


def cond(pred: Any, true_fn: Any, false_fn: Any, x: Any) -> Any:
    """Do as ``jax.lax.cond``, but choose at once where the predicate is known.

    Outside ``jit`` every call of ``jax.lax.cond`` would compile both branches again.
    """
    if isinstance(pred, jax.core.Tracer):
        return jax.lax.cond(pred, true_fn, false_fn, x)
    return (true_fn if pred else false_fn)(x)


def scan(step: Any, carry: Any, xs: Any, *, unroll: bool) -> tuple[Any, Any]:
    """Do as ``jax.lax.scan`` where something is traced, and else as a Python loop.

    Outside ``jit`` every call of ``jax.lax.scan`` would compile its body again.
    """
    if is_traced((carry, xs)) and not unroll:
        return jax.lax.scan(step, carry, xs)
    leaves, treedef = jax.tree.flatten(xs)
    outputs = []
    for part in zip(*leaves, strict=True):
        carry, y = step(carry, jax.tree.unflatten(treedef, part))
        outputs.append(y)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *outputs)


def while_loop(go_on: Any, step: Any, carry: Any) -> Any:
    """Do as ``jax.lax.while_loop`` if something is traced, and else as a Python loop.

    Outside ``jit`` every call of ``jax.lax.while_loop`` would compile its body again.
    """
    if is_traced(carry):
        return jax.lax.while_loop(go_on, step, carry)
    while go_on(carry):
        carry = step(carry)
    return carry


def is_traced(tree: Any) -> bool:
    """Whether any leaf is known only while running."""
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(tree))


def materialized(key: Array, tree: optax.Updates) -> optax.Updates:
    """Return a tree, where it runs on CPU written out before it is used.

    A Hessian-vector product for a layer amid a network is the transpose of a sum, which
    XLA:CPU fuses into what the optimizer does with it. That then reads memory in
    strides, a fifth of the time of an MLP's step, and multiplies by the probe, unpacked
    from its bits, wherever the estimate is used. The operands of a loop are left alone.
    """
    if not is_traced((key, tree)):
        return tree
    # Never true, but the compiler cannot know.
    never = jax.random.key_data(key).ravel()[0].astype(jnp.float32) > jnp.inf

    return map_floats(lambda x: _written_out(x, never) if x.ndim > 1 else x, tree)


@jax.custom_jvp
def _written_out(x: Array, never: Array) -> Array:
    def through_loop(x: Array, never: Array) -> Array:
        return jax.lax.while_loop(
            lambda carry: carry[1],
            lambda carry: (carry[0][::-1], jnp.zeros_like(carry[1])),
            (x, never),
        )[0]

    # What the program is compiled for decides, and not what it is traced on.
    return jax.lax.platform_dependent(
        x, never, cpu=through_loop, default=lambda x, never: x
    )


@_written_out.defjvp
def _written_out_jvp(primals: Any, tangents: Any) -> Any:
    return _written_out(*primals), tangents[0]


def part(x: Array, begin: int, size: int, axis: int = 0) -> Array:
    """Cut a part out of an axis, at a place that the compiler is not told.

    XLA compiles a kernel for each place that it knows, at 10 to 30 ms. That was half of
    the time to compile an optimizer whose tensors were stacked for a while. And over
    devices it would deal the axis out, and send what is needed elsewhere.
    """
    if size == x.shape[axis]:
        return x
    start = jax.lax.optimization_barrier(jnp.int32(begin))
    return jax.lax.dynamic_slice_in_dim(x, start, size, axis)


@jax.custom_jvp
def read_first(result: Any, *read: Any) -> Any:
    """Return all arguments, so that what comes of the others comes after the first.

    Averages that a conditional may turn are else copied for whoever reads them as they
    were: a twentieth of a step in turned axes of an autoencoder.
    """
    together = result, *read
    return jax.lax.optimization_barrier(together) if is_traced(together) else together


@read_first.defjvp
def _read_first_jvp(primals: Any, tangents: Any) -> Any:
    return read_first(*primals), tangents


def after(key: Array, done: optax.Updates, *, otherwise: Array) -> Array:
    """Return ``key``, in a way that it cannot be known before ``done``.

    The compiler would otherwise interleave samples, whose memory then adds up.
    """
    leaves = [x for x in jax.tree.leaves(done) if is_differentiable(x) and x.size]
    if not leaves:
        return key
    # Never true, but the compiler cannot know.
    never = jnp.any(jnp.stack([x[(0,) * x.ndim] > jnp.inf for x in leaves]))
    return jnp.where(never, otherwise, key)


_MANY = 2**14  # entries from which it pays to count in blocks


def count(x: Array) -> Array:
    """Return how many entries are true, as int32.

    XLA:CPU would write the whole array out as int32 and read it twice, which takes 7 %
    of an MLP's step in turned axes. Here a few bytes are added up, in blocks of rows.
    """

    def in_blocks(x: Array) -> Array:
        n = math.prod(x.shape[:-1])
        size = max(k for k in range(1, 33) if n % k == 0)
        blocks = x.astype(jnp.uint8).reshape(n // size, size, x.shape[-1])
        return whole(jnp.sum(blocks, axis=1, dtype=jnp.uint8))

    def whole(x: Array) -> Array:
        return jnp.sum(x, dtype=jnp.int32)

    if x.ndim < 2 or x.size < _MANY or not is_traced(x):
        return whole(x)
    return jax.lax.platform_dependent(x, cpu=in_blocks, default=whole)


def mean_of_few(x: Array, axis: int) -> Array:
    """Return the mean over an axis, on CPU by additions where it is short.

    XLA:CPU's reduction over the nine leading entries of 3x3 kernels takes 4.4 times an
    optimizer's whole update, these additions three quarters of one.
    """
    n = x.shape[axis]

    def added(x: Array) -> Array:
        parts = [jax.lax.index_in_dim(x, i, axis, keepdims=False) for i in range(n)]
        return sum(parts[1:], start=parts[0]) / n

    def reduced(x: Array) -> Array:
        return jnp.mean(x, axis=axis)

    if n > 32 or not is_traced(x):
        return reduced(x)
    return jax.lax.platform_dependent(x, cpu=added, default=reduced)
