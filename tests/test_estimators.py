# SPDX-License-Identifier: Apache-2.0
"""Estimators: their exact means over all signs, their variances, keys and bases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from adahessian_jax import losses
from adahessian_jax._src import linearized, probes
from adahessian_jax._src.moving_average import CurvatureEMA
from adahessian_jax._src.orthogonal import (
    Reflectors,
    first_columns,
    multiply_along,
    orthogonal_from_columns,
    rotate_tree,
)
from adahessian_jax._src.probes import normal_like, rademacher_like
from adahessian_jax._src.turning import carried
from tests.problems import (
    all_signs,
    at_once,
    dense,
    dense_ggn,
    dense_hessian,
    mlp,
    opaque,
    quadratic,
)

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 3))
PARAMS = {"v": RNG.normal(size=(2, 2)), "w": RNG.normal(size=(3, 2))}
Y, SIGNS = np.array([0, 1]), all_signs(10)


def predict(p):
    return jnp.dot(jnp.tanh(jnp.dot(X, p["w"])), p["v"])


def ravelled(tree):
    return np.asarray(ravel_pytree(tree)[0], np.float64)


def probed_by(z):
    return lambda key, params: ravel_pytree(params)[1](z)


def over_all_signs(
    make, state=None, n_probes=1024, monkeypatch=None, n_outputs=0, **args
):
    """Return the estimates for all probes, and all signs of the outputs with each."""

    @jax.jit
    @functools.partial(jax.vmap, in_axes=(0, None))
    @functools.partial(jax.vmap, in_axes=(None, 0))
    def one(z, u):
        if monkeypatch is not None:
            signs = lambda key, outputs: u.reshape(outputs.shape)  # noqa: E731
            monkeypatch.setattr(linearized, "rademacher_like", signs)
        estimator = make(probed_by(z))
        start = estimator.init(PARAMS) if state is None else state
        return ravel_pytree(estimator.update(None, start, PARAMS, **args)[0])[0]

    estimates = one(SIGNS[:n_probes], all_signs(n_outputs))
    return np.asarray(estimates).reshape(-1, SIGNS.shape[1])


def objective(p):
    return losses.softmax_cross_entropy(predict(p), Y)


def scanned(estimator, params, length, **functions):
    """Return the state after some updates, and the estimate of each."""

    def step(state, _):
        diag, state = estimator.update(None, state, params, **functions)
        if hasattr(state, "bases"):  # which optimizers turn
            state = observed(estimator, diag, state)
        return state, diag

    run = jax.jit(lambda s: jax.lax.scan(step, s, length=length))
    return run(estimator.init(params))


def observed(estimator, grads, state):
    """Return the state after an update that turns axes, whatever the averages."""
    turned = rotate_tree(grads, state.bases)
    return estimator.update.observe(grads, turned, state, (grads, grads), 0)[1]


def variance_of(h):
    return np.sum(np.square(h), axis=1) - np.square(np.diag(h))


@pytest.mark.usefixtures("x64")
def test_hutchinson_has_the_exact_mean_and_variance():
    h = np.asarray(dense_hessian(objective, PARAMS))
    args = {"obj_fn": objective}
    got = over_all_signs(lambda probe: ah.hutchinson(probe=probe), **args)
    np.testing.assert_allclose(got.mean(axis=0), np.diag(h), atol=1e-12)
    np.testing.assert_allclose(got.var(axis=0), variance_of(h), atol=1e-12)
    for mode in ("reverse-over-reverse", "finite-difference"):
        one = over_all_signs(
            lambda probe, m=mode: ah.hutchinson(probe=probe, mode=m), n_probes=4, **args
        )
        np.testing.assert_allclose(one, got[:4], atol=1e-4 if mode[0] == "f" else 1e-12)


@pytest.mark.usefixtures("x64")
def test_low_rank_control_is_unbiased_and_has_the_rests_variance():
    h = np.asarray(dense_hessian(objective, PARAMS))
    control = ah.low_rank_control(3)
    estimator = ah.hutchinson(control_variate=control)
    state, before = scanned(estimator, PARAMS, 200, obj_fn=objective)
    args = {"obj_fn": objective, "state": state}
    got = over_all_signs(
        lambda p: ah.hutchinson(probe=p, control_variate=control), **args
    )
    np.testing.assert_allclose(got.mean(axis=0), np.diag(h), atol=1e-12)
    assert got.var(axis=0).sum() < 0.5 * variance_of(h).sum()
    q = np.hstack(
        [x.reshape(3, -1) for x in jax.tree.leaves(state.control_variate.basis)]
    )
    np.testing.assert_allclose(q @ q.T, np.eye(3), atol=1e-10)
    # Nor was it worse while it learned.
    flat = np.hstack([x.reshape(200, -1) for x in jax.tree.leaves(before)])
    errors = np.square(flat - np.diag(h)).sum(axis=1)
    assert errors.mean() < 0.8 * variance_of(h).sum()


@pytest.mark.usefixtures("x64")
def test_low_rank_control_of_one_direction_and_of_none():
    """Directions without products stay zero, and nothing is NaN."""
    v, params = jnp.arange(1.0, 6.0), {"w": jnp.ones(5)}
    estimator = ah.hutchinson(control_variate=ah.low_rank_control(3))
    state, diags = scanned(
        estimator, params, 100, obj_fn=lambda p: (p["w"] @ v) ** 2 / 2
    )
    assert np.count_nonzero(state.control_variate.lengths) == 1
    errors = np.sum(np.square(np.asarray(diags["w"]) - v**2), axis=1)
    variance = variance_of(np.outer(v, v)).sum()
    assert errors[60:].mean() < variance / 50 < errors[0]
    state, diags = scanned(estimator, params, 100, obj_fn=lambda p: jnp.sum(p["w"]))
    assert not np.any(diags["w"])
    assert not np.any(state.control_variate.basis["w"])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("unbiased", [True, False])
def test_ema_control(unbiased):
    """With signs it changes nothing; what was published leaves the mean out."""
    (params, loss), h = quadratic()
    z, b2 = RNG.normal(size=8), 0.9
    control = ah.ema_control(unbiased=unbiased)
    estimator = ah.hutchinson(probe=probed_by(z), control_variate=control)
    tx = ah.scale_by_adahessian(b2=b2, hessian_ema="mean", estimator=estimator)
    state, nu = tx.init(params), np.zeros(8)
    for t in range(3):
        _, state = tx.update(params, state, params, obj_fn=loss)
        c = nu / (1 - b2 ** max(t, 1)) if unbiased else b2 * nu
        d = z * (h @ z - c * z) + (c if unbiased else 0)
        nu = b2 * nu + (1 - b2) * d
        expected = nu / (1 - b2 ** (t + 1))
        np.testing.assert_allclose(ravelled(state.curvature.nu), expected, rtol=1e-12)


REAL = RNG.normal(size=(2, 2))
SUM = losses.squared_error.replace(reduction="sum")
ROW = losses.of_row(lambda f, y: jnp.sum(jnp.square(f - y)) ** 2)
CURVED = {
    "softmax": (losses.softmax_cross_entropy, Y),
    "sum": (SUM, REAL),
    "row": (ROW, REAL),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("weights", at_once([None, (0.5, 2.0)], [(0.5, 2.0)]))
@pytest.mark.parametrize("name", CURVED)
def test_gauss_newton_is_exact_over_all_signs(name, weights, monkeypatch):
    loss, labels = CURVED[name]
    where = None if weights is None else np.array(weights)
    of_outputs = functools.partial(loss, labels=labels, where=where)
    exact = np.diag(dense_ggn(lambda f: of_outputs(f), predict, PARAMS))
    args = {
        "predict_fn": lambda p: predict(p) if where is None else (predict(p), where),
        "labels": labels,
        "monkeypatch": monkeypatch,
        "n_outputs": 4,
    }
    got = over_all_signs(lambda probe: ah.gauss_newton(loss), n_probes=1, **args)
    assert len(np.unique(got, axis=0)) == 8  # g and -g are one estimate
    assert got.min() >= 0
    np.testing.assert_allclose(got.mean(axis=0), exact, rtol=1e-10)
    assert np.all(got.var(axis=0) <= 2 * exact**2 * (1 + 1e-9))
    control = ah.gauss_newton_control(loss)
    got = over_all_signs(
        lambda probe: ah.hutchinson(probe=probe, control_variate=control), **args
    )
    h = dense_hessian(lambda p: of_outputs(predict(p)), PARAMS)
    np.testing.assert_allclose(got.mean(axis=0), np.diag(h), atol=1e-10)


BOTH = pytest.mark.parametrize(
    "make",
    [ah.hutchinson, functools.partial(ah.gauss_newton, losses.softmax_cross_entropy)],
    ids=["hutchinson", "gauss_newton"],
)


@pytest.mark.usefixtures("x64")
@BOTH
def test_samples_are_the_mean_of_independent_ones(make):
    """By their variance, a quarter of that of one, and by their keys."""

    def one(key, n):
        estimator = make(n_samples=n, seed=key)
        args = {"obj_fn": objective, "predict_fn": predict}
        diag, new = estimator.update(None, estimator.init(PARAMS), PARAMS, **args)
        return ravel_pytree(diag)[0], new.key

    keys = jax.random.split(jax.random.key(0), 4000)
    variances, states = [], []
    for n in (1, 4):
        diags, new = jax.jit(jax.vmap(functools.partial(one, n=n)))(keys)
        variances.append(np.var(diags, axis=0).sum())
        states.append(jax.random.key_data(new))
    np.testing.assert_allclose(variances[0] / variances[1], 4, rtol=0.1)
    np.testing.assert_array_equal(*states)


@BOTH
def test_seeds_decide_and_steps_differ(make):
    params = jax.tree.map(jnp.float32, PARAMS)

    def run(seed):
        estimator = make(seed=seed)
        state, diags = estimator.init(params), []
        for _ in range(8):  # four signs, of which any two draws may agree
            args = {"obj_fn": objective, "predict_fn": predict}
            diag, state = estimator.update(None, state, params, **args)
            diags.append(ravelled(diag))
        return diags

    with jax.numpy_dtype_promotion("standard"):
        first, *others = map(run, (7, jax.random.PRNGKey(7), jax.random.key(7)))
        np.testing.assert_array_equal(others, [first, first])
        assert not np.allclose(first[:4], first[4:])
        assert not np.allclose(first, run(8))


@pytest.mark.parametrize("short", [probes._SHORT, 4])
def test_probes_of_any_tree_are_independent_with_unit_variance(short, monkeypatch):
    """Also between leaves of equal shape, and for sizes that are no multiple of 32."""
    monkeypatch.setattr(probes, "_SHORT", short)  # others share words
    monkeypatch.setattr(probes, "_LONG", 64)  # and those only 8 signs of one
    tree = {"a": jnp.zeros(35), "b": jnp.zeros((5, 7)), "c": jnp.zeros(())}
    tree |= {"column": jnp.zeros((40, 2)), "row": jnp.zeros((1, 35))}
    tree |= {"long": jnp.zeros((1, 64)), "rows": jnp.zeros((1, 32, 2))}
    tree |= {"half": jnp.zeros((2, 2), jnp.bfloat16), "n": jnp.ones(3, jnp.int32)}
    n = 4000
    for draw, excess in ((rademacher_like, 0), (normal_like, 2)):
        keys = jax.random.split(jax.random.key(7), n)
        z = jax.jit(jax.vmap(lambda key, draw=draw: draw(key, tree)))(keys)
        forms = jax.tree.map(lambda a: (a.shape[1:], a.dtype), z)
        assert forms == jax.tree.map(lambda a: (a.shape, a.dtype), tree)
        assert not z.pop("n").any()
        z = np.hstack([np.float64(x).reshape(n, -1) for x in jax.tree.leaves(z)])
        covariance = z.T @ z / n
        rest = covariance - np.diag(np.diag(covariance))
        assert max(np.abs(z.mean(axis=0)).max(), np.abs(rest).max()) < 5 / np.sqrt(n)
        assert np.abs(np.diag(covariance) - 1).max() <= 5 * np.sqrt(excess / n)
        assert (np.abs(z) == 1).all() == (excess == 0)


def test_keeps_dtypes_and_fixes_what_has_no_derivative():
    half = jnp.array([1.0, 2], jnp.bfloat16)
    params = {"half": half, "n": jnp.asarray(7), "none": None, "x": jnp.float32(3)}

    def loss(p):
        n = p["n"].astype(jnp.float32)
        return jnp.sum(p["half"].astype(jnp.float32) ** 3) + p["x"] ** 2 * n

    estimator = ah.hutchinson(2)
    for diag in (
        estimator.update(None, estimator.init(params), params, obj_fn=loss)[0],
        ah.hessian_diag(loss, params),
        ah.hvp(loss, params, jax.tree.map(jnp.ones_like, params)),
    ):
        dtypes = jax.tree.map(jnp.result_type, diag)
        assert dtypes == jax.tree.map(jnp.result_type, params)
        np.testing.assert_allclose(np.float32(diag["half"]), [6, 12])
        assert (diag["x"], diag["n"]) == (14, 0)
    fixed, zero = {"n": jnp.asarray(7)}, lambda p: jnp.zeros(())
    assert ah.hvp(zero, fixed, fixed) == ah.hessian_diag(zero, fixed) == {"n": 0}


def test_estimates_have_derivatives():
    """As for the gradient of what a step does: through what compilers need, too."""
    estimator, w = ah.hutchinson(2), jnp.arange(1.0, 7.0).reshape(2, 3)

    def sharpness(w):
        state = estimator.init(w)
        diag, _ = estimator.update(None, state, w, obj_fn=lambda w: jnp.sum(w**4))
        return jnp.sum(diag)

    np.testing.assert_allclose(jax.jit(jax.grad(sharpness))(w), 24 * w, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 300.0])
def test_half_precision_overflows_nowhere(scale):
    """Squares of a factor in float16 are of the range of a float32 average."""
    x, w = jnp.float16(scale) * jnp.ones((4, 1), jnp.float16), jnp.ones(1, jnp.float16)

    def predict(w):
        return (x @ w)[:, None]

    factor = ah.gauss_newton(losses.l2_loss)
    for estimator in (factor, ah.in_eigenbasis(factor)):
        tx = ah.scale_by_adahessian(
            eps=0.0, hessian_ema="mean", estimator=estimator, nu_dtype="float32"
        )
        state, step = (
            tx.init(w),
            jax.jit(functools.partial(tx.update, predict_fn=predict)),
        )
        for _ in range(200):
            _, state = step(w, state, w)
        # Squares of sums of 4 signs are 4 in the mean and 4.9 around it: over 200 of
        # them this is 5.8 of their mean's standard deviations.
        np.testing.assert_allclose(state.curvature.nu, scale**2, rtol=0.5)
        assert state.curvature.nonfinite == 0


# Products with the Hessian, and its diagonal ----------------------------------------


@pytest.mark.usefixtures("x64")
def test_operations_without_a_forward_rule():
    w, v = jnp.array([0.3, -1.0]), jnp.array([2.0, 1.0])
    x, back = jnp.asarray(RNG.normal(size=(5, 2))), {"mode": "reverse-over-reverse"}

    def loss(w, act=opaque):
        return losses.l2_loss(act(jnp.dot(x, w)), jnp.ones(5))

    h = jax.hessian(lambda w: loss(w, jnp.tanh))(w)
    np.testing.assert_allclose(ah.hvp(loss, w, v, **back), h @ v)
    np.testing.assert_allclose(ah.hessian_diag(loss, w, **back), np.diag(h))
    values = ah.largest_eigenvalues(loss, w, 2, rtol=1e-9, **back).values
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(h))
    for differentiate in (ah.hvp, ah.hessian_diag, ah.largest_eigenvalues):
        with pytest.raises(TypeError, match="custom_vjp") as caught:
            differentiate(loss, w, *[v][: differentiate is ah.hvp])
        assert any(back["mode"] in note for note in caught.value.__notes__)
    tx, g = ah.scale_by_quadratic_model(losses.l2_loss), jax.grad(loss)(w)
    update = functools.partial(tx.update, -g, tx.init(w), w, grad=g)
    steps = (
        update(predict_fn=lambda w, a=act: a(x @ w))[0] for act in (opaque, jnp.tanh)
    )
    np.testing.assert_allclose(*steps)
    compiled = jax.jit(lambda: update(predict_fn=lambda w: opaque(x @ w))[0])()
    np.testing.assert_allclose(
        compiled, update(predict_fn=lambda w: jnp.tanh(x @ w))[0]
    )
    of_row = losses.of_row(lambda f, y: jnp.sum(opaque(f - y) ** 2 + (f - y) ** 2))
    rows = jnp.asarray(RNG.normal(size=(3, 2))) / 9
    of_row.check(lambda f: of_row(f, 0 * rows), rows, 0 * rows)
    assert np.all(np.isfinite(of_row.factor(rows, jnp.ones_like(rows), 0 * rows)))


@pytest.mark.parametrize("dtype", ["float16", "float32"])
@pytest.mark.parametrize("length", [0.0, 1e-7, 1.0])
def test_finite_differences_of_vectors_of_any_length(dtype, length):
    w, v = jnp.array([1.0, 2.0], dtype), jnp.array([length, -length], dtype)
    got = ah.hvp(lambda w: jnp.sum(w**3), w, v, mode="finite-difference")
    # Of two gradients of at most 12, rounded by half a unit, at points that are rounded
    # likewise, which the Hessian of at most 12 takes along; over twice the step.
    eps = float(jnp.finfo(dtype).eps)
    step = eps ** (1 / 3) * (1 + 5**0.5) / 2**0.5
    error = 2 * (12 + 12 * 2) * eps / 2 / (2 * step) + 12 * eps
    np.testing.assert_allclose(got, 6 * w * v, rtol=0, atol=error * length)


@pytest.mark.usefixtures("x64")
def test_products_and_diagonal_are_those_of_the_dense_hessian():
    params, loss = mlp()
    h, v = dense_hessian(loss, params), normal_like(jax.random.key(1), params)
    expected = h @ ravelled(v)
    tolerances = {"forward-over-reverse": 1e-10, "reverse-over-reverse": 1e-10}
    tolerances |= {"finite-difference": 1e-5}

    @jax.jit
    def products(params, v):
        return [ah.hvp(loss, params, v, mode=mode) for mode in tolerances]

    for got, tolerance in zip(products(params, v), tolerances.values(), strict=True):
        error = np.linalg.norm(ravelled(got) - expected)
        assert error < tolerance * np.linalg.norm(expected)
    got = ravelled(ah.hessian_diag(loss, params, chunk_size=7))
    np.testing.assert_allclose(got, np.diag(h), atol=1e-14)


@jax.custom_vjp
def cubed(x):
    return x**3


cubed.defvjp(lambda x: (cubed(x), x), lambda x, g: (3 * x * x * g,))


def test_serves_sophia():
    (params, loss), h = quadratic(jnp.float32, diagonal=True)
    with jax.numpy_dtype_promotion("standard"):  # Sophia needs it
        tx = optax.contrib.sophia(1e-2, b2=0.0, hessian_diagonal_fn=ah.hutchinson())
        _, state = tx.update(params, tx.init(params), params, obj_fn=loss)
        np.testing.assert_allclose(ravelled(state[0].nu), np.diag(h), rtol=1e-5)


# Turned axes ------------------------------------------------------------------------


COLUMNS = {
    "random": RNG.normal(size=(7, 3)),
    "all": RNG.normal(size=(7, 7)),
    "axes": np.eye(7, 3),  # for which LAPACK reflects nothing, with tau = 0
    "turned about": -np.eye(7, 3),
    "dependent": np.ones((7, 2)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", COLUMNS)
def test_orthogonal_matrices_of_some_columns(name):
    columns, x = COLUMNS[name], RNG.normal(size=(2, 7, 3))
    q = orthogonal_from_columns(jnp.asarray(columns))
    k, matrix = columns.shape[1], dense(q)
    assert isinstance(q, Reflectors) == (k < 7)
    np.testing.assert_allclose(matrix.T @ matrix, np.eye(7), atol=1e-14)
    shown = np.arange(7) if k == 7 else q.pivots[0]
    known = 1 if name == "dependent" else k
    assert (shown < 7).sum() == known
    expected = np.column_stack([matrix, np.zeros(7)])[:, np.minimum(shown, 7)]
    np.testing.assert_allclose(first_columns(q), expected, atol=1e-14)
    if name != "dependent":
        overlap = np.abs(np.linalg.qr(columns)[0].T @ first_columns(q))
        np.testing.assert_allclose(overlap, np.eye(k), atol=1e-13)
    turned = multiply_along(q, jnp.asarray(x), 1, transpose=False)
    np.testing.assert_allclose(turned, np.einsum("ij,ajb->aib", matrix, x), atol=1e-13)
    back = multiply_along(q, turned, 1, transpose=True)
    np.testing.assert_allclose(back, x, atol=1e-13)


SOFTMAX = ah.gauss_newton(losses.softmax_cross_entropy)
FEW = {"max_dim": 1, "n_vectors": 2}  # so that the axis of three is a long one


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("options", [{}, FEW], ids=["complete", "few vectors"])
def test_estimates_in_any_bases_are_unbiased(options, monkeypatch):
    """The exact diagonal in the bases, which no partial traces have moved yet."""
    estimator = ah.in_eigenbasis(SOFTMAX, decay=0.0, **options)
    state, rng = estimator.init(PARAMS), np.random.default_rng(1)
    is_basis = lambda q: isinstance(q, Reflectors | jax.Array)  # noqa: E731

    def drawn(q):
        columns = rng.normal(size=first_columns(q).shape)
        return orthogonal_from_columns(jnp.asarray(columns))

    bases = jax.tree.map(drawn, state.bases, is_leaf=is_basis)
    state = state._replace(bases=bases)
    with monkeypatch.context() as patched:
        args = {"predict_fn": predict, "monkeypatch": patched, "n_outputs": 4}
        got = over_all_signs(lambda probe: estimator, state=state, n_probes=1, **args)
    _, after = estimator.update(None, state, PARAMS, predict_fn=predict)
    ggn = dense_ggn(lambda f: losses.softmax_cross_entropy(f, Y), predict, PARAMS)
    v, w = ([dense(q) for q in bases] for bases in after.bases)
    q = jax.scipy.linalg.block_diag(np.kron(*v), np.kron(*w))
    np.testing.assert_allclose(got.mean(axis=0), np.diag(q.T @ ggn @ q), atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_bases_turn_to_eigenvectors_of_partial_traces():
    ggn = dense_ggn(lambda f: losses.softmax_cross_entropy(f, Y), predict, PARAMS)
    estimator = ah.in_eigenbasis(SOFTMAX, axes_from="factors", decay=0.995)
    state, _ = scanned(estimator, PARAMS, 1500, predict_fn=predict)
    block = ggn[4:, 4:].reshape(3, 2, 3, 2)
    traces = np.einsum("ijkj->ik", block), np.einsum("ijil->jl", block)
    for q, got, trace in zip(state.bases[1], state.traces[1], traces, strict=True):
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
        np.testing.assert_allclose(got, trace, atol=0.1 * np.abs(trace).max())
        turned = np.asarray(q.T @ trace @ q)
        rest = turned - np.diag(np.diag(turned))
        assert np.abs(rest).max() < 0.1 * turned.max()
        assert np.all(np.diff(np.diag(turned)) < 0)  # the largest first

    def off_diagonal(matrix):
        return np.linalg.norm(matrix - np.diag(np.diag(matrix)))

    q = np.kron(*state.bases[1])
    assert off_diagonal(q.T @ ggn[4:, 4:] @ q) < 0.75 * off_diagonal(ggn[4:, 4:])


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("scale", "axes_from"), [(1.0, "factors"), (1e-6, "factors"), (1.0, "gradients")]
)
def test_few_vectors_are_the_leading_eigenvectors(scale, axes_from):
    """With the same factor every time this is orthogonal iteration, and converges.

    Also where the first entries never move, as pixels at the edge of an image.
    """
    left = np.linalg.qr(RNG.normal(size=(8, 5)))[0]
    factor = scale * np.vstack([np.zeros((4, 5)), left * 0.4 ** np.arange(5)])
    loss, w = losses.l2_loss.replace(reduction="sum"), jnp.zeros((12, 5))
    few = {"decay": 0.5, "max_dim": 5, "n_vectors": 3, "axes_from": axes_from}
    if axes_from == "factors":
        estimator = ah.in_eigenbasis(ah.gauss_newton(loss), **few)
        predict_fn = lambda w: jnp.sum(factor * w)[None]  # noqa: E731
        state, diags = scanned(estimator, w, 60, predict_fn=predict_fn)
        diag = diags[-1]
    else:
        estimator, g = ah.in_eigenbasis(ah.squared_gradient(), **few), jnp.array(factor)
        see = lambda _, state: observed(estimator, g, state)  # noqa: E731
        state = jax.lax.fori_loop(0, 60, see, estimator.init(w))
        diag, _ = estimator.update(g, state, w)
    long, short = state.bases[0]
    u, values, vt = np.linalg.svd(factor)
    right = first_columns(short)[:, :3]
    for got, expected in ((first_columns(long), u), (right, vt.T)):
        overlap = np.abs(expected[:, :3].T @ got)
        np.testing.assert_allclose(overlap, np.eye(3), atol=1e-6)
    shown = diag[long.pivots[0], np.arange(3)]
    np.testing.assert_allclose(shown, values[:3] ** 2, rtol=1e-6)
    unit = np.eye(12)[:4]  # where nothing moves axes stay as they are
    np.testing.assert_array_equal(dense(long)[:4], unit)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["soap", "newton", "newton(None)", "factors"])
def test_rows_that_never_have_a_gradient_stay(name, dtype):
    """As those of words that a text has not, also the first ones; others train."""
    words, labels = jnp.array([[9, 20, 9, 33]]).repeat(8, 0), jnp.arange(8) % 3
    rng = np.random.default_rng(0)
    params = {"table": rng.normal(size=(100, 6)), "out": rng.normal(size=(6, 3))}
    params = jax.tree.map(lambda x: jnp.asarray(x, dtype), params)
    loss = losses.softmax_cross_entropy
    tx = {
        "soap": ah.soap(0.01),
        "newton": ah.newton(0.03, loss),
        "newton(None)": ah.newton(None, loss),
        "factors": ah.adahessian(
            0.01,
            b2=0.9,
            hessian_ema="mean",
            clip_threshold=0.3,
            estimator=ah.in_eigenbasis(ah.gauss_newton(loss), axes_from="factors"),
        ),
    }[name]

    def predict_fn(p):
        rows = jnp.take(p["table"], words.at[:, 0].set(40 + labels), axis=0)
        return jnp.dot(jnp.tanh(rows.sum(axis=1)), p["out"])

    def loss_fn(p):
        return loss(predict_fn(p), labels)

    def step(_, carry):
        p, state = carry
        grads = jax.grad(loss_fn)(p)
        updates, state = tx.update(grads, state, p, predict_fn=predict_fn)
        return optax.apply_updates(p, updates), state

    after, _ = jax.lax.fori_loop(0, 30, step, (params, tx.init(params)))
    seen = np.isin(np.arange(100), [20, 9, 33, 40, 41, 42])
    moved = np.abs(after["table"] - params["table"]).max(axis=1)
    np.testing.assert_array_equal(moved[~seen], 0)
    assert moved[seen].min() > 1e-3
    assert loss_fn(after) < 0.9 * loss_fn(params)


@pytest.mark.parametrize(
    ("leaf", "options", "expected"),
    [
        (jnp.ones((9, 3)), {"max_dim": 8, "n_vectors": 2}, ((9, 2), (3, 3))),
        (jnp.ones((9, 3)), {"max_dim": 1, "n_vectors": 8}, ((9, 8), (3, 3))),
        (jnp.ones((9, 3)), {"max_dim": 8, "n_vectors": 0}, (None, (3, 3))),
        (jnp.ones((1, 3)), {}, (None, (3, 3))),
        (jnp.ones(8, jnp.bfloat16), {}, ((8, 8),)),
        (jnp.ones(3, jnp.int32), {}, ()),
        (jnp.ones(()), {}, ()),
        (jnp.ones((0, 100)), {}, ()),
    ],
)
def test_which_axes_have_a_basis(leaf, options, expected):
    bases = ah.in_eigenbasis(SOFTMAX, **options).init([leaf]).bases[0]
    shapes = tuple(None if q is None else first_columns(q).shape for q in bases)
    assert shapes == expected
    floats = [x for x in jax.tree.leaves(bases) if x.dtype != "int32"]  # pivots
    assert all(x.dtype == "float32" for x in floats)
    assert [isinstance(q, Reflectors) for q in bases] == [
        q is not None and q[0] == 9 for q in expected
    ]


@pytest.mark.parametrize("axes_from", ["factors", "gradients"])
def test_what_is_not_finite_does_not_stay_in_the_bases(axes_from):
    w = jnp.ones((3, 2))
    gauss_newton = ah.gauss_newton(losses.l2_loss)
    estimator = ah.in_eigenbasis(gauss_newton, axes_from=axes_from)

    @jax.jit
    def step(state, x):
        diag, state = estimator.update(None, state, w, predict_fn=lambda w: x @ w)
        state = observed(estimator, x.T @ (x @ w), state)
        return diag, state

    x = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    _, state = step(estimator.init(w), x)
    _, after = step(state, x.at[0, 0].set(jnp.inf))
    diag, _ = step(after, x)
    assert np.all(np.isfinite(diag))


ANY = {
    "hutchinson": ah.hutchinson(2),
    "reverse": ah.hutchinson(mode="reverse-over-reverse"),
    "low rank": ah.hutchinson(control_variate=ah.low_rank_control(2)),
    "ema": ah.hutchinson(control_variate=ah.ema_control()),
    "optax": optax.contrib.hutchinson_estimator_diag_hessian(),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ANY)
@jax.numpy_dtype_promotion("standard")  # for optax
def test_any_estimator_is_exact_where_the_bases_make_the_hessian_diagonal(name):
    """Whatever the signs, which see nothing but a diagonal there; not in other axes."""
    q = np.linalg.qr(RNG.normal(size=(5, 5)))[0]
    d = np.array([-1.0, 2, 3, 5, 40])
    hessian, w = jnp.asarray(q @ np.diag(d) @ q.T), jnp.asarray(RNG.normal(size=5))
    tx = ah.in_eigenbasis(ANY[name])
    state = tx.init(w)._replace(bases=((jnp.asarray(q),),))
    args = {"obj_fn": lambda w: w @ hessian @ w / 2}
    if name == "ema":
        args["curvature_ema"] = CurvatureEMA(jnp.ones(5), 0.9, jnp.asarray(3))
    got, after = tx.update(hessian @ w, state, w, **args)
    np.testing.assert_allclose(got, d, atol=1e-9)
    turned = observed(tx, hessian @ w, after)
    assert float(jnp.max(jnp.abs(turned.bases[0][0] - q))) > 1e-3


@pytest.mark.usefixtures("x64")
def test_several_samples_in_bases_are_the_mean_of_single_ones():
    """Gauss-Newton with two signs, by the turned function, and by its factors."""
    q = (
        np.linalg.qr(RNG.normal(size=(3, 3)))[0],
        np.linalg.qr(RNG.normal(size=(2, 2)))[0],
    )
    bases = (None,), tuple(map(jnp.asarray, q))
    w = {"b": jnp.zeros(1), "w": jnp.asarray(RNG.normal(size=(3, 2)))}
    x = jnp.asarray(RNG.normal(size=(4, 3)))
    args = {"predict_fn": lambda p: jnp.tanh(x @ p["w"]) + p["b"]}
    both = ah.in_eigenbasis(ah.gauss_newton(losses.l2_loss, n_samples=2))
    state = both.init(w)._replace(bases=bases)
    got, _ = both.update(w, state, w, **args)
    keys = jax.random.split(jax.random.split(state.estimator_state.key)[1], 2)
    outputs, pullback = jax.vjp(args["predict_fn"], w)
    expected = []
    for key in keys:
        signs = rademacher_like(key, outputs) / outputs.size**0.5
        (g,) = pullback(signs)
        expected.append(np.square(q[0].T @ g["w"] @ q[1]))
    np.testing.assert_allclose(got["w"], np.mean(expected, axis=0), rtol=1e-9)


ALIKE = {
    "matrices": ((9, 4), {}, 3),
    "vectors": ((7,), {}, 2),
    "layers": ((2, 9, 4), {"stacked": lambda path, leaf: leaf.ndim - 2}, 3),
    "short axes": ((3, 2), {}, 2),
    "scalars": ((), {}, 2),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("kind", ALIKE)
def test_parameters_that_are_alike_are_turned_as_each_alone(kind):
    """Whether names differ in numbers alone, of any dtypes, averaged or not."""
    shape, options, n = ALIKE[kind]
    rng = np.random.default_rng(0)
    start = [jnp.asarray(rng.normal(size=shape)) for _ in range(n)]
    start[-1] = start[-1].astype(jnp.float32)
    noise = rng.normal(size=(12, n, *shape))
    names = {"alike": [f"w{i}" for i in range(n)], "apart": list("abc"[:n])}

    def averaged(path, leaf):  # of the first alone
        first = path[0].key in ("w0", "a")
        return jnp.mean(leaf, axis=0, keepdims=True) if first else leaf

    got = {}
    for key, keys in names.items():
        axes = {"turn_interval": 3, "max_dim": 5, "n_vectors": 2} | options
        tx = ah.adahessian(
            0.1,
            hessian_power=0.5,
            hessian_ema="mean",
            estimator=ah.in_eigenbasis(ah.squared_gradient(), **axes),
            averaging=averaged if shape else None,
        )
        step = jax.jit(tx.update)
        params = dict(zip(keys, start, strict=True))
        state = tx.init(params)
        groups = state[0].curvature.estimator_state.bases
        assert len(groups) == len({k[0] for k in keys})
        for z in noise:
            grads = {
                k: jnp.asarray(g, p.dtype) + jnp.sin(3 * p)
                for (k, p), g in zip(params.items(), z, strict=True)
            }
            updates, state = step(grads, state, params)
            params = optax.apply_updates(params, updates)
        got[key] = list(params.values())
        assert [x.dtype for x in got[key]] == [x.dtype for x in start]
    for one, other in zip(got["alike"], got["apart"], strict=True):
        # Of those alone eigenvectors are found in float32, which magnifies rounding.
        atol = {"float64": 1e-9, "float32": 1e-2}[str(one.dtype)]
        np.testing.assert_allclose(one, other, atol=atol)


def test_more_layers_take_no_more_products():
    """They are turned as one stack, and so is what looks at a state."""

    def products(*names):
        params = {name: jnp.ones((70, 5)) for name in names}
        tx = ah.soap(0.1)
        state = tx.init(params)
        update = jax.jit(tx.update).lower(params, state, params)
        look = functools.partial(ah.diagnostics, updates=params)
        lowered = update, jax.jit(look).lower(state)
        return np.array([program.as_text().count("dot_general") for program in lowered])

    layers = products("w1", "w2", "w3", "w4", "w5")
    np.testing.assert_array_equal(layers, products("w1", "w2"))
    assert np.all(products("a", "b") > layers)


@pytest.mark.usefixtures("x64")
def test_leading_vectors_of_several_sizes_are_turned_together():
    """By one loop for all up to half as long, each as if it were alone."""
    shapes, rng = {"a": (70,), "b": (100, 3), "c": (140,)}, np.random.default_rng(0)
    grads = [
        {k: jnp.asarray(rng.normal(size=s)) for k, s in shapes.items()}
        for _ in range(5)
    ]
    tx, loops, ends = ah.soap(0.1, turn_interval=2), {}, {}
    for names in ("abc", "a", "b", "c"):
        params = {name: jnp.zeros(shapes[name]) for name in names}
        state, step = tx.init(params), jax.jit(tx.update)
        loops[names] = (
            step.lower(params, state, params).as_text().count("stablehlo.while")
        )
        for g in grads:
            updates, state = step({name: g[name] for name in names}, state, params)
        ends[names] = updates
    assert set(loops.values()) == {1}
    for name in shapes:
        np.testing.assert_allclose(ends["abc"][name], ends[name][name], atol=1e-12)


def test_what_is_not_alike_in_all():
    """Integers among floats are left alone, and layers must be stacks of one kind."""
    estimator = ah.in_eigenbasis(ah.squared_gradient())
    mixed = {"w1": jnp.ones(3), "w2": jnp.ones(3, int), "v1": jnp.ones(3)}
    assert list(map(bool, estimator.init(mixed).bases)) == [True, False]
    some = ah.in_eigenbasis(
        ah.squared_gradient(), stacked=lambda path, leaf: int(path[0].key == "w1")
    )
    with pytest.raises(ValueError, match="stacked must be alike for"):
        some.init({"w1": jnp.ones((2, 3)), "w2": jnp.ones((2, 3))})


@pytest.mark.slow
def test_bases_stay_orthogonal():
    """After 100,000 turns in single precision, with and without curvature."""
    estimator = ah.in_eigenbasis(ah.squared_gradient(), max_dim=5, n_vectors=3)
    w = {"w": jnp.ones((5, 9)), "b": jnp.ones(4)}

    def turn(i, state):
        noise = rademacher_like(jax.random.key(i), w)
        grads = jax.tree.map(lambda z: z * jnp.arange(1.0, 1 + z.shape[-1]) ** 4, noise)
        return observed(estimator, grads, state)

    state = jax.lax.fori_loop(0, 100_000, turn, estimator.init(w))
    for q in (*state.bases[0], *state.bases[1]):
        q = dense(q)
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-5)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("n_columns", [(2, 3), (9, 3), (2, 7)], ids=str)
def test_a_tensor_is_turned_along_all_axes(n_columns):
    """As by dense matrices, and back; layers of a stack each by their own."""
    columns = [
        RNG.normal(size=(2, n, k)) for n, k in zip((9, 7), n_columns, strict=True)
    ]
    bases = [jax.vmap(orthogonal_from_columns)(jnp.asarray(c)) for c in columns]
    x = RNG.normal(size=(2, 9, 7))
    of_layer = [[jax.tree.map(lambda a, i=i: a[i], q) for q in bases] for i in range(2)]
    for i, (q, p) in enumerate(of_layer):
        left, right = dense(q), dense(p)
        turned = rotate_tree([jnp.asarray(x[i])], ((q, p),))
        np.testing.assert_allclose(turned[0], left.T @ x[i] @ right, atol=1e-12)
        (back,) = rotate_tree(turned, ((q, p),), back=True)
        np.testing.assert_allclose(back, x[i], atol=1e-12)
    stacked = rotate_tree([jnp.asarray(x)], ((None, *bases),))[0]
    each = [rotate_tree([jnp.asarray(x[i])], (tuple(of_layer[i]),))[0] for i in (0, 1)]
    np.testing.assert_allclose(stacked, each, atol=1e-12)


@pytest.mark.usefixtures("x64")
def test_averages_go_along_when_axes_turn():
    """As the diagonal of the matrix that they are of, but for what was never seen."""
    old, new = (
        tuple(jnp.linalg.qr(RNG.normal(size=(n, n)))[0] for n in (3, 4))
        for _ in range(2)
    )
    v = jnp.asarray(RNG.uniform(size=(3, 4)))
    matrix = np.kron(*old) @ np.diag(v.ravel()) @ np.kron(*old).T
    expected = np.diag(np.kron(*new).T @ matrix @ np.kron(*new))
    np.testing.assert_allclose(carried(v, old, new).ravel(), expected, rtol=1e-12)
    never = jnp.full_like(v, jnp.finfo(v.dtype).max)
    np.testing.assert_array_equal(carried(never, old, new), never)
    part = carried(v.at[0, 0].set(jnp.finfo(v.dtype).max), old, new)
    known = part < 1e300
    assert known.sum() > 6
    assert np.all(part[known] <= v.max() * (1 + 1e-12))
