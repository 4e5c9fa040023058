# SPDX-License-Identifier: Apache-2.0
"""First and second derivatives in the floating-point leaves of any pytree."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src import checks
from adahessian_jax._src.dtypes import accumulation_dtype, is_differentiable, wide

Floats = list[Array]


def value_grad_and_hvp(
    fun: Any, params: Any, tangents: Any, *, mode: str
) -> tuple[Any, Any, Any]:
    """Return what a function gives, its gradient and its Hessian times a vector.

    ``fun`` maps parameters to ``(scalar, aux)``. Gradient and product are like
    ``params`` in structure, shapes and dtypes, and zero at leaves that are held fixed.
    """
    check_mode(mode)
    checks.check_real("params", params)
    checks.check_real("tangents", tangents)
    checks.check_like("tangents", tangents, params)
    floats, rebuild = split_differentiable(params)
    _, rebuild_fixed = split_differentiable(jax.tree.map(jnp.zeros_like, params))
    if not floats:
        return fun(params), rebuild_fixed([]), rebuild_fixed([])
    vectors, _ = split_differentiable(tangents, params)
    vectors = [jnp.asarray(v, x.dtype) for v, x in zip(vectors, floats, strict=True)]
    value_and_grad = jax.value_and_grad(lambda x: fun(rebuild(x)), has_aux=True)
    try:
        grads, value, product = _MODES[mode](
            lambda x: value_and_grad(x)[::-1], floats, vectors
        )
    except TypeError as error:
        if "custom_vjp" in str(error):
            error.add_note(
                "Pass mode='reverse-over-reverse', which needs no such rule."
            )
        raise
    return value, rebuild_fixed(grads), rebuild_fixed(product)


def value_and_grad(fun: Any, params: Any) -> tuple[Any, Any]:
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
    """Return floating-point leaves, and the function that puts others in their place.

    The dtypes of ``like`` decide, a tree of the same structure; ``tree`` by default.
    """
    chosen = map(is_differentiable, jax.tree.leaves(tree if like is None else like))
    floats, rebuild = split_leaves(tree, list(chosen))
    return [jnp.asarray(x) for x in floats], rebuild


def split_leaves(
    tree: Any, chosen: list[bool]
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Return the chosen leaves, and the function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)

    def rebuild(new: list[Any]) -> Any:
        rest = iter(new)
        pairs = zip(leaves, chosen, strict=True)
        return jax.tree.unflatten(treedef, [next(rest) if c else x for x, c in pairs])

    return [x for x, c in zip(leaves, chosen, strict=True) if c], rebuild


def squared_norm(leaves: Floats) -> Array:
    """Return the sum of the squares of all entries, in float32 or wider."""
    zero = jnp.zeros((), accumulation_dtype(*leaves))
    return sum((jnp.sum(jnp.square(x.astype(zero.dtype))) for x in leaves), start=zero)


def normalized(v: Floats) -> tuple[Floats, Array]:
    """Return a vector divided by its largest entry, and that entry.

    So that neither squares nor products in half precision underflow.
    """
    zero = jnp.zeros((), accumulation_dtype(*v))
    tops = (jnp.max(jnp.abs(x), initial=0).astype(zero.dtype) for x in v)
    largest = functools.reduce(jnp.maximum, tops, zero)
    divisor = jnp.where(largest > 0, largest, 1)
    return [x.astype(zero.dtype) / divisor for x in v], largest


def _forward_over_reverse(gradient: Any, x: Floats, v: Floats) -> Any:
    grads, product, value = jax.jvp(gradient, (x,), (v,), has_aux=True)
    return grads, value, product


def _reverse_over_reverse(gradient: Any, x: Floats, v: Floats) -> Any:
    # The vjp multiplies by the transposed Hessian, which is the Hessian.
    grads, vjp, value = jax.vjp(gradient, x, has_aux=True)
    return grads, value, vjp(v)[0]


def _finite_difference(gradient: Any, x: Floats, v: Floats) -> Any:
    rounding = max(float(jnp.finfo(leaf.dtype).eps) for leaf in x)
    unit, largest = normalized(v)
    length, norm = (jnp.sqrt(squared_norm(leaves)) for leaves in (x, unit))

    def moved(a: Array, b: Array, s: Array) -> Array:
        return (a.astype(b.dtype) + s * b).astype(a.dtype)

    step = rounding ** (1 / 3) * (1 + length) / jnp.maximum(norm, 1)
    ahead, behind = (
        gradient([moved(*ab, s) for ab in zip(x, unit, strict=True)])[0]
        for s in (step, -step)
    )
    scale, pairs = largest / (2 * step), zip(ahead, behind, strict=True)
    return *gradient(x), [_times(scale, wide(p) - wide(m), p) for p, m in pairs]


def _times(scale: Array, x: Array, like: Array) -> Array:
    return (scale * x.astype(scale.dtype)).astype(like.dtype)


_MODES = {
    "forward-over-reverse": _forward_over_reverse,
    "reverse-over-reverse": _reverse_over_reverse,
    "finite-difference": _finite_difference,
}
