# SPDX-License-Identifier: Apache-2.0
"""The last two parts of an optimizer: weight decay and learning rate."""

from typing import Any

import jax
import optax

from adahessian_jax._src.checks import check_float, check_mask
from adahessian_jax._src.dtypes import is_differentiable
from adahessian_jax._src.moving_average import is_static


def decoupled_weight_decay(
    weight_decay: Any, mask: Any, name: str = "weight_decay"
) -> optax.GradientTransformation:
    """Return ``optax.add_decayed_weights`` for the parameters that have derivatives."""
    check_float(name, weight_decay, 0.0)
    check_mask("weight_decay_mask", mask)
    decay = optax.add_decayed_weights(weight_decay, mask)
    if is_static(weight_decay, 0) and mask is None:
        decay = optax.identity()
    # A parameter that is not floating point is frozen, and must not decay either.
    return optax.masked(decay, lambda updates: jax.tree.map(is_differentiable, updates))


def scale_by_rate(learning_rate: Any, name: str = "learning_rate") -> Any:
    """Return ``optax.scale_by_learning_rate``, its argument checked."""
    if not callable(learning_rate):
        check_float(name, learning_rate, 0.0)
    return optax.scale_by_learning_rate(learning_rate)
