# SPDX-License-Identifier: Apache-2.0
"""Orthogonal matrices, whole or by the first of their columns."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.meshes import as_if_automatic
from adahessian_jax._src.stacks import alike, over_layers, stacks, unstacked

PRECISION = jax.lax.Precision.HIGHEST  # for matrices, which have to stay orthogonal
# For what they turn: three passes on a TPU, where HIGHEST takes six, and TF32 on a GPU,
# whose three digits are those of the gradients that networks have there by default.
TURNING = jax.lax.Precision.HIGH


class Reflectors(NamedTuple):
    r"""An orthogonal matrix of which only k columns matter.

    It is :math:`Q = I - U V^\top`, the product of k Householder reflections: 2 n k
    numbers in place of n², and 4 n k operations for a vector in place of 2 n². Rows
    that are zero in those columns are those of the unit matrix.

    Attributes:
      left: U, shape (n, k), the product of V and an upper triangular matrix.
      right: V, shape (n, k), with ones where a row is a pivot.
      pivots: which columns those are, and rows, shape (1, k), int32; the largest number
        for one that is not known yet, and zero in U and V.

    References:
      Schreiber and Van Loan, `A Storage-Efficient WY Representation for Products of
      Householder Transformations <https://doi.org/10.1137/0910005>`_, 1989
    """

    left: Array
    right: Array
    pivots: Array


Orthogonal = Array | Reflectors
_UNKNOWN = 2**31 - 1  # a pivot


def no_columns(n: int, k: int, dtype: Any) -> Reflectors:
    """Return the unit matrix, of whose columns none is known to matter yet."""
    u, v = (jnp.zeros((n, k), dtype) for _ in range(2))
    return Reflectors(u, v, jnp.full((1, k), _UNKNOWN, jnp.int32))


def orthogonal_from_columns(
    columns: Array, before: Orthogonal | None = None
) -> Orthogonal:
    """Return an orthogonal matrix of which some columns span those given, in order.

    It is an array where all columns are given, and else as reflectors, with the pivots
    that were known ``before``.
    """
    n, k = columns.shape
    if k == n:
        return jnp.linalg.qr(columns)[0]
    start = (
        before if isinstance(before, Reflectors) else no_columns(n, k, columns.dtype)
    )
    nothing = jnp.zeros_like(columns)
    carry = nothing, nothing, columns, start.pivots[0]
    # What is left of a column is rounding, and no direction, where it is less.
    least = 100 * float(jnp.finfo(columns.dtype).eps) * jnp.linalg.norm(columns, axis=0)
    (left, right, _, pivots), _ = jax.lax.scan(_reflect, carry, (jnp.arange(k), least))
    return Reflectors(left, right, pivots[None])


def _reflect(carry: tuple[Array, Array, Array, Array], of_column: Any) -> Any:
    """Turn a column to its axis, by Householder's reflection I - tau v v^T.

    The axis is that of the column's largest entry, unless it is known. On a TPU,
    ``jnp.linalg.qr`` of tall matrices takes minutes to compile.
    """
    (left, right, columns, pivots), (j, least) = carry, of_column
    n, k = columns.shape
    rows = jnp.arange(n, dtype=pivots.dtype)
    are_pivots = rows[:, None] == pivots[None]
    done = jnp.any(are_pivots & (jnp.arange(k) < j)[None], axis=1)
    x = jnp.where(done, 0, columns[:, j])
    free = jnp.where(jnp.any(are_pivots, axis=1), -1, jnp.abs(x))
    known = pivots[j] < n
    p = jnp.where(known, pivots[j], jnp.argmax(free).astype(pivots.dtype))
    at_p = x[p]
    length = jnp.sqrt(jnp.sum(jnp.square(x)))
    there = (length > least) & (known | (at_p != 0))
    opposite = jnp.where(at_p < 0, -length, length)
    pivot = at_p + opposite
    v = jnp.where(rows == p, 1, x / jnp.where(there, pivot, 1)).astype(x.dtype)
    v = jnp.where(there, v, 0)
    tau = jnp.where(there, pivot / jnp.where(there, opposite, 1), 0)
    dot = functools.partial(jnp.dot, precision=PRECISION)
    columns = columns - tau * jnp.outer(v, dot(v, columns))
    u = tau * (v - dot(left, dot(v, right)))
    pivots = pivots.at[j].set(jnp.where(there, p, _UNKNOWN).astype(pivots.dtype))
    return (left.at[:, j].set(u), right.at[:, j].set(v), columns, pivots), None


def first_columns(q: Orthogonal) -> Array:
    """Return the columns that a matrix was made from, orthonormal, shape (n, k).

    Those that are not known yet are zero.
    """
    if not isinstance(q, Reflectors):
        return q
    u, v, pivots = q
    units = (jnp.arange(len(v), dtype=pivots.dtype)[:, None] == pivots).astype(v.dtype)
    return units - jnp.dot(u, at_pivots(v, q, 0).T, precision=PRECISION)


def at_pivots(x: Array, q: Reflectors, axis: int) -> Array:
    """Return a tensor at the pivots along one axis, 0 where there is none yet."""
    n, pivots = x.shape[axis], q.pivots[0]
    # In bounds, or jax.experimental.checkify would see an error.
    taken = jnp.take(x, jnp.minimum(pivots, n - 1), axis, mode="clip")
    known = jnp.expand_dims(pivots < n, [a for a in range(x.ndim) if a != axis])
    return jnp.where(known, taken, 0)


def multiply_along(q: Orthogonal, x: Array, axis: int, *, transpose: bool) -> Array:
    """Multiply a tensor by a matrix, or by its transpose, along one axis."""
    if not isinstance(q, Reflectors):
        return _along(q.T if transpose else q, x, axis)
    u, v = (q.right, q.left) if transpose else (q.left, q.right)
    return x.astype(u.dtype) - _along(u, _along(v.T, x, axis), axis)


def _along(matrix: Array, x: Array, axis: int) -> Array:
    x = x.astype(matrix.dtype)
    if axis == x.ndim - 1:
        return jnp.tensordot(x, matrix, (axis, 1), precision=TURNING)
    product = jnp.tensordot(matrix, x, (1, axis), precision=TURNING)
    return jnp.moveaxis(product, 0, axis)


def _multiply_both(bases: Any, x: Array, *, transpose: bool) -> Array:
    """Multiply a matrix along both axes by one product of rank 2 k, not two of k."""
    (u, v), (a, b) = ((q.right, q.left) if transpose else q[:2] for q in bases)
    dot, x = functools.partial(jnp.dot, precision=TURNING), x.astype(u.dtype)
    left = dot(v.T, x)
    right = dot(x, b) - dot(u, dot(left, b))
    return x - dot(jnp.concatenate([u, right], 1), jnp.concatenate([left, a.T]))


Bases = tuple[Orthogonal | None, ...]  # one for each axis


def rotate(x: Array, bases: Bases, *, back: bool = False) -> Array:
    """Return the coordinates of a tensor in its bases, or the tensor of coordinates."""
    if all(q is None for q in bases):
        return x
    n = layers_ndim(bases)

    def turned(x: Array, bases: Bases) -> Array:
        if len(bases) == 2 and all(isinstance(q, Reflectors) for q in bases):
            return _multiply_both(bases, x, transpose=not back)
        for axis, q in enumerate(bases):
            if q is not None:
                x = multiply_along(q, x, axis, transpose=not back)
        return x

    return as_if_automatic(over_layers(turned, n))(x, bases[n:])


def rotate_tree(tree: Any, bases: tuple[Bases, ...], *, back: bool = False) -> Any:
    """Rotate the leaves of a tree that have bases, those that are alike together."""
    if not any(bases):
        return tree
    pairs = zip(alike(tree), bases, strict=True)
    some = [pair for pair in pairs if any(q is not None for q in pair[1])]
    groups = [group for group, _ in some]
    of_groups = zip(stacks(tree, groups), some, strict=True)
    turned = [rotate(x, q, back=back) for x, (_, q) in of_groups]
    return unstacked(tree, groups, turned)


def layers_ndim(matrices: Any) -> int:
    """Return how many leading axes of a tensor are stacks, each layer with matrices."""
    return max(x.ndim for x in jax.tree.leaves(matrices)) - 2
