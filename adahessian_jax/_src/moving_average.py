# SPDX-License-Identifier: Apache-2.0
"""Exponential moving averages (EMA), their bias correction, and one to hand on."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src.dtypes import accumulation_dtype, is_differentiable


class CurvatureEMA(NamedTuple):
    """The optimizer's moving average of the Hessian's diagonal, as it hands it on.

    Attributes:
      value: the average, bias-corrected; the structure of the parameters.
      decay: its decay rate, ``b2``.
      count: how many estimates have entered it.
    """

    value: optax.Updates
    decay: ArrayLike
    count: Array  # type: ignore[assignment]  # hides tuple.count


def ema(decay: ArrayLike, new: Array, old: Array) -> Array:
    """Move an average towards ``new``, in float32 or wider.

    Returns the accumulation dtype, not that of ``old``, so that nothing is rounded
    before it is used. A leaf that is not floating point stays as it is.
    """
    if not is_differentiable(old):
        return old
    dtype = accumulation_dtype(new, old)
    b = as_dtype(decay, dtype)
    return (1 - b) * new.astype(dtype) + b * old.astype(dtype)


def debias(decay: ArrayLike, count: Array) -> Array:
    """Return the factor that corrects an average of ``count`` terms begun at zero."""
    dtype = jax.dtypes.canonicalize_dtype(jnp.float64)
    seen = 1 - jnp.asarray(decay, dtype) ** count.astype(dtype)
    return 1 / seen


def as_dtype(value: Any, dtype: Any) -> Any:
    """Cast a hyperparameter that was traced; leave a Python number weakly typed."""
    return value.astype(dtype) if hasattr(value, "astype") else value


def is_static(value: ArrayLike, number: float) -> bool:
    """Whether a hyperparameter is a Python number of this value, for good."""
    return isinstance(value, int | float) and value == number


@jax.custom_jvp
def root(x: Array) -> Array:
    """Return the square root, with a derivative of zero at zero.

    It is infinite, and would make NaN of a derivative through an optimizer's step.
    """
    return jnp.sqrt(x)


@root.defjvp
def _root_jvp(primals: Any, tangents: Any) -> Any:
    (x,), (t,) = primals, tangents
    y = jnp.sqrt(x)
    return y, jnp.where(x == 0, 0, t / (2 * jnp.where(x == 0, 1, y)))
