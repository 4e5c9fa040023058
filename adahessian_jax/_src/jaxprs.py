# SPDX-License-Identifier: Apache-2.0
"""What steps a function takes, from JAX's record of it."""

from collections.abc import Callable
from typing import Any

import jax


def takes_step(fun: Callable[[Any], Any], x: Any, is_it: Callable[[Any], bool]) -> bool:
    """Whether a function of x takes a step of some kind, or one inside does."""

    def found(part: Any) -> bool:
        if isinstance(part, tuple | list):
            return any(map(found, part))
        part = getattr(part, "jaxpr", part)
        steps = getattr(part, "eqns", ())
        return any(is_it(step) or found(tuple(step.params.values())) for step in steps)

    def arrays(x: Any) -> list[Any]:  # of auxiliary values some may be none
        return [y for y in jax.tree.leaves(fun(x)) if hasattr(y, "dtype")]

    return found(jax.make_jaxpr(arrays)(x))
