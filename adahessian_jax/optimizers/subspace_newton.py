# SPDX-License-Identifier: Apache-2.0
"""Newton's steps for the loss of all data, at their own rate and momentum."""

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
from adahessian_jax._src.loss import Loss
from adahessian_jax._src.stacks import Stacked
from adahessian_jax.estimators.eigenbasis import in_eigenbasis
from adahessian_jax.estimators.gauss_newton import gauss_newton
from adahessian_jax.transforms.adahessian import scale_by_adahessian
from adahessian_jax.transforms.quadratic_model import scale_by_quadratic_model


def subspace_newton(
    loss: Loss,
    *,
    memory: int = 3,
    damping: ArrayLike = 1.0,
    b2: ArrayLike = 0.9,
    eps: ArrayLike = 1e-8,
    clip_threshold: ArrayLike | None = 0.1,
    update_interval: int | Array = 1,
    weight_decay: ArrayLike = 0.0,
    weight_decay_mask: Any | Callable[[optax.Params], Any] | None = None,
    decay: ArrayLike = 0.95,
    turn_interval: int | Array = 5,
    max_dim: int = 64,
    n_vectors: int = 8,
    stacked: Stacked | None = None,
    seed: int | Array = 0,
    axis_name: AxisName = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""The best step in the span of Newton's, the gradient and the last steps.

    For the loss of all data, as of a differential equation's residuals: the batch never
    changes. Each step has its own length and momentum, from a quadratic model of the
    loss, and nothing is searched for or scheduled:

    .. math::
      w_t \leftarrow w_{t-1} - D_t \operatorname*{arg\,min}_a \left( \tfrac12
        a^\top D_t^\top G_t D_t a - a^\top D_t^\top g_t \right), \quad
      D_t = \big[ Q_t \, \mathrm{clip}_c \big( Q_t^\top g_t / (\hat{v}_t + \varepsilon)
        \big) + \lambda w_{t-1}, \; g_t, \; d_{t-1}, \dots, d_{t-k} \big]

    where :math:`g_t` is the gradient, :math:`G_t` the Gauss-Newton matrix,
    :math:`\hat{v}_t` the average of its diagonal in the axes :math:`Q_t`, that turn
    with the gradients (:func:`adahessian_jax.in_eigenbasis`), :math:`c` is
    ``clip_threshold``, :math:`\lambda` is ``weight_decay``, and :math:`d_{t-1}` to
    :math:`d_{t-k}` are the last steps, ``memory`` of them. To the first
    model its diagonal is added, times ``damping``, and half as much from step to step.

    A step costs three to five of Adam's. It is for all parameters: have one such
    optimizer, not one for each of several groups, whose steps would go too far
    together.

    Args:
      loss: what the network is trained with, from :mod:`adahessian_jax.losses`.
      memory: how many last steps are in the model, at least 0, each a copy of the
        parameters.
      damping: of the first step, at least 0. It keeps the first steps from going too
        far.
      b2: decay rate of the average of the curvature, in [0, 1).
      eps: added to the denominator, at least 0.
      clip_threshold: bound of the entries of Newton's step in the turned axes, above 0.
      update_interval: estimate on every so many-th update, at least 1.
      weight_decay: decoupled weight decay, at least 0: a hundredth of AdamW's, or none.
        It turns Newton's direction; the steps are still those that lower the loss most.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      decay: and so on: of the axes, see :func:`adahessian_jax.in_eigenbasis`.
      turn_interval: how often they turn.
      max_dim: how long an axis with a complete basis may be.
      n_vectors: how many leading vectors longer ones have.
      stacked: which axes are stacks of layers.
      seed: an int or a PRNG key.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split. Nothing is needed where arrays are sharded over a mesh.
      nu_dtype: dtype of the average of the curvature; by default the parameter's.

    Returns:
      An ``optax.GradientTransformationExtraArgs``. Its ``update`` takes
      ``predict_fn=h``, from parameters to the network's outputs, or to ``(outputs,
      where)``; and ``labels=y`` where the loss's curvature depends on them. Beside it,
      ``curvature=c`` from :func:`adahessian_jax.value_and_grad_with_curvature`.

    Raises:
      ValueError: if an argument is out of range; at update, if ``params`` or
        ``predict_fn`` is missing or unfit.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x, y = jnp.array([[9.0, 9.1], [5.0, 4.8], [-7.0, -7.2]]), jnp.ones((3, 1))
      >>> def predict(w): return x @ w
      >>> loss, w = ah.losses.squared_error, jnp.zeros((2, 1))
      >>> tx = ah.subspace_newton(loss)
      >>> state = tx.init(w)
      >>> for _ in range(30):
      ...   value, grads = jax.value_and_grad(lambda w: loss(predict(w), y))(w)
      ...   updates, state = tx.update(grads, state, w, predict_fn=predict)
      ...   w = w + updates
      >>> bool(value < 0.6785)  # 0.6782 is the least
      True

    References:
      Narkiss and Zibulevsky, Sequential Subspace Optimization Method for Large-Scale
      Unconstrained Problems, 2005; Martens and Grosse, `Optimizing Neural Networks with
      Kronecker-factored Approximate Curvature <https://arxiv.org/abs/1503.05671>`_,
      2015, section 7, whose model has one last step. Settings were chosen by ``python
      -m benchmarks.training``, on other seeds than those reported.
    """
    axes: dict[str, Any] = {"decay": decay, "turn_interval": turn_interval}
    axes |= {"max_dim": max_dim, "n_vectors": n_vectors, "stacked": stacked}
    factor = gauss_newton(loss, seed=seed, axis_name=axis_name)
    return with_gradient(
        optax.chain(
            scale_by_adahessian(
                0.0,
                b2,
                eps,
                hessian_ema="mean",
                estimator=in_eigenbasis(factor, **axes),
                update_interval=update_interval,
                clip_threshold=clip_threshold,
                nu_dtype=nu_dtype,
            ),
            decoupled_weight_decay(weight_decay, weight_decay_mask),
            scale_by_quadratic_model(
                loss,
                1.0,
                decay=0.0,
                memory=memory,
                damping=damping,
                sign=1,
                axis_name=axis_name,
            ),
            scale_by_rate(1.0),
        )
    )
