# SPDX-License-Identifier: Apache-2.0
"""Optimizers by name: transformations, weight decay and learning rate."""

from collections.abc import Callable
from typing import Any

import jax
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from adahessian_jax._src.averaging_rule import AveragingRule
from adahessian_jax._src.axes import AxisName
from adahessian_jax._src.checks import check_float, check_mask
from adahessian_jax._src.dtypes import is_differentiable
from adahessian_jax._src.loss import Loss, check_loss
from adahessian_jax._src.moving_average import is_static
from adahessian_jax.estimators.eigenbasis import in_eigenbasis
from adahessian_jax.estimators.gauss_newton import gauss_newton
from adahessian_jax.transforms.adahessian import scale_by_adahessian
from adahessian_jax.transforms.quadratic_model import scale_by_quadratic_model


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
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
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
          \left( h_t^k + \varepsilon \right)
          + \lambda w_{t-1} \right)
      \end{align*}

    where :math:`\alpha_t` is ``learning_rate``, :math:`\beta_1, \beta_2, \varepsilon`
    are ``b1``, ``b2``, ``eps``, :math:`k` is ``hessian_power``, and :math:`\lambda` is
    ``weight_decay``. Where there is no new estimate, :math:`v` stays as it is, and t is
    the number of estimates in its bias correction.

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
      averaging: shares curvature within a tensor, a rule ``(path, leaf) -> leaf`` such
        as :func:`adahessian_jax.conv_spatial_average` or
        :func:`adahessian_jax.block_average`.
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
      Second derivatives can be infinite or NaN where value and gradient are fine, and
      overflow in half precision. An entry of an estimate that is (or whose square is,
      with ``"rms"``) is left out of the average: its :math:`\hat{v}` stays as it was,
      or its update zero if it never had an estimate, and the state counts it, see
      :func:`adahessian_jax.diagnostics`. Gradients that are not finite pass, as in
      ``optax.adam``; ``optax.apply_if_finite`` around the optimizer stops them.

    .. note::
      The defaults are those of the second reference. The published forms are in
      :mod:`adahessian_jax.published`.
    """
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
            averaging=averaging,
            clip_threshold=clip_threshold,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        decoupled_weight_decay(weight_decay, weight_decay_mask),
        scale_by_rate(learning_rate),
    )


def newton(
    learning_rate: optax.ScalarOrSchedule | None,
    loss: Loss,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    clip_threshold: ArrayLike | None = 0.1,
    update_interval: int | Array = 20,
    initial_refreshes: int | Array = 10,
    schedule: optax.Schedule | None = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    decay: ArrayLike = 0.98,
    max_dim: int = 64,
    n_vectors: int = 8,
    seed: int | Array = 0,
    axis_name: AxisName = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clipped Newton steps in axes in which the curvature is nearly diagonal.

    This is what the library recommends where the loss is one of a network's outputs. It
    is :func:`adahessian_jax.adahessian` with the average of the Gauss-Newton diagonal
    in its eigenbasis (:func:`adahessian_jax.in_eigenbasis`),

    .. math::
      w_t \leftarrow w_{t-1} - \alpha_t \left( Q_t \,
        \mathrm{clip}_c \big( Q_t^\top \hat{m}_t \big/ (\hat{v}_t + \varepsilon)
        \big) + \lambda w_{t-1} \right)

    where :math:`Q_t` turns each axis of a tensor, :math:`c` is ``clip_threshold``,
    :math:`\lambda` is ``weight_decay`` and :math:`\hat{m}_t, \hat{v}_t` are averages of
    gradient and curvature. With a learning rate of None :math:`\alpha_t` is that of
    :func:`adahessian_jax.scale_by_quadratic_model`: nothing is to be searched for, at
    two thirds of a gradient more a step.

    Args:
      learning_rate: a number or a schedule; None for its own rate. RULE_OF_RATES
      loss: the loss that the network is trained with, from
        :mod:`adahessian_jax.losses`.
      b1: decay rate of the average of the gradient, in [0, 1).
      b2: decay rate of the average of the curvature, in [0, 1). 0.9 is an average of
        the last 10 estimates; more remembers curvature that is gone.
      eps: added to the denominator, at least 0.
      clip_threshold: bound of an update's entries in the turned axes, above 0, before
        decay and learning rate. 0.1 is the best of .03, .1 and .3 on three tasks.
      update_interval: estimate, and turn, on every so many-th update: 20 costs a tenth
        of a gradient a step, and 10 trains no better.
      initial_refreshes: before that, on each of so many first updates: the bases need
        a few.
      schedule: with a learning rate of None, a factor on it by the count of updates,
        which peaks at 1.
      weight_decay: decoupled weight decay, at least 0.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      decay: of the averages that the axes are turned by, in [0, 1).
      max_dim: axes of up to this size have a complete basis.
      n_vectors: how many leading eigenvectors a longer axis has.
      seed: an int or a PRNG key.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split. Nothing is needed where arrays are sharded over a mesh.
      mu_dtype: dtype in which the average of the gradient is kept; by default that of
        the parameter.
      nu_dtype: the same for the average of the curvature.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes
      ``predict_fn=h``, a function from parameters to the network's outputs, or to
      ``(outputs, where)``; and ``labels=y`` where the loss's curvature depends on them.
      Or ``curvature=c`` from :func:`adahessian_jax.value_and_grad_with_curvature`; with
      a learning rate of None ``predict_fn`` beside it, for which a part of the batch is
      enough.

    Raises:
      ValueError: if an argument is out of range, or ``learning_rate`` and ``schedule``
        are both given; at update, if ``params`` or ``predict_fn`` is missing or does
        not fit.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> loss = ah.losses.squared_error
      >>> x, y = jnp.array([[9.0, 9.1], [5.0, 4.8], [-7.0, -7.2]]), jnp.ones((3, 1))
      >>> def predict(w): return x @ w
      >>> tx, w = ah.newton(None, loss), jnp.zeros((2, 1))
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...   value, grads = jax.value_and_grad(lambda w: loss(predict(w), y))(w)
      ...   updates, state = tx.update(grads, state, w, predict_fn=predict)
      ...   w = w + updates
      >>> bool(value < 0.68)  # 0.678 is the least
      True

    References:
      George et al., `Fast Approximate Natural Gradient Descent in a Kronecker-factored
      Eigenbasis <https://arxiv.org/abs/1806.03884>`_, 2018

      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024

    .. note::
      ``python -m benchmarks.training`` compares it with AdamW, Muon, Sophia and the
      published forms; the settings were chosen there, on other seeds than those that
      are reported.
    """
    check_loss(loss)
    if isinstance(learning_rate, Loss):
        raise TypeError(
            "learning_rate must be a number, a schedule or None, got a loss: call"
            " newton(0.03, loss), or newton(None, loss) for its own rate."
        )
    if schedule is not None and learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate!r} and schedule are both rates: pass a"
            " schedule as the learning rate, newton(schedule, loss), or"
            " learning_rate=None for its own rate times a schedule that peaks at 1."
        )
    estimator = in_eigenbasis(
        gauss_newton(loss, seed=seed, axis_name=axis_name),
        decay=decay,
        max_dim=max_dim,
        n_vectors=n_vectors,
    )
    parts = [
        scale_by_adahessian(
            b1=b1,
            b2=b2,
            eps=eps,
            hessian_ema="mean",
            estimator=estimator,
            update_interval=update_interval,
            initial_refreshes=initial_refreshes,
            clip_threshold=clip_threshold,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        decoupled_weight_decay(weight_decay, weight_decay_mask),
    ]
    if learning_rate is not None:
        return optax.chain(*parts, scale_by_rate(learning_rate))
    chain = optax.chain(
        *parts,
        scale_by_quadratic_model(loss, axis_name=axis_name),
        scale_by_rate(1.0 if schedule is None else schedule),
    )

    def update_fn(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, optax.OptState]:
        return chain.update(updates, state, params, **{"grad": updates, **extra_args})

    return optax.GradientTransformationExtraArgs(chain.init, update_fn)


def decoupled_weight_decay(
    weight_decay: ArrayLike, mask: Any
) -> optax.GradientTransformation:
    """Return ``optax.add_decayed_weights`` for the parameters that have derivatives."""
    check_float("weight_decay", weight_decay, 0.0)
    if mask is not None:
        check_mask("weight_decay_mask", mask)
    if is_static(weight_decay, 0) and mask is None:
        decay = optax.identity()
    else:
        decay = optax.add_decayed_weights(weight_decay, mask)
    # A parameter that is not floating point is frozen, and must not decay either.
    return optax.masked(decay, lambda updates: jax.tree.map(is_differentiable, updates))


def scale_by_rate(
    learning_rate: optax.ScalarOrSchedule,
) -> optax.GradientTransformation:
    """Return ``optax.scale_by_learning_rate``, its argument checked."""
    if not callable(learning_rate):
        check_float("learning_rate", learning_rate, 0.0)
    return optax.scale_by_learning_rate(learning_rate)
