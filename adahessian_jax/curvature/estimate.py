# SPDX-License-Identifier: Apache-2.0
"""A diagonal over a whole data set, with its standard error."""

import functools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.batch_estimate import sample_of
from adahessian_jax._src.derivatives import split_differentiable, squared_norm
from adahessian_jax._src.dtypes import accumulation_dtype, map_floats, zeros_like
from adahessian_jax._src.long_loop import interruptible, progress_bar
from adahessian_jax._src.probes import as_key


class DiagonalEstimate(NamedTuple):
    r"""The mean of independent estimates of a diagonal, and what goes on with it.

    ``standard_error`` is that of each entry of the mean, a tree like it, and
    ``trace_standard_error`` that of the trace. ``relative_error`` is the root of
    :math:`\sum_i s_i^2 / \sum_i d_i^2` with these errors s and, for the true diagonal
    d, the mean's squares less those of s; infinite where nothing is left. All three are
    infinite below two samples. Trees have the structure and shapes of the parameters,
    in float32 or wider, with zeros at leaves that are held fixed.

    Attributes:
      mean: of all whole samples.
      deviations: the sum of their squared distances from it.
      trace: of the mean, shape ().
      trace_deviations: as ``deviations``, of the samples' traces.
      n_samples: how many whole samples there are.
      partial: of the sample that was interrupted, the weighted sum over batches.
      partial_weight: the sum of their weights, shape ().
      n_batches: how many these are.
      key: the PRNG key that the signs of all samples come from.
    """

    mean: optax.Params
    deviations: optax.Params
    trace: Array
    trace_deviations: Array
    n_samples: int
    partial: optax.Params
    partial_weight: Array
    n_batches: int
    key: Array

    @property
    def standard_error(self) -> optax.Params:
        """Return that of each entry of the mean."""
        return map_floats(self._error, self.deviations)

    @property
    def trace_standard_error(self) -> Array:
        """Return that of the trace, shape ()."""
        return self._error(self.trace_deviations)

    @property
    def relative_error(self) -> Array:
        """Return that of the whole mean, shape ()."""
        error = squared_norm(split_differentiable(self.standard_error)[0])
        true = squared_norm(split_differentiable(self.mean)[0]) - error
        ratio = jnp.sqrt(error / jnp.where(true > 0, true, 1))
        zero = error == 0  # of a diagonal that is known, zero or not
        return jnp.where(zero, 0, jnp.where(true > 0, ratio, jnp.inf))

    def _error(self, deviations: Array) -> Array:
        n = self.n_samples
        unknown = jnp.full_like(deviations, jnp.inf)
        return jnp.sqrt(deviations / n / (n - 1)) if n > 1 else unknown


def estimate_diagonal(
    fun: Callable[[optax.Params, Any], Any],
    params: optax.Params,
    batches: Iterable[Any],
    estimator: optax.GradientTransformation,
    *,
    n_samples: int | None = None,
    rtol: float | None = None,
    labels_fn: Callable[[Any], Any] | None = None,
    reduction: str | None = None,
    start: DiagonalEstimate | None = None,
    progress: bool = False,
    seed: int | Array = 0,
) -> DiagonalEstimate:
    r"""Estimate a diagonal over a whole data set, with the error of each entry.

    A sample is an estimate on every batch, each with signs of its own, averaged as the
    loss is. Samples are independent and have the diagonal as their mean, so that they
    show their own error.

    Args:
      fun: ``(params, batch)`` to the loss or ``(loss, weight)``, for
        :func:`adahessian_jax.hutchinson`; to the network's outputs or ``(outputs,
        where)`` for :func:`adahessian_jax.gauss_newton`.
      params: any pytree of arrays. Integer and boolean leaves are held fixed.
      batches: gone through once for each sample, in the same order: a list, or a data
        loader that does not shuffle. Each shape of a batch compiles anew.
      estimator: ``hutchinson()`` or ``gauss_newton(loss)``.
      n_samples: how many samples, those of ``start`` included. At least this or
        ``rtol``; whichever is there first ends it.
      rtol: the ``relative_error`` that suffices, after three samples or more.
      labels_fn: from a batch to labels, for a loss whose curvature depends on them.
      reduction: ``"mean"`` or ``"sum"`` over batches. By default that of the
        estimator's loss, or a mean. In a mean, batches have the weight of their rows:
        the sum of ``where``, or the ``weight``, or the length of the first axis.
      start: what an earlier call returned, to go on with, to the same end as if that
        had not ended.
      progress: whether to show a bar; needs the package ``rich``.
      seed: an int or a PRNG key; with ``start`` its own is used.

    Returns:
      The :class:`.DiagonalEstimate`. Ctrl-C ends at the next batch, with a warning, and
      returns what there is.

    Raises:
      ValueError: if an argument is out of range, no row has weight, or an estimate is
        not finite.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x = jax.random.normal(jax.random.key(0), (6, 3))
      >>> estimate = ah.estimate_diagonal(
      ...   lambda w, x: x @ w, jnp.ones(3), [x[:4], x[4:]],
      ...   ah.gauss_newton(ah.losses.l2_loss), n_samples=200)
      >>> error = estimate.mean - jnp.mean(x**2, axis=0)
      >>> bool(jnp.all(jnp.abs(error) < 4 * estimate.standard_error))
      True

    .. note::
      It keeps three copies of the parameters, beside what an estimate takes. With fewer
      than about thirty samples take intervals from Student's t.
    """
    checks.check_callable("fun", fun, "(params, batch) -> loss or outputs")
    checks.check_params(params)
    checks.check_real("params", params)
    checks.check_seed(seed)
    checks.check_flag("progress", progress)
    if n_samples is None and rtol is None:
        raise ValueError("n_samples or rtol must be given: it would never end.")
    if reduction is not None:
        checks.check_choice("reduction", reduction, ("mean", "sum"))
    if labels_fn is not None:
        checks.check_callable("labels_fn", labels_fn, "batch -> labels")
    if n_samples is not None:
        checks.check_int("n_samples", n_samples, 1)
    if rtol is not None:
        checks.check_float("rtol", rtol, 0.0, exclusive=True)
    once = isinstance(batches, Iterator | Mapping)
    again = isinstance(batches, Iterable) and not once
    rule = "a list or a data loader, to go through again and again"
    checks.require(again, TypeError, "batches", rule, batches)
    estimate = _nothing(params, seed) if start is None else _copied(start, params)
    weighted, mean = sample_of(fun, params, estimator, labels_fn, reduction)
    add = jax.jit(weighted, donate_argnums=0)
    bar = progress_bar(progress, batches, n_samples)
    with bar as show, interruptible() as interrupted:
        while not _enough(estimate, n_samples, rtol):
            seen = 0
            for seen, batch in enumerate(batches, 1):
                if seen <= estimate.n_batches:
                    continue
                total = estimate.partial, estimate.partial_weight
                place = estimate.key, estimate.n_samples, seen
                total = add(total, params, batch, *place)
                estimate = estimate._replace(
                    partial=total[0], partial_weight=total[1], n_batches=seen
                )
                show(estimate)
                if interrupted:
                    warnings.warn(
                        f"Interrupted after {estimate.n_samples} samples and {seen}"
                        " batches: pass start= what is returned to go on.",
                        stacklevel=2,
                    )
                    return estimate
            _check_whole(estimate, seen)
            estimate = _counted(_with_sample(estimate, mean))
            finite, rule = jnp.isfinite(estimate.trace), "of finite curvature at params"
            checks.require(finite, ValueError, "fun", rule, "an estimate that is not")
            show(estimate)
    return estimate


@functools.partial(jax.jit, static_argnums=1, donate_argnums=0)
def _with_sample(estimate: DiagonalEstimate, mean: bool) -> DiagonalEstimate:
    """Let a sample of all batches enter the mean, by Welford's formula."""
    weight = estimate.partial_weight if mean else jnp.ones_like(estimate.trace)
    n = jnp.asarray(estimate.n_samples + 1, weight.dtype)
    sample = map_floats(lambda x: x / weight.astype(x.dtype), estimate.partial)
    sums = [jnp.sum(x) for x in split_differentiable(sample)[0]]
    new = sample, sum(sums, start=jnp.zeros_like(weight))
    old = estimate.mean, estimate.trace
    spread = estimate.deviations, estimate.trace_deviations
    later = map_floats(lambda m, x: m + (x - m) / n, old, new)
    spread = map_floats(
        lambda d, m, x, y: d + (x - m) * (x - y), spread, old, new, later
    )
    partial, weight = jax.tree.map(jnp.zeros_like, (estimate.partial, weight))
    counted = later[0], spread[0], later[1], spread[1], estimate.n_samples + 1
    return DiagonalEstimate(*counted, partial, weight, 0, estimate.key)


def _nothing(params: Any, seed: Any) -> DiagonalEstimate:
    dtype = accumulation_dtype(*jax.tree.leaves(params))
    # An array each: a buffer can be donated once.
    mean, deviations, partial = (zeros_like(params, dtype) for _ in range(3))
    trace, spread, weight = (jnp.zeros((), dtype) for _ in range(3))
    parts = mean, deviations, trace, spread, 0, partial, weight, 0
    return DiagonalEstimate(*parts, as_key(seed))


def _copied(start: Any, params: Any) -> DiagonalEstimate:
    """Return a copy of an estimate to go on with, whose arrays are given away."""
    ok, rule = isinstance(start, DiagonalEstimate), "what estimate_diagonal returned"
    checks.require(ok, TypeError, "start", rule, start)
    checks.check_like("start.mean", start.mean, params)
    return _counted(jax.tree.map(jnp.copy, start))


def _counted(estimate: DiagonalEstimate) -> DiagonalEstimate:
    """Return an estimate whose counts are numbers again, and not arrays."""
    samples, batches = int(estimate.n_samples), int(estimate.n_batches)
    return estimate._replace(n_samples=samples, n_batches=batches)


def _enough(estimate: Any, n_samples: int | None, rtol: float | None) -> bool:
    n = estimate.n_samples
    if n_samples is not None and n >= n_samples:
        return True
    return rtol is not None and n >= 3 and bool(estimate.relative_error <= rtol)


def _check_whole(estimate: DiagonalEstimate, seen: int) -> None:
    n = estimate.n_batches
    rule = f"{n or 1} or more" + ", as start was interrupted after" * (n > 0)
    checks.require(seen >= (n or 1), ValueError, "batches", rule, seen)
    rule = "rows of which one has weight, and none a negative one"
    weight = float(estimate.partial_weight)
    checks.require(weight > 0, ValueError, "batches", rule, f"a weight of {weight}")
