# SPDX-License-Identifier: Apache-2.0
"""Value, gradient and curvature of a loss from one pass over the network."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.axes import as_varying
from adahessian_jax.checks import (
    check_callable,
    check_flag,
    check_int,
    check_params,
    check_scalar,
    check_spelling,
)
from adahessian_jax.dtypes import is_differentiable
from adahessian_jax.hvp import value_and_grad
from adahessian_jax.masking import fill_masked, has_masked, masked_in_all
from adahessian_jax.microbatches import bind, cut, mean_over_parts
from adahessian_jax.protocol import (
    Curvature,
    CurvatureEstimator,
    as_estimator,
    check_same_estimator,
)
from adahessian_jax.state import find_states


def value_and_grad_with_curvature(
    loss_fn: Callable[..., Any],
    estimator: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    curvature_batch: int | None = None,
    microbatches: int = 1,
    unroll: bool = False,
) -> Callable[..., tuple[Any, optax.Updates, Curvature]]:
    r"""Make a function like ``jax.value_and_grad`` that also estimates the curvature.

    Calling ``tx.update(..., obj_fn=...)`` leaves it to the compiler to find out that
    gradient and Hessian-vector product share most of their work. This function computes
    them in one pass: ``jax.jvp`` of ``jax.value_and_grad`` for Hutchinson's estimator,
    and one forward pass with two pullbacks for Gauss-Newton.

    Args:
      loss_fn: ``(params, *batch)`` to the loss, or to ``(loss, aux)`` with ``has_aux``.
        For :func:`adahessian_jax.gauss_newton` and
        :func:`adahessian_jax.gauss_newton_control` it returns ``(loss, outputs)`` in
        place of the loss, or ``(loss, (outputs, weights))``.
      estimator: the one that the optimizer was made with.
      has_aux: whether ``loss_fn`` returns auxiliary values, such as new batch
        statistics, as well.
      curvature_batch: estimate from so many first examples of each array of the batch
        only; scalars, typed keys among them, go to both parts. The loss must be a mean
        over examples. Without ``has_aux`` the two parts
        of the batch are passed through the network one after the other, which costs
        nothing extra but is wrong if examples influence each other, as in batch
        normalisation; with ``has_aux`` the value, gradient and auxiliary values are
        those of the whole batch, and the curvature that of the first examples passed
        through the network again, with statistics of their own.
      microbatches: deal the rows of each array of the batch out to so many parts, pass
        them through the network one after the other, and average: accumulation of
        gradients, in the memory of one part. Every part has probes of its own, which
        makes the estimate less noisy at no cost
        (:func:`adahessian_jax.microbatched`). Scalars, typed keys among them, go to
        every part; of as many keys as parts, each gets one. Functions among further
        arguments take what is in the batch as well: ``output_loss(outputs, *batch)``.
        The loss must be a mean over examples. Auxiliary values have a new first axis,
        of parts.
      unroll: compile the parts one after the other in place of a loop. Convolutions
        inside a loop are an order of magnitude slower on CPU.

    Returns:
      A function ``(params, *batch, state, refresh=None)`` to ``(value, grads,
      curvature)``. ``value`` and ``grads`` are as from ``jax.value_and_grad``, those of
      a device's own part of the batch if the estimator has an ``axis_name``.
      ``curvature`` is for ``tx.update(grads, state, params, curvature=curvature)``; if
      ``optax.masked`` or ``optax.partition`` gives a part of the parameters to the
      optimizer, it is that of this part, and several groups of AdaHessian share it.
      ``state`` is the optimizer's. ``refresh`` says whether to estimate: True or False
      choose one of two programs as they are compiled, which is the fast way for
      convolutional networks on CPU, and None follows the optimizer's
      ``update_interval``, inside a ``jax.lax.cond`` if it is above 1.

    Raises:
      ValueError: if ``curvature_batch`` or ``microbatches`` < 1, or both are given; at
        the call, if ``params`` or the optimizer's state is missing, or an array of the
        batch has fewer examples or cannot be cut into equal parts.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> def loss_fn(w, x, y): return jnp.mean((x @ w - y) ** 2)
      >>> estimator = ah.hutchinson()
      >>> tx = ah.adahessian(0.1, estimator=estimator, update_interval=10)
      >>> value_and_grad = ah.value_and_grad_with_curvature(loss_fn, estimator)
      >>> w, x, y = jnp.zeros(2), jnp.eye(2), jnp.ones(2)
      >>> state = tx.init(w)
      >>> loss, grads, curvature = value_and_grad(w, x, y, state=state)
      >>> updates, state = tx.update(grads, state, w, curvature=curvature)

    .. note::
      Dropout is right if ``loss_fn`` takes its key from the batch: one call uses one
      mask for value, gradient and curvature.
    """
    check_callable("loss_fn", loss_fn, "(params, *batch) -> loss")
    estimator = as_estimator(estimator)
    check_flag("has_aux", has_aux)
    if curvature_batch is not None:
        check_int("curvature_batch", curvature_batch, 1)
    check_int("microbatches", microbatches, 1)
    check_flag("unroll", unroll)
    if curvature_batch is not None and microbatches > 1:
        raise ValueError(
            "curvature_batch and microbatches exclude each other, got"
            f" {curvature_batch} and {microbatches}. With microbatches an estimate"
            " takes no more memory than a part does."
        )
    needs_outputs = getattr(estimator, "needs_outputs", False)

    def checked(params: optax.Params, *batch: Any) -> Any:
        out = loss_fn(params, *batch)
        if has_aux and not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                "loss_fn must return a pair (loss, aux) with has_aux=True, got"
                f" {jax.tree.map(jnp.shape, out)}."
            )
        if not needs_outputs:
            check_scalar("loss_fn", out[0] if has_aux else out)
        return out

    def loss_only(params: optax.Params, *batch: Any) -> Any:
        out = checked(params, *batch)
        if not needs_outputs:
            return out
        return (out[0][0], out[1]) if has_aux else out[0]

    def plain(params: optax.Params, batch: Batch) -> tuple[Any, optax.Updates]:
        params = as_varying(params, getattr(estimator, "axis_name", None))
        return value_and_grad(lambda p: loss_only(p, *batch), params, has_aux=has_aux)

    def with_estimate(
        params: optax.Params,
        curved: optax.Params,
        batch: Batch,
        state: Any,
        extra_args: dict[str, Any],
    ) -> tuple[Any, optax.Updates, optax.Updates, Any]:
        """Return value, gradient, the diagonal for ``curved``, and the state."""

        def on_curved(fun: Callable[..., Any]) -> Callable[[optax.Params], Any]:
            return lambda p: fun(fill_masked(p, params), *batch)

        if not isinstance(estimator, CurvatureEstimator):
            objective = on_curved(loss_only)
            value, grads = plain(params, batch)
            extra_args = {
                "obj_fn": lambda p: objective(p)[0] if has_aux else objective(p),
                **extra_args,
            }
            diag, state = estimator.update(grads, state, curved, **extra_args)
            return value, grads, diag, state
        value, grads, diag, state = estimator.value_and_grad(
            on_curved(checked), state, curved, has_aux=has_aux, **extra_args
        )
        if has_masked(curved):  # gradients of all parameters are wanted, though
            value, grads = plain(params, batch)
        return value, grads, diag, state

    def with_estimate_on_part(
        params: optax.Params,
        curved: optax.Params,
        batch: Batch,
        state: Any,
        extra_args: dict[str, Any],
    ) -> tuple[Any, optax.Updates, optax.Updates, Any]:
        n, size = curvature_batch, _batch_size(batch, curvature_batch)
        if n is None or n == size:
            return with_estimate(params, curved, batch, state, extra_args)
        first, rest = (
            jax.tree.map(lambda x, part=part: x[part] if jnp.ndim(x) else x, batch)
            for part in (slice(n), slice(n, None))
        )
        first_value, first_grads, diag, state = with_estimate(
            params, curved, first, state, extra_args
        )
        if has_aux:
            return *plain(params, batch), diag, state
        rest_value, rest_grads = plain(params, rest)
        share = n / size

        def mean(a: jax.Array, b: jax.Array) -> jax.Array:
            return share * a + (1 - share) * b if is_differentiable(a) else a

        value = mean(first_value, rest_value)
        return value, jax.tree.map(mean, first_grads, rest_grads), diag, state

    def over_parts(
        one: Callable[..., Any], batch: Batch, state: Any, extra_args: dict[str, Any]
    ) -> tuple[Any, ...]:
        """Average ``one(batch, state, extra_args)`` over the microbatches."""
        if microbatches == 1:
            return one(batch, state, extra_args)
        targets = extra_args.get("targets")
        parts, join = cut({"batch": batch, "targets": targets}, microbatches)

        def averaged(state: Any, part: list[Any]) -> tuple[Any, Any, Any]:
            batch, targets = (join(part)[name] for name in ("batch", "targets"))
            bound = bind(extra_args, *batch) | {"targets": targets}
            value, grads, diag, state = one(batch, state, bound)
            value, aux = value if has_aux else (value, ())
            return state, (value, grads, diag), aux

        state, (value, grads, diag), aux = mean_over_parts(
            averaged, state, parts, unroll=unroll
        )
        return ((value, aux) if has_aux else value), grads, diag, state

    def value_and_grad_fn(
        params: optax.Params,
        *batch: Any,
        state: optax.OptState = None,
        refresh: bool | None = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.Updates, Curvature]:
        check_params(params)
        check_spelling(extra_args, ("state", "refresh", "output_loss"))
        if refresh is not None:
            check_flag("refresh", refresh)
        inner = find_states(state)
        curved = masked_in_all(params, [s.nu for s in inner])
        initial = jax.eval_shape(estimator.init, curved)
        for other in inner:
            check_same_estimator("curvature", initial, other.estimator_state)
        due = [s.refresh_due for s in inner if s.refresh_due is not None]
        refreshed = None
        if refresh is None and len(due) < len(inner):
            refresh = True
            refreshed = jnp.array(True) if due else None
        elif refresh is None:
            refreshed = jnp.any(jnp.stack(due))

        def fresh(estimator_state: Any) -> tuple[Any, ...]:
            one = partial(with_estimate_on_part, params, curved)
            return over_parts(one, batch, estimator_state, extra_args)

        def kept(estimator_state: Any) -> tuple[Any, ...]:
            def one(batch: Batch, state: Any, extra_args: Any) -> tuple[Any, ...]:
                return *plain(params, batch), (), state

            value, grads, _, _ = over_parts(one, batch, (), {})
            return value, grads, jax.tree.map(jnp.zeros_like, curved), estimator_state

        estimator_state = inner[0].estimator_state
        if refresh is None:
            value, grads, diag, estimator_state = jax.lax.cond(
                refreshed, fresh, kept, estimator_state
            )
        else:
            value, grads, diag, estimator_state = (fresh if refresh else kept)(
                estimator_state
            )
        return (
            value,
            grads,
            Curvature(
                hessian_diag=None if refresh is False else diag,
                estimator_state=estimator_state,
                count=inner[0].count,
                refreshed=refreshed,
            ),
        )

    return value_and_grad_fn


Batch = tuple[Any, ...]


def _batch_size(batch: Batch, part: int | None) -> int:
    sizes = {jnp.shape(x)[0] for x in jax.tree.leaves(batch) if jnp.ndim(x)}
    if part is not None and (len(sizes) != 1 or min(sizes) < part):
        raise ValueError(
            f"curvature_batch={part} needs arrays of at least {part} examples, all of"
            " the same number along their first axis, got"
            f" {[jnp.shape(x) for x in jax.tree.leaves(batch)]}."
        )
    return max(sizes, default=0)
