# SPDX-License-Identifier: Apache-2.0
"""The parts of a batch, and averages over them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import keystr, tree_leaves_with_path

from adahessian_jax._src.axes import AxisName, sum_over_axis, zeros_of_type
from adahessian_jax._src.derivatives import split_leaves
from adahessian_jax._src.dtypes import map_floats
from adahessian_jax._src.xla import scan


def cut(tree: Any, microbatches: int) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Deal the rows of a dictionary's arrays out to parts of the same size.

    Returns the arrays with a new first axis, of parts, and the function that puts a
    part of each back into the dictionary. Scalars are in every part.
    """
    paths = tree_leaves_with_path(tree)
    arrays, join = split_leaves(tree, [jnp.ndim(x) > 0 for _, x in paths])
    if not arrays:
        raise ValueError(
            f"batch must have an array to cut into {microbatches} parts, got"
            f" {len(paths)} scalars only."
        )
    for (name, *rest), x in paths:
        shape = jnp.shape(x)
        if shape == (2,) and x.dtype == jnp.uint32:
            raise TypeError(
                f"{name.key}{keystr(tuple(rest))} is a raw PRNG key, or looks like one,"
                " and would be cut in two: pass a typed one, jax.random.key(0)."
            )
        if shape and (shape[0] == 0 or shape[0] % microbatches):
            raise ValueError(
                f"{name.key}{keystr(tuple(rest))} of shape {shape} cannot be cut along"
                f" its first axis into {microbatches} equal parts."
            )

    def in_turns(x: Any) -> Array:
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        if is_key and jnp.shape(x) == (microbatches,):
            return x  # a key for each part, and not an array of one
        # So that of a batch cut over devices each one has its share of every part.
        rows = jnp.reshape(x, (-1, microbatches, *jnp.shape(x)[1:]))
        return jnp.moveaxis(rows, 1, 0)

    return list(map(in_turns, arrays)), join


def reduction_of(given: str | None, loss: Any) -> str:
    """Return how the losses of parts are reduced, by a loss object or as given."""
    if loss is None:
        return given or "mean"
    if given not in (None, loss.reduction):
        raise ValueError(
            f"reduction={given!r} contradicts {loss!r}: it is said on the loss, as"
            f" loss.replace(reduction={given!r})."
        )
    return str(loss.reduction)


def over_parts(
    function: Callable[[Any, Any], tuple[Any, Any, Any, Any]],
    state: Any,
    data: dict[str, Any],
    *,
    microbatches: int,
    reduction: str,
    unroll: bool,
    axis_name: AxisName,
) -> tuple[Any, Any, Any]:
    """Average or add up over parts, one after the other, what a function returns.

    ``function`` maps ``(state, data)`` to ``(reduced, stacked, state, weight)``: value,
    gradient and estimate, to average; a tree whose leaves are to be put behind each
    other; the new state; and the weight of the part in a mean. The keys of ``data`` are
    what errors call its arrays.

    Returns:
      The means or sums, where leaves that are not floating point are those of the last
      part; the stack, with no new axis if there is a single part; and the last state.
    """
    if microbatches == 1:
        return function(state, data)[:3]
    parts, join = cut(data, microbatches)

    def weighted(state: Any, part: list[Any]) -> tuple[Any, Any, Any, Any]:
        reduced, stacked, state, weight = function(state, join(part))
        # Value and gradient are a device's own, and the estimate is of all.
        weights = [weight, weight, sum_over_axis(weight, axis_name)]
        if reduction == "sum":
            weights = [1.0, 1.0, 1.0]
        dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
        return reduced, stacked, state, [jnp.asarray(w, dtype) for w in weights]

    like, _, _, like_weights = jax.eval_shape(weighted, state, [x[0] for x in parts])

    def one(carry: Any, part: list[Any]) -> tuple[Any, Any]:
        state, totals, total_weights = carry
        reduced, stacked, state, weights = weighted(state, part)

        def add(weight: Array, x: Array, total: Array) -> Array:
            x = x.astype(total.dtype)
            # A mean over no rows may be anything.
            return total + jnp.where(weight > 0, weight.astype(x.dtype) * x, 0)

        totals = _map_entries(add, weights, reduced, totals)
        return (state, totals, jax.tree.map(jnp.add, total_weights, weights)), stacked

    zeros = jax.tree.map(zeros_of_type, (like, like_weights))
    (state, totals, weights), stacked = scan(one, (state, *zeros), parts, unroll=unroll)

    def divide(weight: Array, total: Array, x: Any) -> Array:
        divisor = jnp.where((weight > 0) & (reduction == "mean"), weight, 1)
        return (total / divisor.astype(total.dtype)).astype(x.dtype)

    return _map_entries(divide, weights, totals, like), stacked, state


def _map_entries(function: Any, weights: Any, *tuples: Any) -> Any:
    """Map the floating-point leaves of each entry of tuples, with its weight."""
    return tuple(
        map_floats(functools.partial(function, weight), *trees)
        for weight, *trees in zip(weights, *tuples, strict=True)
    )
