# SPDX-License-Identifier: Apache-2.0
"""Value, gradient and curvature of a loss from one pass over the network."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.axes import as_varying, sum_over_axis
from adahessian_jax._src.curvature_average import CurvatureAverage
from adahessian_jax._src.curvature_state import (
    CurvatureState,
    find_states,
    no_curvature,
)
from adahessian_jax._src.derivatives import value_and_grad
from adahessian_jax._src.estimator import (
    Curvature,
    Estimator,
    are_alike,
    as_estimator,
    check_same_estimator,
    find_averages,
)
from adahessian_jax._src.masking import fill_masked, has_masked, masked_in_all
from adahessian_jax._src.microbatches import cut, over_parts
from adahessian_jax._src.xla import cond

Batch = tuple[Any, ...]


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

    Calling ``tx.update(..., obj_fn=...)`` leaves it to the compiler to find out that
    gradient and Hessian-vector product share most of their work. This function computes
    them in one pass: ``jax.jvp`` of ``jax.value_and_grad`` for Hutchinson's estimator,
    and one forward pass with two pullbacks for Gauss-Newton.

    Args:
      loss_fn: ``(params, *batch)`` to the loss, or to ``(loss, aux)`` with ``has_aux``.
        For :func:`adahessian_jax.newton`, :func:`adahessian_jax.gauss_newton` and
        :func:`adahessian_jax.gauss_newton_control` it returns ``(loss, outputs)`` in
        place of the loss, or ``(loss, (outputs, where))``.
      tx: the optimizer, in a chain or wrapper or not, or its estimator alone.
      has_aux: whether ``loss_fn`` returns auxiliary values, such as new batch
        statistics, as well.
      microbatches: deal the rows of each array of the batch out to so many parts, pass
        them through the network one after the other, and average: accumulation of
        gradients, in the memory of one part. Every part has probes of its own, which
        makes the estimate less noisy at no cost. Scalars, typed keys among them, go to
        every part; of as many keys as parts, each gets one. Auxiliary values have a new
        first axis, of parts.
      reduction: ``"mean"`` or ``"sum"``, by which the loss of a batch follows from
        those of its parts, if the estimator has no loss object that says it.
      unroll: compile the parts one after the other in place of a loop. Convolutions
        inside a loop are an order of magnitude slower on CPU.

    Returns:
      A function ``(params, *batch, state, refresh=None, labels=None, where=None)`` to
      ``(value, grads, curvature)``. ``value`` and ``grads`` are as from
      ``jax.value_and_grad``, those of a device's own part of the batch if the estimator
      has an ``axis_name``.
      ``curvature`` is for ``tx.update(grads, state, params, curvature=curvature)``; if
      ``optax.masked`` or ``optax.partition`` gives a part of the parameters to the
      optimizer, it is that of this part, and several groups of AdaHessian share it.
      ``state`` is the optimizer's. ``labels`` are for a curvature that depends on them,
      ``where`` are the weights of rows by which parts have theirs in a mean, where
      ``loss_fn`` does not return them. ``refresh`` says whether to estimate: True or
      False choose one of two programs as they are compiled, which is the fast way for
      convolutional networks on CPU, and None follows the optimizer's
      ``update_interval``, inside a ``jax.lax.cond`` if it is above 1.

    Raises:
      ValueError: if ``microbatches`` < 1 or ``reduction`` is unknown or another than
        that of the estimator's loss; at the call, if ``params`` or the optimizer's
        state is missing, the optimizer has no curvature, or an array of the batch
        cannot be cut into equal parts.
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
    if not isinstance(tx, optax.GradientTransformation):
        raise TypeError(
            "tx must be the optimizer, an optax.GradientTransformation, or its"
            f" estimator, got {tx!r}."
        )
    checks.check_flag("has_aux", has_aux)
    checks.check_int("microbatches", microbatches, 1)
    checks.check_flag("unroll", unroll)
    if reduction is not None:
        checks.check_choice("reduction", reduction, ("mean", "sum"))
    return _ValueAndGrad(loss_fn, tx, has_aux, microbatches, reduction, unroll)


@dataclasses.dataclass(frozen=True, eq=False)
class _ValueAndGrad:
    """The function with the arguments of :func:`value_and_grad_with_curvature`."""

    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    has_aux: bool
    microbatches: int
    reduction: str | None
    unroll: bool

    def __call__(
        self,
        params: optax.Params,
        *batch: Any,
        state: optax.OptState = None,
        refresh: bool | None = None,
        labels: Any = None,
        where: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.Updates, Curvature]:
        """Return value, gradient and curvature of a batch."""
        checks.check_params(params)
        checks.check_spelling(extra_args, ("state", "refresh", "labels", "where"))
        if refresh is not None:
            checks.check_flag("refresh", refresh)
        states = find_states(state)
        if not states:
            raise ValueError(no_curvature("state", type(state).__name__))
        curved = masked_in_all(params, [s.nu for s in states])
        averages = find_averages(self.tx, params)
        estimator = _find_estimator(self.tx, averages, curved, states)
        if len(averages) == 1:
            extra_args |= averages[0].handed_on(states[0])
        one = _Pass(self, estimator, params, curved, extra_args)
        data = {"batch": batch, "labels": labels, "where": where}

        def fresh(estimator_state: Any) -> tuple[Any, ...]:
            return one.over_parts(data, estimator_state, estimate=True)

        def kept(estimator_state: Any) -> tuple[Any, ...]:
            value, grads, _, _ = one.over_parts(data, (), estimate=False)
            return value, grads, jax.tree.map(jnp.zeros_like, curved), estimator_state

        decided = refresh is not None
        refresh, refreshed = _refresh(states) if refresh is None else (refresh, None)
        value, grads, diag, estimator_state = cond(
            refresh, fresh, kept, states[0].estimator_state
        )
        return (
            value if self.has_aux else value[0],
            grads,
            Curvature(
                estimate=None if decided and not refresh else diag,
                estimator_state=estimator_state,
                count=states[0].count,
                refreshed=refreshed,
            ),
        )


@dataclasses.dataclass(frozen=True, eq=False)
class _Pass:
    """A pass over the network with its estimator, at some parameters.

    Attributes:
      of: what was asked for.
      estimator: the optimizer's.
      params: all parameters.
      curved: those whose curvature is wanted, others masked.
      extra_args: for the estimator.
    """

    of: _ValueAndGrad
    estimator: optax.GradientTransformationExtraArgs
    params: optax.Params
    curved: optax.Params
    extra_args: dict[str, Any]

    def over_parts(
        self, data: dict[str, Any], state: Any, *, estimate: bool
    ) -> tuple[Any, optax.Updates, optax.Updates, Any]:
        """Return ``(loss, aux)``, gradient, diagonal and the estimator's state."""
        one = self.with_estimate if estimate else self.plain
        if self.of.microbatches == 1:
            (value, aux, _), grads, diag, state = one(data, state)
            return (value, aux), grads, diag, state
        parts, join = cut(data, self.of.microbatches)

        def part(state: Any, part: list[Any]) -> tuple[Any, Any, Any, Any]:
            (value, aux, weight), grads, diag, state = one(join(part), state)
            # Value and gradient are a device's own, and the estimate is of all.
            axis_name = getattr(self.estimator.update, "axis_name", None)
            weights = weight, weight, sum_over_axis(weight, axis_name)
            return state, (value, grads, diag), aux, weights

        state, (value, grads, diag), aux = over_parts(
            part, state, parts, reduction=self._reduction(), unroll=self.of.unroll
        )
        return (value, aux), grads, diag, state

    def plain(self, data: dict[str, Any], state: Any) -> tuple[Any, Any, Any, Any]:
        """Return ``(loss, aux, weight)``, gradient, and nothing for the estimate."""

        def objective(params: optax.Params) -> tuple[Array, Any]:
            out, aux_and_weight = self._evaluate(params, data)
            return out if self._loss is None else out[0], aux_and_weight

        axis_name = getattr(self.estimator.update, "axis_name", None)
        params = as_varying(self.params, axis_name)
        (value, aux), grads = value_and_grad(objective, params)
        return (value, *aux), grads, (), state

    def with_estimate(
        self, data: dict[str, Any], state: Any
    ) -> tuple[Any, optax.Updates, optax.Updates, Any]:
        """Return ``(loss, aux, weight)``, gradient, diagonal and state."""

        def objective(curved: optax.Params) -> tuple[Any, Any]:
            return self._evaluate(fill_masked(curved, self.params), data)

        extra_args = self.extra_args
        if data["labels"] is not None:
            extra_args = {**extra_args, "labels": data["labels"]}
        if isinstance(self.estimator.update, Estimator):
            (value, aux), grads, diag, state = self.estimator.update.value_and_grad(
                objective, state, self.curved, **extra_args
            )
            if not has_masked(self.curved):
                return (value, *aux), grads, diag, state
        value, grads, _, _ = self.plain(data, ())  # the gradient in all parameters
        if not isinstance(self.estimator.update, Estimator):
            extra_args = {"obj_fn": lambda p: objective(p)[0], **extra_args}
            diag, state = self.estimator.update(grads, state, self.curved, **extra_args)
        return value, grads, diag, state

    @property
    def _loss(self) -> Any:
        return getattr(self.estimator.update, "loss", None)

    def _reduction(self) -> str:
        given, loss = self.of.reduction, self._loss
        if loss is None:
            return given or "mean"
        if given is not None and given != loss.reduction:
            raise ValueError(
                f"reduction={given!r} contradicts {loss!r}: it is said on the loss, as"
                f" loss.replace(reduction={given!r})."
            )
        return str(loss.reduction)

    def _evaluate(self, params: optax.Params, data: dict[str, Any]) -> tuple[Any, Any]:
        """Return what ``loss_fn`` does, beside auxiliary values and a weight."""
        out, aux = self.of.loss_fn(params, *data["batch"]), None
        if self.of.has_aux:
            if not (isinstance(out, tuple) and len(out) == 2):
                raise TypeError(
                    "loss_fn must return a pair (loss, aux) with has_aux=True, got"
                    f" {jax.tree.map(jnp.shape, out)}."
                )
            out, aux = out
        where = data["where"]
        if self._loss is None:
            checks.check_scalar("loss_fn", out)
        elif isinstance(out, tuple) and isinstance(out[-1], tuple):
            where = out[-1][-1]
        weight = 1.0 if where is None else jnp.sum(jnp.asarray(where), dtype=float)
        return out, (aux, weight)


def _refresh(states: list[CurvatureState]) -> tuple[Any, Array | None]:
    """Return whether an estimate is due for any group, and that as an array."""
    due = [s.refresh_due for s in states if s.refresh_due is not None]
    if len(due) < len(states):
        return True, jnp.array(True) if due else None
    refreshed = jnp.any(jnp.stack(due))
    return refreshed, refreshed


def _find_estimator(
    tx: optax.GradientTransformation,
    averages: list[CurvatureAverage],
    curved: optax.Params,
    states: list[CurvatureState],
) -> optax.GradientTransformationExtraArgs:
    """Return an optimizer's one estimator, or what was given if it is one."""
    is_estimator = isinstance(tx.update, Estimator)
    found = [tx] if is_estimator else [average.estimator for average in averages]
    first = as_estimator(found[0] if found else tx)
    if not all(are_alike(first, other) for other in found[1:]):
        raise ValueError(
            f"tx has {len(found)} estimators that differ, and one pass makes one"
            " estimate. Give all groups of parameters the same, estimator ="
            " ah.hutchinson() for example, or pass the one that is meant in place of"
            " tx."
        )
    initial = jax.eval_shape(first.init, curved)
    structure: Any = jax.tree.structure(initial)
    if not found and structure != jax.tree.structure(states[0].estimator_state):
        raise ValueError(no_curvature("tx", "transformation"))
    for state in states:
        check_same_estimator("curvature", initial, state.estimator_state)
    return first
