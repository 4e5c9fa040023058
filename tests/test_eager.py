# SPDX-License-Identifier: Apache-2.0
"""Outside jit, as values in Python, with donated buffers, and under JAX's checks."""

import contextlib
import copy
import functools
import io
import pickle

import chex
import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import serialization
from jax._src import monitoring

import adahessian_jax as ah
from adahessian_jax import losses
from adahessian_jax._src.curvature_state import nodes_of_type
from adahessian_jax._src.estimator import are_alike
from adahessian_jax.transforms.adahessian import ScaleByAdaHessianState
from tests.problems import at_once

SOFTMAX = losses.softmax_cross_entropy
RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, size=8))
W = jnp.asarray(RNG.normal(size=(3, 3)), jnp.float32)
PARAMS = {"b": jnp.zeros((1, 3)), "w": W}


def predict(p):
    return jnp.dot(X, p["w"]) + p["b"]


def objective(p):
    return SOFTMAX(predict(p), Y)


def loss_and_outputs(p):
    return objective(p), predict(p)


GAUSS_NEWTON = ah.gauss_newton(SOFTMAX)
ESTIMATORS = {
    "hutchinson": ah.hutchinson(),
    "hutchinson_2": ah.hutchinson(2),
    "hutchinson_9": ah.hutchinson(9),
    "normal": ah.hutchinson(probe="normal", control_variate=ah.ema_control()),
    "low_rank": ah.hutchinson(control_variate=ah.low_rank_control(2)),
    "control": ah.hutchinson(control_variate=ah.gauss_newton_control(SOFTMAX)),
    "gauss_newton": GAUSS_NEWTON,
    "gauss_newton_2": ah.gauss_newton(SOFTMAX, n_samples=2),
    "in_eigenbasis": ah.in_eigenbasis(GAUSS_NEWTON, max_dim=2, n_vectors=1),
}


FEW = "hutchinson", "low_rank", "control", "in_eigenbasis"


def extra_args(name):
    if name == "control":
        return {"predict_fn": predict, "labels": Y}
    return {"obj_fn": objective, "predict_fn": predict}


def optimizer(name, interval=1):
    options = {"update_interval": interval, "estimator": ESTIMATORS[name]}
    return ah.adahessian(0.1, hessian_ema="mean", eps=0.1, **options)


def training(tx, **args):
    """Return a step that takes over the buffers of its arguments."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state):
        grads = jax.grad(objective)(params)
        updates, state = tx.update(grads, state, params, **args)
        return optax.apply_updates(params, updates), state

    return step


@contextlib.contextmanager
def compilations():
    """Collect the events of compiling meanwhile."""
    events = []

    def listener(event, seconds, **_):
        del seconds
        events.extend([event] if "backend_compile" in event else [])

    monitoring.register_event_duration_secs_listener(listener)
    try:
        yield events
    finally:
        monitoring.unregister_event_duration_listener(listener)


@pytest.mark.skipif(
    not hasattr(jax, "shard_map"), reason="older versions compile more outside jit"
)
@pytest.mark.parametrize("path", ["always", "every second", "fused"])
@pytest.mark.parametrize("name", at_once(ESTIMATORS, FEW))
def test_nothing_is_compiled_after_both_kinds_of_step(name, path):
    fused = path == "fused"
    tx = optimizer(name, 1 if path == "always" else 2)
    function = objective if ESTIMATORS[name].update.loss is None else loss_and_outputs
    one_pass = ah.value_and_grad_with_curvature(function, tx)
    labels = {"labels": Y} if name == "control" else {}

    def step(params, state):
        if fused:
            _, grads, curvature = one_pass(params, state=state, **labels)
            args = {"curvature": curvature}
        else:
            grads, args = jax.grad(objective)(params), extra_args(name)
        updates, state = tx.update(grads, state, params, **args)
        return optax.apply_updates(params, updates), state

    carry = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        carry = step(*carry)
    with compilations() as events:
        for _ in range(2):
            carry = step(*carry)
        assert not events
        jax.jit(lambda x: x * 3.5)(jnp.ones(7)).block_until_ready()
    assert events  # of what was never compiled
    assert carry[1][0].curvature.count == 5


# Values -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimators_and_optimizers_survive_as_values(name):
    eqx = pytest.importorskip("equinox")

    class Trainer(eqx.Module):
        tx: optax.GradientTransformation

    for value in (ESTIMATORS[name], optimizer(name)):
        structure = jax.tree.structure(value.init(PARAMS))
        for rebuilt in (
            copy.deepcopy(value),
            jax.tree.map(lambda x: x, value),
            jax.tree.map(lambda x: x, Trainer(value)).tx,
            eqx.filter_jit(lambda tx: tx)(value),
            value._replace(init=value.init),
        ):
            assert isinstance(rebuilt, optax.GradientTransformationExtraArgs)
            assert jax.tree.structure(rebuilt.init(PARAMS)) == structure
    # A copy of an estimator is the same to the fused path, and not another one.
    twin = copy.deepcopy(ESTIMATORS[name])
    assert are_alike(twin.update, ESTIMATORS[name].update)
    others = [e for n, e in ESTIMATORS.items() if n != name]
    assert not any(are_alike(twin, other) for other in others)


@pytest.mark.parametrize("name", at_once(ESTIMATORS, FEW))
def test_states_pickle_map_and_are_donated(name):
    """No array is in two fields, and none is lost."""
    tx = optimizer(name, interval=2)
    step = training(tx, **extra_args(name))
    params, state = jax.tree.map(jnp.copy, (PARAMS, tx.init(PARAMS)))
    restored = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, state)))
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    leaves = [id(x) for x in jax.tree.leaves(tx.init(PARAMS))]
    assert len(leaves) == len(set(leaves))
    fresh = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    for _ in range(3):
        params, state = step(params, state)
        fresh = step(*fresh)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(fresh[1]), strict=True):
        np.testing.assert_array_equal(a, b)


def through_equinox(state, like):
    eqx, file = pytest.importorskip("equinox"), io.BytesIO()
    eqx.tree_serialise_leaves(file, state)
    file.seek(0)
    return eqx.tree_deserialise_leaves(file, like)


SAVED = {
    "msgpack": lambda s, like: serialization.from_bytes(
        like, serialization.to_bytes(s)
    ),
    "numpy": lambda s, like: jax.tree.map(np.asarray, s),
    "equinox": through_equinox,
}


@pytest.mark.parametrize("name", ["hutchinson", "low_rank", "in_eigenbasis", "named"])
def test_states_go_through_other_tools(name):
    """Formats, with a typed key as seed; optax's map of parameters; a FrozenDict."""
    tx = optimizer(name, interval=2) if name in ESTIMATORS else NAMED["newton"]()
    if name == "hutchinson":
        tx = ah.adahessian(0.1, estimator=ah.hutchinson(seed=jax.random.key(3)))
    args = extra_args(name)
    update = jax.jit(lambda s: tx.update(PARAMS, s, PARAMS, **args))
    _, state = update(tx.init(PARAMS))
    for save in SAVED.values():
        chex.assert_trees_all_equal(update(save(state, tx.init(PARAMS))), update(state))
    kinds = [(x.shape, x.dtype, x.weak_type) for x in jax.tree.leaves(state)]
    first = jax.tree.leaves(jax.eval_shape(tx.init, PARAMS))
    assert kinds == [(x.shape, x.dtype, x.weak_type) for x in first]
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, state)
    assert jax.tree.structure(doubled) == jax.tree.structure(state)
    (mu,) = (x.mu for x in nodes_of_type(ScaleByAdaHessianState, state))
    (mu2,) = (x.mu for x in nodes_of_type(ScaleByAdaHessianState, doubled))
    chex.assert_trees_all_equal(mu2, jax.tree.map(lambda m: 2 * m, mu))
    frozen = flax.core.freeze(PARAMS)
    updates, _ = tx.update(frozen, tx.init(frozen), frozen, **args)
    assert isinstance(optax.apply_updates(frozen, updates), flax.core.FrozenDict)


def test_keys_of_another_kind_stay_as_they_are():
    for kind, dtype in (("threefry2x32", "uint32"), ("rbg", "key<rbg>")):
        state = ah.hutchinson(seed=jax.random.key(0, impl=kind)).init({})
        assert str(state.key.dtype) == dtype


NAMED = {
    "newton": lambda: ah.newton(None, SOFTMAX),
    "subspace": lambda: ah.subspace_newton(SOFTMAX),
    "davda54": lambda: ah.published.davda54(update_each=2),
    "zack_dugue": lambda: ah.published.zack_dugue(),
}


@pytest.mark.parametrize("name", NAMED)
def test_named_optimizers_can_be_donated_from_the_first_step(name):
    tx = NAMED[name]()
    step = training(tx, obj_fn=objective, predict_fn=predict)
    carry = jax.tree.map(jnp.copy, PARAMS), tx.init(PARAMS)
    for _ in range(3):
        carry = step(*carry)
    assert np.isfinite(objective(carry[0]))


# JAX's own checks -------------------------------------------------------------------

CHECKS = {
    "leaks": jax.checking_leaks,
    "rank promotion": lambda: jax.numpy_rank_promotion("raise"),
    "NaN": lambda: jax.debug_nans(True),
    "infinity": lambda: jax.debug_infs(True),
    "no jit": jax.disable_jit,
    "legacy keys": lambda: jax.legacy_prng_key("error"),
}
SEEDED = {
    "hutchinson_9": functools.partial(ah.hutchinson, 9),
    "low_rank": functools.partial(
        ah.hutchinson, control_variate=ah.low_rank_control(2)
    ),
    "control": functools.partial(
        ah.hutchinson, control_variate=ah.gauss_newton_control(SOFTMAX)
    ),
    "gauss_newton_2": functools.partial(ah.gauss_newton, SOFTMAX, n_samples=2),
    "in_eigenbasis": lambda seed: ah.in_eigenbasis(ah.gauss_newton(SOFTMAX, seed=seed)),
    "leading": lambda seed: ah.in_eigenbasis(
        ah.gauss_newton(SOFTMAX, seed=seed), max_dim=2, n_vectors=1
    ),
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("name", at_once(SEEDED, ["leading"]))
def test_passes_the_checks_of_jax(name, check):
    w = jnp.ones((3, 3))
    x = jnp.concatenate([X[:, :2], jnp.zeros((8, 1))], axis=1)  # no curvature in a row

    def outputs(w):
        return jnp.dot(x, w)

    def loss(w):
        return SOFTMAX(outputs(w), Y)

    with CHECKS[check]():
        seed = jax.random.key(1) if check == "leaks" else 1
        tx = ah.adahessian(0.1, estimator=SEEDED[name](seed=seed), update_interval=2)
        args = {"labels": Y} if name == "control" else {"obj_fn": loss}

        @jax.jit
        def step(w, state):
            return tx.update(jax.grad(loss)(w), state, w, predict_fn=outputs, **args)

        state = tx.init(w)
        for _ in range(2):
            updates, state = step(w, state)
    assert np.all(np.isfinite(updates))
