# SPDX-License-Identifier: Apache-2.0
"""What a loss of a network's outputs is: the number, and its curvature there."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src import checks
from adahessian_jax._src.axes import AxisName, sum_over_axis
from adahessian_jax._src.curvature_at import CurvatureAt, masked
from adahessian_jax._src.dtypes import is_differentiable, wide
from adahessian_jax._src.labels import checked_labels
from adahessian_jax._src.meshes import replicated_beside
from adahessian_jax._src.xla import is_traced


@dataclasses.dataclass(frozen=True)
class Loss:
    r"""The mean or sum of the losses of rows of outputs, and its curvature.

    The last ``event_ndim`` axes of the outputs make up a row, whose losses are added
    up; ``reduction`` says what is done with those of the rows,

    .. math::
      L = \sum_r w_r \ell(f_r, y_r) \Big/ \sum_r w_r \ \text{(\texttt{"mean"})}
      \quad \text{or} \quad L = \sum_r w_r \ell(f_r, y_r) \ \text{(\texttt{"sum"})}

    with weights w of 1, or those that ``where`` gives.

    Attributes:
      name: what it is called in messages.
      kind: what a label is for, ``"classes"``, a row of logits; ``"row"``; or
        ``"element"`` of the outputs.
      losses: ``(outputs, labels)`` to the losses, before any sum.
      factor: ``(outputs, signs, labels)`` to S times the signs.
      product: ``(outputs, v, labels)`` to the Hessian times v.
      needs_labels: whether the curvature depends on the labels.
      event_ndim: how many trailing axes make up a row.
      reduction: ``"mean"`` or ``"sum"``.
    """

    name: str
    kind: str
    losses: Callable[..., Array]
    factor: Callable[[Array, Array, Any], Array]
    product: Callable[[Array, Array, Any], Array]
    needs_labels: bool = False
    event_ndim: int = 0
    reduction: str = "mean"

    def __repr__(self) -> str:
        """Return the call that makes it."""
        default = int(self.kind != "element")
        options = [f"event_ndim={self.event_ndim}"] * (self.event_ndim != default)
        options += [f"reduction={self.reduction!r}"] * (self.reduction != "mean")
        replaced = f".replace({', '.join(options)})" if options else ""
        return f"losses.{self.name}{replaced}"

    def replace(
        self, *, reduction: str | None = None, event_ndim: int | None = None
    ) -> "Loss":
        """Return this loss with another reduction, or rows of more axes.

        Args:
          reduction: ``"mean"`` over rows, or ``"sum"``.
          event_ndim: how many trailing axes of the outputs make up a row, whose losses
            are added up: 1 for the sum over pixels and the mean over images.

        Returns:
          The new loss.

        Raises:
          ValueError: if an argument is out of range.
          TypeError: if ``event_ndim`` is not an int.

        Examples:
          >>> import adahessian_jax as ah
          >>> ah.losses.squared_error.replace(reduction="sum")
          losses.squared_error.replace(reduction='sum')
        """
        reduction = self.reduction if reduction is None else reduction
        event_ndim = self.event_ndim if event_ndim is None else event_ndim
        checks.check_choice("reduction", reduction, ("mean", "sum"))
        checks.check_int("event_ndim", event_ndim, int(self.kind != "element"))
        return dataclasses.replace(self, reduction=reduction, event_ndim=event_ndim)

    def __call__(
        self, outputs: ArrayLike, labels: Any = None, *, where: ArrayLike | None = None
    ) -> Array:
        """Return the loss of a batch.

        Args:
          outputs: of the network, any shape.
          labels: of the shape of ``outputs``. For softmax cross-entropy integers of the
            shape of all axes but the last, or a distribution over the classes, for
            example from ``optax.smooth_labels``.
          where: a mask, or weights that are not negative, of the shape of the leading
            axes of the rows. Rows without weight may hold anything.

        Returns:
          The scalar loss, in float32 or wider.

        Raises:
          ValueError: if shapes do not fit.
          TypeError: if the outputs are not floating point.
        """
        return self.part(checks.one_array("outputs", outputs), labels, where)

    def part(
        self, outputs: Array, labels: Any, where: Any = None, axis_name: AxisName = None
    ) -> Array:
        """Return what a device adds to the loss of a batch that is split over some."""
        weights = self.row_weights(outputs, where, axis_name)
        labels = checked_labels(self, outputs, labels, weights)
        losses = self.losses(masked(wide(outputs), weights), labels)
        losses = losses.reshape(*losses.shape, *[1] * (outputs.ndim - losses.ndim))
        return jnp.sum(masked(losses, weights) * weights)

    def row_weights(
        self, outputs: Array, where: Any = None, axis_name: AxisName = None
    ) -> Array:
        """Return the weight of each row in the loss, with as many axes as ``outputs``.

        For a mean they are divided by their sum, over the devices of ``axis_name``.
        """
        if not is_differentiable(outputs):
            raise TypeError(
                f"outputs must be floating point, got {outputs.dtype}. If this was a"
                " call by optax.inject_hyperparams: pass static_args=('loss',)."
            )
        unfit = f"outputs of shape {outputs.shape} do not fit {self!r}"
        if outputs.ndim < self.event_ndim:
            raise ValueError(
                f"{unfit}, which takes rows along the last {self.event_ndim} axes."
            )
        if self.kind == "classes" and outputs.shape[-1] == 1:
            raise ValueError(
                f"{unfit}: softmax over one class has no curvature. The classes must"
                " lie along the last axis; for one logit per row use"
                " losses.sigmoid_binary_cross_entropy."
            )
        rows = outputs.shape[: outputs.ndim - self.event_ndim]
        weights = jnp.ones(()) if where is None else jnp.asarray(where)
        if weights.shape != rows[: weights.ndim]:
            raise ValueError(
                f"where of shape {weights.shape} does not match outputs of shape"
                f" {outputs.shape}: it must have the shape of the leading axes of the"
                f" rows, {rows}."
            )
        weights = weights.astype(wide(outputs).dtype)
        checks.raise_if(jnp.any(weights < 0), "where must not be negative, got some.")
        weights = weights.reshape(*weights.shape, *[1] * (outputs.ndim - weights.ndim))
        if self.reduction == "sum":
            return weights
        total = sum_over_axis(self._total(outputs, weights), axis_name)
        return weights / jnp.where(total > 0, total, 1)

    def total_weight(self, outputs: Array, where: Any = None) -> Array:
        """Return the sum of the weights of all rows, shape (): 1s, or ``where``."""
        weights = self.replace(reduction="sum").row_weights(outputs, where)
        return self._total(outputs, weights)

    def _total(self, outputs: Array, weights: Array) -> Array:
        rows = outputs.shape[: outputs.ndim - self.event_ndim]
        return jnp.sum(weights) * (math.prod(rows) / max(weights.size, 1))

    def check(
        self,
        loss_fn: Callable[[Array], Array],
        outputs: Array,
        labels: Any = None,
        *,
        where: ArrayLike | None = None,
        rtol: float = 1e-3,
    ) -> None:
        """Check that this is the curvature of a loss function of your own.

        Compares their Hessians in the outputs on one random vector. Call it once,
        outside ``jit``, on the outputs of a real batch.

        Args:
          loss_fn: your loss of the batch, from outputs to a scalar.
          outputs: of the network.
          labels: for a loss whose curvature depends on them.
          where: as when called.
          rtol: the relative difference that passes.

        Raises:
          TypeError: if an argument is of the wrong type.
          ValueError: if the two differ, the message says whether by a factor; or if
            there is no finite curvature to compare.

        Examples:
          >>> import jax.numpy as jnp
          >>> import adahessian_jax as ah
          >>> f, y = jnp.ones((4, 2)), jnp.zeros((4, 2))
          >>> ah.losses.l2_loss.check(lambda f: jnp.mean((f - y) ** 2) / 2, f)
          >>> ah.losses.l2_loss.check(lambda f: jnp.sum((f - y) ** 2) / 2, f)
          Traceback (most recent call last):
            ...
          ValueError: loss_fn has 8 times the curvature of losses.l2_loss: correct \
the reduction, the weights or the loss.
        """
        checks.check_float("rtol", rtol, 0.0)
        checks.check_callable("loss_fn", loss_fn, "outputs -> loss")
        checks.require(
            not is_traced(outputs),
            ValueError,
            "outputs",
            "known numbers: call check outside jax.jit, on a real batch",
            outputs,
        )
        # In half precision Hessians differ by more than rtol from themselves.
        outputs = wide(checks.one_array("outputs", outputs))
        outputs = replicated_beside(outputs, outputs)
        here = self.at(outputs, labels, where)
        normal = np.random.default_rng(0).normal(size=outputs.shape)
        v = jnp.asarray(normal, outputs.dtype)
        gradient = jax.grad(checks.objective("loss_fn", loss_fn), has_aux=True)
        true = jax.vjp(gradient, outputs, has_aux=True)[1](v)[0]
        assumed = here.times(here.seen(v))
        size = float(jnp.vdot(assumed, assumed))
        factor = float(jnp.vdot(assumed, true)) / size if size else math.nan
        if not math.isfinite(factor):
            raise ValueError(
                f"{self!r} or loss_fn has no finite curvature at these outputs, so that"
                " there is nothing to compare: pass the outputs of a network before"
                " training, with rows that have weight."
            )
        if jnp.linalg.norm(true - factor * assumed) > rtol * jnp.linalg.norm(true):
            raise ValueError(
                f"loss_fn has another curvature than {self!r}, not even a multiple."
            )
        if not abs(factor - 1) <= rtol:
            raise ValueError(
                f"loss_fn has {factor:.6g} times the curvature of {self!r}: correct the"
                " reduction, the weights or the loss."
            )

    def at(
        self, outputs: Array, labels: Any, where: Any = None, axis_name: AxisName = None
    ) -> CurvatureAt:
        """Return the curvature at some outputs; raise if it needs labels and got none.

        ``axis_name`` is that of devices over which a mean is taken.
        """
        if self.needs_labels and labels is None:
            raise ValueError(
                f"The curvature of {self!r} depends on the labels and got none: pass"
                " labels=y, beside predict_fn to tx.update, or to what"
                " value_and_grad_with_curvature made."
            )
        weights = self.row_weights(outputs, where, axis_name)
        if self.needs_labels:
            labels = checked_labels(self, outputs, labels, weights)
        else:
            labels = None
        outputs = masked(wide(outputs), weights)
        nan = jnp.any(jnp.isnan(outputs))
        checks.raise_if(nan, "The network returned outputs that are NaN.")
        return CurvatureAt(
            outputs,
            weights,
            factor=lambda signs: self.factor(outputs, signs, labels),
            product=lambda v: self.product(outputs, v, labels),
        )


def check_loss(loss: Any) -> None:
    """Raise TypeError unless an argument is a loss object."""
    if not isinstance(loss, Loss):
        raise TypeError(
            "loss must be one of adahessian_jax.losses, such as"
            " losses.softmax_cross_entropy, or losses.of_row(f) or of_element(f) for a"
            f" function of your own, got {loss!r}."
        )
