# SPDX-License-Identifier: Apache-2.0
"""Curvature of losses in the space of a network's outputs, and how rows are weighted.

For a loss that is convex in the outputs, its Hessian there is a product of a matrix S
with its transpose, one block for each row of outputs. The Gauss-Newton estimators need
S times random signs, the Hessian times a vector, or the gradient for a label drawn from
the model; the first and the last have the Hessian for their covariance.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from adahessian_jax.axes import AxisName
from adahessian_jax.checks import (
    check_callable,
    check_choice,
    check_float,
    raise_if,
    scalar_function,
)
from adahessian_jax.dtypes import accumulation_dtype


class OutputLoss(NamedTuple):
    """The curvature of one row's loss; all functions map arrays of the outputs' shape.

    Attributes:
      event_ndim: how many trailing axes of the outputs make up a row, 0 or 1.
      factor: ``(outputs, signs, targets)`` to S times the signs.
      product: ``(outputs, v, targets)`` to the Hessian times v.
      sampled_gradient: ``(key, outputs)`` to the gradient for a label drawn from the
        model, or None where the loss is not that of a known distribution.
    """

    event_ndim: int
    factor: Callable[[jax.Array, jax.Array, Any], jax.Array]
    product: Callable[[jax.Array, jax.Array, Any], jax.Array]
    sampled_gradient: Callable[[jax.Array, jax.Array], jax.Array] | None


def as_output_loss(loss: str | Callable[..., jax.Array], event_ndim: int) -> OutputLoss:
    """Look a loss up by its name in optax, or derive its curvature from a function."""
    check_choice("event_ndim", event_ndim, (0, 1))
    if isinstance(loss, str):
        check_choice("loss", loss, OUTPUT_LOSSES)
        return OUTPUT_LOSSES[loss]
    check_callable("loss", loss, "row -> scalar or the name of a loss")
    return (_elementwise_function if event_ndim == 0 else _row_function)(loss)


def row_weights(
    outputs: jax.Array,
    weights: jax.Array | None,
    event_ndim: int,
    reduction: str,
    axis_name: AxisName,
) -> jax.Array:
    """Return the weight of each row in the objective, in a shape that broadcasts.

    The objective is the sum over rows of weight times loss, divided by the sum of
    weights for the reduction ``"mean"``, over all devices of the axis if there is one.
    """
    if outputs.ndim < event_ndim:
        raise ValueError(
            f"predict_fn returned outputs of shape {outputs.shape}, but the loss takes"
            " rows along the last axis, the classes."
        )
    rows = outputs.shape[: outputs.ndim - event_ndim]
    dtype = accumulation_dtype(outputs)
    if weights is None:
        weights = jnp.ones((), dtype)
    elif jnp.shape(weights) != rows[: jnp.ndim(weights)]:
        raise ValueError(
            f"weights of shape {jnp.shape(weights)} do not match outputs of shape"
            f" {outputs.shape}: they must have the shape of its leading axes, {rows}"
            + (", the last axis being that of the classes." if event_ndim else ".")
        )
    else:
        weights = jnp.asarray(weights).astype(dtype)
        raise_if(jnp.any(weights < 0), "weights must not be negative, got some.")
    weights = weights.reshape(*weights.shape, *[1] * (outputs.ndim - weights.ndim))
    if reduction == "mean":
        total = jnp.sum(weights) * (math.prod(rows) / max(weights.size, 1))
        if axis_name is not None:
            total = jax.lax.psum(total, axis_name)
        weights = weights / jnp.where(total > 0, total, 1)
    return weights


def check_output_loss(
    loss: str | Callable[..., jax.Array],
    output_loss: Callable[[jax.Array], jax.Array],
    outputs: jax.Array,
    *,
    weights: jax.Array | None = None,
    targets: Any = None,
    reduction: str = "mean",
    event_ndim: int = 1,
    rtol: float = 1e-3,
) -> None:
    """Check that a Gauss-Newton estimator's loss is the one that you train with.

    Compares the Hessian of your loss, as a function of the outputs, with the one that
    the estimator assumes, on one random vector. Call it once, outside ``jit``, on the
    outputs of a real batch.

    Args:
      loss: as given to :func:`adahessian_jax.gauss_newton`.
      output_loss: your loss of the batch, from outputs to a scalar.
      outputs: outputs of the network.
      weights: the weights that ``predict_fn`` returns beside the outputs, if it does.
      targets: as given to ``update``, for a loss that is a function with targets.
      reduction: as given to :func:`adahessian_jax.gauss_newton`.
      event_ndim: as given to :func:`adahessian_jax.gauss_newton`.
      rtol: the relative difference that passes.

    Returns:
      Nothing, if the two are the same.

    Raises:
      TypeError: if an argument is of the wrong type.
      ValueError: if the two differ; the message says whether by a factor, and which.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> f, y = jnp.ones((4, 2)), jnp.zeros((4, 2))
      >>> ah.check_output_loss("l2_loss", lambda f: jnp.mean((f - y) ** 2) / 2, f)
      >>> ah.check_output_loss("l2_loss", lambda f: jnp.mean((f - y) ** 2), f)
      Traceback (most recent call last):
        ...
      ValueError: output_loss has 2 times the curvature of loss='l2_loss' with \
reduction='mean': correct the reduction, the weights or the name of the loss.
    """
    check_float("rtol", rtol, 0.0)
    curvature = as_output_loss(loss, event_ndim)
    check_choice("reduction", reduction, ("mean", "sum"))
    check_callable("output_loss", output_loss, "outputs -> loss")
    row_weight = row_weights(outputs, weights, curvature.event_ndim, reduction, None)
    v = jax.random.normal(jax.random.PRNGKey(0), outputs.shape, outputs.dtype)
    gradient = jax.grad(scalar_function("output_loss", output_loss))
    true = jax.jvp(gradient, (outputs,), (v,))[1]
    assumed = curvature.product(outputs, v, targets) * row_weight
    factor = float(jnp.vdot(assumed, true) / jnp.vdot(assumed, assumed))
    unlike = float(jnp.linalg.norm(true - factor * assumed))
    name = f"loss={loss!r} with reduction={reduction!r}"
    if unlike > rtol * float(jnp.linalg.norm(true)):
        raise ValueError(
            f"output_loss has another curvature than {name}: not even a multiple of it."
        )
    if abs(factor - 1) > rtol:
        raise ValueError(
            f"output_loss has {factor:.6g} times the curvature of {name}: correct the"
            " reduction, the weights or the name of the loss."
        )


def _probabilities(outputs: jax.Array) -> jax.Array:
    if outputs.shape[-1] == 1:
        raise ValueError(
            f"predict_fn returned outputs of shape {outputs.shape}: softmax over one"
            " class has no curvature. The classes must lie along the last axis; for one"
            " logit per row use loss='sigmoid_binary_cross_entropy'."
        )
    return jax.nn.softmax(outputs, axis=-1)


def _softmax_factor(outputs: jax.Array, signs: jax.Array, targets: Any) -> jax.Array:
    del targets
    p = _probabilities(outputs)
    half = jnp.sqrt(p)
    return half * signs - p * jnp.sum(half * signs, axis=-1, keepdims=True)


def _softmax_product(outputs: jax.Array, v: jax.Array, targets: Any) -> jax.Array:
    del targets
    p = _probabilities(outputs)
    return p * (v - jnp.sum(p * v, axis=-1, keepdims=True))


def _softmax_sampled(key: jax.Array, outputs: jax.Array) -> jax.Array:
    labels = jax.random.categorical(key, outputs, axis=-1)
    hot = jax.nn.one_hot(labels, outputs.shape[-1], dtype=outputs.dtype)
    return _probabilities(outputs) - hot


def _elementwise(
    curvature: Callable[[jax.Array], jax.Array],
    sampled_gradient: Callable[[jax.Array, jax.Array], jax.Array],
) -> OutputLoss:
    return OutputLoss(
        event_ndim=0,
        factor=lambda f, signs, targets: jnp.sqrt(curvature(f)) * signs,
        product=lambda f, v, targets: curvature(f) * v,
        sampled_gradient=sampled_gradient,
    )


def _sigmoid_curvature(f: jax.Array) -> jax.Array:
    return jax.nn.sigmoid(f) * jax.nn.sigmoid(-f)


def _sigmoid_sampled(key: jax.Array, f: jax.Array) -> jax.Array:
    p = jax.nn.sigmoid(f)
    return p - jax.random.bernoulli(key, p).astype(f.dtype)


def _poisson_sampled(key: jax.Array, f: jax.Array) -> jax.Array:
    rate = jnp.exp(f)
    return rate - jax.random.poisson(key, rate).astype(f.dtype)


def _normal(key: jax.Array, f: jax.Array) -> jax.Array:
    return jax.random.normal(key, f.shape, f.dtype)


OUTPUT_LOSSES = {
    "softmax_cross_entropy": OutputLoss(
        1, _softmax_factor, _softmax_product, _softmax_sampled
    ),
    "sigmoid_binary_cross_entropy": _elementwise(_sigmoid_curvature, _sigmoid_sampled),
    "squared_error": _elementwise(
        lambda f: jnp.full_like(f, 2.0), lambda key, f: jnp.sqrt(2.0) * _normal(key, f)
    ),
    "l2_loss": _elementwise(jnp.ones_like, _normal),
    "poisson_nll_loss": _elementwise(jnp.exp, _poisson_sampled),
}


_NOT_CONVEX = (
    "loss must be convex in the outputs, but its second derivative there is negative in"
    " some direction: a Gauss-Newton matrix then has no real factor. Use hutchinson, or"
    " gauss_newton(method='hutchinson') which needs none."
)


def _elementwise_function(loss: Callable[..., jax.Array]) -> OutputLoss:
    """Curvature of a function of one output (and its target, if there are targets)."""

    def curvature(f: jax.Array, targets: Any) -> jax.Array:
        args = () if targets is None else (jnp.broadcast_to(targets, f.shape).ravel(),)
        second = jax.grad(lambda x, *rest: jax.grad(loss)(x, *rest))
        return jax.vmap(second)(f.ravel(), *args).reshape(f.shape)

    def factor(f: jax.Array, signs: jax.Array, targets: Any) -> jax.Array:
        h = curvature(f, targets)
        raise_if(jnp.any(h < 0), _NOT_CONVEX)
        return jnp.sqrt(h) * signs

    return OutputLoss(0, factor, lambda f, v, targets: curvature(f, targets) * v, None)


def _row_function(loss: Callable[..., jax.Array]) -> OutputLoss:
    """Curvature of a function of one row of outputs (and its target)."""

    def by_row(row_function: Callable[..., jax.Array], f: jax.Array, *rest: Any) -> Any:
        function = row_function
        for _ in range(f.ndim - 1):
            function = jax.vmap(function)
        return function(f, *rest)

    def row_args(targets: Any) -> tuple[Any, ...]:
        return () if targets is None else (targets,)

    def factor(f: jax.Array, signs: jax.Array, targets: Any) -> jax.Array:
        h = by_row(jax.hessian(loss), f, *row_args(targets))
        values, vectors = jnp.linalg.eigh(h)
        smallest, largest = values[..., :1], jnp.abs(values).max(axis=-1, keepdims=True)
        rounding = 100 * jnp.finfo(values.dtype).eps
        raise_if(jnp.any(smallest < -rounding * largest), _NOT_CONVEX)
        concave = values < -rounding * largest  # makes NaN where nothing could raise
        roots = jnp.where(concave, jnp.nan, jnp.sqrt(jnp.maximum(values, 0)))
        return jnp.einsum("...ij,...j->...i", vectors, roots * signs)

    def product(f: jax.Array, v: jax.Array, targets: Any) -> jax.Array:
        def one(row: jax.Array, u: jax.Array, *rest: Any) -> jax.Array:
            return jax.jvp(lambda x: jax.grad(loss)(x, *rest), (row,), (u,))[1]

        return by_row(one, f, v, *row_args(targets))

    return OutputLoss(1, factor, product, None)
