# SPDX-License-Identifier: Apache-2.0
"""Averaging rules against NumPy's means, alone and in an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adahessian_jax as ah

CONV = (jax.tree_util.DictKey("Conv_0"), jax.tree_util.DictKey("kernel"))
ATTENTION = (jax.tree_util.DictKey("query"), jax.tree_util.DictKey("kernel"))
ABS_FIRST = pytest.mark.parametrize("abs_first", [True, False], ids=["abs", "signed"])


def kernel(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@ABS_FIRST
@pytest.mark.parametrize(
    ("shape", "spatial_ndim", "axes"),
    [
        ((5, 2, 3), None, (0,)),
        ((3, 3, 2, 4), None, (0, 1)),
        ((2, 3, 4, 5, 6), None, (0, 1, 2)),
        ((7, 7, 2, 3), 2, (0, 1)),
        ((6, 3, 3, 2, 4), 2, (1, 2)),  # scanned layers are kept apart
    ],
    ids=str,
)
def test_spatial_axes_of_hwio_kernels(shape, spatial_ndim, axes, abs_first):
    leaf = kernel(*shape)
    result = ah.conv_spatial_average(spatial_ndim, abs_first=abs_first)(CONV, leaf)
    values = np.abs(leaf) if abs_first else np.asarray(leaf)
    expected = values.mean(axis=axes, keepdims=True)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "shape"),
    [(ATTENTION, (8, 2, 4)), (CONV, (4,)), (CONV, (3, 4)), (ATTENTION, (6, 8, 2, 4))],
    ids=["attention", "bias", "dense", "scanned-attention"],
)
def test_other_leaves_are_left_alone(path, shape):
    leaf = kernel(*shape)
    assert ah.conv_spatial_average()(path, leaf) is leaf
    assert len(shape) > 1 or ah.block_average(0, 2)(path, leaf) is leaf


def test_functions_decide_which_leaves():
    rule = ah.conv_spatial_average(is_conv=lambda path, leaf: leaf.ndim == 4)
    assert rule(ATTENTION, kernel(3, 3, 2, 4)).shape == (1, 1, 2, 4)
    leaf = kernel(3, 2, 4)
    assert rule(CONV, leaf) is leaf
    rule = ah.block_average(0, 2, is_blocked=lambda path, leaf: leaf.ndim == 1)
    np.testing.assert_allclose(rule((), jnp.array([1.0, 3.0])), [2, 2])


@ABS_FIRST
@pytest.mark.parametrize("axis", [0, 1, -1], ids=str)
def test_block_average(axis, abs_first):
    leaf = kernel(4, 6)
    result = ah.block_average(axis, 2, abs_first=abs_first)((), leaf)
    values = np.abs(leaf) if abs_first else np.asarray(leaf)
    blocks = np.split(values, leaf.shape[axis] // 2, axis=axis)
    means = [np.repeat(b.mean(axis=axis, keepdims=True), 2, axis) for b in blocks]
    np.testing.assert_allclose(result, np.concatenate(means, axis=axis), rtol=1e-5)


@ABS_FIRST
def test_optimizer_stores_and_uses_the_average(abs_first):
    """The curvature of each kernel is one number per channel pair."""
    shape = (3, 3, 2, 4)
    curvature = np.random.default_rng(0).uniform(-1, 3, size=shape).astype(np.float32)
    params = {"conv": jnp.ones(shape), "dense": jnp.ones((2, 3))}
    rule = ah.conv_spatial_average(abs_first=abs_first)
    tx = ah.scale_by_adahessian(eps=0.0, averaging=rule)
    state = tx.init(params)
    assert state.curvature.nu["conv"].shape == (1, 1, 2, 4)
    diag = {"conv": jnp.asarray(curvature), "dense": 2 * jnp.ones((2, 3))}
    updates, _ = tx.update(params, state, params, hessian_diag=diag)
    values = np.abs(curvature) if abs_first else curvature
    expected = 1 / np.abs(values.mean(axis=(0, 1), keepdims=True))
    expected = {"conv": np.broadcast_to(expected, shape), "dense": np.full((2, 3), 0.5)}
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-4), updates, expected)
