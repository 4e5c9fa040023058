# SPDX-License-Identifier: Apache-2.0
"""Slope, curvature and the learning rate from them; and where it may be put."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from benchmarks.networks import NETWORKS
from tests.test_gauss_newton import LOSSES, network, objective, weights_for


@pytest.fixture
def standard_promotion():
    """Optax's Adam needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def dense_ggn(output_loss, predict, params):
    """J' H_L J, with H_L from jax.hessian of the loss in the outputs."""
    flat, unravel = ravel_pytree(params)
    outputs = predict(params)
    jacobian = jax.jacobian(lambda w: predict(unravel(w)).ravel())(flat)
    hessian = jax.hessian(lambda f: output_loss(f.reshape(outputs.shape)))
    return np.asarray(jacobian.T @ hessian(outputs.ravel()) @ jacobian)


def like(params, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", [None, "masked", "weighted"])
@pytest.mark.parametrize("case", LOSSES)
@pytest.mark.usefixtures("x64")
def test_slope_and_curvature_are_those_of_the_loss(case, kind, reduction):
    loss, options, row_losses = LOSSES[case]
    params, predict = network()
    output_loss = objective(row_losses, kind, reduction)
    weights, _ = weights_for(kind, row_losses(predict(params)))
    tx = ah.scale_by_quadratic_model(loss, decay=0.0, reduction=reduction, **options)
    grads = jax.grad(lambda p: output_loss(predict(p)))(params)
    incoming = like(params, 1)
    updates, state = tx.update(
        incoming,
        tx.init(params),
        params,
        grad=grads,
        predict_fn=lambda p: predict(p) if weights is None else (predict(p), weights),
    )
    g, u, got = (np.asarray(ravel_pytree(x)[0]) for x in (grads, incoming, updates))
    curvature = u @ dense_ggn(output_loss, predict, params) @ u
    np.testing.assert_allclose(state.slope, g @ u, rtol=1e-9)
    np.testing.assert_allclose(state.curvature, curvature, rtol=1e-9)
    rate = 0.7 * max(g @ u, 0) / curvature
    np.testing.assert_allclose(state.learning_rate, rate, rtol=1e-9)
    np.testing.assert_allclose(got, rate * u, rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_targets_are_handed_to_the_loss():
    params, predict = network()
    targets = jnp.asarray(np.random.default_rng(0).uniform(1, 2, predict(params).shape))

    def loss(f, y):
        return y * f**2

    tx = ah.scale_by_quadratic_model(loss, event_ndim=0, decay=0.0)
    u = like(params, 1)
    options = {"grad": u, "predict_fn": predict, "targets": targets}
    _, state = tx.update(u, tx.init(params), params, **options)
    matrix = dense_ggn(lambda f: jnp.mean(loss(f, targets)), predict, params)
    flat = np.asarray(ravel_pytree(u)[0])
    np.testing.assert_allclose(state.curvature, flat @ matrix @ flat, rtol=1e-9)


# A linear model, on which everything is known.
RNG = np.random.default_rng(0)
X = RNG.normal(size=(20, 4)) * np.array([1.0, 3.0, 0.3, 0.0])
Y = RNG.normal(size=20)
H = 2 * X.T @ X / len(X)
W = RNG.normal(size=4)
LEAST = np.mean((X @ np.linalg.lstsq(X, Y, rcond=None)[0] - Y) ** 2)
WEIGHTS = RNG.uniform(size=20)


def predict(w, x=None):
    return jnp.dot(jnp.asarray(X if x is None else x, w.dtype), w)


def loss_fn(w):
    return jnp.mean((predict(w) - jnp.asarray(Y, w.dtype)) ** 2)


def update(tx, updates, state, w, grad=None):
    grad = jax.grad(loss_fn)(w) if grad is None else grad
    return tx.update(updates, state, w, grad=grad, predict_fn=predict)


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_four_updates_by_hand(injected):
    make = ah.scale_by_quadratic_model
    if injected:
        make = optax.inject_hyperparams(make, static_args=("loss", "reduction"))
    tx = make("squared_error", 0.6, decay=0.8, max_learning_rate=0.2)
    w = jnp.asarray(W)
    state, slope, curvature, rates = tx.init(w), 0.0, 0.0, []
    for scale in [-1.0, 1.0, 2.0, 3.0]:  # the first is uphill
        g = np.asarray(jax.grad(loss_fn)(w))
        u = scale * g
        updates, state = update(tx, jnp.asarray(u), state, w)
        slope = 0.8 * slope + 0.2 * g @ u
        curvature = 0.8 * curvature + 0.2 * u @ H @ u
        rates.append(min(0.6 * max(slope, 0) / curvature, 0.2))
        np.testing.assert_allclose(updates, rates[-1] * u, rtol=1e-9)
        w = w - updates
    assert rates[0] == 0.0
    assert 0 < rates[-1] < 0.2
    for _ in range(100):  # short ones, until the maximum bounds the rate
        u = 1e-3 * jax.grad(loss_fn)(w)
        updates, state = update(tx, u, state, w)
    np.testing.assert_allclose(updates, 0.2 * u)


@pytest.mark.usefixtures("x64")
def test_whole_way_along_the_gradient_is_the_exact_line_search():
    tx = ah.scale_by_quadratic_model("squared_error", 1.0, decay=0.0)
    w = jnp.asarray(W)
    g = jax.grad(loss_fn)(w)
    updates, _ = update(tx, g, tx.init(w), w)
    np.testing.assert_allclose(
        jnp.vdot(jax.grad(loss_fn)(w - updates), g), 0, atol=1e-12
    )


@pytest.mark.usefixtures("x64")
def test_neither_the_scale_of_the_updates_nor_that_of_the_loss_matters():
    tx = ah.scale_by_quadratic_model("squared_error")
    summed = ah.scale_by_quadratic_model("squared_error", reduction="sum")
    w = jnp.asarray(W)
    state, scaled, of_sum = tx.init(w), tx.init(w), summed.init(w)
    for _ in range(3):
        g = jax.grad(loss_fn)(w)
        expected, state = update(tx, g, state, w)
        updates, scaled = update(tx, 1e4 * g, scaled, w)
        np.testing.assert_allclose(updates, expected, rtol=1e-9)
        updates, of_sum = update(summed, g, of_sum, w, grad=len(X) * g)
        np.testing.assert_allclose(updates, expected, rtol=1e-9)
        w = w - expected


@pytest.mark.parametrize("inner", ["gradient descent", "Adam", "eigenbasis"])
@pytest.mark.parametrize("limit", [None, 0.3, 1e4])
@pytest.mark.usefixtures("standard_promotion")
def test_trains_at_any_maximum(inner, limit):
    """Where gradient descent diverges at a rate of 0.3, and at 1e4 at once."""
    factor = ah.in_eigenbasis(ah.gauss_newton("squared_error"))
    first = {
        "gradient descent": optax.identity(),
        "Adam": optax.scale_by_adam(),
        "eigenbasis": ah.scale_by_adahessian(estimator=factor, clip_threshold=0.1),
    }[inner]

    def train(*transformations):
        tx = optax.chain(first, *transformations)

        @jax.jit
        def step(w, state):
            updates, state = update(tx, jax.grad(loss_fn)(w), state, w)
            return optax.apply_updates(w, updates), state

        w = jnp.asarray(W, jnp.float32)
        state = tx.init(w)
        for _ in range(200):
            w, state = step(w, state)
        return loss_fn(w) - LEAST

    start = loss_fn(jnp.asarray(W)) - LEAST
    model = ah.scale_by_quadratic_model("squared_error", max_learning_rate=limit)
    assert train(model, optax.scale_by_learning_rate(1.0)) < 0.01 * start
    if inner == "gradient descent" and limit is not None:
        assert not train(optax.scale_by_learning_rate(limit)) < start


@pytest.mark.usefixtures("x64")
def test_devices_share_a_learning_rate():
    """By vmap with a name, each with a part of the batch and weights of its own."""
    tx = ah.scale_by_quadratic_model("squared_error", axis_name="data")
    whole = ah.scale_by_quadratic_model("squared_error")
    w = jnp.asarray(W)
    g = jax.grad(loss_fn)(w)
    weights = jnp.asarray(WEIGHTS)

    def one(x, weights):
        options = {"grad": g, "predict_fn": lambda w: (predict(w, x), weights)}
        return tx.update(g, tx.init(w), w, **options)

    parts = X.reshape(4, 5, 4), weights.reshape(4, 5)
    got = jax.vmap(one, axis_name="data")(*parts)
    options = {"grad": g, "predict_fn": lambda w: (predict(w), weights)}
    expected = whole.update(g, whole.init(w), w, **options)
    for i in range(4):
        mine = jax.tree.map(lambda x, i=i: x[i], got)
        chex.assert_trees_all_close(mine, expected, rtol=1e-12)
    mapped = jax.pmap(one, axis_name="data", devices=jax.devices()[:4])(*parts)
    chex.assert_trees_all_close(mapped, got, rtol=1e-12)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_left_out(bad):
    tx = ah.scale_by_quadratic_model("squared_error")
    w = jnp.asarray(W, jnp.float32)
    g = jax.grad(loss_fn)(w)
    _, state = update(tx, g, tx.init(w), w)
    broken = g.at[0].set(bad)
    _, after = update(tx, broken, state, w)
    chex.assert_trees_all_equal(after, state)
    _, after = update(tx, g, state, w, grad=broken)
    chex.assert_trees_all_equal(after, state)


def test_without_curvature_there_is_no_step():
    tx = ah.scale_by_quadratic_model("squared_error")
    w = jnp.ones(4)
    u = jnp.array([0.0, 0.0, 0.0, 1.0])  # the model does not depend on it
    updates, state = update(tx, u, tx.init(w), w, grad=u)
    assert float(state.slope) > 0
    assert float(state.learning_rate) == 0.0
    assert not updates.any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtypes_and_leaves_that_are_no_floats_stay(dtype):
    params = {"w": jnp.ones(4, dtype), "n": jnp.arange(3), "none": None}
    grads = {"w": jnp.full(4, 2.0, dtype), "n": jnp.ones(3, jnp.int32), "none": None}
    tx = ah.scale_by_quadratic_model("squared_error")
    options = {"grad": grads, "predict_fn": lambda p: predict(p["w"])}
    updates, state = tx.update(grads, tx.init(params), params, **options)
    assert updates["w"].dtype == dtype
    assert updates["w"].any()
    assert {x.dtype for x in state} == {jnp.dtype("float32")}
    chex.assert_trees_all_equal(updates["n"], grads["n"])


@pytest.mark.usefixtures("standard_promotion")
def test_beside_a_fused_estimate_and_inside_masks():
    """It takes its arguments from those that the estimator needs, or beside them."""
    params = {"w": jnp.ones(4), "b": jnp.ones(())}
    y = jnp.asarray(Y, jnp.float32)

    def outputs_of(p):
        return predict(p["w"]) + p["b"]

    def loss_and_outputs(p):
        return jnp.mean((outputs_of(p) - y) ** 2), outputs_of(p)

    estimator = ah.gauss_newton("squared_error")

    def make():
        return optax.chain(
            ah.scale_by_adahessian(estimator=estimator),
            ah.scale_by_quadratic_model("squared_error"),
        )

    fused = ah.value_and_grad_with_curvature(loss_and_outputs, estimator)
    tx = make()
    state = tx.init(params)
    _, grads, curvature = fused(params, state=state)
    beside, _ = tx.update(
        *(grads, state, params),
        curvature=curvature,
        grad=grads,
        predict_fn=outputs_of,
    )
    alone, _ = tx.update(grads, state, params, grad=grads, predict_fn=outputs_of)
    chex.assert_trees_all_close(beside, alone, rtol=1e-5)

    mask = {"w": True, "b": False}
    tx = optax.masked(make(), mask)
    options = {"grad": grads, "predict_fn": ah.unmasked(outputs_of, params)}
    updates, state = tx.update(grads, tx.init(params), params, **options)
    assert float(updates["b"]) == float(grads["b"])
    u = np.asarray(updates["w"])
    slope, curvature = u @ np.asarray(grads["w"]), u @ H @ u
    np.testing.assert_allclose(slope / curvature, 1 / 0.7, rtol=1e-4)


@pytest.mark.parametrize("name", ["MLP", "GPT", "ResNet-8"])
def test_operations_beside_those_of_the_gradient(name):
    """A forward pass of tangents, and the update's own few operations."""
    net = NETWORKS[name]()
    tx = ah.scale_by_quadratic_model("softmax_cross_entropy")

    def gradient(params, *batch):
        return jax.grad(lambda p: net.loss_fn(p, *batch)[0][0])(params)

    def step(params, *batch):
        def outputs_of(p):
            return net.loss_fn(p, *batch)[0][1]

        grads = gradient(params, *batch)
        options = {"grad": grads, "predict_fn": outputs_of}
        return tx.update(grads, tx.init(params), params, **options)

    def operations(function):
        compiled = jax.jit(function).lower(net.params, *net.batch).compile()
        analysis = compiled.cost_analysis()
        return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]

    ratio = operations(step) / operations(gradient)
    assert 1.5 < ratio < 1.75


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("params", "params must be given"),
        ("grad", r"grad must be given: .* grad=grads"),
        ("predict_fn", r"predict_fn must be given: .* predict_fn=lambda p"),
    ],
)
def test_what_an_update_needs(missing, message):
    tx = ah.scale_by_quadratic_model("squared_error")
    w = jnp.ones(4)
    arguments = {"params": w, "grad": w, "predict_fn": predict, missing: None}
    with pytest.raises(ValueError, match=message):
        tx.update(w, tx.init(w), **arguments)


@pytest.mark.parametrize("name", ["grad", "updates"])
def test_shapes_have_to_match(name):
    tx = ah.scale_by_quadratic_model("squared_error")
    w = jnp.ones(4)
    arguments = {"grad": w, "updates": w, name: jnp.ones(3)}
    with pytest.raises(ValueError, match=rf"{name} must have the shape .*\(4,\)"):
        tx.update(
            arguments["updates"],
            tx.init(w),
            w,
            grad=arguments["grad"],
            predict_fn=predict,
        )


def test_complex_parameters_are_refused():
    with pytest.raises(TypeError, match="complex64"):
        ah.scale_by_quadratic_model("squared_error").init(jnp.ones(2, jnp.complex64))
