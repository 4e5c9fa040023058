# SPDX-License-Identifier: Apache-2.0
"""Flax networks of the benchmarks of accuracy and training."""

from collections.abc import Callable

import flax.linen as nn
import jax


class Mlp(nn.Module):
    """Dense layers with an activation between them."""

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map a point, a batch of points or one of images to rows of outputs."""
        x = x.reshape(len(x), -1) if x.ndim > 2 else x
        for width in self.widths[:-1]:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class ReluConvNet(nn.Module):
    """Two strided convolutions and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, height, width, 1) to logits (batch, 10)."""
        x = images
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class ResNet8(nn.Module):
    """A residual network; statistics are those of the batch in evaluation too."""

    n_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch, classes)."""

        def unit(x: jax.Array, width: int, size: int, stride: int = 1) -> jax.Array:
            kernel, strides = (size, size), (stride, stride)
            x = nn.Conv(width, kernel, strides, use_bias=False)(x)
            # Batch normalisation, without averages of the statistics.
            return nn.LayerNorm(reduction_axes=(0, 1, 2), feature_axes=-1)(x)

        x = nn.relu(unit(x, 8, 3, 2))
        for i, width in enumerate((8, 16, 32)):
            stride = 1 if i == 0 else 2
            y = unit(nn.relu(unit(x, width, 3, stride)), width, 3)
            x = nn.relu(y + (x if i == 0 else unit(x, width, 1, stride)))
        return nn.Dense(self.n_classes)(x.mean(axis=(1, 2)))
