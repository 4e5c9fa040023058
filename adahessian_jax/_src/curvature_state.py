# SPDX-License-Identifier: Apache-2.0
"""The state of an average of curvature: how to find it, and what fits it."""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.checks import check_state_type, raise_if
from adahessian_jax._src.estimator import Curvature, form
from adahessian_jax._src.xla import count

Node = TypeVar("Node")


class CurvatureState(NamedTuple):
    """An average of curvature and what moves it on.

    Checkpoints of it stay readable within a minor version. A version that adds, drops
    or renames a field says so in the changelog under "State", with what to put in its
    place; a state of another configuration is refused by ``update``.

    Attributes:
      count: number of updates so far, shape (), int32.
      refreshes: number of estimates so far, shape (), int32.
      nonfinite: how many entries of estimates were left out, because they, or their
        squares with ``"rms"``, were not finite, shape (), int32.
      fingerprint: of what is averaged, shape (), uint32: a state of another
        ``hessian_ema``, estimator or loss is known by it.
      nu: moving average of the curvature, bias-corrected; the largest number of its
        dtype where there never was an estimate. Structure of the parameters, at the
        size that averaging leaves.
      estimate: the last estimate, at that size, where it enters the average again.
      refresh_due: whether the next update estimates, bool of shape (); None if every
        one does.
      estimator_state: the estimator's state.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count
    refreshes: Array
    nonfinite: Array
    fingerprint: Array
    nu: optax.Updates
    estimate: optax.Updates | None
    refresh_due: Array | None
    estimator_state: optax.OptState


def find_states(state: optax.OptState) -> list[CurvatureState]:
    """Return the states of curvature inside that of a chain or wrapper, one a group."""
    found = nodes_of_type(CurvatureState, state)
    if not found:
        raise ValueError(no_curvature("state", type(state).__name__))
    return found


def nodes_of_type(kind: type[Node], tree: Any) -> list[Node]:
    """Return the nodes of a tree that are of a type."""
    nodes = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kind))
    return [x for x in nodes if isinstance(x, kind)]


def find_state(state: optax.OptState) -> CurvatureState:
    """Return the only state of curvature inside that of a chain or wrapper."""
    found = find_states(state)
    if len(found) > 1:
        raise ValueError(
            f"state contains the states of {len(found)} transformations by curvature:"
            " pass that of one, for optax.partition state.inner_states[label]."
        )
    return found[0]


def no_curvature(name: str, got: str) -> str:
    """Say that there is no curvature in an optimizer, or in its state."""
    return (
        f"{name} must be that of an optimizer by curvature, such as newton, adahessian"
        f" or scale_by_adahessian, and there is none in this {got}. Other optimizers"
        " need no estimate: use jax.value_and_grad."
    )


def check_state(state: Any, initial: CurvatureState, fingerprint: Array) -> None:
    """Raise unless a state is like an initial one: one restored may not be."""
    check_state_type(state, CurvatureState)
    for field, argument in _CONFIGURED_BY.items():
        got, expected = (form(getattr(s, field)) for s in (state, initial))
        if got != expected:
            raise ValueError(
                f"state comes from an optimizer with another {argument}: its {field} is"
                f" {got}, this one's {expected}. Make a new state by tx.init(params)."
            )
    raise_if(
        state.fingerprint != fingerprint,
        "state comes from an optimizer with another hessian_ema, estimator or loss: its"
        " average is of something else. Make a new state by tx.init(params).",
    )


_CONFIGURED_BY = {  # in this order: an interval of 1 has no estimate to keep
    "refresh_due": "update_interval (of 1, or above)",
    "estimate": "update_each",
    "estimator_state": "estimator",
    "nu": "averaging",
}


def check_curvature(curvature: Any, state: CurvatureState) -> None:
    """Raise unless a curvature was made for this state, as far as can be seen."""
    if not isinstance(curvature, Curvature):
        raise TypeError(
            "curvature must be what value_and_grad_with_curvature returned, got"
            f" {curvature!r}. For an estimate of your own use hessian_diag."
        )
    check_same_estimator(curvature.estimator_state, state.estimator_state)
    raise_if(
        curvature.count != state.count,
        "curvature was computed for another state of the optimizer: call"
        " value_and_grad_with_curvature's function with the state that is given to"
        " update.",
    )
    if curvature.estimate is None:
        raise_if(
            state.refreshes == 0,
            "refresh=False before any estimate was made: the first call needs"
            " refresh=True or None.",
        )


def check_same_estimator(state: Any, expected: Any) -> None:
    """Raise unless the state in a curvature is one of the optimizer's estimator."""
    got, expected = form(state), form(expected)
    if got != expected:
        raise ValueError(
            "curvature comes from another estimator than the optimizer's: its state is"
            f" {got}, the optimizer's {expected}. Give both the same estimator."
        )


def nan_if_unfit(state: CurvatureState, fingerprint: Array, curvature: Any) -> Array:
    """Return 1, or NaN for a state of something else or a curvature of another state.

    Nothing can be raised inside jit, and a mistake must not pass unnoticed.
    """
    fits = state.fingerprint == fingerprint
    if curvature is not None:
        fits &= curvature.count == state.count
    return jnp.where(fits, 1.0, jnp.nan)


def saturating_sum(total: Array, usable: optax.Updates) -> Array:
    """Add how many entries are not usable."""
    new, largest = jnp.zeros_like(total), jnp.iinfo(total.dtype).max
    for x in jax.tree.leaves(usable):
        # Where both fit, the difference takes an operation less for each entry.
        new = new + (count(~x) if x.size > largest else x.size - count(x))
    return jnp.where(new > largest - total, largest, total + new)
