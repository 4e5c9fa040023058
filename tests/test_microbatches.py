# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
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
    parts = [(x, y) for x, y in zip(X.reshape(k, -1, 6), Y.reshape(k, -1), strict=True)]
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
