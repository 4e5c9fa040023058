# SPDX-License-Identifier: Apache-2.0
"""A diagonal over a data set: its mean, its error, and what interrupts it."""

import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adahessian_jax as ah
from adahessian_jax import losses
from tests.problems import at_once, dense_ggn, dense_hessian

RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.normal(size=(4, 3)), "b": RNG.normal(size=(3, 3))}
X, Y = RNG.normal(size=(11, 4)), RNG.integers(0, 3, size=11)
WHERE = np.array([1.0, 0, 2, 1, 1, 0.5, 0, 1, 1, 1, 3])
BATCHES = [(X[i:j], Y[i:j], WHERE[i:j]) for i, j in ((0, 4), (4, 8), (8, 11))]
SOFTMAX = losses.softmax_cross_entropy
ROW = losses.of_row(lambda f, y: jnp.exp(f[0] - y) + jnp.sum((f - y) ** 2))


def predict(p, x):
    return jnp.dot(jnp.tanh(jnp.dot(jnp.asarray(x), p["a"])), p["b"])


def loss_fn(p, batch):
    return SOFTMAX(predict(p, batch[0]), jnp.asarray(batch[1]))


def flat(tree):
    return np.concatenate([np.ravel(x) for x in jax.tree.leaves(tree)])


def check_estimate(found, exact):
    """Of 21 entries none is off by 4.5 standard errors, once in 5,000 seeds."""
    exact = np.asarray(exact)
    error = (flat(found.mean) - exact) / flat(found.standard_error)
    assert np.abs(error).max() < 4.5
    assert abs(found.trace - exact.sum()) < 4 * found.trace_standard_error
    np.testing.assert_allclose(found.trace, flat(found.mean).sum(), rtol=1e-6)
    noise, mean = (np.sum(flat(x) ** 2) for x in (found.standard_error, found.mean))
    relative = np.sqrt(noise / np.sum(exact**2))
    # The norms of the mean and of the exact diagonal differ by at most their distance.
    np.testing.assert_allclose(found.relative_error, relative, rtol=2 * relative)
    # On average the square of the mean is that of the diagonal and that of the noise.
    squared = found.relative_error**2
    np.testing.assert_allclose(squared, noise / (mean - noise), rtol=1e-4)


@pytest.mark.parametrize("reduction", at_once(["mean", "sum"], ["mean"]))
def test_hutchinson(reduction, x64):
    def of_batch(p, batch):
        loss = loss_fn(p, batch)
        return loss if reduction == "mean" else loss * len(batch[0])

    args = of_batch, PARAMS, BATCHES, ah.hutchinson()
    found = ah.estimate_diagonal(*args, n_samples=400, reduction=reduction)
    scale = 1 if reduction == "mean" else len(X)
    matrix = dense_hessian(lambda p: loss_fn(p, (X, Y)), PARAMS) * scale
    check_estimate(found, np.diag(matrix))
    assert found.n_samples == 400


CASES = [(SOFTMAX, False), (SOFTMAX, True), (ROW, True)]
CASES += [(SOFTMAX.replace(reduction="sum"), True), (losses.squared_error, True)]
CASES += [(losses.squared_error.replace(event_ndim=1), False)]


@pytest.mark.parametrize("case", at_once(CASES, CASES[1:3]), ids=str)
def test_gauss_newton(case, x64):
    loss, masked = case
    labels = ROW.kind == loss.kind

    def outputs(p, batch):
        f = predict(p, batch[0])
        return (f, jnp.asarray(batch[2])) if masked else f

    found = ah.estimate_diagonal(
        outputs,
        {**PARAMS, "n": np.arange(2)},
        BATCHES,
        ah.gauss_newton(loss),
        n_samples=400,
        labels_fn=(lambda batch: jnp.asarray(batch[1], float)) if labels else None,
    )
    assert not found.mean.pop("n").any()
    assert not found.deviations.pop("n").any()
    y = jnp.asarray(Y, float if labels else int)
    y = jax.nn.one_hot(Y, 3) if loss.kind == "element" else y
    where = jnp.asarray(WHERE) if masked else None
    matrix = dense_ggn(
        lambda f: loss(f, y, where=where), lambda p: predict(p, X), PARAMS
    )
    check_estimate(found, np.diag(matrix))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hutchinson", "gauss_newton"])
def test_error_bars_cover_at_their_rate(name, x64):
    """1.96 standard errors of 200 samples: 95 % of all entries, over 100 copies.

    Entries of a copy hang together, and copies do not: they show the spread of the
    mean, of which the bounds are three times as far.
    """
    n, factor = 100, name == "gauss_newton"
    estimator = ah.gauss_newton(SOFTMAX) if factor else ah.hutchinson()
    copies = jax.tree.map(lambda x: jnp.stack([jnp.asarray(x)] * n), PARAMS)

    def fun(p, batch):
        outputs = jax.vmap(lambda p: predict(p, batch[0]), out_axes=1)(p)
        labels = jnp.stack([jnp.asarray(batch[1])] * n, axis=1)
        return outputs if factor else SOFTMAX(outputs, labels)

    args = fun, copies, BATCHES, estimator
    found = ah.estimate_diagonal(*args, n_samples=200)
    if factor:
        y = jnp.asarray(Y)
        matrix = dense_ggn(lambda f: SOFTMAX(f, y), lambda p: predict(p, X), PARAMS)
    else:
        matrix = dense_hessian(lambda p: loss_fn(p, (X, Y)), PARAMS)
    sizes = [x.reshape(n, -1) for x in jax.tree.leaves(found.mean)]
    errors = [x.reshape(n, -1) for x in jax.tree.leaves(found.standard_error)]
    error = np.abs(np.concatenate(sizes, 1) - np.diag(matrix) / n)
    covered = np.mean(error < 1.96 * np.concatenate(errors, 1), axis=1)
    assert 0.93 < covered.mean() < 0.97
    assert covered.std() / n**0.5 < 0.02 / 3


def test_exact_where_nothing_is_random(x64):
    """Batches have the weight of their rows, and the error of one sample is unknown."""

    def fun(w, x):
        return jnp.mean(jnp.sum(jnp.asarray(x) ** 2 * w**2, axis=1)) / 2

    batches, w = [x for x, _, _ in BATCHES], jnp.ones(4)
    found = ah.estimate_diagonal(fun, w, batches, ah.hutchinson(), rtol=0.1)
    assert found.n_samples == 3
    assert found.relative_error == 0
    np.testing.assert_allclose(found.mean, np.mean(X**2, axis=0), rtol=1e-12)
    np.testing.assert_allclose(found.standard_error, np.zeros(4))
    one = ah.estimate_diagonal(fun, w, batches, ah.hutchinson(), n_samples=1)
    np.testing.assert_allclose(one.mean, found.mean)
    assert np.isinf(one.standard_error).all()
    assert np.isinf(one.trace_standard_error)


def coupled(w, x):
    """A cheap function whose Hessian is not diagonal."""
    return jnp.mean(jnp.dot(jnp.asarray(x), w) ** 4)


COUPLED = coupled, np.ones(4, np.float32), [X[:4], X[4:8], X[7:]], ah.hutchinson()


@pytest.mark.parametrize("kind", at_once(["Auto", "Explicit", "NNX"], ["Auto"]))
def test_sharded_and_in_containers(kind):
    """Parameters and batches over a mesh, and in a Flax NNX state."""
    params = {"w": jnp.arange(1.0, 9.0), "b": jnp.ones(2)}
    batches = [jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32) for _ in range(2)]

    def fun(p, x):
        return jnp.mean((x * p["w"]).sum(1) ** 4) + jnp.sum(p["b"] ** 4)

    args = ah.hutchinson(), 4
    whole = ah.estimate_diagonal(fun, params, batches, args[0], n_samples=args[1])
    if kind == "NNX":
        nnx = pytest.importorskip("flax.nnx")
        params = nnx.State({k: nnx.Param(v) for k, v in params.items()})
        found = ah.estimate_diagonal(
            lambda p, x: fun({k: p[k][...] for k in p}, x),
            params,
            batches,
            args[0],
            n_samples=args[1],
        )
        top = ah.largest_eigenvalues(
            lambda p: fun({k: p[k][...] for k in p}, batches[0]), params
        )
        assert jax.tree.structure(top.vectors) == jax.tree.structure(params)
    else:
        if not hasattr(jax, "set_mesh"):
            pytest.skip("this version of JAX has no explicit sharding")
        mesh = jax.make_mesh((8,), ("x",), (getattr(jax.sharding.AxisType, kind),))
        cut, everywhere = (NamedSharding(mesh, spec) for spec in (P("x"), P()))
        with jax.set_mesh(mesh):
            params = jax.device_put(params, {"w": cut, "b": everywhere})
            batches = jax.device_put(batches, everywhere)
            found = ah.estimate_diagonal(
                fun, params, batches, args[0], n_samples=args[1]
            )
        assert found.mean["w"].sharding.is_equivalent_to(cut, 1)
    pairs = map(jax.tree.leaves, (found.mean, whole.mean))
    for x, y in zip(*pairs, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)


def test_masked_rows(x64):
    """A mean over rows that are there, said by a weight beside the loss."""

    def fun(w, batch):
        x, there = batch
        rows = jnp.sum(jnp.asarray(x) ** 2 * w**2, axis=1) / 2
        return jnp.sum(rows * there) / jnp.sum(there), jnp.sum(there)

    there = np.array([1.0, 1, 0, 1] + [0.0] * 4)  # no row of the second
    batches = [(X[:4], there[:4]), (X[4:8], there[4:])]
    found = ah.estimate_diagonal(
        fun, jnp.ones(4), batches, ah.hutchinson(), n_samples=2
    )
    expected = np.mean(X[:8][there > 0] ** 2, axis=0)
    np.testing.assert_allclose(found.mean, expected, rtol=1e-12)


def test_until_a_relative_error():
    args = COUPLED
    found = ah.estimate_diagonal(*args, rtol=0.3)
    assert found.relative_error <= 0.3
    before = ah.estimate_diagonal(*args, n_samples=found.n_samples - 1)
    assert before.relative_error > 0.3
    assert ah.estimate_diagonal(*args, n_samples=4, rtol=1e-6).n_samples == 4


def test_two_samples():
    """Their mean and its error, from one sample and the mean of both."""
    one, two = (ah.estimate_diagonal(*COUPLED, n_samples=n) for n in (1, 2))
    half = np.abs(np.asarray(two.mean - one.mean))
    np.testing.assert_allclose(two.standard_error, half, rtol=1e-4, atol=1e-6)
    half = abs(float(two.trace - one.trace))
    np.testing.assert_allclose(two.trace_standard_error, half, rtol=1e-4)


class Interrupting(list):
    """Batches during whose n-th delivery the user presses Ctrl-C, once or more."""

    def __init__(self, batches, n, times=1):
        super().__init__(batches)
        self.n, self.times = n, times

    def __iter__(self):
        for batch in super().__iter__():
            self.n -= 1
            for _ in range(self.times if self.n == 0 else 0):
                signal.raise_signal(signal.SIGINT)
            yield batch


@pytest.fixture
def interrupts():
    """Have them heard: a process in the background is started deaf to them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("n", at_once([1, 5, 6], [5]))
def test_interrupted_and_resumed(n):
    """Nothing is lost, and the end is the same to the last bit."""
    args = COUPLED
    whole = ah.estimate_diagonal(*args, n_samples=5, seed=1)
    handler = signal.getsignal(signal.SIGINT)
    with pytest.warns(UserWarning, match=f"after {(n - 1) // 3} samples and"):
        part = ah.estimate_diagonal(
            *args[:2], Interrupting(args[2], n), args[3], n_samples=5, seed=1
        )
    assert signal.getsignal(signal.SIGINT) is handler
    assert (part.n_samples, part.n_batches) == ((n - 1) // 3, (n - 1) % 3 + 1)
    stored = jax.tree.map(np.array, part)
    for start in (part, stored):  # as from a file
        ended = ah.estimate_diagonal(*args, n_samples=5, start=start)
        for x, y in zip(*map(jax.tree.leaves, (ended, whole)), strict=True):
            np.testing.assert_array_equal(x, y)
        jax.tree.map(np.asarray, part)  # is still there
    if part.n_batches > 1:
        rule = f"batches must be {part.n_batches} or more, as start was"
        with pytest.raises(ValueError, match=rule):
            ah.estimate_diagonal(*args[:2], [X], args[3], n_samples=5, start=part)


@pytest.mark.usefixtures("interrupts")
def test_a_second_interrupt_is_at_once():
    fun, w, batches, estimator = COUPLED
    batches = Interrupting(batches, 2, times=2)
    with pytest.raises(KeyboardInterrupt):
        ah.estimate_diagonal(fun, w, batches, estimator, n_samples=5)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Watching(list):
    """Batches that count, as each is taken, the arrays of a size that are alive."""

    def __init__(self, batches, size):
        super().__init__(batches)
        self.size, self.alive = size, set()

    def __iter__(self):
        for batch in super().__iter__():
            alive = [x for x in jax.live_arrays() if x.size == self.size]
            self.alive.add(len(alive))
            yield batch


def test_memory():
    """Three copies of the parameters, and none is copied where a batch is added."""
    params = {"w": jnp.ones((300, 200), jnp.bfloat16)}
    batches = Watching([jnp.ones(3)] * 2, 60_000)

    def fun(p, x):
        return jnp.sum(p["w"].astype(jnp.float32) ** 4) * x.mean()

    found = ah.estimate_diagonal(fun, params, batches, ah.hutchinson(), n_samples=3)
    assert batches.alive == {1 + 3}  # the parameters are one
    assert found.mean["w"].dtype == jnp.float32
    np.testing.assert_allclose(found.mean["w"], 12, rtol=1e-2)


def test_progress(capsys):
    ah.estimate_diagonal(*COUPLED, n_samples=3, progress=True)
    shown = capsys.readouterr().out
    assert "error" in shown
    assert "100%" in shown


GIVEN = {"fun": loss_fn, "params": PARAMS, "batches": BATCHES}
GIVEN |= {"estimator": ah.hutchinson(), "n_samples": 2}
BAD = {
    "n_samples or rtol must be given": {"n_samples": None},
    "batches must be a list or a data loader": {"batches": iter(BATCHES)},
    "batches must be 1 or more, got 0": {"batches": []},
    "batches must be a list or a data loader, to": {"batches": {"x": X}},
    "one has weight, and none a negative": {
        "fun": lambda p, batch: (loss_fn(p, batch), -1.0)
    },
    "weight must be what fun returns beside the loss": {
        "fun": lambda p, batch: (loss_fn(p, batch), {"accuracy": 1.0})
    },
    "fun must be of finite curvature": {
        "fun": lambda p, _: jnp.inf * p["a"].sum() ** 2
    },
    "batch must be arrays of one first axis": {"batches": [(X, Y, WHERE[:3])]},
    "batches must be rows of which one has weight": {
        "estimator": ah.gauss_newton(SOFTMAX),
        "fun": lambda p, batch: (predict(p, batch[0]), 0.0 * batch[2]),
    },
    "The curvature of .* depends on the labels": {
        "estimator": ah.gauss_newton(ROW),
        "fun": lambda p, batch: predict(p, batch[0]),
    },
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input(message):
    kinds = ("data loader", "fun returns")
    kind = TypeError if any(x in message for x in kinds) else ValueError
    with pytest.raises(kind, match=message):
        ah.estimate_diagonal(**{**GIVEN, **BAD[message]})


@pytest.mark.parametrize(
    "estimator",
    [
        ah.squared_gradient(),
        ah.in_eigenbasis(ah.gauss_newton(SOFTMAX)),
        ah.hutchinson(control_variate=ah.ema_control()),
        ah.hutchinson(control_variate=ah.low_rank_control(2)),
        ah.adahessian(0.1),
    ],
    ids=["squared", "turned", "ema", "low_rank", "optimizer"],
)
def test_estimators_whose_samples_are_not_independent(estimator):
    with pytest.raises(ValueError, match=r"estimator must be|ema_control needs"):
        ah.estimate_diagonal(**{**GIVEN, "estimator": estimator})
