# SPDX-License-Identifier: Apache-2.0
"""How a rule shares curvature within the tensors of an estimate."""

import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.tree_util import keystr, tree_leaves_with_path, tree_map_with_path

from adahessian_jax._src.dtypes import is_differentiable

KeyPath = tuple[Any, ...]
AveragingRule = Callable[[KeyPath, Array], Array]


def warn_if_unused(averaging: AveragingRule | None, params: optax.Params) -> None:
    """Warn if a rule leaves all parameters as they are."""
    if averaging is None:
        return
    untouched = []

    def noting(path: Any, leaf: Array) -> Array:
        averaged = averaging(path, leaf)
        untouched.append(averaged is leaf)
        return averaged

    jax.eval_shape(lambda p: average(noting, p), params)
    if untouched and all(untouched):
        first, _ = tree_leaves_with_path(params)[0]
        warnings.warn(
            f"averaging applies to none of the {len(untouched)} parameters, such as"
            f" {keystr(first)}. Tell the rule which leaves are meant, with is_conv= for"
            " conv_spatial_average.",
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
        pairs = zip(reversed(shape), reversed(leaf.shape), strict=False)
        if len(shape) > leaf.ndim or any(n not in (1, size) for n, size in pairs):
            raise ValueError(
                "averaging must return a leaf that broadcasts to the shape of the"
                f" parameter, got {shape} for {keystr(path)} of shape {leaf.shape}."
            )
        return averaged

    return tree_map_with_path(one, diag)
