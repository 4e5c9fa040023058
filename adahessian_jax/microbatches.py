# SPDX-License-Identifier: Apache-2.0
"""Independent estimates for the parts of a batch."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.checks import check_flag, check_int
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable
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
      A transformation whose ``update`` takes ``batch``, a pytree of arrays that are cut
      along their first axis, and hands to the functions ``obj_fn``, ``predict_fn`` and
      ``output_loss`` one part of it as second argument: ``obj_fn(params, part)``.
      ``targets`` is cut in the same way. The objective must be a mean over the batch.

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
        parts = jax.tree_util.tree_map_with_path(cut, {"batch": batch})["batch"]
        target_parts = jax.tree_util.tree_map_with_path(cut, {"targets": targets})

        def one_part(state: optax.OptState, xs: Any) -> tuple[Any, Any]:
            part, part_targets = xs
            bound: dict[str, Any] = {
                name: _with_part(value, part) if name in _FUNCTIONS else value
                for name, value in extra_args.items()
            }
            if targets is not None:
                bound |= part_targets
            diag, state = estimator.update(updates, state, params, **bound)
            return state, diag

        state, diags = jax.lax.scan(
            one_part, state, (parts, target_parts), unroll=unroll
        )
        return jax.tree.map(_mean_over_first_axis, diags), state

    def cut(path: Any, x: Any) -> jax.Array:
        size = jnp.shape(x)[0] if jnp.ndim(x) else 0
        if size == 0 or size % microbatches:
            (name, *rest) = path
            raise ValueError(
                f"{name.key}{jax.tree_util.keystr(tuple(rest))} of shape {jnp.shape(x)}"
                f" cannot be cut along its first axis into {microbatches} equal parts."
            )
        return jnp.reshape(x, (microbatches, -1, *jnp.shape(x)[1:]))

    return optax.GradientTransformationExtraArgs(estimator.init, update_fn)


_FUNCTIONS = ("obj_fn", "predict_fn", "output_loss")


def _with_part(function: Any, part: Any) -> Any:
    return lambda value: function(value, part)


def _mean_over_first_axis(x: jax.Array) -> jax.Array:
    if not is_differentiable(x):
        return x[0]
    return jnp.mean(x.astype(accumulation_dtype(x)), axis=0).astype(x.dtype)
