# SPDX-License-Identifier: Apache-2.0
"""Which leaves have derivatives, and in what precision to add numbers up."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf is real floating point; all others are held fixed."""
    return bool(jnp.issubdtype(dtype_of(leaf), jnp.floating))


def map_floats(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """Map the differentiable leaves of a tree, with those of others; keep the rest."""
    return jax.tree.map(
        lambda x, *y: function(x, *y) if is_differentiable(x) else x, tree, *others
    )


def zeros_like(tree: Any, dtype: Any = None) -> Any:
    """Return zeros, sharded like ``tree``, its floating-point leaves in ``dtype``."""
    zeros = jax.tree.map(jnp.zeros_like, tree)
    return map_floats(lambda x: jnp.zeros_like(x, dtype), zeros)


def dtype_of(leaf: Any) -> Any:
    """Return the dtype of an array, a tracer or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def wide(x: Array) -> Array:
    """Cast to the dtype in which numbers are added up."""
    return x.astype(accumulation_dtype(x))


def no_estimate(dtype: Any) -> Any:
    """Return the mark of an entry of an average that never had an estimate.

    Not infinity, which ``jax_debug_infs`` takes for an error.
    """
    return jnp.finfo(dtype).max


def never_estimated(average: Array) -> Array:
    """Where an average never had an estimate; the mark is infinite if it was cast."""
    return average >= no_estimate(average.dtype)


def cast_average(average: Array, dtype: Any) -> Array:
    """Cast an average, and the mark of entries that never had an estimate."""
    if average.dtype == dtype:
        return average
    value = average.astype(dtype)
    return jnp.where(never_estimated(average), no_estimate(dtype), value)


def accumulation_dtype(*leaves: Any) -> Any:
    """Return float64 if any leaf is, otherwise float32: half precision stalls."""
    double = any(dtype_of(leaf) == jnp.float64 for leaf in leaves)
    return jax.dtypes.canonicalize_dtype(jnp.float64 if double else jnp.float32)
