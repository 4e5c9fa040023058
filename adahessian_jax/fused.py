# SPDX-License-Identifier: Apache-2.0
"""Value, gradient and curvature of a loss from one pass over the network."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import checks, curvature_state, estimator, masking
from adahessian_jax._src.axes import as_varying
from adahessian_jax._src.derivatives import value_and_grad
from adahessian_jax._src.dtypes import map_floats, wide
from adahessian_jax._src.estimator import Curvature, Estimator
from adahessian_jax._src.microbatches import over_parts, reduction_of
from adahessian_jax._src.xla import cond, is_traced


def value_and_grad_with_curvature(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    microbatches: int = 1,
    reduction: str | None = None,
    unroll: bool = False,
) -> Callable[..., tuple[Any, optax.Updates, Curvature]]:
    r"""Make a function like ``jax.value_and_grad`` that also estimates the curvature.

    Gradient and Hessian-vector product share most of their work, which
    ``tx.update(..., obj_fn=...)`` leaves to the compiler to find out. Here it is one
    pass: ``jax.jvp`` of ``jax.value_and_grad`` for Hutchinson's estimator, and one
    forward pass with two pullbacks for Gauss-Newton.

    Args:
      loss_fn: ``(params, *batch)`` to the loss, or to ``(loss, aux)`` with ``has_aux``.
        For :func:`adahessian_jax.newton`, :func:`adahessian_jax.gauss_newton` and
        :func:`adahessian_jax.gauss_newton_control` it returns ``(loss, outputs)`` in
        place of the loss, or ``(loss, (outputs, where))``.
      tx: the optimizer, in a chain or wrapper or not, or its estimator alone.
      has_aux: whether ``loss_fn`` also returns auxiliary values (batch statistics).
      microbatches: deal the rows of each array of the batch out to so many parts, which
        pass through the network one after the other, and average: accumulation of
        gradients, in the memory of one part. Each part has probes of its own, for a
        less noisy estimate at no cost. Scalars, typed keys among them, go to every
        part; of as many keys as parts, each gets one; an array that has no rows, such
        as frozen weights, must not be one of the batch's, but in ``loss_fn``. Auxiliary
        values have a new first axis, of parts.
      reduction: ``"mean"`` or ``"sum"``, how the loss of a batch follows from those of
        its parts, if the estimator has no loss object that says it.
      unroll: compile the parts one after the other in place of a loop. Convolutions
        inside a loop are an order of magnitude slower on CPU.

    Returns:
      A function ``(params, *batch, state, refresh=None, labels=None, where=None)`` to
      ``(value, grads, curvature)``. ``value`` and ``grads`` are as from
      ``jax.value_and_grad``, of a device's own part of the batch if the estimator has
      an ``axis_name``. ``curvature`` is for ``tx.update(grads, state, params,
      curvature=curvature)``; of the parameters that ``optax.masked`` or
      ``optax.partition`` give to the optimizer, where several groups share it.

      ``state`` is the optimizer's. ``labels`` are for a curvature that depends on them.
      ``where`` are weights of rows in the estimate, and by which parts enter a mean,
      unless ``loss_fn`` returns them; what ``loss_fn`` returns as the loss is weighted
      by itself. ``refresh`` says whether to estimate: True and False compile one of two
      programs, the fast way for convolutional networks on CPU; None follows the
      optimizer's ``update_interval``, inside a ``jax.lax.cond`` if that is above 1.

    Raises:
      ValueError: if ``microbatches`` < 1, or ``reduction`` is unknown or not that of
        the estimator's loss; at the call, if ``params`` or ``state`` is missing, the
        optimizer has no curvature, or an array of the batch cannot be cut equally.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> def loss_fn(w, x, y): return jnp.mean((x @ w - y) ** 2)
      >>> tx = ah.adahessian(0.1, update_interval=10)
      >>> value_and_grad = ah.value_and_grad_with_curvature(loss_fn, tx)
      >>> w, x, y = jnp.zeros(2), jnp.eye(2), jnp.ones(2)
      >>> state = tx.init(w)
      >>> loss, grads, curvature = value_and_grad(w, x, y, state=state)
      >>> updates, state = tx.update(grads, state, w, curvature=curvature)

    .. note::
      Dropout is right if ``loss_fn`` takes its key from the batch: one call uses one
      mask for value, gradient and curvature.
    """
    checks.check_callable("loss_fn", loss_fn, "(params, *batch) -> loss")
    if not (hasattr(tx, "init") and hasattr(tx, "update")):  # optax.MultiSteps has them
        raise TypeError(
            "tx must be the optimizer, an optax.GradientTransformation, or its"
            f" estimator, got {tx!r}."
        )
    checks.check_flag("has_aux", has_aux)
    checks.check_int("microbatches", microbatches, 1)
    checks.check_flag("unroll", unroll)
    if reduction is not None:
        checks.check_choice("reduction", reduction, ("mean", "sum"))

    def value_and_grad_fn(
        params: optax.Params,
        *batch: Any,
        state: optax.OptState = None,
        refresh: bool | None = None,
        labels: Any = None,
        where: Any = None,
        **arguments: Any,
    ) -> tuple[Any, optax.Updates, Curvature]:
        """Return value, gradient and curvature of a batch."""
        checks.check_params(params)
        checks.check_real("params", params)
        checks.check_spelling(arguments, ("state", "refresh", "labels", "where"))
        if unknown := ", ".join(arguments):
            raise TypeError(
                f"unexpected argument {unknown}: loss_fn gets the parameters and the"
                " batch, and a call takes state, refresh, labels and where beside them."
                " What else loss_fn takes is given to it before, by functools.partial"
                " for example."
            )
        _check_own(loss_fn, (params, *batch), {"labels": labels, "where": where})
        if refresh is not None:
            checks.check_flag("refresh", refresh)
        states = curvature_state.find_states(state)
        curved = masking.masked_in_all(params, [s.nu for s in states])
        averages = estimator.find_averages(tx, params)
        shared = _find_estimator(tx, averages, curved, states)
        extra_args: dict[str, Any] = {}
        if len(averages) == 1 and not is_traced(averages[0].b2):
            extra_args |= averages[0].handed_on(states[0])
        one = _Pass(loss_fn, has_aux, shared, params, curved, extra_args)
        in_parts = functools.partial(
            over_parts,
            data={"batch": batch, "labels": labels, "where": where},
            microbatches=microbatches,
            reduction=reduction_of(reduction, shared.loss),
            unroll=unroll,
            axis_name=shared.axis_name,
        )

        def fresh(estimator_state: Any) -> Any:
            return in_parts(one.with_estimate, estimator_state)

        def kept(estimator_state: Any) -> Any:
            (value, grads, _), aux, _ = in_parts(one.plain, ())
            zeros = map_floats(wide, jax.tree.map(jnp.zeros_like, curved))
            return (value, grads, zeros), aux, estimator_state

        due, refreshed = _refresh_due(states) if refresh is None else (refresh, None)
        (value, grads, diag), aux, estimator_state = cond(
            due, fresh, kept, states[0].estimator_state
        )
        estimate = None if refresh is False else diag
        curvature = Curvature(estimate, estimator_state, states[0].count, refreshed)
        return (value, aux) if has_aux else value, grads, curvature

    return value_and_grad_fn


@dataclasses.dataclass(frozen=True, eq=False)
class _Pass:
    """A pass over the network with its estimator, at some parameters.

    Its functions take the estimator's state, and the data or a part of them, and return
    ``(loss, gradient, diagonal)``, auxiliary values, the new state, and the weight that
    this part has in a mean. Of all ``params`` those whose curvature is not wanted are
    masked in ``curved``.
    """

    loss_fn: Callable[..., Any]
    has_aux: bool
    estimator: Estimator
    params: optax.Params
    curved: optax.Params
    extra_args: dict[str, Any]

    def plain(self, state: Any, data: dict[str, Any]) -> tuple[Any, Any, Any, Any]:
        """Estimate nothing."""
        axis = self.estimator.axis_name

        def objective(params: optax.Params) -> tuple[Array, Any]:
            out, rest = self._evaluate(params, data)
            value = out if self.estimator.loss is None else out[0]
            return as_varying(value, axis), (value, *rest)

        params = as_varying(self.params, axis)
        (_, (value, aux, weight)), grads = value_and_grad(objective, params)
        return (value, grads, ()), aux, state, weight

    def with_estimate(
        self, state: Any, data: dict[str, Any]
    ) -> tuple[Any, Any, Any, Any]:
        """Estimate the diagonal, in the same pass where all parameters are curved."""

        def objective(curved: optax.Params) -> tuple[Any, Any]:
            return self._evaluate(masking.fill_masked(curved, self.params), data)

        extra_args = self.extra_args
        if data["labels"] is not None:
            extra_args = {**extra_args, "labels": data["labels"]}
        (value, (aux, weight)), grads, diag, state = self.estimator.value_and_grad(
            objective, state, self.curved, **extra_args
        )
        if masking.has_masked(self.curved):
            (value, grads, _), aux, _, weight = self.plain((), data)
        return (value, grads, diag), aux, state, weight

    def _evaluate(self, params: optax.Params, data: dict[str, Any]) -> tuple[Any, Any]:
        """Return what ``loss_fn`` does, beside auxiliary values and a weight."""
        out, aux, where = self.loss_fn(params, *data["batch"]), None, data["where"]
        if self.has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    "loss_fn must return a pair (loss, aux) with has_aux=True, got"
                    f" {jax.tree.map(jnp.shape, out)}."
                )
            out, aux = out
        if self.estimator.loss is None:
            checks.check_scalar("loss_fn", out)
        elif isinstance(out, tuple) and isinstance(out[-1], tuple):
            where = out[-1][-1]
        elif isinstance(out, tuple) and where is not None:
            out = *out[:-1], (out[-1], where)
        weight = 1.0 if where is None else jnp.sum(jnp.asarray(where), dtype=float)
        return out, (aux, weight)


def _check_own(loss_fn: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    """Raise if ``loss_fn`` would miss an argument that the estimate alone is given."""
    try:
        signature = inspect.signature(loss_fn)
        taken = signature.bind_partial(*args).arguments
    except (TypeError, ValueError):  # of no signature, or one that fails when called
        return
    for name, value in given.items():
        if value is not None and name in signature.parameters and name not in taken:
            raise TypeError(
                f"{name} is an argument of loss_fn and was given by name, which reaches"
                " the estimate alone: pass it to loss_fn by position, in the batch."
            )


def _refresh_due(states: list[Any]) -> tuple[Any, Array | None]:
    """Return whether an estimate is due for any group, and that as an array."""
    due = [s.refresh_due for s in states if s.refresh_due is not None]
    if len(due) < len(states):
        return True, jnp.array(True) if due else None
    refreshed = jnp.any(jnp.stack(due))
    return refreshed, refreshed


def _find_estimator(
    tx: optax.GradientTransformation,
    averages: list[Any],
    curved: optax.Params,
    states: list[curvature_state.CurvatureState],
) -> Estimator:
    """Return an optimizer's one estimator, or what was given if it is one."""
    found = [average.estimator.update for average in averages]
    first, *others = found or [tx.update]
    if not found and not isinstance(first, Estimator):
        raise ValueError(curvature_state.no_curvature("tx", "transformation"))
    if not isinstance(first, Estimator):
        raise ValueError(
            "The estimator of tx shares no pass with the gradient: pass obj_fn to"
            " tx.update, or use one of adahessian_jax, such as ah.hutchinson()."
        )
    if not all(estimator.are_alike(first, other) for other in others):
        raise ValueError(
            f"tx has {len(found)} estimators that differ, and one pass makes one"
            " estimate. Give all groups of parameters the same, estimator ="
            " ah.hutchinson() for example, or pass obj_fn and predict_fn to tx.update."
        )
    initial = jax.eval_shape(first.init, curved)
    expected: Any = jax.tree.structure([s.estimator_state for s in states])
    if len(states) > 1 and expected != jax.tree.structure([initial] * len(states)):
        raise ValueError(
            "tx has several groups of parameters, and its estimator a state for each of"
            " them. One pass serves hutchinson() without a control variate of its own"
            " state, and gauss_newton(); here pass obj_fn or predict_fn to tx.update."
        )
    for state in states:
        curvature_state.check_same_estimator(initial, state.estimator_state)
    return first
