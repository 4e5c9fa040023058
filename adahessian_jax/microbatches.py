# SPDX-License-Identifier: Apache-2.0
"""Independent estimates for the parts of a batch."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.axes import zeros_of_type
from adahessian_jax.checks import check_flag, check_int
from adahessian_jax.dtypes import is_differentiable
from adahessian_jax.protocol import as_estimator


def microbatched(
    estimator: optax.GradientTransformation, microbatches: int, *, unroll: bool = False
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate on each part of the batch with probes of its own, and average.

    With :math:`H = \frac{1}{k} \sum_g H_g` over the parts of a batch, the average of
    :math:`z_g \odot H_g z_g` over independent probes has the same mean as
    :math:`z \odot H z` and, for Hutchinson's estimator, a variance that is smaller by
    up to the number k of parts, at the same number of operations. Where gradients are
    accumulated over parts anyway it costs nothing; it also needs only the memory of one
    part. For devices in place of parts, use the estimators' ``axis_name``.

    Args:
      estimator: any estimator of this library, or a transformation like it.
      microbatches: the number k of parts, at least 1.
      unroll: compile the parts one after the other in place of a loop. Convolutions
        inside a loop are an order of magnitude slower on CPU.

    Returns:
      A transformation whose ``update`` takes ``batch``, a pytree of arrays whose rows
      are dealt out to the parts and of scalars that are in every part, and hands to the
      functions ``obj_fn``, ``predict_fn`` and ``output_loss`` one part of it as second
      argument: ``obj_fn(params, part)``. The first of k parts has the rows 0, k, 2 k
      and so on, of ``targets`` as well. The objective must be a mean over the batch.

    Raises:
      ValueError: if ``microbatches`` < 1; at update, if ``batch`` is missing or not
        divisible.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> estimator = ah.microbatched(ah.hutchinson(), 2)
      >>> w, x = jnp.ones(3), jnp.arange(12.0).reshape(4, 3)
      >>> d, _ = estimator.update(None, estimator.init(w), w, batch=x,
      ...   obj_fn=lambda w, x: jnp.mean(x**2 @ w**2))
      >>> d.tolist()  # the mean of 2 x**2
      [63.0, 83.0, 107.0]
    """
    estimator = as_estimator(estimator)
    check_int("microbatches", microbatches, 1)
    check_flag("unroll", unroll)

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        *,
        batch: Any = None,
        targets: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        if batch is None:
            raise ValueError(
                "microbatched needs the batch to cut and got none. Pass it, and"
                " functions of a part of it: tx.update(grads, state, params,"
                " obj_fn=lambda p, part: loss_fn(p, part), batch=batch)."
            )
        parts, join = cut({"batch": batch, "targets": targets}, microbatches)

        def one_part(state: optax.OptState, part: Any) -> tuple[Any, Any, tuple[()]]:
            part = join(part)
            bound = bind(extra_args, part["batch"])
            if targets is not None:
                bound["targets"] = part["targets"]
            diag, state = estimator.update(updates, state, params, **bound)
            return state, diag, ()

        state, diag, _ = mean_over_parts(one_part, state, parts, unroll=unroll)
        return diag, state

    return optax.GradientTransformationExtraArgs(estimator.init, update_fn)


_FUNCTIONS = ("obj_fn", "predict_fn", "output_loss")


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

    def one(path: Any, x: Any) -> jax.Array:
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


def bind(extra_args: dict[str, Any], *part: Any) -> dict[str, Any]:
    """Hand a part of the batch to the functions among further arguments."""

    def bound(function: Any) -> Any:
        return lambda value: function(value, *part)

    return {k: bound(v) if k in _FUNCTIONS else v for k, v in extra_args.items()}


def mean_over_parts(
    function: Callable[[Any, Any], tuple[Any, Any, Any]],
    state: Any,
    parts: list[Any],
    *,
    unroll: bool,
) -> tuple[Any, Any, Any]:
    """Average over parts, one after the other, what a function returns of each.

    Args:
      function: ``(state, part)`` to ``(state, averaged, stacked)``: the new state, a
        tree to average and one whose leaves are to be put behind each other.
      state: the first state.
      parts: arrays, with parts along their first axes.
      unroll: compile the parts one after the other in place of a loop.

    Returns:
      The last state, the average, where leaves that are not floating point are those of
      the last part, and the stack.
    """
    n = len(parts[0])
    _, like, _ = jax.eval_shape(function, state, [x[0] for x in parts])

    def add(total: Any, x: Any) -> Any:
        return total + x.astype(total.dtype) if is_differentiable(x) else x

    def one(carry: tuple[Any, Any], part: list[Any]) -> tuple[tuple[Any, Any], Any]:
        state, total = carry
        state, averaged, stacked = function(state, part)
        return (state, jax.tree.map(add, total, averaged)), stacked

    def mean(total: Any, x: Any) -> Any:
        return (total / n).astype(x.dtype) if is_differentiable(x) else total

    zeros = jax.tree.map(zeros_of_type, like)
    (state, total), stacked = jax.lax.scan(one, (state, zeros), parts, unroll=unroll)
    return state, jax.tree.map(mean, total, like), stacked
