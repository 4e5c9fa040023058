# SPDX-License-Identifier: Apache-2.0
"""Tried beside ``scale_by_quadratic_model``: a learning rate for each tensor."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.output_losses import as_output_loss, row_weights


class ScaleByRatePerTensorState(NamedTuple):
    """Averages of the tensors' slopes (k,), and of the curvature among them (k, k)."""

    slopes: jax.Array
    curvatures: jax.Array


def scale_by_rate_per_tensor(
    loss: str,
    fraction: float = 0.7,
    *,
    decay: float = 0.9,
    damping: float = 0.1,
    reduction: str = "mean",
) -> optax.GradientTransformationExtraArgs:
    """Choose the rates of all k tensors at the minimum of one quadratic model.

    The model has k variables, and takes k products with the Jacobian. ``damping`` is
    what is added to each tensor's own curvature, as a multiple of it.
    """
    output_loss = as_output_loss(loss, 1)

    def init_fn(params: optax.Params) -> ScaleByRatePerTensorState:
        k = len(jax.tree.leaves(params))
        return ScaleByRatePerTensorState(jnp.zeros(k), jnp.zeros((k, k)))

    def update_fn(
        updates: optax.Updates,
        state: ScaleByRatePerTensorState,
        params: optax.Params | None = None,
        *,
        grad: optax.Updates,
        predict_fn: Any,
        **extra_args: Any,
    ) -> tuple[optax.Updates, ScaleByRatePerTensorState]:
        del extra_args
        leaves, treedef = jax.tree.flatten(updates)
        pairs = zip(jax.tree.leaves(grad), leaves, strict=True)
        slopes = jnp.stack([jnp.vdot(g, u) for g, u in pairs])
        outputs, pushforward = jax.linearize(predict_fn, params)

        def along(chosen: jax.Array) -> jax.Array:
            one = [u * c for u, c in zip(leaves, chosen, strict=True)]
            return pushforward(treedef.unflatten(one))

        tangents = jax.vmap(along)(jnp.eye(len(leaves)))
        weights = row_weights(outputs, None, output_loss.event_ndim, reduction, None)
        products = jax.vmap(lambda t: output_loss.product(outputs, t, None) * weights)
        axes = list(range(1, tangents.ndim))
        curvatures = jnp.tensordot(tangents, products(tangents), (axes, axes))
        state = jax.tree.map(
            lambda old, new: decay * old + (1 - decay) * new,
            state,
            ScaleByRatePerTensorState(slopes, curvatures),
        )
        own = jnp.diag(state.curvatures)
        damped = state.curvatures + jnp.diag(damping * own + 1e-12)
        rates = fraction * jnp.maximum(jnp.linalg.solve(damped, state.slopes), 0)
        scaled = [r * u for r, u in zip(rates, leaves, strict=True)]
        return treedef.unflatten(scaled), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
