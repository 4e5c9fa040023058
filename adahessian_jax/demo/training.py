# SPDX-License-Identifier: Apache-2.0
"""Training a Flax network with any optax optimizer."""

import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from adahessian_jax.demo.curvature import LOSS, Looks
from adahessian_jax.demo.data import Dataset, Examples, batches, thin

EVAL_CHUNK = 500  # examples that are evaluated at a time

TrainStep = Callable[
    [optax.Params, optax.OptState, Examples],
    tuple[optax.Params, optax.OptState, optax.Updates, jax.Array],
]


class Scores(NamedTuple):
    """Mean loss and share of labels that were the most likely class."""

    loss: float
    accuracy: float


class Curve(NamedTuple):
    """A loss after so many steps and seconds of training."""

    steps: list[float]
    seconds: list[float]
    losses: list[float]


class Run(NamedTuple):
    """What one optimizer did."""

    train: Scores  # on training examples, four times as many as for testing
    test: Scores
    compile_seconds: float
    seconds: float  # of all training steps, without compilation and evaluation
    batch_curve: Curve  # loss of each training batch, before the step it was used in
    test_curve: Curve
    looks: Looks


def make_train_step(model: nn.Module, tx: optax.GradientTransformation) -> TrainStep:
    """Return the function of one training step, to be compiled."""
    # Optimizers that do not need our functions, such as Adam, then ignore them.
    tx = optax.with_extra_args_support(tx)

    def train_step(
        params: optax.Params, opt_state: optax.OptState, batch: Examples
    ) -> tuple[optax.Params, optax.OptState, optax.Updates, jax.Array]:
        def predict_fn(params: optax.Params) -> Any:
            return model.apply(params, batch.inputs)

        def loss_fn(params: optax.Params) -> jax.Array:
            return LOSS(predict_fn(params), batch.labels)

        loss, grads = jax.value_and_grad(loss_fn)(params)
        updates, opt_state = tx.update(
            grads, opt_state, params, obj_fn=loss_fn, predict_fn=predict_fn
        )
        return optax.apply_updates(params, updates), opt_state, updates, loss

    return train_step


def train(
    model: nn.Module,
    tx: optax.GradientTransformation,
    data: Dataset,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    look: Callable[..., None],
    on_step: Callable[[int, float], None] = lambda step, loss: None,
) -> Run:
    """Train from scratch.

    The same seed gives the same initial weights and the same batches in the same
    order, whatever the optimizer.

    Args:
      model: a network from ``data``'s inputs to logits.
      tx: an optimizer.
      data: what to train and to test on.
      steps: how many batches to train on.
      batch_size: how many examples are in a batch.
      seed: of the initial weights and of the order of the batches.
      look: from :func:`adahessian_jax.demo.curvature.make_look`, called now and then.
      on_step: called after each step with its number and the loss of its batch.

    Returns:
      The scores of the trained network and how they came about.
    """
    params = jax.jit(model.init)(jax.random.key(seed), data.train.inputs[:1])
    opt_state = jax.jit(tx.init)(params)
    stream = batches(data.train, batch_size, seed=seed)
    score = make_scorer(model)

    # Compiled ahead, so that the time of the steps is theirs alone. The old parameters
    # and state are given away: the new ones take their memory.
    start = time.perf_counter()
    train_step = (
        jax.jit(make_train_step(model, tx), donate_argnums=(0, 1))
        .lower(params, opt_state, next(batches(data.train, batch_size, seed=seed)))
        .compile()
    )
    compile_seconds = time.perf_counter() - start

    batch_curve, test_curve = Curve([], [], []), Curve([], [], [])
    looks = Looks([], [], [])
    _add(test_curve, 0, 0.0, score(params, data.test).loss)
    test_interval = max(1, steps // 20)
    seconds = 0.0
    for step in range(1, steps + 1):
        batch = next(stream)
        start = time.perf_counter()
        params, opt_state, updates, loss = train_step(params, opt_state, batch)
        batch_loss = float(loss)  # waits for the step to end
        seconds += time.perf_counter() - start
        _add(batch_curve, step, seconds, batch_loss)
        if step % test_interval == 0 or step == steps:
            _add(test_curve, step, seconds, score(params, data.test).loss)
            look(looks, step, params, opt_state, updates)
        on_step(step, batch_loss)

    return Run(
        train=score(params, thin(data.train, 4 * len(data.test.labels))),
        test=score(params, data.test),
        compile_seconds=compile_seconds,
        seconds=seconds,
        batch_curve=batch_curve,
        test_curve=test_curve,
        looks=looks,
    )


def warmup_cosine(peak: float, steps: int) -> optax.Schedule:
    """Rise to ``peak`` over the first twentieth of the steps, then fall to zero."""
    warmup = max(1, steps // 20)
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, max(steps, warmup + 1))


def make_scorer(model: nn.Module) -> Callable[[optax.Params, Examples], Scores]:
    """Return a function that scores parameters on any number of examples."""

    @jax.jit
    def sums(params: optax.Params, chunk: Examples) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply(params, chunk.inputs)
        hits = jnp.argmax(logits, axis=-1) == chunk.labels
        sum_of_losses = LOSS.replace(reduction="sum")
        return sum_of_losses(logits, chunk.labels), jnp.sum(hits)

    def score(params: optax.Params, examples: Examples) -> Scores:
        loss, hits = 0.0, 0
        for chunk in _chunks(examples):
            chunk_loss, chunk_hits = sums(params, chunk)
            loss += float(chunk_loss)
            hits += int(chunk_hits)
        n = examples.labels.size
        return Scores(loss / n, hits / n)

    return score


def _chunks(examples: Examples) -> Iterator[Examples]:
    for start in range(0, len(examples.labels), EVAL_CHUNK):
        end = start + EVAL_CHUNK
        yield Examples(examples.inputs[start:end], examples.labels[start:end])


def _add(curve: Curve, step: int, seconds: float, loss: float) -> None:
    curve.steps.append(step)
    curve.seconds.append(seconds)
    curve.losses.append(loss)
