# SPDX-License-Identifier: Apache-2.0
"""AdaHessian as an optimizer, with weight decay and learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from adahessian_jax.averaging import AveragingRule
from adahessian_jax.checks import check_float, check_mask
from adahessian_jax.dtypes import is_differentiable
from adahessian_jax.moving_average import is_static
from adahessian_jax.transform import scale_by_adahessian


def adahessian(
    learning_rate: optax.ScalarOrSchedule,
    b1: jax.typing.ArrayLike = 0.9,
    b2: jax.typing.ArrayLike = 0.999,
    eps: jax.typing.ArrayLike = 1e-8,
    *,
    hessian_power: jax.typing.ArrayLike = 1.0,
    hessian_ema: str = "rms",
    estimator: optax.GradientTransformation | None = None,
    update_interval: int | jax.Array = 1,
    initial_refreshes: int | jax.Array = 0,
    reuse_estimate: bool = True,
    averaging: AveragingRule | None = None,
    relative_damping: jax.typing.ArrayLike = 0.0,
    clip_threshold: jax.typing.ArrayLike | None = None,
    weight_decay: jax.typing.ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The AdaHessian optimizer.

    AdaHessian is Adam with the squared gradient replaced by an estimate of the
    Hessian's diagonal. With gradients :math:`g_t` and estimates :math:`D_t`,

    .. math::

      \begin{align*}
        m_t &\leftarrow \beta_1 m_{t-1} + (1 - \beta_1) g_t \\
        v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2) D_t^2
          && \text{(\texttt{"rms"})} \\
        v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2) D_t
          && \text{(\texttt{"mean"})} \\
        \hat{m}_t &\leftarrow m_t / (1 - \beta_1^t), \quad
        \hat{v}_t \leftarrow v_t / (1 - \beta_2^t) \\
        h_t &\leftarrow \sqrt{\hat{v}_t} \ \text{(\texttt{"rms"})}
          \quad \text{or} \quad |\hat{v}_t| \ \text{(\texttt{"mean"})} \\
        w_t &\leftarrow w_{t-1} - \alpha_t \left( \hat{m}_t \Big/
          \left( (h_t + \delta \bar{h}_t)^k + \varepsilon \right)
          + \lambda w_{t-1} \right)
      \end{align*}

    where :math:`\alpha_t` is ``learning_rate``, :math:`\beta_1, \beta_2, \varepsilon`
    are ``b1``, ``b2``, ``eps``, :math:`k` is ``hessian_power``, :math:`\delta` is
    ``relative_damping``, :math:`\bar{h}_t` the mean of :math:`h_t` over the tensor, and
    :math:`\lambda` is ``weight_decay``.

    The estimate needs more than the gradient, so ``update`` takes one more argument:
    ``tx.update(grads, state, params, obj_fn=f)``, where ``f`` maps parameters to the
    loss of the batch that the gradients belong to.

    Args:
      learning_rate: a number or a schedule, see ``optax.scale_by_learning_rate``.
      b1: decay rate of the moving average of the gradient, in [0, 1).
      b2: decay rate of the moving average of the curvature, in [0, 1).
      eps: added to the denominator, at least 0.
      hessian_power: exponent :math:`k` of the curvature, above 0. 1 is Newton-like,
        less is closer to gradient descent.
      hessian_ema: what is averaged, ``"rms"`` the square of the estimate, as published,
        or ``"mean"`` the estimate itself, whose noise and sign then cancel.
      estimator: a transformation whose ``update`` returns the Hessian's diagonal in
        place of the updates; :func:`adahessian_jax.hutchinson` by default.
      update_interval: estimate at counts 0, k, 2k, ... for an interval of k >= 1. With
        the int 1 there is no conditional in the compiled update.
      initial_refreshes: before that, estimate at each count below this number.
      reuse_estimate: between estimates, let the last one enter the average on every
        update, which takes one more buffer of the size of the parameters. False moves
        the average, and corrects its bias, by the estimates alone.
      averaging: shares curvature within a tensor, a rule ``(path, leaf) -> leaf`` such
        as :func:`adahessian_jax.conv_spatial_average` or
        :func:`adahessian_jax.block_average`.
      relative_damping: bounds the update where curvature is small beside that of the
        rest of the tensor, at least 0. An entry of it, before decay and learning rate,
        is at most :math:`|\hat{m}_t| / (\delta \bar{h}_t)^k`. The published optimizer
        has 0, where the bound is :math:`|\hat{m}_t| / \varepsilon`.
      clip_threshold: bounds each entry of the update by a number above 0, before decay
        and learning rate, as Sophia does; None for no bound. With
        :func:`adahessian_jax.in_eigenbasis` the entries are those in the turned axes;
        otherwise this is ``optax.clip``.
      weight_decay: decoupled weight decay, at least 0.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      mu_dtype: dtype in which the average of the gradient is kept; by default that of
        the parameter. Arithmetic is done in float32 or wider in any case.
      nu_dtype: the same for the average of the curvature. For half-precision
        parameters pass ``jnp.float32``: with ``b2=0.999`` steps are too small for
        bfloat16 to hold.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes one of

      - ``obj_fn=f``, a function from parameters to the scalar loss, for
        :func:`adahessian_jax.hutchinson`;
      - ``predict_fn=h``, a function from parameters to the network's outputs, for
        :func:`adahessian_jax.gauss_newton`;
      - ``curvature=c``, from :func:`adahessian_jax.value_and_grad_with_curvature`,
        which computes it in the same pass as the gradient;
      - ``hessian_diag=d``, an estimate of your own, of the structure and shapes of the
        parameters. It is used at the counts at which one is due.

    Raises:
      ValueError: if an argument is out of range; at update, if ``params`` or all ways
        to an estimate are missing, or an estimate does not match the parameters.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, optax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> def loss(w): return jnp.sum(jnp.array([1.0, 100.0]) * w**2)
      >>> tx = ah.adahessian(learning_rate=0.5)
      >>> w = jnp.array([1.0, 1.0])
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...   updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
      ...   w = optax.apply_updates(w, updates)
      >>> bool(loss(w) < 0.01)
      True

    References:
      Yao et al., `ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning
      <https://arxiv.org/abs/2006.00719>`_, 2021, algorithm 1 and equations 8 to 12

      David Samuel, `ada-hessian <https://github.com/davda54/ada-hessian>`_, 2020

      Zack Dugue, `AdaHessian <https://github.com/Zack-Dugue/AdaHessian>`_, 2023

    .. note::
      Ahead of AdamW at equal time on six tasks of ``python -m benchmarks.training``,
      and within 1 % on the seventh, is ``b2=0.9, hessian_ema="mean",
      update_interval=20, initial_refreshes=10, reuse_estimate=False,
      clip_threshold=0.1`` with ``estimator=in_eigenbasis(gauss_newton(loss))`` and a
      learning rate of 0.01 to 0.1. For the published forms with ``update_interval=10,
      initial_refreshes=50`` the same searches ended at 0.3 to 3, or 0.03 to 1 for that
      with ``hessian_power=0.5``, which is safer with ``eps=0.01``: start from 0.3.

    .. note::
      Second derivatives can be infinite or NaN where value and gradient are fine, and
      overflow in half precision. An entry of an estimate that is (or whose square is,
      with ``"rms"``) is left out of the average, entry by entry, because one such entry
      says nothing of the others: its :math:`\hat{v}` stays as it was, an entry that
      never had an estimate gets an update of zero until it has, and the state counts
      them, see :func:`adahessian_jax.diagnostics`. Gradients that are not finite pass,
      as in ``optax.adam``; ``optax.apply_if_finite`` around the optimizer stops them.

    .. note::
      The paper's experiments use ``learning_rate=0.15``, ``eps=1e-4`` and averaging
      over convolution kernels; these defaults are those of the second reference, with
      the learning rate left to you. The third averages the Hessian itself and divides
      by the square root of its absolute value: ``hessian_ema="mean"`` with
      ``hessian_power=0.5``, because here the power is always that of the curvature.
      It also multiplies the learning rate by :math:`(1 - \beta_1^t)^2` relative to
      Adam's bias correction, which this optimizer does not.
    """
    if not callable(learning_rate):
        check_float("learning_rate", learning_rate, 0.0)
    check_float("weight_decay", weight_decay, 0.0)
    if weight_decay_mask is not None:
        check_mask("weight_decay_mask", weight_decay_mask)
    if is_static(weight_decay, 0) and weight_decay_mask is None:
        decay = optax.identity()
    else:
        decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)
    return optax.chain(
        scale_by_adahessian(
            b1=b1,
            b2=b2,
            eps=eps,
            hessian_power=hessian_power,
            hessian_ema=hessian_ema,
            estimator=estimator,
            update_interval=update_interval,
            initial_refreshes=initial_refreshes,
            reuse_estimate=reuse_estimate,
            averaging=averaging,
            relative_damping=relative_damping,
            clip_threshold=clip_threshold,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        # A parameter that is not floating point is frozen, and must not decay either.
        optax.masked(
            decay,
            lambda updates: jax.tree.map(is_differentiable, updates),
        ),
        optax.scale_by_learning_rate(learning_rate),
    )
