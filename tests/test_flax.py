# SPDX-License-Identifier: Apache-2.0
"""Flax: batch statistics, dropout, LoRA; containers are in test_between_features.py."""

import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import adahessian_jax as ah
from adahessian_jax.linen import TrainState
from tests.problems import at_once

if hasattr(nnx, "as_pure"):
    from adahessian_jax import nnx as ours

nnx_only = pytest.mark.skipif(not hasattr(nnx, "as_pure"), reason="needs Flax 0.12")
RNG = np.random.default_rng(0)
X = RNG.normal(size=(16, 6))
Y = RNG.integers(0, 3, size=16)
LOSS = ah.losses.softmax_cross_entropy
CLOSE = functools.partial(chex.assert_trees_all_close, rtol=1e-8, atol=1e-10)
GAUSS_NEWTON = ah.gauss_newton(LOSS)
CONTROL = ah.hutchinson(control_variate=ah.gauss_newton_control(LOSS))
OPTIMIZERS = {
    "adahessian": ah.adahessian(0.05, update_interval=2),
    "gauss-newton": ah.adahessian(0.05, estimator=GAUSS_NEWTON),
    "control": ah.adahessian(0.05, estimator=CONTROL),
    "newton": ah.newton(0.05, LOSS, max_dim=4, n_vectors=2),
    "own-rate": ah.newton(None, LOSS),
    "subspace": ah.subspace_newton(LOSS),
}


@pytest.fixture(autouse=True)
def double_precision(x64):
    """So that only mistakes show; Flax's normalisation mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        x = nn.Dense(8, use_bias=False, param_dtype=float)(x)  # the next has a bias
        x = nn.BatchNorm(not train, momentum=0.9, param_dtype=float)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3, param_dtype=float)(x)


class LinenState(TrainState):
    batch_stats: dict


def linen_loss(params, state, key):
    variables = {"params": params, "batch_stats": state.batch_stats}
    options = {"train": True, "rngs": {"dropout": key}, "mutable": ["batch_stats"]}
    logits, new = state.apply_fn(variables, X, **options)
    return LOSS(logits, Y), new["batch_stats"]


def test_linen_train_state():
    """Batch statistics are auxiliary values; a key of the step is the dropout mask."""
    tx, model = OPTIMIZERS["adahessian"], LinenNet()
    fused = ah.value_and_grad_with_curvature(linen_loss, tx, has_aux=True)

    @jax.jit
    def step(state, key):
        params, args = state.params, (state, key)
        (_, stats), grads, curvature = fused(params, *args, state=state.opt_state)
        function = {"obj_fn": lambda p: linen_loss(p, *args)[0]}
        updates = tx.update(grads, state.opt_state, params, **function)[0]
        more = {"grads": grads, "batch_stats": stats}
        states = [
            state.apply_gradients(extra_args=extra_args, **more)
            for extra_args in (function, {"curvature": curvature})
        ]
        return states, optax.apply_updates(params, updates)

    init = jax.jit(functools.partial(model.init, train=False))
    variables = init(jax.random.key(0), X)
    state = LinenState.create(apply_fn=model.apply, tx=tx, **variables)
    alone = jax.jit(linen_loss)
    for i in range(4):
        before, key = state, jax.random.key(i)
        (other, state), expected = step(state, key)
        CLOSE(other.params, expected)
        CLOSE(state.params, expected)
        CLOSE(state.batch_stats, alone(before.params, before, key)[1])
    assert (state.step, state.tx) == (4, tx)
    # Optimizers without extra arguments are as in Flax's own class.
    state = LinenState.create(apply_fn=model.apply, tx=optax.adam(1e-3), **variables)
    expected = super(TrainState, state).apply_gradients(grads=state.params)
    CLOSE(state.apply_gradients(grads=state.params).params, expected.params)


class Net(nnx.Module):
    def __init__(self, lora=False):
        rngs = nnx.Rngs(0)
        linear = functools.partial(nnx.Linear, param_dtype=float, rngs=rngs)
        self.first = linear(6, 8, use_bias=False)
        if lora:
            self.first = nnx.LoRALinear(6, 8, lora_rank=2, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, param_dtype=float, rngs=rngs)
        # Flax makes them of single precision.
        self.norm.mean = nnx.BatchStat(jnp.zeros(8))
        self.norm.var = nnx.BatchStat(jnp.ones(8))
        self.dropout = nnx.Dropout(0.0 if lora else 0.5, rngs=rngs)
        self.last = linear(8, 3)

    def __call__(self, x):
        x = nnx.tanh(self.norm(self.first(x)))
        return self.last(self.dropout(x))


def nnx_loss(model, x, y):
    return LOSS(model(x), y)


def nnx_both(model, x, y):
    logits = model(x)
    return LOSS(logits, y), logits


def make_step(name, path, wrt=nnx.Param):
    fused = ours.value_and_grad_with_curvature(
        nnx_loss if name == "adahessian" else nnx_both
    )
    labels = Y if name == "control" else None

    def step(model, optimizer):
        extra_args = {"predict_fn": ours.functional(lambda m: m(X), model, wrt=wrt)}
        if path == "fused":
            loss, grads, extra_args["curvature"] = fused(
                model, X, Y, optimizer=optimizer, labels=labels
            )
        else:
            objective = ours.functional(lambda m: nnx_loss(m, X, Y), model, wrt=wrt)
            extra_args |= {"obj_fn": objective, "labels": labels}
            grad = nnx.value_and_grad(nnx_loss, argnums=nnx.DiffState(0, wrt))
            loss, grads = grad(model, X, Y)
        optimizer.update(model, grads, **extra_args)
        return loss

    return step


def pure(model, kind):
    return nnx.as_pure(nnx.state(model, kind))


@nnx_only
@pytest.mark.parametrize("name", at_once(OPTIMIZERS, ["gauss-newton"]))
def test_nnx(name):
    """Flax's gradient and ours, compiled or not; masks and statistics move on once."""
    ends = []
    for path, compiled in (("function", nnx.jit), ("fused", lambda step: step)):
        model = Net()
        optimizer = nnx.Optimizer(model, OPTIMIZERS[name], wrt=nnx.Param)
        step = compiled(make_step(name, path))
        losses = [step(model, optimizer) for _ in range(3)]
        kinds = (nnx.Param, nnx.BatchStat, nnx.RngCount)
        ends.append([losses, *(pure(model, kind) for kind in kinds)])
        assert int(optimizer.step[...]) == 3
    # Bases without curvature are known to the root of rounding only.
    chex.assert_trees_all_close(*ends, rtol=1e-5, atol=1e-10)


@nnx_only
@pytest.mark.parametrize("parts", at_once([1, 2], [2]))
def test_nnx_dropout_and_microbatches(parts):
    """One mask for value, gradient and estimate; statistics are means over parts."""
    model, before = Net(), Net()
    optimizer = nnx.Optimizer(model, OPTIMIZERS["gauss-newton"], wrt=nnx.Param)
    graphdef, params, rest = nnx.split(before, nnx.Param, ...)
    params, rest = nnx.as_pure((params, rest))

    def of_part(params, x, y):
        copy = nnx.merge(graphdef, params, rest)
        return nnx_loss(copy, x, y), pure(copy, nnx.BatchStat)

    of_part = jax.value_and_grad(of_part, has_aux=True)
    dealt = [np.stack([a[i::parts] for i in range(parts)]) for a in (X, Y)]
    of_parts = jax.vmap(of_part, (None, 0, 0))(params, *dealt)
    expected = jax.tree.map(lambda a: a.mean(axis=0), of_parts)

    fused = ours.value_and_grad_with_curvature(nnx_both, microbatches=parts)
    step = nnx.jit(lambda m, o: fused(m, X, Y, optimizer=o))
    loss, got, curvature = step(model, optimizer)
    CLOSE(((loss, pure(model, nnx.BatchStat)), nnx.as_pure(got)), expected)
    assert model.dropout.rngs.count[...] == before.dropout.rngs.count[...] + 1
    objective = ours.functional(lambda m: m(X), before)
    CLOSE(objective(params), objective(params))
    if parts == 1:
        state = GAUSS_NEWTON.init(params)
        expected, _ = GAUSS_NEWTON.update(None, state, params, predict_fn=objective)
        CLOSE(curvature.estimate, expected)
    optimizer.update(model, got, curvature=curvature)


@nnx_only
@pytest.mark.slow
@pytest.mark.parametrize("path", ["function", "fused"])
def test_nnx_trains_the_matrices_of_lora_only(path):
    model = Net(lora=True)
    optimizer = nnx.Optimizer(model, OPTIMIZERS["newton"], wrt=nnx.LoRAParam)
    step, before = make_step("newton", path, nnx.LoRAParam), pure(model, nnx.Param)
    before = jax.tree.map(jnp.copy, before)
    assert np.all(np.diff([step(model, optimizer) for _ in range(4)]) < 0)
    after = pure(model, nnx.Param)
    lora, old = after["first"].pop("lora"), before["first"].pop("lora")
    assert jnp.max(jnp.abs(lora["lora_b"] - old["lora_b"])) > 1e-3
    chex.assert_trees_all_equal(after, before)


@nnx_only
def test_nnx_parameters_as_the_module_has_them():
    """For functions of parameters ``nnx.state`` is as good as the arrays in it."""
    model = nnx.Linear(6, 3, param_dtype=float, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, ah.adahessian(0.1), wrt=nnx.Param)
    fun = ours.functional(lambda m: nnx_loss(m, X, Y), model)
    optimizer.update(model, nnx.grad(nnx_loss)(model, X, Y), obj_fn=fun)
    params, tx = nnx.state(model, nnx.Param), optimizer.tx
    state, arrays = optimizer.opt_state, nnx.as_pure(params)
    results = [
        (ah.hessian_diag(fun, p), ah.largest_eigenvalues(fun, p, preconditioner=by))
        for p, by in ((params, (tx, state)), (arrays, (tx, nnx.as_pure(state))))
    ]
    CLOSE(*map(nnx.as_pure, results))


# A function of the module for one of parameters, or the reverse: what the error names.
# fmt: off
MISTAKEN = {
    "functional": lambda model, optimizer, grads: optimizer.update(
        model, grads, obj_fn=lambda m: jnp.sum(m(X)), predict_fn=len),
    "adahessian_jax.nnx": lambda model, optimizer, grads:
        ah.value_and_grad_with_curvature(nnx_loss, optimizer.tx)(
            model, X, Y, state=optimizer.opt_state),
    "without adahessian_jax.nnx": lambda model, optimizer, grads:
        ours.value_and_grad_with_curvature(lambda p: jnp.sum(p["kernel"]))(
            model, optimizer=optimizer),
    "fun must be a callable module -> result, got 3":
        lambda model, optimizer, grads: ours.functional(3, model),
    "call functional(fun, model, wrt=...)":
        lambda model, optimizer, grads: optimizer.update(model, grads, obj_fn=
            ours.functional(lambda m: jnp.sum(m(X)), model, wrt=nnx.BatchStat)),
}
# fmt: on


@nnx_only
@pytest.mark.parametrize("named", MISTAKEN)
def test_nnx_says_what_takes_a_module(named):
    model = nnx.Linear(6, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, OPTIMIZERS["adahessian"], wrt=nnx.Param)
    with pytest.raises((TypeError, ValueError)) as caught:
        MISTAKEN[named](model, optimizer, nnx.grad(nnx_loss)(model, X, Y))
    notes = getattr(caught.value, "__notes__", [])
    assert named in "\n".join([str(caught.value), *notes])
