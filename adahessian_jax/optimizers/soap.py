# SPDX-License-Identifier: Apache-2.0
"""Adam in turned axes, with weight decay and a learning rate."""

from collections.abc import Callable
from typing import Any

import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from adahessian_jax._src.decay_and_rate import decoupled_weight_decay, scale_by_rate
from adahessian_jax._src.stacks import Stacked
from adahessian_jax.estimators.eigenbasis import in_eigenbasis
from adahessian_jax.estimators.squared_gradient import squared_gradient
from adahessian_jax.transforms.adahessian import scale_by_adahessian


def soap(
    learning_rate: optax.ScalarOrSchedule,
    b1: ArrayLike = 0.85,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    *,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    decay: ArrayLike = 0.95,
    turn_interval: int | Array = 10,
    max_dim: int = 64,
    n_vectors: int = 8,
    stacked: Stacked | None = None,
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with Nesterov momentum, in the turned axes of :func:`newton`.

    SOAP with cheaper axes: long ones follow the leading eigenvectors only, and all
    averages are taken along when axes turn. It needs the gradient alone, as Adam does:

    .. math::
      w_t \leftarrow w_{t-1} - \alpha_t \left( Q_t \, \frac{Q_t^\top
        \hat{m}_t}{\sqrt{\hat{v}_t} + \varepsilon} + \lambda w_{t-1} \right)

    where :math:`\hat{v}_t` is the average of :math:`(Q_t^\top g_t)^2`. What was
    published is :func:`adahessian_jax.published.soap`.

    Args:
      learning_rate: a number or a schedule. Start at AdamW's.
      b1: decay rate of the average of the gradient, in [0, 1).
      b2: the same for its square.
      eps: added to the denominator, at least 0.
      weight_decay: decoupled weight decay, at least 0.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      decay: and so on: of the axes, see :func:`adahessian_jax.in_eigenbasis`.
      turn_interval: how often they turn.
      max_dim: how long an axis with a complete basis may be.
      n_vectors: how many leading vectors longer ones have.
      stacked: which axes are stacks of layers.
      mu_dtype: dtype of the average of the gradient; by default the parameter's.
      nu_dtype: the same for that of the square.

    Returns:
      A transformation, used as ``optax.adamw`` is.

    Raises:
      ValueError: if an argument is out of range; at update, if ``params`` is missing.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x = jnp.array([[9.0, 9.1], [5.0, 4.8], [-7.0, -7.2]])
      >>> def loss(w): return jnp.mean((x @ w - 1) ** 2)
      >>> tx, w = ah.soap(0.1), jnp.zeros((2, 1))
      >>> state = tx.init(w)
      >>> for _ in range(100):
      ...   updates, state = tx.update(jax.grad(loss)(w), state, w)
      ...   w = w + updates
      >>> bool(loss(w) < 0.69)  # 0.678 is the least
      True

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024; Dozat,
      `Incorporating Nesterov Momentum into Adam
      <https://openreview.net/forum?id=OM0jvwB8jIp57ZJjtNEZ>`_, 2016
    """
    axes: dict[str, Any] = {"decay": decay, "turn_interval": turn_interval}
    axes |= {"max_dim": max_dim, "n_vectors": n_vectors, "stacked": stacked}
    return optax.chain(
        scale_by_adahessian(
            b1,
            b2,
            eps,
            hessian_ema="mean",
            hessian_power=0.5,
            estimator=in_eigenbasis(squared_gradient(), **axes),
            nesterov=True,
            mu_dtype=mu_dtype,
            nu_dtype=nu_dtype,
        ),
        decoupled_weight_decay(weight_decay, weight_decay_mask),
        scale_by_rate(learning_rate),
    )
