# SPDX-License-Identifier: Apache-2.0
"""Layers that are stacked along leading axes of their parameters."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.averaging_rule import KeyPath
from adahessian_jax._src.checks import check_callable

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
            f" {n} for {jax.tree_util.keystr(path)} of shape {jnp.shape(leaf)}."
        )
    return int(n)


def over_layers(function: Callable[..., Any], n: int) -> Callable[..., Any]:
    """Map a function over the n leading axes of all its arguments."""
    for _ in range(n):
        function = jax.vmap(function)
    return function
