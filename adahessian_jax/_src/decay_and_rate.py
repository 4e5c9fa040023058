# SPDX-License-Identifier: Apache-2.0
"""The last parts of an optimizer: weight decay and learning rate, and what it needs."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from adahessian_jax._src.checks import check_float, check_mask, check_params
from adahessian_jax._src.dtypes import is_differentiable, map_floats
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
    # A parameter that is not floating point is frozen, and must not decay.
    return optax.masked(decay, lambda tree: jax.tree.map(is_differentiable, tree))


def scale_by_rate(learning_rate: Any, name: str = "learning_rate") -> Any:
    """Return ``optax.scale_by_learning_rate``, its argument checked.

    Updates that are not floating point are left as they are, in dtype too.
    """
    if not callable(learning_rate):
        check_float(name, learning_rate, 0.0)
    scale = optax.scale_by_learning_rate(learning_rate)

    def update_fn(updates: Any, state: Any, params: Any = None) -> Any:
        scaled, state = scale.update(updates, state, params)
        return map_floats(lambda _, x: x, updates, scaled), state

    return optax.GradientTransformation(scale.init, update_fn)


def with_gradient(
    tx: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
    """Hand the gradient that an optimizer is given to all of its parts, as ``grad``."""

    def update_fn(
        updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, optax.OptState]:
        return tx.update(updates, state, params, **{"grad": updates, **extra_args})

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def decay_after_step(decay: Any, rate: Any) -> optax.GradientTransformation:
    """Decay the parameter as its step leaves it, at the rate of that step.

    An update u of p becomes u - rate * decay * (p + u); the first stays as it is.
    """

    def init_fn(params: Any) -> Any:
        return jnp.zeros([], jnp.int32), rate.init(params)

    def update_fn(
        updates: Any, state: Any, params: Any = None
    ) -> tuple[optax.Updates, Any]:
        count, rate_state = state
        check_params(params)
        stepped = map_floats(jnp.add, params, updates)
        zeros = jax.tree.map(jnp.zeros_like, updates)
        decayed, _ = decay.update(zeros, decay.init(params), stepped)
        shrunk, rate_state = rate.update(decayed, rate_state, params)
        shrunk = jax.tree.map(lambda x: jnp.where(count == 0, 0, x), shrunk)
        added = jax.tree.map(jnp.add, updates, shrunk)
        return added, (optax.safe_increment(count), rate_state)

    return optax.GradientTransformation(init_fn, update_fn)
