# SPDX-License-Identifier: Apache-2.0
"""Value, gradient and estimate of one pass: parts, refreshes, and what it refuses.

By every estimator, wrapper and loss it is held against formulas in
test_between_features.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from adahessian_jax import losses
from adahessian_jax._src.probes import rademacher_like
from tests.problems import at_once

pytestmark = pytest.mark.usefixtures("standard_promotion")

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(12, 3)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, size=12))
PARAMS = {
    "v": jnp.asarray(RNG.normal(size=(2, 3)), jnp.float32),
    "w": jnp.asarray(RNG.normal(size=(3, 2)), jnp.float32),
}
SOFTMAX = losses.softmax_cross_entropy
# Of each of four parts, which get every fourth row, another sum.
WHERE = jnp.asarray([1.0, 0, 2, 0.5, 1, 0, 0, 0, 3, 0, 1, 1])


def predict(p, x=X):
    return jnp.dot(jnp.tanh(jnp.dot(x, p["w"])), p["v"])


def loss_fn(p, x, y):
    return SOFTMAX(predict(p, x), y)


def loss_and_outputs(p, x, y):
    return loss_fn(p, x, y), predict(p, x)


def close(got, expected, rtol=1e-4, atol=1e-5):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def linear(p, x):
    return jnp.dot(x, p["w"])


@pytest.mark.parametrize("unroll", at_once([False, True], [False]))
@pytest.mark.parametrize(
    "kind",
    ["mean", "sum", "masked", "masked by call", "masked hutchinson", "sum hutchinson"],
)
def test_parts_of_a_batch_make_up_the_whole(kind, unroll):
    """The estimates are exact here: of one row with one output, or of a diagonal H."""
    reduction = "sum" if "sum" in kind else "mean"
    loss = losses.squared_error.replace(reduction=reduction)
    w, y = {"w": jnp.asarray([1.0, 2.0, -1.0])}, jnp.ones(12)
    x = jnp.diag(jnp.arange(1.0, 4))[np.arange(12) % 3]
    where = WHERE if "masked" in kind else None
    by_call = "hutchinson" in kind or "call" in kind
    estimator = ah.hutchinson() if "hutchinson" in kind else ah.gauss_newton(loss)
    tx = ah.scale_by_adahessian(b2=0.0, hessian_ema="mean", estimator=estimator)

    def function(p, x, y, where=None):
        value = loss(linear(p, x), y, where=where)
        if "hutchinson" in kind:
            return value, jnp.sum(x)
        whole = where is None or by_call
        outputs = linear(p, x) if whole else (linear(p, x), where)
        return (value, outputs), jnp.sum(x)

    options = {"reduction": reduction} if "hutchinson" in kind else {}
    options |= {"has_aux": True, "microbatches": 12, "unroll": unroll}
    fused = ah.value_and_grad_with_curvature(function, tx, **options)
    batch = (x, y) if where is None else (x, y, where)
    given = {"where": where} if by_call else {}

    @functools.partial(jax.jit, static_argnums=1)
    def run(state, refresh=None):
        return fused(w, *batch, state=state, refresh=refresh, **given)

    (value, aux), grads, curvature = run(tx.init(w))
    assert aux.shape == (12,)
    np.testing.assert_allclose(aux, x.sum(1))
    expected = jax.value_and_grad(lambda p: loss(linear(p, x), y, where=where))(w)
    close((value, grads), expected)
    weights = np.ones(12) if where is None else np.asarray(where)
    total = 1 if reduction == "sum" else weights.sum()
    diag = 2 * weights @ np.square(x) / total
    np.testing.assert_allclose(curvature.estimate["w"], diag, rtol=1e-5)
    kept, _, _ = run(tx.init(w), False)
    np.testing.assert_allclose(kept[0], value, rtol=1e-6)


def test_each_part_has_its_rows_its_scalars_and_its_probes():
    seen = []

    def function(p, scale, x):
        jax.debug.callback(lambda s, x: seen.append((float(s), x.tolist())), scale, x)
        return scale * jnp.sum(x) * jnp.sum(p) ** 2

    tx = ah.scale_by_adahessian(b2=0.0, hessian_ema="mean")
    fused = ah.value_and_grad_with_curvature(function, tx, microbatches=3)
    w = jnp.ones(4)
    run = jax.jit(lambda s: fused(w, 2.0, jnp.arange(6.0), state=s))
    _, _, curvature = run(tx.init(w))
    jax.effects_barrier()
    assert [x for s, x in seen if s == 2] == [[0, 3], [1, 4], [2, 5]]
    # H is 4 sum(x) ones, and z * Hz of one part a multiple of z.
    key, expected = jax.random.PRNGKey(0), 0
    for total in (3, 5, 7):
        key, subkey = jax.random.split(key)
        z = rademacher_like(jax.random.split(subkey, 1)[0], w)
        expected += 4 * total * z * jnp.sum(z) / 3
    np.testing.assert_allclose(curvature.estimate, expected, rtol=1e-5)


# When it estimates, and where it finds by what --------------------------------------


def test_of_as_many_keys_as_parts_each_gets_one():
    tx, x = ah.adahessian(0.1), jnp.ones((4, 3))

    def loss(w, x, key):
        kept = jax.random.bernoulli(key, 0.5, w.shape)
        return jnp.mean(jnp.dot(x, jnp.where(kept, w, 0)) ** 2)

    w, keys = jnp.arange(1.0, 4.0), jax.random.split(jax.random.key(0), 2)
    fused = ah.value_and_grad_with_curvature(loss, tx, microbatches=2)
    value, grads, _ = fused(w, x, keys, state=tx.init(w))
    expected = [jax.value_and_grad(loss)(w, x[:2], key) for key in keys]
    close((value, grads), jax.tree.map(lambda a, b: (a + b) / 2, *expected))


def test_there_is_a_condition_only_where_the_state_decides():
    tx = ah.scale_by_adahessian(update_interval=3, estimator=ah.gauss_newton(SOFTMAX))
    fused = ah.value_and_grad_with_curvature(loss_and_outputs, tx)
    for refresh in (None, True, False):
        jaxpr = jax.make_jaxpr(
            lambda s, r=refresh: fused(PARAMS, X, Y, state=s, refresh=r)
        )(tx.init(PARAMS))
        assert (" cond[" in str(jaxpr)) == (refresh is None)


def sgd_beside(tx):
    labels = {"v": "sgd", "w": "curved"}
    return optax.partition({"curved": tx, "sgd": optax.sgd(0.1)}, labels)


WRAPPERS = {  # beside those of test_between_features.py
    "masked": lambda tx: optax.masked(
        tx, {"v": False, "w": True}, mask_compatible_extra_args=True
    ),
    "groups": lambda tx: optax.partition({"a": tx, "b": tx}, {"v": "a", "w": "b"}),
    "nested": lambda tx: sgd_beside(optax.apply_if_finite(optax.chain(tx), 2)),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_finds_the_estimator(name):
    """By its estimate: that of the seed, in the entries that it is for."""
    estimator = ah.gauss_newton(SOFTMAX, seed=3)
    tx = WRAPPERS[name](ah.scale_by_adahessian(estimator=estimator))
    state, start = tx.init(PARAMS), estimator.init(PARAMS)
    fused = ah.value_and_grad_with_curvature(loss_and_outputs, tx)
    _, grads, curvature = fused(PARAMS, X, Y, state=state)
    close(grads, jax.grad(loss_fn)(PARAMS, X, Y))
    expected, _ = estimator.update(None, start, PARAMS, predict_fn=predict)
    close(curvature.estimate["w"], expected["w"])
    masked = optax.MaskedNode()
    close(curvature.estimate["v"], expected["v"] if name == "groups" else masked)
    updates, _ = tx.update(grads, state, PARAMS, curvature=curvature)
    assert np.all(np.isfinite(updates["w"]))


def test_what_the_loss_has_beside_that_of_the_outputs_is_in_the_controlled_estimate():
    """One row of one output, so that nothing is left to chance."""
    x, w = jnp.array([1.0, -2.0, 3.0]), jnp.array([1.0, 0.5, 2.0])
    estimator = ah.hutchinson(control_variate=ah.gauss_newton_control(losses.l2_loss))

    def function(w, y):
        outputs = jnp.dot(x, w)[None]
        return losses.l2_loss(outputs, y) + 0.25 * jnp.sum(w**2), outputs

    state = ah.adahessian(0.1, estimator=estimator).init(w)
    fused = ah.value_and_grad_with_curvature(function, estimator)
    value, grads, curvature = fused(w, jnp.ones(1), state=state, labels=jnp.ones(1))
    np.testing.assert_allclose(value, 5**2 / 2 + 0.25 * 5.25, rtol=1e-6)
    np.testing.assert_allclose(grads, 5 * x + 0.5 * w, rtol=1e-6)
    np.testing.assert_allclose(curvature.estimate, x**2 + 0.5, rtol=1e-6)


@pytest.mark.parametrize("kind", ["hutchinson", "gauss_newton"])
def test_auxiliary_values_are_of_any_type(kind):
    """Strings among them, over an axis too."""
    factor = ah.gauss_newton(SOFTMAX, axis_name="d")
    estimator = factor if kind == "gauss_newton" else ah.hutchinson(axis_name="d")
    tx = ah.adahessian(0.1, estimator=estimator)
    function = loss_fn if kind == "hutchinson" else loss_and_outputs
    fused = ah.value_and_grad_with_curvature(
        lambda *args: (function(*args), {"name": "x"}), tx, has_aux=True
    )

    def one(x, y):
        (value, aux), _, _ = fused(PARAMS, x, y, state=tx.init(PARAMS))
        assert aux == {"name": "x"}
        return value

    values = jax.vmap(one, axis_name="d")(
        X.reshape(2, -1, X.shape[1]), Y.reshape(2, -1)
    )
    close(values.mean(), loss_fn(PARAMS, X, Y))


def test_groups_share_estimators_of_equal_typed_keys():
    groups = {
        k: ah.adahessian(0.1, estimator=ah.hutchinson(seed=jax.random.key(3)))
        for k in PARAMS
    }
    tx = optax.partition(groups, {k: k for k in PARAMS})
    fused = ah.value_and_grad_with_curvature(loss_fn, tx)
    _, _, curvature = fused(PARAMS, X, Y, state=tx.init(PARAMS))
    assert jax.tree.structure(curvature.estimate) == jax.tree.structure(PARAMS)


def test_groups_share_an_estimator_whose_seed_is_traced():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}

    def loss(p):
        return jnp.sum(p["a"] ** 4) + jnp.sum(p["b"] ** 4)

    def step(key):
        estimator = ah.hutchinson(seed=key)
        groups = {k: ah.adahessian(0.3, estimator=estimator) for k in params}
        tx = optax.partition(groups, {k: k for k in params})
        state = tx.init(params)
        value_and_grad = ah.value_and_grad_with_curvature(loss, tx)
        _, grads, curvature = value_and_grad(params, state=state)
        return tx.update(grads, state, params, curvature=curvature)[0]

    updates = jax.vmap(step)(jax.random.split(jax.random.key(0), 2))
    for u in jax.tree.leaves(updates):  # -0.3 * 4 / 12
        np.testing.assert_allclose(u, -0.1, rtol=1e-5)
