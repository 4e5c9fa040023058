# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adahessian_jax as ah

CONV = (jax.tree_util.DictKey("Conv_0"), jax.tree_util.DictKey("kernel"))
ATTENTION = (jax.tree_util.DictKey("query"), jax.tree_util.DictKey("kernel"))


def kernel(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("abs_first", [True, False], ids=["abs-first", "abs-last"])
@pytest.mark.parametrize(
    "shape", [(5, 2, 3), (3, 3, 2, 4), (2, 3, 4, 5, 6), (7, 7, 2, 3)], ids=str
)
def test_averages_all_spatial_axes_of_hwio(shape, abs_first):
    leaf = kernel(*shape)
    result = ah.conv_spatial_average(abs_first=abs_first)(CONV, leaf)
    values = np.abs(leaf) if abs_first else np.asarray(leaf)
    axes = tuple(range(len(shape) - 2))
    expected = values.mean(axis=axes, keepdims=True)
    assert result.shape == expected.shape
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_scanned_layers_are_kept_apart():
    leaf = kernel(6, 3, 3, 2, 4)
    result = ah.conv_spatial_average(2)(CONV, leaf)
    expected = np.abs(leaf).mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(result, expected, rtol=1e-5)


def test_channels_of_hwio_are_not_averaged():
    leaf = jnp.zeros((3, 3, 2, 4)).at[..., 1, 3].set(5.0)
    result = ah.conv_spatial_average()(CONV, leaf)
    np.testing.assert_allclose(result[0, 0], [[0, 0, 0, 0], [0, 0, 0, 5]])


@pytest.mark.parametrize(
    ("path", "shape"),
    [(ATTENTION, (8, 2, 4)), (CONV, (4,)), (CONV, (3, 4)), (ATTENTION, (6, 8, 2, 4))],
    ids=["attention", "bias", "dense", "scanned-attention"],
)
def test_other_leaves_are_left_alone(path, shape):
    leaf = kernel(*shape)
    assert ah.conv_spatial_average()(path, leaf) is leaf


def test_is_conv_decides():
    rule = ah.conv_spatial_average(is_conv=lambda path, leaf: leaf.ndim == 4)
    assert rule(ATTENTION, kernel(3, 3, 2, 4)).shape == (1, 1, 2, 4)
    leaf = kernel(3, 2, 4)
    assert rule(CONV, leaf) is leaf


@pytest.mark.parametrize("abs_first", [True, False], ids=["abs-first", "abs-last"])
@pytest.mark.parametrize("axis", [0, 1, -1], ids=str)
def test_block_average(axis, abs_first):
    leaf = kernel(4, 6)
    result = ah.block_average(axis, 2, abs_first=abs_first)((), leaf)
    values = np.abs(leaf) if abs_first else np.asarray(leaf)
    n = leaf.shape[axis] // 2
    for block in range(n):
        taken = np.take(values, [2 * block, 2 * block + 1], axis=axis)
        got = np.take(np.asarray(result), [2 * block, 2 * block + 1], axis=axis)
        np.testing.assert_allclose(
            got,
            np.broadcast_to(taken.mean(axis=axis, keepdims=True), got.shape),
            rtol=1e-5,
            atol=1e-6,
        )


def test_block_average_leaves_vectors_alone():
    leaf = kernel(5)
    assert ah.block_average(0, 2)((), leaf) is leaf


def test_is_blocked_decides():
    rule = ah.block_average(0, 2, is_blocked=lambda path, leaf: leaf.ndim == 1)
    np.testing.assert_allclose(rule((), jnp.array([1.0, 3.0])), [2, 2])


@pytest.mark.parametrize("interval", [1, 3])
@pytest.mark.parametrize("abs_first", [True, False], ids=["abs-first", "abs-last"])
def test_optimizer_stores_and_uses_the_average(abs_first, interval):
    """The curvature of each kernel is one number per channel pair."""
    shape = (3, 3, 2, 4)
    curvature = np.random.default_rng(0).uniform(-1, 3, size=shape).astype(np.float32)
    params = {"conv": jnp.ones(shape), "dense": jnp.ones((2, 3))}
    tx = ah.scale_by_adahessian(
        eps=0.0,
        update_interval=interval,
        averaging=ah.conv_spatial_average(abs_first=abs_first),
    )
    state = tx.init(params)
    assert state.nu["conv"].shape == (1, 1, 2, 4)
    grads = jax.tree.map(jnp.ones_like, params)
    diag = {"conv": jnp.asarray(curvature), "dense": 2 * jnp.ones((2, 3))}
    updates, state = tx.update(grads, state, params, hessian_diag=diag)
    values = np.abs(curvature) if abs_first else curvature
    expected = 1 / np.abs(values.mean(axis=(0, 1), keepdims=True))
    np.testing.assert_allclose(
        updates["conv"], np.broadcast_to(expected, shape), rtol=1e-4
    )
    np.testing.assert_allclose(updates["dense"], 0.5, rtol=1e-4)


def test_warns_if_no_leaf_is_averaged():
    tx = ah.scale_by_adahessian(averaging=ah.conv_spatial_average())
    with pytest.warns(UserWarning, match=r"none of the 1 parameters, such as \['w'\]"):
        tx.init({"w": jnp.ones((3, 3, 2, 4))})
