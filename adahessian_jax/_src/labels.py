# SPDX-License-Identifier: Apache-2.0
"""The labels that a loss takes."""

from typing import Any

import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.checks import one_array, raise_if, require
from adahessian_jax._src.dtypes import wide


def checked_labels(loss: Any, outputs: Array, labels: Any, weights: Array) -> Any:
    """Return labels that fit the outputs; raise if they do not.

    ``weights`` are those of the rows; where there is none labels may be anything.
    """
    if labels is None:
        if loss.needs_labels or not loss.name.startswith("of_"):
            raise ValueError(f"labels must be given to {loss!r}.")
        return None
    labels = one_array("labels", labels)
    if loss.kind == "classes" and labels.ndim < outputs.ndim:
        return _classes(loss, outputs, labels, weights)
    shape = labels.shape
    if loss.kind == "row":  # with any axes of their own
        shape = shape[: outputs.ndim - 1]
    _check_shape(loss, outputs, labels, shape)
    if loss.kind == "row":
        return labels
    labels = labels.astype(wide(outputs).dtype)
    if loss.kind == "classes":
        off = jnp.abs(jnp.sum(labels, -1, keepdims=True) - 1) > 1e-2
        raise_if(
            jnp.any(off & (weights > 0)),
            f"labels of {loss!r} that are not classes must add up to 1 over the"
            " classes, because its curvature is that of distributions.",
        )
    return labels


def _classes(loss: Any, outputs: Array, labels: Array, weights: Array) -> Array:
    """Return classes, and one that has no loss in place of one that there is not."""
    _check_shape(loss, outputs, labels, labels.shape)
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    rule = "integers, of the shape of all axes of the outputs but the last"
    require(integers, TypeError, "labels", rule, labels.dtype)
    n = outputs.shape[-1]
    outside = (labels < 0) | (labels >= n)
    raise_if(
        jnp.any(outside[..., None] & (weights > 0)),
        f"labels of {loss!r} must be classes from 0 to {n - 1}, for so many lie along"
        " the last axis of the outputs. Rows without a label take no weight:"
        " where=labels >= 0.",
    )
    return jnp.where(outside, n, labels)  # optax wraps -1 around, and n is NaN


def _check_shape(loss: Any, outputs: Array, labels: Array, shape: Any) -> None:
    whole, rows = outputs.shape, outputs.shape[:-1]
    by_class = loss.kind == "classes" and labels.ndim < outputs.ndim
    if shape != (rows if loss.kind == "row" or by_class else whole):
        either = f"{rows}, classes, or {whole}"
        expected = {"classes": either, "row": rows, "element": whole}[loss.kind]
        raise ValueError(
            f"labels of shape {labels.shape} do not match outputs of shape {whole}:"
            f" {loss!r} takes labels of shape {expected}."
        )
