# SPDX-License-Identifier: Apache-2.0
"""Averaging rules against NumPy's means, alone and in an optimizer."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adahessian_jax as ah

CONV, ATTENTION = (
    (jax.tree_util.DictKey(name), jax.tree_util.DictKey("kernel"))
    for name in ("Conv_0", "query")
)
ABS_FIRST = pytest.mark.parametrize("abs_first", [True, False], ids=["abs", "signed"])


def kernel(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@ABS_FIRST
@pytest.mark.parametrize(
    ("shape", "layout", "stacks", "axes"),
    [
        ((5, 2, 3), None, 0, (0,)),
        ((3, 3, 2, 4), "HWIO", 0, (0, 1)),
        ((2, 3, 4, 5, 6), None, 0, (0, 1, 2)),
        ((6, 3, 3, 2, 4), None, 1, (1, 2)),  # scanned layers are kept apart
        ((4, 2, 3, 3), "OIHW", 0, (2, 3)),
        ((2, 6, 4, 2, 5), "OIHW", 2, (4,)),
    ],
    ids=str,
)
def test_spatial_axes(shape, layout, stacks, axes, abs_first):
    leaf, options = kernel(*shape), {"layout": layout, "abs_first": abs_first}
    rule = ah.conv_spatial_average(**options, stacked=lambda path, leaf: stacks)
    result = rule(CONV, leaf)
    expected = (np.abs if abs_first else np.asarray)(leaf).mean(axes, keepdims=True)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-6)


def test_which_leaves():
    rule, blocks = ah.conv_spatial_average(), ah.block_average(0, 2)
    for path, shape in ((CONV, (4,)), (CONV, (3, 4)), (ATTENTION, (6, 8, 2, 4))):
        leaf = kernel(*shape)
        assert rule(path, leaf) is leaf
        assert len(shape) > 1 or blocks(path, leaf) is leaf
    rule = ah.conv_spatial_average(is_conv=lambda path, leaf: leaf.ndim == 4)
    assert rule(ATTENTION, kernel(3, 3, 2, 4)).shape == (1, 1, 2, 4)
    leaf = kernel(3, 2, 4)
    assert rule(CONV, leaf) is leaf
    eqx = pytest.importorskip("equinox")  # whose biases have three axes
    layer = eqx.nn.Conv2d(2, 4, 3, key=jax.random.key(0))
    params = {"conv": eqx.filter(layer, eqx.is_array)}
    tx = ah.adahessian(0.1, averaging=ah.conv_spatial_average(layout="OIHW"))
    nu = tx.init(params)[0].curvature.nu["conv"]
    assert (nu.weight.shape, nu.bias.shape) == ((4, 2, 1, 1), (4, 1, 1))
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


def test_a_rule_of_your_own_may_drop_axes():
    params, rule = {"w": jnp.ones((2, 3))}, lambda path, leaf: leaf.mean()
    tx = ah.scale_by_adahessian(eps=0.0, averaging=rule)
    diag = {"w": jnp.arange(6.0).reshape(2, 3)}
    updates, _ = tx.update(params, tx.init(params), params, hessian_diag=diag)
    np.testing.assert_allclose(updates["w"], np.full((2, 3), 0.4), rtol=1e-5)


def test_optimizer_stores_and_uses_the_average():
    """The curvature of each kernel is one number per channel pair."""
    params = {"conv": jnp.ones((3, 3, 2, 4)), "dense": jnp.ones((2, 3))}
    tx = ah.scale_by_adahessian(eps=0.0, averaging=ah.conv_spatial_average())
    state = tx.init(params)
    assert state.curvature.nu["conv"].shape == (1, 1, 2, 4)
    diag = {"conv": kernel(3, 3, 2, 4), "dense": 2 * jnp.ones((2, 3))}
    updates, _ = tx.update(params, state, params, hessian_diag=diag)
    mean = np.abs(diag["conv"]).mean(axis=(0, 1), keepdims=True)
    expected = np.broadcast_to(1 / mean, (3, 3, 2, 4))
    np.testing.assert_allclose(updates["conv"], expected, rtol=1e-4)
    np.testing.assert_allclose(updates["dense"], 0.5, rtol=1e-4)
