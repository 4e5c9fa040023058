# SPDX-License-Identifier: Apache-2.0
"""AdaHessian, with weight decay and a learning rate."""

from collections.abc import Callable
from typing import Any

import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from adahessian_jax._src.averaging_rule import AveragingRule
from adahessian_jax._src.decay_and_rate import decoupled_weight_decay, scale_by_rate
from adahessian_jax.transforms.adahessian import scale_by_adahessian


def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    *,
    hessian_power: ArrayLike = 1.0,
    hessian_ema: str = "rms",
    estimator: optax.GradientTransformation | None = None,
    update_interval: int | Array = 1,
    initial_refreshes: int | Array = 0,
    averaging: AveragingRule | None = None,
    clip_threshold: ArrayLike | None = None,
    nesterov: bool = False,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian: Adam with curvature in place of the squared gradient.

    With gradients :math:`g_t` and estimates :math:`D_t` of the Hessian's diagonal,

    .. math::
      \begin{align*}
        m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1) g_t, \quad
        \hat{m}_t \leftarrow m_t / (1 - \beta_1^t) \\
        v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2) D_t^p, \quad
        \hat{v}_t \leftarrow v_t / (1 - \beta_2^t) \\
        w_t &\leftarrow w_{t-1} - \alpha_t \left( \hat{m}_t \Big/ \left(
          |\hat{v}_t|^{k/p} + \varepsilon \right) + \lambda w_{t-1} \right)
      \end{align*}

    where :math:`p` is 2 with the ``hessian_ema`` ``"rms"`` and 1 with ``"mean"``,
    :math:`\alpha_t` is ``learning_rate``, :math:`\beta_1, \beta_2, \varepsilon` are
    ``b1``, ``b2``, ``eps``, :math:`k` is ``hessian_power``, and :math:`\lambda` is
    ``weight_decay``. Where there is no new estimate, :math:`v` stays as it is, and t is
    the number of estimates in its bias correction.

    Second derivatives can be infinite or NaN where value and gradient are fine, and
    overflow in half precision. Such an entry of an estimate (with ``"rms"``, of its
    square) is left out of the average: its :math:`\hat{v}` stays as it was, its update
    zero if it never had an estimate, and :func:`adahessian_jax.diagnostics` counts it.
    Gradients that are not finite pass, unless ``optax.apply_if_finite`` stops them.

    Args:
      learning_rate: a number or a schedule, see ``optax.scale_by_learning_rate``.
      b1: decay rate of the moving average of the gradient, in [0, 1).
      b2: decay rate of the moving average of the curvature, in [0, 1).
      eps: added to the denominator, at least 0.
      hessian_power: exponent :math:`k`, above 0. 1 is Newton-like, less closer to SGD.
      hessian_ema: what is averaged, ``"rms"`` the square of the estimate, as published,
        or ``"mean"`` the estimate itself, whose noise and sign then cancel.
      estimator: its ``update`` returns the diagonal; ``hutchinson()`` by default.
      update_interval: estimate at counts 0, k, 2k, ... for an interval of k >= 1. With
        the int 1 there is no conditional in the compiled update.
      initial_refreshes: before that, estimate at each count below this number.
      averaging: a rule, such as :func:`adahessian_jax.conv_spatial_average` makes.
      clip_threshold: bound of an update's entries, above 0, before decay and learning
        rate, as in Sophia; None for no bound. It is ``optax.clip``, but in the turned
        axes of :func:`adahessian_jax.in_eigenbasis`.
      nesterov: look one step ahead with the average of the gradient, as in NAdam.
      weight_decay: decoupled weight decay, at least 0.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      mu_dtype: dtype of the average of the gradient, by default the parameter's.
      nu_dtype: the same for the curvature. Arithmetic is in float32 or wider, but store
        in ``jnp.float32``: with ``b2=0.999`` steps are too small for bfloat16.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` needs more than the
      gradient, one of

      - ``obj_fn``, parameters to scalar loss, for :func:`adahessian_jax.hutchinson`;
      - ``predict_fn``, parameters to outputs, for :func:`adahessian_jax.gauss_newton`;
      - ``curvature``, of :func:`adahessian_jax.value_and_grad_with_curvature`;
      - ``hessian_diag``, your own estimate, in the form of ``params``, used when due.

    Raises:
      ValueError: if an argument is out of range; at update, if ``params`` or all ways
        to an estimate are missing, or an estimate does not match the parameters.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, optax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> def loss(w): return jnp.sum(jnp.array([1.0, 100.0]) * w**2)
      >>> tx, w = ah.adahessian(learning_rate=0.5), jnp.array([1.0, 1.0])
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...   updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
      ...   w = optax.apply_updates(w, updates)
      >>> bool(loss(w) < 0.01)
      True

    References:
      Yao et al., `ADAHESSIAN <https://arxiv.org/abs/2006.00719>`_, 2021, algorithm 1
      and equations 8 to 12; David Samuel, `ada-hessian
      <https://github.com/davda54/ada-hessian>`_, 2020, whose defaults these are; Zack
      Dugue, `AdaHessian <https://github.com/Zack-Dugue/AdaHessian>`_, 2023. What they
      published is in :mod:`adahessian_jax.published`.
    """
    return optax.chain(
        scale_by_adahessian(
            b1,
            b2,
            eps,
            hessian_power=hessian_power,
            hessian_ema=hessian_ema,
            estimator=estimator,
            update_interval=update_interval,
            initial_refreshes=initial_refreshes,
            averaging=averaging,
            clip_threshold=clip_threshold,
            nesterov=nesterov,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        decoupled_weight_decay(weight_decay, weight_decay_mask),
        scale_by_rate(learning_rate),
    )
