# SPDX-License-Identifier: Apache-2.0
"""AdaHessian as a gradient transformation."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.averaging import AveragingRule
from adahessian_jax.checks import check_float, check_float_dtype
from adahessian_jax.curvature_ema import CurvatureEMA, cast_like, zeros_like
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax.eigenbasis import Bases, find_bases, rotate
from adahessian_jax.moving_average import as_dtype, debias, ema, is_static
from adahessian_jax.protocol import Curvature
from adahessian_jax.state import ScaleByAdaHessianState, nan_if_stale


def scale_by_adahessian(
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
    mu_dtype: jax.typing.DTypeLike | None = None,
    nu_dtype: jax.typing.DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale updates by a moving average of the Hessian's diagonal.

    This is :func:`adahessian_jax.adahessian`, which see for the formula and all
    arguments, without weight decay and learning rate.

    Args:
      b1: decay rate of the moving average of the gradient, in [0, 1).
      b2: decay rate of the moving average of the curvature, in [0, 1).
      eps: added to the denominator, at least 0.
      hessian_power: exponent of the curvature in the denominator, above 0.
      hessian_ema: ``"rms"`` or ``"mean"``.
      estimator: a transformation whose update returns the Hessian's diagonal;
        ``hutchinson()`` by default.
      update_interval: estimate on every so many-th update, at least 1.
      initial_refreshes: before that, estimate on each of so many first updates.
      reuse_estimate: let the last estimate enter the average in between as well.
      averaging: a rule ``(path, leaf) -> leaf`` applied to the estimate.
      relative_damping: multiple of each tensor's mean curvature added to its curvature,
        at least 0.
      clip_threshold: bound of the entries of the update, above 0, in the axes in which
        the curvature is diagonal; None for no bound.
      mu_dtype: dtype in which ``mu`` is kept; by default that of the parameter.
      nu_dtype: dtype in which ``nu`` is kept; by default that of the parameter.

    Returns:
      A transformation, with a :class:`ScaleByAdaHessianState`. Its ``update`` takes
      ``obj_fn`` or whatever the estimator needs, or ``hessian_diag``, and returns
      updates of the structure, shapes and dtypes of the incoming ones; parameters that
      are not floating point get an update of zero.

    Raises:
      ValueError: if an argument is out of range; at update, if ``params`` is missing
        or an estimate does not match it.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, optax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> def loss(w): return jnp.sum(jnp.array([1.0, 100.0]) * w**2)
      >>> tx = optax.chain(ah.scale_by_adahessian(), optax.scale(-1.0))
      >>> w = jnp.array([1.0, 1.0])
      >>> state = tx.init(w)
      >>> updates, state = tx.update(jax.grad(loss)(w), state, w, obj_fn=loss)
      >>> optax.apply_updates(w, updates).round(4).tolist()
      [0.0, 0.0]

    References:
      Yao et al., `ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning
      <https://arxiv.org/abs/2006.00719>`_, 2021, algorithm 1
    """
    check_float("b1", b1, 0.0, 1.0)
    check_float("eps", eps, 0.0)
    check_float("hessian_power", hessian_power, 0.0, exclusive=True)
    check_float("relative_damping", relative_damping, 0.0)
    if clip_threshold is not None:
        check_float("clip_threshold", clip_threshold, 0.0, exclusive=True)
    mu_dtype = check_float_dtype("mu_dtype", mu_dtype)
    curvature_ema = CurvatureEMA(
        kind=ScaleByAdaHessianState,
        b2=b2,
        hessian_ema=hessian_ema,
        estimator=estimator,
        update_interval=update_interval,
        initial_refreshes=initial_refreshes,
        reuse_estimate=reuse_estimate,
        averaging=averaging,
        nu_dtype=nu_dtype,
    )
    order = curvature_ema.order

    def init_fn(params: optax.Params) -> ScaleByAdaHessianState:
        state = curvature_ema.init(params, mu=None)
        return state._replace(mu=zeros_like(params, mu_dtype))

    def update_fn(
        updates: optax.Updates,
        state: ScaleByAdaHessianState,
        params: optax.Params | None = None,
        *,
        curvature: Curvature | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdaHessianState]:
        before = state
        state = curvature_ema.update(
            updates, before, params, curvature=curvature, **extra_args
        )
        mu = jax.tree.map(lambda g, m: ema(b1, g, m), updates, before.mu)
        mu_scale = debias(b1, state.count) * nan_if_stale(curvature, before)
        nu_scale = curvature_ema.bias_correction(state)
        # Of the denominator without eps, which is homogeneous in nu.
        scale = nu_scale ** (as_dtype(hessian_power, nu_scale.dtype) / order)
        unset = curvature_ema.unset(state)

        bases = find_bases(state.estimator_state, params)

        def rescale(
            g: Any, p: jax.Array, m: jax.Array, v: jax.Array, q: Bases
        ) -> jax.Array:
            if not is_differentiable(p):
                return jnp.zeros_like(p)
            dtype = accumulation_dtype(m, v)
            m, v = rotate(m.astype(dtype), q), v.astype(dtype)
            h = jnp.sqrt(v) if hessian_ema == "rms" else jnp.abs(v)
            if not is_static(relative_damping, 0):
                h = h + as_dtype(relative_damping, dtype) * jnp.mean(h)
            if not is_static(hessian_power, 1):
                h = h ** as_dtype(hessian_power, dtype)
            numerator = m * (mu_scale / scale).astype(dtype)
            step = numerator / (h + (as_dtype(eps, scale.dtype) / scale).astype(dtype))
            if clip_threshold is not None:
                bound = as_dtype(clip_threshold, dtype)
                step = jnp.clip(step, -bound, bound)
            step = jnp.where(v == unset.astype(dtype), 0, step)
            return rotate(step, q, back=True).astype(g.dtype)

        updates = jax.tree.map(rescale, updates, params, mu, state.nu, bases)
        return updates, state._replace(mu=cast_like(mu, before.mu))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
