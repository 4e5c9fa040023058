# SPDX-License-Identifier: Apache-2.0
"""The optimizers that are compared, each with all settings fixed but the learning rate.

All have the same weight decay, and the same schedule: linear warm-up over the first 5 %
of the steps, then a cosine to zero.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adahessian_jax as ah
from benchmarks.training.tasks import Task


class WarmupCosine(NamedTuple):
    """A rise to the peak over 5 % of the steps, and a fall along a cosine to zero."""

    peak: Any
    steps: Any

    def __call__(self, count: Any) -> jax.Array:
        """Return the learning rate of a step."""
        warmup = 0.05 * self.steps
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * (count - warmup) / (self.steps - warmup)))
        return self.peak * jnp.where(count < warmup, (count + 1) / warmup, cosine)


Make = Callable[[WarmupCosine, Task, jax.Array], optax.GradientTransformation]
MakeEstimator = Callable[[Task, jax.Array], optax.GradientTransformation]


class Contender(NamedTuple):
    """An optimizer with one setting of everything but the learning rate.

    Attributes:
      make: ``(learning_rate, task, key)`` to the transformation.
      start: the learning rate in whose neighbourhood the search begins.
      curvature: what the estimator in the transformation is of: the ``"loss"``, the
        ``"outputs"``, or nothing.
      kept: ``(task, key)`` to an estimator outside of the transformation, which is
        handed the last estimate on every update.
      update_interval: how often the curvature is estimated,
      initial_refreshes: and on how many first steps.
      own_rate: whether it finds the length of its steps itself: no rate is searched.
      whole_batch: whether it takes a batch that never changes.
      line_search: whether it is handed what ``optax.lbfgs`` searches with.
    """

    make: Make
    start: float = 1e-2
    curvature: str = ""
    kept: MakeEstimator | None = None
    update_interval: int = 1
    initial_refreshes: int = 0
    own_rate: bool = False
    whole_batch: bool = False
    line_search: bool = False

    def suits(self, task: Task) -> bool:
        """Whether it can be run on a task."""
        return task.batch_size is None or not self.whole_batch

    def is_due(self, step: Any) -> Any:
        """Whether update number ``step``, from 0, is one with an estimate."""
        return (step < self.initial_refreshes) | (step % self.update_interval == 0)


def hutchinson(task: Task, key: jax.Array) -> optax.GradientTransformation:
    """Return the published estimator."""
    return ah.hutchinson(seed=key)


def gaussian(task: Task, key: jax.Array) -> optax.GradientTransformation:
    """Return the third published form's estimator, without its control variate."""
    return ah.hutchinson(probe="normal", seed=key)


def gauss_newton(task: Task, key: jax.Array) -> optax.GradientTransformation:
    """Return the quiet estimator, for the task's loss."""
    return ah.gauss_newton(task.loss, seed=key)


def plain(make: Callable[..., Any], start: float = 1e-2, **options: Any) -> Contender:
    """Return an optimizer that takes learning rate, weight decay and the options."""
    return Contender(
        lambda rate, task, key: make(rate, weight_decay=task.weight_decay, **options),
        start,
    )


def sgd(learning_rate: Any, weight_decay: float) -> Any:
    """Return gradient descent with momentum."""
    decayed = optax.add_decayed_weights(weight_decay)
    return optax.chain(decayed, optax.sgd(learning_rate, momentum=0.9))


def sophia(gamma: float, start: float) -> Contender:
    """Return optax's Sophia, whose own estimator hands it an estimate from outside."""
    handed_on = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, *, hessian_diag, **_: (hessian_diag, state),
    )
    options = {"gamma": gamma, "hessian_diagonal_fn": handed_on}
    estimator = optax.contrib.hutchinson_estimator_diag_hessian()
    handed = plain(optax.contrib.sophia, start, **options)
    return handed._replace(kept=lambda *_: estimator, update_interval=10)


def paper(learning_rate: Any, task: Task, key: jax.Array) -> Any:
    """Return the paper's form; convolutions are in the tasks that loop."""
    options = {"weight_decay": task.weight_decay, "average_conv_kernel": task.loops}
    return ah.published.paper(learning_rate, **options, seed=key)


def davda54(learning_rate: Any, task: Task, key: jax.Array) -> Any:
    """Return the second published form."""
    return ah.published.davda54(learning_rate, weight_decay=task.weight_decay, seed=key)


def zack_dugue(eps: float = 1e-8) -> Make:
    """Return the third published form's curvature, with Adam's correction of biases."""
    return lambda learning_rate, task, key: ah.adahessian(
        learning_rate,
        eps=eps,
        hessian_ema="mean",
        hessian_power=0.5,
        estimator=gaussian(task, key),
        weight_decay=task.weight_decay,
    )


def clipped(learning_rate: Any, task: Task, key: jax.Array) -> Any:
    """Clip each entry of Gauss-Newton steps in the parameters' own axes."""
    return optax.chain(
        ah.scale_by_adahessian(b2=0.95, hessian_ema="mean"),
        optax.clip(0.1),
        optax.add_decayed_weights(task.weight_decay),
        optax.scale_by_learning_rate(learning_rate),
    )


# When ``ah.newton`` estimates.
SCHEDULE = {"update_interval": 20, "initial_refreshes": 10}


def newton(*, own_rate: bool = False, whole: bool = False, **options: Any) -> Contender:
    """Return ``ah.newton`` as recommended, but for the options.

    At its own rate its decay is AdamW's at a hundred times AdamW's rate. If the batch
    is ``whole`` and never changes, it has its own momentum, too.
    """
    if whole:
        options |= {"b1": None}

    def make(learning_rate: WarmupCosine, task: Task, key: jax.Array) -> Any:
        rate, decay, more = learning_rate, task.weight_decay, options
        if own_rate:
            more = options | {"schedule": learning_rate._replace(peak=1.0)}
            rate, decay = None, decay / 100
        return ah.newton(rate, task.loss, weight_decay=decay, seed=key, **more)

    return Contender(
        make,
        1.0 if own_rate else 0.03,
        "outputs",
        own_rate=own_rate,
        whole_batch=whole,
        **{k: options.get(k, default) for k, default in SCHEDULE.items()},
    )


def delayed(make: Make, estimator: MakeEstimator, start: float = 0.3) -> Contender:
    """Let an average move on every step, by estimates of every tenth."""
    return Contender(
        make, start, kept=estimator, update_interval=10, initial_refreshes=50
    )


CONTENDERS: dict[str, Contender] = {
    "SGD": plain(sgd, 0.1),
    "AdamW": plain(optax.adamw),
    "Muon": plain(optax.contrib.muon),
    "SOAP": plain(ah.published.soap, betas=(0.95, 0.95)),
    "SOAP, 0.9 and 0.99": plain(ah.published.soap, betas=(0.9, 0.99)),
    "L-BFGS": Contender(
        lambda *_: optax.lbfgs(memory_size=20),
        own_rate=True,
        whole_batch=True,
        line_search=True,
    ),
    "Sophia": sophia(0.01, 1e-3),
    "Sophia, gamma=1": sophia(1.0, 3e-3),
    "AdaHessian, paper": Contender(paper, 0.3, "loss"),
    "AdaHessian, davda54": Contender(davda54, 0.3, "loss"),
    "AdaHessian, Zack-Dugue": Contender(zack_dugue(), 0.3, "loss"),
    "paper, delayed": delayed(paper, hutchinson),
    "davda54, delayed": delayed(davda54, hutchinson),
    "Zack-Dugue, delayed": delayed(zack_dugue(), gaussian),
    "Gauss-Newton, clipped": delayed(clipped, gauss_newton, 0.03),
    "newton": newton(),
    "newton, own rate": newton(own_rate=True),
    "newton, own rate and momentum": newton(
        own_rate=True, whole=True, update_interval=10, clip_threshold=0.1
    ),
    "soap": plain(ah.soap),
}
