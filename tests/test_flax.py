# SPDX-License-Identifier: Apache-2.0
"""Flax linen, Flax NNX and Equinox: one network in each, with every estimator."""

import functools

import chex
import equinox as eqx
import flax.linen as nn
import flax.nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from adahessian_jax.linen import TrainState

RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6))
Y = RNG.integers(0, 3, size=16)
LOSS = ah.losses.softmax_cross_entropy
CLOSE = functools.partial(chex.assert_trees_all_close, rtol=1e-8, atol=1e-10)


@pytest.fixture(autouse=True)
def double_precision(x64):
    """So that only mistakes show; Flax's normalisation mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


GAUSS_NEWTON = ah.gauss_newton(LOSS)
CONTROL = ah.hutchinson(control_variate=ah.gauss_newton_control(LOSS))
LOW_RANK = ah.hutchinson(control_variate=ah.low_rank_control(2))
OPTIMIZERS = {
    "adahessian": ah.adahessian(0.05, update_interval=2),
    "low-rank": ah.adahessian(0.05, estimator=LOW_RANK),
    "gauss-newton": ah.adahessian(0.05, estimator=GAUSS_NEWTON),
    "in-eigenbasis": ah.adahessian(
        0.05, estimator=ah.in_eigenbasis(GAUSS_NEWTON), clip_threshold=0.1
    ),
    "control": ah.adahessian(0.05, estimator=CONTROL),
    "newton": ah.newton(0.05, LOSS, max_dim=4, n_vectors=2),
    "own-rate": ah.newton(None, LOSS),
}
OF_OUTPUTS = list(OPTIMIZERS)[2:]


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, use_bias=False, param_dtype=float)(x)  # the next has a bias
        x = nn.BatchNorm(not train, momentum=0.9, param_dtype=float)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3, param_dtype=float)(x)


class LinenState(TrainState):
    batch_stats: dict


def linen_loss(state, params, key):
    logits, new = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats},
        X,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    return LOSS(logits, Y), new["batch_stats"]


@pytest.mark.parametrize("path", ["function", "fused"])
def test_linen_train_state(path):
    """Batch statistics are auxiliary values; a key of the step is the dropout mask."""
    tx, model = OPTIMIZERS["adahessian"], LinenNet()
    fused = ah.value_and_grad_with_curvature(
        lambda p, state, key: linen_loss(state, p, key), tx, has_aux=True
    )

    @jax.jit
    def step(state, key):
        def loss_fn(params):
            return linen_loss(state, params, key)

        (_, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(state.params)
        extra_args = {"obj_fn": lambda p: loss_fn(p)[0]}
        by_hand = tx.update(grads, state.opt_state, state.params, **extra_args)[0]
        if path == "fused":
            (_, stats), grads, curvature = fused(
                state.params, state, key, state=state.opt_state
            )
            extra_args = {"curvature": curvature}
        new = state.apply_gradients(
            grads=grads, extra_args=extra_args, batch_stats=stats
        )
        return new, optax.apply_updates(state.params, by_hand)

    variables = model.init(jax.random.key(0), X, train=False)
    state = LinenState.create(apply_fn=model.apply, tx=tx, **variables)
    for i in range(4):
        before, key = state, jax.random.key(i)
        state, expected = step(state, key)
        CLOSE(state.params, expected)
        CLOSE(state.batch_stats, linen_loss(before, before.params, key)[1])
    assert state.step == 4
    assert state.tx is tx
    # Optimizers without extra arguments are as in Flax's own class.
    state = LinenState.create(apply_fn=model.apply, tx=optax.adam(1e-3), **variables)
    grads = jax.tree.map(jnp.ones_like, state.params)
    expected = super(TrainState, state).apply_gradients(grads=grads)
    CLOSE(state.apply_gradients(grads=grads).params, expected.params)


def test_equinox_module():
    """Arrays are the parameters, and the rest of the module is closed over."""
    model = eqx.nn.MLP(6, 3, 8, 2, activation=jnp.tanh, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    tx, (leaves, treedef) = OPTIMIZERS["newton"], jax.tree.flatten(params)

    def both(params):
        outputs = jax.vmap(eqx.combine(params, static))(X)
        return LOSS(outputs, Y), outputs

    def step(params, state, both=both):
        fused = ah.value_and_grad_with_curvature(both, tx)
        _, grads, curvature = fused(params, state=state)
        updates, state = tx.update(grads, state, params, curvature=curvature)
        return eqx.apply_updates(params, updates), state

    step_of_list = functools.partial(step, both=lambda x: both(treedef.unflatten(x)))
    got, expected = (params, tx.init(params)), (leaves, tx.init(leaves))
    for _ in range(4):
        got = eqx.filter_jit(step)(*got)
        expected = eqx.filter_jit(step_of_list)(*expected)
    CLOSE(jax.tree.leaves(got[0]), expected[0])
    assert both(got[0])[0] < both(params)[0]


nnx_only = pytest.mark.skipif(
    not hasattr(flax.nnx, "as_pure"), reason="adahessian_jax.nnx needs Flax 0.12"
)


def nnx_net(dropout=0.0):
    from flax import nnx

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.Linear(6, 8, use_bias=False, param_dtype=float, rngs=rngs)
            self.norm = nnx.BatchNorm(8, momentum=0.9, param_dtype=float, rngs=rngs)
            # Flax makes them of single precision.
            self.norm.mean = nnx.BatchStat(jnp.zeros(8))
            self.norm.var = nnx.BatchStat(jnp.ones(8))
            self.dropout = nnx.Dropout(dropout, rngs=rngs)
            self.last = nnx.Linear(8, 3, param_dtype=float, rngs=rngs)

        def __call__(self, x):
            x = nnx.tanh(self.norm(self.first(x)))
            return self.last(self.dropout(x))

    return Net(nnx.Rngs(0))


def nnx_loss(model, x, y):
    return LOSS(model(x), y)


def nnx_both(model, x, y):
    logits = model(x)
    return LOSS(logits, y), logits


# Each optimizer twice, compiled and not, by either path; the second time in CI only.
CASES = [
    pytest.param(
        name,
        ("function", "fused")[(i + j) % 2],
        (i % 3 > 0) != j,
        marks=[pytest.mark.slow] * j,
    )
    for j in (0, 1)
    for i, name in enumerate(OPTIMIZERS)
]


@nnx_only
@pytest.mark.parametrize(("name", "path", "jit"), CASES)
def test_nnx(name, path, jit):
    """Against jax.grad of the split module; what it counts moves on once a step."""
    from flax import nnx

    from adahessian_jax.nnx import functional, value_and_grad_with_curvature

    tx, model = OPTIMIZERS[name], nnx_net()
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    fused = value_and_grad_with_curvature(nnx_both if name in OF_OUTPUTS else nnx_loss)
    labels = Y if name == "control" else None

    def step(model, optimizer, x, y):
        predict_fn = functional(lambda m: m(x), model)
        extra_args = {"predict_fn": predict_fn}
        if path == "fused":
            loss, grads, curvature = fused(
                model, x, y, optimizer=optimizer, labels=labels
            )
            extra_args["curvature"] = curvature
        else:
            objective = functional(lambda m: nnx_loss(m, x, y), model)
            extra_args |= {"obj_fn": objective, "labels": labels}
            loss, grads = nnx.value_and_grad(nnx_loss)(model, x, y)
        optimizer.update(model, grads, **extra_args)
        return loss

    graphdef, params, rest = nnx.split(nnx_net(), nnx.Param, ...)
    params, rest = nnx.as_pure((params, rest))

    @jax.jit
    def pure_step(params, rest, state):
        def loss_and_rest(p):
            copy = nnx.merge(graphdef, p, rest)
            loss = nnx_loss(copy, X, Y)
            return loss, nnx.as_pure(nnx.split(copy, nnx.Param, ...)[2])

        (loss, new), grads = jax.value_and_grad(loss_and_rest, has_aux=True)(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            obj_fn=lambda p: loss_and_rest(p)[0],
            predict_fn=lambda p: nnx.merge(graphdef, p, rest)(X),
            labels=labels,
        )
        return loss, optax.apply_updates(params, updates), new, state

    state = tx.init(params)
    step = nnx.jit(step) if jit else step
    for _ in range(3):
        expected, params, rest, state = pure_step(params, rest, state)
        np.testing.assert_allclose(step(model, optimizer, X, Y), expected, rtol=1e-6)
    # Bases without curvature are known to the root of rounding only.
    close = functools.partial(CLOSE, rtol=1e-5) if name in OF_OUTPUTS[1:] else CLOSE
    close(nnx.as_pure(nnx.state(model, nnx.Param)), params)
    merged = nnx.merge(graphdef, params, rest)
    for kind in (nnx.BatchStat, nnx.RngCount):
        close(*(nnx.as_pure(nnx.state(m, kind)) for m in (model, merged)))
    assert int(optimizer.step[...]) == 3


@nnx_only
@pytest.mark.parametrize("parts", [1, 2])
def test_nnx_dropout_and_microbatches(parts):
    """One mask for value, gradient and estimate; statistics are means over parts."""
    from flax import nnx

    from adahessian_jax.nnx import functional, value_and_grad_with_curvature

    model, before = nnx_net(0.5), nnx_net(0.5)
    optimizer = nnx.Optimizer(model, OPTIMIZERS["gauss-newton"], wrt=nnx.Param)
    graphdef, params, rest = nnx.split(before, nnx.Param, ...)
    params, rest = nnx.as_pure((params, rest))

    def of_part(params, x, y):
        copy = nnx.merge(graphdef, params, rest)
        loss = nnx_loss(copy, x, y)
        return loss, nnx.as_pure(nnx.state(copy, nnx.Not(nnx.Param)))

    of_part = jax.value_and_grad(of_part, has_aux=True)
    dealt = [np.stack([a[i::parts] for i in range(parts)]) for a in (X, Y)]
    (losses, rests), grads = jax.vmap(of_part, (None, 0, 0))(params, *dealt)

    fused = value_and_grad_with_curvature(nnx_both, microbatches=parts)
    loss, got, curvature = nnx.jit(lambda m, o: fused(m, X, Y, optimizer=o))(
        model, optimizer
    )
    CLOSE(loss, losses.mean())
    CLOSE(nnx.as_pure(got), jax.tree.map(lambda g: g.mean(axis=0), grads))
    stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    CLOSE(stats["norm"], jax.tree.map(lambda s: s.mean(axis=0), rests["norm"]))
    assert model.dropout.rngs.count[...] == before.dropout.rngs.count[...] + 1
    objective = functional(lambda m: m(X), before)
    CLOSE(objective(params), objective(params))
    if parts == 1:
        expected, _ = GAUSS_NEWTON.update(
            None, GAUSS_NEWTON.init(params), params, predict_fn=objective
        )
        CLOSE(curvature.estimate, expected)
    optimizer.update(model, got, curvature=curvature)


@nnx_only
@pytest.mark.parametrize("fused", [False, True], ids=["function", "fused"])
@pytest.mark.parametrize("wrapper", ["lora", "partition"])
def test_nnx_trains_a_part(wrapper, fused):
    """LoRA's matrices, or the last layer by Adam and the rest by curvature."""
    from flax import nnx

    from adahessian_jax.nnx import functional, value_and_grad_with_curvature

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.first = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
            self.last = nnx.Linear(8, 3, rngs=rngs)

        def __call__(self, x):
            return self.last(nnx.tanh(self.first(x)))

    model, wrt = Net(nnx.Rngs(0)), nnx.Param
    tx = OPTIMIZERS["newton"]
    if wrapper == "lora":
        wrt = nnx.LoRAParam
    else:
        txs = {"first": tx, "last": optax.adam(0.01)}
        tx = optax.partition(
            txs,
            lambda params: jax.tree_util.tree_map_with_path(
                lambda path, _: path[0].key, params
            ),
        )
    optimizer = nnx.Optimizer(model, tx, wrt=wrt)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state(model, nnx.Param)))
    fun = value_and_grad_with_curvature(
        lambda m, x: (nnx_both(m, x, Y), x.sum()), has_aux=True
    )
    losses = []
    for _ in range(4):
        if fused:
            (loss, aux), grads, curvature = fun(model, X, optimizer=optimizer)
            np.testing.assert_allclose(aux, X.sum())
            optimizer.update(model, grads, curvature=curvature)
        else:
            diff = nnx.DiffState(0, wrt)
            loss, grads = nnx.value_and_grad(nnx_loss, argnums=diff)(model, X, Y)
            predict_fn = functional(lambda m: m(X), model, wrt=wrt)
            optimizer.update(model, grads, predict_fn=predict_fn)
        losses.append(loss)
    assert np.all(np.diff(losses) < 0)
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), after, before)
    assert moved["first"]["lora"]["lora_b"] > 1e-3
    assert (moved["first"]["kernel"] == 0) == (wrapper == "lora")
    assert (moved["last"]["kernel"] == 0) == (wrapper == "lora")


def of_module(case):
    """Call with a function of the module for one of parameters, or the reverse."""
    from flax import nnx

    from adahessian_jax import nnx as ours

    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS[case.split()[0]], wrt=nnx.Param)
    grads = nnx.grad(nnx_loss)(model, X, Y)
    if case.endswith("core"):
        fused = ah.value_and_grad_with_curvature(nnx_loss, optimizer.tx)
        fused(model, X, Y, state=optimizer.opt_state)
    elif case.endswith("reverse"):
        fused = ours.value_and_grad_with_curvature(lambda p: jnp.sum(p["kernel"]))
        fused(model, optimizer=optimizer)
    elif case.endswith("3"):
        ours.functional(3, model)
    elif case.endswith("wrt"):
        functional = ours.functional(lambda m: m(X), model, wrt=nnx.BatchStat)
        optimizer.update(model, grads, predict_fn=functional)
    else:
        optimizer.update(model, grads, obj_fn=lambda m: jnp.sum(m(X)), predict_fn=len)


@nnx_only
@pytest.mark.parametrize(
    ("case", "named"),
    [
        ("adahessian", "functional"),
        ("adahessian core", "adahessian_jax.nnx"),
        ("adahessian reverse", "without adahessian_jax.nnx"),
        ("newton 3", "fun must be a callable module -> result, got 3"),
        ("newton wrt", "call functional(fun, model, wrt=...)"),
    ],
)
def test_nnx_says_what_takes_a_module(case, named):
    with pytest.raises((TypeError, ValueError)) as caught:
        of_module(case)
    notes = getattr(caught.value, "__notes__", [])
    assert named in "\n".join([str(caught.value), *notes])
