# SPDX-License-Identifier: Apache-2.0
"""What an estimator of curvature is, and what it hands to the optimizer."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.axes import AxisName
from adahessian_jax.dtypes import is_differentiable


class CurvatureEstimator(optax.GradientTransformationExtraArgs):
    """An estimator that can share its pass over the network with the gradient.

    It is an ``optax.GradientTransformationExtraArgs`` whose ``update`` returns the
    Hessian's diagonal in place of the updates; any such transformation is accepted
    where this library takes an estimator. This one has four more attributes.

    Attributes:
      value_and_grad: ``(loss_fn, state, params, *, has_aux, **extra_args)`` to
        ``(value, grads, diag, state)``, as ``jax.value_and_grad(loss_fn, has_aux)``
        and ``update`` together, from one pass.
      needs_outputs: whether ``loss_fn`` returns ``(loss, outputs)`` in place of the
        loss.
      axis_name: the axis of devices over which estimates, but not gradients, are
        averaged.
      factor: the estimator, of this kind, whose estimate's square this one's is: a
        vector g for which the mean of its outer product with itself is the curvature,
        off the diagonal too. None where there is none.
    """

    value_and_grad: Callable[..., tuple[Any, optax.Updates, optax.Updates, Any]]
    needs_outputs: bool
    axis_name: AxisName
    factor: "CurvatureEstimator | None"

    def __new__(
        cls,
        init: Callable[..., Any],
        update: Callable[..., Any],
        value_and_grad: Callable[..., Any],
        needs_outputs: bool = False,
        axis_name: AxisName = None,
        factor: "CurvatureEstimator | None" = None,
    ) -> "CurvatureEstimator":
        """Make an estimator of its functions."""
        self = super().__new__(cls, init, update)
        self.value_and_grad = value_and_grad
        self.needs_outputs = needs_outputs
        self.axis_name = axis_name
        self.factor = factor
        return self


class Curvature(NamedTuple):
    """An estimate, or word that there is none, on its way to the optimizer.

    Attributes:
      hessian_diag: the estimate, None where none was made.
      estimator_state: the estimator's state after it.
      count: the optimizer's count when it was made, shape (), int32.
      refreshed: whether ``hessian_diag`` is an estimate, bool of shape (), if that was
        decided while running.
    """

    hessian_diag: optax.Updates | None
    estimator_state: Any
    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    refreshed: jax.Array | None


def as_estimator(estimator: Any) -> optax.GradientTransformationExtraArgs:
    """Check that something is a transformation; let it take extra arguments."""
    if not isinstance(estimator, optax.GradientTransformation):
        raise TypeError(
            "estimator must be an optax.GradientTransformation, as hutchinson()"
            f" returns, got {estimator!r}."
        )
    return optax.with_extra_args_support(estimator)


def check_same_estimator(name: str, state: Any, expected: Any) -> None:
    """Raise ValueError unless two states are those of estimators of the same kind."""
    # A key may be typed in one and raw in the other.
    shapes, expected_shapes = (
        [jnp.shape(x) for x in jax.tree.leaves(s) if is_differentiable(x)]
        for s in (state, expected)
    )
    structure: Any = jax.tree.structure(state)
    expected_structure: Any = jax.tree.structure(expected)
    if structure != expected_structure or shapes != expected_shapes:
        raise ValueError(
            f"{name} comes from another estimator than the optimizer's: its state is"
            f" {structure} with arrays of shapes {shapes}, the optimizer's"
            f" {expected_structure} with {expected_shapes}. Give both the same"
            " estimator."
        )
