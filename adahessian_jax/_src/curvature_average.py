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
from adahessian_jax._src.dtypes import (
    accumulation_dtype,
    is_differentiable,
    map_floats,
    never_estimated,
    no_estimate,
    zeros_like,
)
from adahessian_jax._src.estimator import Curvature, Estimator, as_estimator, declare
from adahessian_jax._src.masking import mask_like
from adahessian_jax._src.moving_average import (
    CurvatureEMA,
    as_dtype,
    debias,
    is_static,
    root,
)
from adahessian_jax._src.xla import cond


@dataclasses.dataclass(frozen=True)
class CurvatureAverage:
    """The moving average of curvature that a transformation divides by.

    The attributes are the arguments of :func:`adahessian_jax.scale_by_adahessian` of
    these names, and ``reuse_estimate``: whether between estimates the last one enters
    the average on every update, as some published forms have it. Otherwise estimates
    alone move the average. It is kept with its bias corrected: its t-th term has the
    weight (1 - b2) / (1 - b2^t), the first the weight 1.

    Entries of an estimate whose contribution to the average is not finite are left out,
    each for itself: the average stays as it was, and ``state.nonfinite`` counts them.
    The average of an entry that never had an estimate is the largest number of its
    dtype, and its update zero.
    """

    b2: ArrayLike
    hessian_ema: str
    estimator: Any
    update_interval: int | Array
    initial_refreshes: int | Array
    averaging: AveragingRule | None
    nu_dtype: Any
    eps: ArrayLike
    hessian_power: ArrayLike
    reuse_estimate: bool = False

    def __post_init__(self) -> None:
        """Check all arguments."""
        checks.check_float("b2", self.b2, 0.0, 1.0)
        checks.check_float("eps", self.eps, 0.0)
        checks.check_float("hessian_power", self.hessian_power, 0.0, exclusive=True)
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
        checks.check_params(params)
        checks.check_real("params", params)
        declare(self)
        warn_if_unused(self.averaging, params)
        return self._initial(params)

    def _initial(self, params: optax.Params) -> CurvatureState:
        like = average(self.averaging, zeros_like(params))
        # An array each: a buffer can be donated once.
        count, refreshes, nonfinite = (jnp.zeros([], jnp.int32) for _ in range(3))
        nu, estimate = (_never_estimated(like, self.nu_dtype) for _ in range(2))
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

    def check(
        self, updates: Any, state: CurvatureState, params: Any, extra_args: Any
    ) -> None:
        """Raise unless an update can be made of these."""
        checks.check_like("updates", updates, params)
        checks.check_spelling(extra_args, _EXTRA_ARGS)
        if "where" in extra_args:
            raise TypeError(
                "unexpected argument where: predict_fn returns (outputs, where)."
            )
        initial = jax.eval_shape(self._initial, params)
        curvature_state.check_state(state, initial, self.fingerprint)

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
        """Return the state moved on, in the bases that it was in."""
        # What stays as it is where there is no estimate.
        stored = state.estimate if self.keeps_estimate else state.nu

        def fresh(estimator_state: Any) -> tuple[optax.Updates, Array, Any]:
            if curvature is not None:
                name, diag = "curvature", curvature.estimate
            elif hessian_diag is not None:
                name, diag = "hessian_diag", hessian_diag
            else:
                name = "the estimator's diagonal"
                args = extra_args | self.handed_on(state)
                estimate = self.estimator.update
                if isinstance(estimate, Estimator):  # before it is rounded
                    args |= {"updates": updates}
                    *_, diag, estimator_state = estimate.value_and_grad(
                        None, estimator_state, params, **args
                    )
                else:
                    diag, estimator_state = estimate(
                        updates, estimator_state, params, **args
                    )
            diag = mask_like(diag, params)
            checks.check_like(name, diag, params)
            axes.check_replicas(diag, params)
            checks.warn_if_flat(diag, updates)
            diag = average(self.averaging, jax.tree.map(_as_estimate, diag, state.nu))
            usable = jax.tree.map(self._is_usable, diag, state.nu)
            nonfinite = curvature_state.saturating_sum(state.nonfinite, usable)
            if not self.keeps_estimate:
                return self._moved(state, diag, usable), nonfinite, estimator_state
            estimate = jax.tree.map(
                lambda ok, d, old: jnp.where(ok, d.astype(old.dtype), old),
                usable,
                diag,
                stored,
            )
            return estimate, nonfinite, estimator_state

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
        stored, nonfinite, estimator_state = cond(refresh, fresh, kept, estimator_state)
        nu = stored
        if self.keeps_estimate:
            known = map_floats(lambda d: ~never_estimated(d), stored)
            nu = self._moved(state, stored, known)
        count = optax.safe_increment(state.count)
        due = (count % self.update_interval == 0) | (count < self.initial_refreshes)
        seen = optax.safe_increment(state.refreshes)
        return CurvatureState(
            count=count,
            refreshes=jnp.where(refresh, seen, state.refreshes),
            nonfinite=nonfinite,
            fingerprint=state.fingerprint,
            nu=nu,
            estimate=stored if self.keeps_estimate else None,
            refresh_due=None if self.always else due,
            estimator_state=estimator_state,
        )

    def denominator(self, v: Array) -> Array:
        """Return what momentum is divided by where the average is v."""
        h = root(v) if self.order == 2 else jnp.abs(v)
        if is_static(self.hessian_power, 0.5):
            h = root(h)
        elif not is_static(self.hessian_power, 1):
            h = h ** as_dtype(self.hessian_power, h.dtype)
        return h + as_dtype(self.eps, h.dtype)

    def _terms(self, state: CurvatureState) -> Array:
        """Return how many times the average has moved."""
        return state.count if self.keeps_estimate else state.refreshes

    def handed_on(self, state: CurvatureState) -> dict[str, CurvatureEMA]:
        """Return the average for a control variate, if it is one of the Hessian."""
        if self.hessian_ema != "mean":
            return {}
        known = map_floats(lambda v: jnp.where(never_estimated(v), 0, v), state.nu)
        return {"curvature_ema": CurvatureEMA(known, self.b2, self._terms(state))}

    def _is_usable(self, d: Array, v: Array) -> Array:
        """Whether what each entry adds to the average is finite in its dtype."""
        if not is_differentiable(v):
            return jnp.ones(v.shape, bool)
        d = d.astype(accumulation_dtype(d, v))
        return jnp.isfinite((d**self.order).astype(v.dtype))

    def _moved(self, state: Any, diag: Any, usable: Any) -> optax.Updates:
        """Return the average moved towards an estimate, where that is usable."""
        correction = debias(self.b2, optax.safe_increment(self._terms(state)))

        def moved(v: Array, d: Array, ok: Array) -> Array:
            dtype, never = accumulation_dtype(d, v), never_estimated(v)
            weight = (1 - as_dtype(self.b2, dtype)) * correction.astype(dtype)
            new = jnp.where(never, 1, weight) * d.astype(dtype) ** self.order
            old = jnp.where(never, 0, 1 - weight) * v.astype(dtype)
            return jnp.where(ok, (new + old).astype(v.dtype), v)

        return map_floats(moved, state.nu, diag, usable)


_EXTRA_ARGS = ("obj_fn", "predict_fn", "labels", "hessian_diag", "curvature", "grad")


def _never_estimated(tree: Any, dtype: Any) -> optax.Updates:
    zeros = zeros_like(tree, dtype)
    return map_floats(lambda x: jnp.full_like(x, no_estimate(x.dtype)), zeros)


def _as_estimate(d: Any, v: Array) -> Array:
    """Return an estimate of any dtype as numbers that can be averaged."""
    d = jnp.asarray(d)
    if not is_differentiable(v):
        return d
    return d.astype(accumulation_dtype(d if is_differentiable(d) else v))
