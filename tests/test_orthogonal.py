# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from adahessian_jax.orthogonal import (
    Reflectors,
    first_columns,
    multiply_along,
    orthogonal_from_columns,
)
from tests.problems import dense

RNG = np.random.default_rng(0)
COLUMNS = {
    "random": RNG.normal(size=(7, 3)),
    "one": RNG.normal(size=(7, 1)),
    "all": RNG.normal(size=(7, 7)),
    "all but one": RNG.normal(size=(7, 6)),
    "axes": np.eye(7, 3),  # for which LAPACK reflects nothing, with tau = 0
    "swapped axes": np.eye(7)[:, [1, 0]],
    "turned about": -np.eye(7, 3),
}


@pytest.fixture(autouse=True)
def double(x64):
    del x64


@pytest.mark.parametrize("name", COLUMNS)
def test_is_orthogonal_and_begins_with_the_columns(name):
    columns = COLUMNS[name]
    k = columns.shape[1]
    q = orthogonal_from_columns(jnp.asarray(columns))
    assert isinstance(q, Reflectors) == (k < 7)
    np.testing.assert_allclose(dense(q).T @ dense(q), np.eye(7), atol=1e-14)
    np.testing.assert_array_equal(np.shape(first_columns(q)), columns.shape)
    np.testing.assert_allclose(first_columns(q), dense(q)[:, :k], atol=1e-14)
    expected, _ = np.linalg.qr(columns)  # up to signs
    overlap = np.abs(expected.T @ np.asarray(first_columns(q)))
    np.testing.assert_allclose(overlap, np.eye(k), atol=1e-13)


def test_of_fewer_independent_columns_than_given():
    q = orthogonal_from_columns(jnp.zeros((5, 2)))
    np.testing.assert_allclose(dense(q).T @ dense(q), np.eye(5), atol=1e-14)
    same = jnp.asarray(RNG.normal(size=(5, 1))) * jnp.ones((1, 2))
    q = orthogonal_from_columns(same)
    np.testing.assert_allclose(dense(q).T @ dense(q), np.eye(5), atol=1e-14)


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("k", [2, 5], ids=["reflectors", "array"])
def test_multiplies_along_an_axis(axis, k):
    shape = [3, 4, 2]
    shape[axis] = 5
    x = RNG.normal(size=shape)
    q = orthogonal_from_columns(jnp.asarray(RNG.normal(size=(5, k))))
    expected = np.moveaxis(np.tensordot(dense(q), x, (1, axis)), 0, axis)
    got = multiply_along(q, jnp.asarray(x), axis, transpose=False)
    np.testing.assert_allclose(got, expected, atol=1e-13)
    back = multiply_along(q, got, axis, transpose=True)
    np.testing.assert_allclose(back, x, atol=1e-13)


def test_single_precision_under_vmap_and_jit():
    columns = jnp.asarray(RNG.normal(size=(4, 300, 16)), jnp.float32)

    @jax.jit
    @jax.vmap
    def there_and_back(columns, x):
        q = orthogonal_from_columns(columns)
        y = multiply_along(q, x, 0, transpose=True)
        return y, multiply_along(q, y, 0, transpose=False)

    x = jnp.asarray(RNG.normal(size=(4, 300, 10)), jnp.float32)
    y, z = there_and_back(columns, x)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(z, x, atol=1e-5)
    assert float(jnp.max(jnp.abs(y - x))) > 0.1
