# SPDX-License-Identifier: Apache-2.0
"""The optimizers that are compared, each with all settings fixed but the learning rate.

They have the task's weight decay; at rates of their own less or none.
They have one schedule, a linear warm-up over the first 5 % of the steps, then a cosine
to zero; L-BFGS and ``subspace_newton`` have none.
"""

from collections.abc import Callable
from functools import partial
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
    """An optimizer with one setting of everything but the learning rate."""

    make: Make
    start: float = 1e-2  # the rate in whose neighbourhood the search begins
    curvature: str = ""  # its estimator is of the "loss", the "outputs", or not there
    # An estimator outside of it, whose last estimate it is handed on every update.
    kept: MakeEstimator | None = None
    update_interval: int = 1  # how often the curvature is estimated,
    initial_refreshes: int = 0  # and on how many first steps
    own_rate: bool = False  # it finds the length of its steps: no rate is searched
    whole_batch: bool = False  # it takes a batch that never changes
    line_search: bool = False  # it is handed what ``optax.lbfgs`` searches with

    def suits(self, task: Task) -> bool:
        """Whether it can be run on a task."""
        return task.batch_size is None or not self.whole_batch

    def is_due(self, step: Any) -> Any:
        """Whether update number ``step``, from 0, is one with an estimate."""
        return (step < self.initial_refreshes) | (step % self.update_interval == 0)


def hutchinson(probe: str = "rademacher") -> MakeEstimator:
    """Return the published estimator; the third form's has normal probes."""
    return lambda task, key: ah.hutchinson(probe=probe, seed=key)


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
        estimator=ah.hutchinson(probe="normal", seed=key),
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


def newton(*, own_rate: bool = False, **options: Any) -> Contender:
    """Return ``ah.newton`` as recommended, but for the options.

    At its own rate its decay is AdamW's at a hundred times AdamW's rate.
    """

    def make(learning_rate: WarmupCosine, task: Task, key: jax.Array) -> Any:
        rate, decay, more = learning_rate, task.weight_decay, options
        if own_rate:
            rate, decay = None, decay / 100
            more = options | {"schedule": learning_rate._replace(peak=1.0)}
        return ah.newton(rate, task.loss, weight_decay=decay, seed=key, **more)

    return Contender(
        make, 1.0 if own_rate else 0.03, "outputs", own_rate=own_rate, **SCHEDULE
    )


def subspace_newton(learning_rate: Any, task: Task, key: jax.Array) -> Any:
    """Return what has its own rate and momentum; it decays as ``newton`` at its own."""
    decay = task.weight_decay / 100
    return ah.subspace_newton(task.loss, weight_decay=decay, seed=key)


def parts_of_newton(
    turned: Callable[..., Any] = ah.in_eigenbasis, **options: Any
) -> Contender:
    """Return the parts of ``ah.newton``, in axes of whatever kind."""
    settings = {"b1": 0.85, "b2": 0.9, "clip_threshold": 0.3, "nesterov": True}

    def make(learning_rate: Any, task: Task, key: jax.Array) -> Any:
        return ah.adahessian(
            learning_rate,
            hessian_ema="mean",
            estimator=turned(gauss_newton(task, key)),
            weight_decay=task.weight_decay,
            **settings | SCHEDULE | options,
        )

    return Contender(make, 0.03, "outputs", **SCHEDULE)


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
    "paper, delayed": delayed(paper, hutchinson()),
    "davda54, delayed": delayed(davda54, hutchinson()),
    "Zack-Dugue, delayed": delayed(zack_dugue(), hutchinson("normal")),
    "Gauss-Newton, clipped": delayed(clipped, gauss_newton, 0.03),
    "newton": newton(),
    "newton, own rate": newton(own_rate=True),
    "soap": plain(ah.soap),
    "subspace_newton": Contender(
        subspace_newton, 1.0, "outputs", own_rate=True, whole_batch=True
    ),
}

# What was tried on the way to what is recommended; only run if it is asked for.
VARIANTS: dict[str, Contender] = {
    "Zack-Dugue, eps=0.01": Contender(zack_dugue(0.01), 0.3, "loss"),
    "Zack-Dugue, eps=0.01, delayed": delayed(zack_dugue(0.01), hutchinson("normal")),
    "newton, clip 0.1": newton(clip_threshold=0.1),
    "newton, clip 1": newton(clip_threshold=1.0),
    "newton, b1=0.9, no lookahead": parts_of_newton(b1=0.9, nesterov=False),
    "newton, axes of factors": parts_of_newton(
        partial(ah.in_eigenbasis, axes_from="factors", decay=0.98)
    ),
    "newton, own axes": parts_of_newton(lambda estimator: estimator),
    "newton, square root": parts_of_newton(hessian_power=0.5, clip_threshold=None),
    "soap, b1=0.9, no lookahead": plain(
        ah.adahessian,
        b1=0.9,
        b2=0.95,
        hessian_ema="mean",
        hessian_power=0.5,
        estimator=ah.in_eigenbasis(ah.squared_gradient()),
    ),
    "soap, b1=0.9": plain(ah.soap, b1=0.9),
    "soap, b2=0.99": plain(ah.soap, b2=0.99),
    "soap, short axes only": plain(ah.soap, n_vectors=0),
    "soap, 2 vectors": plain(ah.soap, n_vectors=2),
    "soap, 32 vectors": plain(ah.soap, n_vectors=32),
}
ALL = CONTENDERS | VARIANTS
