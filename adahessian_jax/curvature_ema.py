# SPDX-License-Identifier: Apache-2.0
"""When curvature is estimated, and how estimates enter their moving average."""

import dataclasses
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
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
    check_spelling,
    check_structure,
)
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax.estimators import hutchinson
from adahessian_jax.masking import mask_like
from adahessian_jax.moving_average import HessianEMA, as_dtype, debias
from adahessian_jax.protocol import Curvature, as_estimator, check_same_estimator
from adahessian_jax.state import CurvatureState, check_curvature, check_state


@dataclasses.dataclass(frozen=True)
class CurvatureEMA:
    """The moving average of curvature that a transformation divides by.

    The attributes are the arguments of :func:`adahessian_jax.scale_by_adahessian` of
    these names, and ``kind``, the type of the transformation's state, in which the
    average lives.

    Entries of an estimate whose contribution to the average is not finite are left out,
    each for itself: the average's bias-corrected value stays as it was, an entry that
    was never estimated is not updated, and ``state.nonfinite`` counts them.
    """

    kind: type[CurvatureState]
    b2: jax.typing.ArrayLike
    hessian_ema: str
    estimator: Any
    update_interval: int | jax.Array
    initial_refreshes: int | jax.Array
    reuse_estimate: bool
    averaging: AveragingRule | None
    nu_dtype: Any

    def __post_init__(self) -> None:
        """Check all arguments, and fill in the default estimator."""
        check_float("b2", self.b2, 0.0, 1.0)
        check_choice("hessian_ema", self.hessian_ema, ("rms", "mean"))
        check_int("update_interval", self.update_interval, 1, traceable=True)
        check_int("initial_refreshes", self.initial_refreshes, 0, traceable=True)
        check_flag("reuse_estimate", self.reuse_estimate)
        if self.averaging is not None:
            check_callable("averaging", self.averaging, "(path, leaf) -> leaf")
        nu_dtype = check_float_dtype("nu_dtype", self.nu_dtype)
        estimator = hutchinson() if self.estimator is None else self.estimator
        object.__setattr__(self, "nu_dtype", nu_dtype)
        object.__setattr__(self, "estimator", as_estimator(estimator))

    @property
    def always(self) -> bool:
        """Whether every update estimates, so that nothing is decided while running."""
        return isinstance(self.update_interval, int) and self.update_interval == 1

    @property
    def keeps_estimate(self) -> bool:
        """Whether the state holds the last estimate."""
        return self.reuse_estimate and not self.always

    @property
    def order(self) -> int:
        """The power of the estimate that is averaged."""
        return 2 if self.hessian_ema == "rms" else 1

    def init(self, params: optax.Params, **fields: Any) -> Any:
        """Return a state, given the fields that are the transformation's own."""
        check_real("params", params)
        _warn_if_unused(self.averaging, params)
        nu = zeros_like(_average(self.averaging, zeros_like(params)), self.nu_dtype)
        return self.kind(
            count=jnp.zeros([], jnp.int32),
            refreshes=jnp.zeros([], jnp.int32),
            nonfinite=jnp.zeros([], jnp.int32),
            nu=nu,
            hessian_diag=zeros_like(nu) if self.keeps_estimate else None,
            refresh_due=None if self.always else jnp.array(True),
            estimator_state=self.estimator.init(params),
            **fields,
        )

    def update(
        self,
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None,
        *,
        hessian_diag: optax.Updates | None = None,
        curvature: Curvature | None = None,
        **extra_args: Any,
    ) -> Any:
        """Return the state moved on, all but the transformation's own fields."""
        check_params(params)
        check_like("updates", updates, params)
        check_spelling(extra_args, _EXTRA_ARGS)
        check_state(
            state,
            params,
            self.kind,
            always=self.always,
            keeps_estimate=self.keeps_estimate,
        )
        self._check_shapes(state, params)
        check_same_estimator(
            "state", state.estimator_state, jax.eval_shape(self.estimator.init, params)
        )
        if self.hessian_ema == "mean":
            extra_args["hessian_ema"] = HessianEMA(
                state.nu, self.b2, self._terms(state)
            )

        def fresh(estimator_state: Any) -> tuple[optax.Updates, jax.Array, Any]:
            if curvature is not None:
                name, diag = "curvature", curvature.hessian_diag
            elif hessian_diag is not None:
                name, diag = "hessian_diag", hessian_diag
            else:
                name = "the estimator's diagonal"
                diag, estimator_state = self.estimator.update(
                    updates, estimator_state, params, **extra_args
                )
            diag = mask_like(diag, params)
            check_like(name, diag, params)
            diag = cast_like(_average(self.averaging, diag), state.nu)
            usable = jax.tree.map(self._is_usable, diag, state.nu)
            nonfinite = _saturating_sum(state.nonfinite, usable)
            if self.keeps_estimate:
                chosen = jax.tree.map(jnp.where, usable, diag, state.hessian_diag)
            else:
                chosen = self._moved(state, diag, usable)
            return chosen, nonfinite, estimator_state

        def kept(estimator_state: Any) -> tuple[optax.Updates, jax.Array, Any]:
            chosen = state.hessian_diag if self.keeps_estimate else state.nu
            return chosen, state.nonfinite, estimator_state

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
            result = (fresh if refresh else kept)(estimator_state)
        else:
            result = jax.lax.cond(refresh, fresh, kept, estimator_state)
        nu, nonfinite, estimator_state = result
        kept_diag = None
        if self.keeps_estimate:
            kept_diag = nu
            nu = self._moved(state, nu, jax.tree.map(lambda _: True, nu))
        count = optax.safe_increment(state.count)
        return state._replace(
            count=count,
            refreshes=jnp.where(
                refresh, optax.safe_increment(state.refreshes), state.refreshes
            ),
            nonfinite=nonfinite,
            nu=nu,
            hessian_diag=kept_diag,
            refresh_due=None
            if self.always
            else (count % self.update_interval == 0) | (count < self.initial_refreshes),
            estimator_state=estimator_state,
        )

    def bias_correction(self, state: CurvatureState) -> jax.Array:
        """Return the factor that ``state.nu`` is to be multiplied by."""
        return debias(self.b2, self._terms(state))

    def _terms(self, state: CurvatureState) -> jax.Array:
        return state.count if self.reuse_estimate else state.refreshes

    def _check_shapes(self, state: CurvatureState, params: optax.Params) -> None:
        """Raise unless the average has the shapes that averaging leaves."""
        check_structure("state.nu", state.nu, params)
        averaged = jax.eval_shape(
            lambda p: _average(self.averaging, zeros_like(p)), params
        )
        trees = state.nu, averaged
        shapes, expected = ([x.shape for x in jax.tree.leaves(t)] for t in trees)
        if shapes != expected:
            raise ValueError(
                "state must come from an optimizer with the same averaging: its nu has"
                f" the shapes {shapes}, this one's averages have {expected}. Make a new"
                " state by tx.init(params)."
            )

    def _is_usable(self, d: jax.Array, v: jax.Array) -> jax.Array:
        """Whether what each entry adds to the average is finite in its dtype."""
        if not is_differentiable(v):
            return jnp.ones(v.shape, bool)
        wide = d.astype(accumulation_dtype(d, v))
        return jnp.isfinite((wide**self.order).astype(v.dtype))

    def _moved(
        self, state: Any, diag: optax.Updates, usable: optax.Updates
    ) -> optax.Updates:
        """Return the average moved towards an estimate, where that is usable."""
        terms = self._terms(state)
        correction = debias(self.b2, jnp.maximum(terms, 1))
        seen = 1 / debias(self.b2, optax.safe_increment(terms))
        unset = self.unset(state)

        def moved(d: jax.Array, v: jax.Array, ok: Any) -> jax.Array:
            if not is_differentiable(v):
                return v
            wide = accumulation_dtype(d, v)
            d, old = d.astype(wide), v.astype(wide)
            b = as_dtype(self.b2, wide)
            # What leaves the bias-corrected average as it is, if there is nothing new.
            new = jnp.where(ok, d**self.order, old * correction.astype(wide))
            weight = jnp.where(v == unset, seen.astype(wide), 1 - b)
            return (weight * new + b * old).astype(v.dtype)

        return jax.tree.map(moved, diag, state.nu, usable)

    def unset(self, state: CurvatureState) -> jax.Array:
        """Return the value in ``state.nu`` of an entry that never had an estimate.

        It is infinite, which none has, as long as all estimates were usable: a zero is
        an average like any other then.
        """
        return jnp.where(state.nonfinite > 0, 0.0, jnp.inf)


_EXTRA_ARGS = ("obj_fn", "predict_fn", "output_loss", "hessian_diag", "curvature")


def zeros_like(tree: Any, dtype: Any = None) -> optax.Updates:
    """Return zeros, sharded like ``tree``, its floating-point leaves in ``dtype``."""

    def zeros(x: Any) -> jax.Array:
        return jnp.zeros_like(x, dtype=dtype if is_differentiable(x) else None)

    return jax.tree.map(zeros, tree)


def cast_like(tree: optax.Updates, like: optax.Updates) -> optax.Updates:
    """Return ``tree`` in the dtypes of ``like``."""
    return jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), tree, like)


def _saturating_sum(total: jax.Array, usable: optax.Updates) -> jax.Array:
    """Add how many entries are not usable."""
    new = jnp.zeros_like(total)
    for x in jax.tree.leaves(usable):
        size = np.int64(x.size).astype(total.dtype)  # may wrap around, as the sum does
        new = new + (size - jnp.sum(x, dtype=total.dtype))
    largest = jnp.iinfo(total.dtype).max
    return jnp.where(new > largest - total, largest, total + new)


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
            stacklevel=4,
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
