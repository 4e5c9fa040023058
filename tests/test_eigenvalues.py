# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvalues, beside those of whole matrices."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adahessian_jax as ah
from adahessian_jax import losses
from adahessian_jax.demo.data import load_digits
from tests.problems import at_once, dense_ggn, dense_hessian, mlp, quadratic

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(8, 4)), RNG.integers(0, 3, size=8)
PARAMS = {"a": RNG.normal(size=(4, 5)), "b": RNG.normal(size=(5, 3))}
ROW = losses.of_row(lambda f, y: jnp.exp(f[0] - y) + jnp.sum((f - y) ** 4))


def predict(p):
    return jnp.dot(jnp.tanh(jnp.dot(jnp.asarray(X), p["a"])), p["b"])


def largest(matrix):
    values = np.linalg.eigvals(matrix).real
    return values[np.argsort(-np.abs(values))]


def flat(vectors):
    return np.stack([ravel_pytree(v)[0] for v in unstacked(vectors)])


def unstacked(tree):
    n = len(jax.tree.leaves(tree)[0])
    return [jax.tree.map(lambda x: x[i], tree) for i in range(n)]  # noqa: B023


def check_pairs(found, matrix, rtol):
    """Values, vectors and residuals are those of a whole matrix."""
    expected, vectors = largest(matrix), flat(found.vectors)
    k = len(found.values)
    if rtol < 1e-3:
        tolerance = {"rtol": 0, "atol": rtol * abs(expected[0])}
        np.testing.assert_allclose(found.values, expected[:k], **tolerance)
    np.testing.assert_allclose(vectors @ vectors.T, np.eye(k), atol=1e-9)
    rest = vectors @ matrix - np.asarray(found.values)[:, None] * vectors
    norms = np.linalg.norm(rest, axis=1)
    np.testing.assert_allclose(norms, found.residuals, atol=1e-8 * abs(expected[0]))
    assert max(norms) <= rtol * abs(expected[0]) * (1 + 1e-8)
    assert found.n_products <= len(matrix)


@pytest.mark.parametrize(
    "case", at_once([(1, 1e-2), (3, 1e-2), (3, 1e-9)], [(3, 1e-9)])
)
def test_hessian(case, x64):
    k, rtol = case
    problem = mlp()
    params = {**problem.params, "n": jnp.arange(3)}  # held fixed
    matrix = dense_hessian(problem.loss, problem.params)
    find = functools.partial(ah.largest_eigenvalues, problem.loss, k=k, rtol=rtol)
    find = functools.partial(find, max_products=len(matrix))
    found = jax.jit(find)(params)
    counts = found.vectors.pop("n")
    assert counts.shape == (k, 3)
    assert not counts.any()
    check_pairs(found, matrix, rtol)
    if rtol < 1e-3:
        return
    eager = find(problem.params)
    check_pairs(eager, matrix, rtol)
    # Where the parameters are the same, or almost, less is to do.
    warm = jax.jit(lambda p, start: find(p, start=start))
    moved = jax.tree.map(lambda x: x * 1.01, problem.params)
    for params, whole, most in (
        (problem.params, matrix, k + 2),
        (moved, dense_hessian(problem.loss, moved), int(eager.n_products) - 1),
    ):
        again = warm(params, eager)
        check_pairs(again, whole, rtol)
        assert again.n_products <= most


def test_all_eigenvalues_of_a_small_matrix(x64):
    problem, matrix = quadratic()
    found = ah.largest_eigenvalues(problem.loss, problem.params, 8, rtol=0.0)
    check_pairs(found, np.asarray(matrix), 1e-12)
    # Exact vectors span all that a start is trusted to know.
    find = functools.partial(ah.largest_eigenvalues, problem.loss, problem.params, 2)
    assert find(start=find(rtol=0.0)).n_products == 2
    # Some of them equal, or zero: none is missed.
    for spectrum in ([5, 5, 1, 1, 1, 0, -5, 0], [0] * 8, [2] * 8):
        d = jnp.asarray(spectrum, float)
        found = ah.largest_eigenvalues(lambda w, d=d: d @ w**2 / 2, jnp.ones(8), 4)
        np.testing.assert_allclose(found.values**2, np.sort(d**2)[::-1][:4], atol=1e-12)


SUM = losses.softmax_cross_entropy.replace(reduction="sum")
CASES = [(losses.softmax_cross_entropy, None), (SUM, "mask")]
CASES += [(losses.squared_error, "mask"), (ROW, "mask")]


@pytest.mark.parametrize("case", at_once(CASES, [CASES[0], CASES[3]]), ids=str)
def test_gauss_newton(case, x64):
    loss, where = case
    mask = jnp.asarray([1.0, 0, 2, 1, 1, 0.5, 0, 1]) if where else None
    y = jnp.asarray(Y, float) if loss is ROW else jnp.asarray(Y)
    if loss is losses.squared_error:
        y = jax.nn.one_hot(y, 3)
    matrix = dense_ggn(lambda f: loss(f, y, where=mask), predict, PARAMS)

    def outputs(p):
        f = predict(p)
        return f if mask is None else (f.at[1].set(99.0), mask)

    labels = y if loss is ROW else None
    options = {"loss": loss, "labels": labels, "rtol": 1e-9, "max_products": 35}
    found = ah.largest_eigenvalues(outputs, PARAMS, 2, **options)
    check_pairs(found, matrix, 1e-9)


SOFTMAX = losses.softmax_cross_entropy
KEEP = {"update_interval": 1000, "initial_refreshes": 3}
OPTIMIZERS = {
    "rms": ah.adahessian(0.1, 0.0, eps=0.3, hessian_power=0.7, **KEEP),
    "mean": ah.adahessian(
        0.1, 0.0, eps=0.3, hessian_ema="mean", averaging=ah.block_average(-1, 1), **KEEP
    ),
    "newton": ah.newton(
        0.1, SOFTMAX, b1=0.0, eps=0.1, clip_threshold=None, max_dim=4, **KEEP
    ),
    "masked": optax.masked(
        ah.adahessian(0.1, 0.0, eps=0.3, **KEEP),
        {"a": True, "b": False},
        mask_compatible_extra_args=True,
    ),
}


@pytest.mark.parametrize("name", at_once(OPTIMIZERS, ["masked"]))
def test_preconditioner(name, x64):
    """What an optimizer divides by, told by its own updates of a frozen average."""
    tx = OPTIMIZERS[name]
    params = jax.tree.map(jnp.asarray, PARAMS)
    _, unravel = ravel_pytree(params)

    def loss_fn(p):
        return SOFTMAX(predict(p), jnp.asarray(Y))

    args = {"obj_fn": ah.unmasked(loss_fn, params)} if name != "newton" else {}
    args["predict_fn"] = predict
    state = tx.init(params)
    for _ in range(3):
        _, state = tx.update(jax.grad(loss_fn)(params), state, params, **args)
    frozen = jax.jit(lambda g: tx.update(unravel(g), state, params, **args)[0])
    columns = [ravel_pytree(frozen(unit))[0] for unit in np.eye(35)]
    inverse = -np.stack(columns, axis=1) / 0.1
    if name == "masked":
        inverse[20:] = 0  # what it leaves to others, it hands on
    matrix = inverse @ dense_hessian(loss_fn, params)
    found = ah.largest_eigenvalues(
        loss_fn, params, 2, preconditioner=(tx, state), rtol=1e-9, max_products=35
    )
    np.testing.assert_allclose(found.values, largest(matrix)[:2], rtol=1e-7)


def test_preconditioner_of_entries(x64):
    problem, matrix = quadratic()
    d = {"a": jnp.array([1.0, 2.0, 3.0, np.inf]), "b": jnp.full(4, 0.5)}
    found = jax.jit(
        lambda w: ah.largest_eigenvalues(problem.loss, w, 3, preconditioner=d, rtol=0.0)
    )(problem.params)
    expected = largest(np.asarray(matrix) / ravel_pytree(d)[0][:, None])
    np.testing.assert_allclose(found.values, expected[:3], rtol=1e-10)


def test_preconditioner_of_entries_in_a_tuple():
    params = {"w": jnp.ones(3)}, {"v": jnp.ones(2)}
    d = jax.tree.map(lambda x: 4 * x, params)

    def loss(p):
        return jnp.sum(p[0]["w"] ** 2) + 3 * jnp.sum(p[1]["v"] ** 2)

    found = ah.largest_eigenvalues(loss, params, preconditioner=d)
    np.testing.assert_allclose(found.values, [6 / 4], rtol=1e-5)


def test_preconditioners_that_are_not_known():
    """Those of other optimizers, or whose eps is an array: entries are the way out."""
    w = jnp.ones(2)

    def loss_fn(w):
        return jnp.sum(w**4)

    injected = optax.inject_hyperparams(ah.adahessian)(0.1, eps=1e-3)
    for tx in (optax.adam(0.1), injected):
        given = tx, tx.init(w)
        with pytest.raises(ValueError, match="Pass the entries of D in place of"):
            ah.largest_eigenvalues(loss_fn, w, preconditioner=given)
    found = ah.largest_eigenvalues(loss_fn, w, preconditioner=3 * w)
    np.testing.assert_allclose(found.values, [4.0], rtol=1e-5)


def test_mapped_outside_jit():
    """Over parameters, as ``jax.vmap`` does it."""
    ws = jnp.array([[1.0, 2.0], [3.0, 1.0]])
    found = jax.vmap(lambda w: ah.largest_eigenvalues(lambda w: jnp.sum(w**3), w))(ws)
    np.testing.assert_allclose(found.values[:, 0], [12.0, 18.0], rtol=1e-5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_the_learning_rate_at_which_a_step_is_unstable(nesterov, x64):
    """On a quadratic function of eigenvalue 2, divided by 1."""
    b1 = 0.8
    limit = 2 * (1 + b1) / (1 - b1) / ((1 + 2 * b1) if nesterov else 1) / 2
    for factor in (0.99, 1.01):
        tx = ah.adahessian(factor * limit, b1, eps=0.0, nesterov=nesterov)

        def step(carry, _, tx=tx):
            w, state = carry
            updates, state = tx.update(2 * w, state, w, hessian_diag=jnp.ones(1))
            return (w + updates, state), jnp.abs(w[0])

        _, sizes = jax.lax.scan(step, (jnp.ones(1), tx.init(jnp.ones(1))), length=3000)
        assert (sizes[-50:].max() < sizes[500:550].max()) == (factor < 1)


@pytest.mark.parametrize("kind", at_once(["Auto", "Explicit"], ["Explicit"]))
def test_sharded_parameters(kind):
    if not hasattr(jax, "set_mesh"):
        pytest.skip("this version of JAX has no explicit sharding")
    kinds = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=kinds)
    params = {"a": jnp.ones((8, 4)), "b": jnp.arange(4.0)}

    def loss_fn(p):
        return p["a"].sum() ** 2 / 8 + jnp.sum(p["a"] ** 4) + jnp.sum(p["b"] ** 4)

    expected = ah.largest_eigenvalues(loss_fn, params, 2, rtol=1e-4)
    specs = {"a": P("x", "y"), "b": P()}
    put = {k: NamedSharding(mesh, spec) for k, spec in specs.items()}
    with jax.set_mesh(mesh):
        params = jax.device_put(params, put)
        find = jax.jit(lambda p: ah.largest_eigenvalues(loss_fn, p, 2, rtol=1e-4))
        found = find(params)
    atol = 2.1e-4 * float(expected.values[0])  # both are as exact as asked for
    np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=atol)
    assert found.vectors["a"].sharding.spec == P(None, "x", "y")


@pytest.mark.slow
def test_half_precision():
    """As exact as asked for, but for the rounding of vector and product by 2**-9."""
    problem = mlp(jnp.float32)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), problem.params)

    def loss_fn(p):
        return problem.loss(jax.tree.map(lambda x: x.astype(jnp.float32), p))

    whole = jax.tree.map(lambda x: x.astype(jnp.float32), params)
    expected = ah.largest_eigenvalues(problem.loss, whole, rtol=1e-4)
    found = ah.largest_eigenvalues(loss_fn, params)
    np.testing.assert_allclose(found.values, expected.values, rtol=0.01 + 2 / 2**9)
    assert {str(x.dtype) for x in jax.tree.leaves(found)} == {"float32", "int32"}


def test_nothing_finite():
    def loss_fn(w):
        return jnp.inf * jnp.sum(w**2)

    with pytest.raises(ValueError, match="fun must have finite second derivatives"):
        ah.largest_eigenvalues(loss_fn, jnp.ones(3))
    found = jax.jit(lambda w: ah.largest_eigenvalues(loss_fn, w))(jnp.ones(3))
    assert np.isnan(found.values).all()
    assert found.n_products == 1


@pytest.mark.slow
def test_products_on_a_network():
    """Sharpness of 200k parameters to 1 %: 15 products at first, then 6 and 4."""
    sparse = pytest.importorskip("scipy.sparse.linalg")
    rng = np.random.default_rng(1)
    digits = load_digits().train
    x, y = digits.inputs[:500].reshape(500, -1), jnp.asarray(digits.labels[:500])
    pairs = itertools.pairwise((784, 220, 100, 10))
    params = [jnp.array(rng.normal(size=s) * (2 / s[0]) ** 0.5) for s in pairs]
    assert sum(w.size for w in params) > 195_000

    def loss_fn(params):
        h = jax.nn.relu(jnp.dot(jax.nn.relu(jnp.dot(x, params[0])), params[1]))
        return SOFTMAX(jnp.dot(h, params[2]), y)

    flat, unravel = ravel_pytree(params)

    @jax.jit
    def product(params, v):
        return ravel_pytree(ah.hvp(loss_fn, params, unravel(v)))[0]

    find = jax.jit(lambda p, start: ah.largest_eigenvalues(loss_fn, p, start=start))
    found = None

    @jax.jit
    def step(params):
        grads = jax.grad(loss_fn)(params)
        return jax.tree.map(lambda w, g: w - 0.0005 * jnp.sign(g), params, grads)

    for i in range(21):
        if i % 5 == 0:
            found, cold = find(params, found), find(params, None)
            shape, of_params = (flat.size,) * 2, functools.partial(product, params)
            operator = sparse.LinearOperator(shape, of_params, dtype=np.float32)
            exact = sparse.eigsh(operator, 1, tol=1e-4, return_eigenvectors=False)
            for pair, most in ((found, {0: 15, 5: 6}.get(i, 4)), (cold, 15)):
                np.testing.assert_allclose(pair.values, exact, rtol=0.01)
                assert pair.n_products <= most, i
        params = step(params)


@pytest.mark.parametrize("scale", [1e-30, 1e-19, 1.0, 1e19, 1e30])
def test_matrices_of_any_scale(scale):
    """Squares of which may be beyond the dtype."""
    h = jnp.diag(jnp.array([5.0, -4.0, 3.0])) * scale
    found = ah.largest_eigenvalues(
        lambda w: 0.5 * jnp.dot(w, jnp.dot(h, w)), jnp.zeros(3), k=2
    )
    np.testing.assert_allclose(found.values / scale, [5, -4], rtol=1e-3)


def test_integers_as_a_preconditioner():
    h, d = jnp.array([5.0, -4.0, 3.0]), jnp.array([1, 8, 1])
    found = ah.largest_eigenvalues(
        lambda w: jnp.sum(h * w**2) / 2, jnp.zeros(3), preconditioner=d, k=2
    )
    np.testing.assert_allclose(found.values, [5, 3], rtol=1e-4)


def test_a_start_that_found_nothing():
    """A batch whose curvature is not finite is forgotten."""

    @jax.jit
    def look(bad, start):
        scale = jnp.where(bad, jnp.nan, 1.0)
        h = jnp.array([5.0, 3.0, 1.0]) * scale
        w = jnp.ones(3)
        return ah.largest_eigenvalues(lambda w: jnp.sum(h * w**2), w, start=start)

    first = ah.largest_eigenvalues(lambda w: jnp.sum(w**2), jnp.ones(3))
    bad = look(True, first)
    assert np.isnan(bad.values)
    np.testing.assert_allclose(look(False, bad).values, 10, rtol=1e-4)
