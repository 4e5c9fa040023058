# SPDX-License-Identifier: Apache-2.0
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from tests.problems import NETWORKS, dense_hessian, mlp, quadratic

EXACT_MODES = ["forward-over-reverse", "reverse-over-reverse"]
MODES = [*EXACT_MODES, "finite-difference"]


def relative_error(a, b):
    a, b = (np.asarray(ravel_pytree(x)[0], np.float64) for x in (a, b))
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@functools.cache
def network_case(name, dtype):
    """Parameters, loss, a vector and the dense Hessian of a network."""
    params, loss = NETWORKS[name](dtype)
    v = ah.normal_like(jax.random.key(1), params)
    return params, loss, v, dense_hessian(loss, params)


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", EXACT_MODES)
def test_matches_dense_hessian_in_float64(mode, network, x64):
    del x64
    params, loss, v, h = network_case(network, "float64")
    product = jax.jit(lambda p: ah.hvp(loss, p, v, mode=mode))(params)
    assert relative_error(product, h @ ravel_pytree(v)[0]) < 1e-10


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("mode", EXACT_MODES)
def test_matches_dense_hessian_in_float32(mode, network):
    params, loss, v, h = network_case(network, "float32")
    product = ah.hvp(loss, params, v, mode=mode)
    assert relative_error(product, h @ ravel_pytree(v)[0]) < 1e-5


@pytest.mark.parametrize("network", NETWORKS)
def test_finite_difference_agrees_with_the_exact_modes(network, x64):
    """To 1e-5, where the documented error is about eps**(2/3) = 4e-11."""
    del x64
    params, loss, v, h = network_case(network, "float64")
    product = jax.jit(lambda p: ah.hvp(loss, p, v, mode="finite-difference"))(params)
    assert 0 < relative_error(product, h @ ravel_pytree(v)[0]) < 1e-5


def test_finite_difference_is_exact_on_a_quadratic(x64):
    """Only rounding remains, eps over a step of eps**(1/3)."""
    del x64
    (params, loss), h = quadratic()
    v = ah.normal_like(jax.random.key(0), params)
    product = ah.hvp(loss, params, v, mode="finite-difference")
    eps = np.finfo(np.float64).eps
    assert relative_error(product, h @ ravel_pytree(v)[0]) < 10 * eps ** (2 / 3)


class Layer(NamedTuple):
    w: jax.Array
    b: jax.Array


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("mode", MODES)
def test_any_pytree(mode, jit):
    params = {
        "layers": [Layer(jnp.ones(3), jnp.asarray(2.0, jnp.float32))],
        "half": jnp.asarray([1.0, -1.0], jnp.bfloat16),
        "empty": jnp.zeros((0, 2)),
        "none": None,
        "frozen": jnp.asarray([2, 3], jnp.int32),
        "flag": jnp.asarray(True),
    }

    def fun(p):
        layer = p["layers"][0]
        coupling = jnp.sum(layer.w) * layer.b
        frozen = p["frozen"].sum().astype(jnp.float32)
        half = jnp.sum(jnp.square(p["half"].astype(jnp.float32)))
        return coupling * coupling + frozen * half

    tangents = jax.tree.map(jnp.ones_like, params)
    product = ah.hvp
    if jit:
        product = jax.jit(ah.hvp, static_argnames=("fun", "mode"))
    result = product(fun, params, tangents, mode=mode)
    assert jax.tree.structure(result) == jax.tree.structure(params)
    for r, p in zip(jax.tree.leaves(result), jax.tree.leaves(params), strict=True):
        assert (r.shape, r.dtype) == (p.shape, p.dtype)
    # f = (s b)^2 with s = sum w = 3, b = 2: columns summed over the tangent of ones.
    tolerance = 0.2 if mode == "finite-difference" else 1e-6
    layer = result["layers"][0]
    np.testing.assert_allclose(layer.w, 2 * 4 * 3 + 4 * 3 * 2, rtol=tolerance)
    np.testing.assert_allclose(layer.b, 2 * 9 + 3 * 4 * 3 * 2, rtol=tolerance)
    half = np.asarray(result["half"], np.float32)
    np.testing.assert_allclose(half, 10, rtol=tolerance)
    assert not result["frozen"].any()


def test_float0_tangents_of_integer_leaves_are_accepted():
    params = {"w": jnp.ones(2), "n": jnp.asarray([1, 2])}
    tangents = {"w": jnp.ones(2), "n": np.zeros(2, jax.dtypes.float0)}
    result = ah.hvp(lambda p: jnp.sum(p["w"] ** 3), params, tangents)
    np.testing.assert_allclose(result["w"], 6)
    assert result["n"].dtype == params["n"].dtype


def test_nothing_to_differentiate():
    params = {"n": jnp.asarray([1, 2]), "none": None}
    result = ah.hvp(lambda p: jnp.zeros(()), params, params)
    assert not result["n"].any()


@jax.custom_vjp
def cubed(x):
    return x**3


cubed.defvjp(lambda x: (cubed(x), x), lambda x, g: (3 * x * x * g,))


def test_reverse_over_reverse_needs_no_forward_rule():
    def fun(w):
        return jnp.sum(jax.lax.map(cubed, w))

    w = jnp.array([1.0, 2.0])
    result = ah.hvp(fun, w, jnp.ones(2), mode="reverse-over-reverse")
    np.testing.assert_allclose(result, 6 * w, rtol=1e-6)


@jax.custom_vjp
def opaque(x):
    return jax.pure_callback(lambda x: x**3, x, x, vmap_method="sequential")


@jax.custom_vjp
def opaque_gradient(x):
    return jax.pure_callback(lambda x: 3 * x**2, x, x, vmap_method="sequential")


def no_second_derivative(*args):
    raise TypeError("no second derivative")


opaque.defvjp(lambda x: (opaque(x), x), lambda x, g: (opaque_gradient(x) * g,))
opaque_gradient.defvjp(no_second_derivative, no_second_derivative)


def test_finite_difference_needs_no_second_derivative():
    def fun(w):
        return jnp.sum(opaque(w))

    w = jnp.array([1.0, 2.0], jnp.float32)
    for mode in EXACT_MODES:
        with pytest.raises((TypeError, ValueError)):
            ah.hvp(fun, w, jnp.ones(2), mode=mode)
    result = ah.hvp(fun, w, jnp.ones(2), mode="finite-difference")
    np.testing.assert_allclose(result, 6 * w, rtol=1e-2)


@pytest.mark.parametrize(
    ("network", "chunk_size"),
    [("mlp", 1), ("mlp", 7), ("mlp", 1000), ("conv", 32), ("transformer", 32)],
)
def test_hessian_diag_matches_dense_hessian(network, chunk_size, x64):
    del x64
    params, loss, _, h = network_case(network, "float64")
    diag = ah.hessian_diag(loss, params, chunk_size=chunk_size)
    assert relative_error(diag, jnp.diagonal(h)) < 1e-12
    assert jax.tree.map(jnp.shape, diag) == jax.tree.map(jnp.shape, params)


def test_hessian_diag_of_mixed_dtypes_and_fixed_leaves():
    params = {
        "half": jnp.asarray([1.0, 2.0], jnp.bfloat16),
        "single": jnp.asarray(3.0, jnp.float32),
        "n": jnp.asarray(7),
        "empty": jnp.zeros((2, 0)),
    }

    def fun(p):
        half = p["half"].astype(jnp.float32)
        return jnp.sum(half**3) + p["single"] ** 2 * p["n"].astype(jnp.float32)

    diag = ah.hessian_diag(fun, params)
    assert jax.tree.map(jnp.dtype, jax.tree.map(lambda x: x.dtype, diag)) == (
        jax.tree.map(lambda x: x.dtype, params)
    )
    np.testing.assert_allclose(np.asarray(diag["half"], np.float32), [6, 12])
    np.testing.assert_allclose(diag["single"], 14)
    assert diag["n"] == 0


def test_hessian_diag_memory_is_bounded_by_the_chunk():
    params, loss = mlp(jnp.float32)

    def temporaries(chunk_size):
        def diag(p):
            return ah.hessian_diag(loss, p, chunk_size=chunk_size)

        compiled = jax.jit(diag).lower(params).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    n = sum(x.size for x in jax.tree.leaves(params))
    assert temporaries(4) < temporaries(n) / 4
