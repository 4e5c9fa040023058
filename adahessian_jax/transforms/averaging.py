# SPDX-License-Identifier: Apache-2.0
"""Averaging rules: share one curvature among the entries of a kernel or a block.

A rule takes ``(path, leaf)``, the path of a leaf as a tuple of ``jax.tree_util`` keys
and its estimated diagonal. It returns the averaged leaf, in any shape that broadcasts
to that of the leaf, or the leaf itself where it does not apply.
"""

import math
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.averaging_rule import AveragingRule, KeyPath
from adahessian_jax._src.checks import (
    check_callable,
    check_choice,
    check_flag,
    check_int,
    require,
)
from adahessian_jax._src.stacks import Stacked, check_stacked, stack_ndim
from adahessian_jax._src.xla import mean_of_few


def conv_spatial_average(
    *,
    abs_first: bool = True,
    is_conv: Callable[[KeyPath, Array], bool] | None = None,
    layout: str | None = None,
    stacked: Stacked | None = None,
) -> AveragingRule:
    r"""Average the curvature over the spatial axes of convolution kernels.

    The average has size 1 along the spatial axes, and so has the moving average that
    the optimizer stores: a ninth for 3x3 kernels.

    Args:
      abs_first: average absolute values, as published. False averages with the sign,
        which makes errors of the estimate cancel and is several times more accurate.
      is_conv: which leaves are convolution kernels, a function of ``(path, leaf)``. By
        default, those with three axes or more and "conv" in their path, in any case,
        but biases: the number of axes alone does not tell a convolution from an
        attention projection. For other names: ``lambda path, leaf: leaf.ndim == 4``.
      layout: ``"HWIO"``, spatial axes first, as in Flax and Haiku, or ``"OIHW"``,
        spatial axes last, as in Equinox and PyTorch, with any number of spatial axes.
        None is the first, and refuses a leaf called "weight", as the latter do.
      stacked: how many leading axes of a leaf are stacks of layers, as ``nn.scan`` and
        ``jax.lax.scan`` have them: a function of ``(path, leaf)``. They are kept apart.

    Returns:
      A rule for the ``averaging`` argument of :func:`adahessian_jax.adahessian`.

    Raises:
      ValueError: if ``layout`` is unknown; when applied, if a kernel has no spatial
        axis, or it is not clear which.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> params = {"Conv_0": {"kernel": jnp.ones((3, 3, 16, 32))}}
      >>> tx = ah.adahessian(0.15, averaging=ah.conv_spatial_average())
      >>> tx.init(params)[0].curvature.nu["Conv_0"]["kernel"].shape
      (1, 1, 16, 32)

    References:
      Yao et al., `ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning
      <https://arxiv.org/abs/2006.00719>`_, 2021, section 3.2 and equation 10
    """
    check_flag("abs_first", abs_first)
    check_choice("layout", layout, (None, "HWIO", "OIHW"))
    is_conv = _named_conv if is_conv is None else is_conv
    check_callable("is_conv", is_conv, "(path, leaf) -> bool")
    check_stacked(stacked)

    def rule(path: KeyPath, leaf: Array) -> Array:
        if not is_conv(path, leaf):
            return leaf
        name, first = jax.tree_util.keystr(path), stack_ndim(stacked, path, leaf)
        n = leaf.ndim - 2 - first
        if n < 1:
            raise ValueError(
                f"conv_spatial_average takes {name} of shape {leaf.shape} for a"
                " convolution kernel, which has an axis or more beside its channels and"
                " stacks. Say which leaves are kernels with is_conv=."
            )
        if layout is None and re.search(r"weight\W*$", name):
            raise ValueError(
                f"layout must say where the spatial axes of {name} of shape"
                f" {leaf.shape} are: layout='OIHW', last, as in Equinox and PyTorch, or"
                " layout='HWIO', first, as in Flax."
            )
        first += 2 if layout == "OIHW" else 0
        end = first + n
        size = math.prod(leaf.shape[first:end])
        positions = leaf.reshape(*leaf.shape[:first], size, *leaf.shape[end:])
        mean = mean_of_few(jnp.abs(positions) if abs_first else positions, axis=first)
        return jnp.expand_dims(mean, tuple(range(first, end)))

    return rule


def block_average(
    axis: int,
    size: int,
    *,
    abs_first: bool = True,
    is_blocked: Callable[[KeyPath, Array], bool] | None = None,
) -> AveragingRule:
    """Average the curvature over blocks of consecutive entries along an axis.

    The official code for transformers averages absolute values over blocks of the
    flattened ``(out, in)``, of matrices only: ``axis=0`` of a kernel ``(in, out)``,
    with ``is_blocked=lambda path, leaf: leaf.ndim == 2``.

    Args:
      axis: the axis along which the blocks lie; negative counts from the end.
      size: the number of entries in a block, at least 1; must divide the axis.
      abs_first: average absolute values. False averages with the sign, which makes
        errors of the estimate cancel and is more accurate.
      is_blocked: which leaves to average, a function of ``(path, leaf)``. By default,
        those with two axes or more.

    Returns:
      A rule for ``averaging`` of :func:`adahessian_jax.adahessian` that keeps shapes.

    Raises:
      ValueError: if ``size`` < 1; when applied, if it does not divide such an axis.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> rule = ah.block_average(axis=0, size=2)
      >>> rule((), jnp.array([[1.0], [3.0], [-5.0], [7.0]])).tolist()
      [[2.0], [2.0], [6.0], [6.0]]

    References:
      Yao et al., `ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning
      <https://arxiv.org/abs/2006.00719>`_, 2021, section 3.2 and equation 10
    """
    is_int = isinstance(axis, int) and not isinstance(axis, bool)
    require(is_int, TypeError, "axis", "an int", axis)
    check_int("size", size, 1)
    check_flag("abs_first", abs_first)
    is_blocked = _is_matrix if is_blocked is None else is_blocked
    check_callable("is_blocked", is_blocked, "(path, leaf) -> bool")

    def rule(path: KeyPath, leaf: Array) -> Array:
        if not is_blocked(path, leaf):
            return leaf
        if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] % size:
            raise ValueError(
                f"block_average(axis={axis}, size={size}) does not fit"
                f" {jax.tree_util.keystr(path)} of shape {leaf.shape}: the axis must"
                " exist and be a multiple of size. Say which leaves to average with"
                " is_blocked=."
            )
        ax = axis % leaf.ndim
        blocks = leaf.reshape(*leaf.shape[:ax], -1, size, *leaf.shape[ax + 1 :])
        blocks = jnp.abs(blocks) if abs_first else blocks
        mean = jnp.mean(blocks, axis=ax + 1, keepdims=True)
        return jnp.broadcast_to(mean, blocks.shape).reshape(leaf.shape)

    return rule


def _named_conv(path: KeyPath, leaf: Array) -> bool:
    name = jax.tree_util.keystr(path).lower()
    return leaf.ndim >= 3 and "conv" in name and not re.search(r"bias\W*$", name)


def _is_matrix(path: KeyPath, leaf: Array) -> bool:
    return leaf.ndim >= 2
