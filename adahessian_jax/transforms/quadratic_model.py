# SPDX-License-Identifier: Apache-2.0
"""The learning rate from a quadratic model of the loss along the updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src import checks
from adahessian_jax._src.axes import AxisName, sum_over_axis
from adahessian_jax._src.derivatives import split_differentiable
from adahessian_jax._src.dtypes import accumulation_dtype, wide
from adahessian_jax._src.linearized import push_forward
from adahessian_jax._src.loss import Loss, check_loss, masked
from adahessian_jax._src.masking import mask_like
from adahessian_jax._src.moving_average import as_dtype, ema


class ScaleByQuadraticModelState(NamedTuple):
    """State of the transformation by a quadratic model; all arrays of shape ().

    Attributes:
      slope: moving average of the loss's slope along the updates.
      curvature: moving average of its Gauss-Newton curvature along them.
      learning_rate: by what the last updates were multiplied.
      sign: of the first slope: 1 for updates of the gradient's sign, -1 for those that
        were turned, 0 before there is a slope.
    """

    slope: Array
    curvature: Array
    learning_rate: Array
    sign: Array


def scale_by_quadratic_model(
    loss: Loss,
    fraction: ArrayLike = 0.7,
    *,
    decay: ArrayLike = 0.9,
    max_learning_rate: ArrayLike | None = None,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Choose the learning rate by the loss's curvature along the updates.

    With updates :math:`u_t` of another transformation, such as
    :func:`adahessian_jax.scale_by_adahessian` or ``optax.scale_by_adam``, gradients
    :math:`g_t` and the Gauss-Newton matrix :math:`G_t` of the batch, the quadratic
    model :math:`-\alpha \, g_t^\top u_t + \frac{\alpha^2}{2} u_t^\top G_t u_t` of the
    change of the loss has its minimum at the ratio of slope and curvature. Both are
    averaged, and the step goes a fraction of the way to the minimum:

    .. math::
      \begin{align*}
        s_t &\leftarrow \beta s_{t-1} + (1 - \beta) \, g_t^\top u_t \\
        c_t &\leftarrow \beta c_{t-1} + (1 - \beta) \, u_t^\top G_t u_t \\
        u_t &\leftarrow u_t \min(\phi \max(s_t, 0) / c_t, \alpha_{\max})
      \end{align*}

    where :math:`\phi` is ``fraction``, :math:`\beta` is ``decay`` and
    :math:`\alpha_{\max}` is ``max_learning_rate``. The result does not depend on the
    scale of the loss or of the incoming updates. A learning rate that follows in the
    chain is relative to this one: 1, or a schedule that peaks at 1.

    The curvature along a vector takes one product of the Jacobian with it, two thirds
    of the operations of a gradient that shares the forward pass, or a part of them by a
    ``predict_fn`` of that part of the batch; no matrix is formed.

    Args:
      loss: what the network is trained with, from :mod:`adahessian_jax.losses`.
      fraction: how far to go towards the minimum of the model, above 0. Beyond 2 the
        model says that the loss rises.
      decay: decay rate of both averages, in [0, 1).
      max_learning_rate: above 0, or None for no maximum but the model's.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split. ``grad`` and the updates must be those of the whole batch already.

    Returns:
      A transformation, with a :class:`.ScaleByQuadraticModelState`. Its place is before
      or after ``optax.scale_by_learning_rate``, which turns the sign: the first slope
      says which. ``update`` takes ``grad=g``, the gradients, of the structure and
      shapes of the parameters, and, as :func:`adahessian_jax.gauss_newton` does,
      ``predict_fn=h``, from parameters to outputs or ``(outputs, where)``, and
      ``labels=y`` for a loss whose curvature depends on them. Updates that are not
      floating point are left as they are. Where no curvature was seen along the updates
      there is no model, and the learning rate is 0. Slopes and curvatures that are not
      finite are left out of the averages.

    Raises:
      ValueError: if an argument is out of range; at update, if ``params``, ``grad`` or
        ``predict_fn`` is missing, or ``grad`` or the updates do not match ``params``.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, optax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x = jnp.array([[1.0, 0.0], [0.0, 3.0]])
      >>> def predict(w): return x @ w
      >>> def loss(w): return 0.5 * jnp.sum(predict(w) ** 2)
      >>> half_sum_of_squares = ah.losses.l2_loss.replace(reduction="sum")
      >>> rate = ah.scale_by_quadratic_model(half_sum_of_squares, fraction=1.0)
      >>> tx, w = optax.chain(optax.sgd(1.0), rate), jnp.array([1.0, 0.0])
      >>> g = jax.grad(loss)(w)
      >>> updates, _ = tx.update(g, tx.init(w), w, grad=g, predict_fn=predict)
      >>> (w + updates).tolist()  # the minimum along the gradient
      [0.0, 0.0]

    References:
      Martens and Grosse, `Optimizing Neural Networks with Kronecker-factored
      Approximate Curvature <https://arxiv.org/abs/1503.05671>`_, 2015, section 6.4;
      Roulet et al., `Stepping on the Edge: Curvature Aware Learning Rate Tuners
      <https://arxiv.org/abs/2407.06183>`_, 2024, whose averages these are, with the
      Gauss-Newton matrix in place of the Hessian
    """
    check_loss(loss)
    checks.check_float("fraction", fraction, 0.0, exclusive=True)
    checks.check_float("decay", decay, 0.0, 1.0)
    if max_learning_rate is not None:
        checks.check_float("max_learning_rate", max_learning_rate, 0.0, exclusive=True)
    checks.check_axis_name(axis_name)

    def init_fn(params: optax.Params) -> ScaleByQuadraticModelState:
        checks.check_real("params", params)
        dtype = accumulation_dtype(*jax.tree.leaves(params))
        # An array each: a buffer can be donated once.
        return ScaleByQuadraticModelState(*(jnp.zeros((), dtype) for _ in range(4)))

    def update_fn(
        updates: Any,
        state: ScaleByQuadraticModelState,
        params: Any = None,
        *,
        grad: Any = None,
        predict_fn: Any = None,
        labels: Any = None,
        **_: Any,
    ) -> tuple[optax.Updates, ScaleByQuadraticModelState]:
        checks.check_params(params)
        if grad is None:
            raise ValueError(
                "grad must be given: the slope along the updates is that of the loss."
                " Call tx.update(grads, state, params, grad=grads, predict_fn=...)."
            )
        grad = mask_like(grad, params)
        checks.check_like("grad", grad, params)
        checks.check_like("updates", updates, params)
        grads, tangents = (split_differentiable(t, params)[0] for t in (grad, updates))
        slope = sum(
            (jnp.vdot(wide(g), wide(u)) for g, u in zip(grads, tangents, strict=True)),
            start=jnp.zeros((), accumulation_dtype(*jax.tree.leaves(params))),
        )
        outputs, where, tangent = push_forward(predict_fn, params, tangents, axis_name)
        curvature = curvature_of(outputs, where, tangent, labels)
        state = averaged(state, slope, curvature)
        floats, rebuild = split_differentiable(updates)
        scaled = [(wide(u) * state.learning_rate).astype(u.dtype) for u in floats]
        return rebuild(scaled), state

    def curvature_of(outputs: Array, where: Any, tangent: Array, labels: Any) -> Array:
        weights = loss.row_weights(outputs, where, axis_name)
        outputs, tangent = (masked(wide(x), weights) for x in (outputs, tangent))
        product = loss.product(outputs, tangent, loss.curvature_labels(labels))
        return sum_over_axis(jnp.sum(tangent * product * weights), axis_name)

    def averaged(state: Any, slope: Array, curvature: Array) -> Any:
        dtype = state.slope.dtype
        finite = jnp.isfinite(slope) & jnp.isfinite(curvature)
        # Bias correction would cancel in the ratio.
        slope, curvature = (
            jnp.where(finite, ema(decay, new.astype(dtype), old), old)
            for new, old in ((slope, state.slope), (curvature, state.curvature))
        )
        sign = jnp.where(state.sign == 0, jnp.sign(slope), state.sign)
        seen = curvature > 0
        ratio = jnp.maximum(sign * slope, 0) / jnp.where(seen, curvature, 1)
        rate = jnp.where(seen, as_dtype(fraction, dtype) * ratio, 0)
        if max_learning_rate is not None:
            rate = jnp.minimum(rate, as_dtype(max_learning_rate, dtype))
        return ScaleByQuadraticModelState(slope, curvature, rate, sign)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
