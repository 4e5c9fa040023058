# SPDX-License-Identifier: Apache-2.0
"""Named axes of ``pmap``, ``shard_map`` and ``vmap``: what is alike along them or not.

An ``axis_name`` is the name of an axis, a tuple of names, or None for no axis.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.dtypes import accumulation_dtype, is_differentiable, map_floats

AxisName = str | tuple[str, ...] | None


def axis_key(key: Array, axis_name: AxisName) -> Array:
    """Return a key of its own for each device of an axis; without one, ``key``."""
    if axis_name is None:
        return key
    try:
        return jax.random.fold_in(key, jax.lax.axis_index(axis_name))
    except NameError:
        raise ValueError(
            f"axis_name={axis_name!r} is not bound here: call update inside jax.pmap,"
            " jax.shard_map or jax.vmap with that axis name, or leave axis_name out."
        ) from None


def communicates(fun: Callable[[Any], Any], params: Any, axis_name: AxisName) -> bool:
    """Whether a function exchanges anything over an axis, as synchronised norms do.

    Then what a device computes depends on the parameters of the others, and probes have
    to be the same on all of them.
    """
    if axis_name is None:
        return False
    names = {axis_name} if isinstance(axis_name, str) else set(axis_name)

    def exchanges(step: Any) -> bool:
        axes = step.params.get("axes", step.params.get("axis_name", ()))
        axes = axes if isinstance(axes, tuple) else (axes,)
        return step.primitive.name not in _LOCAL and not names.isdisjoint(axes)

    return takes_step(fun, params, exchanges)


_LOCAL = ("axis_index", "pvary", "pcast")


def takes_step(fun: Callable[[Any], Any], x: Any, is_it: Callable[[Any], bool]) -> bool:
    """Whether a function of x takes a step of some kind, or one inside does."""

    def found(part: Any) -> bool:
        if isinstance(part, tuple | list):
            return any(map(found, part))
        part = getattr(part, "jaxpr", part)
        steps = getattr(part, "eqns", ())
        return any(is_it(step) or found(tuple(step.params.values())) for step in steps)

    def arrays(x: Any) -> list[Any]:  # of auxiliary values some may be none
        return [y for y in jax.tree.leaves(fun(x)) if hasattr(y, "dtype")]

    return found(jax.make_jaxpr(arrays)(x))


def axis_size(axis_name: AxisName) -> int:
    """Return the number of devices of an axis, 1 without one."""
    return 1 if axis_name is None else jax.lax.psum(1, axis_name)


def sum_over_axis(tree: Any, axis_name: AxisName) -> Any:
    """Add a tree up over an axis."""
    return tree if axis_name is None else jax.lax.psum(tree, axis_name)


def mean_over_axis(tree: Any, axis_name: AxisName) -> Any:
    """Average the floating-point leaves of a tree over an axis."""
    if axis_name is None:
        return tree
    return map_floats(lambda x: jax.lax.pmean(x, axis_name), tree)


def as_varying(tree: Any, axis_name: AxisName) -> Any:
    """Take a tree for one that differs between devices, so that derivatives may.

    Inside ``jax.shard_map``, which keeps account of what differs, the derivative in
    something that all devices share is the sum of the derivatives on all of them.
    """
    if axis_name is None or not hasattr(jax, "typeof"):
        return tree
    manual = jax.sharding.get_abstract_mesh().manual_axes  # none inside vmap
    names = (axis_name,) if isinstance(axis_name, str) else axis_name
    names = tuple(name for name in names if name in manual)
    return map_floats(lambda x: _vary(x, names), tree)


def check_replicas(tree: Any, params: Any, axis_name: AxisName = None) -> None:
    """Raise if something differs between devices along an axis that goes unnamed.

    Devices then share the parameters and see other rows. This is known inside
    ``jax.shard_map`` only, and if it keeps account of what varies.
    """
    named = (axis_name,) if isinstance(axis_name, str) else axis_name or ()
    leaves = (map(type_of, jax.tree.leaves(x)) for x in (tree, params))
    varying, shared = (set().union(*map(_varying_axes, types)) for types in leaves)
    if unnamed := sorted(varying - shared - set(named)):
        raise ValueError(
            f"axis_name={unnamed[0]!r} must be given, to the estimator or to newton:"
            " each device has rows of its own here, and what it estimates from them"
            " would be taken for that of the whole batch."
        )


def check_whole(params: Any, axis_name: AxisName, *, along: str) -> None:
    """Raise if devices hold different parts of the parameters, as far as is known.

    Along the ``"named"`` axes, over which estimates are averaged, or along ``"all"``.
    """
    types = map(type_of, jax.tree.leaves(params))
    cut = set().union(*map(_varying_axes, types))
    if along == "named":
        cut &= {axis_name} if isinstance(axis_name, str) else set(axis_name or ())
    if cut:
        raise ValueError(
            f"params must be the same on all devices of the axis {min(cut)!r}, and here"
            " their type says that they differ. Where devices hold parts of them, use"
            " jax.jit over a mesh; or, along an axis that is not axis_name, the"
            " estimator ah.gauss_newton with a learning rate that is given."
        )


def zeros_of_type(like: jax.ShapeDtypeStruct) -> Array:
    """Return zeros to add up in, cut and differing between devices as others are."""
    dtype = accumulation_dtype(like) if is_differentiable(like) else like.dtype
    zeros = jnp.zeros(like.shape, dtype, device=getattr(like, "sharding", None))
    return _vary(zeros, tuple(_varying_axes(like)))


def _vary(x: Any, names: tuple[str, ...]) -> Any:
    """Take an array for one that differs along the named axes of devices."""
    new = tuple(name for name in names if name not in _varying_axes(type_of(x)))
    if not new:
        return x
    if hasattr(jax.lax, "pcast"):
        return jax.lax.pcast(x, new, to="varying")
    return jax.lax.pvary(x, new)  # type: ignore[attr-defined,unused-ignore]


def _varying_axes(kind: Any) -> frozenset[Any]:
    """Return the axes along which arrays of a type differ, where JAX keeps account."""
    if hasattr(kind, "manual_axis_type"):
        return getattr(kind.manual_axis_type, "varying", frozenset())
    return getattr(kind, "vma", None) or frozenset()


def type_of(x: Any) -> Any:
    """Return the type of an array, which says where it lies; None of an older JAX."""
    return jax.typeof(x) if hasattr(jax, "typeof") else None
