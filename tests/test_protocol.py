# SPDX-License-Identifier: Apache-2.0
"""What every estimator must survive, in every place where optax runs."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization

import adahessian_jax as ah
from tests.problems import cross_entropy

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(16, 6)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, size=16))
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(6, 8)) / 2, jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(8, 3)) / 2, jnp.float32),
}


@pytest.fixture(autouse=True)
def standard_promotion():
    """Sophia needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def predict(params, x):
    return jnp.dot(jnp.tanh(jnp.dot(x, params["w"])), params["v"])


def functions(x, y):
    """Return all that any estimator may ask for."""
    return {
        "obj_fn": lambda p: cross_entropy(predict(p, x), y),
        "predict_fn": lambda p: predict(p, x),
        "output_loss": lambda f: cross_entropy(f, y),
    }


def functions_of_parts(x, y):
    return {
        "obj_fn": lambda p, part: cross_entropy(predict(p, part[0]), part[1]),
        "predict_fn": lambda p, part: predict(p, part[0]),
        "output_loss": lambda f, part: cross_entropy(f, part[1]),
        "batch": (x, y),
    }


def estimators(**options):
    """Make one of each kind."""
    softmax = "softmax_cross_entropy"
    return {
        "hutchinson": ah.hutchinson(**options),
        "normal-2": ah.hutchinson(2, probe="normal", **options),
        "gauss-newton": ah.gauss_newton(softmax, **options),
        "in-eigenbasis": ah.in_eigenbasis(
            ah.gauss_newton(softmax, **options), max_dim=3, n_vectors=2
        ),
        "gauss-newton-2": ah.gauss_newton(softmax, n_samples=2, **options),
        "gauss-newton-hutchinson": ah.gauss_newton(
            softmax, method="hutchinson", **options
        ),
        "sampled-labels": ah.gauss_newton(softmax, method="sampled-labels", **options),
        "gauss-newton-control": ah.hutchinson(
            control_variate=ah.gauss_newton_control(softmax), **options
        ),
        "low-rank-control": ah.hutchinson(
            control_variate=ah.low_rank_control(2), **options
        ),
        "microbatched": ah.microbatched(ah.hutchinson(**options), 4),
    }


ESTIMATORS = estimators()


def arguments(name, x=X, y=Y):
    return (functions_of_parts if name == "microbatched" else functions)(x, y)


def estimate(name, state, params=PARAMS):
    return ESTIMATORS[name].update(None, state, params, **arguments(name))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_jit_equals_no_jit(name):
    state = ESTIMATORS[name].init(PARAMS)
    eager = estimate(name, state)
    compiled = jax.jit(lambda s: estimate(name, s))(state)
    chex.assert_trees_all_close(eager, compiled, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager[0], PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(eager[1], state)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_scan_equals_a_python_loop(name):
    step = jax.jit(lambda s: estimate(name, s))
    start = ESTIMATORS[name].init(PARAMS)
    last, diags = jax.lax.scan(lambda s, _: step(s)[::-1], start, length=3)
    state = start
    for t in range(3):
        diag, state = step(state)
        in_scan = jax.tree.map(lambda d, t=t: d[t], diags)
        chex.assert_trees_all_close(diag, in_scan, rtol=1e-4, atol=1e-5)
    chex.assert_trees_all_close(state, last, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_vmap_over_an_ensemble(name):
    """Members have parameters and keys of their own."""
    members = jax.tree.map(lambda p: jnp.stack([p, 2 * p, -p]), PARAMS)
    states = jax.vmap(ESTIMATORS[name].init)(members)
    keys = jax.vmap(jax.random.PRNGKey)(jnp.arange(3))
    if name == "in-eigenbasis":
        keys = ah.GaussNewtonState(keys)
        states = states._replace(estimator_state=keys)
    else:
        states = states._replace(key=keys)
    diags, _ = jax.vmap(lambda s, p: estimate(name, s, p))(states, members)
    for i in range(3):
        state, member, got = jax.tree.map(lambda x, i=i: x[i], (states, members, diags))
        expected, _ = estimate(name, state, member)
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_pmap_replicas_agree_and_probes_differ(name):
    """On 4 devices with parts of the batch, against a loop over the parts."""
    n = 4
    if jax.device_count() < n:
        pytest.skip(f"needs {n} devices")
    estimator = estimators(axis_name="devices")[name]
    x, y = X.reshape(n, -1, 6), Y.reshape(n, -1)

    def update(estimator, state, x, y):
        return estimator.update(None, state, PARAMS, **arguments(name, x, y))

    state = estimator.init(PARAMS)
    diag, new = jax.pmap(
        lambda x, y: update(estimator, state, x, y), axis_name="devices"
    )(x, y)
    for tree in (diag, new):
        first = jax.tree.map(lambda d: d[0], tree)
        for i in range(1, n):
            chex.assert_trees_all_equal(first, jax.tree.map(lambda d, i=i: d[i], tree))
    emulated = jax.vmap(
        lambda x, y: update(estimator, state, x, y)[0], axis_name="devices"
    )(x, y)
    chex.assert_trees_all_close(diag, emulated, rtol=1e-4, atol=1e-5)
    same_key, _ = update(ESTIMATORS[name], state, x[0], y[0])
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(
            jax.tree.map(lambda d: d[0], diag), same_key, rtol=1e-3
        )


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
def test_serves_sophia(jit, name):
    tx = optax.contrib.sophia(
        1e-2, update_interval=2, hessian_diagonal_fn=ESTIMATORS[name]
    )
    state = tx.init(PARAMS)

    def step(state):
        return tx.update(PARAMS, state, PARAMS, **arguments(name))

    step = jax.jit(step) if jit else step
    for _ in range(3):
        updates, state = step(state)
    chex.assert_tree_all_finite((updates, state))
    expected, _ = estimate(name, ESTIMATORS[name].init(PARAMS))
    _, first = step(tx.init(PARAMS))
    chex.assert_trees_all_close(
        first[0].nu, jax.tree.map(lambda d: 0.01 * d, expected), rtol=1e-3, atol=1e-6
    )


@pytest.mark.parametrize("hessian_ema", ["rms", "mean"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_serves_adahessian(name, interval, hessian_ema):
    tx = ah.scale_by_adahessian(
        estimator=ESTIMATORS[name], update_interval=interval, hessian_ema=hessian_ema
    )
    state = tx.init(PARAMS)
    step = jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, **arguments(name)))
    expected, _ = estimate(name, ESTIMATORS[name].init(PARAMS))
    _, state = step(state)
    order = 2 if hessian_ema == "rms" else 1
    chex.assert_trees_all_close(
        state.nu,
        jax.tree.map(lambda d: 0.001 * d**order, expected),
        rtol=1e-3,
        atol=1e-7,
    )
    for _ in range(2):
        _, state = step(state)
    assert state.refreshes == (3 if interval == 1 else 2)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_state_resumes_from_bytes(name):
    """Through a checkpoint that knows nothing but arrays, bit for bit."""
    step = jax.jit(lambda s: estimate(name, s))
    start = ESTIMATORS[name].init(PARAMS)
    _, state = step(start)
    restored = serialization.from_bytes(start, serialization.to_bytes(state))
    chex.assert_trees_all_equal(step(restored), step(state))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_parameters_may_be_sharded(name):
    """Over 4 devices, in the manner of fully sharded data parallel training."""
    if jax.device_count() < 4:
        pytest.skip("needs 4 devices")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:4]), ("data",))
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "data"))
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    params = {
        "w": jax.device_put(PARAMS["w"], split),
        "v": jax.device_put(PARAMS["v"], whole),
    }
    step = jax.jit(lambda s, p: estimate(name, s, p))
    start = jax.jit(ESTIMATORS[name].init)(PARAMS)
    _, state = step(start, PARAMS)
    expected, _ = step(state, PARAMS)
    _, state = step(start, params)
    diag, _ = step(state, params)
    chex.assert_trees_all_close(diag, expected, rtol=1e-3, atol=1e-5)
