# SPDX-License-Identifier: Apache-2.0
"""Hessian-vector products, the Hessian's exact diagonal, and what a state shows."""

import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.curvature_state import find_state, nodes_of_type
from adahessian_jax._src.derivatives import (
    check_mode,
    split_differentiable,
    value_grad_and_hvp,
)
from adahessian_jax._src.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax._src.orthogonal import rotate_tree
from adahessian_jax.estimators.eigenbasis import find_bases
from adahessian_jax.transforms.adahessian import ScaleByAdaHessianState


def hvp(
    fun: Callable[[optax.Params], Array],
    params: optax.Params,
    tangents: optax.Params,
    *,
    mode: str = "forward-over-reverse",
) -> optax.Params:
    r"""Multiply the Hessian of a scalar function by a vector.

    .. math::
      (H v)_i = \sum_j \frac{\partial^2 f}{\partial w_i \partial w_j} v_j

    where :math:`f` is ``fun``, :math:`w` is ``params`` and :math:`v` is ``tangents``.
    The Hessian itself is never formed.

    Args:
      fun: maps parameters to a real scalar.
      params: any pytree of arrays. Integer and boolean leaves are held fixed.
      tangents: the vector, of the same structure and shapes as ``params``; each leaf
        is cast to the dtype of its parameter.
      mode: how to differentiate twice.

        - ``"forward-over-reverse"``: ``jax.jvp`` of ``jax.grad``. The cheapest.
        - ``"reverse-over-reverse"``: ``jax.vjp`` of ``jax.grad``, for functions with
          no forward-mode rule (``jax.custom_vjp``). Takes more memory.
        - ``"finite-difference"``: a central difference of two gradients, for functions
          whose gradient cannot be differentiated at all, of step
          :math:`\epsilon^{1/3} (1 + \|w\|) / \|v\|` with the rounding unit
          :math:`\epsilon` of the coarsest dtype among the parameters.

    Returns:
      A pytree of the structure, shapes and dtypes of ``params``; zero at the leaves
      that are held fixed.

    Raises:
      ValueError: if ``mode`` is unknown, or ``tangents`` does not match ``params``.
      TypeError: if ``fun`` does not return a real scalar, or a parameter is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> fun = lambda w: w[0] ** 2 + 3.0 * w[0] * w[1]  # H = [[2, 3], [3, 0]]
      >>> ah.hvp(fun, jnp.array([1.0, 2.0]), jnp.array([1.0, 0.0])).tolist()
      [2.0, 3.0]

    References:
      Pearlmutter, `Fast Exact Multiplication by the Hessian
      <https://doi.org/10.1162/neco.1994.6.1.147>`_, 1994

    .. note::
      ``"finite-difference"`` costs two gradients, and no setting makes it safe. Its
      error is at best about :math:`\epsilon^{2/3}` relative to the gradient (1e-5 in
      float32, several percent in bfloat16). Where the function is only piecewise smooth
      (ReLU, max-pooling) it measures kinks, often many times the curvature.
    """
    checks.check_callable("fun", fun, "params -> loss")

    def checked(params: optax.Params) -> tuple[Array, None]:
        return checks.check_scalar("fun", fun(params)), None

    return value_grad_and_hvp(checked, params, tangents, mode=mode)[2]


def hessian_diag(
    fun: Callable[[optax.Params], Array],
    params: optax.Params,
    *,
    mode: str = "forward-over-reverse",
    chunk_size: int = 32,
) -> optax.Params:
    """Compute the exact diagonal of the Hessian, one Hessian-vector product per entry.

    For small problems, tests and notebooks.

    Args:
      fun: maps parameters to a real scalar.
      params: any pytree of arrays. Integer and boolean leaves are held fixed.
      mode: how to differentiate twice, see :func:`adahessian_jax.hvp`.
      chunk_size: how many products are computed at a time, each in memory of its own.

    Returns:
      A pytree of the structure, shapes and dtypes of ``params``; zero at the leaves
      that are held fixed.

    Raises:
      ValueError: if ``chunk_size`` is below 1 or ``mode`` is unknown.
      TypeError: if ``fun`` does not return a real scalar, or a parameter is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> fun = lambda w: w[0] ** 2 + 3.0 * w[0] * w[1]  # H = [[2, 3], [3, 0]]
      >>> ah.hessian_diag(fun, jnp.array([1.0, 2.0])).tolist()
      [2.0, 0.0]
    """
    checks.check_callable("fun", fun, "params -> loss")
    check_mode(mode)
    checks.check_int("chunk_size", chunk_size, 1)
    checks.check_real("params", params)
    floats, rebuild = split_differentiable(params)
    _, rebuild_diagonal = split_differentiable(jax.tree.map(jnp.zeros_like, params))
    checked = checks.scalar_function("fun", fun)

    def objective(floats: list[Array]) -> tuple[Array, None]:
        return checked(rebuild(floats)), None

    starts = list(itertools.accumulate((x.size for x in floats), initial=0))
    widest = accumulation_dtype(*floats)

    def entry(index: Array) -> Array:
        units = [
            (jnp.arange(x.size) + start == index).reshape(x.shape)
            for start, x in zip(starts, floats, strict=False)
        ]
        vector = [u.astype(x.dtype) for u, x in zip(units, floats, strict=True)]
        column = value_grad_and_hvp(objective, floats, vector, mode=mode)[2]
        # Of all terms but one nothing is left, so that nothing is rounded.
        terms = map(lambda c, u: jnp.sum(c, where=u).astype(widest), column, units)
        return sum(terms, start=jnp.zeros((), widest))

    if starts[-1] == 0:
        return rebuild_diagonal(floats)
    diag = jax.lax.map(entry, jnp.arange(starts[-1]), batch_size=chunk_size)
    parts = zip(jnp.split(diag, starts[1:-1]), floats, strict=True)
    return rebuild_diagonal([d.reshape(x.shape).astype(x.dtype) for d, x in parts])


def diagnostics(
    state: optax.OptState,
    *,
    updates: optax.Updates | None = None,
    estimate: optax.Updates | None = None,
    previous_estimate: optax.Updates | None = None,
    clip_threshold: float | None = None,
) -> dict[str, Array]:
    r"""Summarise an optimizer's state, and what else is at hand, in scalars.

    A pure function, for inside or outside ``jit``. It sorts each parameter for the
    quantiles, so call it now and then rather than on every step.

    Args:
      state: the state of an optimizer by curvature, alone or inside that of a chain.
      updates: what ``update`` returned together with ``state``.
      estimate: an estimate of the diagonal; by default the one that the state keeps, if
        it keeps one.
      previous_estimate: another, independent of the first.
      clip_threshold: the bound that updates were clipped to.

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
        even agree in direction.
      - ``"step_size/PATH/q"``, with updates: the quantiles q of 0.05, 0.5 and 0.95 of
        :math:`|u_i| / |m_i|` in each parameter, the step that a unit of momentum takes
        there, learning rate included.
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
    bases = find_bases(inner.estimator_state, len(jax.tree.leaves(mu)))
    keys = ("count", "refreshes", "nonfinite")
    report = {key: getattr(inner, key) for key in keys}
    flat = [
        jnp.sum((v == 0) & (m != 0), dtype=jnp.int32)
        for v, m in zip(*map(jax.tree.leaves, (inner.nu, mu)), strict=True)
        if is_differentiable(v)
    ]
    report["flat"] = sum(flat, start=jnp.zeros((), jnp.int32))
    if estimate is None:
        estimate = inner.estimate
    else:
        checks.check_like("estimate", estimate, mu)
    rule = "None, for there is no estimate to compare it with: pass estimate= as well"
    alone = previous_estimate is not None and estimate is None
    checks.require(not alone, ValueError, "previous_estimate", rule, previous_estimate)
    if estimate is not None:
        a, size = _flat(estimate, inner.nu)
        report["trace"] = jnp.sum(a)
        report["negative_share"] = jnp.sum(a < 0) / size
    if previous_estimate is not None:
        checks.check_like("previous_estimate", previous_estimate, estimate)
        b, _ = _flat(previous_estimate, inner.nu)
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
    report |= _quantiles("step_size", jax.tree.map(_ratio, updates, mu))
    if clip_threshold is not None:
        checks.check_float("clip_threshold", clip_threshold, 0.0, exclusive=True)
        entries, size = _flat(updates, inner.nu)
        rounding = 1e-5 if any(bases) else 1e-6  # of turning them back
        at_bound = jnp.abs(entries) >= clip_threshold * (1 - rounding)
        report["clipped_share"] = jnp.sum(at_bound) / size
    return report


def _ratio(x: Array, y: Array) -> Array:
    """Return ``|x| / |y|``, NaN where y is 0; an integer leaf stays as it is."""
    if not is_differentiable(y):
        return y
    wide = accumulation_dtype(x, y)
    return jnp.abs(x.astype(wide)) / jnp.where(y != 0, jnp.abs(y), jnp.nan).astype(wide)


def _quantiles(name: str, tree: Any) -> dict[str, Array]:
    """Return the quantiles of the entries of each leaf, without those that are NaN."""
    return {
        f"{name}/{_name(path)}/{q}": jnp.nanquantile(x, q)
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
        if is_differentiable(x) and x.size
        for q in (0.05, 0.5, 0.95)
    }


def _flat(tree: Any, like: Any) -> tuple[Array, int]:
    """Return all entries of the floating-point leaves, and their number, at least 1."""
    leaves, _ = split_differentiable(tree, like)
    dtype = accumulation_dtype(*leaves)
    flat = [x.ravel().astype(dtype) for x in leaves] or [jnp.zeros(0)]
    return jnp.concatenate(flat), max(sum(x.size for x in flat), 1)


def _name(path: Any) -> str:
    keys = [getattr(k, "key", getattr(k, "idx", getattr(k, "name", k))) for k in path]
    return "/".join(map(str, keys))
