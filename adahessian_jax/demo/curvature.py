# SPDX-License-Identifier: Apache-2.0
"""What the demo looks at beside the loss: its sharpness, and the steps taken."""

from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import adahessian_jax as ah
from adahessian_jax.curvature.eigenvalues import Eigenpairs
from adahessian_jax.demo.data import Examples

LOSS = ah.losses.softmax_cross_entropy
QUANTILES = (0.05, 0.5, 0.95)


class Looks(NamedTuple):
    """The curvature of the loss, and the size of steps, after so many steps."""

    steps: list[int]
    tops: list[Eigenpairs]  # of the loss of a few training examples
    step_sizes: list[list[float]]  # that a unit of momentum takes: quantiles


def make_look(
    model: nn.Module, sample: Examples
) -> Callable[[Looks, int, optax.Params, optax.OptState, optax.Updates], None]:
    """Return a function that adds what there is to see after a step.

    It finds the sharpness on a sample, by Lanczos' method outside ``jit``: on a CPU,
    convolutions are slow inside of loops.
    """

    @jax.jit
    def loss_fn(params: optax.Params) -> jax.Array:
        outputs: Any = model.apply(params, sample.inputs)
        return LOSS(outputs, sample.labels)

    def look(
        looks: Looks,
        step: int,
        params: optax.Params,
        opt_state: optax.OptState,
        updates: optax.Updates,
    ) -> None:
        start = looks.tops[-1] if looks.tops else None
        try:
            top = ah.largest_eigenvalues(loss_fn, params, start=start)
        except ValueError:  # of a loss that diverged
            return
        looks.tops.append(top)
        looks.steps.append(step)
        looks.step_sizes.append([float(x) for x in step_sizes(opt_state, updates)])

    return look


@jax.jit
def step_sizes(opt_state: optax.OptState, updates: optax.Updates) -> jax.Array:
    """Return quantiles of the step that a unit of momentum takes, of all parameters."""
    adam = optax.tree.get(opt_state, "ScaleByAdamState")
    if adam is None:
        report = ah.diagnostics(opt_state, updates=updates)
        return jnp.stack([report[f"step_size/{q}"] for q in QUANTILES])
    pairs = zip(*map(jax.tree.leaves, (updates, adam.mu)), strict=True)
    sizes = [jnp.abs(u) / jnp.where(m == 0, jnp.nan, jnp.abs(m)) for u, m in pairs]
    flat = jnp.concatenate([x.ravel() for x in sizes])
    return jnp.nanquantile(flat, jnp.array(QUANTILES))
