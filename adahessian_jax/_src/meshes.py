# SPDX-License-Identifier: Apache-2.0
"""Meshes: where arrays lie that a function returns.

On a mesh of explicit axes the type of an array says how it is sharded, and a product of
sharded arrays has to. On one of automatic axes the compiler sees to that.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.axes import type_of


def as_if_automatic(function: Callable[..., Any], *, replicate: bool = False) -> Any:
    """Leave it to the compiler what lies where inside a function, on any mesh.

    The first argument is an array. Where it is sharded by explicit axes, the other
    arguments are replicated, and what is returned is sharded like it or ``replicate``d.
    """

    def applied(x: Array, *rest: Any) -> Any:
        if not is_sharded(x):
            return function(x, *rest)
        kind: Any = jax.typeof(x).sharding
        out: Any = _everywhere(kind.mesh) if replicate else kind
        options = {"axes": kind.mesh.explicit_axes, "out_sharding": out}
        return jax.sharding.auto_axes(function, **options)(x, *rest)

    return applied


def replicated_beside(x: Any, tree: Any) -> Any:
    """Replicate a tree over the mesh of explicit axes that ``x`` is on, if any.

    What a step returns would else be sharded as the compiler likes, and come back so.
    """
    if not _is_on_explicit_axes(x):
        return tree
    if not isinstance(x, jax.core.Tracer):
        return jax.device_put(tree, _everywhere(x.sharding.mesh))
    kind: Any = jax.typeof(x)
    everywhere = _everywhere(kind.sharding.mesh)
    return jax.tree.map(lambda y: jax.sharding.reshard(y, everywhere), tree)


def _everywhere(mesh: Any) -> jax.sharding.NamedSharding:
    return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())


def replicated(tree: Any) -> Any:
    """Have each device hold all of some small arrays, if the mesh is known.

    That is the mesh of automatic axes of ``jax.set_mesh``. Else the compiler may deal
    them out, and exchange something for each column that is made orthogonal.
    """
    if not hasattr(jax.sharding, "AxisType"):
        return tree
    mesh: Any = jax.sharding.get_abstract_mesh()
    if jax.sharding.AxisType.Auto not in mesh.axis_types:
        return tree
    whole = jax.sharding.PartitionSpec()
    return jax.tree.map(lambda x: jax.lax.with_sharding_constraint(x, whole), tree)


def sharded_like(like: Any, tree: Any) -> Any:
    """Return a tree sharded by explicit axes as another is."""

    def resharded(x: Array, y: Array) -> Array:
        return jax.sharding.reshard(y, jax.typeof(x).sharding) if is_sharded(x) else y

    return jax.tree.map(resharded, like, tree)


def is_sharded(x: Array) -> bool:
    """Whether an array is sharded by explicit axes."""
    sharding: Any = getattr(type_of(x), "sharding", None)
    return any(axis is not None for axis in getattr(sharding, "spec", ()))


def check_sharded_alike(name: str, tree: Any, updates: Any) -> None:
    """Raise if explicit axes shard averages otherwise than the gradient."""
    for x, g in zip(*map(jax.tree.leaves, (tree, updates)), strict=True):
        # What is on no mesh, as jit makes it that is not told of one, goes with any.
        placed = _is_on_explicit_axes(x) and _is_on_explicit_axes(g)
        if placed and jnp.shape(x) == jnp.shape(g):
            got, expected = (jax.typeof(y).sharding.spec for y in (x, g))
            if got != expected:
                raise ValueError(
                    f"{name} must be sharded over the mesh as the gradient is, by"
                    f" {expected}, got {got}. Make the state by tx.init(params) of"
                    " parameters that are sharded alike; or use a mesh of automatic"
                    " axes, on which each may be sharded in its own way."
                )


def _is_on_explicit_axes(x: Any) -> bool:
    mesh = getattr(getattr(type_of(x), "sharding", None), "mesh", None)
    return bool(getattr(mesh, "explicit_axes", ()))
