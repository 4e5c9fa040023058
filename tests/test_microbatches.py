# SPDX-License-Identifier: Apache-2.0
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from tests.problems import cross_entropy

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(32, 6)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, size=32))
PARAMS = {
    "w": jnp.asarray(RNG.normal(size=(6, 8)) / 2, jnp.float32),
    "v": jnp.asarray(RNG.normal(size=(8, 3)) / 2, jnp.float32),
}


def predict(params, batch):
    return jnp.dot(jax.nn.relu(jnp.dot(batch[0], params["w"])), params["v"])


def loss_fn(params, batch):
    return cross_entropy(predict(params, batch), batch[1])


def part_hessians(k):
    flat, unravel = ravel_pytree(PARAMS)
    parts = [(X[i::k], Y[i::k]) for i in range(k)]
    return np.array(
        [jax.hessian(lambda w, p=p: loss_fn(unravel(w), p))(flat) for p in parts]
    )


def estimates(estimator, n, **kwargs):
    def one(key):
        state = estimator.init(PARAMS)._replace(key=key)
        diag, _ = estimator.update(None, state, PARAMS, batch=(X, Y), **kwargs)
        return ravel_pytree(diag)[0]

    keys = jax.random.split(jax.random.PRNGKey(0), n)
    return np.asarray(jax.jit(jax.vmap(one))(keys))


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("k", [1, 4])
def test_mean_and_variance_are_those_of_independent_probes(k, unroll):
    """Variance: the mean over parts of each one's closed form, divided by k."""
    h = part_hessians(k)
    samples = estimates(
        ah.microbatched(ah.hutchinson(), k, unroll=unroll), 20_000, obj_fn=loss_fn
    )
    variance = np.sum(h**2, axis=2) - np.diagonal(h, axis1=1, axis2=2) ** 2
    variance = variance.mean(axis=0) / k
    mean = np.diagonal(h.mean(axis=0))
    error = np.abs(samples.mean(axis=0) - mean)
    noisy = variance > 1e-12
    assert np.max(error[noisy] / np.sqrt(variance[noisy] / len(samples))) < 4.2
    np.testing.assert_allclose(samples.var(axis=0).sum(), variance.sum(), rtol=0.05)


def test_one_part_is_the_estimator_itself():
    estimator = ah.hutchinson()
    state = estimator.init(PARAMS)
    plain, plain_state = estimator.update(
        None, state, PARAMS, obj_fn=lambda p: loss_fn(p, (X, Y))
    )
    one = ah.microbatched(estimator, 1)
    diag, new = one.update(None, state, PARAMS, obj_fn=loss_fn, batch=(X, Y))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), diag, plain
    )
    np.testing.assert_array_equal(new.key, plain_state.key)


def test_gauss_newton_and_its_control():
    gauss_newton = ah.gauss_newton("softmax_cross_entropy")
    control = ah.gauss_newton_control("softmax_cross_entropy")
    h = np.diagonal(part_hessians(1)[0])  # ReLU: also the Gauss-Newton diagonal
    for estimator, kwargs in (
        (gauss_newton, {"predict_fn": predict}),
        (
            ah.hutchinson(control_variate=control),
            {
                "predict_fn": predict,
                "output_loss": lambda f, batch: cross_entropy(f, batch[1]),
            },
        ),
    ):
        samples = estimates(ah.microbatched(estimator, 4), 4000, **kwargs)
        error = np.abs(samples.mean(axis=0) - h)
        spread = samples.std(axis=0) / np.sqrt(len(samples))
        noisy = spread > 1e-9
        assert np.max(error[noisy] / spread[noisy]) < 4.2


def test_targets_are_cut_too():
    """One output of each row: u**2 = 1 and the targets are its curvature, exactly."""
    x, scale = jnp.arange(1.0, 5.0), jnp.arange(2.0, 6.0)
    estimator = ah.microbatched(
        ah.gauss_newton(lambda f, s: s * f**2 / 2, event_ndim=0), 4
    )
    w = jnp.asarray(1.0)
    diag, _ = estimator.update(
        None,
        estimator.init(w),
        w,
        batch=x,
        targets=scale,
        predict_fn=lambda w, x: w * x,
    )
    np.testing.assert_allclose(diag, jnp.mean(scale * x**2), rtol=1e-6)


def test_inside_the_optimizer():
    tx = ah.adahessian(0.1, estimator=ah.microbatched(ah.hutchinson(), 4))
    state = tx.init(PARAMS)
    grads = jax.grad(loss_fn)(PARAMS, (X, Y))
    step = jax.jit(lambda s, b: tx.update(grads, s, PARAMS, obj_fn=loss_fn, batch=b))
    _, state = step(state, (X, Y))
    alone = ah.microbatched(ah.hutchinson(), 4)
    diag, _ = alone.update(
        None, alone.init(PARAMS), PARAMS, obj_fn=loss_fn, batch=(X, Y)
    )
    jax.tree.map(
        lambda v, d: np.testing.assert_allclose(v, 0.001 * d**2, rtol=1e-3, atol=1e-9),
        state[0].nu,
        diag,
    )


# Fused with the accumulation of gradients.
SOFTMAX = "softmax_cross_entropy"
MIXED = {**PARAMS, "n": jnp.asarray(2)}
ESTIMATORS = {
    "hutchinson": ah.hutchinson(),
    "samples": ah.hutchinson(2),
    "low-rank": ah.hutchinson(control_variate=ah.low_rank_control(2)),
    "gauss-newton-control": ah.hutchinson(
        control_variate=ah.gauss_newton_control(SOFTMAX)
    ),
    "gauss-newton": ah.gauss_newton(SOFTMAX),
    "in-eigenbasis": ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), n_vectors=2),
    "optax": optax.contrib.hutchinson_estimator_diag_hessian(),
}


def loss_and_outputs(params, x, y):
    outputs = predict(params, (x, y))
    return cross_entropy(outputs, y), outputs


def fused(estimator, k=4, **options):
    needs_outputs = getattr(estimator, "needs_outputs", False)

    def loss(params, x, y):
        return loss_and_outputs(params, x, y)[0]

    return ah.value_and_grad_with_curvature(
        loss_and_outputs if needs_outputs else loss,
        estimator,
        microbatches=k,
        **options,
    )


def functions_of(part):
    """What any of the estimators may ask for."""
    return {
        "obj_fn": lambda p: loss_fn(p, part),
        "predict_fn": lambda p: predict(p, part),
        "output_loss": lambda outputs: cross_entropy(outputs, part[1]),
    }


def after_estimates(estimator, state, params, n=20):
    """Return the optimizer's state with that of an estimator that has seen curvature.

    Until then, a basis' vectors are known to the root of rounding only.
    """

    def estimate(_, estimator_state):
        functions = functions_of((X, Y))
        return estimator.update(None, estimator_state, params, **functions)[1]

    inner = jax.lax.fori_loop(0, n, estimate, state[0].estimator_state)
    return (state[0]._replace(estimator_state=inner), *state[1:])


@pytest.mark.parametrize("unroll", [False, True], ids=["loop", "unrolled"])
@pytest.mark.parametrize("name", ESTIMATORS)
def test_fused_with_accumulated_gradients(name, unroll):
    """Value and gradient of the whole batch, the mean of estimates part by part."""
    estimator = ESTIMATORS[name]
    params = PARAMS if name == "optax" else MIXED
    tx = ah.adahessian(0.1, estimator=estimator)
    state = after_estimates(estimator, tx.init(params), params)
    functions = {"output_loss": lambda outputs, x, y: cross_entropy(outputs, y)}
    value, grads, curvature = jax.jit(
        lambda p, s: fused(estimator, unroll=unroll)(p, X, Y, state=s, **functions)
    )(params, state)
    whole, expected = jax.value_and_grad(loss_fn, allow_int=True)(params, (X, Y))
    np.testing.assert_allclose(value, whole, rtol=1e-6)
    for key in PARAMS:
        np.testing.assert_allclose(grads[key], expected[key], rtol=1e-4, atol=1e-6)
    chex.assert_trees_all_equal_shapes_and_dtypes(grads, params)
    diags, estimator_state = [], state[0].estimator_state
    for part in [(X[i::4], Y[i::4]) for i in range(4)]:
        diag, estimator_state = estimator.update(
            None, estimator_state, params, **functions_of(part)
        )
        diags.append({k: d for k, d in diag.items() if k != "n"})
    diag = jax.tree.map(lambda *d: sum(d) / 4, *diags)
    close = partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-5)
    close({k: curvature.hessian_diag[k] for k in diag}, diag)
    close(curvature.estimator_state, estimator_state)
    updates, _ = tx.update(grads, state, params, curvature=curvature)
    chex.assert_tree_all_finite(updates)


@pytest.mark.parametrize("refresh", [None, True, False])  # after the first step
def test_gradients_are_accumulated_whether_or_not_there_is_an_estimate(refresh):
    estimator = ah.hutchinson()
    tx = ah.adahessian(0.1, estimator=estimator, update_interval=3)
    fun = jax.jit(
        lambda p, s, refresh: fused(estimator)(p, X, Y, state=s, refresh=refresh),
        static_argnums=2,
    )
    params, state = PARAMS, tx.init(PARAMS)
    for t in range(4):
        now = True if t == 0 and refresh is False else refresh
        value, grads, curvature = fun(params, state, now)
        whole, expected = jax.value_and_grad(loss_fn)(params, (X, Y))
        np.testing.assert_allclose(value, whole, rtol=1e-5)
        chex.assert_trees_all_close(grads, expected, rtol=1e-4, atol=1e-6)
        moved = np.any(curvature.estimator_state.key != state[0].estimator_state.key)
        assert moved == (t % 3 == 0 if now is None else now)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        params = optax.apply_updates(params, updates)


def test_auxiliary_values_are_put_behind_each_other():
    def with_aux(params, key, scale, x, y):
        loss = scale * loss_and_outputs(params, x, y)[0]
        return loss, {"mean": x.mean(), "noise": jax.random.normal(key)}

    estimator = ah.hutchinson()
    state = ah.adahessian(0.1, estimator=estimator).init(PARAMS)
    fun = ah.value_and_grad_with_curvature(
        with_aux, estimator, has_aux=True, microbatches=4
    )
    key, scale = jax.random.key(3), jnp.asarray(2.0)
    (value, aux), _, _ = fun(PARAMS, key, scale, X, Y, state=state)
    np.testing.assert_allclose(value, 2 * loss_fn(PARAMS, (X, Y)), rtol=1e-6)
    means = [X[i::4].mean() for i in range(4)]
    np.testing.assert_allclose(aux["mean"], means, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(aux["noise"], jnp.full(4, jax.random.normal(key)))


def test_targets_are_cut_with_the_batch():
    x, scale = jnp.arange(1.0, 5.0), jnp.arange(2.0, 6.0)
    estimator = ah.gauss_newton(lambda f, s: s * f**2 / 2, event_ndim=0)
    w = jnp.asarray(1.0)
    fun = ah.value_and_grad_with_curvature(
        lambda w, x, s: (jnp.mean(s * (w * x) ** 2) / 2, w * x),
        estimator,
        microbatches=2,
    )
    state = ah.adahessian(0.1, estimator=estimator).init(w)
    _, grads, _ = fun(w, x, scale, state=state, targets=scale)
    np.testing.assert_allclose(grads, jnp.mean(scale * x**2), rtol=1e-6)
    # With one row in a part there is no noise.
    one_each = ah.value_and_grad_with_curvature(
        lambda w, x, s: (jnp.mean(s * (w * x) ** 2) / 2, w * x),
        estimator,
        microbatches=4,
    )
    _, _, curvature = one_each(w, x, scale, state=state, targets=scale)
    np.testing.assert_allclose(
        curvature.hessian_diag, jnp.mean(scale * x**2), rtol=1e-6
    )


def test_half_precision_adds_up_in_single():
    """256 + 1 is 256 in bfloat16, whatever the number of ones."""
    w = jnp.ones(3, jnp.bfloat16)
    x = jnp.ones(128).at[0].set(256.0)
    estimator = ah.hutchinson()
    fun = ah.value_and_grad_with_curvature(
        lambda w, x: jnp.mean(x).astype(w.dtype) * jnp.sum(w),
        estimator,
        microbatches=128,
    )
    state = ah.adahessian(0.1, estimator=estimator).init(w)
    value, grads, _ = fun(w, x, state=state)
    assert value.dtype == grads.dtype == jnp.bfloat16
    np.testing.assert_allclose(grads.astype(np.float32), 383 / 128, rtol=2**-8)


def test_accumulation_costs_no_operations_and_saves_memory():
    """Of a network whose activations are larger than its parameters and its batch."""
    params = {"w": jnp.ones((6, 64)), "v": jnp.ones((64, 3))}
    x = jnp.ones((1024, 6))
    y = jnp.zeros(1024, int)
    estimator = ah.gauss_newton(SOFTMAX)
    state = ah.adahessian(0.1, estimator=estimator).init(params)

    def compiled(k, **options):
        fun = fused(estimator, k, **options)
        step = jax.jit(lambda p, x, y: fun(p, x, y, state=state))
        return step.lower(params, x, y).compile()

    whole, parts = compiled(1), compiled(8, unroll=True)
    # Not fewer: XLA counts the body of a loop once, and this is none.
    np.testing.assert_allclose(flops(parts), flops(whole), rtol=0.05)
    memory = [c.memory_analysis().temp_size_in_bytes for c in (compiled(8), whole)]
    assert memory[0] < memory[1] / 4


def flops(compiled):
    analysis = compiled.cost_analysis()
    return (analysis[0] if isinstance(analysis, list) else analysis)["flops"]
