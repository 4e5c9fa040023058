# SPDX-License-Identifier: Apache-2.0
"""Flax linen and NNX training loops, with batch normalisation and dropout."""

import functools

import chex
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


@pytest.fixture(autouse=True)
def double_precision(x64):
    """So that only mistakes show; Flax's normalisation mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def cross_entropy(logits, y):
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, y)
    return jnp.mean(losses)


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x, train):
        # The normalisation has a bias.
        x = nn.Dense(8, use_bias=False, param_dtype=float)(x)
        x = nn.BatchNorm(not train, momentum=0.9, param_dtype=float)(x)
        x = nn.Dropout(0.5, deterministic=not train)(nn.tanh(x))
        return nn.Dense(3, param_dtype=float)(x)


class LinenState(TrainState):
    batch_stats: dict


def linen_state(tx):
    model = LinenNet()
    variables = model.init(jax.random.key(0), X, train=False)
    return LinenState.create(
        apply_fn=model.apply,
        params=variables["params"],
        batch_stats=variables["batch_stats"],
        tx=tx,
    )


def linen_loss(state, params, key):
    logits, new = state.apply_fn(
        {"params": params, "batch_stats": state.batch_stats},
        X,
        train=True,
        rngs={"dropout": key},
        mutable=["batch_stats"],
    )
    return cross_entropy(logits, Y), new["batch_stats"]


@pytest.mark.parametrize("path", ["obj_fn", "fused"])
def test_linen_train_state(path):
    """Batch statistics are auxiliary values; a key of the step is the dropout mask."""
    tx = ah.adahessian(0.05, update_interval=2, relative_damping=0.1)
    fused = ah.value_and_grad_with_curvature(
        lambda p, state, key: linen_loss(state, p, key), ah.hutchinson(), has_aux=True
    )

    @jax.jit
    def step(state, key):
        def loss_fn(params):
            return linen_loss(state, params, key)

        if path == "fused":
            (loss, stats), grads, curvature = fused(
                state.params, state, key, state=state.opt_state
            )
            extra_args = {"curvature": curvature}
        else:
            (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
                state.params
            )
            extra_args = {"obj_fn": lambda p: loss_fn(p)[0]}
        new = state.apply_gradients(
            grads=grads, extra_args=extra_args, batch_stats=stats
        )
        return new, loss

    state = linen_state(tx)
    # By hand, from the same estimator.
    params, opt_state = state.params, tx.init(state.params)
    by_hand = jax.jit(
        lambda state, params, opt_state, key: tx.update(
            jax.grad(lambda p: linen_loss(state, p, key)[0])(params),
            opt_state,
            params,
            obj_fn=lambda p: linen_loss(state, p, key)[0],
        )
    )
    for i in range(4):
        key = jax.random.key(i)
        updates, opt_state = by_hand(state, params, opt_state, key)
        params = optax.apply_updates(params, updates)
        before = state
        state, _ = step(state, key)
        chex.assert_trees_all_close(state.params, params, rtol=1e-8, atol=1e-10)
        _, stats = linen_loss(before, before.params, key)
        chex.assert_trees_all_close(state.batch_stats, stats, rtol=1e-8, atol=1e-10)
    assert state.step == 4
    assert state.tx is tx


def test_linen_train_state_with_a_plain_optimizer():
    state = linen_state(optax.adam(1e-3))
    grads = jax.tree.map(jnp.ones_like, state.params)
    ours = state.apply_gradients(grads=grads)
    flax_class = super(TrainState, state)
    chex.assert_trees_all_close(
        ours.params, flax_class.apply_gradients(grads=grads).params
    )


nnx_only = pytest.mark.skipif(
    not hasattr(flax.nnx, "as_pure"),
    reason="adahessian_jax.nnx needs Flax 0.12",
)
PATHS = pytest.mark.parametrize("path", ["obj_fn", "fused"])


def nnx_net(dropout):
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
    return cross_entropy(model(x), y)


def nnx_loss_and_outputs(model, x, y):
    logits = model(x)
    return cross_entropy(logits, y), logits


@nnx_only
@PATHS
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
@pytest.mark.parametrize("kind", ["hutchinson", "gauss-newton"])
def test_nnx(kind, jit, path):
    """Against the same by jax on the split module; state moves on once per step."""
    from flax import nnx

    from adahessian_jax.nnx import functional, value_and_grad_with_curvature

    estimator = (
        ah.hutchinson()
        if kind == "hutchinson"
        else ah.gauss_newton("softmax_cross_entropy")
    )
    tx = ah.adahessian(0.05, estimator=estimator, relative_damping=0.1)
    model = nnx_net(dropout=0.0)
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    fused = value_and_grad_with_curvature(
        nnx_loss_and_outputs if kind == "gauss-newton" else nnx_loss, estimator
    )

    def step(model, optimizer, x, y):
        if path == "fused":
            loss, grads, curvature = fused(model, x, y, optimizer=optimizer)
            optimizer.update(model, grads, curvature=curvature)
            return loss
        loss, grads = nnx.value_and_grad(nnx_loss)(model, x, y)
        optimizer.update(
            model,
            grads,
            obj_fn=functional(lambda m: nnx_loss(m, x, y), model),
            predict_fn=functional(lambda m: m(x), model),
        )
        return loss

    graphdef, params, rest = nnx.split(nnx_net(dropout=0.0), nnx.Param, ...)
    params, rest = nnx.as_pure((params, rest))
    state = tx.init(params)
    step = nnx.jit(step) if jit else step
    for _ in range(4):

        def pure(p, rest=rest):
            copy = nnx.merge(graphdef, p, rest)
            loss = nnx_loss(copy, X, Y)
            return loss, nnx.as_pure(nnx.split(copy, nnx.Param, ...)[2])

        def outputs(p, rest=rest):
            return nnx.merge(graphdef, p, rest)(X)

        (expected, new_rest), grads = jax.value_and_grad(pure, has_aux=True)(params)
        updates, state = tx.update(
            grads,
            state,
            params,
            obj_fn=lambda p, pure=pure: pure(p)[0],
            predict_fn=outputs,
        )
        params, rest = optax.apply_updates(params, updates), new_rest
        loss = step(model, optimizer, X, Y)
        np.testing.assert_allclose(loss, expected, rtol=1e-8)
    got = nnx.as_pure(nnx.state(model, nnx.Param))
    chex.assert_trees_all_close(got, params, rtol=1e-8, atol=1e-10)
    got = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    expected = nnx.as_pure(nnx.state(nnx.merge(graphdef, params, rest), nnx.BatchStat))
    chex.assert_trees_all_close(got, expected, rtol=1e-8, atol=1e-10)
    assert int(optimizer.step[...]) == 4


@nnx_only
def test_nnx_microbatches():
    """Means over parts: of loss, gradient and what each makes of batch statistics."""
    from flax import nnx

    from adahessian_jax.nnx import value_and_grad_with_curvature

    estimator = ah.hutchinson()
    model = nnx_net(dropout=0.5)
    optimizer = nnx.Optimizer(
        model, ah.adahessian(0.05, estimator=estimator), wrt=nnx.Param
    )
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    before = nnx.as_pure((params, rest))

    def of_part(params, x, y):
        copy = nnx.merge(graphdef, params, before[1])
        loss = nnx_loss(copy, x, y)
        return loss, nnx.as_pure(nnx.state(copy, nnx.Not(nnx.Param)))

    parts = [np.stack([a[::2], a[1::2]]) for a in (X, Y)]
    value_and_grad = jax.vmap(
        jax.value_and_grad(of_part, has_aux=True), in_axes=(None, 0, 0)
    )
    (losses, rests), grads = value_and_grad(before[0], *parts)
    fused = value_and_grad_with_curvature(nnx_loss, estimator, microbatches=2)
    loss, got, curvature = fused(model, X, Y, optimizer=optimizer)
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-8, atol=1e-10)
    close(loss, losses.mean())
    close(nnx.as_pure(got), jax.tree.map(lambda g: g.mean(axis=0), grads))
    stats = nnx.as_pure(nnx.state(model, nnx.BatchStat))
    close(stats["norm"], jax.tree.map(lambda s: s.mean(axis=0), rests["norm"]))
    count = nnx.as_pure(nnx.state(model, nnx.RngCount))
    was = nnx.as_pure(nnx.state(nnx_net(dropout=0.5), nnx.RngCount))
    close(count, jax.tree.map(lambda c: c + 1, was))
    optimizer.update(model, got, curvature=curvature)


@nnx_only
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
def test_nnx_dropout_has_one_mask_and_moves_on_once(jit):
    """The estimate is that of the value's mask; the generators' counts go up by one."""
    from flax import nnx

    from adahessian_jax.nnx import functional, value_and_grad_with_curvature

    model = nnx_net(dropout=0.5)
    estimator = ah.gauss_newton("softmax_cross_entropy")
    optimizer = nnx.Optimizer(
        model, ah.adahessian(0.1, estimator=estimator), wrt=nnx.Param
    )
    objective = functional(lambda m: m(X), model)
    params = nnx.as_pure(nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal(objective(params), objective(params))
    outputs = nnx_loss_and_outputs(nnx.clone(model), X, Y)[1]
    chex.assert_trees_all_equal(objective(params), outputs)
    count = model.dropout.rngs.count[...]

    fused = value_and_grad_with_curvature(nnx_loss_and_outputs, estimator)

    def value_and_grad(model, optimizer):
        return fused(model, X, Y, optimizer=optimizer)

    value_and_grad = nnx.jit(value_and_grad) if jit else value_and_grad
    _, _, curvature = value_and_grad(model, optimizer)
    assert model.dropout.rngs.count[...] == count + 1
    expected, _ = estimator.update(
        None, estimator.init(params), params, predict_fn=objective
    )
    chex.assert_trees_all_close(curvature.hessian_diag, expected, rtol=1e-8, atol=1e-10)
    _, _, later = value_and_grad(model, optimizer)
    with pytest.raises(AssertionError):
        chex.assert_trees_all_close(later.hessian_diag, expected, rtol=1e-2)


@nnx_only
@PATHS
def test_nnx_with_aux_and_a_group_of_adam(path):
    """The last layer by Adam: the rest of the module is put in for the estimate."""
    from flax import nnx

    from adahessian_jax.nnx import functional, value_and_grad_with_curvature

    model = nnx_net(dropout=0.0)

    def labels(params):
        return jax.tree_util.tree_map_with_path(
            lambda path, _: (
                "adam" if "last" in jax.tree_util.keystr(path) else "curved"
            ),
            params,
        )

    tx = optax.partition(
        {"curved": ah.adahessian(0.05), "adam": optax.adam(1e-2)}, labels
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    before = nnx.as_pure(nnx.state(model, nnx.Param))
    if path == "fused":
        fused = value_and_grad_with_curvature(
            lambda m, x: (nnx_loss(m, x, Y), jnp.mean(x)),
            ah.hutchinson(),
            has_aux=True,
        )
        (loss, mean), grads, curvature = fused(model, X, optimizer=optimizer)
        np.testing.assert_allclose(mean, jnp.mean(X), rtol=1e-6)
        optimizer.update(model, grads, curvature=curvature)
    else:
        loss, grads = nnx.value_and_grad(nnx_loss)(model, X, Y)
        objective = functional(lambda m: nnx_loss(m, X, Y), model)
        optimizer.update(model, grads, obj_fn=objective)
    after = nnx.as_pure(nnx.state(model, nnx.Param))
    moved = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), after, before)
    np.testing.assert_allclose(moved["last"]["kernel"], 1e-2, rtol=1e-3)
    assert moved["first"]["kernel"] > 1e-2
    assert nnx_loss(model, X, Y) < loss


@nnx_only
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
@pytest.mark.parametrize(
    "extra_args", [{}, {"obj_fn": lambda p: jnp.ones(2)}, {"x": 1}]
)
def test_nnx_after_a_failed_update(extra_args, jit):
    """A module and its optimizer, which are mutable, are as before."""
    from flax import nnx

    model = nnx_net(0.0)
    optimizer = nnx.Optimizer(model, ah.adahessian(0.05), wrt=nnx.Param)
    before = jax.tree.map(jnp.copy, nnx.as_pure(nnx.state((model, optimizer))))
    grads = jax.tree.map(jnp.ones_like, nnx.state(model, nnx.Param))

    def update(model, optimizer):
        optimizer.update(model, grads, **extra_args)

    with pytest.raises((ValueError, TypeError), match="obj_fn"):
        (nnx.jit(update) if jit else update)(model, optimizer)
    chex.assert_trees_all_equal(nnx.as_pure(nnx.state((model, optimizer))), before)


@nnx_only
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"loss_fn": 3}, TypeError, "loss_fn must be a callable"),
        ({"estimator": "hutchinson"}, TypeError, "estimator must be an optax"),
        ({"has_aux": 1}, TypeError, "has_aux must be True or False, got 1"),
        ({"curvature_batch": 0}, ValueError, "curvature_batch must be >= 1, got 0"),
        ({"microbatches": 0}, ValueError, "microbatches must be >= 1, got 0"),
    ],
    ids=["loss_fn", "estimator", "has_aux", "curvature_batch", "microbatches"],
)
def test_nnx_bad_arguments(options, error, message):
    from adahessian_jax.nnx import functional, value_and_grad_with_curvature

    right = {
        "loss_fn": lambda model, x: jnp.sum(model(x)),
        "estimator": ah.hutchinson(),
    }
    with pytest.raises(error, match="^" + message):
        value_and_grad_with_curvature(**{**right, **options})
    with pytest.raises(TypeError, match=r"^fun must be a callable module -> result"):
        functional(3, flax.nnx.Linear(2, 1, rngs=flax.nnx.Rngs(0)))
