# SPDX-License-Identifier: Apache-2.0
"""The optimizers that are compared, each with all settings fixed but the learning rate.

All have the same weight decay, and the same schedule: linear warm-up over the first 5 %
of the steps, then a cosine to zero.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adahessian_jax as ah
from benchmarks.training.rate_per_tensor import scale_by_rate_per_tensor
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


Make = Callable[[WarmupCosine, Any, Task], optax.GradientTransformation]
WEIGHT_DECAY = 1e-4
DELAYED = {"update_interval": 10, "initial_refreshes": 50}


class Contender(NamedTuple):
    """An optimizer with one setting of everything but the learning rate.

    Attributes:
      make: ``(learning_rate, estimator, task)`` to the transformation.
      estimator: ``(task, key)`` to the estimator of curvature; None without.
      start: the learning rate in whose neighbourhood the search begins.
      update_interval: how often the curvature is estimated.
      initial_refreshes: on how many first steps it is.
      hands_on_diag: whether the estimate is made outside the optimizer, which is not
        ours and would make it inside a conditional.
      own_rate: whether it finds the length of its steps itself: no rate is searched.
      line_search: whether it does so by a line search, which takes a batch that never
        changes.
    """

    make: Make
    estimator: Callable[[Task, jax.Array], optax.GradientTransformation] | None = None
    start: float = 1e-2
    update_interval: int = 1
    initial_refreshes: int = 0
    hands_on_diag: bool = False
    own_rate: bool = False
    line_search: bool = False

    def suits(self, task: Task) -> bool:
        """Whether it can be run on a task."""
        return task.batch_size is None or not self.line_search

    def is_due(self, step: int) -> bool:
        """Whether update number ``step``, from 0, is one with an estimate."""
        return step < self.initial_refreshes or step % self.update_interval == 0


def hutchinson(task: Task, key: jax.Array) -> optax.GradientTransformation:
    """Return the published estimator."""
    del task
    return ah.hutchinson(seed=key)


def gauss_newton(task: Task, key: jax.Array) -> optax.GradientTransformation:
    """Return the quiet estimator, for the task's loss."""
    return ah.gauss_newton(**task.loss, seed=key)


def in_eigenbasis(
    task: Task, key: jax.Array, **options: Any
) -> optax.GradientTransformation:
    """Return the quiet estimator in a basis in which the curvature is diagonal."""
    return ah.in_eigenbasis(gauss_newton(task, key), **options)


def gaussian(task: Task, key: jax.Array) -> optax.GradientTransformation:
    """Return the third published form's estimator, without its control variate."""
    del task
    return ah.hutchinson(probe="normal", seed=key)


def of_optax(task: Task, key: jax.Array) -> optax.GradientTransformation:
    """Return optax's own estimator."""
    del task, key
    return optax.contrib.hutchinson_estimator_diag_hessian()


def _adahessian(**options: Any) -> Make:
    def make(learning_rate: Any, estimator: Any, task: Task) -> Any:
        del task
        return ah.adahessian(
            learning_rate, estimator=estimator, weight_decay=WEIGHT_DECAY, **options
        )

    return make


def sophia(gamma: float) -> Make:
    """Return optax's Sophia, which takes the estimate that it is handed."""

    def make(learning_rate: Any, estimator: Any, task: Task) -> Any:
        del task
        handed_on = optax.GradientTransformationExtraArgs(
            estimator.init,
            lambda updates, state, params=None, *, hessian_diag, **_: (
                hessian_diag,
                state,
            ),
        )
        return optax.contrib.sophia(
            learning_rate,
            gamma=gamma,
            weight_decay=WEIGHT_DECAY,
            hessian_diagonal_fn=handed_on,
        )

    return make


def _paper(**options: Any) -> Make:
    def make(learning_rate: Any, estimator: Any, task: Task) -> Any:
        averaging = ah.conv_spatial_average() if task.loops else None
        return _adahessian(eps=1e-4, averaging=averaging, **options)(
            learning_rate, estimator, task
        )

    return make


def _clipped(learning_rate: Any, estimator: Any, task: Task) -> Any:
    del task
    return optax.chain(
        ah.scale_by_adahessian(
            b2=0.95, hessian_ema="mean", estimator=estimator, **DELAYED
        ),
        optax.clip(0.1),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(learning_rate),
    )


def _relative(
    before: Callable[[], optax.GradientTransformation], **options: Any
) -> Make:
    def make(learning_rate: Any, estimator: Any, task: Task) -> Any:
        del task
        return optax.chain(
            before(),
            ah.scale_by_relative_curvature(estimator=estimator, **options, **DELAYED),
            optax.add_decayed_weights(WEIGHT_DECAY),
            optax.scale_by_learning_rate(learning_rate),
        )

    return make


def _plain(make: Callable[..., Any]) -> Make:
    return lambda learning_rate, estimator, task: make(learning_rate)


ZACK_DUGUE = {"hessian_ema": "mean", "hessian_power": 0.5}

# Gauss-Newton in its eigenbasis.
SCHEDULE = {"update_interval": 20, "initial_refreshes": 10}
CURVED = {
    "b2": 0.9,
    "hessian_ema": "mean",
    "reuse_estimate": False,
    "clip_threshold": 0.1,
    **SCHEDULE,
}


def _with_quadratic_model(
    *,
    limited: bool,
    model: Callable[..., Any] = ah.scale_by_quadratic_model,
    **options: Any,
) -> Make:
    """Let a quadratic model choose the rate, up to that of the search or to any."""

    def make(learning_rate: Any, estimator: Any, task: Task) -> Any:
        limit = {"max_learning_rate": learning_rate.peak} if limited else {}
        return optax.chain(
            ah.scale_by_adahessian(estimator=estimator, **CURVED),
            optax.add_decayed_weights(WEIGHT_DECAY),
            model(**task.loss, **limit, **options),
            optax.scale_by_learning_rate(learning_rate._replace(peak=1.0)),
        )

    return make


def _own_rate(**options: Any) -> Contender:
    make = _with_quadratic_model(limited=False, **options)
    return Contender(make, in_eigenbasis, 1.0, **SCHEDULE, own_rate=True)


CONTENDERS: dict[str, Contender] = {
    "SGD": Contender(
        _plain(
            lambda lr: optax.chain(
                optax.add_decayed_weights(WEIGHT_DECAY), optax.sgd(lr, momentum=0.9)
            )
        ),
        start=0.1,
    ),
    "AdamW": Contender(_plain(lambda lr: optax.adamw(lr, weight_decay=WEIGHT_DECAY))),
    "Muon": Contender(
        _plain(lambda lr: optax.contrib.muon(lr, weight_decay=WEIGHT_DECAY))
    ),
    "L-BFGS": Contender(
        lambda learning_rate, estimator, task: optax.lbfgs(memory_size=20),
        own_rate=True,
        line_search=True,
    ),
    "Sophia": Contender(
        sophia(0.01), of_optax, 1e-3, update_interval=10, hands_on_diag=True
    ),
    "Sophia, gamma=1": Contender(
        sophia(1.0), of_optax, 3e-3, update_interval=10, hands_on_diag=True
    ),
    "AdaHessian, paper": Contender(_paper(), hutchinson, 0.3),
    "AdaHessian, davda54": Contender(_adahessian(), hutchinson, 0.3),
    "AdaHessian, Zack-Dugue": Contender(_adahessian(**ZACK_DUGUE), gaussian, 0.3),
    "paper, delayed": Contender(_paper(**DELAYED), hutchinson, 0.3, **DELAYED),
    "davda54, delayed": Contender(_adahessian(**DELAYED), hutchinson, 0.3, **DELAYED),
    "Zack-Dugue, delayed": Contender(
        _adahessian(**ZACK_DUGUE, **DELAYED), gaussian, 0.3, **DELAYED
    ),
    "Gauss-Newton, clipped": Contender(_clipped, gauss_newton, 0.03, **DELAYED),
    "Gauss-Newton in eigenbasis": Contender(
        _adahessian(**CURVED), in_eigenbasis, 0.03, **SCHEDULE
    ),
    "eigenbasis, limited rate": Contender(
        _with_quadratic_model(limited=True), in_eigenbasis, 0.1, **SCHEDULE
    ),
    "eigenbasis, own rate": _own_rate(),
    "relative curvature": Contender(
        _relative(optax.scale_by_adam), gauss_newton, **DELAYED
    ),
}


def _clipped_in_own_axes(learning_rate: Any, estimator: Any, task: Task) -> Any:
    del task
    options = {**CURVED, "clip_threshold": None}
    return optax.chain(
        ah.scale_by_adahessian(estimator=estimator, **options),
        optax.clip(0.1),
        optax.add_decayed_weights(WEIGHT_DECAY),
        optax.scale_by_learning_rate(learning_rate),
    )


def _per_tensor(path: Any, leaf: jax.Array) -> jax.Array:
    del path
    return leaf.mean(keepdims=True)


def _per_output(path: Any, leaf: jax.Array) -> jax.Array:
    del path
    return leaf.mean(axis=tuple(range(leaf.ndim - 1)), keepdims=True)


def _is_embedding(path: Any) -> bool:
    return "embedding" in jax.tree_util.keystr(path)


def _per_token(path: Any, leaf: jax.Array) -> jax.Array:
    return leaf.mean(axis=-1, keepdims=True) if _is_embedding(path) else leaf


def _adam_for(chosen: Callable[[Any], bool]) -> Make:
    """Give some tensors to AdamW, at a third of the rate: each near its best."""

    def make(learning_rate: Any, estimator: Any, task: Task) -> Any:
        lower = learning_rate._replace(peak=learning_rate.peak / 3)
        groups = {
            "curved": _adahessian(**CURVED)(learning_rate, estimator, task),
            "adam": optax.adamw(lower, weight_decay=WEIGHT_DECAY),
        }

        def labels(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "adam" if chosen(path) else "curved", params
            )

        return optax.partition(groups, labels)

    return make


def _variant(estimator: Any = in_eigenbasis, **options: Any) -> Contender:
    options = {**CURVED, **options}
    schedule = {key: options[key] for key in SCHEDULE}
    return Contender(_adahessian(**options), estimator, 0.03, **schedule)


# What was tried on the way to what is recommended; only run if it is asked for.
VARIANTS: dict[str, Contender] = {
    "relative curvature, k=0.5": Contender(
        _relative(optax.scale_by_adam, power=0.5), gauss_newton, **DELAYED
    ),
    "Zack-Dugue, eps=0.01": Contender(
        _adahessian(eps=0.01, **ZACK_DUGUE), gaussian, 0.3
    ),
    "Zack-Dugue, eps=0.01, delayed": Contender(
        _adahessian(eps=0.01, **ZACK_DUGUE, **DELAYED), gaussian, 0.3, **DELAYED
    ),
    "eigenbasis, short axes only": _variant(partial(in_eigenbasis, n_vectors=0)),
    "eigenbasis, 16 vectors": _variant(partial(in_eigenbasis, n_vectors=16)),
    "eigenbasis, 32 vectors": _variant(partial(in_eigenbasis, n_vectors=32)),
    "eigenbasis, decay 0.95": _variant(partial(in_eigenbasis, decay=0.95)),
    "eigenbasis, interval 10, b2=0.95": _variant(update_interval=10, b2=0.95),
    "eigenbasis, 40 initial refreshes": _variant(initial_refreshes=40),
    "eigenbasis, clip 0.03": _variant(clip_threshold=0.03),
    "eigenbasis, clip 0.3": _variant(clip_threshold=0.3),
    "eigenbasis, clipped in own axes": Contender(
        _clipped_in_own_axes, in_eigenbasis, 0.03, **SCHEDULE
    ),
    "eigenbasis, damped": _variant(clip_threshold=None, relative_damping=0.1),
    "eigenbasis, b1=0.95": _variant(b1=0.95),
    "eigenbasis, b2=0.8": _variant(b2=0.8),
    "own axes": _variant(gauss_newton),
    "own axes, damped": _variant(
        gauss_newton, clip_threshold=None, relative_damping=0.1
    ),
    "own axes, power 0.5": _variant(
        gauss_newton, clip_threshold=None, hessian_power=0.5
    ),
    "one curvature per tensor": _variant(gauss_newton, averaging=_per_tensor),
    "one curvature per output": _variant(gauss_newton, averaging=_per_output),
    "one curvature per token": _variant(gauss_newton, averaging=_per_token),
    "eigenbasis, Adam for embeddings": Contender(
        _adam_for(_is_embedding), in_eigenbasis, 0.03, **SCHEDULE
    ),
    "Adam, eigenbasis for embeddings": Contender(
        _adam_for(lambda path: not _is_embedding(path)), in_eigenbasis, 0.03, **SCHEDULE
    ),
    "own rate, fraction 0.5": _own_rate(fraction=0.5),
    "own rate, fraction 1": _own_rate(fraction=1.0),
    "own rate, decay 0.5": _own_rate(decay=0.5),
    "own rate per tensor": _own_rate(model=scale_by_rate_per_tensor),
    "own rate per tensor, damping 1": _own_rate(
        model=scale_by_rate_per_tensor, damping=1.0
    ),
}
