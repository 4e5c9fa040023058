# SPDX-License-Identifier: Apache-2.0
"""The networks of the benchmark, their data and their losses."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from adahessian_jax.demo.data import Examples, load_digits, load_shakespeare
from adahessian_jax.demo.models import CharTransformer


class DenseNet(nn.Module):
    """A fully connected network of images."""

    widths: tuple[int, ...]
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, height, width, 1) to logits (batch, 10)."""
        x = images.reshape(images.shape[0], -1)
        for width in self.widths:
            x = self.activation(nn.Dense(width)(x))
        return nn.Dense(10)(x)


class ReluConvNet(nn.Module):
    """Two strided convolutions and a dense layer."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Map images (batch, height, width, 1) to logits (batch, 10)."""
        x = images
        for features in (8, 16):
            x = nn.relu(nn.Conv(features, (3, 3), strides=2)(x))
        return nn.Dense(10)(x.reshape(x.shape[0], -1))


class Net(NamedTuple):
    """A network, its data and how it is trained and measured."""

    model: nn.Module
    load: Callable[[], Examples]
    batch_size: int
    learning_rate: float
    piecewise_linear: bool = False
    n_coordinates: int | None = None  # of the diagonal; all by default
    chunk_size: int = 32  # entries of the exact diagonal at a time


def digits(pool: int) -> Examples:
    """Load digits, averaged over squares of ``pool`` pixels."""
    images, labels = load_digits().train
    side = 28 // pool
    shape = (len(images), side, pool, side, pool, 1)
    return Examples(images.reshape(shape).mean((2, 4)), labels)


def text(context: int, n_characters: int) -> Examples:
    """Load text with all but the most frequent characters replaced by one sign."""
    inputs, labels = load_shakespeare().train
    frequency = np.bincount(inputs.ravel(), minlength=labels.max() + 1)
    code = np.full(len(frequency), n_characters - 1, np.int32)
    frequent = np.argsort(-frequency, kind="stable")[: n_characters - 1]
    code[frequent] = np.arange(n_characters - 1)
    return Examples(code[inputs[:, :context]], code[labels[:, :context]])


class Objective(NamedTuple):
    """The loss of a network on a batch, and what the estimators ask for."""

    predict: Callable[[Any, jax.Array], jax.Array]

    def output_loss(self, logits: jax.Array, labels: jax.Array) -> jax.Array:
        """Average the loss over all rows."""
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return jnp.mean(loss)

    def __call__(self, params: Any, batch: Examples) -> jax.Array:
        """Compute the loss of a batch."""
        return self.output_loss(self.predict(params, batch.inputs), batch.labels)

    def extra_args(self, batch: Examples, takes_parts: bool) -> dict[str, Any]:
        """Make the arguments of an estimator's update."""
        if takes_parts:
            return {
                "batch": batch,
                "obj_fn": self,
                "predict_fn": lambda params, part: self.predict(params, part.inputs),
                "output_loss": lambda logits, part: self.output_loss(
                    logits, part.labels
                ),
            }
        return {
            "obj_fn": lambda params: self(params, batch),
            "predict_fn": lambda params: self.predict(params, batch.inputs),
            "output_loss": lambda logits: self.output_loss(logits, batch.labels),
        }


def training(net: Net, objective: Objective, params: Any) -> tuple[Any, Any]:
    """Return one step of Adam, and its first state."""
    tx = optax.adam(net.learning_rate)

    @jax.jit
    def step(params: Any, state: Any, batch: Examples) -> Any:
        grads = jax.grad(objective)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step, tx.init(params)


NETS = {
    "tanh MLP": Net(DenseNet((32, 32), jnp.tanh), partial(digits, 4), 128, 3e-3),
    "ReLU MLP": Net(
        DenseNet((32, 32), nn.relu),
        partial(digits, 4),
        128,
        3e-3,
        piecewise_linear=True,
    ),
    # Batched tangents of kernels make XLA:CPU's convolutions slow, hence no chunks.
    "ReLU CNN": Net(
        ReluConvNet(),
        partial(digits, 2),
        128,
        3e-3,
        piecewise_linear=True,
        chunk_size=1,
    ),
    "transformer": Net(
        CharTransformer(32, n_layers=2, n_heads=2, width=12),
        partial(text, 32, 32),
        16,
        3e-3,
    ),
    "large ReLU MLP": Net(
        DenseNet((256, 64), nn.relu),
        partial(digits, 1),
        128,
        1e-3,
        piecewise_linear=True,
        n_coordinates=480,
    ),
    "large transformer": Net(
        CharTransformer(64, n_layers=2, n_heads=4, width=96),
        partial(text, 16, 64),
        8,
        1e-3,
        n_coordinates=480,
        chunk_size=8,
    ),
}
