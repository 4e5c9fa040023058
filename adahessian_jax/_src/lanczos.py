# SPDX-License-Identifier: Apache-2.0
"""Lanczos' method for the largest eigenvalues of a symmetric matrix."""

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.derivatives import Floats, normalized, squared_norm
from adahessian_jax._src.meshes import is_sharded, sharded_like
from adahessian_jax._src.xla import is_traced, while_loop


class Krylov(NamedTuple):
    """An orthonormal basis of at most m vectors, and the tridiagonal matrix in it.

    Attributes:
      vectors: (m, ...) for each leaf; those that are still to come are zero.
      newest: the vector that the matrix is to be multiplied by next.
      diagonal: of the matrix in the basis, shape (m,), zero where still to come.
      beside: next to the diagonal; the last that is known is the norm of what the last
        product has outside of the basis. Shape (m,).
      n: how many products were made, shape ().
      restarted: whether nothing was once outside, and a random vector took its place,
        shape (), bool.
    """

    vectors: Floats
    newest: Floats
    diagonal: Array
    beside: Array
    n: Array
    restarted: Array


def lanczos(
    product: Callable[[Floats], Floats],
    start: Floats,
    key: Array,
    *,
    known: bool,
    k: int,
    rtol: float,
    max_products: int,
) -> tuple[Array, Floats, Array, Array]:
    """Find the k largest eigenvalues by magnitude, and their vectors.

    Args:
      product: multiplies a vector by the matrix, leaves of one dtype, float32 or wider.
      start: where to begin, not zero.
      key: of the vectors to go on with where a product lies in the basis.
      known: whether ``start`` is of the wanted vectors alone.
      k: how many.
      rtol: the residuals that suffice, relative to the largest eigenvalue.
      max_products: where to stop, at least k and at most the size of the matrix.

    Returns:
      The eigenvalues, their vectors, (k, ...) for each leaf, the norms of the matrix
      times a vector less the value times it, and the number of products. Each vector of
      the basis is made orthogonal to all earlier ones, and again.
    """

    def go_on(krylov: Krylov) -> Array:
        return _unfinished(krylov, rtol, k, known)

    def step(krylov: Krylov) -> Krylov:
        return _extended(krylov, product(krylov.newest), key)

    krylov = _first(start, max_products)
    if not is_traced(krylov):  # by now, but maybe by what the product brings in
        krylov = step(krylov)
    krylov = while_loop(go_on, step, krylov)
    values, vectors, residuals = _pairs(krylov, k)
    return values, vectors, residuals, krylov.n


# Compiled once, where what calls them is not: a product may be of any function.


@functools.partial(jax.jit, static_argnums=1)
def _first(start: Floats, m: int) -> Krylov:
    # In this way a mesh of explicit axes cuts the basis as it does the vectors.
    empty = ((jnp.zeros_like(x)[None], (m, *x.shape)) for x in start)
    norm = _norm(start)
    return Krylov(
        [jnp.broadcast_to(*x) for x in empty],
        [x / norm for x in start],
        jnp.zeros(m, norm.dtype),
        jnp.zeros(m, norm.dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
    )


@jax.jit
def _extended(krylov: Krylov, image: Floats, key: Array) -> Krylov:
    basis, newest, diagonal, beside, n, restarted = krylov
    put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=n, axis=0)
    basis = [put(b, x) for b, x in zip(basis, newest, strict=True)]
    products = [jnp.sum(x * y) for x, y in zip(newest, image, strict=True)]
    diagonal = diagonal.at[n].set(sum(products[1:], start=products[0]))
    image = _outside(basis, image)
    # Nothing but rounding is left, or it is not a number: a random vector then.
    size = jnp.max(jnp.abs(jnp.stack([diagonal, beside])))
    least = 100 * float(jnp.finfo(size.dtype).eps) * size
    ends = ~(_norm(image) > least)
    fresh = random_vector(jax.random.fold_in(key, n), image)
    image = [jnp.where(ends, x, y) for x, y in zip(fresh, image, strict=True)]
    image = _outside(basis, _outside(basis, image))
    norm = _norm(image)
    beside = beside.at[n].set(jnp.where(ends, 0, norm))
    newest = [x / norm for x in image]
    return Krylov(basis, newest, diagonal, beside, n + 1, restarted | ends)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _unfinished(krylov: Krylov, rtol: float, k: int, known: bool) -> Array:
    values, _, residuals = _ritz(krylov, k)
    limit = jnp.asarray(rtol, values.dtype) * jnp.max(jnp.abs(values))
    enough = jnp.all(residuals <= limit) & (krylov.n >= k)
    if not known:  # then others may lie in what a restarted basis has not seen
        enough &= ~krylov.restarted
    lost = ~jnp.all(jnp.isfinite(krylov.diagonal))
    return (krylov.n < len(krylov.diagonal)) & ~enough & ~lost


@functools.partial(jax.jit, static_argnums=1)
def _pairs(krylov: Krylov, k: int) -> tuple[Array, Floats, Array]:
    values, coordinates, residuals = _ritz(krylov, k)
    return values, [jnp.tensordot(coordinates, b, 1) for b in krylov.vectors], residuals


def _ritz(krylov: Krylov, k: int) -> tuple[Array, Array, Array]:
    """Return values, coordinates of vectors in the basis, (k, m), and residuals."""
    there = jnp.arange(len(krylov.diagonal), dtype=krylov.n.dtype) < krylov.n
    inside = jnp.where(there[1:], krylov.beside[:-1], 0)
    t = jnp.diag(krylov.diagonal) + jnp.diag(inside, 1) + jnp.diag(inside, -1)
    size = jnp.max(jnp.abs(t))  # of any magnitude, with no square beyond its dtype
    size = jnp.where(size > 0, size, 1)
    values, vectors = jnp.linalg.eigh(t / size)
    values *= size
    # Vectors that are still to come have value zero, and rank behind all others.
    share = jnp.sum(jnp.where(there[:, None], vectors**2, 0), axis=0)
    chosen = jnp.argsort(jnp.where(share > 0.5, -jnp.abs(values), 1))[:k]
    values, vectors = values[chosen], vectors[:, chosen]
    last = krylov.n - 1
    residuals = krylov.beside[last] * jnp.abs(vectors[last])
    finite = jnp.all(jnp.isfinite(t))  # what eigh does otherwise is not said
    values, residuals = (jnp.where(finite, x, jnp.nan) for x in (values, residuals))
    return values, vectors.T, residuals


@jax.jit
def random_vector(key: Array, like: Floats) -> Floats:
    """Draw uniform numbers between -1 and 1."""
    ends = list(itertools.accumulate(x.size for x in like))
    numbers = jax.random.uniform(key, (ends[-1],), like[0].dtype, -1, 1)
    parts = zip(jnp.split(numbers, ends[:-1]), like, strict=True)
    return sharded_like(like, [x.reshape(y.shape) for x, y in parts])


def _norm(x: Floats) -> Array:
    """Return the norm, where squares may be beyond the dtype."""
    unit, largest = normalized(x)
    return largest * jnp.sqrt(squared_norm(unit))


def _outside(basis: Floats, vector: Floats) -> Floats:
    """Return a vector without its share of a basis."""
    pairs = list(zip(basis, vector, strict=True))
    inner = [_inner(b, x) for b, x in pairs]
    shares = sum(inner[1:], start=inner[0])
    return [x - jnp.tensordot(shares, b, 1) for b, x in pairs]


def _inner(basis: Array, x: Array) -> Array:
    axes = tuple(range(x.ndim))
    if is_sharded(x):  # a product would have to say where its result lies
        return jnp.sum(basis * x[None], axis=tuple(i + 1 for i in axes))
    return jnp.tensordot(basis, x, (tuple(i + 1 for i in axes), axes))
