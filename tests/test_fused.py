# SPDX-License-Identifier: Apache-2.0
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from tests.problems import cross_entropy


@pytest.fixture(autouse=True)
def standard_promotion():
    """optax's chain multiplies the zero updates of integers by the learning rate."""
    with jax.numpy_dtype_promotion("standard"):
        yield


RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 5)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, size=12))
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32),
    "b": jnp.zeros(4),
    "v": jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32),
    "n": jnp.asarray(2),
}


def predict(params, x):
    hidden = jnp.tanh(jnp.dot(x, params["w"]) + params["b"])
    return jnp.dot(hidden, params["v"]) * params["n"].astype(jnp.float32)


def loss_fn(params, x, y):
    return cross_entropy(predict(params, x), y)


def loss_and_aux(params, x, y):
    return loss_fn(params, x, y), {"mean": jnp.mean(x)}


def loss_and_outputs(params, x, y):
    outputs = predict(params, x)
    return cross_entropy(outputs, y), outputs


def float_grads(loss, params, *batch):
    grads = jax.grad(loss, allow_int=True)(params, *batch)
    return {**grads, "n": jnp.zeros_like(params["n"])}


def run_by_obj_fn(tx, steps, *, jit=True):
    """Train by update(obj_fn=..., predict_fn=...); return all updates and states."""

    def step(params, state):
        grads = float_grads(loss_fn, params, X, Y)
        updates, state = tx.update(
            grads,
            state,
            params,
            obj_fn=lambda p: loss_fn(p, X, Y),
            predict_fn=lambda p: predict(p, X),
        )
        return updates, state

    return train(step, tx, steps, jit=jit)


def run_fused(tx, loss, estimator, steps, *, refreshes=None, jit=True, **options):
    value_and_grad = ah.value_and_grad_with_curvature(loss, estimator, **options)

    def step(params, state, refresh=None):
        _, grads, curvature = value_and_grad(params, X, Y, state=state, refresh=refresh)
        return tx.update(grads, state, params, curvature=curvature)

    return train(step, tx, steps, refreshes, jit=jit)


def train(step, tx, steps, refreshes=None, *, jit):
    static = () if refreshes is None else ("refresh",)
    step = jax.jit(step, static_argnames=static) if jit else step
    params, state, history = PARAMS, tx.init(PARAMS), []
    for t in range(steps):
        kwargs = {} if refreshes is None else {"refresh": t in refreshes}
        updates, state = step(params, state, **kwargs)
        params = optax.apply_updates(params, updates)
        history.append((updates, state))
    return history


def without_schedule(history):
    """Drop the field that says when the next refresh is due."""
    return jax.tree.map(
        lambda x: (
            x._replace(refresh_due=None)
            if isinstance(x, ah.ScaleByAdaHessianState)
            else x
        ),
        history,
        is_leaf=lambda x: isinstance(x, ah.ScaleByAdaHessianState),
    )


ESTIMATORS = {
    "hutchinson": (ah.hutchinson(), loss_fn, {}),
    "normal-3": (ah.hutchinson(3, probe="normal"), loss_fn, {}),
    "reverse": (ah.hutchinson(mode="reverse-over-reverse"), loss_fn, {}),
    "finite-difference": (ah.hutchinson(mode="finite-difference"), loss_fn, {}),
    "low-rank": (
        ah.hutchinson(control_variate=ah.low_rank_control(2)),
        loss_fn,
        {},
    ),
    "aux": (ah.hutchinson(), loss_and_aux, {"has_aux": True}),
    "gauss-newton": (ah.gauss_newton("softmax_cross_entropy"), loss_and_outputs, {}),
    "in-eigenbasis": (
        ah.in_eigenbasis(
            ah.gauss_newton("softmax_cross_entropy"), max_dim=3, n_vectors=2
        ),
        loss_and_outputs,
        {},
    ),
    "gauss-newton-2": (
        ah.gauss_newton("softmax_cross_entropy", n_samples=2),
        loss_and_outputs,
        {},
    ),
    "gauss-newton-hutchinson": (
        ah.gauss_newton("softmax_cross_entropy", method="hutchinson"),
        loss_and_outputs,
        {},
    ),
    "gauss-newton-aux": (
        ah.gauss_newton("softmax_cross_entropy"),
        lambda p, x, y: (loss_and_outputs(p, x, y), jnp.sum(x)),
        {"has_aux": True},
    ),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_equals_the_obj_fn_path_bit_for_bit(name):
    """Outside jit, where both run the same operations one by one."""
    estimator, loss, options = ESTIMATORS[name]
    tx = ah.adahessian(0.1, eps=1e-3, weight_decay=0.01, estimator=estimator)
    expected = run_by_obj_fn(tx, 2, jit=False)
    fused = run_fused(tx, loss, estimator, 2, jit=False, **options)
    chex.assert_trees_all_equal(fused, expected)


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("name", ["hutchinson", "gauss-newton", "aux"])
def test_follows_the_optimizers_interval(name, reuse):
    estimator, loss, options = ESTIMATORS[name]
    tx = ah.adahessian(
        0.1,
        eps=1e-2,
        estimator=estimator,
        update_interval=4,
        initial_refreshes=2,
        reuse_estimate=reuse,
    )
    expected = run_by_obj_fn(tx, 10)
    fused = run_fused(tx, loss, estimator, 10, **options)
    chex.assert_trees_all_close(fused, expected, rtol=2e-3, atol=1e-5)
    counts = [int(state[0].refreshes) for _, state in fused]
    assert counts == [1, 2, 2, 2, 3, 3, 3, 3, 4, 4]


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("name", ["hutchinson", "gauss-newton"])
def test_refresh_chosen_on_the_host(name, reuse):
    """The same as by the optimizer's own interval, with no cond in the programs."""
    estimator, loss, _ = ESTIMATORS[name]
    tx = ah.adahessian(
        0.1, eps=1e-2, estimator=estimator, update_interval=3, reuse_estimate=reuse
    )
    expected = run_fused(tx, loss, estimator, 7)
    chosen = run_fused(tx, loss, estimator, 7, refreshes={0, 3, 6})
    chex.assert_trees_all_close(chosen, expected, rtol=2e-3, atol=1e-5)
    value_and_grad = ah.value_and_grad_with_curvature(loss, estimator)

    def step(state, refresh):
        _, grads, curvature = value_and_grad(PARAMS, X, Y, state=state, refresh=refresh)
        return tx.update(grads, state, PARAMS, curvature=curvature)

    state = tx.init(PARAMS)
    assert " cond[" in str(jax.make_jaxpr(lambda s: step(s, None))(state))
    for refresh in (True, False):
        jaxpr = jax.make_jaxpr(lambda s, refresh=refresh: step(s, refresh))(state)
        assert " cond[" not in str(jaxpr)


def test_host_may_refresh_at_other_counts():
    """Then the average is corrected by the estimates that there were."""
    estimator = ah.hutchinson()
    tx = ah.adahessian(
        0.1, estimator=estimator, update_interval=100, reuse_estimate=False
    )
    history = run_fused(tx, loss_fn, estimator, 6, refreshes={0, 1, 4})
    counts = [int(state[0].refreshes) for _, state in history]
    assert counts == [1, 2, 2, 2, 3, 3]


def test_values_gradients_and_aux():
    value_and_grad = ah.value_and_grad_with_curvature(
        loss_and_aux, ah.hutchinson(), has_aux=True
    )
    state = ah.adahessian(0.1).init(PARAMS)
    (value, aux), grads, curvature = value_and_grad(PARAMS, X, Y, state=state)
    np.testing.assert_allclose(value, loss_fn(PARAMS, X, Y), rtol=1e-6)
    np.testing.assert_allclose(aux["mean"], jnp.mean(X), rtol=1e-6)
    expected = float_grads(loss_fn, PARAMS, X, Y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(curvature.hessian_diag, PARAMS)


def test_weights_beside_the_outputs(x64):
    del x64
    weights = jnp.asarray([1.0, 0.0] * 6)
    params = jax.tree.map(lambda p: p.astype(jnp.float64) if p.ndim else p, PARAMS)

    def loss(p, x, y):
        outputs = predict(p | {"n": jnp.asarray(1)}, x)
        losses = jax.nn.logsumexp(outputs, axis=-1)
        return jnp.sum(weights * losses) / jnp.sum(weights), (outputs, weights)

    estimator = ah.gauss_newton("softmax_cross_entropy")
    tx = ah.adahessian(0.1, estimator=estimator)
    state = tx.init(params)
    fused = ah.value_and_grad_with_curvature(loss, estimator)
    x = X.astype(jnp.float64)
    _, _, curvature = fused(params, x, Y, state=state)
    expected, _ = estimator.update(
        None, state[0].estimator_state, params, predict_fn=lambda p: loss(p, x, Y)[1]
    )
    chex.assert_trees_all_close(curvature.hessian_diag, expected, rtol=1e-12)


def test_takes_any_transformation_as_estimator():
    estimator = optax.contrib.hutchinson_estimator_diag_hessian()
    params = {k: v for k, v in PARAMS.items() if k != "n"}
    tx = ah.adahessian(0.1, estimator=estimator)

    def loss(p, x, y):
        return loss_fn({**p, "n": jnp.asarray(1)}, x, y)

    state = tx.init(params)
    fused = ah.value_and_grad_with_curvature(loss, estimator)
    _, grads, curvature = fused(params, X, Y, state=state)
    updates, _ = tx.update(grads, state, params, curvature=curvature)
    expected, _ = tx.update(grads, state, params, obj_fn=lambda p: loss(p, X, Y))
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


@pytest.mark.parametrize("has_aux", [False, True], ids=["no-aux", "aux"])
def test_gauss_newton_control(has_aux):
    """Value and gradient come from its pass, and the estimate is that of ``update``."""
    control = ah.gauss_newton_control("softmax_cross_entropy")
    estimator = ah.hutchinson(control_variate=control)
    tx = ah.adahessian(0.1, eps=1e-3, estimator=estimator)
    state = tx.init(PARAMS)

    def loss(p, x, y):
        result = loss_and_outputs(p, x, y)
        return (result, {"mean": jnp.mean(x)}) if has_aux else result

    def output_loss(outputs):
        return cross_entropy(outputs, Y)

    fused = ah.value_and_grad_with_curvature(loss, estimator, has_aux=has_aux)
    value, grads, curvature = fused(PARAMS, X, Y, state=state, output_loss=output_loss)
    value, aux = value if has_aux else (value, {"mean": jnp.mean(X)})
    np.testing.assert_allclose(value, loss_fn(PARAMS, X, Y), rtol=1e-6)
    np.testing.assert_allclose(aux["mean"], jnp.mean(X), rtol=1e-6)
    exact = float_grads(loss_fn, PARAMS, X, Y)
    chex.assert_trees_all_close(grads, exact, rtol=1e-5, atol=1e-7)
    updates, _ = tx.update(grads, state, PARAMS, curvature=curvature)
    expected, _ = tx.update(
        grads,
        state,
        PARAMS,
        predict_fn=lambda p: predict(p, X),
        output_loss=output_loss,
    )
    chex.assert_trees_all_close(updates, expected, rtol=1e-5)


def test_gauss_newton_control_of_a_loss_with_weight_decay():
    """One row of one output: no chance, and the decay is in gradient and Hessian."""
    x, w = jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 0.5, 2.0])
    estimator = ah.hutchinson(control_variate=ah.gauss_newton_control("l2_loss"))

    def output_loss(outputs):
        return jnp.mean((outputs - 1) ** 2) / 2

    def loss(w):
        outputs = jnp.dot(x, w)[None]
        return output_loss(outputs) + 0.25 * jnp.sum(w**2), outputs

    state = ah.adahessian(0.1, estimator=estimator).init(w)
    value, grads, curvature = ah.value_and_grad_with_curvature(loss, estimator)(
        w, state=state, output_loss=output_loss
    )
    np.testing.assert_allclose(value, 5**2 / 2 + 0.25 * 5.25, rtol=1e-6)
    np.testing.assert_allclose(grads, 5 * x + 0.5 * w, rtol=1e-6)
    np.testing.assert_allclose(curvature.hessian_diag, x**2 + 0.5, rtol=1e-6)


@pytest.mark.parametrize("has_aux", [False, True], ids=["one-pass", "aux"])
@pytest.mark.parametrize("n", [4, 12])
def test_curvature_of_a_part_of_the_batch(n, has_aux):
    estimator = ah.hutchinson()
    tx = ah.adahessian(0.1, estimator=estimator)
    state = tx.init(PARAMS)
    fused = ah.value_and_grad_with_curvature(
        loss_and_aux if has_aux else loss_fn,
        estimator,
        has_aux=has_aux,
        curvature_batch=n,
    )
    value, grads, curvature = fused(PARAMS, X, Y, state=state)
    value, aux = value if has_aux else (value, {"mean": jnp.mean(X)})
    np.testing.assert_allclose(value, loss_fn(PARAMS, X, Y), rtol=1e-5)
    np.testing.assert_allclose(aux["mean"], jnp.mean(X), rtol=1e-5)
    expected = float_grads(loss_fn, PARAMS, X, Y)
    chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)
    part, _ = estimator.update(
        None,
        state[0].estimator_state,
        PARAMS,
        obj_fn=lambda p: loss_fn(p, X[:n], Y[:n]),
    )
    chex.assert_trees_all_close(curvature.hessian_diag, part, rtol=1e-4, atol=1e-6)


def test_scalars_of_a_batch_are_not_cut():
    def scaled(params, scale, key, x, y):
        del key
        return scale * loss_fn(params, x, y)

    estimator = ah.hutchinson()
    state = ah.adahessian(0.1, estimator=estimator).init(PARAMS)
    fused = ah.value_and_grad_with_curvature(scaled, estimator, curvature_batch=4)
    batch = (jnp.asarray(2.0), jax.random.key(0), X, Y)
    value, _, _ = fused(PARAMS, *batch, state=state)
    np.testing.assert_allclose(value, 2 * loss_fn(PARAMS, X, Y), rtol=1e-5)


def test_state_is_found_in_a_chain():
    estimator = ah.hutchinson()
    tx = optax.chain(
        optax.clip(1.0),
        ah.scale_by_adahessian(estimator=estimator),
        optax.scale_by_learning_rate(0.1),
    )
    history = run_fused(tx, loss_fn, estimator, 2)
    chex.assert_tree_all_finite(history)


def test_a_wrong_count_inside_jit_is_not_a_silent_drift():
    """Outside jit it raises (see the table of errors); inside, updates are NaN."""
    estimator = ah.hutchinson()
    tx = ah.adahessian(0.1, estimator=estimator)
    fused = ah.value_and_grad_with_curvature(loss_fn, estimator)
    params = {**PARAMS}

    @jax.jit
    def stale(state):
        _, grads, curvature = fused(params, X, Y, state=state)
        _, state = tx.update(grads, state, params, curvature=curvature)
        return tx.update(grads, state, params, curvature=curvature)[0]

    updates = stale(tx.init(params))
    assert all(np.all(np.isnan(updates[k])) for k in "wbv")


def test_dropout_uses_one_mask():
    """With the key in the batch, the Hessian is that of the function differentiated."""

    def dropped(w, key, x):
        kept = jax.random.bernoulli(key, 0.5, x.shape)
        return jnp.sum(jnp.where(kept, x, 0) * w**2)

    estimator = ah.hutchinson()
    w, x = jnp.ones(8), jnp.arange(1.0, 9.0)
    state = ah.adahessian(0.1, estimator=estimator).init(w)
    fused = ah.value_and_grad_with_curvature(dropped, estimator)
    _, grads, curvature = fused(w, jax.random.key(3), x, state=state)
    np.testing.assert_allclose(curvature.hessian_diag, grads)
    assert 0 < np.count_nonzero(grads) < 8
