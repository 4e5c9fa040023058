# SPDX-License-Identifier: Apache-2.0
"""What in optax and JAX a transformation may be put inside or beside.

Chains, MultiSteps and apply_if_finite are in test_between_features.py, containers and
devices in files of their own: together the rows of the table in docs/composition.md.
"""

import functools
import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import adahessian_jax as ah


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
LOSS = ah.losses.softmax_cross_entropy


def predict(params, x=X):
    hidden = jnp.tanh(jnp.dot(x, params["encoder"]["w"]) + params["encoder"]["b"])
    return jnp.dot(hidden, params["decoder"]["w"])


def loss_fn(params, x=X, y=Y):
    return LOSS(predict(params, x), y)


def loss_and_outputs(params, x, y):
    outputs = predict(params, x)
    return LOSS(outputs, y), outputs


def newton(rate=0.05, **options):
    return ah.newton(rate, LOSS, update_interval=3, initial_refreshes=1, **options)


def adahessian(rate=0.05, interval=1, **options):
    return ah.adahessian(rate, update_interval=interval, **options)


def extra_args(params, x=X, y=Y):
    """Both functions that an estimator may need, made whole where they are masked."""
    return {
        "obj_fn": ah.unmasked(lambda p: loss_fn(p, x, y), params),
        "predict_fn": ah.unmasked(lambda p: predict(p, x), params),
    }


def make_step(tx, path):
    """Return ``(params, state, x, y) -> (params, state)``."""
    wants_outputs = path == "fused-outputs"
    fused = ah.value_and_grad_with_curvature(
        loss_and_outputs if wants_outputs else loss_fn, tx
    )

    def step(params, state, x=X, y=Y):
        grads, extra = jax.grad(loss_fn)(params, x, y), extra_args(params, x, y)
        if path != "function":
            _, grads, curvature = fused(params, x, y, state=state)
            extra = {"curvature": curvature}
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    return step


def train(tx, path="function", steps=4):
    """Train; return the parameters after each step and the last state."""
    step = jax.jit(make_step(tx, path))
    params, state, history = PARAMS, tx.init(PARAMS), []
    for _ in range(steps):
        params, state = step(params, state)
        history.append(params)
    return history, state


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-7, atol=1e-9)
WAYS = {
    "adahessian": (adahessian, "function"),
    "adahessian-every-3-fused": (functools.partial(adahessian, interval=3), "fused"),
    "newton": (newton, "function"),
    "newton-fused": (newton, "fused-outputs"),
}


ENCODER_ONLY = {"encoder": True, "decoder": False}
FROZEN = {"encoder": {"w": False, "b": False}, "decoder": {"w": True}}
LABELS = {"encoder": {"w": "curved", "b": "adam"}, "decoder": {"w": "curved"}}


def matrices(params, replace=None):
    if replace is None:
        return {"decoder": params["decoder"]["w"], "encoder": params["encoder"]["w"]}
    encoder = params["encoder"] | {"w": replace["encoder"]}
    return {"encoder": encoder, "decoder": {"w": replace["decoder"]}}


def bias(params, replace=None):
    return params["encoder"]["b"] if replace is None else None


def part(name):
    """Return a function that picks one part of the parameters, or puts one in."""
    return lambda params, replace=None: (
        params[name] if replace is None else params | {name: replace}
    )


def assert_trained_alone(tx, history, chosen):
    """Some leaves went as if the others were given, where another run had them."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        functions = {
            name: lambda own, f=f: f(chosen(params, own))
            for name, f in (("obj_fn", loss_fn), ("predict_fn", predict))
        }
        grads = chosen(jax.grad(loss_fn)(params))
        updates, state = tx.update(grads, state, chosen(params), **functions)
        return optax.apply_updates(chosen(params), updates), state

    params, state = PARAMS, tx.init(chosen(PARAMS))
    for after in history:
        expected, state = step(params, state)
        assert_close(chosen(after), expected, rtol=1e-5)
        params = after


@pytest.mark.parametrize(
    ("wrapper", "way"),
    [
        ("masked", "adahessian"),
        ("masked", "newton-fused"),
        ("partition", "adahessian-every-3-fused"),
        ("partition", "newton"),
        ("selective_transform", "newton-fused"),
        ("freeze", "newton-fused"),
    ],
)
def test_a_part_of_the_parameters(wrapper, way):
    """The optimizer's part goes as if the rest were given; the rest as it should."""
    make, path = WAYS[way]
    ours, chosen = make(), part("encoder")
    if wrapper == "masked":
        rest = optax.masked(optax.scale(-0.1), {"encoder": False, "decoder": True})
        tx = optax.chain(optax.masked(ours, ENCODER_ONLY), rest)
    elif wrapper == "partition":
        tx = optax.partition({"curved": ours, "adam": optax.adam(1e-2)}, LABELS)
        chosen = matrices
    elif not hasattr(optax, wrapper):
        pytest.skip("came with optax 0.2.6")
    elif wrapper == "freeze":
        tx = optax.chain(ours, optax.freeze(FROZEN))
    else:
        tx = optax.selective_transform(ours, freeze_mask=FROZEN)
    history, _ = train(tx, path)
    if wrapper == "freeze":  # the frozen take part in the estimate
        assert_close(*(p[0]["encoder"] for p in (history, train(ours, path, 1)[0])))
    else:
        assert_trained_alone(ours, history, chosen)
    if wrapper == "partition":
        assert_trained_alone(optax.adam(1e-2), history, bias)
    elif wrapper == "masked":
        assert_trained_alone(optax.sgd(0.1), history, part("decoder"))
    else:
        chex.assert_trees_all_equal(history[-1]["decoder"], PARAMS["decoder"])


def test_groups_of_adahessian():
    """By obj_fn each makes estimates of its own; in the fused path they share one."""
    intervals = (2, 3)
    groups = {
        "encoder": adahessian(0.05, 2, b2=0.9),
        "decoder": adahessian(0.02, 3, weight_decay=0.1),
    }
    tx = optax.partition(groups, {name: name for name in groups})
    history, _ = train(tx)
    for name, group in groups.items():
        assert_trained_alone(group, history, part(name))
    # By hand: the same estimates of the whole, drawn when one group needs one.
    history, _ = train(tx, "fused", 7)
    estimator = ah.hutchinson()
    own = {name: group.init(PARAMS[name]) for name, group in groups.items()}
    draw = jax.jit(lambda s, p: estimator.update(None, s, p, obj_fn=loss_fn))
    params, probes = PARAMS, estimator.init(PARAMS)
    for t, after in enumerate(history):
        due = [t % k == 0 for k in intervals]
        if any(due):
            diag, probes = draw(probes, params)
        grads, expected = jax.grad(loss_fn)(params), {}
        for name, group in groups.items():
            updates, own[name] = group.update(
                grads[name], own[name], params[name], hessian_diag=diag[name]
            )
            expected[name] = optax.apply_updates(params[name], updates)
        assert_close(after, expected)
        params = after


def test_masks_and_leaves_of_all_kinds():
    """Integers, None, masks, an own estimate of all or of a part, and what fails."""
    params = PARAMS | {"n": jnp.asarray(2), "nothing": None, "empty": jnp.zeros((0, 3))}
    params["scalar"] = jnp.asarray(0.5)
    mask = jax.tree.map(lambda x: True, params) | {"decoder": False}
    tx = optax.masked(adahessian(), mask)

    def loss(p):
        return loss_fn(p) * p["n"] + p["scalar"] ** 2 + jnp.sum(p["empty"])

    value_and_grad = ah.value_and_grad_with_curvature(loss, tx)
    state = tx.init(params)
    _, grads, curvature = jax.jit(lambda: value_and_grad(params, state=state))()
    for extra in ({"curvature": curvature}, {"obj_fn": ah.unmasked(loss, params)}):
        updates, _ = jax.jit(lambda e=extra: tx.update(grads, state, params, **e))()
        assert (updates["n"], updates["nothing"]) == (0, None)
        assert_close(updates["scalar"], -0.05 * 1.0 / 2)
        signs = jax.tree.map(jnp.sign, (grads["encoder"], updates["encoder"]))
        chex.assert_trees_all_equal(signs[0], jax.tree.map(jnp.negative, signs[1]))
    ones = jax.tree.map(jnp.ones_like, PARAMS)
    for compatible in (False, True):
        tx = optax.masked(
            adahessian(), ENCODER_ONLY, mask_compatible_extra_args=compatible
        )
        for diag in (ones, ones | {"decoder": optax.MaskedNode()}):
            updates, _ = tx.update(ones, tx.init(PARAMS), PARAMS, hessian_diag=diag)
            assert_close(updates["encoder"]["b"], -0.05 * jnp.ones(4))
    for make, name in ((adahessian, "obj_fn"), (newton, "predict_fn")):
        tx = optax.masked(make(), ENCODER_ONLY)
        function = {"obj_fn": loss_fn, "predict_fn": predict}[name]
        with pytest.raises(TypeError) as error:
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, **{name: function})
        advice = f"tx.update(..., {name}=adahessian_jax.unmasked({name}, params))."
        assert advice in error.value.__notes__[0]


FLOATS = {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "weight_decay": 0.1}


@pytest.mark.parametrize(
    ("make", "floats"),
    [
        (ah.adahessian, FLOATS | {"hessian_power": 0.9}),
        (functools.partial(ah.newton, loss=LOSS), FLOATS | {"clip_threshold": 0.3}),
    ],
    ids=["adahessian", "newton"],
)
@pytest.mark.parametrize("interval", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_inject_hyperparams(make, floats, interval):
    """All floats are traced, and one that is changed takes effect."""
    schedule = optax.linear_schedule(0.1, 0.01, 4)
    options = floats | {"update_interval": interval}
    static = {"loss", "seed", "max_dim", "n_vectors"} & inspect.signature(
        make
    ).parameters.keys()
    tx = optax.inject_hyperparams(make, static_args=static)(schedule, **options)
    history, state = train(tx)
    expected, _ = train(make(schedule, **options))
    assert_close(history, expected, rtol=1e-5)
    assert set(floats) < set(state.hyperparams)
    step = jax.jit(make_step(tx, "function"))
    for name in floats:
        half = {**state.hyperparams, name: 0.5 * state.hyperparams[name]}
        a, b = (
            step(history[-1], s)[0] for s in (state, state._replace(hyperparams=half))
        )
        assert optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) > 1e-7, name


def test_schedule_free():
    """Against the algorithm written out."""
    ours = adahessian(b1=0.0)
    tx = optax.contrib.schedule_free(ours, learning_rate=0.05, b1=0.9)
    history, _ = train(tx, "fused")
    update = jax.jit(
        lambda y, s: ours.update(jax.grad(loss_fn)(y), s, y, **extra_args(y))
    )
    y, z, x, state = PARAMS, PARAMS, PARAMS, ours.init(PARAMS)
    for t, after in enumerate(history):
        updates, state = update(y, state)
        z = optax.apply_updates(z, updates)
        x = jax.tree.map(lambda x, z, c=1 / (t + 1): (1 - c) * x + c * z, x, z)
        y = jax.tree.map(lambda x, z: 0.9 * x + 0.1 * z, x, z)
        assert_close(after, y)


def test_backtracking_line_search():
    """Steps that are far too long are shortened; value_fn gets our arguments too."""
    ours = adahessian(50.0)
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=40)
    tx = optax.chain(ours, search)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        more = {"value": value, "grad": grads, "value_fn": lambda p, obj_fn: obj_fn(p)}
        updates, state = tx.update(grads, state, params, obj_fn=loss_fn, **more)
        return optax.apply_updates(params, updates), state, value

    assert loss_fn(train(ours, steps=1)[0][0]) > loss_fn(PARAMS)
    params, state, values = PARAMS, tx.init(PARAMS), []
    for _ in range(8):
        params, state, value = step(params, state)
        values.append(value)
    assert np.all(np.diff(values) < 0)


def test_vmap_over_an_ensemble():
    """Members have keys of their own, and each goes as it would alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    step = make_step(adahessian(interval=3), "fused")

    def init(key):
        noise = ah.rademacher_like(key, PARAMS)
        params = jax.tree.map(lambda p, z: p + 0.1 * z, PARAMS, noise)
        tx = adahessian(interval=3, estimator=ah.hutchinson(seed=key))
        return params, tx.init(params)

    together, each = jax.jit(jax.vmap(step)), jax.jit(step)
    members, own = jax.vmap(init)(keys), [init(key) for key in keys]
    for _ in range(4):
        members = together(*members)
        own = [each(*member) for member in own]
    for i, member in enumerate(own):
        assert_close(jax.tree.map(lambda p, i=i: p[i], members[0]), member[0])
    seen = jax.random.key_data(members[1][0].curvature.estimator_state.key)
    assert len(np.unique(seen, axis=0)) == 3


def by_scan(step, params, state):
    return jax.jit(
        lambda *carry: jax.lax.scan(lambda c, _: (step(*c), None), carry, length=4)[0]
    )(params, state)


def by_compilation_ahead(step, params, state):
    compiled = jax.jit(step).lower(params, state).compile()
    for _ in range(4):
        params, state = compiled(params, state)
    return params, state


def by_export(step, params, state):
    """As StableHLO: optax's states are passed as a list of their leaves."""
    leaves, treedef = jax.tree.flatten((params, state))

    def flat_step(leaves):
        return jax.tree.leaves(step(*treedef.unflatten(leaves)))

    exported = export.export(jax.jit(flat_step))(leaves)
    loaded = export.deserialize(exported.serialize())
    for _ in range(4):
        leaves = loaded.call(leaves)
    return treedef.unflatten(leaves)


RUNS = (by_scan, by_compilation_ahead, by_export)
KINDS = ("adahessian", "newton")
# Each in turn for one of the two, for the other in CI only.
CASES = [
    pytest.param(kind, run, marks=[pytest.mark.slow] * ((i + j) % 2))
    for i, run in enumerate(RUNS)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("kind", "run"), CASES)
def test_ways_to_run_a_step(kind, run):
    """All give what a compiled step gives, and a state of the same form."""
    tx = newton(None) if kind == "newton" else adahessian(interval=3)
    path = "function" if kind == "newton" else "fused"
    history, expected_state = train(tx, path)
    params, state = run(make_step(tx, path), PARAMS, tx.init(PARAMS))
    assert_close(params, history[-1], rtol=1e-5)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)


def test_checkpoint_and_scanned_layers():
    """jax.checkpoint and a scan over layers change neither estimate nor average."""
    kernels = 0.3 * RNG.normal(size=(3, 3, 3, 2, 2))
    image = RNG.normal(size=(4, 6, 6, 2))
    tx = adahessian(averaging=ah.conv_spatial_average(spatial_ndim=2))

    def layer(h, kernel):
        dims = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(
            h, kernel, (1, 1), "SAME", dimension_numbers=dims
        )
        return jnp.tanh(out), None

    def loss(params, scan=False, remat=lambda f: f):
        one, h = remat(layer), image
        if scan:
            return jnp.mean(jax.lax.scan(one, h, params["conv"])[0] ** 2)
        for kernel in params["conv"]:
            h, _ = one(h, kernel)
        return jnp.mean(h**2)

    results = []
    for options in ({}, {"scan": True, "remat": jax.checkpoint}):
        objective = functools.partial(loss, **options)
        fused = ah.value_and_grad_with_curvature(objective, tx)

        @jax.jit
        def step(params, state, fused=fused):
            _, grads, curvature = fused(params, state=state)
            return tx.update(grads, state, params, curvature=curvature)

        params = {"conv": kernels}
        state = tx.init(params)
        assert state[0].curvature.nu["conv"].shape == (3, 1, 1, 2, 2)
        for _ in range(3):
            updates, state = step(params, state)
            params = optax.apply_updates(params, updates)
        results.append(params)
    assert_close(*results)
