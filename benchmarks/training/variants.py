# SPDX-License-Identifier: Apache-2.0
"""What was tried on the way to what is recommended; only run if it is asked for."""

from typing import Any

import jax

import adahessian_jax as ah
from benchmarks.training.contenders import (
    SCHEDULE,
    Contender,
    delayed,
    gauss_newton,
    gaussian,
    newton,
    plain,
    zack_dugue,
)
from benchmarks.training.tasks import Task

NEWTON = {"b1": 0.85, "b2": 0.9, "clip_threshold": 0.3, "nesterov": True, **SCHEDULE}


def _newton(*, axes: dict[str, Any] | None, **options: Any) -> Contender:
    """Return the parts of ``ah.newton``, in some axes or the parameters' own."""

    def make(learning_rate: Any, task: Task, key: jax.Array) -> Any:
        estimator = gauss_newton(task, key)
        if axes is not None:
            estimator = ah.in_eigenbasis(estimator, **axes)
        return ah.adahessian(
            learning_rate,
            hessian_ema="mean",
            estimator=estimator,
            weight_decay=task.weight_decay,
            **NEWTON | options,
        )

    return Contender(make, 0.03, "outputs", **SCHEDULE)


VARIANTS: dict[str, Contender] = {
    "Zack-Dugue, eps=0.01": Contender(zack_dugue(0.01), 0.3, "loss"),
    "Zack-Dugue, eps=0.01, delayed": delayed(zack_dugue(0.01), gaussian),
    "newton, clip 0.1": newton(clip_threshold=0.1),
    "newton, clip 1": newton(clip_threshold=1.0),
    "newton, b1=0.9, no lookahead": _newton(axes={}, b1=0.9, nesterov=False),
    "newton, axes of factors": _newton(axes={"axes_from": "factors", "decay": 0.98}),
    "newton, own axes": _newton(axes=None),
    "newton, square root": _newton(axes={}, hessian_power=0.5, clip_threshold=None),
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
