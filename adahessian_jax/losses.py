# SPDX-License-Identifier: Apache-2.0
r"""Losses of a network's outputs: called, the number; in an optimizer, its curvature.

One object is both, so that their scales can't differ: whether the losses of rows are
averaged or added up is said on the object, and masks are weights of rows in either.

A loss is convex in the outputs, and its Hessian there is a product :math:`S S^\top`,
one block for each row. Gauss-Newton estimators need :math:`S u` for random signs u.
"""

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.checks import check_callable, check_scalar
from adahessian_jax._src.loss import Loss as Loss
from adahessian_jax._src.stacks import over_layers


def of_row(loss: Callable[..., Array], name: str | None = None) -> Loss:
    """Make a loss of a function of one row of outputs.

    Args:
      loss: ``row -> scalar``, or ``(row, label) -> scalar``, convex in the row, the
        last axis of the outputs. A second argument is the label, with a default too.
        Where it is not convex, as a focal loss may be, there is no estimate: an error
        outside ``jit``, and inside it no parameter moves.
      name: what to call it in messages; by default the function's.

    Returns:
      The :class:`Loss`. If the function takes labels, so does an estimate.

    Raises:
      TypeError: if ``loss`` is not callable.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> loss = ah.losses.of_row(lambda f, y: jnp.sum((f - y) ** 4))
      >>> loss(jnp.ones((5, 2)), jnp.zeros((5, 2))).item()
      2.0
    """
    check_callable("loss", loss, "row -> scalar or (row, label) -> scalar")

    def of_one(row: Array, *label: Any) -> Array:
        return check_scalar("loss", loss(row, *label))

    def by_row(function: Any, labels: Any, *arrays: Array) -> Array:
        function = over_layers(function, arrays[0].ndim - 1)
        return function(*arrays) if labels is None else function(*arrays, labels)

    def factor(f: Array, signs: Array, labels: Any) -> Array:
        h = by_row(jax.jacrev(jax.grad(of_one)), labels, f)
        values, vectors = jnp.linalg.eigh(h)
        return jnp.einsum("...ij,...j->...i", vectors, _roots(values) * signs)

    def product(f: Array, v: Array, labels: Any) -> Array:
        def one(row: Array, u: Array, *label: Any) -> Array:
            return jax.vjp(lambda x: jax.grad(of_one)(x, *label), row)[1](u)[0]

        return by_row(one, labels, f, v)

    def losses(f: Array, labels: Any) -> Array:
        return by_row(of_one, labels, f)

    needs_labels, name = _takes_labels(loss), _name("of_row", loss, name)
    return Loss(name, "row", losses, factor, product, needs_labels, event_ndim=1)


def of_element(loss: Callable[..., Array], name: str | None = None) -> Loss:
    """Make a loss of a function of one output.

    Args:
      loss: ``output -> scalar``, or ``(output, label) -> scalar``, convex in the
        output. A second argument is the label, with a default too.
      name: what to call it in messages; by default the function's.

    Returns:
      The :class:`Loss`. If the function takes labels, so does an estimate.

    Raises:
      TypeError: if ``loss`` is not callable.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> loss = ah.losses.of_element(lambda f, y: jnp.log(jnp.cosh(f - y)))
      >>> loss(jnp.ones((5, 2)), jnp.ones((5, 2))).item()
      0.0
    """
    check_callable("loss", loss, "output -> scalar or (output, label) -> scalar")

    def of_one(output: Array, *label: Any) -> Array:
        return check_scalar("loss", loss(output, *label))

    def each(function: Any, f: Array, labels: Any) -> Array:
        flat = [x.ravel() for x in (f, labels) if x is not None]
        return jax.vmap(function)(*flat).reshape(f.shape)

    return _elementwise(
        _name("of_element", loss, name),
        lambda f, labels: each(of_one, f, labels),
        lambda f, labels: each(jax.grad(jax.grad(of_one)), f, labels),
        _takes_labels(loss),
    )


def _elementwise(name: str, losses: Any, curvature: Any, takes: bool = False) -> Loss:
    """Make a loss of functions of outputs and labels to each output's."""

    def factor(f: Array, signs: Array, labels: Any) -> Array:
        return _roots(curvature(f, labels)) * signs

    def product(f: Array, v: Array, labels: Any) -> Array:
        return curvature(f, labels) * v

    return Loss(name, "element", losses, factor, product, takes)


def _roots(curvature: Array) -> Array:
    """Return square roots, of zero where a curvature is below it by rounding alone.

    They are NaN where it is below by more. A row that is nearly certain has the
    differences of numbers near 1 as curvature, or of the scale that the loss has.
    """
    eps = jnp.finfo(curvature.dtype).eps
    finite = jnp.where(jnp.isfinite(curvature), jnp.abs(curvature), 0)
    concave = curvature < -eps * jnp.maximum(1e4, 100 * jnp.max(finite, initial=0))
    return jnp.where(concave, jnp.nan, jnp.sqrt(jnp.maximum(curvature, 0)))


def _softmax_losses(outputs: Array, labels: Array) -> Array:
    if labels.ndim == outputs.ndim:
        return optax.softmax_cross_entropy(outputs, labels)
    return optax.softmax_cross_entropy_with_integer_labels(outputs, labels)


def _softmax_factor(outputs: Array, signs: Array, _: Any) -> Array:
    p = jax.nn.softmax(outputs, axis=-1)
    half = jnp.sqrt(p)
    return half * signs - p * jnp.sum(half * signs, axis=-1, keepdims=True)


def _softmax_product(outputs: Array, v: Array, _: Any) -> Array:
    p = jax.nn.softmax(outputs, axis=-1)
    return p * (v - jnp.sum(p * v, axis=-1, keepdims=True))


def _takes_labels(loss: Any) -> bool:
    parameters = inspect.signature(loss).parameters.values()
    return len([p for p in parameters if p.kind < p.VAR_POSITIONAL]) > 1


def _name(kind: str, loss: Any, name: str | None) -> str:
    return f"{kind}({name or getattr(loss, '__name__', repr(loss))})"


_SOFTMAX = _softmax_losses, _softmax_factor, _softmax_product
softmax_cross_entropy = Loss(
    "softmax_cross_entropy", "classes", *_SOFTMAX, event_ndim=1
)
sigmoid_binary_cross_entropy = _elementwise(
    "sigmoid_binary_cross_entropy",
    optax.sigmoid_binary_cross_entropy,
    lambda f, _: jax.nn.sigmoid(f) * jax.nn.sigmoid(-f),
)
squared_error = _elementwise(
    "squared_error", optax.squared_error, lambda f, _: jnp.full_like(f, 2.0)
)
l2_loss = _elementwise("l2_loss", optax.l2_loss, lambda f, _: jnp.ones_like(f))
poisson_nll_loss = _elementwise(
    "poisson_nll_loss", lambda f, y: jnp.exp(f) - y * f, lambda f, _: jnp.exp(f)
)
