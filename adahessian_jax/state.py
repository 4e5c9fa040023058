# SPDX-License-Identifier: Apache-2.0
"""The optimizer's state: how to find it, and what fits it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.checks import check_like, raise_if
from adahessian_jax.protocol import Curvature, check_same_estimator


class ScaleByAdaHessianState(NamedTuple):
    """State of the AdaHessian transformation.

    Checkpoints of it stay readable within a minor version. A version that adds, drops
    or renames a field says so in the changelog under "State", with what to put in its
    place; a state of another configuration is refused by ``update``.

    Attributes:
      count: number of updates so far, shape (), int32.
      refreshes: number of estimates so far, shape (), int32.
      nonfinite: how many entries of estimates were left out, because they, or their
        squares with ``"rms"``, were not finite, shape (), int32.
      mu: moving average of the gradient; structure and shapes of the parameters.
      nu: moving average of the curvature, not bias-corrected; structure of the
        parameters, at the size that averaging leaves.
      hessian_diag: the last estimate, at that size, if it enters the average again.
      refresh_due: whether the next update estimates, bool of shape (); None if every
        one does.
      estimator_state: the estimator's state.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    refreshes: jax.Array
    nonfinite: jax.Array
    mu: optax.Updates
    nu: optax.Updates
    hessian_diag: optax.Updates | None
    refresh_due: jax.Array | None
    estimator_state: optax.OptState


class ScaleByRelativeCurvatureState(NamedTuple):
    """State of the transformation by relative curvature.

    Attributes:
      count: number of updates so far, shape (), int32.
      refreshes: number of estimates so far, shape (), int32.
      nonfinite: how many entries of estimates were left out, because they, or their
        squares with ``"rms"``, were not finite, shape (), int32.
      nu: moving average of the curvature, not bias-corrected; structure of the
        parameters, at the size that averaging leaves.
      hessian_diag: the last estimate, at that size, if it enters the average again.
      refresh_due: whether the next update estimates, bool of shape (); None if every
        one does.
      estimator_state: the estimator's state.
    """

    count: jax.Array  # type: ignore[assignment]  # hides tuple.count
    refreshes: jax.Array
    nonfinite: jax.Array
    nu: optax.Updates
    hessian_diag: optax.Updates | None
    refresh_due: jax.Array | None
    estimator_state: optax.OptState


CurvatureState = ScaleByAdaHessianState | ScaleByRelativeCurvatureState


def find_states(state: optax.OptState) -> list[CurvatureState]:
    """Return the states with curvature inside that of a chain or wrapper, at least one.

    There is more than one where ``optax.partition`` gives groups of parameters a
    transformation each.
    """

    def is_ours(x: Any) -> bool:
        return isinstance(x, CurvatureState)

    found = [x for x in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(x)]
    if not found:
        raise ValueError(
            "state must contain the state of an adahessian, scale_by_adahessian or"
            " scale_by_relative_curvature, and there is none in one of type"
            f" {type(state).__name__}."
        )
    return found


def find_state(state: optax.OptState) -> CurvatureState:
    """Return the only state with curvature inside that of a chain or wrapper."""
    found = find_states(state)
    if len(found) > 1:
        raise ValueError(
            f"state contains the states of {len(found)} transformations by curvature:"
            " pass that of one, for optax.partition state.inner_states[label]."
        )
    return found[0]


def check_state(
    state: Any,
    params: optax.Params,
    kind: type[CurvatureState],
    *,
    always: bool,
    keeps_estimate: bool,
) -> None:
    """Raise unless a state is of this configuration: one restored may not be."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be a {kind.__name__}, got a {type(state).__name__}."
            " Restore checkpoints into the structure of tx.init(params)."
        )
    if isinstance(state, ScaleByAdaHessianState):
        check_like("state.mu", state.mu, params)
    for name, expected, got in (
        ("update_interval", always, state.refresh_due is None),
        ("reuse_estimate", keeps_estimate, state.hessian_diag is not None),
    ):
        if expected != got:
            raise ValueError(
                "state must come from an optimizer of the same configuration, and this"
                f" one has another {name}. A change of update_interval between 1 and"
                " more, or of reuse_estimate, needs a new state: state ="
                " tx.init(params)."
            )


def check_curvature(curvature: Any, state: CurvatureState) -> None:
    """Raise unless a curvature was made for this state, as far as can be seen."""
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "curvature must be what value_and_grad_with_curvature returned, got"
            f" {curvature!r}. For an estimate of your own use hessian_diag."
        )
    check_same_estimator("curvature", curvature.estimator_state, state.estimator_state)
    raise_if(
        curvature.count != state.count,
        "curvature was computed for another state of the optimizer: call"
        " value_and_grad_with_curvature's function with the state that is given to"
        " update.",
    )
    if curvature.hessian_diag is None:
        raise_if(
            state.refreshes == 0,
            "refresh=False before any estimate was made: the first call needs"
            " refresh=True or None.",
        )


def nan_if_stale(curvature: Curvature | None, state: CurvatureState) -> Any:
    """Return 1, or NaN if a curvature was made for another state.

    Nothing can be raised inside jit: a mistake must not pass unnoticed.
    """
    if curvature is None:
        return 1.0
    return jnp.where(curvature.count == state.count, 1.0, jnp.nan)
