# SPDX-License-Identifier: Apache-2.0
"""Control variates for Hutchinson's estimator: what is known of the Hessian."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.checks import check_flag
from adahessian_jax.dtypes import is_differentiable
from adahessian_jax.moving_average import HessianEMA, debias


class ControlVariate(NamedTuple):
    """A matrix of known diagonal that is subtracted from the Hessian before probing.

    Attributes:
      init: maps parameters to the initial state.
      correct: maps ``(state, probes, products, **extra_args)``, where ``products`` is
        the Hessian times the probes and ``extra_args`` are those of the estimator's
        ``update``, to the estimate of the diagonal and the new state.
    """

    init: Callable[[optax.Params], Any]
    correct: Callable[..., tuple[optax.Updates, Any]]


def ema_control(*, unbiased: bool = True) -> ControlVariate:
    r"""Use the optimizer's moving average of the Hessian as control variate.

    With a probe :math:`z` and the average :math:`c`,

    .. math::
      d = z \odot (H z - c \odot z) + c

    has the mean diag H whatever :math:`c` is. With ``unbiased=False`` the last term is
    left out and :math:`c` is the decay rate times the average that is not corrected for
    its start from zero: the formula published with the variant of AdaHessian that
    averages the Hessian itself.

    **It changes nothing that plain Hutchinson with Rademacher probes does not do**:
    there :math:`z \odot (c \odot z) = c` exactly, whatever the signs. With
    Gaussian probes, whose variance is :math:`\sum_{j \neq i} H_{ij}^2 + 2 H_{ii}^2`,
    it turns the second term into :math:`2 (H_{ii} - c_i)^2`, and so at best ties with
    Rademacher probes. It is here so that the published variant can be run.

    Args:
      unbiased: add the mean back. False is the published formula: the average then
        obeys :math:`v \leftarrow b_2^2 v + (1 - b_2)\, z \odot H z`, which is the plain
        average of decay :math:`b_2^2`, divided by :math:`1 + b_2`.

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
        state: tuple[()],
        probes: optax.Updates,
        products: optax.Updates,
        *,
        hessian_ema: HessianEMA | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, tuple[()]]:
        del extra_args
        if hessian_ema is None:
            raise ValueError(
                "ema_control needs the optimizer's moving average of the Hessian"
                " itself: use scale_by_adahessian or adahessian with"
                " hessian_ema='mean'."
            )
        decay, count = hessian_ema.decay, hessian_ema.count
        # Before the first estimate the average is zero, and so is its correction.
        corrected = debias(decay, jnp.maximum(count, 1))
        scale = corrected if unbiased else jnp.asarray(decay)

        def one(z: jax.Array, y: jax.Array, ema: jax.Array) -> jax.Array:
            if not is_differentiable(z):
                return y
            c = scale.astype(z.dtype) * ema.astype(z.dtype)
            d = z * (y - c * z)
            return d + c if unbiased else d

        return jax.tree.map(one, probes, products, hessian_ema.value), state

    return ControlVariate(lambda params: (), correct)
