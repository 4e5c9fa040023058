# SPDX-License-Identifier: Apache-2.0
"""First and second derivatives in the floating-point leaves of any pytree."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.dtypes import accumulation_dtype, is_differentiable

Floats = list[Array]
Gradient = Callable[[Floats], tuple[Floats, Any]]


def value_grad_and_hvp(
    fun: Callable[[Any], tuple[Array, Any]], params: Any, tangents: Any, *, mode: str
) -> tuple[Any, Any, Any]:
    """Multiply by the Hessian and return the value and gradient of the same pass.

    Args:
      fun: maps parameters to ``(scalar, aux)``.
      params: any pytree of arrays.
      tangents: the vector, of the same structure and shapes.
      mode: how to differentiate twice, see :func:`adahessian_jax.hvp`.

    Returns:
      What ``fun`` returns, its gradient and the product; gradient and product of the
      structure, shapes and dtypes of ``params``, zero at the leaves held fixed.
    """
    check_mode(mode)
    checks.check_real("params", params)
    checks.check_like("tangents", tangents, params)
    floats, rebuild = split_differentiable(params)
    _, rebuild_fixed = split_differentiable(jax.tree.map(jnp.zeros_like, params))
    if not floats:
        return fun(params), rebuild_fixed([]), rebuild_fixed([])
    vectors, _ = split_differentiable(tangents, params)
    vectors = [jnp.asarray(v, x.dtype) for v, x in zip(vectors, floats, strict=True)]

    def gradient(floats: Floats) -> tuple[Floats, Any]:
        value, grads = jax.value_and_grad(lambda x: fun(rebuild(x)), has_aux=True)(
            floats
        )
        return grads, value

    grads, value, product = _MODES[mode](gradient, floats, vectors)
    return value, rebuild_fixed(grads), rebuild_fixed(product)


def value_and_grad(
    fun: Callable[[Any], tuple[Array, Any]], params: Any
) -> tuple[Any, Any]:
    """Do as ``jax.value_and_grad``, with zeros for leaves that are held fixed."""
    floats, rebuild = split_differentiable(params)
    _, rebuild_fixed = split_differentiable(jax.tree.map(jnp.zeros_like, params))
    value, grads = jax.value_and_grad(lambda x: fun(rebuild(x)), has_aux=True)(floats)
    return value, rebuild_fixed(grads)


def check_mode(mode: str) -> None:
    """Raise ValueError unless ``mode`` is one of those of :func:`hvp`."""
    checks.check_choice("mode", mode, _MODES)


def split_differentiable(
    tree: Any, like: Any = None
) -> tuple[Floats, Callable[[Floats], Any]]:
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

    def rebuild(floats: Floats) -> Any:
        new: list[Any] = list(leaves)
        for i, x in zip(where, floats, strict=True):
            new[i] = x
        return jax.tree.unflatten(treedef, new)

    return [jnp.asarray(leaves[i]) for i in where], rebuild


def squared_norm(leaves: Floats) -> Array:
    """Return the sum of the squares of all entries, in float32 or wider."""
    zero = jnp.zeros((), accumulation_dtype(*leaves))
    squares = (jnp.sum(jnp.square(x.astype(zero.dtype))) for x in leaves)
    return sum(squares, start=zero)


def _forward_over_reverse(gradient: Gradient, x: Floats, v: Floats) -> Any:
    grads, product, value = jax.jvp(gradient, (x,), (v,), has_aux=True)
    return grads, value, product


def _reverse_over_reverse(gradient: Gradient, x: Floats, v: Floats) -> Any:
    # The vjp multiplies by the transposed Hessian, which is the Hessian.
    grads, vjp, value = jax.vjp(gradient, x, has_aux=True)
    return grads, value, vjp(v)[0]


def _finite_difference(gradient: Gradient, x: Floats, v: Floats) -> Any:
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in x)
    tiny = float(jnp.finfo(jnp.float32).tiny)
    length, norm = (jnp.sqrt(squared_norm(leaves)) for leaves in (x, v))
    step = rounding ** (1 / 3) * (1 + length) / jnp.maximum(norm, tiny)
    ahead, behind = (
        gradient([a + s.astype(a.dtype) * b for a, b in zip(x, v, strict=True)])[0]
        for s in (step, -step)
    )
    differences = zip(ahead, behind, strict=True)
    product = [(p - m) / (2 * step).astype(p.dtype) for p, m in differences]
    return *gradient(x), product


_MODES = {
    "forward-over-reverse": _forward_over_reverse,
    "reverse-over-reverse": _reverse_over_reverse,
    "finite-difference": _finite_difference,
}
