# SPDX-License-Identifier: Apache-2.0
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from tests.problems import cross_entropy, mlp, quadratic


def counting(diag):
    """An estimator that returns a constant and counts its calls in its state."""

    def update(updates, state, params=None, **extra_args):
        del updates, params, extra_args
        return diag, state + 1

    return optax.GradientTransformationExtraArgs(
        lambda params: jnp.zeros([], jnp.int32), update
    )


def run(tx, params, grads, steps, **kwargs):
    """Return the updates and states of some steps at fixed parameters."""
    update = jax.jit(lambda state: tx.update(grads, state, params, **kwargs))
    state, history = tx.init(params), []
    for _ in range(steps):
        updates, state = update(state)
        history.append((updates, state))
    return history


# The formula --------------------------------------------------------------------


@pytest.mark.parametrize("hessian_ema", ["rms", "mean"])
@pytest.mark.parametrize("power", [1.0, 0.5, 0.3])
@pytest.mark.parametrize("damping", [0.0, 0.25])
def test_first_two_steps_by_hand(hessian_ema, power, damping, x64):
    del x64
    b1, b2, eps = 0.8, 0.9, 1e-2
    g1, g2 = np.array([1.0, -2.0]), np.array([0.5, 3.0])
    d1, d2 = np.array([4.0, -1.0]), np.array([-2.0, 0.5])
    tx = ah.scale_by_adahessian(
        b1,
        b2,
        eps,
        hessian_power=power,
        hessian_ema=hessian_ema,
        relative_damping=damping,
    )
    params = jnp.zeros(2)
    state = tx.init(params)
    order = 2 if hessian_ema == "rms" else 1

    def expected(m, v, t):
        v = v / (1 - b2**t)
        h = np.sqrt(v) if hessian_ema == "rms" else np.abs(v)
        h = h + damping * h.mean()
        return m / (1 - b1**t) / (h**power + eps)

    m, v = (1 - b1) * g1, (1 - b2) * d1**order
    updates, state = tx.update(
        jnp.asarray(g1), state, params, hessian_diag=jnp.asarray(d1)
    )
    np.testing.assert_allclose(updates, expected(m, v, 1), rtol=1e-13)
    m, v = b1 * m + (1 - b1) * g2, b2 * v + (1 - b2) * d2**order
    updates, state = tx.update(
        jnp.asarray(g2), state, params, hessian_diag=jnp.asarray(d2)
    )
    np.testing.assert_allclose(updates, expected(m, v, 2), rtol=1e-13)
    np.testing.assert_allclose(state.mu, m, rtol=1e-13)
    np.testing.assert_allclose(state.nu, v, rtol=1e-13)
    assert state.count == 2


def test_is_adam_if_the_estimate_is_the_gradient(x64):
    del x64
    params, loss = mlp()
    tx, adam = ah.scale_by_adahessian(), optax.scale_by_adam()
    state, adam_state = tx.init(params), adam.init(params)
    for scale in (1.0, -0.5, 2.0):
        grads = jax.tree.map(lambda g, scale=scale: scale * g, jax.grad(loss)(params))
        updates, state = tx.update(grads, state, params, hessian_diag=grads)
        with jax.numpy_dtype_promotion("standard"):  # optax needs it
            expected, adam_state = adam.update(grads, adam_state, params)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8), updates, expected
        )


def test_newton_step_on_a_diagonal_quadratic(x64):
    """One step of learning rate 1 reaches the minimum, where H > 0."""
    del x64
    params = jnp.array([3.0, -5.0])
    curvature = jnp.array([2.0, 1000.0])

    def loss(w):
        return jnp.sum(curvature * (w - 1) ** 2) / 2

    tx = ah.scale_by_adahessian(eps=0.0)
    updates, _ = tx.update(jax.grad(loss)(params), tx.init(params), params, obj_fn=loss)
    np.testing.assert_allclose(params - updates, [1.0, 1.0], rtol=1e-12)


def test_estimator_is_hutchinson_unless_given(x64):
    del x64
    params, loss = mlp()
    grads = jax.grad(loss)(params)
    default = run(ah.scale_by_adahessian(), params, grads, 3, obj_fn=loss)
    named = run(
        ah.scale_by_adahessian(estimator=ah.hutchinson()), params, grads, 3, obj_fn=loss
    )
    chex.assert_trees_all_equal(default, named)
    other = run(
        ah.scale_by_adahessian(estimator=ah.hutchinson(seed=1)),
        params,
        grads,
        3,
        obj_fn=loss,
    )
    with pytest.raises(AssertionError):
        chex.assert_trees_all_equal(default, other)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
def test_takes_optax_hutchinson_as_estimator(jit):
    (params, loss), h = quadratic(jnp.float32, diagonal=True)
    estimator = optax.contrib.hutchinson_estimator_diag_hessian()
    tx = ah.scale_by_adahessian(b2=0.0, hessian_ema="mean", estimator=estimator)

    def step(params, state):
        return tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)

    _, state = (jax.jit(step) if jit else step)(params, tx.init(params))
    np.testing.assert_allclose(ravel_pytree(state.nu)[0], np.diag(h), rtol=1e-5)


# When the estimate is renewed ---------------------------------------------------


REFRESHES = [
    (1, 0, range(11)),
    (3, 0, [0, 3, 6, 9]),
    (5, 3, [0, 1, 2, 5, 10]),
    (4, 6, [0, 1, 2, 3, 4, 5, 8]),
    (100, 2, [0, 1]),
]


@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize(
    ("interval", "initial", "expected", "jit"),
    [(*case, True) for case in REFRESHES] + [(*REFRESHES[2], False)],
    ids=str,
)
def test_refreshes_at_these_counts_and_no_others(
    interval, initial, expected, jit, reuse
):
    """Counted where the objective is evaluated, and in the state."""
    evaluated, step_now = [], []

    def probe(key, tree):
        jax.debug.callback(lambda: evaluated.append(step_now[-1]))
        return ah.rademacher_like(key, tree)

    (params, loss), _ = quadratic(jnp.float32)
    tx = ah.scale_by_adahessian(
        update_interval=interval,
        initial_refreshes=initial,
        reuse_estimate=reuse,
        estimator=ah.hutchinson(probe=probe),
    )

    def update(state):
        return tx.update(params, state, params, obj_fn=loss)[1]

    update = jax.jit(update) if jit else update
    state = tx.init(params)
    for t in range(11):
        step_now.append(t)
        state = update(state)
        jax.effects_barrier()
        assert state.refreshes == len([s for s in expected if s <= t])
    assert evaluated == list(expected)
    assert state.count == 11


def test_reuse_feeds_the_last_estimate_to_the_average(x64):
    del x64
    params, b2 = jnp.zeros(2), 0.9
    tx = ah.scale_by_adahessian(b2=b2, update_interval=3)
    state, nu = tx.init(params), np.zeros(2)
    for t in range(7):
        estimate = jnp.array([1.0, 2.0]) * (t + 1)
        _, state = tx.update(params, state, params, hessian_diag=estimate)
        last = np.array([1.0, 2.0]) * (3 * (t // 3) + 1)
        nu = b2 * nu + (1 - b2) * last**2
        np.testing.assert_allclose(state.nu, nu, rtol=1e-13)
        np.testing.assert_allclose(state.hessian_diag, last)


def test_without_reuse_the_average_moves_and_is_corrected_by_refreshes(x64):
    del x64
    params, b2 = jnp.zeros(2), 0.9
    tx = ah.scale_by_adahessian(
        b1=0.0, b2=b2, eps=0.0, update_interval=3, reuse_estimate=False
    )
    state, nu, n = tx.init(params), np.zeros(2), 0
    assert state.hessian_diag is None
    for t in range(7):
        estimate = jnp.array([1.0, 2.0]) * (t + 1)
        updates, state = tx.update(jnp.ones(2), state, params, hessian_diag=estimate)
        if t % 3 == 0:
            n += 1
            nu = b2 * nu + (1 - b2) * np.asarray(estimate) ** 2
        np.testing.assert_allclose(state.nu, nu, rtol=1e-13)
        expected = 1 / np.sqrt(nu / (1 - b2**n))
        np.testing.assert_allclose(updates, expected, rtol=1e-12)


def test_interval_of_one_has_no_conditional():
    params, loss = mlp(jnp.float32)

    def has_cond(**options):
        tx = ah.scale_by_adahessian(**options)
        jaxpr = jax.make_jaxpr(lambda g, s, p: tx.update(g, s, p, obj_fn=loss))(
            params, tx.init(params), params
        )
        return " cond[" in str(jaxpr)

    assert not has_cond()
    assert not has_cond(initial_refreshes=10)
    assert has_cond(update_interval=2)


def test_interval_of_one_keeps_no_estimate():
    assert ah.scale_by_adahessian().init(jnp.zeros(3)).hessian_diag is None
    kept = ah.scale_by_adahessian(update_interval=2).init(jnp.zeros(3))
    assert kept.hessian_diag.shape == (3,)


def test_extra_arguments_reach_the_estimator():
    seen = {}

    def update(updates, state, params=None, **extra_args):
        del updates
        seen.update(extra_args)
        return params, state

    estimator = optax.GradientTransformationExtraArgs(lambda params: (), update)
    tx = ah.scale_by_adahessian(estimator=estimator, hessian_ema="mean", b2=0.7)
    params = jnp.ones(2)
    tx.update(params, tx.init(params), params, predict_fn=len, batch=3)
    assert (seen["predict_fn"], seen["batch"]) == (len, 3)
    assert seen["hessian_ema"].decay == 0.7
    assert seen["hessian_ema"].count == 0


# Dtypes and structure -----------------------------------------------------------

MIXED = {
    "half": jnp.asarray([1.0, 2.0], jnp.bfloat16),
    "single": [jnp.asarray(3.0, jnp.float32), None],
    "empty": jnp.zeros((0, 3)),
    "n": jnp.asarray([5, 6], jnp.int32),
    "flag": jnp.asarray(True),
}


def mixed_loss(p):
    half = p["half"].astype(jnp.float32)
    n = p["n"].sum().astype(jnp.float32)
    return jnp.sum(half**3) + p["single"][0] ** 2 * n


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("interval", [1, 2])
@pytest.mark.parametrize("reuse", [True, False], ids=["reuse", "no-reuse"])
@pytest.mark.parametrize("float0", [True, False], ids=["float0", "zeros"])
def test_structure_and_dtypes_are_stable(interval, reuse, jit, float0):
    tx = ah.scale_by_adahessian(
        update_interval=interval, reuse_estimate=reuse, relative_damping=0.1
    )

    def step(params, state):
        grads = jax.grad(mixed_loss, allow_int=True)(params)
        if not float0:
            grads = grads | {"n": params["n"], "flag": params["flag"]}
        updates, state = tx.update(grads, state, params, obj_fn=mixed_loss)
        return updates, optax.apply_updates(params, updates), state

    step = jax.jit(step) if jit else step
    params, state = MIXED, tx.init(MIXED)
    for _ in range(3):
        updates, new_params, new_state = step(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_params, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new_state, state)
        chex.assert_trees_all_equal(new_params["n"], MIXED["n"])
        chex.assert_tree_all_finite(new_params)
        params, state = new_params, new_state
    assert not np.array_equal(
        np.asarray(params["half"], np.float32), np.asarray(MIXED["half"], np.float32)
    )


@pytest.mark.parametrize("interval", [1, 2])
def test_mu_and_nu_dtypes(interval):
    tx = ah.scale_by_adahessian(
        update_interval=interval, mu_dtype=jnp.bfloat16, nu_dtype=jnp.float32
    )
    params = {"w": jnp.ones(3, jnp.float16), "n": jnp.asarray(1)}
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(params, state, params, hessian_diag=params)
        assert updates["w"].dtype == jnp.float16
        assert state.mu["w"].dtype == jnp.bfloat16
        assert state.nu["w"].dtype == jnp.float32
        assert (interval == 1) or state.hessian_diag["w"].dtype == jnp.float32


def test_update_is_computed_before_mu_is_rounded():
    tx = ah.scale_by_adahessian(eps=0.0, mu_dtype=jnp.bfloat16)
    w = jnp.ones(2)
    updates, state = tx.update(w / 3, tx.init(w), w, hessian_diag=w)
    np.testing.assert_allclose(updates, 1 / 3, rtol=2e-5)
    assert np.abs(np.asarray(state.mu, np.float32) * 10 * 3 - 1).max() > 1e-4


def test_half_precision_is_accumulated_in_float32():
    """With f32 averages, bfloat16 gradients and curvatures lose nothing on the way."""
    tx = ah.scale_by_adahessian(mu_dtype=jnp.float32, nu_dtype=jnp.float32)
    w = jnp.ones(2, jnp.bfloat16)
    history = run(tx, w, w, 1000, hessian_diag=w)
    np.testing.assert_allclose(history[-1][1].nu, 1 - 0.999**1000, rtol=1e-4)


def test_state_maps_over_parameters():
    params, _ = mlp(jnp.float32)
    tx = ah.scale_by_adahessian(update_interval=2, averaging=ah.block_average(0, 2))
    state = optax.tree_utils.tree_map_params(tx, lambda x: x + 1, tx.init(params))
    chex.assert_trees_all_equal(state.mu, jax.tree.map(jnp.ones_like, params))
    assert state.count == 0


# Cost ---------------------------------------------------------------------------


def test_flops_of_a_step_beside_adam():
    """MLP 784-512-512-10, batch 128: at most 2.55 times the step of optax.adam."""
    sizes = [(784, 512), (512, 512), (512, 10)]
    params = [{"w": jnp.ones(s) / s[0], "b": jnp.zeros(s[1])} for s in sizes]
    x, y = jnp.ones((128, 784)), jnp.zeros(128, jnp.int32)

    def loss_fn(params, x, y):
        for layer in params[:-1]:
            x = jax.nn.relu(jnp.dot(x, layer["w"]) + layer["b"])
        return cross_entropy(jnp.dot(x, params[-1]["w"]) + params[-1]["b"], y)

    def flops(tx, *, second_order):
        def step(params, state, x, y):
            grads = jax.grad(loss_fn)(params, x, y)
            kwargs = {"obj_fn": lambda p: loss_fn(p, x, y)} if second_order else {}
            updates, state = tx.update(grads, state, params, **kwargs)
            return optax.apply_updates(params, updates), state

        lowered = jax.jit(step).lower(params, tx.init(params), x, y)
        analysis = lowered.compile().cost_analysis()
        analysis = analysis[0] if isinstance(analysis, list) else analysis
        return analysis["flops"]

    with jax.numpy_dtype_promotion("standard"):  # optax.adam needs it
        adam = flops(optax.adam(1e-3), second_order=False)
        ours = flops(ah.adahessian(1e-3), second_order=True)
    assert ours <= 2.55 * adam
    assert ours >= 2.0 * adam  # the Hessian-vector product is there
