# SPDX-License-Identifier: Apache-2.0
"""The estimate of a diagonal on one batch of a data set, and its weight in a mean."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.dtypes import map_floats
from adahessian_jax._src.estimator import Estimator, as_estimator
from adahessian_jax._src.microbatches import reduction_of


def sample_of(
    fun: Any, params: Any, estimator: Any, labels_fn: Any, reduction: str | None
) -> tuple[Callable[..., Any], bool]:
    """Return what adds the estimate on a batch, and whether their mean is wanted."""
    inner: Any = as_estimator(estimator).update
    known = isinstance(inner, Estimator)
    leaves, treedef = jax.tree.flatten(estimator.init(params) if known else ())
    rule = "hutchinson() with no control variate that learns, or gauss_newton(loss)"
    checks.require(len(leaves) == 1, ValueError, "estimator", rule, estimator)  # a key
    loss = inner.loss
    reduction = reduction_of(reduction, loss)

    def as_pair(result: Any) -> tuple[Any, Any]:
        return result if isinstance(result, tuple) else (result, None)

    def weight_of(outputs: Any, weight: Any, batch: Any) -> Any:
        if reduction == "sum":
            return 1.0
        if loss is not None:
            return loss.total_weight(outputs, weight)
        if weight is not None:
            rule = "what fun returns beside the loss, a number of rows or their weight"
            is_one = jax.tree_util.all_leaves([weight]) and jnp.ndim(weight) == 0
            checks.require(is_one, TypeError, "weight", rule, weight)
            return weight
        rows = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
        rule = "arrays of one first axis, its rows; or let fun return (loss, weight)"
        checks.require(len(rows) == 1, ValueError, "batch", rule, sorted(rows))
        return float(rows.pop())

    def weighted(
        total: Any, params: Any, batch: Any, key: Array, sample: int, place: int
    ) -> tuple[Any, Array]:
        partial, total_weight = total
        key = jax.random.fold_in(jax.random.fold_in(key, sample), place)
        outputs, where = as_pair(fun(params, batch))
        given = {"predict_fn": lambda p: fun(p, batch)}
        if loss is None:
            given = {"obj_fn": lambda p: as_pair(fun(p, batch))[0]}
        if labels_fn is not None:
            given["labels"] = labels_fn(batch)
        state = jax.tree.unflatten(treedef, [key])
        *_, diag, _ = inner.value_and_grad(None, state, params, **given)
        weight = jnp.asarray(weight_of(outputs, where, batch), total_weight.dtype)

        def add(x: Array, d: Array) -> Array:
            # A mean over no rows may be anything.
            part = weight.astype(x.dtype) * d.astype(x.dtype)
            return x + jnp.where(weight > 0, part, 0)

        weight = jnp.where(weight < 0, jnp.nan, weight)  # and is refused at the end
        return map_floats(add, partial, diag), total_weight + weight

    return weighted, reduction == "mean"
