# SPDX-License-Identifier: Apache-2.0
"""What an optimizer's state and its curvature show, in scalars for a log."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.curvature_state import find_state, nodes_of_type
from adahessian_jax._src.derivatives import split_differentiable
from adahessian_jax._src.dtypes import (
    accumulation_dtype,
    cast_average,
    is_differentiable,
    map_floats,
    never_estimated,
)
from adahessian_jax._src.masking import mask_like
from adahessian_jax._src.meshes import replicated_beside
from adahessian_jax._src.orthogonal import rotate_tree
from adahessian_jax.curvature.eigenvalues import Eigenpairs
from adahessian_jax.curvature.estimate import DiagonalEstimate
from adahessian_jax.estimators.eigenbasis import find_bases
from adahessian_jax.transforms.adahessian import ScaleByAdaHessianState
from adahessian_jax.transforms.quadratic_model import ScaleByQuadraticModelState


def diagnostics(
    state: optax.OptState,
    *,
    updates: optax.Updates | None = None,
    estimate: optax.Updates | DiagonalEstimate | None = None,
    previous_estimate: optax.Updates | None = None,
    clip_threshold: float | None = None,
    sharpness: Eigenpairs | None = None,
    preconditioned_sharpness: Eigenpairs | None = None,
) -> dict[str, Array]:
    r"""Summarise an optimizer's state, and what else is at hand, in scalars.

    A pure function, for inside or outside ``jit``. It sorts each parameter for the
    quantiles, so call it now and then rather than on every step.

    Args:
      state: the state of an optimizer by curvature, alone or inside that of a chain.
      updates: what ``update`` returned together with ``state``.
      estimate: an estimate of the diagonal, or what
        :func:`adahessian_jax.estimate_diagonal` returned; by default the one that the
        state keeps, if it keeps one.
      previous_estimate: another, independent of the first.
      clip_threshold: the bound that updates were clipped to.
      sharpness: what :func:`adahessian_jax.largest_eigenvalues` returned.
      preconditioned_sharpness: the same, with this optimizer as ``preconditioner``.

    Returns:
      A flat dict of scalars of shape (), with these keys.

      - ``"count"``, ``"refreshes"``: numbers of updates and of estimates so far.
      - ``"nonfinite"``: how many entries of estimates were left out of the average so
        far because they were not finite. If it grows, the loss has second derivatives
        that do not exist or overflow, though training goes on.
      - ``"flat"``: how many entries have no curvature in the average, exactly, though
        they have momentum: they are divided by ``eps`` alone.
      - ``"trace"``, ``"negative_share"``: the sum of the estimate and the share of its
        entries below zero.
      - ``"relative_error"``, with two estimates a and b: :math:`\|a - b\| / \sqrt{2
        \langle a, b \rangle}`, which estimates the root mean square of
        :math:`\|a - d\| / \|d\|` for the true diagonal d; infinite if the two do not
        even agree in direction. With a :class:`.DiagonalEstimate` alone its own.
      - ``"trace_standard_error"``, with a :class:`.DiagonalEstimate`.
      - ``"step_size/PATH/q"``, with updates: the quantiles q of 0.05, 0.5 and 0.95 of
        :math:`|u_i| / |m_i|` in each parameter, the step that a unit of momentum takes
        there, learning rate included, 0 if none has momentum; ``"step_size/q"``, of all
        parameters.
      - ``"learning_rate"``, the last one that a quadratic model found, as in
        ``newton(None, loss)``.
      - ``"sharpness"``, ``"preconditioned_sharpness"``: the first value of each, if
        given. Two over the second is the learning rate at which gradient descent
        without momentum becomes unstable.
      - ``"clipped_share"``, with updates and a threshold: their share that lies at it.

      With :func:`adahessian_jax.in_eigenbasis` all entries are those in the turned
      axes; after an update that turned these, in the new ones.

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
    inner, found = find_state(state), nodes_of_type(ScaleByAdaHessianState, state)
    if not found:
        raise ValueError("state must be that of the transformation, not a part of it.")
    mu = found[0].mu
    bases = find_bases(inner.estimator_state)
    keys = ("count", "refreshes", "nonfinite")
    report = {key: getattr(inner, key) for key in keys}
    flat = [
        jnp.sum((v == 0) & (m != 0), dtype=jnp.int32)
        for v, m in zip(*map(jax.tree.leaves, (inner.nu, mu)), strict=True)
        if is_differentiable(v)
    ]
    report["flat"] = sum(flat, start=jnp.zeros((), jnp.int32))
    for model in nodes_of_type(ScaleByQuadraticModelState, state):
        report["learning_rate"] = model.learning_rate
    names = "sharpness", "preconditioned_sharpness"
    given = sharpness, preconditioned_sharpness
    for name, pairs in zip(names, given, strict=True):
        if pairs is not None:
            rule = "what largest_eigenvalues returned"
            checks.require(isinstance(pairs, Eigenpairs), TypeError, name, rule, pairs)
            report[name] = pairs.values[0]
    if isinstance(estimate, DiagonalEstimate):
        report["trace_standard_error"] = estimate.trace_standard_error
        report["relative_error"] = estimate.relative_error
        estimate = estimate.mean
    trees = updates, estimate, previous_estimate
    updates, estimate, previous_estimate = (mask_like(x, mu) for x in trees)
    if estimate is not None:
        checks.check_like("estimate", estimate, mu)
    elif inner.estimate is not None:  # of the size that averaging leaves
        estimate = map_floats(_as_parameter, inner.estimate, mu)
    rule = "None, for there is no estimate to compare it with: pass estimate= as well"
    alone = previous_estimate is not None and estimate is None
    checks.require(not alone, ValueError, "previous_estimate", rule, previous_estimate)
    if estimate is not None:
        a, size = _flat(estimate, inner.nu)
        known = ~never_estimated(a)
        report["trace"] = jnp.sum(a, where=known)
        report["negative_share"] = jnp.sum(a < 0) / size
    if previous_estimate is not None:
        checks.check_like("previous_estimate", previous_estimate, estimate)
        b, _ = _flat(previous_estimate, inner.nu)
        a, b = (jnp.where(known, x, 0) for x in (a, b))
        agreement = 2 * jnp.sum(a * b)
        ratio = jnp.sum((a - b) ** 2) / jnp.where(agreement > 0, agreement, 1)
        report["relative_error"] = jnp.where(agreement > 0, jnp.sqrt(ratio), jnp.inf)
    if updates is None:
        rule = "None, for there are no updates to look at: pass updates= as well"
        ok = clip_threshold is None
        checks.require(ok, ValueError, "clip_threshold", rule, clip_threshold)
        return report
    checks.check_like("updates", updates, mu)
    updates = rotate_tree(updates, bases)
    ratios = jax.tree.map(_ratio, updates, mu)
    report |= _quantiles("step_size", ratios)
    report |= _quantiles("step_size", _flat(ratios, inner.nu)[0])
    if clip_threshold is not None:
        checks.check_float("clip_threshold", clip_threshold, 0.0, exclusive=True)
        entries, size = _flat(updates, inner.nu)
        rounding = 1e-5 if any(bases) else 1e-6  # of turning them back
        at_bound = jnp.abs(entries) >= clip_threshold * (1 - rounding)
        report["clipped_share"] = jnp.sum(at_bound) / size
    return report


def _as_parameter(d: Array, p: Array) -> Array:
    """Return an average of entries for each of them, in the dtype they are added in."""
    return jnp.broadcast_to(cast_average(d, accumulation_dtype(d)), p.shape)


def _ratio(x: Array, y: Array) -> Array:
    """Return ``|x| / |y|``, -1 where y is 0; an integer leaf stays as it is."""
    if not is_differentiable(y):
        return y
    wide = accumulation_dtype(x, y)
    divisor = jnp.where(y == 0, 1, jnp.abs(y)).astype(wide)
    return jnp.where(y == 0, -1, jnp.abs(x.astype(wide)) / divisor)


def _quantiles(name: str, tree: Any) -> dict[str, Array]:
    """Return the quantiles of the entries of each leaf that are not negative."""
    report = {}
    for path, x in jax.tree_util.tree_leaves_with_path(tree):
        if is_differentiable(x) and x.size:
            ordered = jnp.sort(replicated_beside(x, x), axis=None)
            for q in (0.05, 0.5, 0.95):
                key = "/".join([name, *_name(path), str(q)])
                report[key] = _quantile(ordered, q)
    return report


def _quantile(x: Array, q: float) -> Array:
    """Return a quantile of sorted entries, of those that are not negative.

    ``jnp.nanquantile`` would need NaN, which ``jax_debug_nans`` takes for an error.
    """
    others = jnp.sum(x < 0)
    place = q * jnp.maximum(x.size - 1 - others, 0).astype(x.dtype)
    low = jnp.floor(place)
    first = jnp.minimum(others + low.astype(others.dtype), x.size - 1)
    below, above = x[first], x[jnp.minimum(first + 1, x.size - 1)]
    value = below + (above - below) * (place - low)
    return jnp.where(others < x.size, value, 0)


def _flat(tree: Any, like: Any) -> tuple[Array, int]:
    """Return all entries of the floating-point leaves, and their number, at least 1."""
    leaves, _ = split_differentiable(tree, like)
    dtype = accumulation_dtype(*leaves)
    flat = [replicated_beside(x, x).ravel().astype(dtype) for x in leaves] or [
        jnp.zeros(0)
    ]
    return jnp.concatenate(flat), max(sum(x.size for x in flat), 1)


def _name(path: Any) -> list[str]:
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path]
    return list(map(str, keys))
