# SPDX-License-Identifier: Apache-2.0
"""Hessian-vector products and the exact diagonal of the Hessian, for any pytree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.checks import (
    check_callable,
    check_choice,
    check_int,
    check_like,
    check_real,
    scalar_function,
)
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable

Floats = list[jax.Array]
Gradient = Callable[[Floats], tuple[Floats, Any]]


def hvp(
    fun: Callable[[optax.Params], jax.Array],
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
          whose gradient cannot be differentiated at all. The step is
          :math:`\epsilon^{1/3} (1 + \|w\|) / \|v\|`, :math:`\epsilon` being the
          rounding unit of the coarsest dtype among the parameters.

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
      ``"finite-difference"`` is an approximation that no setting makes safe. Its error
      is at best about :math:`\epsilon^{2/3}` relative to the gradient (1e-5 in float32,
      several percent in bfloat16); where the function is only piecewise smooth (ReLU,
      max-pooling), the two gradients straddle kinks and the difference measures those
      instead, often many times the curvature. It costs two gradients.
    """
    check_callable("fun", fun, "params -> loss")
    checked = scalar_function("fun", fun)
    return value_grad_and_hvp(checked, params, tangents, mode=mode)[2]


def value_grad_and_hvp(
    fun: Callable[[optax.Params], Any],
    params: optax.Params,
    tangents: optax.Params,
    *,
    mode: str = "forward-over-reverse",
    has_aux: bool = False,
) -> tuple[Any, optax.Updates, optax.Updates]:
    """Multiply by the Hessian and return the value and gradient of the same pass.

    Args:
      fun: maps parameters to a scalar, or to ``(scalar, aux)`` with ``has_aux``.
      params: as in :func:`hvp`.
      tangents: as in :func:`hvp`.
      mode: as in :func:`hvp`.
      has_aux: whether ``fun`` returns auxiliary values as well.

    Returns:
      What ``fun`` returns, its gradient and the product; gradient and product of the
      structure, shapes and dtypes of ``params``, zero at the leaves held fixed.
    """
    check_mode(mode)
    check_real("params", params)
    check_like("tangents", tangents, params)
    floats, rebuild = split_differentiable(params)
    fixed = jax.tree.map(jnp.zeros_like, params)
    if not floats:
        return fun(params), fixed, fixed
    vectors = [
        jnp.asarray(v, x.dtype)
        for v, x in zip(split_differentiable(tangents, params)[0], floats, strict=True)
    ]
    _, rebuild_fixed = split_differentiable(fixed)

    def gradient(floats: Floats) -> tuple[Floats, Any]:
        value, grads = jax.value_and_grad(fun_of_floats, has_aux=has_aux)(floats)
        return grads, value

    def fun_of_floats(floats: Floats) -> Any:
        return fun(rebuild(floats))

    grads, value, product = _MODES[mode](gradient, floats, vectors)
    return value, rebuild_fixed(grads), rebuild_fixed(product)


def hessian_diag(
    fun: Callable[[optax.Params], jax.Array],
    params: optax.Params,
    *,
    chunk_size: int = 32,
) -> optax.Params:
    """Compute the exact diagonal of the Hessian, one Hessian-vector product per entry.

    For small problems, tests and notebooks: the cost is that of as many
    Hessian-vector products as there are parameters.

    Args:
      fun: maps parameters to a real scalar.
      params: any pytree of arrays. Integer and boolean leaves are held fixed.
      chunk_size: how many products are computed at a time. The memory needed is that
        of one product times this number.

    Returns:
      A pytree of the structure, shapes and dtypes of ``params``; zero at the leaves
      that are held fixed.

    Raises:
      ValueError: if ``chunk_size`` is below 1.
      TypeError: if ``fun`` does not return a real scalar, or a parameter is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> fun = lambda w: w[0] ** 2 + 3.0 * w[0] * w[1]  # H = [[2, 3], [3, 0]]
      >>> ah.hessian_diag(fun, jnp.array([1.0, 2.0])).tolist()
      [2.0, 0.0]
    """
    check_callable("fun", fun, "params -> loss")
    check_int("chunk_size", chunk_size, 1)
    check_real("params", params)
    floats, rebuild = split_differentiable(params)
    fixed = jax.tree.map(jnp.zeros_like, params)
    _, rebuild_diagonal = split_differentiable(fixed)
    starts = [0]
    for x in floats:
        starts.append(starts[-1] + x.size)
    n = starts.pop()
    if n == 0:
        return fixed
    checked = scalar_function("fun", fun)
    gradient = jax.grad(lambda floats: checked(rebuild(floats)))
    widest = accumulation_dtype(*floats)

    def entry(index: jax.Array) -> jax.Array:
        basis = [
            (jnp.arange(x.size) + start == index).astype(x.dtype).reshape(x.shape)
            for start, x in zip(starts, floats, strict=True)
        ]
        column = jax.jvp(gradient, (floats,), (basis,))[1]
        # All terms but one are zero, so nothing is rounded.
        products = [
            jnp.sum(e * c).astype(widest) for e, c in zip(basis, column, strict=True)
        ]
        return sum(products, start=jnp.zeros((), widest))

    n_chunks = -(-n // chunk_size)
    indices = jnp.minimum(jnp.arange(n_chunks * chunk_size), n - 1)
    diagonal = jax.lax.map(jax.vmap(entry), indices.reshape(n_chunks, chunk_size))
    diagonal = diagonal.reshape(-1)
    return rebuild_diagonal(
        [
            diagonal[start : start + x.size].reshape(x.shape).astype(x.dtype)
            for start, x in zip(starts, floats, strict=True)
        ]
    )


def value_and_grad(
    fun: Callable[[optax.Params], Any], params: optax.Params, *, has_aux: bool = False
) -> tuple[Any, optax.Updates]:
    """Do as ``jax.value_and_grad``, with zeros for leaves that are held fixed."""
    floats, rebuild = split_differentiable(params)
    value, grads = jax.value_and_grad(
        lambda floats: fun(rebuild(floats)), has_aux=has_aux
    )(floats)
    _, rebuild_grads = split_differentiable(jax.tree.map(jnp.zeros_like, params))
    return value, rebuild_grads(grads)


def check_mode(mode: str) -> None:
    """Raise ValueError unless ``mode`` is one of those of :func:`hvp`."""
    check_choice("mode", mode, _MODES)


def split_differentiable(
    tree: optax.Params, like: optax.Params | None = None
) -> tuple[Floats, Callable[[Floats], optax.Params]]:
    """Separate the floating-point leaves from those that no derivative reaches.

    Args:
      tree: any pytree.
      like: a pytree of the same structure whose dtypes decide; ``tree`` by default.

    Returns:
      The floating-point leaves, and the function that puts others in their place.
    """
    leaves, treedef = jax.tree.flatten(tree)
    kinds = leaves if like is None else jax.tree.leaves(like)
    where = [i for i, leaf in enumerate(kinds) if is_differentiable(leaf)]

    def rebuild(floats: Floats) -> optax.Params:
        new: list[Any] = list(leaves)
        for i, x in zip(where, floats, strict=True):
            new[i] = x
        return jax.tree.unflatten(treedef, new)

    return [jnp.asarray(leaves[i]) for i in where], rebuild


def _forward_over_reverse(
    gradient: Gradient, x: Floats, v: Floats
) -> tuple[Floats, Any, Floats]:
    grads, product, value = jax.jvp(gradient, (x,), (v,), has_aux=True)
    return grads, value, product


def _reverse_over_reverse(
    gradient: Gradient, x: Floats, v: Floats
) -> tuple[Floats, Any, Floats]:
    # The vjp multiplies by the transposed Hessian, which is the Hessian.
    grads, vjp, value = jax.vjp(gradient, x, has_aux=True)
    return grads, value, vjp(v)[0]


def _finite_difference(
    gradient: Gradient, x: Floats, v: Floats
) -> tuple[Floats, Any, Floats]:
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in x)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    step = rounding ** (1 / 3) * (1 + _norm(x)) / jnp.maximum(_norm(v), tiny)
    ahead, behind = (
        gradient([a + s.astype(a.dtype) * b for a, b in zip(x, v, strict=True)])[0]
        for s in (step, -step)
    )
    product = [
        (p - m) / (2 * step).astype(p.dtype) for p, m in zip(ahead, behind, strict=True)
    ]
    return *gradient(x), product


def _norm(leaves: Floats) -> jax.Array:
    widest = accumulation_dtype(*leaves)
    return jnp.sqrt(
        sum(
            (jnp.sum(jnp.square(x.astype(widest))) for x in leaves),
            start=jnp.zeros((), widest),
        )
    )


_MODES = {
    "forward-over-reverse": _forward_over_reverse,
    "reverse-over-reverse": _reverse_over_reverse,
    "finite-difference": _finite_difference,
}
