# SPDX-License-Identifier: Apache-2.0
"""The formulas of the transformations and of the optimizers made of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from adahessian_jax import losses
from adahessian_jax._src.probes import normal_like
from adahessian_jax.transforms.adahessian import ScaleByAdaHessianState
from adahessian_jax.transforms.soap import scale_by_soap
from tests.problems import at_once, dense_ggn, quadratic

RNG = np.random.default_rng(0)
SLOW = pytest.mark.slow
X, Y = RNG.normal(size=(6, 3)), np.array([0, 1, 1, 0, 1, 0])
W = {"w": RNG.normal(size=(3, 2)), "b": RNG.normal(size=2)}
SOFTMAX = losses.softmax_cross_entropy


def predict(p, x=X):
    return jnp.dot(x, p["w"]) + p["b"]


def objective(p):
    return SOFTMAX(predict(p), Y)


def close(got, expected, rtol=1e-10, **options):
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=rtol, **options),
        got,
        expected,
    )


def steps_by_hand(
    gs, ds, due, b1=0.9, b2=0.999, eps=1e-8, power=1, order=2, clip=np.inf, reuse=False
):
    """Return the update of each step, for estimates that enter where due."""
    m, v, n, last, steps = 0.0, 0.0, 0, None, []
    for t, (g, d) in enumerate(zip(gs, ds, strict=True), start=1):
        m = b1 * m + (1 - b1) * g
        last = d if due[t - 1] else last
        if due[t - 1] or reuse:
            v, n = b2 * v + (1 - b2) * last**order, n + 1
        h = np.abs(v / (1 - b2**n)) ** (power / order)
        steps.append(np.clip(m / (1 - b1**t) / (h + eps), -clip, clip))
    return steps


FORMULAS = {
    "defaults": {},
    "rms": {"b1": 0.8, "b2": 0.9, "eps": 1e-2, "power": 0.3},
    "mean": {"b1": 0.8, "b2": 0.9, "eps": 1e-2, "power": 0.5, "order": 1},
    "clipped": {"b1": 0.5, "b2": 0.7, "order": 1, "clip": 0.2},
    "no memory": {"b1": 0.0, "b2": 0.0, "eps": 0.0},
}
SCHEDULES = {(1, 0): range(7), (3, 0): (0, 3, 6), (4, 2): (0, 1, 4), (9, 3): range(3)}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", FORMULAS)
def test_formula_and_schedule(name, jit):
    """Estimates alone move the average, and their number corrects its bias."""
    given = FORMULAS[name]
    gs, ds = RNG.normal(size=(2, 7, 5))
    names = {"power": "hessian_power", "clip": "clip_threshold"}
    options = {names.get(k, k): v for k, v in given.items() if k != "order"}
    options["hessian_ema"] = "mean" if given.get("order") == 1 else "rms"
    w = jnp.ones(5)
    for (interval, first), due in SCHEDULES.items():
        options |= {"update_interval": interval, "initial_refreshes": first}
        tx = ah.scale_by_adahessian(**options)
        update = jax.jit(tx.update) if jit else tx.update
        expected = steps_by_hand(gs, ds, [t in due for t in range(7)], **given)
        state = tx.init(w)
        for t in range(7):
            got, state = update(gs[t], state, w, hessian_diag=ds[t])
            np.testing.assert_allclose(got, expected[t], rtol=1e-12)
            counts = state.curvature.count, state.curvature.refreshes
            assert counts == (t + 1, len([s for s in due if s <= t]))


@pytest.mark.usefixtures("x64")
def test_davda54_feeds_the_last_estimate_to_the_average_on_every_update():
    gs, ds = RNG.normal(size=(2, 7, 5))
    tx, w = ah.published.davda54(1.0, update_each=3, eps=1e-2), jnp.ones(5)
    due, state = [t % 3 == 0 for t in range(7)], tx.init(w)
    for t, step in enumerate(steps_by_hand(gs, ds, due, eps=1e-2, reuse=True)):
        got, state = tx.update(gs[t], state, w, hessian_diag=ds[t])
        np.testing.assert_allclose(got, -step, rtol=1e-12)
        np.testing.assert_array_equal(state[0].curvature.estimate, ds[t - t % 3])


@pytest.mark.parametrize(
    "make", [ah.adahessian, ah.published.davda54], ids=["adahessian", "davda54"]
)
@pytest.mark.parametrize("interval", [1, 10])
def test_bias_is_that_of_the_estimates_there_were(make, interval):
    """Chosen on the host on every tenth step: gradient over curvature, here 1."""
    h, w = jnp.array([1.0, 100.0]), jnp.ones(2)
    name = "update_interval" if make is ah.adahessian else "update_each"
    tx = make(1.0, **({name: interval} if interval > 1 else {}))
    fused = ah.value_and_grad_with_curvature(lambda w: 0.5 * jnp.sum(h * w**2), tx)
    state = tx.init(w)

    @functools.partial(jax.jit, static_argnames="refresh")
    def step(state, refresh):
        _, grads, curvature = fused(w, state=state, refresh=refresh)
        return tx.update(grads, state, w, curvature=curvature)

    for t in range(30):
        updates, state = step(state, refresh=t % 10 == 0)
        np.testing.assert_allclose(updates, -1, rtol=1e-4)


@pytest.mark.usefixtures("x64")
def test_adahessian_decays_weights_before_the_rate():
    (params, loss), h = quadratic(diagonal=True)
    mask = {"a": True, "b": False}
    rate = optax.linear_schedule(0.1, 0.3, 2)
    tx = ah.adahessian(rate, eps=0.0, weight_decay=0.5, weight_decay_mask=mask)
    state = tx.init(params)
    for lr in (0.1, 0.2, 0.3):
        got, state = tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)
        signs = dict(zip("ab", np.split(np.sign(np.diag(h)), 2), strict=True))
        expected = {k: -lr * w * (signs[k] + 0.5 * mask[k]) for k, w in params.items()}
        close(got, expected, rtol=1e-6)  # optax has schedules in single precision


# Entries without an estimate, dtypes, averaging -------------------------------------


@pytest.mark.filterwarnings("ignore:The curvature of params")
@pytest.mark.parametrize("hessian_ema", ["rms", "mean"])
def test_an_entry_that_is_not_finite_changes_that_entry_alone(hessian_ema):
    """It keeps its average; before its first estimate its update is zero."""
    params = {"a": jnp.ones(2), "b": jnp.ones(2)}
    tx = ah.scale_by_adahessian(b2=0.9, hessian_ema=hessian_ema, clip_threshold=5.0)

    def run(bad):
        state, history = tx.init(params), []
        for t in range(6):
            first = bad if t in (0, 1, 4) else 2.0
            d = {"a": jnp.zeros(2), "b": jnp.array([first, 2.0])}
            updates, state = tx.update(params, state, params, hessian_diag=d)
            history.append(updates)
        return history, state

    (clean, state), (hurt, after) = run(2.0), run(jnp.nan)
    assert (state.curvature.nonfinite, after.curvature.nonfinite) == (0, 3)
    for t, (x, y) in enumerate(zip(clean, hurt, strict=True)):
        np.testing.assert_array_equal(x["a"], y["a"])
        np.testing.assert_array_equal(y["a"], 5)  # no curvature, and so the bound
        np.testing.assert_array_equal(x["b"][1], y["b"][1])
        np.testing.assert_allclose(y["b"][0], 0 if t < 2 else 0.5, rtol=1e-6)


def test_dtypes_and_leaves_without_derivatives_stay():
    half = jnp.array([1.0, 2], jnp.bfloat16)
    params = {"half": half, "none": None, "x": jnp.float32(3)}
    params |= {"empty": jnp.zeros((0, 3)), "n": jnp.array([5, 6])}

    def loss(p):
        return jnp.sum(p["half"].astype(jnp.float32) ** 3) + p["x"] ** 2

    def dtypes(tree):
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    options = {"mu_dtype": jnp.bfloat16, "nu_dtype": "float32"}
    for interval in (1, 2):
        tx = ah.scale_by_adahessian(update_interval=interval, **options)
        state, grads = tx.init(params), jax.grad(loss, allow_int=True)(params)
        updates, new = jax.jit(functools.partial(tx.update, obj_fn=loss))(
            grads, state, params
        )
        assert (dtypes(updates), dtypes(new)) == (dtypes(params), dtypes(state))
        kept = new.mu["x"].dtype, new.curvature.nu["half"].dtype
        assert kept == (jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(updates["n"], 0)
        np.testing.assert_allclose(np.float32(updates["half"]), [0.5, 1], rtol=0.01)


def test_half_precision_is_accumulated_in_single():
    tx = ah.scale_by_adahessian(eps=0.0, mu_dtype="float32", nu_dtype="float32")
    w = jnp.ones(2, jnp.bfloat16)
    d = jnp.full(2, 1.001, jnp.float32)  # not to be rounded on its way
    step = jax.jit(lambda s: tx.update(w, s, w, hessian_diag=d)[1])
    state = jax.lax.fori_loop(0, 1000, lambda _, s: step(s), tx.init(w))
    np.testing.assert_allclose(state.curvature.nu, 1.001**2, rtol=1e-4)


# SOAP -------------------------------------------------------------------------------


@SLOW
def test_soap_of_leaves_of_all_kinds():
    """In jit or not; what is not finite is in no basis, and bases stay orthogonal."""
    shapes = [(), (0,), (1,), (3,), (1, 2), (3, 2), (0, 2), (2, 2, 2), (2, 1, 2, 3, 2)]
    rng = np.random.default_rng(0)
    params = [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]
    params = {"floats": params, "none": None}
    tx = ah.published.soap(0.1, precondition_frequency=2, precondition_1d=True)
    whole = {"n": jnp.arange(3)}
    assert jax.tree.structure(optax.tree.map_params(tx, abs, tx.init(params))) == (
        jax.tree.structure(tx.init(params))
    )
    held, _ = scale_by_soap().update(whole, scale_by_soap().init(whole))
    np.testing.assert_array_equal(held["n"], 0)
    state, jitted = tx.init(params), jax.jit(tx.update)
    for t in range(6):
        key = jax.random.key(t)
        grads = params | {"floats": normal_like(key, params["floats"])}
        if t == 3:
            grads["floats"][5] = grads["floats"][5].at[0, 0].set(jnp.nan)
        expected, _ = jitted(grads, state, params)
        updates, state = tx.update(grads, state, params)
        close(updates, expected, rtol=1e-4, atol=1e-5)
        for u, g in zip(*map(jax.tree.leaves, (updates, grads)), strict=True):
            assert np.any(u != 0) == (t > 0 and u.size > 0)
            assert np.all(np.isfinite(u)) or np.shape(g) == (3, 2)
    for q in jax.tree.leaves(state[0].bases):
        np.testing.assert_allclose(q.T @ q, np.eye(len(q)), atol=1e-5)
    shapes_of = [tuple(q is not None for q in bases) for bases in state[0].bases]
    assert shapes_of[3] == (True,)
    assert shapes_of[4] == (False, True)
    assert shapes_of[8] == (True, False, True, True, True)


@pytest.mark.parametrize(
    "dtypes", [{}, {"mu_dtype": "float32"}, {"nu_dtype": "float32"}]
)
def test_averages_keep_their_dtypes_when_axes_turn(dtypes):
    tx = ah.soap(0.1, max_dim=4, n_vectors=2, **dtypes)
    w = {"w": jnp.ones((9, 3), jnp.bfloat16)}
    state = tx.init(w)
    _, after = jax.eval_shape(tx.update, w, state, w)
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


# newton -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"max_dim": 3, "n_vectors": 2}, pytest.param({}, marks=SLOW)], ids=str
)
def test_stacked_layers_are_separate_ones(options, x64):
    """Whether layers lie along leading axes or in a list, each has bases of its own."""
    rng, shape = np.random.default_rng(0), (2, 3)
    x = jnp.asarray(rng.normal(size=(16, 5)))
    first = {"w": rng.normal(size=(*shape, 5, 5)) / 2, "b": np.zeros((*shape, 5))}
    params = jax.tree.map(jnp.asarray, first)

    def predict(layers):
        h = x
        for layer in layers:
            h = jnp.tanh(h @ layer["w"] + layer["b"])
        return h

    def apart(p):
        return [jax.tree.map(lambda a, i=i: a[i], p) for i in np.ndindex(shape)]

    def train(p, predict, **more):
        tx = ah.newton(0.1, SOFTMAX, update_interval=2, **options, **more)
        state, step = tx.init(p), jax.jit(functools.partial(descend, tx, predict))
        for _ in range(6):
            p, state = step(p, state)
        return p

    def descend(tx, predict, p, state):
        labels = jnp.arange(16) % 5
        grads = jax.grad(lambda p: SOFTMAX(predict(p), labels))(p)
        updates, state = tx.update(grads, state, p, predict_fn=predict)
        return optax.apply_updates(p, updates), state

    expected = train(apart(params), predict)
    got = train(params, lambda p: predict(apart(p)), stacked=lambda path, leaf: 2)
    close(apart(got), expected, rtol=1e-6, atol=1e-9)
    other = train(params, lambda p: predict(apart(p)))
    assert np.abs(other["w"] - got["w"]).max() > 1e-3


MASK = {"w": True, "b": False}
RISING, FALLING = optax.linear_schedule(0.5, 1, 3), optax.linear_schedule(0.1, 0, 4)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("path", at_once(["predict_fn", "curvature"], ["curvature"]))
@pytest.mark.parametrize(
    ("rate", "schedule"), [(FALLING, None), (None, RISING)], ids=["rate", "own rate"]
)
def test_newton_is_the_chain_of_its_parts(rate, schedule, path):
    """With schedules and weight decay; without, see test_simple.py."""
    estimator = ah.in_eigenbasis(ah.gauss_newton(SOFTMAX))
    options = {"clip_threshold": 0.3, "update_interval": 20, "initial_refreshes": 10}
    options |= {"b1": 0.85, "nesterov": True}
    options |= {"b2": 0.9, "hessian_ema": "mean", "estimator": estimator}
    reference = optax.chain(
        ah.scale_by_adahessian(**options),
        optax.add_decayed_weights(0.1, MASK),
        optax.identity() if rate else ah.scale_by_quadratic_model(SOFTMAX),
        optax.scale_by_learning_rate(rate or schedule),
    )
    decay = {"weight_decay": 0.1, "weight_decay_mask": MASK}
    tx = ah.newton(rate, SOFTMAX, schedule=schedule, **decay)
    fused = ah.value_and_grad_with_curvature(lambda p: (objective(p), predict(p)), tx)

    @jax.jit
    def step(p, state, expected):
        extra, grads = {"predict_fn": predict}, jax.grad(objective)(p)
        by_parts = reference.update(grads, expected, p, grad=grads, **extra)
        if path == "curvature":
            _, grads, curvature = fused(p, state=state)
            extra = {"curvature": curvature} | ({} if rate else extra)
        return tx.update(grads, state, p, **extra), by_parts

    params, state, expected = W, tx.init(W), reference.init(W)
    for _ in range(4):
        (updates, state), (by_parts, expected) = step(params, state, expected)
        close(updates, by_parts, rtol=1e-8)
        params = optax.apply_updates(params, updates)
    assert objective(params) < objective(W)


def test_newton_takes_another_gradient():
    params = jax.tree.map(jnp.float32, W)
    grads = jax.tree.map(jnp.ones_like, params)
    double, tx = (
        functools.partial(jax.tree.map, lambda x: 2 * x),
        ah.newton(None, SOFTMAX),
    )
    args = {"predict_fn": lambda p: predict(p, jnp.asarray(X, jnp.float32))}
    one, _ = tx.update(grads, tx.init(params), params, **args)
    two, _ = tx.update(grads, tx.init(params), params, grad=double(grads), **args)
    close(two, double(one), rtol=1e-5)


@pytest.mark.usefixtures("x64")
@jax.numpy_dtype_promotion("standard")  # for optax
def test_soap_in_axes_that_do_not_turn_is_nadam():
    ours = ah.soap(RISING, max_dim=1, n_vectors=0, weight_decay=0.1)
    theirs = optax.nadamw(RISING, 0.85, 0.95, weight_decay=0.1)
    params, state, expected = W, ours.init(W), theirs.init(W)
    for _ in range(5):
        grads = jax.grad(objective)(params)
        updates, state = ours.update(grads, state, params)
        nadam, expected = theirs.update(grads, expected, params)
        close(updates, nadam, rtol=1e-10)
        params = optax.apply_updates(params, updates)


@pytest.mark.usefixtures("x64")
@jax.numpy_dtype_promotion("standard")  # for optax
def test_soap_finds_axes_that_adam_does_not_see():
    """Turning the parameters costs Adam 30 times its loss, and soap half of that."""
    rng = np.random.default_rng(3)
    left, right = (np.linalg.qr(rng.normal(size=(n, n)))[0] for n in (4, 3))
    a, b = np.diag([1.0, 5, 20, 80]), np.diag([1.0, 3, 9])
    target = rng.normal(size=(4, 3))

    def loss(w):  # with eigenvectors along the axes
        return jnp.sum((a @ (w - target) @ b) ** 2)

    def train(loss, w, tx):
        def step(carry, _):
            w, state = carry
            updates, state = tx.update(jax.grad(loss)(w), state, w)
            return (w + updates, state), loss(w)

        return jax.lax.scan(step, (w, tx.init(w)), length=150)[1]

    turned = lambda w: loss(left.T @ w @ right)  # noqa: E731
    tx, adam = ah.soap(0.03), optax.nadamw(0.03, 0.85, 0.95, weight_decay=0.0)
    start = jnp.zeros((4, 3))
    straight = train(loss, start, adam)[-1]
    lost = train(turned, start, adam)[-1]
    assert lost > 30 * straight
    assert train(turned, start, tx)[-1] < lost / 2


SHAPES = [(), (1,), (0, 3), (9, 2), (2, 3, 2), (2, 1, 2, 3, 2)]


@pytest.mark.parametrize("nan", [True, pytest.param(False, marks=SLOW)])
@pytest.mark.parametrize(
    "name", at_once(["soap", "newton", "own rate", "subspace"], ["soap", "subspace"])
)
@jax.numpy_dtype_promotion("standard")  # for optax, and integers
def test_turned_leaves_of_all_shapes(name, nan):
    """Also of integers, and none is turned by a gradient that is not finite."""
    params = start = [jnp.ones(s) for s in SHAPES] + [jnp.arange(2), optax.MaskedNode()]
    axes = {"max_dim": 4, "n_vectors": 3}
    tx = {
        "soap": lambda: ah.soap(0.1, **axes),
        "newton": lambda: ah.newton(0.1, SQUARES, **axes),
        "own rate": lambda: ah.newton(None, SQUARES, **axes),
        "subspace": lambda: ah.subspace_newton(SQUARES, **axes),
    }[name]()

    def predict_fn(params):
        floats = jax.tree.leaves(params)[:-1]
        return jnp.concatenate([jnp.ravel(x) + i for i, x in enumerate(floats)])[None]

    def grads_of(params):
        floats, ints = params[:-2], params[-2:]
        f = lambda x: jnp.sum(predict_fn([*x, *ints]) ** 2)  # noqa: E731
        return [*jax.grad(f)(floats), jnp.zeros_like(ints[0]), ints[1]]

    step = jax.jit(lambda g, s, p: tx.update(g, s, p, predict_fn=predict_fn))
    state = tx.init(params)
    for t in range(4):
        grads = grads_of(params)
        if nan and t == 1:
            _, state = step(jax.tree.map(lambda x: x * jnp.nan, grads), state, params)
            bases = jax.tree.leaves(state[0].curvature.estimator_state)
            assert all(bool(jnp.all(jnp.isfinite(x))) for x in bases)
            return
        updates, state = step(grads, state, params)
        params = optax.apply_updates(params, updates)
    assert all(bool(jnp.all(jnp.isfinite(x))) for x in jax.tree.leaves(params))
    assert jnp.sum(predict_fn(params) ** 2) < jnp.sum(predict_fn(start) ** 2)


@pytest.mark.parametrize("interval", [1, 20])
@pytest.mark.parametrize("axes_from", ["gradients", "factors"])
def test_a_group_without_parameters(axes_from, interval):
    """As where weight decay spares biases, and there are none."""
    estimator = ah.in_eigenbasis(ah.gauss_newton(SQUARES), axes_from=axes_from)
    options = {"estimator": estimator, "update_interval": interval}
    tx, w, x = ah.adahessian(0.1, **options), {"w": jnp.ones((3, 2))}, jnp.ones((4, 3))
    split = optax.partition({"decay": tx, "none": tx}, {"w": "decay"})

    def train(tx):
        args = {"predict_fn": ah.unmasked(lambda p: x @ p["w"], w)}
        step, state = jax.jit(lambda s: tx.update(w, s, w, **args)), tx.init(w)
        for _ in range(3):
            updates, state = step(state)
        return updates

    close(train(split), train(tx))


# The quadratic model ----------------------------------------------------------------


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("memory", [0, 2])
@pytest.mark.parametrize("sign", [1.0, -1.0], ids=["not turned", "turned"])
@pytest.mark.parametrize("loss", [SOFTMAX, SOFTMAX.replace(reduction="sum")], ids=repr)
def test_quadratic_model_is_that_of_the_dense_matrix(loss, sign, memory):
    """Whether updates have the gradient's sign or not, and with a where."""
    where = np.array([1.0, 0, 2, 1, 1, 0.5])
    of_outputs = functools.partial(loss, labels=Y, where=where)
    ggn = dense_ggn(lambda f: of_outputs(f), predict, W)
    options = {"decay": 0.8, "memory": memory}
    options["damping"] = 1.0 if memory else 0.0
    options["sign"] = int(sign) if memory else None  # said, or found out
    tx = ah.scale_by_quadratic_model(loss, 0.6, **options)
    n = 4 if memory else 1
    state, s, c = tx.init(W), np.zeros(n), np.zeros((n, n))
    update = jax.jit(
        lambda g, u, state: tx.update(
            u, state, W, grad=g, predict_fn=lambda p: (predict(p), where)
        )
    )
    flat = lambda tree: np.concatenate([np.ravel(tree[k]) for k in "bw"])  # noqa: E731
    steps = [0 * flat(W)] * 2
    for t in range(5):
        g = jax.tree.map(lambda x: RNG.normal(size=x.shape), W)
        u = jax.tree.map(lambda x: sign * (x + RNG.normal(size=x.shape) / 2), g)
        if t == 2:  # left out
            u = jax.tree.map(lambda x: x * np.nan, u)
        d = np.stack([flat(u), flat(g), *steps][:n])
        if t != 2:
            s = 0.8 * s + 0.2 * sign * d @ flat(g)
            c = 0.8 * c + 0.2 * d @ ggn @ d.T
        got, state = update(g, u, state)
        along, seen = np.zeros(n), np.flatnonzero(np.diag(c))  # not steps still to come
        damping = 0.5 ** (t - (t > 2)) if memory else 0
        ridge = damping * np.diag(np.diag(c))
        along[seen] = 0.6 * np.linalg.solve((c + ridge)[np.ix_(seen, seen)], s[seen])
        np.testing.assert_allclose(state.learning_rate, along[0], rtol=1e-6)
        assert (state.sign, np.sign(state.slope[0])) == (sign, sign)
        np.testing.assert_allclose(flat(got), along @ d, rtol=1e-6, atol=1e-8)
        steps = steps if t == 2 else [flat(got), steps[0]]


def test_where_a_model_has_no_minimum_the_step_is_along_the_update():
    """As where a loss of your own is not convex along the gradient."""
    loss = losses.of_row(lambda f: f[0] ** 2 - f[1] ** 2)
    tx, w = ah.scale_by_quadratic_model(loss, 1.0, decay=0.0, memory=1), jnp.ones(2)
    g, u, args = jnp.array([2.0, -2.0]), jnp.array([1.0, 0.0]), {"predict_fn": jnp.diag}
    updates, _ = tx.update(u, tx.init(w), w, grad=g, **args)
    np.testing.assert_allclose(updates, 2 * u, rtol=1e-6)  # a mean of 2 rows


@pytest.mark.usefixtures("x64")
def test_rate_and_momentum_are_conjugate_gradients():
    """On a quadratic function: its minimum in as many steps as it has eigenvalues."""
    rng = np.random.default_rng(5)
    turn = np.linalg.qr(rng.normal(size=(7, 7)))[0]
    rows = jnp.asarray(np.sqrt([1.0, 1, 3, 3, 10, 50, 50]))[:, None] * turn
    loss, w = losses.l2_loss.replace(reduction="sum"), jnp.ones(7)
    model = {"fraction": 1.0, "decay": 0.0, "memory": 1}
    tx = ah.scale_by_quadratic_model(loss, **model)

    @jax.jit
    def step(w, state):
        value, grads = jax.value_and_grad(lambda w: loss(rows @ w, 0 * w))(w)
        args = {"grad": grads, "predict_fn": lambda w: rows @ w}
        updates, state = tx.update(jax.tree.map(jnp.negative, grads), state, w, **args)
        return w + updates, state, value

    state, values = tx.init(w), []
    for _ in range(6):
        w, state, value = step(w, state)
        values.append(float(value))
    assert values[3] > 1e-6 * values[0]
    assert values[4] < 1e-10 * values[0]  # but for the ridge


def test_own_rate_never_climbs_where_decay_outweighs_the_gradient(x64):
    """Not at a minimum, and when the data change there it goes on."""
    x, w = jnp.asarray(X), jnp.arange(1.0, 4)[:, None]
    tx, start = ah.newton(None, losses.squared_error, weight_decay=0.01), w * (1 - 1e-5)

    def train(target):
        def step(carry, _):
            w, state = carry
            loss = lambda w: losses.squared_error(x @ w, x @ target)  # noqa: E731
            value, grads = jax.value_and_grad(loss)(w)
            updates, state = tx.update(grads, state, w, predict_fn=lambda w: x @ w)
            return (w + updates, state), value

        return jax.jit(lambda carry: jax.lax.scan(step, carry, length=30))

    carry, values = train(w)((start, tx.init(start)))
    assert values.max() == values[0]
    _, values = train(w[::-1])(carry)
    assert values[-1] < 1e-2 * values[0]


def test_no_curvature_along_the_updates_is_a_rate_of_zero_and_integers_stay():
    w = {"w": jnp.ones(2), "n": jnp.asarray(3)}
    tx = ah.scale_by_quadratic_model(losses.squared_error)
    got, state = tx.update(w, tx.init(w), w, grad=w, predict_fn=lambda p: 0 * p["w"])
    assert state.learning_rate == 0
    close(got, {"w": np.zeros(2), "n": 3})


@pytest.mark.parametrize("name", ["soap", "zack_dugue"])
def test_integers_do_not_decay(name):
    tx = getattr(ah.published, name)(0.1, **{"wd": 0.1} if name == "zack_dugue" else {})
    params = {"w": jnp.ones((3, 2)), "n": jnp.int32(100)}
    state = tx.init(params)

    def loss_fn(p):
        return jnp.sum(p["w"] ** 2) * p["n"]

    with jax.numpy_dtype_promotion("standard"):  # for the derivative in an integer
        for _ in range(3):
            grads = jax.grad(loss_fn, allow_int=True)(params)
            updates, state = tx.update(grads, state, params, obj_fn=loss_fn)
            params = optax.apply_updates(params, updates)
    assert params["n"] == 100
    assert params["w"].max() < 1


def test_states_are_those_that_are_documented():
    first, *_ = ah.newton(None, SOFTMAX).init({"w": jnp.ones(2)})
    assert isinstance(first, ScaleByAdaHessianState)
    assert np.all(first.curvature.nu["w"] == jnp.finfo("float32").max)


# Every estimator --------------------------------------------------------------------

SQUARES = losses.squared_error.replace(reduction="sum")
ESTIMATORS = {
    "hutchinson": ah.hutchinson(),
    "reverse": ah.hutchinson(mode="reverse-over-reverse"),
    "normal": ah.hutchinson(9, probe="normal"),
    "low rank": ah.hutchinson(2, control_variate=ah.low_rank_control(1)),
    "gauss_newton": ah.gauss_newton(SQUARES),
    "gauss_newton_2": ah.gauss_newton(SQUARES, n_samples=2),
    "in_eigenbasis": ah.in_eigenbasis(ah.gauss_newton(SQUARES)),
    "control": ah.hutchinson(control_variate=ah.gauss_newton_control(SQUARES)),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", at_once(ESTIMATORS, ["in_eigenbasis", "control"]))
def test_every_estimator(name):
    """Is the same under jit, and in any units; trees may have leaves of all kinds."""
    estimator = ESTIMATORS[name]

    def functions(loss_scale=1.0, unit=1.0, order="msn"):
        def outputs(p):
            units = dict.fromkeys("mszao", unit)  # not of "n", which stays
            parts = [jnp.sin(p[k].astype(float) / units.get(k, 1)) for k in order if p]
            leaves = map(jnp.ravel, parts)
            return loss_scale**0.5 * jnp.concatenate([jnp.ones(1), *leaves])

        if name == "control":
            return {"predict_fn": outputs, "labels": 0.0 * outputs(params)}

        def loss(p):
            return loss_scale * jnp.tanh(jnp.sum(outputs(p) ** 2) / loss_scale / 9)

        return {"obj_fn": loss, "predict_fn": outputs}

    def estimates(p, **options):
        step = jax.jit(functools.partial(estimator.update, **functions(**options)))
        state, diags = estimator.init(p), []
        for _ in range(2):
            diag, state = step(None, state, p)
            diags.append(diag)
        return diags

    params = {"m": jnp.asarray(X), "s": jnp.asarray(0.5), "n": jnp.arange(3), "o": None}
    tx = ah.scale_by_adahessian(estimator=estimator, eps=1.0)
    update = functools.partial(tx.update, **functions())
    grads = {**params, "n": jnp.zeros(3, int)}
    state = tx.init(params)
    updates, after = update(grads, state, params)
    close((updates, after), jax.jit(update)(grads, state, params), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(updates["n"], 0)
    assert updates["s"].shape == ()
    assert tx.update({}, tx.init({}), {}, **functions(order=""))[0] == {}
    expected = estimates(params)
    scaled = jax.tree.map(lambda x: x * (3.0 if x.dtype == float else 1), params)
    times = lambda c: jax.tree.map(lambda d: c * np.asarray(d), expected)  # noqa: E731
    close(estimates(params, loss_scale=4.0), times(4), rtol=1e-6, atol=1e-9)
    close(estimates(scaled, unit=3.0), times(1 / 9), rtol=1e-6, atol=1e-9)
    if "gauss_newton" in name or name == "in_eigenbasis":  # their signs are of outputs
        renamed = {{"m": "z", "s": "a"}.get(k, k): x for k, x in params.items()}
        for diag, of in zip(estimates(renamed, order="zan"), expected, strict=True):
            close((diag["z"], diag["a"]), (of["m"], of["s"]))


THROUGH = {
    "adahessian": lambda rate: ah.adahessian(rate, eps=1e-4),
    "square root": lambda rate: ah.adahessian(
        rate, eps=1e-4, hessian_ema="mean", hessian_power=0.5
    ),
    "soap": lambda rate: ah.soap(rate, turn_interval=2),
    "newton": lambda rate: ah.newton(rate, losses.l2_loss),
    "newton, own rate": lambda rate: ah.newton(
        None, losses.l2_loss, schedule=lambda count: 10 * rate
    ),
    "subspace": lambda rate: ah.subspace_newton(losses.l2_loss, eps=rate),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", THROUGH)
def test_derivatives_through_steps(name):
    """In the learning rate, where a row has neither gradient nor curvature."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(8, 4))).at[:, 0].set(0)
    start, y = (
        jnp.asarray(rng.normal(size=(4, 3))),
        jnp.asarray(rng.normal(size=(8, 3))),
    )

    def loss(w):
        return losses.l2_loss(jnp.tanh(x @ w), y)

    @jax.jit
    def final(rate):
        tx, w = THROUGH[name](rate), start
        tx = optax.with_extra_args_support(tx)
        state = tx.init(w)
        for _ in range(4):
            args = {"obj_fn": loss, "predict_fn": lambda w: jnp.tanh(x @ w)}
            updates, state = tx.update(jax.grad(loss)(w), state, w, **args)
            w = optax.apply_updates(w, updates)
        return loss(w)

    h = 1e-6
    expected = (final(0.05 + h) - final(0.05 - h)) / (2 * h)
    np.testing.assert_allclose(jax.grad(final)(0.05), expected, rtol=1e-4)
