# SPDX-License-Identifier: Apache-2.0
"""What an estimator of curvature is, how one is found, and what it hands on."""

import abc
import contextvars
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from adahessian_jax._src.axes import AxisName
from adahessian_jax._src.checks import check_params
from adahessian_jax._src.dtypes import dtype_of, is_differentiable, map_floats
from adahessian_jax._src.loss import Loss


@dataclasses.dataclass(frozen=True, eq=False)
class Estimator(abc.ABC):
    """An estimator that can share its pass over the network with the gradient.

    Its transformation is a plain ``optax.GradientTransformationExtraArgs``, and so a
    valid pytree, whose ``update`` is this object: called, it returns the Hessian's
    diagonal in place of the updates.

    Attributes:
      axis_name: the axis of devices over which estimates, not gradients, are averaged.
      loss: the loss whose outputs ``loss_fn`` has to return beside it, if any.
      kind: what it estimates: a state of one is not for an optimizer with another.
    """

    axis_name: AxisName
    loss: Loss | None
    kind: str

    @property
    def transformation(self) -> optax.GradientTransformationExtraArgs:
        """The estimator as optax takes it."""
        return optax.GradientTransformationExtraArgs(self.init, self)

    @abc.abstractmethod
    def init(self, params: optax.Params) -> Any:
        """Return the initial state."""

    def __call__(
        self, updates: Any, state: Any, params: Any = None, **extra_args: Any
    ) -> tuple[optax.Updates, Any]:
        """Return the diagonal, in the dtypes of ``params``, and the new state."""
        check_params(params)
        extra_args = {**extra_args, "updates": updates}
        *_, diag, state = self.value_and_grad(None, state, params, **extra_args)
        return map_floats(lambda d, p: d.astype(dtype_of(p)), diag, params), state

    @abc.abstractmethod
    def value_and_grad(
        self, fun: Any, state: Any, params: Any, **extra_args: Any
    ) -> tuple[Any, Any, optax.Updates, Any]:
        """Return value, gradient and diagonal of one pass, and the new state.

        The diagonal is in float32 or wider, so that nothing is rounded, or overflows,
        before it is averaged.

        ``fun`` maps parameters to ``(loss, aux)``, or with a ``loss`` to ``((loss,
        outputs), aux)``. Where it is None there is neither value nor gradient, and
        ``extra_args`` has the functions.
        """


class Curvature(NamedTuple):
    """An estimate, or word that there is none, on its way to the optimizer.

    Attributes:
      estimate: the Hessian's diagonal, None where none was made.
      estimator_state: the estimator's state after it.
      count: the optimizer's count when it was made, shape (), int32.
      refreshed: whether an estimate was made, bool of shape (), if that was decided
        while running.
    """

    estimate: optax.Updates | None
    estimator_state: Any
    count: Array  # type: ignore[assignment]  # hides tuple.count
    refreshed: Array | None


def as_estimator(estimator: Any) -> optax.GradientTransformationExtraArgs:
    """Check that something is a transformation; let it take extra arguments."""
    if not isinstance(estimator, optax.GradientTransformation):
        raise TypeError(
            "estimator must be an optax.GradientTransformation, as hutchinson()"
            f" returns, got {estimator!r}."
        )
    return optax.with_extra_args_support(estimator)


_asked: contextvars.ContextVar[list[Any] | None] = contextvars.ContextVar(
    "asked", default=None
)


def declare(average: Any) -> None:
    """Name an average of curvature, where :func:`find_averages` asks for it."""
    if (asked := _asked.get()) is not None:
        asked.append(average)


def find_averages(tx: optax.GradientTransformation, params: optax.Params) -> list[Any]:
    """Return the averages of curvature in an optimizer, and so their estimators.

    Chains and wrappers of any kind call the ``init`` of what they hold: it is asked.
    """
    token = _asked.set([])
    try:
        jax.eval_shape(lambda p: tx.init(p), params)  # anew: a known one is not called
        return _asked.get() or []
    finally:
        _asked.reset(token)


def are_alike(a: Any, b: Any) -> bool:
    """Whether two estimators, or arguments of theirs, are the same."""
    if a is b:  # a seed that is traced can't be compared
        return True
    if isinstance(a, Estimator) and type(a) is type(b):
        names = [field.name for field in dataclasses.fields(a)]
        return all(are_alike(getattr(a, name), getattr(b, name)) for name in names)
    if all(isinstance(x, Array | np.ndarray) for x in (a, b)):
        if a.dtype == b.dtype and jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        return bool(a.dtype == b.dtype and np.array_equal(a, b))
    return bool(a == b)


def form(tree: Any) -> tuple[Any, list[tuple[int, ...]]]:
    """Return the structure of a tree, and the shapes of its floating-point leaves.

    Of others not: a key may be typed in one state and raw in another.
    """
    structure: Any = jax.tree.structure(tree)
    floats = filter(is_differentiable, jax.tree.leaves(tree))
    return structure, [jnp.shape(x) for x in floats]
