# SPDX-License-Identifier: Apache-2.0
"""Newton's steps in turned axes, with a learning rate or at their own."""

from collections.abc import Callable
from typing import Any

import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from adahessian_jax._src.axes import AxisName
from adahessian_jax._src.decay_and_rate import (
    decoupled_weight_decay,
    scale_by_rate,
    with_gradient,
)
from adahessian_jax._src.loss import Loss, check_loss
from adahessian_jax._src.stacks import Stacked
from adahessian_jax.estimators.eigenbasis import in_eigenbasis
from adahessian_jax.estimators.gauss_newton import gauss_newton
from adahessian_jax.transforms.adahessian import scale_by_adahessian
from adahessian_jax.transforms.quadratic_model import scale_by_quadratic_model


def newton(
    learning_rate: optax.ScalarOrSchedule | None,
    loss: Loss,
    *,
    b1: ArrayLike = 0.85,
    b2: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    clip_threshold: ArrayLike | None = 0.3,
    update_interval: int | Array = 20,
    initial_refreshes: int | Array = 10,
    schedule: optax.Schedule | None = None,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    decay: ArrayLike = 0.95,
    turn_interval: int | Array = 10,
    max_dim: int = 64,
    n_vectors: int = 8,
    stacked: Stacked | None = None,
    seed: int | Array = 0,
    axis_name: AxisName = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Clipped Newton steps in axes in which the curvature is nearly diagonal.

    For a loss of a network's outputs: :func:`adahessian_jax.adahessian` with Nesterov
    momentum and the average of the Gauss-Newton diagonal in axes that turn with the
    gradients (:func:`adahessian_jax.in_eigenbasis`),

    .. math::
      w_t \leftarrow w_{t-1} - \alpha_t \left( Q_t \, \mathrm{clip}_c \big( Q_t^\top
        \hat{m}_t \big/ (\hat{v}_t + \varepsilon) \big) + \lambda w_{t-1} \right)

    where :math:`Q_t` turns each axis of a tensor, :math:`c` is ``clip_threshold``,
    :math:`\lambda` is ``weight_decay`` and :math:`\hat{m}_t, \hat{v}_t` are averages of
    gradient and curvature. With a rate of None it is found at each step, for two thirds
    of a gradient more, by :func:`adahessian_jax.scale_by_quadratic_model`. Such a rate
    is for the step of all parameters: have one such ``newton``, not one for each of
    several groups, whose steps would go too far together. For the loss of all data at
    once there is :func:`subspace_newton`.

    Args:
      learning_rate: a number or a schedule; None for its own rate. Start at a tuned
        AdamW's, and search up to three times that, at most 0.1.
      loss: what the network is trained with, from :mod:`adahessian_jax.losses`.
      b1: decay rate of the average of the gradient, in [0, 1).
      b2: the same for the curvature: 0.9 averages 10 estimates, more are out of date.
      eps: added to the denominator, at least 0.
      clip_threshold: bound of an update's entries in the turned axes, above 0, before
        decay and learning rate.
      update_interval: estimate on every so many-th update, at least 1.
      initial_refreshes: before that, estimate on each of so many first updates.
      schedule: relative to its own rate, so that it peaks at 1.
      weight_decay: decoupled weight decay, at least 0. Its own rate is about a hundred
        times AdamW's: divide the decay by that. Where decay outweighs the gradient, so
        that the step would raise the loss, its own rate is 0.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      decay: and so on: of the axes, see :func:`adahessian_jax.in_eigenbasis`.
      turn_interval: how often they turn.
      max_dim: how long an axis with a complete basis may be.
      n_vectors: how many leading vectors longer ones have.
      stacked: which axes are stacks of layers.
      seed: an int or a PRNG key.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split. Nothing is needed where arrays are sharded over a mesh.
      mu_dtype: dtype of the average of the gradient; by default the parameter's.
      nu_dtype: the same for the average of the curvature.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes
      ``predict_fn=h``, from parameters to the network's outputs, or to ``(outputs,
      where)``; and ``labels=y`` where the loss's curvature depends on them. Or
      ``curvature=c`` from :func:`adahessian_jax.value_and_grad_with_curvature`; with a
      learning rate of None ``predict_fn`` beside it, of a part of the batch at least.

    Raises:
      ValueError: if an argument is out of range, or ``learning_rate`` is given with a
        ``schedule``; at update, if ``params`` or ``predict_fn`` is missing or unfit.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x, y = jnp.array([[9.0, 9.1], [5.0, 4.8], [-7.0, -7.2]]), jnp.ones((3, 1))
      >>> def predict(w): return x @ w
      >>> loss, w = ah.losses.squared_error, jnp.zeros((2, 1))
      >>> tx = ah.newton(None, loss)
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...   value, grads = jax.value_and_grad(lambda w: loss(predict(w), y))(w)
      ...   updates, state = tx.update(grads, state, w, predict_fn=predict)
      ...   w = w + updates
      >>> bool(value < 0.68)  # 0.678 is the least
      True

    References:
      George et al., `EKFAC <https://arxiv.org/abs/1806.03884>`_, 2018; Vyas et al.,
      `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024. Settings were chosen by
      ``python -m benchmarks.training``, on other seeds than those reported.
    """
    if isinstance(learning_rate, Loss):
        raise TypeError(
            "learning_rate must be a number, a schedule or None, got a loss: call"
            " newton(0.03, loss), or newton(None, loss) for its own rate."
        )
    check_loss(loss)
    if schedule is not None and learning_rate is not None:
        raise ValueError(
            f"learning_rate={learning_rate!r} and schedule are both rates: pass a"
            " schedule as the learning rate, newton(schedule, loss), or"
            " learning_rate=None for its own rate times a schedule that peaks at 1."
        )
    axes: dict[str, Any] = {"decay": decay, "turn_interval": turn_interval}
    axes |= {"max_dim": max_dim, "n_vectors": n_vectors, "stacked": stacked}
    factor = gauss_newton(loss, seed=seed, axis_name=axis_name)
    estimator = in_eigenbasis(factor, **axes)
    parts = [
        scale_by_adahessian(
            b1,
            b2,
            eps,
            hessian_ema="mean",
            estimator=estimator,
            update_interval=update_interval,
            initial_refreshes=initial_refreshes,
            clip_threshold=clip_threshold,
            nesterov=True,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        decoupled_weight_decay(weight_decay, weight_decay_mask),
    ]
    if learning_rate is not None:
        return optax.chain(*parts, scale_by_rate(learning_rate))
    parts.append(scale_by_quadratic_model(loss, sign=1, axis_name=axis_name))
    rate = scale_by_rate(1.0 if schedule is None else schedule)
    return with_gradient(optax.chain(*parts, rate))
