# SPDX-License-Identifier: Apache-2.0
"""The demo's networks. Smooth activations, so that all of the curvature is there."""

import flax.linen as nn
import jax
import jax.numpy as jnp


class ConvNet(nn.Module):
    """Two convolutions and two dense layers, for images."""

    n_classes: int

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch, classes)."""
        x = images
        for features in (16, 32):
            x = nn.gelu(nn.Conv(features, (3, 3))(x))
            x = nn.avg_pool(x, (2, 2), strides=(2, 2))
        x = x.reshape(x.shape[0], -1)
        x = nn.gelu(nn.Dense(64)(x))
        return nn.Dense(self.n_classes)(x)


class CharTransformer(nn.Module):
    """A decoder-only transformer with pre-normalisation, for characters."""

    n_classes: int
    n_layers: int = 2
    n_heads: int = 4
    width: int = 64

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Map characters (batch, time) to logits of the next (batch, time, classes)."""
        mask = nn.make_causal_mask(tokens)
        positions = jnp.arange(tokens.shape[-1])
        x = nn.Embed(self.n_classes, self.width)(tokens)
        x = x + nn.Embed(tokens.shape[-1], self.width)(positions)
        for _ in range(self.n_layers):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.n_heads)(y, y, mask=mask)
            y = nn.Dense(4 * self.width)(nn.LayerNorm()(x))
            x = x + nn.Dense(self.width)(nn.gelu(y))
        return nn.Dense(self.n_classes)(nn.LayerNorm()(x))
