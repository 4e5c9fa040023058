# SPDX-License-Identifier: Apache-2.0
"""The networks that are measured, their data, and their training by Adam."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import adahessian_jax as ah
from adahessian_jax.demo.data import Examples, batches, load_digits, load_shakespeare
from adahessian_jax.demo.models import CharTransformer
from benchmarks.models import Mlp, ReluConvNet

LOSS = ah.losses.softmax_cross_entropy


class Net(NamedTuple):
    """A network, its data and how it is trained and measured."""

    model: nn.Module
    load: Callable[[], Examples]
    batch_size: int
    learning_rate: float
    n_coordinates: int | None = None  # of the diagonal; all by default


class Run:
    """A network with one batch to measure on, and the stream of others to train by."""

    def __init__(self, net: Net, seed: int) -> None:
        """Make parameters and batches, and compile the gradient."""
        examples = net.load()
        self.stream = batches(examples, net.batch_size, seed=seed + 1)
        self.batch = next(batches(examples, net.batch_size, seed=seed))
        self.params = net.model.init(jax.random.key(seed), self.batch.inputs)
        self.predict = net.model.apply
        self._tx = optax.adam(net.learning_rate)
        gradient = jax.jit(jax.value_and_grad(self.loss))
        compiled = gradient.lower(self.params, self.batch).compile()
        self.gradient_flops = compiled.cost_analysis()["flops"]

    def loss(self, params: Any, batch: Examples) -> jax.Array:
        """Compute the loss of a batch."""
        return LOSS(self.predict(params, batch.inputs), batch.labels)

    def compile(self, estimator: optax.GradientTransformation) -> tuple[Any, float]:
        """Compile loss, gradient and estimate; return that, and its FLOPs in gradients.

        The function maps parameters, a batch and a state to the diagonal as a vector
        and the next state.
        """
        update = optax.with_extra_args_support(estimator).update

        def step(params: Any, batch: Examples, state: Any) -> Any:
            value, grads = jax.value_and_grad(self.loss)(params, batch)
            more = {
                "obj_fn": lambda p: self.loss(p, batch),
                "predict_fn": lambda p: self.predict(p, batch.inputs),
                "labels": batch.labels,
            }
            diag, state = update(grads, state, params, **more)
            return value, grads, jax.flatten_util.ravel_pytree(diag)[0], state

        state = estimator.init(self.params)
        compiled = jax.jit(step).lower(self.params, self.batch, state).compile()
        flops = compiled.cost_analysis()["flops"]
        return lambda *args: compiled(*args)[2:], flops / self.gradient_flops

    def train(self, steps: int) -> Iterator[tuple[int, Any, Examples]]:
        """Yield count, parameters before a step, and its batch; the last, untrained."""

        @jax.jit
        def step(params: Any, state: Any, batch: Examples) -> Any:
            grads = jax.grad(self.loss)(params, batch)
            updates, state = self._tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        params, state = self.params, self._tx.init(self.params)
        for count in range(steps + 1):
            batch = next(self.stream)
            yield count, params, batch
            params, state = step(params, state, batch)


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


LARGE = {"n_coordinates": 480}
NETS = {
    "tanh MLP": Net(Mlp((32, 32, 10), jnp.tanh), partial(digits, 4), 128, 3e-3),
    "ReLU MLP": Net(Mlp((32, 32, 10)), partial(digits, 4), 128, 3e-3),
    "ReLU CNN": Net(ReluConvNet(), partial(digits, 2), 128, 3e-3),
    "transformer": Net(
        CharTransformer(32, n_layers=2, n_heads=2, width=12),
        partial(text, 32, 32),
        16,
        3e-3,
    ),
    "large ReLU MLP": Net(Mlp((256, 64, 10)), partial(digits, 1), 128, 1e-3, **LARGE),
    "large transformer": Net(
        CharTransformer(64, n_layers=2, n_heads=4, width=96),
        partial(text, 16, 64),
        8,
        1e-3,
        **LARGE,
    ),
}
