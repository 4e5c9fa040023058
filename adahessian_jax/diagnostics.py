# SPDX-License-Identifier: Apache-2.0
"""Numbers to watch while training."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.checks import check_float, check_like, check_structure
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax.eigenbasis import find_bases, rotate
from adahessian_jax.state import (
    CurvatureState,
    ScaleByAdaHessianState,
    ScaleByRelativeCurvatureState,
    find_state,
)


def diagnostics(
    state: optax.OptState,
    *,
    updates: optax.Updates | None = None,
    estimate: optax.Updates | None = None,
    previous_estimate: optax.Updates | None = None,
    clip_threshold: float | None = None,
) -> dict[str, jax.Array]:
    r"""Summarise an optimizer's state, and what else is at hand, in scalars.

    A pure function, to be called inside or outside ``jit``. It sorts each parameter
    for the quantiles, so call it now and then rather than on every step.

    Args:
      state: the state of :func:`adahessian_jax.adahessian`,
        :func:`adahessian_jax.scale_by_adahessian` or
        :func:`adahessian_jax.scale_by_relative_curvature`, alone or inside that of a
        chain.
      updates: what ``update`` returned together with ``state``.
      estimate: an estimate of the diagonal; by default the one that the state keeps, if
        it keeps one (it does if ``update_interval`` > 1 and ``reuse_estimate``).
      previous_estimate: another, independent of the first.
      clip_threshold: the bound that updates were clipped to.

    Returns:
      A flat dict of scalars of shape (), with these keys.

      - ``"count"``, ``"refreshes"``: numbers of updates and of estimates so far.
      - ``"nonfinite"``: how many entries of estimates were left out of the average so
        far because they were not finite. A count that grows says that the loss has
        second derivatives that do not exist or overflow, though training goes on.
      - ``"trace"``, ``"negative_share"``: the sum of the estimate and the share of its
        entries below zero.
      - ``"relative_error"``, with two estimates a and b: :math:`\|a - b\| / \sqrt{2
        \langle a, b \rangle}`, which estimates the root mean square of
        :math:`\|a - d\| / \|d\|` for the true diagonal d; infinite if the two do not
        even agree in direction.
      - ``"step_size/PATH/q"``, with updates and AdaHessian: the quantiles q of 0.05,
        0.5 and 0.95 of :math:`|u_i| / |m_i|` in each parameter, the step that a unit of
        momentum takes there, learning rate included.
      - ``"relative_curvature/PATH/q"``, with the transformation of that name: the
        quantiles of :math:`|v_i|` over its mean in the parameter. If they are all near
        1, curvature has little to say about that parameter.
      - ``"clipped_share"``, with updates and a threshold: the share of their entries
        that lie at it.

      With :func:`adahessian_jax.in_eigenbasis` all entries are those in the turned
      axes.

    Raises:
      ValueError: if there is no such state, or a tree does not match its parameters.
      TypeError: if ``clip_threshold`` is not a number.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> tx, w = ah.adahessian(0.1), jnp.array([1.0, 2.0])
      >>> d = jnp.array([1.0, -3.0])
      >>> updates, state = tx.update(w, tx.init(w), w, hessian_diag=d)
      >>> report = ah.diagnostics(state, estimate=d)
      >>> float(report["trace"]), float(report["negative_share"])
      (-2.0, 0.5)
    """
    inner = find_state(state)
    bases = find_bases(inner.estimator_state, inner.nu)
    report = {
        "count": inner.count,
        "refreshes": inner.refreshes,
        "nonfinite": inner.nonfinite,
    }
    if estimate is None and inner.hessian_diag is not None:
        estimate = inner.hessian_diag
    elif estimate is not None:
        _check_like("estimate", estimate, inner)
    if estimate is not None:
        entries = _floats(estimate, inner.nu)
        size = max(sum(x.size for x in entries), 1)
        report["trace"] = _sum(entries)
        report["negative_share"] = _sum([x < 0 for x in entries]) / size
    if previous_estimate is not None:
        if estimate is None:
            raise ValueError(
                "previous_estimate was given, but there is no estimate to compare it"
                " with: pass estimate= as well."
            )
        check_like("previous_estimate", previous_estimate, estimate)
        others = _floats(previous_estimate, inner.nu)
        pairs = list(zip(entries, others, strict=True))
        squared = _sum([(a - b) ** 2 for a, b in pairs])
        agreement = 2 * _sum([a * b for a, b in pairs])
        report["relative_error"] = jnp.where(
            agreement > 0,
            jnp.sqrt(squared / jnp.where(agreement > 0, agreement, 1)),
            jnp.inf,
        )
    if updates is not None:
        _check_like("updates", updates, inner)
        updates = jax.tree.map(rotate, updates, bases)
    if isinstance(inner, ScaleByRelativeCurvatureState):

        def relative(v: jax.Array) -> jax.Array:
            return _ratio(v, jnp.mean(jnp.abs(v))) if is_differentiable(v) else v

        report |= _quantiles("relative_curvature", jax.tree.map(relative, inner.nu))
    elif updates is not None:
        mu = jax.tree.map(rotate, inner.mu, bases)
        report |= _quantiles("step_size", jax.tree.map(_ratio, updates, mu))
    if clip_threshold is not None:
        check_float("clip_threshold", clip_threshold, 0.0, exclusive=True)
        if updates is None:
            raise ValueError(
                "clip_threshold was given, but no updates to look at: pass updates= as"
                " well."
            )
        entries = _floats(updates, inner.nu)
        size = max(sum(x.size for x in entries), 1)
        rounding = 1e-5 if jax.tree.leaves(bases) else 1e-6  # of turning them back
        at_bound = [jnp.abs(x) >= clip_threshold * (1 - rounding) for x in entries]
        report["clipped_share"] = _sum(at_bound) / size
    return report


_QUANTILES = (0.05, 0.5, 0.95)


def _check_like(name: str, tree: Any, state: CurvatureState) -> None:
    """Raise unless a tree is like the parameters, as far as the state knows them."""
    if isinstance(state, ScaleByAdaHessianState):
        check_like(name, tree, state.mu)
    else:
        check_structure(name, tree, state.nu)


def _ratio(x: jax.Array, y: jax.Array) -> jax.Array:
    """Return ``|x| / |y|``, NaN where y is 0; an integer leaf stays as it is."""
    if not is_differentiable(y):
        return y
    wide = accumulation_dtype(x, y)
    return jnp.abs(x.astype(wide)) / jnp.where(y != 0, jnp.abs(y), jnp.nan).astype(wide)


def _quantiles(name: str, tree: Any) -> dict[str, jax.Array]:
    """Return the quantiles of the entries of each leaf, without those that are NaN."""
    return {
        f"{name}/{_name(path)}/{q}": jnp.nanquantile(x, q)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if is_differentiable(x) and x.size
        for q in _QUANTILES
    }


def _floats(tree: Any, like: Any) -> list[jax.Array]:
    return [
        x.astype(accumulation_dtype(x))
        for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
        if is_differentiable(y)
    ]


def _sum(leaves: list[jax.Array]) -> jax.Array:
    sums = [jnp.sum(x.astype(accumulation_dtype(x))) for x in leaves]
    return sum(sums[1:], start=sums[0]) if sums else jnp.zeros(())


def _name(path: Any) -> str:
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path]
    return "/".join(map(str, keys))
