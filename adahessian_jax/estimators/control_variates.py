# SPDX-License-Identifier: Apache-2.0
"""Control variates for Hutchinson's estimator: what is known of the Hessian."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.axes import AxisName, axis_size
from adahessian_jax._src.checks import check_flag
from adahessian_jax._src.dtypes import map_floats, wide
from adahessian_jax._src.linearized import gauss_newton_part, linearize
from adahessian_jax._src.loss import Loss, check_loss
from adahessian_jax._src.moving_average import as_dtype, debias

Product = Callable[..., optax.Updates]


class ControlVariate(NamedTuple):
    """How one sample of Hutchinson's estimator is drawn, given what is known of H.

    Attributes:
      init: maps parameters to the initial state.
      correct: ``(state, probes, product, *, params, key, axis_name, **extra_args)`` to
        the estimate of the diagonal and the new state. ``product()`` is the objective's
        Hessian times the probes, and ``product(fun)`` that of ``fun``, from parameters
        to ``(scalar, value)`` with the objective's gradient and value; ``axis_name`` is
        the estimator's and ``extra_args`` are those of its ``update``.
      name: with what of its arguments changes the estimate's mean.
      loss: the loss whose outputs it needs beside it, or None. The function that
        returns both, ``loss_fn``, is then among ``extra_args``, in the fused path.
    """

    init: Callable[[optax.Params], Any]
    correct: Callable[..., tuple[optax.Updates, Any]]
    name: str
    loss: Loss | None = None


def multiply(probes: optax.Updates, products: optax.Updates) -> optax.Updates:
    """Multiply elementwise the floating-point leaves; the others stay zero."""
    return map_floats(lambda y, z: wide(z) * wide(y), products, probes)


def ema_control(*, unbiased: bool = True) -> ControlVariate:
    r"""Use the optimizer's moving average of the Hessian as control variate.

    With a probe :math:`z` and the average :math:`c`,

    .. math::
      d = z \odot (H z - c \odot z) + c

    has the mean diag H whatever :math:`c` is. **It does no more than plain Hutchinson
    with Rademacher probes**: there :math:`z \odot (c \odot z) = c` exactly. With
    Gaussian probes, whose variance is :math:`\sum_{j \neq i} H_{ij}^2 + 2 H_{ii}^2`, it
    turns the second term into :math:`2 (H_{ii} - c_i)^2`, and so at best ties with
    Rademacher probes. It is here so that the published variant can be run.

    Args:
      unbiased: add the mean back. False is the formula published with the variant of
        AdaHessian that averages the Hessian itself: no last term, and :math:`c` is the
        decay rate times the average, not corrected for its start from zero. That then
        obeys :math:`v \leftarrow b_2^2 v + (1 - b_2)\, z \odot H z`, the plain average
        of decay :math:`b_2^2`, divided by :math:`1 + b_2`.

    Returns:
      A control variate for :func:`adahessian_jax.hutchinson`. It has no state and
      needs an optimizer with ``hessian_ema="mean"``.

    Raises:
      TypeError: if ``unbiased`` is not a bool.
      ValueError: at the first update, if the optimizer hands on no average of the
        Hessian, as with ``hessian_ema="rms"`` or in ``optax.contrib.sophia``.

    Examples:
      >>> import adahessian_jax as ah
      >>> tx = ah.adahessian(1e-3, hessian_ema="mean", hessian_power=0.5,
      ...   estimator=ah.hutchinson(probe="normal", control_variate=ah.ema_control()))

    References:
      Zack Dugue, `AdaHessian <https://github.com/Zack-Dugue/AdaHessian>`_, 2023
    """
    check_flag("unbiased", unbiased)

    def correct(
        state: Any, probes: Any, product: Any, *, curvature_ema: Any = None, **_: Any
    ) -> tuple[optax.Updates, Any]:
        if curvature_ema is None:
            raise ValueError(
                "ema_control needs the optimizer's moving average of the Hessian"
                " itself: use scale_by_adahessian or adahessian with"
                " hessian_ema='mean'. value_and_grad_with_curvature then needs that"
                " optimizer, not its estimator alone, and optax.inject_hyperparams"
                " static_args=('b2',)."
            )
        average, decay, count = curvature_ema
        # The published formula has the average as it began from zero.
        scale = 1.0 if unbiased else decay / debias(decay, jnp.maximum(count, 1))

        def one(y: Array, z: Array, ema: Array) -> Array:
            y, z = wide(y), wide(z)
            c = as_dtype(scale, z.dtype) * ema.astype(z.dtype)
            d = z * (y - c * z)
            return d + c if unbiased else d

        return map_floats(one, product(), probes, average), state

    return ControlVariate(lambda params: (), correct, f"ema_control({unbiased})")


def gauss_newton_control(loss: Loss) -> ControlVariate:
    r"""Use the Gauss-Newton part of the Hessian as control variate.

    The Hessian is :math:`H = G + R`, the Gauss-Newton matrix and a remainder that is
    the Hessian of :math:`\langle c, f(w) \rangle`, where f are the network's outputs
    and c is the loss's gradient in the outputs, held fixed. The estimate

    .. math::
      d = g \odot g + z \odot R z

    takes the first part from the Gauss-Newton factor
    (:func:`adahessian_jax.gauss_newton`) and probes the remainder only, which is small
    where the network fits its data. It is unbiased for diag H. It may be negative.

    A product with R costs what one with H costs, and comes with the gradient of the
    loss, which is that of the remainder; the factor adds one pullback of the outputs:
    about 1.3 times the operations of plain Hutchinson. There is no state.

    Args:
      loss: what the network is trained with, from :mod:`adahessian_jax.losses`.

    Returns:
      A control variate for :func:`adahessian_jax.hutchinson`. Its ``update`` needs, in
      place of ``obj_fn``, ``predict_fn``, from parameters to outputs or to ``(outputs,
      where)``, and ``labels``: the objective is ``loss(outputs, labels, where=where)``.
      In :func:`adahessian_jax.value_and_grad_with_curvature` the loss function returns
      ``(loss, outputs)`` and ``labels`` is a further argument; what the loss has beside
      that of the outputs, such as weight decay, is then in the estimate.

    Raises:
      ValueError: at update, if ``predict_fn`` or ``labels`` is missing.
      TypeError: if ``loss`` is no loss object.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x, y = jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0])
      >>> control = ah.gauss_newton_control(ah.losses.l2_loss)
      >>> estimator = ah.hutchinson(control_variate=control)
      >>> w = {"a": jnp.array(1.0), "b": jnp.array(3.0)}
      >>> d, _ = estimator.update(
      ...   None, estimator.init(w), w,
      ...   predict_fn=lambda w: w["a"] * w["b"] * x, labels=y)

    References:
      Schraudolph, `Fast Curvature Matrix-Vector Products
      <https://doi.org/10.1162/08997660260028683>`_, 2002, for H = G + R
    """
    check_loss(loss)

    def correct(
        state: Any,
        probes: Any,
        product: Product,
        *,
        params: Any,
        key: Array,
        axis_name: AxisName,
        loss_fn: Any = None,
        predict_fn: Any = None,
        labels: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, Any]:
        if labels is None:
            raise ValueError(
                "gauss_newton_control needs the gradient of the loss in the outputs and"
                " got no labels. Pass them beside predict_fn: tx.update(grads, state,"
                " params, predict_fn=lambda p: model.apply(p, x), labels=y); or to what"
                " value_and_grad_with_curvature makes: value_and_grad(params, x, y,"
                " state=state, labels=y)."
            )
        model = linearize(loss_fn, predict_fn, params, axis_name)
        # The estimator averages over the axis, and these are parts of a sum.
        n_devices = axis_size(axis_name)

        def loss_of(outputs: Array) -> Array:
            if loss_fn is None:
                return n_devices * loss.part(outputs, labels, model.where, axis_name)
            return loss(outputs, labels, where=model.where)

        slope = jax.grad(loss_of)(model.outputs)

        def remainder(params: Any) -> tuple[Array, Any]:
            """Return the objective with the tangent of the output loss in its place."""
            total, outputs, value = model.evaluate(params)
            tangent = jnp.sum(slope * outputs)
            if loss_fn is None:  # there is nothing but the output loss
                return tangent, value
            beside = total - loss_of(outputs).astype(total.dtype)
            return beside + tangent.astype(total.dtype), value

        parts = gauss_newton_part(key, loss, model, labels, axis_name)
        squares = [n_devices * x for x in parts]
        probed = multiply(probes, product(remainder))
        if loss_fn is not None and loss.reduction == "sum":
            if model.communicates:
                raise ValueError(
                    "loss_fn must return the sum of a device's own rows, and this one"
                    " exchanges values between devices: average in place of adding up,"
                    " by a loss with reduction='mean', or pass predict_fn to tx.update."
                )
            probed = jax.tree.map(lambda r: n_devices * r, probed)
        known = model.as_params(squares)
        return map_floats(jnp.add, known, probed), state

    return ControlVariate(lambda params: (), correct, f"gauss_newton({loss!r})", loss)
