# SPDX-License-Identifier: Apache-2.0
"""What in optax and JAX a transformation may be put inside or beside.

Chains, partitions and apply_if_finite are in test_between_features.py, containers and
devices in files of their own: together the rows of the table in docs/composition.md.
"""

import functools
import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export

import adahessian_jax as ah
from adahessian_jax._src.probes import rademacher_like
from tests.problems import at_once


@pytest.fixture(autouse=True)
def double_precision(x64):
    """So that the order of operations does not matter; optax's wrappers mix dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


RNG = np.random.default_rng(0)
X = RNG.normal(size=(24, 5))
Y = RNG.integers(0, 3, size=24)
PARAMS = {"encoder": {"w": RNG.normal(size=(5, 4)), "b": RNG.normal(size=4)}}
PARAMS["decoder"] = {"w": RNG.normal(size=(4, 3))}
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
    function = loss_and_outputs if path == "fused-outputs" else loss_fn
    fused = ah.value_and_grad_with_curvature(function, tx)

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
ENCODER_ONLY = {"encoder": True, "decoder": False}
FROZEN = {"encoder": {"w": False, "b": False}, "decoder": {"w": True}}


def assert_trained_alone(tx, history, name):
    """A part went as if the rest were given, where another run had it."""
    tx = optax.with_extra_args_support(tx)

    @jax.jit
    def step(params, state):
        own, grads = params[name], jax.grad(loss_fn)(params)[name]
        functions = {
            "obj_fn": lambda own: loss_fn(params | {name: own}),
            "predict_fn": lambda own: predict(params | {name: own}),
        }
        updates, state = tx.update(grads, state, own, **functions)
        return optax.apply_updates(own, updates), state

    params, state = PARAMS, tx.init(PARAMS[name])
    for after in history:
        expected, state = step(params, state)
        assert_close(after[name], expected, rtol=1e-5)
        params = after


@pytest.mark.parametrize("wrapper", at_once(["masked", "freeze"], ["masked"]))
def test_a_part_of_the_parameters(wrapper):
    """The optimizer's part goes as if the rest were given; the rest as it should."""
    ours, path = newton(), "fused-outputs"
    if wrapper == "masked":
        rest = optax.masked(optax.scale(-0.1), {"encoder": False, "decoder": True})
        tx = optax.chain(optax.masked(ours, ENCODER_ONLY), rest)
        history, _ = train(tx, path)
        assert_trained_alone(optax.sgd(0.1), history, "decoder")
        assert_trained_alone(ours, history, "encoder")
    elif not hasattr(optax, "freeze"):
        pytest.skip("came with optax 0.2.6")
    else:  # the frozen take part in the estimate, or not
        (frozen,), _ = train(optax.chain(ours, optax.freeze(FROZEN)), path, 1)
        assert_close(frozen["encoder"], train(ours, path, 1)[0][0]["encoder"])
        history, _ = train(optax.selective_transform(ours, freeze_mask=FROZEN), path)
        assert_trained_alone(ours, history, "encoder")
        for after in (frozen, history[-1]):
            chex.assert_trees_all_equal(after["decoder"], PARAMS["decoder"])


def test_masks_and_leaves_of_all_kinds():
    """Integers, None, no entries, masks, and a function that is not made whole."""
    params = PARAMS | {"n": jnp.asarray(2), "nothing": None, "empty": jnp.zeros((0, 3))}
    params["scalar"] = jnp.asarray(0.5)
    mask = jax.tree.map(lambda x: True, params) | {"decoder": False}
    tx = optax.masked(adahessian(), mask)

    def loss(p):
        return loss_fn(p) * p["n"] + p["scalar"] ** 2 + jnp.sum(p["empty"])

    value_and_grad, state = ah.value_and_grad_with_curvature(loss, tx), tx.init(params)
    _, grads, curvature = jax.jit(lambda: value_and_grad(params, state=state))()
    for extra in ({"curvature": curvature}, {"obj_fn": ah.unmasked(loss, params)}):
        updates, _ = jax.jit(lambda e=extra: tx.update(grads, state, params, **e))()
        assert (updates["n"], updates["nothing"]) == (0, None)
        assert_close(updates["scalar"], -0.05 * 1.0 / 2)
    functions = ("obj_fn", loss_fn), ("predict_fn", predict)
    for make, (name, function) in zip((adahessian, newton), functions, strict=True):
        tx = optax.masked(make(), ENCODER_ONLY)
        with pytest.raises(TypeError) as error:
            tx.update(PARAMS, tx.init(PARAMS), PARAMS, **{name: function})
        advice = f"tx.update(..., {name}=adahessian_jax.unmasked({name}, params))."
        assert advice in error.value.__notes__[0]


def test_groups_with_one_rate_of_their_own():
    """Groups alike are one, if one quadratic model comes behind all of them."""

    def scale():
        return ah.scale_by_adahessian(estimator=ah.gauss_newton(LOSS), eps=0.1)

    def with_rate(tx):
        model = ah.scale_by_quadratic_model(LOSS)
        return optax.chain(tx, model, optax.scale_by_learning_rate(1.0))

    labels = {name: name for name in PARAMS}
    groups = optax.partition({name: scale() for name in PARAMS}, labels)

    @functools.partial(jax.jit, static_argnums=0)
    def step(tx, params, state):
        grads = jax.grad(loss_fn)(params)
        args = {"predict_fn": ah.unmasked(predict, params), "grad": grads}
        updates, state = tx.update(grads, state, params, **args)
        return optax.apply_updates(params, updates), state

    ends = []
    for tx in map(with_rate, (scale(), groups)):
        params, state = PARAMS, tx.init(PARAMS)
        for _ in range(3):
            params, state = step(tx, params, state)
        ends.append(params)
    assert_close(*ends)
    assert loss_fn(params) < loss_fn(PARAMS)


AXES = ["loss", "seed", "max_dim", "n_vectors"]
STATIC = {
    ah.adahessian: ["seed"],
    ah.newton: AXES,
    ah.subspace_newton: [*AXES, "memory"],
}


@pytest.mark.parametrize("make", STATIC)
def test_inject_hyperparams(make):
    """All floats are traced, and one that is changed takes effect."""
    fixed = {"learning_rate": 0.1, "loss": LOSS}
    more = {"hessian_power": 0.9} if make is ah.adahessian else {"clip_threshold": 0.3}
    floats = {"b1": 0.8, "b2": 0.95, "eps": 1e-4, "weight_decay": 0.1} | more
    known = inspect.signature(make).parameters.keys()
    fixed, floats = ({k: d[k] for k in d.keys() & known} for d in (fixed, floats))
    static = set(STATIC[make]) & known
    tx = optax.inject_hyperparams(make, static_args=static)(**fixed, **floats)
    history, state = train(tx, steps=2)
    assert set(floats) < set(state.hyperparams)
    step = jax.jit(make_step(tx, "function"))
    for name in floats:
        half = {**state.hyperparams, name: 0.5 * state.hyperparams[name]}
        states = state, state._replace(hyperparams=half)
        a, b = (step(history[-1], s)[0] for s in states)
        assert optax.tree.norm(jax.tree.map(jnp.subtract, a, b)) > 1e-7, name


def test_inject_hyperparams_says_what_to_make_static():
    """Each message names the next argument, until all are."""
    static = ()
    while len(static) < 4:
        make = optax.inject_hyperparams(ah.newton, static_args=static)
        with pytest.raises(TypeError, match=r"static_args=\('(\w+)',\)") as caught:
            make(0.1, loss=LOSS).init(PARAMS)
        static += tuple(re.findall(r"static_args=\('(\w+)'", str(caught.value)))
    tx = optax.inject_hyperparams(ah.newton, static_args=static)(0.05, loss=LOSS)
    got, expected = (
        updates_of(t, **extra_args(PARAMS)) for t in (tx, ah.newton(0.05, LOSS))
    )
    chex.assert_trees_all_close(got, expected, rtol=1e-9)


def bound(tx, **extra_args):
    """Return a transformation that needs no arguments, for wrappers that take none."""
    update_fn = functools.partial(tx.update, **extra_args)
    return optax.GradientTransformation(tx.init, update_fn)


def always(step, **extra_args):
    return jnp.array(True)


# Each leaves the first updates as they are.
WRAPPERS = {
    "named_chain": lambda tx: optax.named_chain(("ours", tx)),
    "conditionally_transform": lambda tx: optax.conditionally_transform(tx, always),
    "conditionally_mask": lambda tx: optax.conditionally_mask(tx, always),
    "with_extra_args_support": optax.with_extra_args_support,
    "reduce_on_plateau": lambda tx: optax.chain(tx, optax.contrib.reduce_on_plateau()),
    "apply_every": lambda tx: optax.chain(tx, optax.apply_every(1)),
}


def updates_of(tx, state=None, **more):
    """Return the updates of three steps at the same parameters."""
    state, all_updates = tx.init(PARAMS) if state is None else state, []
    step = jax.jit(lambda s: tx.update(jax.grad(loss_fn)(PARAMS), s, PARAMS, **more))
    for _ in range(3):
        updates, state = step(state)
        all_updates.append(updates)
    return all_updates


@pytest.mark.slow
def test_wrappers():
    """What the docs' table says of each: it works as it is, or by this call."""
    extra, tx = extra_args(PARAMS), adahessian()
    expected = updates_of(tx, **extra)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-7)
    for name, wrap in WRAPPERS.items():
        close(updates_of(wrap(tx), **extra, value=loss_fn(PARAMS)), expected), name
    # Of other probes, for the order of entries is another.
    _, unravel = jax.flatten_util.ravel_pytree(PARAMS)
    flat = {k: lambda v, f=f: f(unravel(v)) for k, f in extra.items()}
    for updates in updates_of(optax.flatten(tx), **flat):
        assert all(jnp.all(u != 0) for u in jax.tree.leaves(updates))
    # These take no arguments of their neighbours.
    inner = bound(tx, **extra)
    close(updates_of(optax.contrib.split_real_and_imaginary(inner)), expected)
    sam = optax.contrib.sam(inner, optax.sgd(0.0), sync_period=2)
    close(updates_of(sam)[1], expected[0])
    lookahead, pair = optax.lookahead(inner, 9, 0.5), optax.LookaheadParams
    both = pair.init_synced(PARAMS)
    updates, _ = lookahead.update(jax.grad(loss_fn)(PARAMS), lookahead.init(both), both)
    close(updates.fast, expected[0])
    for wrap in (optax.lookahead, optax.contrib.split_real_and_imaginary):
        options = (9, 0.5) if wrap is optax.lookahead else ()
        with pytest.raises(TypeError, match="unexpected keyword argument"):
            wrap(tx, *options).update(PARAMS, None, PARAMS, **extra)
    with pytest.raises(ValueError, match="params must be given"):
        updates_of(optax.contrib.galore(0.1, 1, base_optimizer=inner))
    mechanized, params = optax.contrib.mechanize(tx), PARAMS
    state = mechanized.init(params)

    @jax.jit
    def step(params, state):
        args = jax.grad(loss_fn)(params), state, params
        updates, state = mechanized.update(*args, **extra_args(params))
        return optax.apply_updates(params, updates), state

    for _ in range(40):
        params, state = step(params, state)
    assert loss_fn(params) < loss_fn(PARAMS)


def test_an_object_of_multi_steps():
    """As good for the fused function as the transformation that it makes."""
    steps, tx = optax.MultiSteps(adahessian(), 2), adahessian()
    fused = ah.value_and_grad_with_curvature(loss_fn, steps)
    params, state = PARAMS, steps.init(PARAMS)
    for _ in range(4):
        _, grads, curvature = fused(params, X, Y, state=state)
        updates, state = steps.update(grads, state, params, curvature=curvature)
        params = optax.apply_updates(params, updates)
    assert_close(params, train(tx, "fused", 2)[0][-1])


def test_backtracking_line_search():
    """Steps that are far too long are shortened; value_fn gets our arguments too."""
    search = optax.scale_by_backtracking_linesearch(max_backtracking_steps=40)
    tx = optax.chain(adahessian(50.0), search)

    @jax.jit
    def step(params, state):
        value, grads = jax.value_and_grad(loss_fn)(params)
        more = {"value": value, "grad": grads, "value_fn": lambda p, obj_fn: obj_fn(p)}
        updates, state = tx.update(grads, state, params, obj_fn=loss_fn, **more)
        return optax.apply_updates(params, updates), state

    history = [(PARAMS, tx.init(PARAMS))]
    for _ in range(6):
        history.append(step(*history[-1]))
    assert np.all(np.diff([loss_fn(params) for params, _ in history]) < 0)


def test_vmap_over_an_ensemble():
    """Members have keys of their own, and each goes as it would alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    step = make_step(adahessian(interval=3), "fused")

    def init(key):
        params = jax.tree.map(lambda z: 0.1 * z, rademacher_like(key, PARAMS))
        tx = adahessian(interval=3, estimator=ah.hutchinson(seed=key))
        return params, tx.init(params)

    together, members = jax.jit(jax.vmap(step)), jax.vmap(init)(keys)
    own, each = [init(key) for key in keys], jax.jit(step)
    for _ in range(4):
        members, own = together(*members), [each(*member) for member in own]
    alone = jax.tree.map(lambda *p: jnp.stack(p), *(params for params, _ in own))
    assert_close(members[0], alone)


def test_ways_to_run_a_step():
    """All give what a compiled step gives, and a state of the same form."""
    tx, path = newton(None), "function"
    history, expected_state = train(tx, path)
    step, start = make_step(tx, path), (PARAMS, tx.init(PARAMS))
    leaves, treedef = jax.tree.flatten(start)

    def flat_step(leaves):  # as StableHLO, optax's states pass as lists of leaves
        return jax.tree.leaves(step(*treedef.unflatten(leaves)))

    exported = export.export(jax.jit(flat_step))(leaves)
    loaded = export.deserialize(exported.serialize())
    compiled, ahead = jax.jit(step).lower(*start).compile(), start
    for _ in range(4):
        leaves, ahead = loaded.call(leaves), compiled(*ahead)

    def scanned(carry):
        return jax.lax.scan(lambda c, _: (step(*c), None), carry, length=4)[0]

    for params, state in (treedef.unflatten(leaves), ahead, jax.jit(scanned)(start)):
        assert_close(params, history[-1], rtol=1e-5)
        chex.assert_trees_all_equal_shapes_and_dtypes(state, expected_state)
