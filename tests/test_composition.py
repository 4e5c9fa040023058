# SPDX-License-Identifier: Apache-2.0
"""Everything in optax that a transformation may be put inside, before or after.

Each row of the table in docs/composition.md names one of these tests.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import adahessian_jax as ah
from tests.problems import cross_entropy


@pytest.fixture(autouse=True)
def double_precision(x64):
    """So that the order of operations does not matter; optax's wrappers mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 5))
Y = RNG.integers(0, 3, size=24)
PARAMS = {
    "encoder": {"w": RNG.normal(size=(5, 4)), "b": RNG.normal(size=4)},
    "decoder": {"w": RNG.normal(size=(4, 3))},
}


def predict(params, x):
    hidden = jnp.tanh(jnp.dot(x, params["encoder"]["w"]) + params["encoder"]["b"])
    return jnp.dot(hidden, params["decoder"]["w"])


def loss_fn(params, x, y):
    return cross_entropy(predict(params, x), y)


def loss_and_outputs(params, x, y):
    outputs = predict(params, x)
    return cross_entropy(outputs, y), outputs


class Hutchinson:
    """How a loop calls update with Hutchinson's estimator."""

    def __init__(self, **options):
        self.estimator = ah.hutchinson(**options)

    def by_function(self, params, x, y):
        objective = ah.unmasked(lambda p: loss_fn(p, x, y), params)
        return jax.grad(loss_fn)(params, x, y), {"obj_fn": objective}

    def fused(self, params, x, y, state, refresh=None):
        fun = ah.value_and_grad_with_curvature(loss_fn, self.estimator)
        _, grads, curvature = fun(params, x, y, state=state, refresh=refresh)
        return grads, {"curvature": curvature}


class GaussNewton(Hutchinson):
    def __init__(self):
        self.estimator = ah.gauss_newton("softmax_cross_entropy")

    def by_function(self, params, x, y):
        outputs = ah.unmasked(lambda p: predict(p, x), params)
        return jax.grad(loss_fn)(params, x, y), {"predict_fn": outputs}

    def fused(self, params, x, y, state, refresh=None):
        fun = ah.value_and_grad_with_curvature(loss_and_outputs, self.estimator)
        _, grads, curvature = fun(params, x, y, state=state, refresh=refresh)
        return grads, {"curvature": curvature}


def steps_of(tx, path, method, jit):
    """Return a function of a step: (params, state, x, y) -> (updates, state)."""

    def step(params, state, x, y):
        if path == "fused":
            grads, extra_args = method.fused(params, x, y, state)
        else:
            grads, extra_args = method.by_function(params, x, y)
        return tx.update(grads, state, params, **extra_args)

    return jax.jit(step) if jit else step


def train(tx, path="obj_fn", method=None, *, jit=True, steps=4, batches=1):
    """Train; return the parameters after each step and the last state."""
    step = steps_of(tx, path, Hutchinson() if method is None else method, jit)
    params, state, history = PARAMS, tx.init(PARAMS), []
    size = len(X) // batches
    for t in range(steps):
        part = slice(size * (t % batches), size * (t % batches + 1))
        updates, state = step(params, state, X[part], Y[part])
        params = optax.apply_updates(params, updates)
        history.append(params)
    return history, state


def assert_close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-7, atol=1e-9)


def norm(tree):
    return jnp.linalg.norm(jax.flatten_util.ravel_pytree(tree)[0])


PATHS = pytest.mark.parametrize("path", ["obj_fn", "fused"])
JIT = pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
INTERVAL = pytest.mark.parametrize("interval", [1, 3])
JIT_AND_INTERVAL = pytest.mark.parametrize(
    ("jit", "interval"), [(True, 1), (True, 3), (False, 3)]
)


@PATHS
@JIT_AND_INTERVAL
def test_chain(interval, path, jit):
    """Clipping before and a schedule after, against the same by hand."""
    scale = ah.scale_by_adahessian(update_interval=interval)
    schedule = optax.linear_schedule(0.1, 0.01, 4)
    tx = optax.chain(
        optax.clip_by_global_norm(0.05), scale, optax.scale_by_learning_rate(schedule)
    )
    history, _ = train(tx, path, jit=jit)

    params, state = PARAMS, scale.init(PARAMS)
    for t, after in enumerate(history):
        grads, extra_args = Hutchinson().by_function(params, X, Y)
        assert norm(grads) > 0.05
        shrink = 0.05 / norm(grads)
        grads = jax.tree.map(lambda g, s=shrink: s * g, grads)
        updates, state = scale.update(grads, state, params, **extra_args)
        step = schedule(t)
        params = jax.tree.map(lambda p, u, s=step: p - s * u, params, updates)
        assert_close(after, params)


ENCODER_ONLY = {"encoder": True, "decoder": False}
LABELS = {"encoder": {"w": "curved", "b": "adam"}, "decoder": {"w": "curved"}}


def alone(tx, history, chosen, method=None):
    """Updates of some leaves, with the others held at where another run had them."""
    method = Hutchinson() if method is None else method
    params, results = PARAMS, []
    state = tx.init(chosen(PARAMS))
    for after in history:
        grads, extra_args = method.by_function(params, X, Y)
        updates, state = tx.update(
            chosen(grads),
            state,
            chosen(params),
            **{
                name: lambda part, fun=fun, params=params: fun(
                    chosen(params, replace=part)
                )
                for name, fun in extra_args.items()
            },
        )
        results.append(optax.apply_updates(chosen(params), updates))
        params = after
    return results


def only_encoder(params, replace=None):
    return params["encoder"] if replace is None else {**params, "encoder": replace}


def only_matrices(params, replace=None):
    if replace is None:
        return {"decoder": params["decoder"]["w"], "encoder": params["encoder"]["w"]}
    return {
        "encoder": {**params["encoder"], "w": replace["encoder"]},
        "decoder": {"w": replace["decoder"]},
    }


METHODS = pytest.mark.parametrize(
    "method", [Hutchinson(), GaussNewton()], ids=["hutchinson", "gauss-newton"]
)
METHODS_AND_INTERVALS = pytest.mark.parametrize(
    ("method", "interval"),
    [(Hutchinson(), 1), (GaussNewton(), 3)],
    ids=["hutchinson", "gauss-newton-every-3"],
)


@JIT
@PATHS
@METHODS_AND_INTERVALS
def test_masked(method, interval, path, jit):
    """AdaHessian for the encoder; the decoder's gradient is passed through."""
    ours = ah.adahessian(0.05, estimator=method.estimator, update_interval=interval)
    tx = optax.masked(ours, ENCODER_ONLY)
    step = steps_of(tx, path, method, jit)
    params, state, history = PARAMS, tx.init(PARAMS), []
    for _ in range(5):
        updates, state = step(params, state, X, Y)
        gradient = jax.grad(loss_fn)(params, X, Y)["decoder"]
        assert_close(updates["decoder"], gradient)
        params = optax.apply_updates(params, updates)
        history.append(params)
    expected = alone(ours, history, only_encoder, method)
    assert_close([p["encoder"] for p in history], expected)


@pytest.mark.parametrize("compatible", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_masked_with_an_estimate_of_ones_own(compatible, whole):
    """hessian_diag may be that of all parameters or masked like them."""
    tx = optax.masked(
        ah.adahessian(0.1), ENCODER_ONLY, mask_compatible_extra_args=compatible
    )
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    diag = ones if whole else {**ones, "decoder": optax.MaskedNode()}
    updates, _ = tx.update(ones, tx.init(PARAMS), PARAMS, hessian_diag=diag)
    assert_close(updates["encoder"]["b"], -0.1 * jnp.ones(4))


@JIT
@PATHS
@METHODS_AND_INTERVALS
def test_partition(method, interval, path, jit):
    """Part AdaHessian and part Adam, each as if the other's part were given."""
    ours = ah.adahessian(0.05, estimator=method.estimator, update_interval=interval)
    tx = optax.partition({"curved": ours, "adam": optax.adam(1e-2)}, LABELS)
    history, _ = train(tx, path, method, jit=jit)
    expected = alone(ours, history, only_matrices, method)
    assert_close([only_matrices(p) for p in history], expected)
    adam = optax.with_extra_args_support(optax.adam(1e-2))

    def bias(p, replace=None):
        return p["encoder"]["b"] if replace is None else p

    expected = alone(adam, history, bias)
    assert_close([bias(p) for p in history], expected)


@JIT
@pytest.mark.parametrize("intervals", [(1, 1), (2, 3)])
def test_partition_into_groups_of_adahessian(intervals, jit):
    """Groups with settings of their own, by obj_fn: each has a product of its own."""
    groups = {
        "encoder": ah.adahessian(0.05, b2=0.9, update_interval=intervals[0]),
        "decoder": ah.adahessian(0.02, weight_decay=0.1, update_interval=intervals[1]),
    }
    labels = {"encoder": "encoder", "decoder": "decoder"}
    history, _ = train(optax.partition(groups, labels), "obj_fn", jit=jit)
    for name in groups:

        def chosen(params, replace=None, name=name):
            return params[name] if replace is None else {**params, name: replace}

        expected = alone(groups[name], history, chosen)
        assert_close([p[name] for p in history], expected)


@JIT
@pytest.mark.parametrize("refresh", [None, True])
@pytest.mark.parametrize("intervals", [(1, 1), (2, 2), (1, 3), (2, 3)])
def test_groups_of_adahessian_share_a_fused_estimate(intervals, refresh, jit):
    """One product serves all groups, and each takes it when it is due."""
    groups = {
        "encoder": ah.adahessian(0.05, b2=0.9, update_interval=intervals[0]),
        "decoder": ah.adahessian(0.02, update_interval=intervals[1]),
    }
    tx = optax.partition(groups, {"encoder": "encoder", "decoder": "decoder"})
    fun = ah.value_and_grad_with_curvature(loss_fn, ah.hutchinson())
    estimator = ah.hutchinson()

    def step(params, state):
        _, grads, curvature = fun(params, X, Y, state=state, refresh=refresh)
        return tx.update(grads, state, params, curvature=curvature)

    step = jax.jit(step) if jit else step
    params, state = PARAMS, tx.init(PARAMS)
    # By hand: the same estimates of the whole, drawn when one group needs one.
    own = {name: group.init(PARAMS[name]) for name, group in groups.items()}
    probes = estimator.init(PARAMS)
    for t in range(7):
        due = [refresh or t % k == 0 for k in intervals]
        grads = jax.grad(loss_fn)(params, X, Y)
        diag = None
        if any(due):
            diag, probes = estimator.update(
                None, probes, params, obj_fn=lambda p: loss_fn(p, X, Y)
            )
        expected = {}
        for (name, group), now in zip(groups.items(), due, strict=True):
            inner = own[name]
            curvature = ah.Curvature(
                diag[name] if now else None,
                inner[0].estimator_state,
                inner[0].count,
                None,
            )
            expected[name], own[name] = group.update(
                grads[name], inner, params[name], curvature=curvature
            )
        updates, state = step(params, state)
        assert_close(updates, expected)
        params = optax.apply_updates(params, updates)


def test_low_rank_states_of_groups_cannot_share_an_estimate():
    estimator = ah.hutchinson(control_variate=ah.low_rank_control(2))
    tx = optax.partition(
        {name: ah.adahessian(0.1, estimator=estimator) for name in PARAMS},
        {name: name for name in PARAMS},
    )
    fun = ah.value_and_grad_with_curvature(loss_fn, estimator)
    with pytest.raises(ValueError, match="another estimator"):
        fun(PARAMS, X, Y, state=tx.init(PARAMS))


@PATHS
def test_low_rank_control_of_a_part(path):
    method = Hutchinson(control_variate=ah.low_rank_control(2))
    ours = ah.adahessian(0.05, estimator=method.estimator)
    tx = optax.masked(ours, ENCODER_ONLY)
    history, _ = train(tx, path, method)
    expected = alone(ours, history, only_encoder, method)
    assert_close([p["encoder"] for p in history], expected)


@JIT
@PATHS
@pytest.mark.parametrize("wrapper", ["freeze", "selective_transform"])
def test_frozen(wrapper, path, jit):
    mask = {"encoder": {"w": False, "b": False}, "decoder": {"w": True}}
    ours = ah.adahessian(0.05, update_interval=2)
    if not hasattr(optax, wrapper):
        pytest.skip("came with optax 0.2.6")
    if wrapper == "freeze":
        tx = optax.chain(ours, optax.freeze(mask))
        expected, _ = train(ours, path, steps=1)
    else:
        tx = optax.selective_transform(ours, freeze_mask=mask)
        expected = None
    history, _ = train(tx, path, jit=jit)
    for p in history:
        chex.assert_trees_all_equal(p["decoder"], PARAMS["decoder"])
    if expected is None:  # the frozen take no part in the product
        expected = alone(ours, history, only_encoder)
        assert_close([p["encoder"] for p in history], expected)
    else:
        assert_close(history[0]["encoder"], expected[0]["encoder"])


@PATHS
def test_integers_beside_masks(path):
    """A leaf that is not floating point and masked ones in the same tree."""
    params = {**PARAMS, "n": jnp.asarray(2), "nothing": None}
    mask = {"encoder": True, "decoder": False, "n": True, "nothing": None}
    tx = optax.masked(ah.adahessian(0.1), mask)
    estimator = ah.hutchinson()

    def loss(p):
        return loss_fn(p, X, Y) * p["n"]

    state = tx.init(params)
    if path == "fused":
        fun = ah.value_and_grad_with_curvature(loss, estimator)
        _, grads, curvature = fun(params, state=state)
        updates, _ = tx.update(grads, state, params, curvature=curvature)
    else:
        grads = {**jax.grad(lambda p: loss({**p, "n": 2}))(PARAMS), "n": jnp.array(0)}
        grads["nothing"] = None
        updates, _ = tx.update(grads, state, params, obj_fn=ah.unmasked(loss, params))
    assert updates["n"] == 0
    assert updates["nothing"] is None
    double = optax.masked(ah.adahessian(0.1), ENCODER_ONLY)
    expected, _ = double.update(
        jax.grad(lambda p: 2 * loss_fn(p, X, Y))(PARAMS),
        double.init(PARAMS),
        PARAMS,
        obj_fn=ah.unmasked(lambda p: 2 * loss_fn(p, X, Y), PARAMS),
    )
    assert_close(updates["encoder"], expected["encoder"])


def test_a_function_that_fails_on_masks_says_what_to_do():
    tx = optax.masked(ah.adahessian(0.1), ENCODER_ONLY)
    with pytest.raises(TypeError) as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, obj_fn=lambda p: loss_fn(p, X, Y))
    assert (
        "obj_fn was called with optax.MaskedNode in place of the parameters that"
        " optax.masked, partition or selective_transform leaves to others. If it needs"
        " all of them: tx.update(..., obj_fn=adahessian_jax.unmasked(obj_fn, params))."
    ) in error.value.__notes__
    tx = optax.masked(
        ah.adahessian(0.1, estimator=GaussNewton().estimator), ENCODER_ONLY
    )
    with pytest.raises(TypeError) as error:
        tx.update(PARAMS, tx.init(PARAMS), PARAMS, predict_fn=lambda p: predict(p, X))
    assert "predict_fn=adahessian_jax.unmasked" in error.value.__notes__[0]


@JIT
@PATHS
@METHODS
def test_multi_steps(method, path, jit):
    """Gradients of two parts are averaged; the curvature is that of the last."""
    ours = ah.adahessian(0.05, estimator=method.estimator)
    tx = optax.MultiSteps(ours, 2)
    history, _ = train(tx, path, method, jit=jit, batches=2)
    params, state = PARAMS, ours.init(PARAMS)
    for between, after in zip(history[::2], history[1::2], strict=True):
        assert_close(between, params)
        grads = jax.grad(loss_fn)(params, X, Y)
        _, extra_args = method.by_function(params, X[12:], Y[12:])
        updates, state = ours.update(grads, state, params, **extra_args)
        params = optax.apply_updates(params, updates)
        assert_close(after, params)


@PATHS
@JIT_AND_INTERVAL
def test_inject_hyperparams(interval, path, jit):
    """All floats are traced, and one that is changed takes effect."""
    floats = {
        "b1": 0.8,
        "b2": 0.95,
        "eps": 1e-4,
        "hessian_power": 0.9,
        "relative_damping": 0.01,
        "weight_decay": 0.1,
    }
    tx = optax.inject_hyperparams(ah.adahessian)(
        optax.linear_schedule(0.1, 0.01, 4), **floats, update_interval=interval
    )
    plain = ah.adahessian(
        optax.linear_schedule(0.1, 0.01, 4), **floats, update_interval=interval
    )
    history, state = train(tx, path, jit=jit)
    assert_close(history, train(plain, path)[0])
    assert set(floats) < set(state.hyperparams)
    step = steps_of(tx, path, Hutchinson(), jit=True)
    for name in floats:
        changed = state._replace(
            hyperparams={**state.hyperparams, name: 0.5 * state.hyperparams[name]}
        )
        a, _ = step(history[-1], state, X, Y)
        b, _ = step(history[-1], changed, X, Y)
        assert norm(jax.tree.map(jnp.subtract, a, b)) > 1e-7, name


@PATHS
@JIT_AND_INTERVAL
def test_apply_if_finite(interval, path, jit):
    ours = ah.adahessian(0.05, update_interval=interval)
    tx = optax.apply_if_finite(ours, max_consecutive_errors=2)
    step = steps_of(tx, path, Hutchinson(), jit)
    updates, state = step(PARAMS, tx.init(PARAMS), X, Y)
    params = optax.apply_updates(PARAMS, updates)
    bad = np.where(np.arange(5) == 0, np.nan, X)
    updates, after = step(params, state, bad, Y)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    updates, _ = step(params, after, X, Y)
    history, _ = train(ours, path, jit=jit, steps=2)
    assert_close(optax.apply_updates(params, updates), history[1])


@JIT
@PATHS
def test_schedule_free(path, jit):
    """Against the algorithm written out."""
    ours = ah.adahessian(0.05, b1=0.0)
    tx = optax.contrib.schedule_free(ours, learning_rate=0.05, b1=0.9)
    history, _ = train(tx, path, jit=jit)
    y, z, x, state = PARAMS, PARAMS, PARAMS, ours.init(PARAMS)
    for t, after in enumerate(history):
        grads, extra_args = Hutchinson().by_function(y, X, Y)
        updates, state = ours.update(grads, state, y, **extra_args)
        z = optax.apply_updates(z, updates)
        x = jax.tree.map(lambda x, z, c=1 / (t + 1): (1 - c) * x + c * z, x, z)
        y = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, x, z)
        assert_close(after, y)


@JIT
@PATHS
def test_backtracking_line_search(path, jit):
    """Steps that are far too long are shortened; value_fn gets our arguments too."""
    ours = ah.adahessian(50.0)

    def value_fn(params, obj_fn=None, curvature=None):
        return loss_fn(params, X, Y)

    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=40)
    tx = optax.chain(ours, search)
    method = Hutchinson()

    def step(params, state):
        if path == "fused":
            grads, extra_args = method.fused(params, X, Y, state)
        else:
            grads, extra_args = method.by_function(params, X, Y)
        value = loss_fn(params, X, Y)
        updates, state = tx.update(
            grads,
            state,
            params,
            value=value,
            grad=grads,
            value_fn=value_fn,
            **extra_args,
        )
        return updates, state, value

    step = jax.jit(step) if jit else step
    params, state, values = PARAMS, tx.init(PARAMS), []
    alone, _ = train(ours, path, steps=1)
    assert loss_fn(alone[0], X, Y) > loss_fn(PARAMS, X, Y)
    for _ in range(8):
        updates, state, value = step(params, state)
        params = optax.apply_updates(params, updates)
        values.append(value)
    assert np.all(np.diff(values) < 0)


@PATHS
@INTERVAL
def test_vmap_over_an_ensemble(interval, path):
    """Members have keys of their own, and each goes as it would alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    tx = ah.adahessian(0.05, update_interval=interval)
    members = jax.vmap(
        lambda k: jax.tree.map(
            lambda p: p + 0.1 * jax.random.normal(k, p.shape), PARAMS
        )
    )(keys)

    def init(params, key):
        estimator = ah.hutchinson(seed=key)
        member = ah.adahessian(0.05, update_interval=interval, estimator=estimator)
        return member.init(params)

    method = Hutchinson()
    step = steps_of(tx, path, method, jit=False)
    params, state = members, jax.vmap(init)(members, keys)
    seen = state[0].estimator_state.key
    assert len(np.unique(jax.random.key_data(seen), axis=0)) == 3
    together = jax.jit(jax.vmap(step, in_axes=(0, 0, None, None)))
    for _ in range(4):
        updates, state = together(params, state, X, Y)
        params = optax.apply_updates(params, updates)
    for i, key in enumerate(keys):
        own = jax.tree.map(lambda p, i=i: p[i], members)
        own_state = init(own, key)
        for _ in range(4):
            updates, own_state = step(own, own_state, X, Y)
            own = optax.apply_updates(own, updates)
        assert_close(jax.tree.map(lambda p, i=i: p[i], params), own)


@PATHS
@METHODS_AND_INTERVALS
def test_scan_over_steps(method, interval, path):
    tx = ah.adahessian(0.05, estimator=method.estimator, update_interval=interval)
    step = steps_of(tx, path, method, jit=False)

    @jax.jit
    def many(params, state):
        def body(carry, _):
            params, state = carry
            updates, state = step(params, state, X, Y)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        return jax.lax.scan(body, (params, state), length=4)

    (_, state), history = many(PARAMS, tx.init(PARAMS))
    expected, expected_state = train(tx, path, method)
    assert_close(
        [jax.tree.map(lambda p, t=t: p[t], history) for t in range(4)], expected
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)


def scanned_network(scan, remat, dtype=float):
    """A stack of convolutions, as a loop or as a scan, rematerialised or not."""
    rng = np.random.default_rng(1)
    kernels = jnp.asarray(0.3 * rng.normal(size=(3, 3, 3, 2, 2)), dtype)
    image = jnp.asarray(rng.normal(size=(4, 6, 6, 2)), dtype)

    def layer(h, kernel):
        out = jax.lax.conv_general_dilated(
            h, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jnp.tanh(out), None

    layer = jax.checkpoint(layer) if remat else layer

    def loss(params):
        h = image
        if scan:
            h, _ = jax.lax.scan(layer, h, params["conv"])
        else:
            for kernel in params["conv"]:
                h, _ = layer(h, kernel)
        return jnp.mean(h**2)

    return {"conv": kernels}, loss


@JIT
@PATHS
@pytest.mark.parametrize("scan", [False, True], ids=["loop", "scan"])
def test_checkpoint_and_scanned_layers(scan, path, jit):
    """jax.checkpoint and a scan over layers change neither estimate nor average."""
    rule = ah.conv_spatial_average(spatial_ndim=2)
    tx = ah.adahessian(0.05, averaging=rule)
    results = []
    for network in ((False, False), (scan, True)):
        params, loss = scanned_network(*network)
        fun = ah.value_and_grad_with_curvature(loss, ah.hutchinson())

        def step(params, state, loss=loss, fun=fun):
            if path == "fused":
                _, grads, curvature = fun(params, state=state)
                return tx.update(grads, state, params, curvature=curvature)
            return tx.update(jax.grad(loss)(params), state, params, obj_fn=loss)

        step = jax.jit(step) if jit else step
        state = tx.init(params)
        assert state[0].nu["conv"].shape == (3, 1, 1, 2, 2)
        for _ in range(3):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        results.append(params)
    assert_close(*results)


@PATHS
@METHODS
def test_ahead_of_time_compilation(method, path):
    tx = ah.adahessian(0.05, estimator=method.estimator, update_interval=2)
    step = steps_of(tx, path, method, jit=True)
    state = tx.init(PARAMS)
    compiled = step.lower(PARAMS, state, X, Y).compile()
    params = PARAMS
    for _ in range(3):
        updates, state = compiled(params, state, X, Y)
        params = optax.apply_updates(params, updates)
    assert_close(params, train(tx, path, method, steps=3)[0][-1])


@PATHS
def test_export(path):
    """A step as StableHLO: optax's states are passed as a list of their leaves."""
    tx = ah.adahessian(0.05, update_interval=2)
    state = tx.init(PARAMS)
    treedef = jax.tree.structure(state)
    step = steps_of(tx, path, Hutchinson(), jit=False)

    def flat_step(params, leaves, x, y):
        updates, state = step(params, jax.tree.unflatten(treedef, leaves), x, y)
        return updates, jax.tree.leaves(state)

    leaves = jax.tree.leaves(state)
    exported = export.export(jax.jit(flat_step))(PARAMS, leaves, X, Y)
    loaded = export.deserialize(exported.serialize())
    params = PARAMS
    for _ in range(3):
        updates, leaves = loaded.call(params, leaves, X, Y)
        params = optax.apply_updates(params, updates)
    assert_close(params, train(tx, path, steps=3)[0][-1])


@PATHS
@pytest.mark.parametrize("donate", [False, True])
def test_donation(path, donate):
    """A step that owns its arguments gives the same and deletes them."""
    tx = ah.adahessian(0.05, update_interval=2)
    step = steps_of(tx, path, Hutchinson(), jit=False)

    def whole_step(params, state, x, y):
        updates, state = step(params, state, x, y)
        return optax.apply_updates(params, updates), state

    whole_step = jax.jit(whole_step, donate_argnums=(0, 1) if donate else ())
    params = jax.tree.map(jnp.copy, PARAMS)
    state = tx.init(params)
    old = jax.tree.leaves((params, state))
    for _ in range(3):
        params, state = whole_step(params, state, X, Y)
    assert all(x.is_deleted() == donate for x in old)
    assert_close(params, train(tx, path, steps=3)[0][-1])
