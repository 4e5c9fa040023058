# SPDX-License-Identifier: Apache-2.0
"""Hessian-vector products, and the Hessian's exact diagonal."""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.derivatives import (
    check_mode,
    split_differentiable,
    value_grad_and_hvp,
)
from adahessian_jax._src.dtypes import accumulation_dtype


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
    objective = checks.objective("fun", fun)
    return value_grad_and_hvp(objective, params, tangents, mode=mode)[2]


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
    objective = checks.objective("fun", lambda floats: fun(rebuild(floats)))
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
