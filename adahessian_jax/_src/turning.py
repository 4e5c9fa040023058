# SPDX-License-Identifier: Apache-2.0
"""Bases that follow the eigenvectors of moving averages, and averages that follow."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src.dtypes import (
    accumulation_dtype,
    cast_average,
    map_floats,
    never_estimated,
    no_estimate,
)
from adahessian_jax._src.meshes import as_if_automatic, replicated
from adahessian_jax._src.moving_average import ema
from adahessian_jax._src.orthogonal import (
    PRECISION,
    TURNING,
    Bases,
    Orthogonal,
    Reflectors,
    at_pivots,
    first_columns,
    layers_ndim,
    multiply_along,
    no_columns,
    orthogonal_from_columns,
    rotate,
)
from adahessian_jax._src.stacks import over_layers, stacks, unstacked
from adahessian_jax._src.xla import part

Traces = tuple[Array | None, ...]  # one for each axis


def first_basis(n: int, max_dim: int, n_vectors: int, dtype: Any) -> Orthogonal | None:
    """Return the basis to begin with for an axis of size n, None to leave it alone."""
    if 1 < n <= max(max_dim, n_vectors):
        return jnp.eye(n, dtype=dtype)
    if n <= max_dim or n_vectors == 0:
        return None
    return no_columns(n, n_vectors, dtype)


def first_traces(bases: Any) -> Any:
    """Return zeros for the partial traces, or for what leading vectors see of them."""
    return jax.tree.map(
        lambda q: jnp.zeros_like(q.right if _is_leading(q) else q),
        bases,
        is_leaf=_is_leading,
    )


def averaged(
    decay: ArrayLike, x: Array, rotated: Array, traces: Traces, bases: Bases
) -> Traces:
    """Average in a tensor's product with itself over all axes but each.

    Where only some columns are kept, those of the ``rotated`` tensor's. Entries that
    are not finite are left out.
    """
    if all(trace is None for trace in traces):
        return traces

    def of_layer(x: Array, rotated: Array, traces: Traces, bases: Bases) -> Traces:
        def one(axis: int, trace: Any, q: Any) -> Array | None:
            if trace is None:
                return None
            if not isinstance(q, Reflectors):
                return _moved(decay, _product_but_along(axis, x, x), trace)
            few = at_pivots(rotated, q, axis)
            if axis < x.ndim - 1:
                return _moved(decay, _product_but_along(axis, rotated, few), trace)
            # XLA would make the transpose of a product one of transposes, which on CPU
            # is six times as slow for a layer of 784 by 256: it is that of an average.
            return _moved(decay, _product_but_along(axis, few, rotated), trace.T).T

        return tuple(map(one, range(x.ndim), traces, bases))

    n = layers_ndim(traces)
    of_layers = as_if_automatic(over_layers(of_layer, n), replicate=True)
    rest = of_layers(x, rotated, traces[n:], bases[n:])
    return (*[None] * n, *rest)


def first_seen(x: Array, traces: Traces, bases: Bases) -> Traces:
    """Return what vectors that are not known yet begin with: some of a tensor's own.

    Where all that it has is zero, so are these, and a vector stays there.
    """

    def of_layer(x: Array, traces: Traces, bases: Bases) -> Traces:
        def one(axis: int, trace: Any, q: Any) -> Array | None:
            if trace is None or not _is_leading(q):
                return trace
            return _some_vectors(x, axis, trace.shape[1]).astype(trace.dtype)

        return tuple(map(one, range(x.ndim), traces, bases))

    if not any(map(_is_leading, bases)):
        return traces
    n = layers_ndim(traces)
    of_layers = as_if_automatic(over_layers(of_layer, n), replicate=True)
    return (*[None] * n, *of_layers(x, traces[n:], bases[n:]))


def _some_vectors(x: Array, axis: int, k: int) -> Array:
    """Return k of a tensor's vectors along an axis, along the longest other one."""
    if x.ndim == 1:
        return jnp.tile(x[:, None], k)
    other = max((a for a in range(x.ndim) if a != axis), key=lambda a: x.shape[a])
    few = [slice(0, 1)] * x.ndim
    few[axis], few[other] = slice(None), slice(0, k)
    vectors = jnp.moveaxis(x[tuple(few)], axis, 0).reshape(x.shape[axis], -1)
    return jnp.tile(vectors, -(-k // vectors.shape[1]))[:, :k]


def _moved(decay: ArrayLike, new: Array, trace: Array) -> Array:
    """Return an average moved on, where the new term is finite."""
    new = new.astype(trace.dtype)
    return jnp.where(jnp.isfinite(new), ema(decay, new, trace), trace)


def _product_but_along(axis: int, x: Array, y: Array) -> Array:
    """Return the product of two tensors over all axes but one."""
    x, y = (z.astype(accumulation_dtype(z)) for z in (x, y))
    others = [a for a in range(x.ndim) if a != axis]
    return jnp.tensordot(x, y, (others, others), precision=TURNING)


def turned(traces: Any, bases: Any, first: Any) -> tuple[Any, Any]:
    """Turn bases towards the eigenvectors, by one step of orthogonal iteration.

    ``first`` is what :func:`first_seen` returned.
    """
    flat, of_traces = jax.tree.flatten(traces)
    begun = jax.tree.leaves(first)
    old, of_bases = jax.tree.flatten(bases, is_leaf=_is_leading)
    new: list[Any] = [None] * len(flat)
    for n, group in _turned_together(flat):
        members = [(flat[i], old[i], begun[i]) for i in group]
        together = jax.tree.map(
            lambda *xs, n=n: jnp.concatenate([_matrices(x, n) for x in xs]), *members
        )
        done = replicated(jax.vmap(_turned)(*replicated(together)))
        begin = 0
        for i in group:
            size = math.prod(flat[i].shape[:-2])
            one = jax.tree.map(lambda x, a=begin, n=size: part(x, a, n), done)
            new[i] = jax.tree.map(_cut, one, (flat[i], old[i]))
            begin += size
    new_traces, new_bases = zip(*new, strict=True) if new else ((), ())
    unflatten = jax.tree.unflatten
    return unflatten(of_traces, new_traces), unflatten(of_bases, new_bases)


def _turned_together(traces: list[Array]) -> list[tuple[int, list[int]]]:
    """Return which are turned by one program, whatever tensor they belong to.

    Those of one size are, and leading vectors with longer ones, up to twice as long: a
    loop less to compile. Beside each group is how many rows they get.
    """
    groups: dict[Any, list[int]] = {}
    rows = 0
    for i in sorted(range(len(traces)), key=lambda i: -traces[i].shape[-2]):
        n, k = traces[i].shape[-2:]
        if n == k or not n <= rows <= 2 * n:
            rows = n
        groups.setdefault((rows, k, traces[i].dtype), []).append(i)
    return [(rows, group) for (rows, *_), group in groups.items()]


def _matrices(x: Array, n: int) -> Array:
    """Return a stack of matrices, of n rows, or of the one row that pivots have."""
    x = x.reshape(-1, *x.shape[-2:])
    missing = 0 if x.shape[1] == 1 else n - x.shape[1]
    return jnp.pad(x, ((0, 0), (0, missing), (0, 0)))


def _cut(matrices: Array, like: Array) -> Array:
    return matrices[:, : like.shape[-2]].reshape(like.shape)


def _turned(trace: Array, q: Orthogonal, first: Array) -> tuple[Array, Orthogonal]:
    """Turn one basis, and what its leading vectors see."""
    columns = first_columns(q)
    if leading := isinstance(q, Reflectors):
        first = jnp.where(jnp.isfinite(first), first, 0)
        product, begun = (
            multiply_along(q, x, 0, transpose=False) for x in (trace, first)
        )
        known = q.pivots < len(trace)
        relative = jnp.where(known, _relative(product), _relative(begun))
    else:
        product = jnp.dot(trace, columns, precision=PRECISION)
        relative = _relative(product)
    # The second term keeps vectors without curvature where they are, well above the
    # rounding errors of the first.
    kept = float(jnp.finfo(product.dtype).eps) ** 0.5
    new = orthogonal_from_columns(relative + kept * columns, q)
    if leading:
        # What the trace does outside of the vectors is forgotten, little by little.
        overlap = jnp.dot(columns.T, first_columns(new), precision=PRECISION)
        product = jnp.dot(product, overlap, precision=PRECISION)
        trace = multiply_along(new, product, 0, transpose=True)
    return trace, new


def _relative(x: Array) -> Array:
    largest = jnp.max(jnp.abs(x))
    return x / jnp.where(largest > 0, largest, 1)


def carried(v: Array, old: Bases, new: Bases) -> Array:
    """Take a diagonal from complete bases to new ones, where it stays one nearly.

    That of Q^T diag(v) Q has the squares of Q's entries as weights. Entries that never
    had an estimate have no weight.
    """
    complete = [q is not None and not _is_leading(q) for q in old]
    if not any(complete):
        return v
    n, dtype = layers_ndim(old), accumulation_dtype(v)

    def of_layer(x: Array, old: Any, new: Any) -> Array:
        for axis, is_complete in enumerate(complete[n:]):
            if is_complete:
                overlap = jnp.dot(new[axis].T, old[axis], precision=PRECISION)
                x = multiply_along(jnp.square(overlap), x, axis, transpose=False)
        return x

    take = as_if_automatic(over_layers(of_layer, n))
    never = never_estimated(v)
    value = take(jnp.where(never, 0, v).astype(dtype), old[n:], new[n:])
    weight = take((~never).astype(dtype), old[n:], new[n:])
    seen = weight > 0.5
    value = value / jnp.where(seen, weight, 1)
    return jnp.where(seen, value.astype(v.dtype), no_estimate(v.dtype))


def turned_tree(
    averages: tuple[Any, Any], traces: Any, bases: Any, groups: list[list[int]]
) -> tuple[Any, Any, Any]:
    """Turn bases, and take averages of the gradient and of curvature along.

    Those of curvature over blocks of entries are smaller, and stay.
    """
    mu, nu = averages
    momenta = stacks(mu, groups)
    first = tuple(map(first_seen, momenta, traces, bases))
    traces, new = turned(traces, bases, first)
    parts = zip(momenta, bases, new, strict=True)
    momenta = [rotate(rotate(m, p, back=True), q) for m, p, q in parts]
    moved = unstacked(mu, groups, momenta)
    dtype = accumulation_dtype(*jax.tree.leaves(nu))

    def whole(v: Array, m: Array) -> Array:
        return jnp.broadcast_to(cast_average(v, dtype), m.shape)

    of_nu = stacks(map_floats(whole, nu, mu), groups)
    taken = unstacked(nu, groups, list(map(carried, of_nu, bases, new)))
    nu = map_floats(
        lambda v, c: cast_average(c, v.dtype) if v.shape == c.shape else v, nu, taken
    )
    mu = map_floats(lambda m, x: x.astype(m.dtype), mu, moved)
    return (mu, nu), traces, new


def _is_leading(q: Any) -> bool:
    return isinstance(q, Reflectors)
