# SPDX-License-Identifier: Apache-2.0
"""Tasks of others with figures that they published, to be run beside them.

Their optimizers were tuned by their authors, on machines of theirs: what is compared is
what a number of steps brings. The figures are in ``results/training/published.csv``.
"""

import itertools
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import adahessian_jax as ah
from adahessian_jax.demo.data import Examples
from benchmarks.training.tasks import Params, Task, all_images, on_examples


def pinn(*widths: int) -> Task:
    """Return Poisson's equation in float64, with its boundary as a part of the loss.

    A row of the data is a point and whether it lies on the boundary. The loss is half
    the mean of squared residuals inside plus half that on the boundary.
    """
    n_inside, n_boundary = 900, 120
    n = n_inside + n_boundary
    weights = np.sqrt([n / (2 * n_inside), n / (2 * n_boundary)])
    rng = np.random.default_rng(0)
    inside = rng.uniform(size=(n_inside, 2))
    edge = rng.uniform(size=(n_boundary, 2))
    side = np.arange(n_boundary) % 4
    edge[np.arange(n_boundary), side // 2] = side % 2
    flags = np.repeat([0.0, 1.0], [n_inside, n_boundary])
    rows = np.column_stack([np.concatenate([inside, edge]), flags])
    test = np.column_stack([rng.uniform(size=(9000, 2)), np.zeros(9000)])
    sizes = (2, *widths, 1)

    def init(key: jax.Array) -> Params:
        """Draw as PyTorch does: uniformly up to one over the root of the inputs."""
        params = []
        for i, (a, b) in enumerate(itertools.pairwise(sizes)):
            draw = partial(jax.random.uniform, minval=-(a**-0.5), maxval=a**-0.5)
            w, c = jax.random.split(jax.random.fold_in(key, i))
            params.append((draw(w, (a, b), float), draw(c, (b,), float)))
        return params

    def u(params: Params, x: jax.Array) -> jax.Array:
        for w, b in params[:-1]:
            x = jnp.tanh(x @ w + b)
        w, b = params[-1]
        return (x @ w + b)[0]

    def residual(params: Params, row: jax.Array) -> jax.Array:
        x, on_boundary = row[:2], row[2] > 0
        source = 2 * jnp.pi**2 * jnp.prod(jnp.sin(jnp.pi * x))
        laplacian = jnp.trace(jax.hessian(partial(u, params))(x))
        value = jnp.where(on_boundary, u(params, x), laplacian + source)
        return value * jnp.where(on_boundary, weights[1], weights[0])

    def forward(params: Params, batch: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        outputs = jax.vmap(partial(residual, params))(batch[0])
        return outputs, jnp.zeros_like(outputs)

    def relative_l2(params: Params, batch: tuple[jax.Array]) -> jax.Array:
        exact = jnp.prod(jnp.sin(jnp.pi * batch[0][:, :2]), axis=1)
        found = jax.vmap(partial(u, params))(batch[0][:, :2])
        return jnp.linalg.norm(found - exact) / jnp.linalg.norm(exact)

    return Task(
        init=init,
        forward=forward,
        loss=ah.losses.squared_error,
        train=(rng.permutation(rows),),
        validation=(test,),
        evaluated=9000,
        metric=relative_l2,
        x64=True,
        batch_size=None,
        steps=1000,
        weight_decay=0.0,
    )


def pinn_shallow() -> Task:
    """Return Poisson's equation for one hidden layer."""
    return pinn(64)


def pinn_deep() -> Task:
    """Return the same for four hidden layers."""
    return pinn(64, 64, 48, 48)


def quadratic_deep() -> Task:
    """Return DeepOBS's noisy quadratic, whose curvature lies in turned axes."""
    n = 100
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(0, 1, 90), rng.uniform(30, 60, 10)])
    turn, _ = np.linalg.qr(rng.normal(size=(n, n)))
    root = jnp.asarray(turn * np.sqrt(values * n / 2), jnp.float32)
    noise = 0.6 * rng.normal(size=(2, 1000, n)).astype(np.float32)

    def forward(params: Params, batch: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
        outputs = (params - batch[0]) @ root
        return outputs, jnp.zeros_like(outputs)

    return Task(
        init=lambda key: jnp.ones(n),
        forward=forward,
        loss=ah.losses.squared_error,
        train=(noise[0],),
        validation=(noise[1],),
        batch_size=128,
        steps=700,
        tuning_seeds=3,
        evaluated=1000,
        weight_decay=0.0,
    )


class ConvNet(nn.Module):
    """DeepOBS's 2c2d: two convolutions of 5 by 5 with pooling, two dense layers."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Map images (batch, 28, 28, 1) to logits (batch, 10)."""
        for features in (32, 64):
            x = nn.relu(nn.Conv(features, (5, 5))(x))
            x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(1024)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


def fmnist_2c2d() -> Task:
    """Return DeepOBS's classification of Fashion-MNIST."""
    data, model = all_images(), ConvNet()

    def errors(params: Params, batch: Examples) -> jax.Array:
        predicted = jnp.argmax(model.apply(params, batch.inputs), axis=-1)
        return jnp.mean(predicted != batch.labels)

    options = {"steps": 10 * len(data.train.labels) // 128, "loops": True}
    options |= {"evaluated": 10_000, "metric": errors, "weight_decay": 0.0}
    return on_examples(model, data.train, data.test, **options)


def deep_autoencoder() -> Task:
    """Return the autoencoder of K-BFGS and TNT, with Fashion-MNIST for MNIST.

    What is reported is the sum over pixels, as there; trained with is the mean.
    """
    data, loss = all_images(), ah.losses.sigmoid_binary_cross_entropy
    layers: list[Any] = [lambda x: x.reshape(len(x), -1)]
    for width in (1000, 500, 250, 30, 250, 500, 1000, 784):
        linear = width in (30, 784)  # the code and the pixels
        layers += [nn.Dense(width)] + [nn.relu] * (not linear)
    model = nn.Sequential(layers)

    def forward(params: Params, batch: Examples) -> tuple[jax.Array, jax.Array]:
        pixels = batch.inputs.reshape(len(batch.inputs), -1)
        return model.apply(params, batch.inputs), pixels

    def of_image(params: Params, batch: Examples) -> jax.Array:
        return 784 * loss(*forward(params, batch))

    options = {"loss": loss, "metric": of_image, "evaluated": 10_000}
    options |= {"batch_size": 1000, "steps": 20 * len(data.train.labels) // 1000}
    return on_examples(model, data.train, data.test, forward, **options)


_MAKERS = (pinn_shallow, pinn_deep, quadratic_deep, fmnist_2c2d, deep_autoencoder)
PUBLISHED_TASKS: dict[str, Callable[[], Task]] = {f.__name__: f for f in _MAKERS}
