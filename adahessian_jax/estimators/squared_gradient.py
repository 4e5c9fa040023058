# SPDX-License-Identifier: Apache-2.0
"""The squared gradient in the place of curvature, as Adam has it."""

from typing import Any

import jax.numpy as jnp
import optax

from adahessian_jax._src.dtypes import map_floats, wide


def squared_gradient() -> optax.GradientTransformationExtraArgs:
    """Take the square of the gradient for the curvature's diagonal.

    It costs no pass over the network. With it :func:`adahessian_jax.adahessian` is
    Adam, and in axes turned by gradients, :func:`adahessian_jax.in_eigenbasis`, SOAP:
    ``adahessian(rate, estimator=squared_gradient(), hessian_ema="mean",
    hessian_power=0.5)``.

    Returns:
      A transformation, whose ``update`` returns the squares, in float32 or wider, and
      whose state is empty. It needs nothing but the gradient.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> estimator = ah.squared_gradient()
      >>> w = jnp.zeros(2)
      >>> d, _ = estimator.update(jnp.array([1.0, 3.0]), estimator.init(w), w)
      >>> d.tolist()
      [1.0, 9.0]

    References:
      Kingma and Ba, `Adam <https://arxiv.org/abs/1412.6980>`_, 2015; Vyas et al., `SOAP
      <https://arxiv.org/abs/2409.11321>`_, 2024
    """

    def init_fn(params: optax.Params) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(
        updates: optax.Updates, state: Any, params: Any = None, **_: Any
    ) -> tuple[optax.Updates, optax.EmptyState]:
        del params
        return map_floats(lambda g: jnp.square(wide(g)), updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
