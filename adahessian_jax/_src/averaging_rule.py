# SPDX-License-Identifier: Apache-2.0
"""How a rule shares curvature within the tensors of an estimate."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.dtypes import is_differentiable

KeyPath = tuple[Any, ...]
AveragingRule = Callable[[KeyPath, Array], Array]


def warn_if_unused(averaging: AveragingRule | None, params: optax.Params) -> None:
    if averaging is None:
        return
    untouched = []

    def noting(path: Any, leaf: Array) -> Array:
        averaged = averaging(path, leaf)
        untouched.append(averaged is leaf)
        return averaged

    jax.eval_shape(lambda p: average(noting, p), params)
    if untouched and all(untouched):
        first, _ = jax.tree_util.tree_leaves_with_path(params)[0]
        warnings.warn(
            f"averaging applies to none of the {len(untouched)} parameters, such as"
            f" {jax.tree_util.keystr(first)}. Tell the rule which leaves are meant,"
            " with is_conv= for conv_spatial_average.",
            stacklevel=4,
        )


def average(averaging: AveragingRule | None, diag: optax.Updates) -> optax.Updates:
    """Apply an averaging rule to the floating-point leaves of an estimate."""
    if averaging is None:
        return diag

    def one(path: Any, leaf: Array) -> Array:
        if not is_differentiable(leaf):
            return leaf
        averaged = averaging(path, leaf)
        shape = jnp.shape(averaged)
        try:
            fits = jnp.broadcast_shapes(shape, leaf.shape) == leaf.shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                "averaging must return a leaf that broadcasts to the shape of the"
                f" parameter, got {shape} for {jax.tree_util.keystr(path)} of shape"
                f" {leaf.shape}."
            )
        return averaged

    return jax.tree_util.tree_map_with_path(one, diag)
