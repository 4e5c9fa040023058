# SPDX-License-Identifier: Apache-2.0
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from tests.problems import exact_diag

BATCH, TIME, CLASSES, FEATURES = 6, 2, 3, 4


def network(seed=0, activation=jnp.tanh):
    """Parameters and a network with outputs of shape (BATCH, TIME, CLASSES)."""
    rng = np.random.default_rng(seed)
    params = {
        "w": jnp.asarray(rng.normal(size=(FEATURES, 5))) / 2,
        "v": jnp.asarray(rng.normal(size=(5, 5))) / 2,
        "u": jnp.asarray(rng.normal(size=(5, CLASSES))) / 2,
    }
    x = jnp.asarray(rng.normal(size=(BATCH, TIME, FEATURES)))

    def predict(p):
        hidden = activation(jnp.dot(x, p["w"]))
        return jnp.dot(activation(jnp.dot(hidden, p["v"])), p["u"])

    return params, predict


def exact_ggn_diag(output_loss, predict, params):
    """Diagonal of J' H_L J, with H_L from jax.hessian of the loss in the outputs."""
    flat, unravel = ravel_pytree(params)
    outputs = predict(params)
    jacobian = jax.jacobian(lambda w: predict(unravel(w)).ravel())(flat)
    hessian = jax.hessian(lambda f: output_loss(f.reshape(outputs.shape)))(
        outputs.ravel()
    )
    return jnp.einsum("on,op,pn->n", jacobian, hessian, jacobian)


RNG = np.random.default_rng(3)
LABELS = RNG.integers(0, CLASSES, size=(BATCH, TIME))
BINARY = RNG.integers(0, 2, size=(BATCH, TIME, CLASSES)).astype(float)
REAL = RNG.normal(size=(BATCH, TIME, CLASSES))
COUNTS = RNG.poisson(2.0, size=(BATCH, TIME, CLASSES)).astype(float)


WEIGHTS = {
    "masked": np.array([1.0, 1.0, 0.0, 1.0, 0.0, 1.0]),
    "weighted": RNG.uniform(0.1, 2.0, size=(BATCH, TIME)),
}


def integer_labels(f):
    picked = jnp.take_along_axis(f, jnp.asarray(LABELS)[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(f, axis=-1) - picked


def smoothed_labels(f):
    dense = 0.9 * jax.nn.one_hot(LABELS, CLASSES, dtype=f.dtype) + 0.1 / CLASSES
    return -jnp.sum(dense * jax.nn.log_softmax(f), axis=-1)


def binary(f):
    return -(BINARY * jax.nn.log_sigmoid(f) + (1 - BINARY) * jax.nn.log_sigmoid(-f))


# Name of the case: the estimator's loss, its options and the losses of the rows.
LOSSES = {
    "softmax-integer": ("softmax_cross_entropy", {}, integer_labels),
    "softmax-smoothed": ("softmax_cross_entropy", {}, smoothed_labels),
    "sigmoid": ("sigmoid_binary_cross_entropy", {}, binary),
    "squared": ("squared_error", {}, lambda f: (f - REAL) ** 2),
    "l2": ("l2_loss", {}, lambda f: (f - REAL) ** 2 / 2),
    "poisson": ("poisson_nll_loss", {}, lambda f: jnp.exp(f) - COUNTS * f),
    "row-function": (
        lambda row: jax.nn.logsumexp(row) + jnp.sum(row**4),
        {},
        lambda f: jax.nn.logsumexp(f, axis=-1) + jnp.sum(f**4, axis=-1),
    ),
    "element-function": (
        lambda f: jnp.log(jnp.cosh(f)),
        {"event_ndim": 0},
        lambda f: jnp.log(jnp.cosh(f)),
    ),
}


def weights_for(kind, losses):
    """Weights as predict_fn returns them, and those of each row's loss."""
    if kind is None:
        return None, jnp.ones(losses.shape)
    weights = jnp.asarray(WEIGHTS[kind])
    expanded = weights.reshape(*weights.shape, *[1] * (losses.ndim - weights.ndim))
    return weights, jnp.broadcast_to(expanded, losses.shape)


def objective(row_losses, kind, reduction):
    def output_loss(f):
        losses = row_losses(f)
        _, weights = weights_for(kind, losses)
        total = jnp.sum(weights * losses)
        return total / jnp.sum(weights) if reduction == "mean" else total

    return output_loss


def draws(estimator_of_key, n, params, **kwargs):
    def one(key):
        estimator = estimator_of_key(key)
        diag, _ = estimator.update(None, estimator.init(params), params, **kwargs)
        return ravel_pytree(diag)[0]

    keys = jax.random.split(jax.random.PRNGKey(5), n)
    return np.asarray(jax.jit(jax.vmap(one))(keys))


def deviation(estimates, exact):
    """Largest error of the mean in standard errors, taken from the sample."""
    standard_error = estimates.std(axis=0) / np.sqrt(len(estimates))
    return np.max(np.abs(estimates.mean(axis=0) - exact) / standard_error)


def relative_error(estimates, exact):
    squared = np.mean(np.sum((estimates - exact) ** 2, axis=1))
    return np.sqrt(squared) / np.linalg.norm(exact)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighting", [None, "masked", "weighted"], ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_unbiased_for_the_diagonal_of_gauss_newton(case, weighting, reduction, x64):
    """4,000 samples against the exact diagonal: within 4 standard errors."""
    del x64
    loss, options, row_losses = LOSSES[case]
    params, predict = network()
    weights, _ = weights_for(weighting, row_losses(predict(params)))
    exact = exact_ggn_diag(objective(row_losses, weighting, reduction), predict, params)
    estimates = draws(
        lambda key: ah.gauss_newton(loss, reduction=reduction, seed=key, **options),
        4000,
        params,
        predict_fn=lambda p: predict(p) if weights is None else (predict(p), weights),
    )
    assert deviation(estimates, exact) < 4
    assert np.all(estimates >= 0)
    assert relative_error(estimates, exact) < 1.45


@pytest.mark.parametrize("method", ["hutchinson", "sampled-labels"])
@pytest.mark.parametrize("case", list(LOSSES)[:6])
def test_other_methods_have_the_same_mean(case, method, x64):
    del x64
    loss, options, row_losses = LOSSES[case]
    params, predict = network()
    weights = jnp.asarray(WEIGHTS["weighted"])
    exact = exact_ggn_diag(objective(row_losses, "weighted", "mean"), predict, params)
    estimates = draws(
        lambda key: ah.gauss_newton(loss, method=method, seed=key, **options),
        4000,
        params,
        predict_fn=lambda p: (predict(p), weights),
    )
    assert deviation(estimates, exact) < 4.5


def test_hutchinson_method_needs_no_factor(x64):
    """A loss that is not convex in the outputs."""
    del x64
    params, predict = network()
    exact = exact_ggn_diag(lambda f: jnp.mean(jnp.sin(f)), predict, params)
    estimator = {"method": "hutchinson", "event_ndim": 0}
    estimates = draws(
        lambda key: ah.gauss_newton(jnp.sin, seed=key, **estimator),
        4000,
        params,
        predict_fn=predict,
    )
    assert deviation(estimates, exact) < 4.5


def test_is_the_hessian_of_a_piecewise_linear_network(x64):
    del x64
    params, predict = network(activation=jax.nn.relu)
    output_loss = objective(integer_labels, None, "mean")
    exact = exact_ggn_diag(output_loss, predict, params)
    hessian = exact_diag(lambda p: output_loss(predict(p)), params)
    np.testing.assert_allclose(exact, ravel_pytree(hessian)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n_samples", [1, 4])
def test_samples_are_averaged(n_samples, x64):
    """The relative error falls with the square root of their number."""
    del x64
    params, predict = network()
    exact = exact_ggn_diag(objective(integer_labels, None, "mean"), predict, params)
    estimates = draws(
        lambda key: ah.gauss_newton(
            "softmax_cross_entropy", n_samples=n_samples, seed=key
        ),
        4000,
        params,
        predict_fn=predict,
    )
    assert deviation(estimates, exact) < 4
    assert relative_error(estimates, exact) < 1.45 / math.sqrt(n_samples)


def test_targets_reach_a_row_function(x64):
    del x64
    params, predict = network()
    scales = jnp.asarray(RNG.uniform(1, 3, size=(BATCH, TIME, CLASSES)))
    exact = exact_ggn_diag(lambda f: jnp.sum(scales * f**2), predict, params)
    estimates = draws(
        lambda key: ah.gauss_newton(
            lambda row, scale: jnp.sum(scale * row**2), reduction="sum", seed=key
        ),
        4000,
        params,
        predict_fn=predict,
        targets=scales,
    )
    assert deviation(estimates, exact) < 4


def test_linear_model_with_one_row_is_exact(x64):
    """One row and one output: u**2 = 1, so nothing is left to chance."""
    del x64
    x = jnp.array([1.0, -2.0, 3.0])
    w = jnp.zeros(3)
    estimator = ah.gauss_newton("l2_loss")
    diag, _ = estimator.update(
        None, estimator.init(w), w, predict_fn=lambda w: jnp.dot(x, w)[None]
    )
    np.testing.assert_allclose(diag, x**2, rtol=1e-14)


def test_all_rows_masked_gives_zero():
    params, predict = network()
    estimator = ah.gauss_newton("softmax_cross_entropy")
    diag, _ = estimator.update(
        None,
        estimator.init(params),
        params,
        predict_fn=lambda p: (predict(p), jnp.zeros(BATCH)),
    )
    assert not any(np.any(d) for d in jax.tree.leaves(diag))


def test_keeps_structure_and_dtypes():
    params = {
        "half": jnp.ones((3, 2), jnp.bfloat16),
        "n": jnp.asarray(2),
        "none": None,
        "empty": jnp.zeros((0,)),
    }

    def predict(p):
        return jnp.dot(jnp.ones((4, 3), jnp.bfloat16), p["half"])

    estimator = ah.gauss_newton("softmax_cross_entropy")
    diag, _ = estimator.update(None, estimator.init(params), params, predict_fn=predict)
    dtypes = jax.tree.map(lambda x: x.dtype, diag)
    assert dtypes == jax.tree.map(lambda x: x.dtype, params)
    assert np.any(np.asarray(diag["half"], np.float32) > 0)


def test_serves_sophia_and_adahessian():
    params, predict = network()
    estimator = ah.gauss_newton("softmax_cross_entropy")
    with jax.numpy_dtype_promotion("standard"):  # Sophia needs it
        for tx in (
            optax.contrib.sophia(1e-2, hessian_diagonal_fn=estimator),
            ah.adahessian(1e-2, hessian_ema="mean", estimator=estimator),
            ah.adahessian(1e-2, update_interval=2, estimator=estimator),
        ):
            state = tx.init(params)
            step = jax.jit(
                lambda s, tx=tx: tx.update(params, s, params, predict_fn=predict)
            )
            for _ in range(3):
                updates, state = step(state)
            assert all(np.all(np.isfinite(u)) for u in jax.tree.leaves(updates))


def test_devices_with_parts_of_a_batch_equal_one_device(x64):
    """Rows of unequal weight on each device; the mean is that of the whole batch."""
    del x64
    params, _ = network()
    x = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3, FEATURES)))
    weights = jnp.asarray([[1.0, 1, 0], [1, 0, 0], [0, 0, 0], [1, 2, 3]])

    def predict(p, x):
        return jnp.dot(jnp.tanh(jnp.dot(jnp.tanh(jnp.dot(x, p["w"])), p["v"])), p["u"])

    def mean_loss(f):
        curvature = jax.nn.logsumexp(f, axis=-1)
        return jnp.sum(weights.ravel() * curvature) / jnp.sum(weights)

    exact = exact_ggn_diag(mean_loss, lambda p: predict(p, x.reshape(12, -1)), params)

    def one(key):
        estimator = ah.gauss_newton(
            "softmax_cross_entropy", seed=key, axis_name="devices"
        )

        def device(x, w):
            diag, _ = estimator.update(
                None,
                estimator.init(params),
                params,
                predict_fn=lambda p: (predict(p, x), w),
            )
            return ravel_pytree(diag)[0]

        return jax.vmap(device, axis_name="devices")(x, weights)

    keys = jax.random.split(jax.random.PRNGKey(2), 4000)
    estimates = np.asarray(jax.jit(jax.vmap(one))(keys))
    np.testing.assert_array_equal(estimates[:, 0], estimates[:, 3])
    assert deviation(estimates[:, 0], exact) < 4


# The control variate H = G + R --------------------------------------------------


@pytest.mark.parametrize("case", ["softmax-integer", "softmax-smoothed", "poisson"])
@pytest.mark.parametrize("weighting", [None, "weighted"], ids=str)
def test_control_is_unbiased_for_the_hessian(case, weighting, x64):
    del x64
    loss, options, row_losses = LOSSES[case]
    params, predict = network()
    weights, _ = weights_for(weighting, row_losses(predict(params)))
    output_loss = objective(row_losses, weighting, "mean")
    exact = ravel_pytree(exact_diag(lambda p: output_loss(predict(p)), params))[0]
    control = ah.gauss_newton_control(loss, **options)
    estimates = draws(
        lambda key: ah.hutchinson(control_variate=control, seed=key),
        4000,
        params,
        predict_fn=lambda p: predict(p) if weights is None else (predict(p), weights),
        output_loss=output_loss,
    )
    assert deviation(estimates, exact) < 4


def test_control_on_a_linear_model_is_the_factor_alone(x64):
    """There R = 0: one row of one output leaves nothing to chance."""
    del x64
    x, w = jnp.array([1.0, -2.0, 3.0]), jnp.zeros(3)
    estimator = ah.hutchinson(control_variate=ah.gauss_newton_control("l2_loss"))
    diag, _ = estimator.update(
        None,
        estimator.init(w),
        w,
        predict_fn=lambda w: jnp.dot(x, w)[None],
        output_loss=lambda f: jnp.mean((f - 1) ** 2) / 2,
    )
    np.testing.assert_allclose(diag, x**2, rtol=1e-12)


# Cost, from the compiler --------------------------------------------------------


def compiled(function, *args):
    return jax.jit(function).lower(*args).compile()


def flops(function, *args):
    analysis = compiled(function, *args).cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]


MLP = [jnp.ones(s) / s[0] for s in [(784, 512), (512, 512), (512, 10)]]
IMAGES, DIGITS = jnp.ones((128, 784)), jnp.zeros(128, jnp.int32)


def mlp(params, x):
    for w in params[:-1]:
        x = jnp.tanh(jnp.dot(x, w))
    return jnp.dot(x, params[-1])


def cross_entropy(f, y):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(f, y))


def mlp_loss(params, x, y):
    return cross_entropy(mlp(params, x), y)


def mlp_loss_and_outputs(params, x, y):
    outputs = mlp(params, x)
    return cross_entropy(outputs, y), outputs


def test_costs_less_than_072_of_a_gradient():
    """MLP 784-512-512-10, batch 128: beyond the gradient that shares its forward."""
    estimator = ah.gauss_newton("softmax_cross_entropy")

    def both(params, state, x, y):
        grads = jax.grad(mlp_loss)(params, x, y)
        return grads, estimator.update(
            grads, state, params, predict_fn=lambda p: mlp(p, x)
        )

    gradient = flops(jax.grad(mlp_loss), MLP, IMAGES, DIGITS)
    total = flops(both, MLP, estimator.init(MLP), IMAGES, DIGITS)
    assert 0.5 * gradient < total - gradient <= 0.72 * gradient


def test_control_adds_a_factor_to_hutchinson_and_its_gradient():
    """The gradient is that of the pass for the product, by either path."""

    def cost(estimator, loss_fn, **functions):
        state = ah.adahessian(0.1, estimator=estimator).init(MLP)
        fused = ah.value_and_grad_with_curvature(loss_fn, estimator)
        return flops(
            lambda p, x, y: fused(p, x, y, state=state, **functions),
            MLP,
            IMAGES,
            DIGITS,
        )

    gauss_newton = ah.gauss_newton("softmax_cross_entropy")
    factor = cost(gauss_newton, mlp_loss_and_outputs) - flops(
        jax.grad(mlp_loss), MLP, IMAGES, DIGITS
    )
    expected = cost(ah.hutchinson(), mlp_loss) + factor
    control = ah.gauss_newton_control("softmax_cross_entropy")
    estimator = ah.hutchinson(control_variate=control)

    def output_loss(f):
        return cross_entropy(f, DIGITS)

    fused = cost(estimator, mlp_loss_and_outputs, output_loss=output_loss)
    np.testing.assert_allclose(fused, expected, rtol=0.01)

    def separate(params, state, x, y):
        value, grads = jax.value_and_grad(mlp_loss)(params, x, y)
        return (value, grads), estimator.update(
            grads,
            state,
            params,
            predict_fn=lambda p: mlp(p, x),
            output_loss=lambda f: cross_entropy(f, y),
        )

    found = flops(separate, MLP, estimator.init(MLP), IMAGES, DIGITS)
    np.testing.assert_allclose(found, expected, rtol=0.01)


def test_memory_of_a_large_vocabulary_is_one_more_array_of_logits():
    """Beside a gradient of the same model, from the compiler's own account."""
    rows, width, vocabulary = 256, 16, 8192
    params = {"head": jnp.ones((width, vocabulary)) / width}
    x, y = jnp.ones((rows, width)), jnp.zeros(rows, jnp.int32)
    estimator = ah.gauss_newton("softmax_cross_entropy")
    logits_bytes = rows * vocabulary * 4

    def loss_fn(params, x, y):
        f = jnp.dot(x, params["head"])
        picked = jnp.take_along_axis(f, y[:, None], axis=-1)
        return jnp.mean(jax.nn.logsumexp(f, axis=-1) - picked[:, 0])

    def estimate(params, state, x):
        return estimator.update(
            None, state, params, predict_fn=lambda p: jnp.dot(x, p["head"])
        )

    def temporaries(function, *args):
        return compiled(function, *args).memory_analysis().temp_size_in_bytes

    gradient = temporaries(jax.grad(loss_fn), params, x, y)
    ours = temporaries(estimate, params, estimator.init(params), x)
    assert ours <= gradient + 1.1 * logits_bytes


# Agreement with the user's loss -------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("weighting", [None, "masked", "weighted"], ids=str)
@pytest.mark.parametrize("case", LOSSES)
def test_check_output_loss_passes_what_agrees(case, weighting, reduction, x64):
    del x64
    loss, options, row_losses = LOSSES[case]
    params, predict = network()
    outputs = predict(params)
    weights, _ = weights_for(weighting, row_losses(outputs))
    output_loss = objective(row_losses, weighting, reduction)
    ah.check_output_loss(
        loss, output_loss, outputs, weights=weights, reduction=reduction, **options
    )
    with pytest.raises(ValueError, match=r"output_loss has 3 times the curvature"):
        ah.check_output_loss(
            loss,
            lambda f: 3 * output_loss(f),
            outputs,
            weights=weights,
            reduction=reduction,
            **options,
        )


def test_check_output_loss_finds_another_loss(x64):
    del x64
    outputs = network()[1](network()[0])
    with pytest.raises(ValueError, match="another curvature than loss='l2_loss'"):
        ah.check_output_loss("l2_loss", lambda f: jnp.mean(jnp.exp(f)), outputs)


def test_control_on_devices_with_parts_of_a_batch(x64):
    """Equal parts: the estimate is that of the whole batch's Hessian."""
    del x64
    params, _ = network()
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.normal(size=(4, 3, FEATURES)))
    y = jnp.asarray(rng.integers(0, CLASSES, size=(4, 3)))

    def predict(p, x):
        return jnp.dot(jnp.tanh(jnp.dot(jnp.tanh(jnp.dot(x, p["w"])), p["v"])), p["u"])

    def output_loss(f, y):
        picked = jnp.take_along_axis(f, y[:, None], axis=-1)[:, 0]
        return jnp.mean(jax.nn.logsumexp(f, axis=-1) - picked)

    def whole(p):
        return output_loss(predict(p, x.reshape(12, -1)), y.ravel())

    exact = ravel_pytree(exact_diag(whole, params))[0]
    control = ah.gauss_newton_control("softmax_cross_entropy")

    def one(key):
        estimator = ah.hutchinson(
            control_variate=control, seed=key, axis_name="devices"
        )

        def device(x, y):
            diag, _ = estimator.update(
                None,
                estimator.init(params),
                params,
                predict_fn=lambda p: predict(p, x),
                output_loss=lambda f: output_loss(f, y),
            )
            return ravel_pytree(diag)[0]

        return jax.vmap(device, axis_name="devices")(x, y)[0]

    keys = jax.random.split(jax.random.PRNGKey(2), 4000)
    assert deviation(np.asarray(jax.jit(jax.vmap(one))(keys)), exact) < 4
