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
      line_search: whether it does so by a line search.
      whole_batch: whether it takes a batch that never changes, as line searches do.
    """

    make: Make
    start: float = 1e-2
    curvature: str = ""
    kept: MakeEstimator | None = None
    update_interval: int = 1
    initial_refreshes: int = 0
    own_rate: bool = False
    line_search: bool = False
    whole_batch: bool = False

    def suits(self, task: Task) -> bool:
        """Whether it can be run on a task."""
        return task.batch_size is None or not (self.line_search or self.whole_batch)

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


def plain(make: Callable[[Any, float], optax.GradientTransformation]) -> Make:
    """Let an optimizer take the learning rate and the weight decay alone."""
    return lambda learning_rate, task, key: make(learning_rate, task.weight_decay)


def sophia(gamma: float, start: float) -> Contender:
    """Return optax's Sophia, whose own estimator hands it an estimate from outside."""
    handed_on = optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda updates, state, params=None, *, hessian_diag, **_: (hessian_diag, state),
    )
    options = {"gamma": gamma, "hessian_diagonal_fn": handed_on}

    def make(learning_rate: Any, decay: float) -> Any:
        return optax.contrib.sophia(learning_rate, weight_decay=decay, **options)

    estimator = optax.contrib.hutchinson_estimator_diag_hessian()
    return Contender(plain(make), start, kept=lambda *_: estimator, update_interval=10)


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


def clipped(learning_rate: Any, decay: float) -> Any:
    """Clip each entry of Gauss-Newton steps in the parameters' own axes."""
    return optax.chain(
        ah.scale_by_adahessian(b2=0.95, hessian_ema="mean"),
        optax.clip(0.1),
        optax.add_decayed_weights(decay),
        optax.scale_by_learning_rate(learning_rate),
    )


def published_soap(betas: tuple[float, float]) -> Contender:
    """Return SOAP, which turns axes by gradients, with its decay rates."""
    return Contender(
        plain(lambda lr, decay: ah.published.soap(lr, betas=betas, weight_decay=decay))
    )


# When ``ah.newton`` estimates.
SCHEDULE = {"update_interval": 20, "initial_refreshes": 10}


def newton(**options: Any) -> Contender:
    """Return ``ah.newton`` as recommended, but for the options."""
    schedule = SCHEDULE | {k: v for k, v in options.items() if k in SCHEDULE}
    return Contender(
        lambda learning_rate, task, key: ah.newton(
            learning_rate,
            task.loss,
            weight_decay=task.weight_decay,
            seed=key,
            **options,
        ),
        0.03,
        "outputs",
        **schedule,
    )


def own_rate(*, whole: bool = False, **options: Any) -> Contender:
    """Return ``ah.newton`` at its own rate: AdamW's decay at a hundred times its rate.

    With its own momentum, too, if the batch is ``whole`` and never changes.
    """
    schedule = SCHEDULE | {k: v for k, v in options.items() if k in SCHEDULE}
    if whole:
        options |= {"b1": None}
    return Contender(
        lambda learning_rate, task, key: ah.newton(
            None,
            task.loss,
            schedule=learning_rate._replace(peak=1.0),
            weight_decay=task.weight_decay / 100,
            seed=key,
            **options,
        ),
        1.0,
        "outputs",
        **schedule,
        own_rate=True,
        whole_batch=whole,
    )


def soap(**options: Any) -> Contender:
    """Return ``ah.soap``, but for the options."""
    return Contender(
        plain(lambda lr, decay: ah.soap(lr, weight_decay=decay, **options))
    )


def delayed(make: Make, estimator: MakeEstimator, start: float = 0.3) -> Contender:
    """Let an average move on every step, by estimates of every tenth."""
    return Contender(
        make, start, kept=estimator, update_interval=10, initial_refreshes=50
    )


CONTENDERS: dict[str, Contender] = {
    "SGD": Contender(
        plain(
            lambda lr, decay: optax.chain(
                optax.add_decayed_weights(decay), optax.sgd(lr, momentum=0.9)
            )
        ),
        0.1,
    ),
    "AdamW": Contender(plain(lambda lr, decay: optax.adamw(lr, weight_decay=decay))),
    "Muon": Contender(
        plain(lambda lr, decay: optax.contrib.muon(lr, weight_decay=decay))
    ),
    "SOAP": published_soap((0.95, 0.95)),
    "SOAP, 0.9 and 0.99": published_soap((0.9, 0.99)),
    "L-BFGS": Contender(
        plain(lambda *_: optax.lbfgs(memory_size=20)), own_rate=True, line_search=True
    ),
    "Sophia": sophia(0.01, 1e-3),
    "Sophia, gamma=1": sophia(1.0, 3e-3),
    "AdaHessian, paper": Contender(paper, 0.3, "loss"),
    "AdaHessian, davda54": Contender(davda54, 0.3, "loss"),
    "AdaHessian, Zack-Dugue": Contender(zack_dugue(), 0.3, "loss"),
    "paper, delayed": delayed(paper, hutchinson),
    "davda54, delayed": delayed(davda54, hutchinson),
    "Zack-Dugue, delayed": delayed(zack_dugue(), gaussian),
    "Gauss-Newton, clipped": delayed(plain(clipped), gauss_newton, 0.03),
    "newton": newton(),
    "newton, own rate": own_rate(),
    "newton, own rate and momentum": own_rate(
        whole=True, update_interval=10, clip_threshold=0.1
    ),
    "soap": soap(),
}
