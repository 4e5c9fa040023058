# SPDX-License-Identifier: Apache-2.0
"""The curvature of a loss in a network's outputs, of which some rows may not count."""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.checks import raise_if
from adahessian_jax._src.dtypes import wide


class CurvatureAt(NamedTuple):
    """The Hessian of a loss at some outputs; rows without weight may hold anything.

    Attributes:
      outputs: in float32 or wider, zero in rows without weight.
      weights: of the rows, in a shape that broadcasts.
      factor: of each row's Hessian, S, times signs.
      product: each row's Hessian times a vector.
    """

    outputs: Array
    weights: Array
    factor: Callable[[Array], Array]
    product: Callable[[Array], Array]

    def root(self, signs: Array) -> Array:
        """Return a factor of the loss's Hessian times signs."""
        factor = masked(self.factor(signs), self.weights)
        raise_if(
            jnp.any(jnp.isnan(factor)),
            "loss must be convex in the outputs, but its second derivative there is"
            " negative in some direction, by more than rounding, or not a number: a"
            " Gauss-Newton matrix then has no real factor. Use hutchinson().",
        )
        return factor * jnp.sqrt(self.weights)

    def times(self, v: Array) -> Array:
        """Return the loss's Hessian times what is zero in rows without weight."""
        return masked(self.product(v), self.weights) * self.weights

    def seen(self, v: Array) -> Array:
        """Return something of the outputs' shape as it counts."""
        return masked(wide(v), self.weights)


def masked(x: Array, weights: Array) -> Array:
    """Return an array with zeros in the rows that have no weight."""
    return jnp.where(weights > 0, x, 0)
