# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from tests.problems import conv_net, dense_hessian, mlp, quadratic


def draws(n, params, loss, **options):
    """Draw n independent estimates, as an array of shape (n, number of parameters)."""

    def one(key):
        estimator = ah.hutchinson(seed=key, **options)
        state = estimator.init(params)
        diag, _ = estimator.update(None, state, params, obj_fn=loss)
        return ravel_pytree(diag)[0]

    keys = jax.random.split(jax.random.PRNGKey(11), n)
    return np.asarray(jax.jit(lambda keys: jax.lax.map(one, keys))(keys))


def variance(h, probe):
    """Closed form of the variance of one sample's entries."""
    off_diagonal = np.sum(h**2, axis=1) - np.diag(h) ** 2
    return off_diagonal + (2 * np.diag(h) ** 2 if probe == "normal" else 0)


@pytest.fixture(scope="module")
def mlp_case():
    jax.config.update("jax_enable_x64", True)
    params, loss = mlp()
    h = np.asarray(dense_hessian(loss, params))
    jax.config.update("jax_enable_x64", False)
    return params, loss, h


def largest_deviation(estimates, h, probe):
    """The largest error of the mean, in standard errors from the closed form."""
    standard_error = np.sqrt(variance(h, probe) / len(estimates))
    error = np.abs(estimates.mean(axis=0) - np.diag(h))
    return np.max(error / standard_error)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("n_samples", [1, 3])
def test_one_rademacher_probe_is_exact_for_a_diagonal_hessian(n_samples, jit, x64):
    del x64
    (params, loss), h = quadratic(diagonal=True)
    estimator = ah.hutchinson(n_samples, seed=5)

    def estimate(state, params):
        return estimator.update(None, state, params, obj_fn=loss)

    estimate = jax.jit(estimate) if jit else estimate
    state = estimator.init(params)
    for _ in range(3):
        diag, state = estimate(state, params)
        np.testing.assert_allclose(ravel_pytree(diag)[0], np.diag(h), rtol=1e-14)


@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_unbiased_on_a_network_with_leaves_of_equal_shape(probe, mlp_case, x64):
    del x64
    params, loss, h = mlp_case
    estimates = draws(4000, params, loss, probe=probe)
    assert largest_deviation(estimates, h, probe) < 4


def test_a_key_shared_by_all_leaves_would_be_found_out(mlp_case, x64):
    """The test above can fail: equal probes in leaves of equal shape are biased."""
    del x64
    params, loss, h = mlp_case

    def shared(key, tree):
        def signs(x):
            return jax.random.rademacher(key, x.shape, x.dtype)

        return jax.tree.map(signs, tree)

    estimates = draws(4000, params, loss, probe=shared)
    assert largest_deviation(estimates, h, "rademacher") > 20


@pytest.mark.parametrize("n_samples", [1, 4])
@pytest.mark.parametrize("probe", ["rademacher", "normal"])
def test_variance_is_its_closed_form(probe, n_samples, x64):
    """To 5%: the total over 8 entries has a relative standard error below 1%."""
    del x64
    (params, loss), h = quadratic()
    estimates = draws(40_000, params, loss, n_samples=n_samples, probe=probe)
    total = np.sum(np.mean((estimates - np.diag(h)) ** 2, axis=0))
    np.testing.assert_allclose(total, np.sum(variance(h, probe)) / n_samples, rtol=0.05)


def test_callable_probe(x64):
    del x64
    (params, loss), h = quadratic()
    estimator = ah.hutchinson(probe=lambda key, tree: jax.tree.map(jnp.ones_like, tree))
    diag, _ = estimator.update(None, estimator.init(params), params, obj_fn=loss)
    np.testing.assert_allclose(ravel_pytree(diag)[0], h.sum(axis=1), rtol=1e-12)


@pytest.mark.parametrize(
    "mode", ["forward-over-reverse", "reverse-over-reverse", "finite-difference"]
)
def test_mode_is_that_of_the_hvp(mode, x64):
    del x64
    params, loss = mlp()
    estimator = ah.hutchinson(mode=mode, seed=2)
    diag, _ = estimator.update(None, estimator.init(params), params, obj_fn=loss)
    reference = ah.hutchinson(seed=2)
    expected, _ = reference.update(None, reference.init(params), params, obj_fn=loss)
    tolerance = 1e-5 if mode == "finite-difference" else 1e-12
    diag, expected = (ravel_pytree(x)[0] for x in (diag, expected))
    assert jnp.linalg.norm(diag - expected) < tolerance * jnp.linalg.norm(expected)


@pytest.mark.parametrize(
    "seed",
    [7, jax.random.PRNGKey(7), jax.random.key(7)],
    ids=["int", "raw-key", "typed-key"],
)
def test_seed_decides_and_steps_differ(seed):
    (params, loss), _ = quadratic(jnp.float32)

    def run(seed):
        estimator = ah.hutchinson(seed=seed)
        state, diags = estimator.init(params), []
        for _ in range(3):
            diag, state = estimator.update(None, state, params, obj_fn=loss)
            diags.append(np.asarray(ravel_pytree(diag)[0]))
        return diags

    first, again, other = run(seed), run(seed), run(8)
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first[0], first[1])
    assert not np.array_equal(first[0], other[0])


def test_the_three_kinds_of_seed_agree():
    (params, loss), _ = quadratic(jnp.float32)

    def run(seed):
        estimator = ah.hutchinson(seed=seed)
        return estimator.update(None, estimator.init(params), params, obj_fn=loss)[0]

    by_int, by_raw, by_typed = map(run, [7, jax.random.PRNGKey(7), jax.random.key(7)])
    jax.tree.map(np.testing.assert_array_equal, by_int, by_raw)
    jax.tree.map(np.testing.assert_array_equal, by_int, by_typed)


def test_keeps_dtypes_and_fixes_integer_leaves():
    params = {
        "half": jnp.asarray([1.0, 2.0], jnp.bfloat16),
        "single": jnp.asarray(3.0, jnp.float32),
        "n": jnp.asarray(7),
        "none": None,
    }

    def loss(p):
        return jnp.sum(p["half"].astype(jnp.float32) ** 3) + p["single"] ** 2

    estimator = ah.hutchinson(n_samples=2)
    diag, _ = estimator.update(None, estimator.init(params), params, obj_fn=loss)
    dtypes = jax.tree.map(lambda x: x.dtype, diag)
    assert dtypes == jax.tree.map(lambda x: x.dtype, params)
    np.testing.assert_allclose(np.asarray(diag["half"], np.float32), [6, 12])
    assert (diag["single"], diag["n"]) == (2, 0)


def test_serves_sophia():
    (params, loss), h = quadratic(jnp.float32, diagonal=True)
    tx = optax.contrib.sophia(1e-2, b2=0.0, hessian_diagonal_fn=ah.hutchinson())
    state = tx.init(params)
    with jax.numpy_dtype_promotion("standard"):  # Sophia needs it
        _, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
    np.testing.assert_allclose(ravel_pytree(state[0].nu)[0], np.diag(h), rtol=1e-5)


def test_axis_name_draws_independent_probes_and_averages(x64):
    """Each member of the axis has its own batch; vmap stands in for devices."""
    del x64
    (params, loss), h = quadratic()
    n = 8
    scales = jnp.arange(1.0, n + 1)
    probes = []

    def noting(key, tree):
        z = ah.rademacher_like(key, tree)
        probes.append(z)
        return z

    estimator = ah.hutchinson(probe=noting, axis_name="devices")
    state = estimator.init(params)

    def member(scale):
        diag, new = estimator.update(
            None, state, params, obj_fn=lambda p: scale * loss(p)
        )
        return diag, new, probes.pop()

    diag, new, z = jax.vmap(member, axis_name="devices")(scales)
    z, diag = (np.concatenate([x["a"], x["b"]], axis=1) for x in (z, diag))
    assert len(np.unique(z, axis=0)) > n // 2
    expected = np.mean(scales[:, None] * z * (z @ h), axis=0)
    for replica in diag:
        np.testing.assert_allclose(replica, expected, rtol=1e-12)
    assert len(np.unique(new.key, axis=0)) == 1


@pytest.mark.parametrize(
    "control", [None, ah.low_rank_control(2)], ids=["plain", "low"]
)
def test_samples_in_a_loop_or_unrolled_are_the_same(control, x64):
    del x64
    params, loss = mlp()
    results = []
    for unroll in (True, False):
        estimator = ah.hutchinson(4, control_variate=control, unroll=unroll)
        state = estimator.init(params)
        step = jax.jit(lambda s, e=estimator: e.update(None, s, params, obj_fn=loss))
        results.append(step(step(state)[1]))
        jaxpr = str(jax.make_jaxpr(step)(state))
        assert (" scan[" in jaxpr) is not unroll
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-9), *results
    )


@pytest.mark.parametrize(
    ("network", "n_samples", "loop"),
    [(mlp, 8, False), (mlp, 9, True), (conv_net, 9, jax.default_backend() != "cpu")],
    ids=["few", "many", "many-convolutions"],
)
def test_rule_for_unrolling(network, n_samples, loop):
    params, loss = network(jnp.float32)
    estimator = ah.hutchinson(n_samples)
    jaxpr = jax.make_jaxpr(lambda s: estimator.update(None, s, params, obj_fn=loss))
    assert (" scan[" in str(jaxpr(estimator.init(params)))) is loop


# Control variates ---------------------------------------------------------------


def ema_of_constant_probes(unbiased, probe, steps, b2, x0, h):
    """Run the optimizer's EMA on a fixed quadratic and return it after each step."""
    params = {"w": x0}

    def loss(p):
        return jnp.sum(p["w"] * jnp.dot(h, p["w"])) / 2

    control = None if unbiased is None else ah.ema_control(unbiased=unbiased)
    tx = ah.scale_by_adahessian(
        b2=b2,
        hessian_ema="mean",
        estimator=ah.hutchinson(probe=probe, control_variate=control, seed=4),
    )
    state, values = tx.init(params), []
    update = jax.jit(lambda state: tx.update(params, state, params, obj_fn=loss)[1])
    for _ in range(steps):
        state = update(state)
        values.append(np.asarray(state.nu["w"]))
    return np.array(values)


def test_unbiased_control_changes_nothing_with_rademacher_probes(x64):
    del x64
    (params, _), h = quadratic()
    x0 = ravel_pytree(params)[0]
    plain, controlled = (
        ema_of_constant_probes(unbiased, "rademacher", 20, 0.9, x0, h)
        for unbiased in (None, True)
    )
    np.testing.assert_allclose(controlled, plain, rtol=1e-10, atol=1e-12)


def test_published_control_is_the_ema_of_squared_decay(x64):
    """With Rademacher probes: the plain EMA of decay b2**2 over 1 + b2, exactly."""
    del x64
    (params, _), h = quadratic()
    x0, b2 = ravel_pytree(params)[0], 0.9
    published = ema_of_constant_probes(False, "rademacher", 20, b2, x0, h)
    plain = ema_of_constant_probes(None, "rademacher", 20, b2**2, x0, h)
    np.testing.assert_allclose(published, plain / (1 + b2), rtol=1e-10, atol=1e-12)


def test_published_control_has_the_fixed_point_d_over_1_plus_b2(x64):
    del x64
    (params, _), h = quadratic(diagonal=True)
    x0, b2 = ravel_pytree(params)[0], 0.5
    published = ema_of_constant_probes(False, "rademacher", 60, b2, x0, h)
    np.testing.assert_allclose(published[-1], np.diag(h) / (1 + b2), rtol=1e-12)


@pytest.mark.parametrize("known", ["wrong", "exact"])
def test_unbiased_control_with_gaussian_probes(known, x64):
    """Unbiased whatever is known; variance sum_{j!=i} H_ij^2 + 2 (H_ii - c_i)^2."""
    del x64
    (params, loss), h = quadratic()
    n, decay, count = 40_000, 0.9, 3
    c = np.diag(h) if known == "exact" else np.diag(h) + 3.0
    debias = 1 - decay**count
    value = ravel_pytree(params)[1](jnp.asarray(c * debias))
    handed_on = ah.HessianEMA(value, decay, jnp.asarray(count, jnp.int32))
    control = ah.ema_control()

    def one(key):
        estimator = ah.hutchinson(probe="normal", control_variate=control, seed=key)
        return ravel_pytree(
            estimator.update(
                None,
                estimator.init(params),
                params,
                obj_fn=loss,
                hessian_ema=handed_on,
            )[0]
        )[0]

    keys = jax.random.split(jax.random.PRNGKey(1), n)
    estimates = np.asarray(jax.jit(jax.vmap(one))(keys))
    expected = np.sum(h**2, axis=1) - np.diag(h) ** 2 + 2 * (np.diag(h) - c) ** 2
    standard_error = np.sqrt(expected / n)
    assert np.all(np.abs(estimates.mean(axis=0) - np.diag(h)) < 4 * standard_error)
    total = np.sum(estimates.var(axis=0))
    np.testing.assert_allclose(total, np.sum(expected), rtol=0.05)


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_estimates_can_be_differentiated(mode):
    """As in meta-learning: the Hessian of sum w^4 / 12 is diag(w^2)."""
    estimator = ah.hutchinson(2)
    w = jnp.arange(6.0).reshape(2, 3)

    def trace(w):
        diag, _ = estimator.update(
            None, estimator.init(w), w, obj_fn=lambda w: jnp.sum(w**4) / 12
        )
        return jnp.sum(diag)

    if mode == "reverse":
        np.testing.assert_allclose(jax.grad(trace)(w), 2 * w, rtol=1e-5)
    else:
        tangent = jax.jvp(trace, (w,), (jnp.ones_like(w),))[1]
        np.testing.assert_allclose(tangent, jnp.sum(2 * w), rtol=1e-5)
