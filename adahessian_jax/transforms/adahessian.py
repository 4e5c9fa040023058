# SPDX-License-Identifier: Apache-2.0
"""AdaHessian as a gradient transformation."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike, DTypeLike

from adahessian_jax._src.averaging_rule import AveragingRule
from adahessian_jax._src.checks import (
    check_flag,
    check_float,
    check_float_dtype,
    check_like,
    check_params,
    check_state_type,
)
from adahessian_jax._src.curvature_average import CurvatureAverage
from adahessian_jax._src.curvature_state import CurvatureState, nan_if_unfit
from adahessian_jax._src.dtypes import (
    accumulation_dtype,
    is_differentiable,
    map_floats,
    never_estimated,
    zeros_like,
)
from adahessian_jax._src.estimator import Estimator
from adahessian_jax._src.meshes import check_sharded_alike
from adahessian_jax._src.moving_average import as_dtype, debias, ema
from adahessian_jax._src.orthogonal import rotate_tree
from adahessian_jax._src.xla import read_first
from adahessian_jax.estimators.eigenbasis import find_bases
from adahessian_jax.estimators.hutchinson import hutchinson


class ScaleByAdaHessianState(NamedTuple):
    """State of the AdaHessian transformation.

    Attributes:
      mu: moving average of the gradient, in the axes of the curvature; structure and
        shapes of the parameters.
      curvature: the average of the curvature, and what moves it on.
    """

    mu: optax.Updates
    curvature: CurvatureState


def scale_by_adahessian(
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
    mu_dtype: DTypeLike | None = None,
    nu_dtype: DTypeLike | None = None,
) -> optax.GradientTransformationExtraArgs:
    """Rescale updates by a moving average of the Hessian's diagonal.

    This is :func:`adahessian_jax.adahessian`, which see for the formula and arguments,
    without weight decay and learning rate.

    Args:
      b1: decay rate of the moving average of the gradient, in [0, 1).
      b2: decay rate of the moving average of the curvature, in [0, 1).
      eps: added to the denominator, at least 0.
      hessian_power: exponent of the curvature in the denominator, above 0.
      hessian_ema: ``"rms"`` or ``"mean"``.
      estimator: its update returns the Hessian's diagonal; ``hutchinson()`` by default.
      update_interval: estimate on every so many-th update, at least 1.
      initial_refreshes: before that, estimate on each of so many first updates.
      averaging: a rule ``(path, leaf) -> leaf`` applied to the estimate.
      clip_threshold: bound of the update's entries, above 0, in the axes in which the
        curvature is diagonal; None for no bound.
      nesterov: look one step ahead with the average of the gradient, as in NAdam.
      mu_dtype: dtype in which ``mu`` is kept; by default that of the parameter.
      nu_dtype: dtype in which ``nu`` is kept; by default that of the parameter.

    Returns:
      A transformation, with a :class:`.ScaleByAdaHessianState`. Its ``update`` takes
      ``obj_fn`` or whatever the estimator needs, or ``hessian_diag``, and returns
      updates of the structure, shapes and dtypes of the incoming ones, zero for
      parameters that are not floating point.

    Raises:
      ValueError: if an argument is out of range; at update, if ``params`` is missing or
        an estimate does not match it.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, optax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> def loss(w): return jnp.sum(jnp.array([1.0, 100.0]) * w**2)
      >>> tx, w = optax.chain(ah.scale_by_adahessian(), optax.scale(-1.0)), jnp.ones(2)
      >>> updates, state = tx.update(jax.grad(loss)(w), tx.init(w), w, obj_fn=loss)
      >>> optax.apply_updates(w, updates).round(4).tolist()
      [0.0, 0.0]

    References:
      Yao et al., `ADAHESSIAN <https://arxiv.org/abs/2006.00719>`_, 2021, algorithm 1
    """
    if estimator is None:
        estimator = hutchinson()
    average = CurvatureAverage(
        b2,
        hessian_ema,
        estimator,
        update_interval,
        initial_refreshes,
        averaging,
        nu_dtype,
        eps,
        hessian_power,
    )
    return divide_by(average, b1, clip_threshold, nesterov, mu_dtype)


def divide_by(
    curvature_average: CurvatureAverage,
    b1: Any,
    clip_threshold: Any = None,
    nesterov: Any = False,
    mu_dtype: Any = None,
) -> optax.GradientTransformationExtraArgs:
    """Divide an average of the gradient by one of curvature, of any kind."""
    check_float("b1", b1, 0.0, 1.0)
    if clip_threshold is not None:
        check_float("clip_threshold", clip_threshold, 0.0, exclusive=True)
    check_flag("nesterov", nesterov)
    mu_dtype = check_float_dtype("mu_dtype", mu_dtype)

    def init_fn(params: optax.Params) -> ScaleByAdaHessianState:
        curvature = curvature_average.init(params)
        estimate = curvature_average.estimator.update
        if any(find_bases(curvature)) and not isinstance(estimate, Estimator):
            raise ValueError(
                "estimator must not be in_eigenbasis(...) inside of something else, or"
                " nothing turns its axes: pass in_eigenbasis(...) itself, and what is"
                " to be around it inside."
            )
        return ScaleByAdaHessianState(zeros_like(params, mu_dtype), curvature)

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, ScaleByAdaHessianState]:
        check_params(params)
        check_state_type(state, ScaleByAdaHessianState)
        check_like("state.mu", state.mu, params)
        bases = find_bases(state.curvature)
        if any(bases) and extra_args.get("hessian_diag") is not None:
            raise ValueError(
                "hessian_diag must not be given to an optimizer in turned axes: it is"
                " the diagonal in the parameters' own. Pass what the estimator needs,"
                " predict_fn, or use an estimator that is not in_eigenbasis(...)."
            )
        curvature_average.check(updates, state.curvature, params, extra_args)
        check_sharded_alike("state.mu", state.mu, updates)
        check_sharded_alike("state.curvature.nu", state.curvature.nu, updates)
        turned = rotate_tree(updates, bases)
        mu = jax.tree.map(lambda g, m: ema(b1, g, m), turned, state.mu)
        kept = jax.tree.map(lambda m, old: jnp.asarray(m, old.dtype), mu, state.mu)
        average = curvature_average.update(
            updates, state.curvature, params, **extra_args
        )
        mu_scale = debias(b1, average.count)
        if nesterov:
            later = debias(b1, optax.safe_increment(average.count)) / mu_scale
            mu = jax.tree.map(
                lambda g, m: ema(b1, g, m * later.astype(m.dtype)), turned, mu
            )
        kind = state.curvature, curvature_average.fingerprint
        mu_scale *= nan_if_unfit(*kind, extra_args.get("curvature"))

        def rescale(p: Array, m: Array, v: Array) -> Array:
            if not is_differentiable(p):
                return jnp.zeros_like(p)
            dtype, never = accumulation_dtype(m, v), never_estimated(v)
            m, v = m.astype(dtype), v.astype(dtype)
            # A gradient that is NaN stays so.
            numerator = m * jnp.where(never, 0, mu_scale.astype(dtype))
            step = numerator / curvature_average.denominator(v)
            if clip_threshold is not None:
                bound = as_dtype(clip_threshold, dtype)
                step = jnp.clip(step, -bound, bound)
            return step

        steps = jax.tree.map(rescale, params, mu, average.nu)
        if any(bases):
            steps, kept, nu = read_first(steps, kept, average.nu)
            steps = rotate_tree(steps, bases, back=True)
            (kept, nu), inner = curvature_average.estimator.update.observe(
                updates, turned, average.estimator_state, (kept, nu), average.count
            )
            average = average._replace(nu=nu, estimator_state=inner)
        steps = map_floats(lambda x, g: x.astype(g.dtype), steps, updates)
        return steps, ScaleByAdaHessianState(kept, average)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
