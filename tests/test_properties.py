# SPDX-License-Identifier: Apache-2.0
"""What holds for any tree of parameters and any set of options."""

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah

hypothesis.settings.register_profile(
    "tests",
    max_examples=20,
    phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
    deadline=None,  # examples compile
    derandomize=True,
    database=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
hypothesis.settings.load_profile("tests")


@pytest.fixture(autouse=True)
def double_precision(x64):
    """So that only mistakes show; the leaves have dtypes of their own."""
    with jax.numpy_dtype_promotion("standard"):
        yield


SHAPES = st.lists(st.integers(0, 3), max_size=3).map(tuple)
FLOATS = ("float64", "float32", "bfloat16", "float16")


@st.composite
def leaves(draw, dtypes=(*FLOATS, "int32")):
    shape, dtype = draw(SHAPES), draw(st.sampled_from(dtypes))
    numbers = np.random.default_rng(draw(st.integers(0, 99))).normal(size=shape)
    return jnp.asarray(2 * numbers, dtype)


def trees(leaf=None):
    """Dicts, lists and tuples, nested, with None among the leaves."""
    tree = st.recursive(
        st.one_of(leaves() if leaf is None else leaf, st.none()),
        lambda inner: st.one_of(
            st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
            st.lists(inner, max_size=3),
            st.tuples(inner, inner),
        ),
        max_leaves=5,
    )
    return st.fixed_dictionaries({"root": tree})  # None alone is no parameters


double_trees = trees(leaves(("float64",)))


def loss(params):
    """A smooth function of all leaves, with a Hessian that is nowhere diagonal."""
    parts = [jnp.sum(jnp.sin(x.astype(float))) for x in jax.tree.leaves(params)]
    squares = [jnp.sum(x.astype(float) ** 2) for x in jax.tree.leaves(params)]
    total = sum(parts, start=jnp.zeros(()))
    return jnp.tanh(0.1 * total) * (1 + 0.01 * sum(squares, start=jnp.zeros(())))


def dot(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum((jnp.sum(x * y) for x, y in pairs), start=jnp.zeros(()))


def normal_like(seed, tree):
    return ah.normal_like(jax.random.key(seed), tree)


@hypothesis.given(trees(), st.integers(0, 2**31), st.booleans())
def test_probes_have_the_form_of_the_parameters(tree, seed, gaussian):
    draw = ah.normal_like if gaussian else ah.rademacher_like
    probe = draw(jax.random.key(seed), tree)
    chex.assert_trees_all_equal_shapes_and_dtypes(probe, tree)
    chex.assert_trees_all_equal(probe, draw(jax.random.key(seed), tree))
    for z, x in zip(jax.tree.leaves(probe), jax.tree.leaves(tree), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            assert not jnp.any(z)
        elif not gaussian:
            assert jnp.all(jnp.abs(z) == 1)


@hypothesis.given(double_trees, st.floats(-3, 3), st.floats(-3, 3))
def test_hvp_is_linear(params, a, b):
    u, v = normal_like(1, params), normal_like(2, params)
    together = jax.tree.map(lambda x, y: a * x + b * y, u, v)
    apart = jax.tree.map(
        lambda x, y: a * x + b * y, ah.hvp(loss, params, u), ah.hvp(loss, params, v)
    )
    chex.assert_trees_all_close(
        ah.hvp(loss, params, together), apart, rtol=1e-9, atol=1e-12
    )


@hypothesis.given(
    double_trees, st.sampled_from(["forward-over-reverse", "reverse-over-reverse"])
)
def test_hvp_is_symmetric(params, mode):
    u, v = normal_like(1, params), normal_like(2, params)
    left = dot(u, ah.hvp(loss, params, v, mode=mode))
    right = dot(v, ah.hvp(loss, params, u, mode=mode))
    np.testing.assert_allclose(left, right, rtol=1e-9, atol=1e-12)


def estimators():
    return {
        "rademacher": ah.hutchinson(),
        "normal-2": ah.hutchinson(2, probe="normal"),
        "low-rank": ah.hutchinson(2, control_variate=ah.low_rank_control(1)),
        "gauss-newton": ah.gauss_newton("squared_error", reduction="sum"),
    }


def estimate(name, params, scale=1.0, inner=1.0):
    """Estimate for the loss scaled by a factor, at parameters scaled by another."""
    scaled = jax.tree.map(lambda x: inner * x, params)

    def objective(p):
        return scale * loss(jax.tree.map(lambda x: x / inner, p))

    def outputs(p):
        floats = [jnp.ravel(jnp.sin(x / inner)) for x in jax.tree.leaves(p)]
        return jnp.sqrt(scale) * jnp.concatenate([jnp.zeros(1), *floats])

    estimator = estimators()[name]
    return estimator.update(
        None, estimator.init(scaled), scaled, obj_fn=objective, predict_fn=outputs
    )[0]


SCALES = st.sampled_from([0.25, 0.5, 3.0, 10.0])


@hypothesis.given(double_trees, st.sampled_from(list(estimators())), SCALES)
def test_a_loss_scaled_by_c_scales_the_diagonal_by_c(params, name, c):
    expected = jax.tree.map(lambda d: c * d, estimate(name, params))
    chex.assert_trees_all_close(
        estimate(name, params, scale=c), expected, rtol=1e-8, atol=1e-12
    )


@hypothesis.given(double_trees, st.sampled_from(list(estimators())), SCALES)
def test_parameters_scaled_by_s_scale_the_diagonal_by_its_inverse_square(
    params, name, s
):
    expected = jax.tree.map(lambda d: d / s**2, estimate(name, params))
    chex.assert_trees_all_close(
        estimate(name, params, inner=s), expected, rtol=1e-8, atol=1e-12
    )


OPTIONS = st.fixed_dictionaries(
    {
        "b1": st.sampled_from([0.0, 0.9]),
        "b2": st.sampled_from([0.0, 0.99]),
        "eps": st.sampled_from([1e-8, 1e-2]),
        "hessian_power": st.sampled_from([0.5, 1.0]),
        "hessian_ema": st.sampled_from(["rms", "mean"]),
        "update_interval": st.sampled_from([1, 2]),
        "initial_refreshes": st.sampled_from([0, 2]),
        "reuse_estimate": st.booleans(),
        "relative_damping": st.sampled_from([0.0, 0.1]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "mu_dtype": st.sampled_from([None, "float32"]),
        "nu_dtype": st.sampled_from([None, "float32", "float64"]),
    }
)


def run(tx, params, jit):
    """Take three steps; return parameters, last updates and state."""

    def step(params, state):
        grads = jax.tree.map(
            lambda x: jnp.cos(x) if jnp.issubdtype(x.dtype, jnp.floating) else 0 * x,
            params,
        )
        updates, state = tx.update(grads, state, params, obj_fn=loss)
        return optax.apply_updates(params, updates), updates, state

    step = jax.jit(step) if jit else step
    state, updates = tx.init(params), None
    for _ in range(3):
        params, updates, state = step(params, state)
    return params, updates, state


@hypothesis.given(trees(), OPTIONS, st.sampled_from(["rademacher", "normal-2"]))
def test_form_of_updates_and_state(params, options, name):
    """Structure, shapes and dtypes are those of the parameters, and stay."""
    tx = ah.adahessian(0.01, estimator=estimators()[name], **options)
    trained, updates, state = run(tx, params, jit=True)
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, params)
    chex.assert_trees_all_equal_shapes(updates, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, tx.init(params))
    assert state[0].count == 3
    for x, before, update in zip(
        *map(jax.tree.leaves, (trained, params, updates)), strict=True
    ):
        if jnp.issubdtype(x.dtype, jnp.floating):
            assert update.dtype == x.dtype
        else:  # frozen, though optax multiplies its update of zero by the learning rate
            assert jnp.all(x == before)


@hypothesis.given(double_trees, OPTIONS, st.integers(0, 2**31))
def test_jit_is_no_jit_and_the_seed_decides(params, options, seed):
    def make(seed):
        estimator = ah.hutchinson(seed=seed)
        # Small curvature would magnify the rounding of another order of operations.
        return ah.adahessian(0.01, estimator=estimator, **{**options, "eps": 1.0})

    first = run(make(seed), params, jit=True)
    chex.assert_trees_all_equal(first, run(make(seed), params, jit=True))
    chex.assert_trees_all_close(
        first, run(make(seed), params, jit=False), rtol=1e-5, atol=1e-7
    )
