# SPDX-License-Identifier: Apache-2.0
"""The learning rate from a quadratic model of the loss along the updates."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy as jsp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src import checks
from adahessian_jax._src.axes import AxisName, check_whole, sum_over_axis
from adahessian_jax._src.derivatives import Floats, split_differentiable
from adahessian_jax._src.dtypes import accumulation_dtype, wide
from adahessian_jax._src.linearized import push_forward
from adahessian_jax._src.loss import Loss, check_loss
from adahessian_jax._src.masking import mask_like
from adahessian_jax._src.meshes import is_sharded
from adahessian_jax._src.moving_average import as_dtype, ema


class ScaleByQuadraticModelState(NamedTuple):
    """State of the transformation by a quadratic model of n directions.

    Attributes:
      slope: moving average of the loss's slopes along the directions, shape (n,).
      curvature: moving average of its Gauss-Newton matrix between them, (n, n).
      learning_rate: by what the last updates were multiplied, shape ().
      sign: 1 for updates of the gradient's sign, -1 for those that were turned, 0 while
        that is not known, shape ().
      damping: what is added to the diagonal of a model with memory, relative to it,
        shape ().
      previous: the last steps before a later learning rate, the newest first.
    """

    slope: Array
    curvature: Array
    learning_rate: Array
    sign: Array
    damping: Array
    previous: tuple[optax.Updates, ...]


def scale_by_quadratic_model(
    loss: Loss,
    fraction: ArrayLike = 0.7,
    *,
    decay: ArrayLike = 0.9,
    memory: int = 0,
    damping: ArrayLike = 0.0,
    sign: int | None = None,
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
        u_t &\leftarrow u_t \, \phi \max(s_t, 0) / c_t
      \end{align*}

    where :math:`\phi` is ``fraction`` and :math:`\beta` is ``decay``. The result does
    not depend on the scale of the loss or of the incoming updates. A learning rate that
    follows in the chain is relative to this one: 1, or a schedule that peaks at 1.

    With a ``memory`` of k the model is of k + 2 directions, the update, the gradient
    and the last k steps, and its minimum in all of them gives rate and momentum: on a
    quadratic function, the steps of preconditioned conjugate gradients. This is for the
    loss of all data, with ``fraction=1, decay=0`` and updates without a momentum of
    their own. A ``damping`` keeps the first steps from going too far: so many times the
    model's diagonal is added to it, and half as much from step to step.

    The curvature along a vector takes one product of the Jacobian with it, two thirds
    of the operations of a gradient that shares the forward pass, or a part of them by a
    ``predict_fn`` of that part of the batch; no matrix is formed.

    Args:
      loss: what the network is trained with, from :mod:`adahessian_jax.losses`.
      fraction: how far to go towards the minimum of the model, above 0. Beyond 2 the
        model says that the loss rises.
      decay: decay rate of both averages, in [0, 1).
      memory: along how many last steps to go, too, at least 0, each a copy of the
        parameters; if any, then along the gradient as well.
      damping: of the first step with a memory, at least 0.
      sign: of the incoming updates, 1 for the gradient's, or -1 after
        ``optax.scale_by_learning_rate``, which turns it. With None the first slope that
        is not zero says which, for good: say it where weight decay in the updates may
        then outweigh the gradient.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split. ``grad`` and the updates must be those of the whole batch already.

    Returns:
      A transformation, with a :class:`.ScaleByQuadraticModelState`, for the step of all
      parameters: two that each find a rate for a group of their own go too far
      together. ``update`` takes ``grad=g``, the gradients, of the structure and shapes
      of the parameters, and, as :func:`adahessian_jax.gauss_newton` does,
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
      Gauss-Newton matrix in place of the Hessian; Narkiss and Zibulevsky, Sequential
      Subspace Optimization Method for Large-Scale Unconstrained Problems, 2005, whose
      directions these are
    """
    check_loss(loss)
    checks.check_float("fraction", fraction, 0.0, exclusive=True)
    checks.check_float("decay", decay, 0.0, 1.0)
    checks.check_int("memory", memory, 0)
    checks.check_float("damping", damping, 0.0)
    checks.check_choice("sign", sign, (None, 1, -1))
    checks.check_axis_name(axis_name)
    n = memory + 2 if memory else 1

    def init_fn(params: optax.Params) -> ScaleByQuadraticModelState:
        checks.check_real("params", params)
        dtype = accumulation_dtype(*jax.tree.leaves(params))
        slope, curvature = jnp.zeros(n, dtype), jnp.zeros((n, n), dtype)
        # An array each: a buffer can be donated once.
        rate, first_sign, first_damping = (
            jnp.full((), x, dtype) for x in (0, sign or 0, damping)
        )
        previous = tuple(jax.tree.map(jnp.zeros_like, params) for _ in range(memory))
        return ScaleByQuadraticModelState(
            slope, curvature, rate, first_sign, first_damping, previous
        )

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
        checks.check_state_type(state, ScaleByQuadraticModelState)
        check_whole(params, axis_name, along="all")  # or slopes are those of parts
        if grad is None:
            raise ValueError(
                "grad must be given: the slope along the updates is that of the loss."
                " Call tx.update(grads, state, params, grad=grads, predict_fn=...)."
            )
        grad = mask_like(grad, params)
        checks.check_like("grad", grad, params)
        checks.check_like("updates", updates, params)
        grads, tangents = (split_differentiable(t, params)[0] for t in (grad, updates))
        checks.require(
            len(state.previous) == memory,
            ValueError,
            "memory",
            "that of the optimizer that made the state, or the state new by tx.init",
            memory,
        )
        directions = [tangents, grads] if memory else [tangents]
        for step in state.previous:
            checks.check_like("state.previous", step, params)
            directions.append(split_differentiable(step, params)[0])
        zero = jnp.zeros((), accumulation_dtype(*jax.tree.leaves(params)))
        slope = jnp.stack([_dot(grads, d, start=zero) for d in directions])
        outputs, where, products = push_forward(
            predict_fn, params, directions, axis_name
        )
        curvature = curvature_of(outputs, where, products, labels)
        finite = jnp.all(jnp.isfinite(slope)) & jnp.all(jnp.isfinite(curvature))
        new, along = fitted(state, slope, curvature, finite)

        def combined(*parts: Array) -> Array:
            terms = [wide(x) * a for x, a in zip(parts, along, strict=True)]
            return sum(terms[1:], start=terms[0]).astype(parts[0].dtype)

        rebuild = split_differentiable(updates, params)[1]
        scaled: Any = rebuild(list(map(combined, *directions)))
        if memory:  # a step that is not finite would stay
            previous = jax.tree.map(
                lambda x, old: jnp.where(finite, jnp.asarray(x, old.dtype), old),
                (scaled, *state.previous[:-1]),
                state.previous,
            )
            new = new._replace(previous=previous)
        return scaled, new

    def curvature_of(outputs: Array, where: Any, pushed: Array, labels: Any) -> Array:
        here = loss.at(outputs, labels, where, axis_name)
        tangents = [here.seen(t) for t in pushed]
        products = [here.times(t) for t in tangents]
        entries = [[jnp.sum(t * p) for p in products] for t in tangents]
        return sum_over_axis(jnp.stack(list(map(jnp.stack, entries))), axis_name)

    def fitted(
        state: Any, slope: Array, curvature: Array, finite: Array
    ) -> tuple[Any, Array]:
        """Return the model moved on, and how far to go along each direction."""
        dtype = state.slope.dtype
        # Bias correction would cancel in the ratio.
        slope, curvature = (
            jnp.where(finite, ema(decay, new.astype(dtype), old), old)
            for new, old in ((slope, state.slope), (curvature, state.curvature))
        )
        sign = jnp.where(state.sign == 0, jnp.sign(slope[0]), state.sign)
        seen = curvature[0, 0] > 0
        ratio = jnp.maximum(sign * slope[0], 0) / jnp.where(seen, curvature[0, 0], 1)
        along = jnp.zeros(n, dtype).at[0].set(ratio)
        if memory:
            along = _minimum(sign * slope, curvature, state.damping, along)
        rates = jnp.where(seen, as_dtype(fraction, dtype) * along, 0)
        damping = jnp.where(finite, 0.5, 1) * state.damping
        new = slope, curvature, rates[0], sign, damping
        return ScaleByQuadraticModelState(*new, state.previous), rates

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _dot(a: Floats, b: Floats, *, start: Array) -> Array:
    """Return the inner product of two lists of arrays, in float32 or wider."""

    def dot(x: Array, y: Array) -> Array:
        # A product of sharded arrays would have to say where its result lies.
        return jnp.sum(x * y) if is_sharded(x) else jnp.vdot(x, y)

    pairs = zip(a, b, strict=True)
    return sum((dot(wide(x), wide(y)) for x, y in pairs), start=start)


def _minimum(slope: Array, curvature: Array, damping: Array, otherwise: Array) -> Array:
    """Return where a quadratic model has its minimum, if it has one."""
    seen = jnp.diag(curvature)
    scale = jnp.sqrt(jnp.where(seen > 0, seen, 1))
    least = float(jnp.finfo(slope.dtype).eps) ** 0.5  # some directions say nothing new
    ridge = jnp.maximum(damping, least) * jnp.eye(len(slope), dtype=slope.dtype)
    matrix = curvature / jnp.outer(scale, scale) + ridge
    root = jsp.linalg.cho_factor(matrix, lower=True)
    found = jsp.linalg.cho_solve(root, slope / scale) / scale
    return jnp.where(jnp.all(jnp.isfinite(found)), found, otherwise)
