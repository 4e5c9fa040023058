# SPDX-License-Identifier: Apache-2.0
"""A Flax linen train state for optimizers that take extra arguments; needs Flax."""

import functools
from collections.abc import Mapping
from typing import Any

import optax
from flax.training import train_state


class TrainState(train_state.TrainState):
    """Flax's ``TrainState``, whose ``apply_gradients`` passes extra arguments on.

    Examples:
      >>> import jax, jax.numpy as jnp, flax.linen as nn
      >>> import adahessian_jax as ah
      >>> from adahessian_jax.linen import TrainState
      >>> model, x = nn.Dense(1), jnp.ones((4, 2))
      >>> params = model.init(jax.random.key(0), x)["params"]
      >>> state = TrainState.create(
      ...   apply_fn=model.apply, params=params, tx=ah.adahessian(0.1))
      >>> def loss_fn(p): return jnp.mean(state.apply_fn({"params": p}, x) ** 2)
      >>> grads = jax.grad(loss_fn)(state.params)
      >>> state = state.apply_gradients(grads=grads, extra_args={"obj_fn": loss_fn})
      >>> int(state.step)
      1
    """

    def apply_gradients(
        self,
        *,
        grads: optax.Updates,
        extra_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> "TrainState":
        """Update parameters, optimizer state and step.

        Args:
          grads: gradients of the structure of ``params``.
          extra_args: keyword arguments for ``tx.update``, such as ``obj_fn``,
            ``predict_fn`` or ``curvature``.
          **kwargs: fields to replace, such as batch statistics.

        Returns:
          The new train state.
        """
        # As it is: optax.MultiSteps takes them and does not say so by its type.
        update_fn = functools.partial(self.tx.update, **(extra_args or {}))
        bound = self.replace(tx=optax.GradientTransformation(self.tx.init, update_fn))
        updated = super(TrainState, bound).apply_gradients(grads=grads, **kwargs)
        return updated.replace(tx=self.tx)
