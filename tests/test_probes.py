# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adahessian_jax as ah

PROBES = {"rademacher": ah.rademacher_like, "normal": ah.normal_like}

TREE = {
    "w": jnp.zeros((3, 5), jnp.float32),
    "half": [jnp.zeros(40, jnp.bfloat16), jnp.zeros((2, 2), jnp.float16)],
    "scalar": jnp.zeros((), jnp.float32),
    "python": 1.0,
    "empty": jnp.zeros((0, 4)),
    "none": None,
    "steps": jnp.zeros(3, jnp.int32),
    "flag": jnp.zeros(2, bool),
}


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("name", PROBES)
def test_keeps_structure_shapes_and_dtypes(name, jit):
    draw = jax.jit(PROBES[name]) if jit else PROBES[name]
    z = draw(jax.random.key(0), TREE)
    assert jax.tree.structure(z) == jax.tree.structure(TREE)
    for a, b in zip(jax.tree.leaves(z), jax.tree.leaves(TREE), strict=True):
        assert a.shape == jnp.shape(b)
        assert a.dtype == jnp.result_type(b)
    assert not z["steps"].any()
    assert not z["flag"].any()


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("key", [jax.random.key(3), jax.random.PRNGKey(3)], ids=str)
def test_same_key_gives_same_probe(name, key):
    first, again = (PROBES[name](key, TREE) for _ in range(2))
    jax.tree.map(np.testing.assert_array_equal, first, again)


@pytest.mark.parametrize("name", PROBES)
def test_jit_gives_the_same_probe(name):
    tree = {"a": jnp.zeros((7, 9)), "b": jnp.zeros(33)}
    eager = PROBES[name](jax.random.key(1), tree)
    compiled = jax.jit(PROBES[name])(jax.random.key(1), tree)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), eager, compiled
    )


def test_rademacher_is_signs():
    z = ah.rademacher_like(jax.random.key(0), TREE)
    for leaf in (z["w"], *z["half"], z["scalar"], z["python"]):
        assert np.all(np.abs(np.asarray(leaf, np.float32)) == 1)


@pytest.mark.parametrize("name", PROBES)
def test_entries_are_uncorrelated_with_unit_variance(name):
    """Mean and covariance over draws, each entry within 5 standard errors.

    Sizes that are no multiple of 32 would show an error in unpacking the words.
    """
    n = 4000
    tree = {"a": jnp.zeros(35), "b": jnp.zeros((5, 7)), "c": jnp.zeros(())}
    keys = jax.random.split(jax.random.key(7), n)
    draws = jax.vmap(lambda key: PROBES[name](key, tree))(keys)
    z = np.concatenate([np.reshape(x, (n, -1)) for x in jax.tree.leaves(draws)], axis=1)
    assert np.abs(z.mean(axis=0)).max() < 5 / np.sqrt(n)
    covariance = z.T @ z / n
    off_diagonal = covariance - np.diag(np.diag(covariance))
    assert np.abs(off_diagonal).max() < 5 / np.sqrt(n)
    kurtosis_excess = {"rademacher": 0.0, "normal": 2.0}[name]
    error = np.abs(np.diag(covariance) - 1).max()
    assert error <= 5 * np.sqrt(kurtosis_excess / n) + 1e-6


@pytest.mark.parametrize("name", PROBES)
def test_leaves_of_equal_shape_differ(name):
    z = PROBES[name](jax.random.key(0), {"a": jnp.zeros(64), "b": jnp.zeros(64)})
    assert not np.array_equal(z["a"], z["b"])
