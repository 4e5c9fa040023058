# SPDX-License-Identifier: Apache-2.0
"""What was tried on the way to what is recommended; only run if it is asked for."""

from collections.abc import Callable
from typing import Any

import jax
import optax

import adahessian_jax as ah
from benchmarks.training.contenders import (
    CURVED,
    SCHEDULE,
    WEIGHT_DECAY,
    Contender,
    Make,
    by_quadratic_model,
    clipped,
    delayed,
    gauss_newton,
    gaussian,
    newton,
    zack_dugue,
)
from benchmarks.training.tasks import Task


def _curved(make: Make) -> Contender:
    return Contender(make, 0.03, "outputs", **SCHEDULE)


def _in_own_axes(**options: Any) -> Contender:
    return _curved(
        lambda learning_rate, task, key: ah.adahessian(
            learning_rate,
            estimator=gauss_newton(task, key),
            weight_decay=WEIGHT_DECAY,
            **CURVED | options,
        )
    )


def _clipped_in_own_axes(learning_rate: Any, task: Task, key: jax.Array) -> Any:
    estimator = ah.in_eigenbasis(gauss_newton(task, key))
    options = CURVED | {"clip_threshold": None, "estimator": estimator}
    return clipped(learning_rate, ah.scale_by_adahessian(**options))


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


def _adam_for(chosen: Callable[[Any], bool]) -> Contender:
    """Give some tensors to AdamW, at a third of the rate: each near its best."""

    def make(learning_rate: Any, task: Task, key: jax.Array) -> Any:
        lower = learning_rate._replace(peak=learning_rate.peak / 3)
        groups = {
            "curved": newton().make(learning_rate, task, key),
            "adam": optax.adamw(lower, weight_decay=WEIGHT_DECAY),
        }

        def labels(params: Any) -> Any:
            return jax.tree_util.tree_map_with_path(
                lambda path, _: "adam" if chosen(path) else "curved", params
            )

        return optax.partition(groups, labels)

    return _curved(make)


def _own_rate(**options: Any) -> Contender:
    make = by_quadratic_model(**options)
    return Contender(make, 1.0, "outputs", **SCHEDULE, own_rate=True)


VARIANTS: dict[str, Contender] = {
    "Zack-Dugue, eps=0.01": Contender(zack_dugue(0.01), 0.3, "loss"),
    "Zack-Dugue, eps=0.01, delayed": delayed(zack_dugue(0.01), gaussian),
    "eigenbasis, short axes only": newton(n_vectors=0),
    "eigenbasis, 16 vectors": newton(n_vectors=16),
    "eigenbasis, 32 vectors": newton(n_vectors=32),
    "eigenbasis, decay 0.95": newton(decay=0.95),
    "eigenbasis, interval 10, b2=0.95": newton(update_interval=10, b2=0.95),
    "eigenbasis, 40 initial refreshes": newton(initial_refreshes=40),
    "eigenbasis, clip 0.03": newton(clip_threshold=0.03),
    "eigenbasis, clip 0.3": newton(clip_threshold=0.3),
    "eigenbasis, clipped in own axes": _curved(_clipped_in_own_axes),
    "eigenbasis, b1=0.95": newton(b1=0.95),
    "eigenbasis, b2=0.8": newton(b2=0.8),
    "own axes": _in_own_axes(),
    "own axes, power 0.5": _in_own_axes(clip_threshold=None, hessian_power=0.5),
    "one curvature per tensor": _in_own_axes(averaging=_per_tensor),
    "one curvature per output": _in_own_axes(averaging=_per_output),
    "one curvature per token": _in_own_axes(averaging=_per_token),
    "eigenbasis, Adam for embeddings": _adam_for(_is_embedding),
    "Adam, eigenbasis for embeddings": _adam_for(lambda path: not _is_embedding(path)),
    "own rate, fraction 0.5": _own_rate(fraction=0.5),
    "own rate, fraction 1": _own_rate(fraction=1.0),
    "own rate, decay 0.5": _own_rate(decay=0.5),
}
