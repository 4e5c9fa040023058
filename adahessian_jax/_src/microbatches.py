# SPDX-License-Identifier: Apache-2.0
"""The parts of a batch, and averages over them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.axes import zeros_of_type
from adahessian_jax._src.dtypes import is_differentiable
from adahessian_jax._src.xla import scan


def cut(tree: Any, microbatches: int) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Deal the rows of a tree's arrays out to parts of the same size.

    Args:
      tree: a dictionary, whose keys are the names that errors call the arrays by.
      microbatches: the number of parts.

    Returns:
      The arrays with a new first axis, of parts, and the function that puts a part of
      each back into the tree. Scalars are in every part.

    Raises:
      ValueError: if there is no array, or one cannot be cut into so many parts.
    """
    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    leaves = [leaf for _, leaf in paths]
    where = [i for i, leaf in enumerate(leaves) if jnp.ndim(leaf)]
    if not where:
        raise ValueError(
            f"batch must have an array to cut into {microbatches} parts, got"
            f" {len(leaves)} scalars only."
        )

    def one(path: Any, x: Any) -> Array:
        size = jnp.shape(x)[0]
        if size == 0 or size % microbatches:
            (name, *rest) = path
            raise ValueError(
                f"{name.key}{jax.tree_util.keystr(tuple(rest))} of shape {jnp.shape(x)}"
                f" cannot be cut along its first axis into {microbatches} equal parts."
            )
        # In turns, so that of a batch that is cut over devices each one has its share
        # of every part.
        rows = jnp.reshape(x, (-1, microbatches, *jnp.shape(x)[1:]))
        return jnp.moveaxis(rows, 1, 0)

    def join(part: list[Any]) -> Any:
        new = list(leaves)
        for i, x in zip(where, part, strict=True):
            new[i] = x
        return jax.tree.unflatten(treedef, new)

    return [one(*paths[i]) for i in where], join


def over_parts(
    function: Callable[[Any, Any], tuple[Any, Any, Any, Any]],
    state: Any,
    parts: list[Any],
    *,
    reduction: str,
    unroll: bool,
) -> tuple[Any, Any, Any]:
    """Average or add up over parts, one after the other, what a function returns.

    Args:
      function: ``(state, part)`` to ``(state, reduced, stacked, weight)``: the new
        state, a tree to average, one whose leaves are to be put behind each other, and
        the weights of the part in the means of each entry of ``reduced``, a tuple.
      state: the first state.
      parts: arrays, with parts along their first axes.
      reduction: ``"mean"`` or ``"sum"``.
      unroll: compile the parts one after the other in place of a loop.

    Returns:
      The last state, the mean or sum, where leaves that are not floating point are
      those of the last part, and the stack.
    """

    def weighted(state: Any, part: list[Any]) -> tuple[Any, Any, Any, Any]:
        state, reduced, stacked, weights = function(state, part)
        if reduction == "sum":
            weights = jax.tree.map(lambda _: 1.0, weights)
        dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
        return state, reduced, stacked, [jnp.asarray(w, dtype) for w in weights]

    _, like, _, like_weights = jax.eval_shape(weighted, state, [x[0] for x in parts])

    def one(carry: Any, part: list[Any]) -> tuple[Any, Any]:
        state, totals, total_weights = carry
        state, reduced, stacked, weights = weighted(state, part)

        def add(weight: jax.Array, total: Any, x: Any) -> Any:
            if not is_differentiable(x):
                return x
            x = x.astype(total.dtype)
            # A mean over no rows may be anything.
            return total + jnp.where(weight > 0, weight.astype(x.dtype) * x, 0)

        totals = tuple(
            jax.tree.map(functools.partial(add, weight), total, x)
            for weight, total, x in zip(weights, totals, reduced, strict=True)
        )
        return (state, totals, jax.tree.map(jnp.add, total_weights, weights)), stacked

    zeros = jax.tree.map(zeros_of_type, (like, like_weights))
    (state, totals, weights), stacked = scan(one, (state, *zeros), parts, unroll=unroll)

    def reduced(weight: jax.Array, total: Any, x: Any) -> Any:
        if not is_differentiable(x):
            return total
        divisor = jnp.where((weight > 0) & (reduction == "mean"), weight, 1)
        return (total / divisor.astype(total.dtype)).astype(x.dtype)

    means = tuple(
        jax.tree.map(functools.partial(reduced, weight), total, x)
        for weight, total, x in zip(weights, totals, like, strict=True)
    )
    return state, means, stacked
