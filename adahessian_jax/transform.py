# SPDX-License-Identifier: Apache-2.0
"""AdaHessian as a gradient transformation."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.averaging import AveragingRule
from adahessian_jax.checks import (
    check_callable,
    check_choice,
    check_flag,
    check_float,
    check_float_dtype,
    check_int,
    check_like,
    check_params,
    check_real,
)
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax.estimators import hutchinson
from adahessian_jax.masking import mask_like
from adahessian_jax.moving_average import HessianEMA, as_dtype, debias, ema
from adahessian_jax.protocol import Curvature, as_estimator, check_same_estimator
from adahessian_jax.state import ScaleByAdaHessianState, check_curvature, check_state


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
    check_float("b2", b2, 0.0, 1.0)
    check_float("eps", eps, 0.0)
    check_float("hessian_power", hessian_power, 0.0, exclusive=True)
    check_choice("hessian_ema", hessian_ema, ("rms", "mean"))
    check_int("update_interval", update_interval, 1, traceable=True)
    check_int("initial_refreshes", initial_refreshes, 0, traceable=True)
    check_flag("reuse_estimate", reuse_estimate)
    check_float("relative_damping", relative_damping, 0.0)
    if averaging is not None:
        check_callable("averaging", averaging, "(path, leaf) -> leaf")
    mu_dtype = check_float_dtype("mu_dtype", mu_dtype)
    nu_dtype = check_float_dtype("nu_dtype", nu_dtype)
    estimator = as_estimator(hutchinson() if estimator is None else estimator)
    always = isinstance(update_interval, int) and update_interval == 1
    keep_estimate = reuse_estimate and not always
    order = 2 if hessian_ema == "rms" else 1

    def init_fn(params: optax.Params) -> ScaleByAdaHessianState:
        check_real("params", params)
        _warn_if_unused(averaging, params)
        nu = _zeros_like(_average(averaging, _zeros_like(params)), nu_dtype)
        return ScaleByAdaHessianState(
            count=jnp.zeros([], jnp.int32),
            refreshes=jnp.zeros([], jnp.int32),
            mu=_zeros_like(params, mu_dtype),
            nu=nu,
            hessian_diag=_zeros_like(nu) if keep_estimate else None,
            refresh_due=None if always else jnp.array(True),
            estimator_state=estimator.init(params),
        )

    def update_fn(
        updates: optax.Updates,
        state: ScaleByAdaHessianState,
        params: optax.Params | None = None,
        *,
        hessian_diag: optax.Updates | None = None,
        curvature: Curvature | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByAdaHessianState]:
        check_params(params)
        check_like("updates", updates, params)
        check_state(state, params, always=always, keeps_estimate=keep_estimate)
        check_same_estimator(
            "state", state.estimator_state, jax.eval_shape(estimator.init, params)
        )
        if hessian_ema == "mean":
            seen = state.count if reuse_estimate else state.refreshes
            extra_args["hessian_ema"] = HessianEMA(state.nu, b2, seen)

        def averaged(name: str, diag: optax.Updates) -> optax.Updates:
            diag = mask_like(diag, params)
            check_like(name, diag, params)
            diag = _average(averaging, diag)
            shapes, expected = (
                [jnp.shape(x) for x in jax.tree.leaves(tree)]
                for tree in (state.nu, diag)
            )
            if shapes != expected:
                raise ValueError(
                    "state must come from an optimizer with the same averaging: its nu"
                    f" has the shapes {shapes}, this one's averages have {expected}."
                    " Make a new state by tx.init(params)."
                )
            return _cast_like(diag, state.nu)

        def accumulate(diag: optax.Updates) -> optax.Updates:
            nu = jax.tree.map(lambda d, v: ema(b2, d, v, order), diag, state.nu)
            return _cast_like(nu, state.nu)

        def fresh(estimator_state: Any) -> tuple[optax.Updates, Any]:
            if curvature is not None:
                diag = averaged("curvature", curvature.hessian_diag)
            elif hessian_diag is not None:
                diag = averaged("hessian_diag", hessian_diag)
            else:
                diag, estimator_state = estimator.update(
                    updates, estimator_state, params, **extra_args
                )
                diag = averaged("the estimator's diagonal", diag)
            return diag if keep_estimate else accumulate(diag), estimator_state

        def kept(estimator_state: Any) -> tuple[optax.Updates, Any]:
            return state.hessian_diag if keep_estimate else state.nu, estimator_state

        refresh: bool | jax.Array | None = state.refresh_due
        estimator_state = state.estimator_state
        if curvature is not None:
            check_curvature(curvature, state)
            estimator_state = curvature.estimator_state
            if curvature.refreshed is None or refresh is None:
                refresh = curvature.hessian_diag is not None
            else:  # estimated, but maybe for another group of parameters
                refresh = refresh & curvature.refreshed
        elif refresh is None:
            refresh = True
        if isinstance(refresh, bool):
            chosen, estimator_state = (fresh if refresh else kept)(estimator_state)
        else:
            chosen, estimator_state = jax.lax.cond(
                refresh, fresh, kept, estimator_state
            )
        nu = accumulate(chosen) if keep_estimate else chosen
        mu = jax.tree.map(lambda g, m: ema(b1, g, m, 1), updates, state.mu)
        count = optax.safe_increment(state.count)
        refreshes = jnp.where(
            refresh, optax.safe_increment(state.refreshes), state.refreshes
        )
        mu_scale = debias(b1, count)
        if curvature is not None:
            # Nothing can be raised inside jit: a mistake must not pass unnoticed.
            mu_scale = jnp.where(curvature.count == state.count, mu_scale, jnp.nan)
        nu_scale = debias(b2, count if reuse_estimate else refreshes)

        def rescale(g: Any, p: jax.Array, m: jax.Array, v: jax.Array) -> jax.Array:
            if not is_differentiable(p):
                return jnp.zeros_like(p)
            m, v = (x.astype(accumulation_dtype(m, v)) for x in (m, v))
            v = v * nu_scale.astype(v.dtype)
            h = jnp.sqrt(v) if hessian_ema == "rms" else jnp.abs(v)
            if not _is_static(relative_damping, 0):
                h = h + as_dtype(relative_damping, h.dtype) * jnp.mean(h)
            if not _is_static(hessian_power, 1):
                h = h ** as_dtype(hessian_power, h.dtype)
            step = m * mu_scale.astype(m.dtype) / (h + as_dtype(eps, h.dtype))
            return step.astype(g.dtype)

        return jax.tree.map(rescale, updates, params, mu, nu), ScaleByAdaHessianState(
            count=count,
            refreshes=refreshes,
            mu=_cast_like(mu, state.mu),
            nu=nu,
            hessian_diag=chosen if keep_estimate else None,
            refresh_due=None
            if always
            else (count % update_interval == 0) | (count < initial_refreshes),
            estimator_state=estimator_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _warn_if_unused(averaging: AveragingRule | None, params: optax.Params) -> None:
    if averaging is None:
        return
    untouched = []

    def noting(path: Any, leaf: jax.Array) -> jax.Array:
        averaged = averaging(path, leaf)
        untouched.append(averaged is leaf)
        return averaged

    jax.eval_shape(lambda p: _average(noting, p), params)
    if untouched and all(untouched):
        first, _ = jax.tree_util.tree_leaves_with_path(params)[0]
        warnings.warn(
            f"averaging applies to none of the {len(untouched)} parameters, such as"
            f" {jax.tree_util.keystr(first)}. Tell the rule which leaves are meant,"
            " with is_conv= for conv_spatial_average.",
            stacklevel=3,
        )


def _average(averaging: AveragingRule | None, diag: optax.Updates) -> optax.Updates:
    """Apply an averaging rule to the floating-point leaves of an estimate."""
    if averaging is None:
        return diag

    def one(path: Any, leaf: jax.Array) -> jax.Array:
        if not is_differentiable(leaf):
            return leaf
        averaged = averaging(path, leaf)
        shape = jnp.shape(averaged)
        try:
            fits = jnp.broadcast_shapes(shape, leaf.shape) == leaf.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                "averaging must return a leaf that broadcasts to the shape of the"
                f" parameter, got {shape} for {jax.tree_util.keystr(path)} of shape"
                f" {leaf.shape}."
            )
        return averaged

    return jax.tree_util.tree_map_with_path(one, diag)


def _zeros_like(tree: Any, dtype: Any = None) -> optax.Updates:
    def zeros(x: Any) -> jax.Array:  # sharded like x
        return jnp.zeros_like(x, dtype=dtype if is_differentiable(x) else None)

    return jax.tree.map(zeros, tree)


def _is_static(value: jax.typing.ArrayLike, number: float) -> bool:
    return isinstance(value, int | float) and value == number


def _cast_like(tree: optax.Updates, like: optax.Updates) -> optax.Updates:
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)
