# SPDX-License-Identifier: Apache-2.0
"""Which leaves have derivatives, and in what precision to add numbers up."""

from typing import Any

import jax.numpy as jnp
from jax import Array


def is_differentiable(leaf: Any) -> bool:
    """Whether a leaf is real floating point; all others are held fixed."""
    return bool(jnp.issubdtype(dtype_of(leaf), jnp.floating))


def dtype_of(leaf: Any) -> Any:
    """Return the dtype of an array, a tracer or a Python number."""
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def wide(x: Array) -> Array:
    """Cast to the dtype in which numbers are added up."""
    return x.astype(accumulation_dtype(x))


def accumulation_dtype(*leaves: Any) -> Any:
    """Return float64 if any leaf is, otherwise float32: half precision stalls."""
    double = any(dtype_of(leaf) == jnp.float64 for leaf in leaves)
    return jnp.dtype(jnp.float64 if double else jnp.float32)
