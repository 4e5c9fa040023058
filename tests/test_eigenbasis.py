# SPDX-License-Identifier: Apache-2.0
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import adahessian_jax as ah
from adahessian_jax.orthogonal import (
    Reflectors,
    first_columns,
    orthogonal_from_columns,
)
from tests.problems import cross_entropy, dense

RNG = np.random.default_rng(0)
# Of NumPy, so that they are double in the tests.
X = RNG.normal(size=(16, 4)) * np.array([3.0, 1.0, 1.0, 0.3])
Y = RNG.integers(0, 3, size=16)
PARAMS = {
    "w": RNG.normal(size=(4, 2, 3)) / 2,
    "b": RNG.normal(size=3) / 2,
    "scale": np.asarray(1.5),
}
SOFTMAX = "softmax_cross_entropy"


@pytest.fixture(autouse=True)
def double(x64):
    del x64


def predict(params, x=X):
    x = jnp.asarray(x, params["w"].dtype)
    both = jnp.tanh(jnp.einsum("bi,iko->bko", x, params["w"]))
    return params["scale"] * jnp.sum(both, axis=1) + params["b"]


def loss_fn(params):
    return cross_entropy(predict(params), Y)


def loss_and_outputs(params):
    outputs = predict(params)
    return cross_entropy(outputs, Y), outputs


def exact_block(name):
    """Return one parameter's block of the Gauss-Newton matrix, as an array."""
    flat, unravel = ravel_pytree(PARAMS[name])
    outputs = predict(PARAMS)

    def of_flat(w):
        return predict({**PARAMS, name: unravel(w)}).ravel()

    jacobian = jax.jacobian(of_flat)(flat)
    hessian = jax.hessian(lambda f: cross_entropy(f.reshape(outputs.shape), Y))(
        outputs.ravel()
    )
    block = jnp.einsum("on,op,pm->nm", jacobian, hessian, jacobian)
    return np.asarray(block.reshape(PARAMS[name].shape * 2))


def is_basis(q):
    return q is None or isinstance(q, jax.Array | Reflectors)


def basis_leaves(bases):
    return jax.tree.leaves(bases, is_leaf=is_basis)


def random_bases(state, seed=1):
    """Bases that nothing is known of."""
    rng = np.random.default_rng(seed)

    def one(q):
        columns = jnp.asarray(rng.normal(size=first_columns(q).shape))
        return orthogonal_from_columns(columns)

    return state._replace(bases=jax.tree.map(one, state.bases, is_leaf=is_basis))


def partial_traces(state):
    """Return what the products stand for, where bases are complete."""
    return jax.tree.map(lambda p, q: p @ q.mT, state.products, state.bases)


def assert_same_bases(got, expected):
    """Up to the signs of the vectors, which mean nothing."""
    for a, b in zip(basis_leaves(got), basis_leaves(expected), strict=True):
        overlap = np.abs(first_columns(a).T @ first_columns(b))
        np.testing.assert_allclose(overlap, np.eye(len(overlap)), atol=1e-10)


def many(estimator, state, n=8000):
    """Return the estimates, and the states after them, from n keys."""

    def one(key):
        inner = state.estimator_state._replace(key=key)
        return estimator.update(
            None, state._replace(estimator_state=inner), PARAMS, predict_fn=predict
        )

    keys = jax.random.split(jax.random.PRNGKey(1), n)
    return jax.jit(jax.vmap(one))(keys)


def check_mean(samples, expected):
    samples = np.asarray(samples)
    standard_error = samples.std(axis=0) / np.sqrt(len(samples))
    z = (samples.mean(axis=0) - expected) / (standard_error + 1e-12)
    assert np.abs(z).max() < 4.5
    assert np.sqrt(np.mean(z**2)) < 2


FEW = {"max_dim": 1, "n_vectors": 2}  # so that two axes of PARAMS are long


@pytest.mark.parametrize("options", [{}, FEW], ids=["complete", "few vectors"])
def test_estimates_the_diagonal_in_its_bases(options):
    """Whatever the bases; here random ones, which no partial traces move."""
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), **options)
    state = random_bases(estimator.init(PARAMS))
    diags, after = many(estimator, state)
    bases = jax.tree.map(lambda q: q[0], after.bases)
    assert_same_bases(bases, state.bases)
    assert any(isinstance(q, Reflectors) for q in basis_leaves(bases)) == bool(options)
    # Those after, for reflectors of the same first columns may differ in the others.
    a, b, c = (dense(q) for q in bases["w"])
    block = exact_block("w")
    turned = np.einsum("ijkpqr,ia,jb,kc,pd,qe,rf->abcdef", block, *[a, b, c] * 2)
    check_mean(diags["w"], np.einsum("abcabc->abc", turned))
    (q,) = (dense(q) for q in bases["b"])
    check_mean(diags["b"], np.diag(q.T @ exact_block("b") @ q))
    assert state.bases["scale"] == ()
    check_mean(diags["scale"], exact_block("scale"))


def test_partial_traces_are_those_of_the_matrix():
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), decay=0.0)
    _, after = many(estimator, estimator.init(PARAMS))
    block = exact_block("w")
    expected = [
        np.einsum("ijkpjk->ip", block),
        np.einsum("ijkiqk->jq", block),
        np.einsum("ijkijr->kr", block),
    ]
    traces = partial_traces(after)
    for samples, trace in zip(traces["w"], expected, strict=True):
        check_mean(samples, trace)
    check_mean(traces["b"][0], exact_block("b"))


def test_the_axes_of_a_square_matrix_are_told_apart():
    params = jnp.asarray(RNG.normal(size=(4, 4)))
    estimator = ah.gauss_newton("squared_error")
    g, _ = estimator.factor.update(
        None, estimator.init(params), params, predict_fn=lambda p: jnp.dot(X, p)
    )
    turned = ah.in_eigenbasis(estimator, decay=0.0)
    _, state = turned.update(
        None, turned.init(params), params, predict_fn=lambda p: jnp.dot(X, p)
    )
    left, right = partial_traces(state)
    np.testing.assert_allclose(left, g @ g.T, rtol=1e-9)
    np.testing.assert_allclose(right, g.T @ g, rtol=1e-9)


def test_the_average_of_partial_traces_decays():
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), decay=0.75)
    factor = ah.gauss_newton(SOFTMAX).factor
    state, plain = estimator.init(PARAMS), factor.init(PARAMS)
    expected = np.zeros((3, 3))
    update = jax.jit(lambda s: estimator.update(None, s, PARAMS, predict_fn=predict))
    for _ in range(3):
        _, state = update(state)
        g, plain = factor.update(None, plain, PARAMS, predict_fn=predict)
        expected = 0.75 * expected + 0.25 * np.outer(g["b"], g["b"])
    (trace,) = partial_traces(state)["b"]
    np.testing.assert_allclose(trace, expected, rtol=1e-12, atol=1e-15 * expected.max())


def test_the_square_of_the_factor_is_the_estimate_of_gauss_newton():
    estimator = ah.gauss_newton(SOFTMAX)
    state = estimator.init(PARAMS)
    g, _ = estimator.factor.update(None, state, PARAMS, predict_fn=predict)
    diag, _ = estimator.update(None, state, PARAMS, predict_fn=predict)
    chex.assert_trees_all_close(jax.tree.map(jnp.square, g), diag, rtol=1e-12)
    assert min(jnp.min(x) for x in jax.tree.leaves(g)) < 0
    # Nothing has been seen before the first estimate, so that no axis is turned yet.
    turned = ah.in_eigenbasis(estimator)
    first, _ = turned.update(None, turned.init(PARAMS), PARAMS, predict_fn=predict)
    chex.assert_trees_all_close(first, diag, rtol=1e-9)


def test_the_diagonal_is_in_the_bases_of_the_new_state():
    """Those of earlier factors, for this one moves the traces only."""
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), decay=0.5)
    state = estimator.init(PARAMS)
    update = jax.jit(lambda s: estimator.update(None, s, PARAMS, predict_fn=predict))
    for _ in range(4):
        before = state
        diag, state = update(before)
    g, _ = ah.gauss_newton(SOFTMAX).factor.update(
        None, before.estimator_state, PARAMS, predict_fn=predict
    )
    (q,), (old,) = state.bases["b"], before.bases["b"]
    np.testing.assert_allclose(diag["b"], (q.T @ g["b"]) ** 2, rtol=1e-9, atol=1e-20)
    assert np.abs(np.abs(old.T @ q) - np.eye(3)).max() > 1e-3  # they have turned
    turned, _ = np.linalg.qr(before.products["b"][0])
    np.testing.assert_allclose(np.abs(turned.T @ q), np.eye(3), atol=1e-5)


def repeated(estimator, state, n):
    def step(state, _):
        diag, state = estimator.update(None, state, PARAMS, predict_fn=predict)
        return state, diag

    return jax.jit(lambda s: jax.lax.scan(step, s, length=n))(state)


def test_bases_become_eigenvectors_of_the_partial_traces():
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), decay=0.999)
    state, _ = repeated(estimator, estimator.init(PARAMS), 4000)
    leaves = zip(
        jax.tree.leaves(state.bases),
        jax.tree.leaves(partial_traces(state)),
        strict=True,
    )
    for q, trace in leaves:
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-12)
        turned = np.asarray(q.T @ trace @ q)
        values = np.diag(turned)
        assert np.abs(turned - np.diag(values)).max() < 0.02 * values.max()
        assert np.all(np.diff(values) < 0)  # the largest first
        np.testing.assert_allclose(
            values, np.linalg.eigvalsh(trace)[::-1], atol=0.01 * values.max()
        )


def test_less_is_off_the_diagonal_in_the_bases():
    def off_diagonal(matrix):
        rest = matrix - np.diag(np.diag(matrix))
        return np.linalg.norm(rest) / np.linalg.norm(matrix)

    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), decay=0.99)
    state, _ = repeated(estimator, estimator.init(PARAMS), 1000)
    block = exact_block("w").reshape(24, 24)
    a, b, c = state.bases["w"]
    q = np.kron(a, np.kron(b, c))
    assert off_diagonal(q.T @ block @ q) < 0.75 * off_diagonal(block)
    # A vector's basis is that of its whole block.
    (q,) = state.bases["b"]
    assert off_diagonal(q.T @ exact_block("b") @ q) < 0.2 * off_diagonal(
        exact_block("b")
    )


def test_bases_stay_orthogonal_in_single_precision():
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX))
    params = jax.tree.map(lambda x: x.astype(jnp.float32), PARAMS)
    state = estimator.init(params)

    def step(state, _):
        return estimator.update(None, state, params, predict_fn=predict)[::-1]

    state, diags = jax.jit(lambda s: jax.lax.scan(step, s, length=3000))(state)
    for q in jax.tree.leaves(state.bases):
        assert q.dtype == jnp.float32
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=2e-6)
    chex.assert_trees_all_equal_dtypes(jax.tree.map(lambda d: d[0], diags), params)


@pytest.mark.parametrize("options", [{}, FEW], ids=["complete", "few vectors"])
def test_half_precision_keeps_bases_in_single(options):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), **options)
    diag, state = estimator.update(
        None, estimator.init(params), params, predict_fn=predict
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(diag, params)
    assert {q.dtype for q in jax.tree.leaves(state.bases)} == {jnp.dtype("float32")}


def test_which_axes_have_a_basis():
    params = {
        "long": jnp.ones((9, 3)),
        "just": jnp.ones(8),
        "one": jnp.ones((1, 3)),
        "integers": jnp.ones(3, jnp.int32),
        "empty": jnp.ones((0, 3)),
        "number": jnp.ones(()),
    }

    def kinds(**options):
        estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), **options)
        return jax.tree.map(
            lambda q: (
                q
                if q is None
                else (type(q) is Reflectors, *jnp.shape(first_columns(q)))
            ),
            estimator.init(params).bases,
            is_leaf=is_basis,
        )

    complete = (False, 3, 3)
    expected = {
        "long": ((True, 9, 2), complete),
        "just": ((False, 8, 8),),
        "one": (None, complete),
        "integers": (),
        "empty": (None, complete),
        "number": (),
    }
    assert kinds(max_dim=8, n_vectors=2) == expected
    expected["long"] = ((True, 9, 8), complete)
    assert kinds(max_dim=1, n_vectors=8) == expected
    expected["long"] = (None, complete)
    assert kinds(max_dim=8, n_vectors=0) == expected


def with_constant_factor(n, m, n_zero=0, scale=1.0):
    """Return outputs whose factor is the same matrix, up to its sign, every time.

    Its singular values are 1, 1/2, 1/4 and so on; some first rows are zero.
    """
    rng = np.random.default_rng(0)
    left, _ = np.linalg.qr(rng.normal(size=(n - n_zero, m)))
    right, _ = np.linalg.qr(rng.normal(size=(m, m)))
    factor = np.vstack([np.zeros((n_zero, m)), left * 0.5 ** np.arange(m) @ right.T])
    factor *= scale
    return lambda w: jnp.sum(factor * w)[None, None], factor


@pytest.mark.parametrize("scale", [1.0, 1e-6])
def test_few_vectors_are_the_leading_eigenvectors(scale):
    """With the factor always the same this is orthogonal iteration, and converges."""
    predict, factor = with_constant_factor(12, 9, scale=scale)
    estimator = ah.in_eigenbasis(
        ah.gauss_newton("l2_loss", reduction="sum"),
        decay=0.5,  # the start is forgotten no faster than this
        max_dim=9,
        n_vectors=3,
    )
    w = jnp.zeros((12, 9))
    state = estimator.init(w)
    update = jax.jit(lambda s: estimator.update(None, s, w, predict_fn=predict))
    for _ in range(50):
        diag, state = update(state)
    long, short = state.bases
    left, values, right = np.linalg.svd(factor)
    overlap = np.abs(left[:, :3].T @ first_columns(long))
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-6)
    overlap = np.abs(right[:3] @ first_columns(short)[:, :3])
    np.testing.assert_allclose(overlap, np.eye(3), atol=1e-6)
    np.testing.assert_allclose(np.diag(diag)[:3], values[:3] ** 2, rtol=1e-6)
    trace = factor @ factor.T
    np.testing.assert_allclose(
        state.products[0], trace @ first_columns(long), atol=1e-6 * scale**2
    )


def test_few_vectors_are_found_where_the_first_entries_never_move():
    """As with pixels at the edge of an image, that are always black."""
    predict, factor = with_constant_factor(12, 2, n_zero=6)
    estimator = ah.in_eigenbasis(
        ah.gauss_newton("l2_loss", reduction="sum"), max_dim=2, n_vectors=2
    )
    w = jnp.zeros((12, 2))
    state = estimator.init(w)
    for _ in range(30):
        _, state = estimator.update(None, state, w, predict_fn=predict)
    left, _, _ = np.linalg.svd(factor)
    overlap = left[:, :2].T @ first_columns(state.bases[0])
    np.testing.assert_allclose(np.linalg.norm(overlap), np.sqrt(2), rtol=1e-6)


def test_as_many_vectors_as_an_axis_is_long_are_a_complete_basis():
    one, other = (
        ah.in_eigenbasis(ah.gauss_newton(SOFTMAX), max_dim=d, n_vectors=k)
        for d, k in ((4, 0), (1, 4))
    )
    chex.assert_trees_all_equal(one.init(PARAMS), other.init(PARAMS))


def step_by_hand(state, mu, grads, *, lr, b1, b2, clip):
    """One update of the average, and the step, for a matrix with two bases."""
    mu = b1 * mu + (1 - b1) * grads
    count = int(state.count)
    a, b = (dense(q) for q in state.estimator_state.bases)
    turned = a.T @ (mu / (1 - b1**count)) @ b
    h = np.asarray(state.nu) / (1 - b2**count)
    return mu, -lr * a @ np.clip(turned / h, -clip, clip) @ b.T


@pytest.mark.parametrize("clip", [1e9, 0.05])
@pytest.mark.parametrize("options", [{}, FEW], ids=["complete", "few vectors"])
def test_steps_are_taken_in_the_bases(clip, options):
    """Momentum is kept in the parameters' own axes, and turned with each step."""
    x, w = X[:, :3], jnp.asarray(RNG.normal(size=(3, 2)))
    y = jnp.asarray(RNG.normal(size=(16, 2)))
    tx = ah.adahessian(
        0.1,
        b1=0.8,
        b2=0.9,
        eps=0.0,
        hessian_ema="mean",
        estimator=ah.in_eigenbasis(ah.gauss_newton("squared_error"), **options),
        clip_threshold=None if clip == 1e9 else clip,
    )
    state, mu = tx.init(w), np.zeros((3, 2))
    update = jax.jit(
        lambda g, s, w: tx.update(g, s, w, predict_fn=lambda w: jnp.dot(x, w))
    )
    for _ in range(6):
        grads = jax.grad(lambda w: jnp.mean((x @ w - y) ** 2))(w)
        updates, state = update(grads, state, w)
        mu, expected = step_by_hand(
            state[0], mu, grads, lr=0.1, b1=0.8, b2=0.9, clip=clip
        )
        np.testing.assert_allclose(updates, expected, rtol=1e-9, atol=1e-12)
        w = w + updates
    a, b = (dense(q) for q in state[0].estimator_state.bases)
    turned = np.abs(a.T @ updates @ b)
    if clip != 1e9:
        assert turned.max() <= 0.1 * clip * (1 + 1e-9)
        assert np.sum(turned > 0.1 * clip * (1 - 1e-9)) >= 2


def test_without_bases_the_threshold_is_optax_clip():
    options = {"hessian_ema": "mean", "estimator": ah.gauss_newton(SOFTMAX)}
    ours = ah.scale_by_adahessian(clip_threshold=0.3, **options)
    theirs = optax.chain(ah.scale_by_adahessian(**options), optax.clip(0.3))
    grads = jax.grad(loss_fn)(PARAMS)
    got, expected = (
        tx.update(grads, tx.init(PARAMS), PARAMS, predict_fn=predict)[0]
        for tx in (ours, theirs)
    )
    chex.assert_trees_all_equal(got, expected)
    assert max(jnp.max(jnp.abs(x)) for x in jax.tree.leaves(got)) == 0.3


def test_relative_curvature_in_the_bases():
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX))
    tx = ah.scale_by_relative_curvature(
        power=0.5, damping=0.2, b2=0.5, update_interval=1, estimator=estimator
    )
    state = tx.init(PARAMS)
    grads = jax.grad(loss_fn)(PARAMS)
    for _ in range(3):
        updates, state = tx.update(grads, state, PARAMS, predict_fn=predict)
    (q,) = state.estimator_state.bases["b"]
    v = state.nu["b"]
    factor = ((v + 0.2 * jnp.mean(v)) / (1.2 * jnp.mean(v))) ** -0.5
    expected = q @ (factor * (q.T @ grads["b"]))
    np.testing.assert_allclose(updates["b"], expected, rtol=1e-9)


def test_solves_what_a_diagonal_does_not():
    """Regression with inputs that nearly coincide, so that weights interact."""
    rng = np.random.default_rng(2)
    common = rng.normal(size=(64, 1))
    x = jnp.asarray(common + 0.03 * rng.normal(size=(64, 4)))
    target = jnp.asarray(rng.normal(size=(4, 2)))
    loss = {}
    wraps = {
        "bases": ah.in_eigenbasis,
        "one vector": lambda e: ah.in_eigenbasis(e, max_dim=1, n_vectors=1),
        "own axes": lambda e: e,
    }
    for name, wrap in wraps.items():
        tx = ah.adahessian(
            0.3,
            b2=0.95,
            hessian_ema="mean",
            estimator=wrap(ah.gauss_newton("squared_error")),
            clip_threshold=1.0,
        )

        def step(carry, _, tx=tx):
            w, state = carry
            value, grads = jax.value_and_grad(
                lambda w: jnp.mean((x @ w - x @ target) ** 2)
            )(w)
            updates, state = tx.update(grads, state, w, predict_fn=lambda w: x @ w)
            return (w + updates, state), value

        w = jnp.zeros((4, 2))
        _, values = jax.jit(lambda c, s=step: jax.lax.scan(s, c, length=300))(
            (w, tx.init(w))
        )
        loss[name] = float(values[-1] / values[0])
    assert loss["bases"] < 1e-12
    assert loss["one vector"] < 1e-10
    assert loss["own axes"] > 1e-4


@pytest.mark.parametrize("refresh", [None, True], ids=["by-count", "by-flag"])
def test_the_fused_path_is_the_same(refresh):
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX))
    interval = 1 if refresh else 3
    tx = ah.adahessian(
        0.1,
        hessian_ema="mean",
        estimator=estimator,
        update_interval=interval,
        clip_threshold=0.1,
    )
    value_and_grad = ah.value_and_grad_with_curvature(loss_and_outputs, estimator)

    @jax.jit
    def fused(params, state):
        _, grads, curvature = value_and_grad(params, state=state, refresh=refresh)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return optax.apply_updates(params, updates), state

    @jax.jit
    def separate(params, state):
        grads = jax.grad(loss_fn)(params)
        updates, state = tx.update(grads, state, params, predict_fn=predict)
        return optax.apply_updates(params, updates), state

    ours, theirs = ((PARAMS, tx.init(PARAMS)) for _ in range(2))
    for _ in range(7):
        ours, theirs = fused(*ours), separate(*theirs)
    chex.assert_trees_all_close(ours, theirs, rtol=1e-8, atol=1e-10)
    assert int(ours[1][0].refreshes) == (7 if refresh else 3)


def test_bases_rest_between_estimates():
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX))
    tx = ah.scale_by_adahessian(
        hessian_ema="mean", estimator=estimator, update_interval=3
    )
    state = tx.init(PARAMS)
    grads = jax.grad(loss_fn)(PARAMS)
    update = jax.jit(lambda s: tx.update(grads, s, PARAMS, predict_fn=predict))
    seen = []
    for _ in range(6):
        _, state = update(state)
        seen.append(state.estimator_state.products["b"][0])
    assert [bool(jnp.all(a == b)) for a, b in itertools.pairwise(seen)] == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_a_factor_that_is_not_finite_moves_nothing():
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX))
    tx = ah.scale_by_adahessian(hessian_ema="mean", estimator=estimator)
    grads = jax.grad(loss_fn)(PARAMS)
    state = tx.init(PARAMS)
    for _ in range(3):
        _, state = tx.update(grads, state, PARAMS, predict_fn=predict)

    def broken(params):
        return predict(params) + jnp.sqrt(0.0 * params["b"])  # slope infinite times 0

    updates, after = jax.jit(lambda s: tx.update(grads, s, PARAMS, predict_fn=broken))(
        state
    )
    before, now = (partial_traces(s.estimator_state) for s in (state, after))
    ((trace,), (same,)) = before["b"], now["b"]  # but for the rounding of a turn
    np.testing.assert_allclose(same, trace, rtol=1e-12, atol=1e-15 * trace.max())
    assert not jnp.allclose(now["w"][0], before["w"][0])
    assert int(after.nonfinite) == 3
    np.testing.assert_allclose(
        after.nu["b"] / (1 - 0.999**4), state.nu["b"] / (1 - 0.999**3), rtol=1e-9
    )
    chex.assert_tree_all_finite((updates, after.nu, after.estimator_state))


def test_no_curvature_leaves_the_basis():
    params = {"used": jnp.ones((2, 3)), "unused": jnp.ones((2, 3))}
    estimator = ah.in_eigenbasis(ah.gauss_newton("squared_error"))
    state = random_bases(estimator.init(params))
    start = state.bases["unused"]
    for _ in range(20):
        diag, state = estimator.update(
            None, state, params, predict_fn=lambda p: X[:, :2] @ p["used"]
        )
    assert_same_bases(state.bases["unused"], start)
    assert float(jnp.max(diag["unused"])) == 0
    chex.assert_tree_all_finite(state)


def test_devices_share_bases_and_the_factor_is_that_of_the_whole_batch():
    """Each device draws signs of its own; the matrix is that of all rows together."""
    n = 4

    estimator = ah.in_eigenbasis(
        ah.gauss_newton(SOFTMAX, axis_name="devices"), decay=0.0
    )
    state = estimator.init(PARAMS)

    def on_devices(key):
        own = state._replace(estimator_state=state.estimator_state._replace(key=key))
        return jax.vmap(
            lambda x: estimator.update(
                None, own, PARAMS, predict_fn=lambda p: predict(p, x)
            ),
            axis_name="devices",
        )(X.reshape(n, -1, 4))

    keys = jax.random.split(jax.random.PRNGKey(1), 8000)
    diags, states = jax.jit(jax.vmap(on_devices))(keys)
    for leaf in jax.tree.leaves((diags, states.products)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:, :1], leaf.shape))
    check_mean(partial_traces(states)["b"][0][:, 0], exact_block("b"))
    check_mean(diags["b"][:, 0], np.diag(exact_block("b")))


def test_inside_partition_and_microbatched():
    """A part of the parameters, and a batch in parts."""
    estimator = ah.microbatched(ah.in_eigenbasis(ah.gauss_newton(SOFTMAX)), 2)
    curved = ah.adahessian(
        0.1, hessian_ema="mean", estimator=estimator, clip_threshold=0.1
    )
    labels = {"w": "curved", "b": "plain", "scale": "plain"}
    tx = optax.partition({"curved": curved, "plain": optax.sgd(0.1)}, labels)
    state = tx.init(PARAMS)

    def predict_part(params, x):
        return predict({**PARAMS, "w": params["w"]}, x)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(
            jax.grad(loss_fn)(params), state, params, predict_fn=predict_part, batch=X
        )
        return optax.apply_updates(params, updates), state

    params, first = PARAMS, float(loss_fn(PARAMS))
    for _ in range(20):
        params, state = step(params, state)
    assert float(loss_fn(params)) < first
    inner = state.inner_states["curved"].inner_state[0].estimator_state
    assert [q.shape for q in inner.bases["w"]] == [(4, 4), (2, 2), (3, 3)]
    assert isinstance(inner.bases["b"], optax.MaskedNode)


@pytest.mark.parametrize(
    "estimator",
    [
        ah.hutchinson(),
        ah.gauss_newton(SOFTMAX, n_samples=2),
        ah.gauss_newton(SOFTMAX, method="sampled-labels"),
        ah.microbatched(ah.gauss_newton(SOFTMAX), 2),
        optax.contrib.hutchinson_estimator_diag_hessian(),
        ah.in_eigenbasis(ah.gauss_newton(SOFTMAX)),
    ],
    ids=["hutchinson", "samples", "labels", "microbatched", "optax's", "itself"],
)
def test_refuses_estimators_without_one_factor(estimator):
    with pytest.raises(ValueError, match=r"^estimator must be gauss_newton"):
        ah.in_eigenbasis(estimator)


def test_diagnostics_are_of_the_turned_axes():
    """Where the threshold bounds each entry."""
    tx = ah.scale_by_adahessian(
        hessian_ema="mean",
        estimator=ah.in_eigenbasis(ah.gauss_newton(SOFTMAX)),
        clip_threshold=0.05,
    )
    state = tx.init(PARAMS)
    grads = jax.grad(loss_fn)(PARAMS)
    for _ in range(5):
        updates, state = tx.update(grads, state, PARAMS, predict_fn=predict)
    report = ah.diagnostics(state, updates=updates, clip_threshold=0.05)
    bases = state.estimator_state.bases
    turned = {
        "w": np.einsum("ijk,ia,jb,kc->abc", updates["w"], *bases["w"]),
        "b": bases["b"][0].T @ updates["b"],
        "scale": updates["scale"],
    }
    at_bound = [np.abs(x) > 0.05 * (1 - 1e-6) for x in turned.values()]
    share = sum(map(np.sum, at_bound)) / sum(map(np.size, at_bound))
    np.testing.assert_allclose(report["clipped_share"], share)
    assert 0.1 < share < 1
    ratio = np.abs(turned["b"] / (bases["b"][0].T @ state.mu["b"]))
    np.testing.assert_allclose(report["step_size/b/0.5"], np.median(ratio), rtol=1e-9)
