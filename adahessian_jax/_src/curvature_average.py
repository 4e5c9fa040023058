# SPDX-License-Identifier: Apache-2.0
"""When curvature is estimated, and how estimates enter their moving average."""

import dataclasses
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src import axes, checks, curvature_state
from adahessian_jax._src.averaging_rule import AveragingRule, average, warn_if_unused
from adahessian_jax._src.curvature_state import CurvatureState
from adahessian_jax._src.dtypes import accumulation_dtype, is_differentiable, map_floats
from adahessian_jax._src.estimator import Curvature, as_estimator, declare
from adahessian_jax._src.masking import mask_like
from adahessian_jax._src.moving_average import CurvatureEMA, as_dtype, debias, is_static
from adahessian_jax._src.xla import cond


@dataclasses.dataclass(frozen=True)
class CurvatureAverage:
    """The moving average of curvature that a transformation divides by.

    The attributes are the arguments of :func:`adahessian_jax.scale_by_adahessian` of
    these names, and ``reuse_estimate``: whether between estimates the last one enters
    the average on every update, as some published forms have it. Otherwise estimates
    alone move the average, and its bias is corrected by their number.

    Entries of an estimate whose contribution to the average is not finite are left out,
    each for itself: the average's bias-corrected value stays as it was, and
    ``state.nonfinite`` counts them. The average of an entry that never had an estimate
    is infinite, and so an update that is divided by it zero.
    """

    b2: ArrayLike
    hessian_ema: str
    estimator: Any
    update_interval: int | Array
    initial_refreshes: int | Array
    averaging: AveragingRule | None
    nu_dtype: Any
    reuse_estimate: bool = False

    def __post_init__(self) -> None:
        """Check all arguments."""
        checks.check_float("b2", self.b2, 0.0, 1.0)
        checks.check_choice("hessian_ema", self.hessian_ema, ("rms", "mean"))
        checks.check_int("update_interval", self.update_interval, 1, traceable=True)
        checks.check_int("initial_refreshes", self.initial_refreshes, 0, traceable=True)
        if self.averaging is not None:
            checks.check_callable("averaging", self.averaging, "(path, leaf) -> leaf")
        nu_dtype = checks.check_float_dtype("nu_dtype", self.nu_dtype)
        object.__setattr__(self, "nu_dtype", nu_dtype)
        object.__setattr__(self, "estimator", as_estimator(self.estimator))

    @property
    def always(self) -> bool:
        """Whether every update estimates, so that nothing is decided while running."""
        return is_static(self.update_interval, 1)

    @property
    def keeps_estimate(self) -> bool:
        """Whether the state holds the last estimate."""
        return self.reuse_estimate and not self.always

    @property
    def order(self) -> int:
        """The power of the estimate that is averaged."""
        return 2 if self.hessian_ema == "rms" else 1

    @property
    def fingerprint(self) -> Array:
        """By what a state of another kind of average or estimate is known."""
        kind = f"{self.hessian_ema} {getattr(self.estimator.update, 'kind', '')}"
        return jnp.uint32(zlib.crc32(kind.encode()))

    def init(self, params: optax.Params) -> CurvatureState:
        """Return the initial state."""
        checks.check_real("params", params)
        declare(self)
        warn_if_unused(self.averaging, params)
        return self._initial(params)

    def _initial(self, params: optax.Params) -> CurvatureState:
        like = average(self.averaging, zeros_like(params))
        # An array each: a buffer can be donated once.
        count, refreshes, nonfinite = (jnp.zeros([], jnp.int32) for _ in range(3))
        nu, estimate = (_full_like(like, jnp.inf, self.nu_dtype) for _ in range(2))
        return CurvatureState(
            count,
            refreshes,
            nonfinite,
            self.fingerprint,
            nu,
            estimate if self.keeps_estimate else None,
            None if self.always else jnp.array(True),
            self.estimator.init(params),
        )

    def update(
        self,
        updates: optax.Updates,
        state: CurvatureState,
        params: Any,
        *,
        hessian_diag: Any = None,
        curvature: Curvature | None = None,
        **extra_args: Any,
    ) -> CurvatureState:
        """Return the state moved on."""
        checks.check_params(params)
        checks.check_like("updates", updates, params)
        checks.check_spelling(extra_args, _EXTRA_ARGS)
        initial = jax.eval_shape(self._initial, params)
        curvature_state.check_state(state, initial, self.fingerprint)
        stored = state.estimate if self.keeps_estimate else state.nu

        def fresh(estimator_state: Any) -> tuple[optax.Updates, Array, Any]:
            if curvature is not None:
                name, diag = "curvature", curvature.estimate
            elif hessian_diag is not None:
                name, diag = "hessian_diag", hessian_diag
            else:
                name = "the estimator's diagonal"
                args = {**extra_args, **self.handed_on(state)}
                diag, estimator_state = self.estimator.update(
                    updates, estimator_state, params, **args
                )
            diag = mask_like(diag, params)
            checks.check_like(name, diag, params)
            axes.check_replicas(diag, params)
            diag = average(self.averaging, jax.tree.map(_as_estimate, diag, state.nu))
            diag = jax.tree.map(lambda d, v: d.astype(v.dtype), diag, state.nu)
            usable = jax.tree.map(self._is_usable, diag, state.nu)
            nonfinite = _saturating_sum(state.nonfinite, usable)
            if self.keeps_estimate:
                new = jax.tree.map(jnp.where, usable, diag, stored)
            else:
                new = self._moved(state, diag, usable)
            return new, nonfinite, estimator_state

        def kept(estimator_state: Any) -> tuple[optax.Updates, Array, Any]:
            return stored, state.nonfinite, estimator_state

        refresh: Any = True if self.always else state.refresh_due
        estimator_state = state.estimator_state
        if curvature is not None:
            curvature_state.check_curvature(curvature, state)
            estimator_state = curvature.estimator_state
            if self.always or curvature.refreshed is None:
                refresh = curvature.estimate is not None
            else:  # estimated, but maybe for another group of parameters
                refresh = refresh & curvature.refreshed
        nu, nonfinite, estimator_state = cond(refresh, fresh, kept, estimator_state)
        estimate = None
        if self.keeps_estimate:
            nu, estimate = self._moved(state, nu, jax.tree.map(lambda _: True, nu)), nu
        count = optax.safe_increment(state.count)
        due = (count % self.update_interval == 0) | (count < self.initial_refreshes)
        seen = optax.safe_increment(state.refreshes)
        return CurvatureState(
            count=count,
            refreshes=jnp.where(refresh, seen, state.refreshes),
            nonfinite=nonfinite,
            fingerprint=state.fingerprint,
            nu=nu,
            estimate=estimate,
            refresh_due=None if self.always else due,
            estimator_state=estimator_state,
        )

    def bias_correction(self, state: CurvatureState) -> Array:
        """Return the factor that ``state.nu`` is to be multiplied by."""
        return debias(self.b2, self._terms(state))

    def _terms(self, state: CurvatureState) -> Array:
        """Return how many times the average has moved."""
        return state.count if self.keeps_estimate else state.refreshes

    def handed_on(self, state: CurvatureState) -> dict[str, CurvatureEMA]:
        """Return the average for a control variate, if it is one of the Hessian."""
        if self.hessian_ema != "mean":
            return {}
        known = jax.tree.map(lambda v: jnp.where(jnp.isinf(v), 0, v), state.nu)
        return {"curvature_ema": CurvatureEMA(known, self.b2, self._terms(state))}

    def _is_usable(self, d: Array, v: Array) -> Array:
        """Whether what each entry adds to the average is finite in its dtype."""
        if not is_differentiable(v):
            return jnp.ones(v.shape, bool)
        d = d.astype(accumulation_dtype(d, v))
        return jnp.isfinite((d**self.order).astype(v.dtype))

    def _moved(self, state: Any, diag: Any, usable: Any) -> optax.Updates:
        """Return the average moved towards an estimate, where that is usable."""
        terms = self._terms(state)
        correction = debias(self.b2, jnp.maximum(terms, 1))
        seen = 1 / debias(self.b2, optax.safe_increment(terms))

        def moved(v: Array, d: Array, ok: Any) -> Array:
            dtype = accumulation_dtype(d, v)
            d, old = d.astype(dtype), v.astype(dtype)
            b, never = as_dtype(self.b2, dtype), old == jnp.inf
            # What leaves the bias-corrected average as it is, if there is nothing new.
            new = jnp.where(ok, d**self.order, old * correction.astype(dtype))
            weight = jnp.where(never, seen.astype(dtype), 1 - b)
            return (weight * new + jnp.where(never, 0, b * old)).astype(v.dtype)

        return map_floats(moved, state.nu, diag, usable)


_EXTRA_ARGS = ("obj_fn", "predict_fn", "labels", "hessian_diag", "curvature", "grad")


def zeros_like(tree: Any, dtype: Any = None) -> optax.Updates:
    """Return zeros, sharded like ``tree``, its floating-point leaves in ``dtype``."""
    return _full_like(tree, 0, dtype)


def _full_like(tree: Any, number: float, dtype: Any) -> optax.Updates:
    """Return a number for each floating-point entry, and zeros for others."""

    def full(x: Any) -> Array:
        if not is_differentiable(x):
            return jnp.zeros_like(x)
        return jnp.full_like(x, number, dtype=dtype)

    return jax.tree.map(full, tree)


def _as_estimate(d: Any, v: Array) -> Array:
    """Return an estimate of any dtype as numbers that can be averaged."""
    d = jnp.asarray(d)
    if not is_differentiable(v):
        return d
    return d.astype(accumulation_dtype(d if is_differentiable(d) else v))


def _saturating_sum(total: Array, usable: optax.Updates) -> Array:
    """Add how many entries are not usable."""
    new = jnp.zeros_like(total)
    for x in jax.tree.leaves(usable):
        new = new + jnp.sum(~x, dtype=total.dtype)
    largest = jnp.iinfo(total.dtype).max
    return jnp.where(new > largest - total, largest, total + new)
