# SPDX-License-Identifier: Apache-2.0
"""Layers that are stacked along leading axes of their parameters, or are here."""

import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.tree_util import keystr, tree_leaves_with_path

from adahessian_jax._src.averaging_rule import KeyPath
from adahessian_jax._src.checks import check_callable
from adahessian_jax._src.dtypes import accumulation_dtype
from adahessian_jax._src.meshes import is_sharded, replicated_beside, sharded_like
from adahessian_jax._src.xla import part

Stacked = Callable[[KeyPath, Array], int]


def check_stacked(stacked: Any) -> None:
    """Raise TypeError unless an argument could say how many axes are stacks."""
    if stacked is not None:
        check_callable("stacked", stacked, "(path, leaf) -> number of leading axes")


def stack_ndim(stacked: Stacked | None, path: KeyPath, leaf: Any) -> int:
    """Return how many leading axes of a leaf are stacks."""
    n = 0 if stacked is None else stacked(path, leaf)
    if not isinstance(n, int) or not 0 <= n <= jnp.ndim(leaf):
        raise ValueError(
            "stacked must return how many leading axes are stacks of layers, got"
            f" {n} for {keystr(path)} of shape {jnp.shape(leaf)}."
        )
    return int(n)


def over_layers(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    """Map a function over the n leading axes of all its arguments."""
    for _ in range(n):
        function = jax.vmap(function)
    return function


def alike(tree: Any) -> list[list[int]]:
    """Return the leaves that are alike, by their places in ``jax.tree.leaves``.

    Their shapes are the same, and their paths but for numbers, as those of layers are:
    what a compiler has to do for them is done once for all, and devices most likely
    hold the same parts of them.
    """
    groups: dict[Any, list[int]] = {}
    for i, (path, leaf) in enumerate(tree_leaves_with_path(tree)):
        key = re.sub(r"\d+", "", keystr(path)), jnp.shape(leaf)
        groups.setdefault(key, []).append(i)
    return list(groups.values())


def stack(leaves: Sequence[Any]) -> Array:
    """Stack arrays of one shape; leave a single one as it is."""
    if len(leaves) == 1:
        return leaves[0]
    leaves = list(map(jnp.asarray, leaves))
    if len({x.dtype for x in leaves}) > 1:
        leaves = [x.astype(accumulation_dtype(*leaves)) for x in leaves]
    like = next(filter(is_sharded, leaves), leaves[0])
    return jnp.stack([sharded_like(like, x) for x in leaves])


def unstack(x: Array, leaves: Sequence[Any]) -> list[Array]:
    """Return the arrays that were stacked, each sharded as that in its place."""
    if len(leaves) == 1:
        return [x]

    def placed(y: Any, x: Array) -> Array:
        return sharded_like(y, x) if is_sharded(y) else replicated_beside(x, x)

    return [placed(y, part(x, i, 1)[0]) for i, y in enumerate(leaves)]


def stacks(tree: Any, groups: list[list[int]]) -> list[Array]:
    """Stack the leaves of a tree that are alike."""
    leaves = jax.tree.leaves(tree)
    return [stack([leaves[i] for i in group]) for group in groups]


def unstacked(like: Any, groups: list[list[int]], new: list[Array]) -> Any:
    """Return the tree whose leaves that are alike have new stacks."""
    leaves, treedef = jax.tree.flatten(like)
    for group, x in zip(groups, new, strict=True):
        old = [leaves[i] for i in group]
        for i, y in zip(group, unstack(x, old), strict=True):
            leaves[i] = y
    return jax.tree.unflatten(treedef, leaves)
