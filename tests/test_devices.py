# SPDX-License-Identifier: Apache-2.0
"""Training on several devices: pmap, shard_map, jit over a mesh, and two processes."""

import collections
import functools
import os
import pathlib
import re
import socket
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import adahessian_jax as ah
from adahessian_jax._src.axes import as_varying
from adahessian_jax._src.probes import rademacher_like
from tests.problems import at_once

N = 8
pytestmark = pytest.mark.skipif(
    jax.device_count() < N, reason=f"needs {N} devices; conftest.py makes CPU ones"
)
P = PartitionSpec
TYPES = getattr(jax.sharding, "AxisType", None)
PARTS = "two parts"
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16))
Y = RNG.normal(size=(64, 8))
PARAMS = {"w": RNG.normal(size=(16, 32)) / 4, "b": np.zeros(32)}
PARAMS["v"] = RNG.normal(size=(32, 8)) / 5


@pytest.fixture(autouse=True)
def settings():
    """Let optax.adam mix dtypes, and every device draw its part of the random bits.

    Numbers are of double precision where it is on: small curvature magnifies rounding.
    """
    with jax.numpy_dtype_promotion("standard"), jax.threefry_partitionable(True):
        yield


def predict(params, x):
    params = jax.tree.map(gathered, params)
    hidden = jnp.tanh(jnp.dot(x, params["w"]) + params["b"])
    return jnp.dot(hidden, params["v"])


def gathered(x):
    """Ask for the whole of an array whose type says that it is sharded."""
    sharding = jax.typeof(x).sharding if hasattr(jax, "set_mesh") else None
    if sharding is None or not any(sharding.spec):
        return x
    return jax.sharding.reshard(x, NamedSharding(sharding.mesh, P()))


LOSS, L2 = ah.losses.squared_error, ah.losses.l2_loss


def loss_fn(params, x, y):
    return LOSS(predict(params, x), y)


def loss_and_outputs(params, x, y):
    outputs = predict(params, x)
    return LOSS(outputs, y), outputs


ESTIMATORS = ("hutchinson", "low-rank", "gauss-newton-control", "gauss-newton")
ESTIMATORS += ("in-eigenbasis",)
OPTIMIZERS = (*ESTIMATORS, "newton")


def make_estimator(name, axis_name=None, loss=LOSS):
    over, factor = {"axis_name": axis_name}, ah.gauss_newton(loss, axis_name=axis_name)
    controls = None, ah.low_rank_control(2), ah.gauss_newton_control(loss)
    estimators = [ah.hutchinson(control_variate=c, **over) for c in controls]
    estimators += [factor, ah.in_eigenbasis(factor, max_dim=16, n_vectors=4)]
    return dict(zip(ESTIMATORS, estimators, strict=True))[name]


def make_optimizer(name, axis_name=None, estimator=None, **options):
    if name == "subspace":
        return ah.subspace_newton(LOSS, update_interval=2, axis_name=axis_name)
    if name == "newton":  # with its own learning rate
        options = {"update_interval": 2, "initial_refreshes": 1}
        return ah.newton(None, LOSS, axis_name=axis_name, **options)
    estimator = estimator or make_estimator(name, axis_name)
    options = {"update_interval": 2, "clip_threshold": 1.0} | options
    return ah.adahessian(0.02, estimator=estimator, **options)


def make_step(tx, name, path, axis_name=None):
    """Return a step for one device's part of the batch."""
    wants_outputs = name in (
        "newton",
        "subspace",
        "gauss-newton-control",
        *ESTIMATORS[3:],
    )
    function = loss_and_outputs if wants_outputs else loss_fn
    parts = 2 if path == PARTS else 1
    fused = ah.value_and_grad_with_curvature(function, tx, microbatches=parts)
    labels = (lambda y: y) if name == "gauss-newton-control" else lambda y: None

    def step(params, state, x, y):
        extra_args = {"predict_fn": lambda p: predict(p, x)}
        if path == "function":
            grads = jax.grad(loss_fn)(as_varying(params, axis_name), x, y)
            extra_args |= {"obj_fn": lambda p: loss_fn(p, x, y), "labels": y}
        else:
            _, grads, curvature = fused(params, x, y, state=state, labels=labels(y))
            extra_args["curvature"] = curvature
        if axis_name is not None:
            grads = jax.lax.pmean(grads, axis_name)
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    return step


def train(step, params, state, x, y, steps=4):
    for _ in range(steps):
        # Many steps at once, of more devices than cores, can deadlock on CPU.
        params, state = jax.block_until_ready(step(params, state, x, y))
    return params, state


# Bases for which no curvature was seen yet are known to the root of rounding only.
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-8)


def mesh_of(n=N, kind="Auto"):
    kinds = {"axis_types": (getattr(TYPES, kind),)} if TYPES else {}
    return jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], **kinds)


def on_devices(step, mesh=None, **check):
    """Return a step for the whole batch, by shard_map."""
    specs = {"mesh": mesh or mesh_of(), "out_specs": (P(), P())}
    specs["in_specs"] = (P(), P(), P("data"), P("data"))
    if hasattr(jax, "shard_map"):
        return jax.jit(jax.shard_map(step, **specs, **check))
    from jax.experimental.shard_map import shard_map

    # Its check does not know lax.cond.
    return jax.jit(shard_map(step, check_rep=False, **specs))


@pytest.mark.parametrize("name", at_once([*OPTIMIZERS, "subspace"], ["gauss-newton"]))
def test_pmap_and_shard_map_are_the_same(name, x64):
    """With its account of what varies and without; replicas have the same bits."""
    tx = make_optimizer(name, "data")
    steps = [make_step(tx, name, path, "data") for path in ("function", "fused")]
    start = jax.tree.map(jnp.asarray, (PARAMS, tx.init(PARAMS)))
    copies = jax.tree.map(lambda x: jnp.stack([x] * N), start)
    dealt = X.reshape(N, -1, 16), Y.reshape(N, -1, 8)
    ends = [train(jax.pmap(steps[0], axis_name="data"), *copies, *dealt)]
    for step, check in zip(steps, ({"check_vma": False}, {}), strict=True):
        ends.append(train(on_devices(step, **check), *start, X, Y))
    for i, end in enumerate(ends):
        first, *others = (
            jax.tree.map(lambda x, j=j: np.asarray(x.addressable_shards[j].data), end)
            for j in range(N)
        )
        for other in others:
            chex.assert_trees_all_equal(first, other)
        ends[i] = jax.tree.map(lambda x, like: x.reshape(like.shape), first[0], PARAMS)
    assert_close(ends[0], ends[1])
    assert_close(ends[0], ends[2])


def test_an_estimate_is_that_of_the_whole_batch():
    """Rows weigh the same whichever device has them: exact, as for one device.

    Each parameter has a row of its own, so no estimate depends on the signs.
    """
    x = jnp.asarray(RNG.normal(size=16), jnp.float32)
    weights = jnp.asarray(RNG.uniform(0.1, 2.0, size=16), jnp.float32).at[3].set(0.0)
    even, start, total = jnp.ones(16), jnp.ones(16), L2.replace(reduction="sum")
    cases = [(n, of, weights) for n in ESTIMATORS[2:] for of in (L2, total)]
    cases += [(name, L2, even) for name in ESTIMATORS[:2]]

    def estimates(params, state, x, weights_and_rows):
        weights, rows = weights_and_rows.T
        labels, results = jnp.zeros((len(x), 1)), []
        for name, of, w in cases:
            where = jnp.ones_like(weights) if w is even else weights

            def outputs(p, where=where):
                return (p[rows.astype(int)] * x)[:, None], where

            estimator = make_estimator(name, "data", of)
            extra = {"obj_fn": lambda p, of=of, f=outputs: of(f(p)[0], labels)}
            extra |= {"predict_fn": outputs, "labels": labels}
            state = estimator.init(params)
            results.append(estimator.update(None, state, params, **extra)[0])
        return tuple(results), ()

    batch = x, jnp.stack([weights, jnp.arange(16.0)], axis=1)
    got, _ = on_devices(estimates)(start, (), *batch)
    for (name, of, w), d in zip(cases, got, strict=True):
        expected = w * x**2 / (jnp.sum(w) if of is L2 else 1)
        np.testing.assert_allclose(d, expected, rtol=1e-5, err_msg=f"{name} {of}")


KINDS = ["mean in the loss", "sum in the loss", "norm"]


@pytest.mark.skipif(not hasattr(jax, "typeof"), reason="older JAX draws other signs")
@pytest.mark.parametrize("check_vma", at_once([True, False], [True]))
@pytest.mark.parametrize("kind", at_once(KINDS, KINDS[:1]))
def test_a_function_that_communicates(kind, check_vma, x64):
    """Its curvature is that of the whole batch, of which devices see parts only."""
    w, x, y = jnp.asarray(PARAMS["w"][:3, :2]), jnp.asarray(X[:16, :3]), Y[:16, :2]
    loss = LOSS.replace(reduction="sum" if kind == "sum in the loss" else "mean")
    reduced = {"mean in the loss": jax.lax.pmean, "sum in the loss": jax.lax.psum}
    reduced = reduced.get(kind, lambda value, axis: value)

    def outputs(w, x, shared=lambda m: m):
        h = jnp.tanh(jnp.dot(x, w))
        return h / jnp.sqrt(shared(jnp.mean(h**2))) if kind == "norm" else h

    def predict(w, x):
        return outputs(w, x, lambda m: jax.lax.pmean(m, "data"))

    def value_and_outputs(w, x, y):
        f = predict(w, x)
        return reduced(loss(f, y), "data"), f

    def estimates(w, state, x, y):
        estimator = make_estimator(name, "data", loss)
        optimizer = ah.adahessian(0.1, estimator=estimator)
        function = value_and_outputs
        if name == "hutchinson":
            function = lambda *args: value_and_outputs(*args)[0]  # noqa: E731
        fused = ah.value_and_grad_with_curvature(function, optimizer)
        _, grads, curvature = fused(w, x, y, state=state, labels=y)
        args = {"obj_fn": lambda w: value_and_outputs(w, x, y)[0]}
        args |= {"predict_fn": lambda w: predict(w, x), "labels": y}
        inner = state[0].curvature.estimator_state
        alone, _ = estimator.update(None, inner, w, **args)
        return (curvature.estimate, alone), jax.lax.pmean(grads, "data")

    def signs(i, like, inner):
        key = jax.random.split(jax.random.fold_in(subkey, i), 1)[0]
        key = jax.random.fold_in(key, 1) if inner else key
        return rademacher_like(key, like)

    rows = 1 if loss.reduction == "sum" else y.size
    j = np.sqrt(2 / rows) * jax.jacobian(outputs)(w, x).reshape(-1, w.size)
    whole = jax.grad(lambda w: loss(outputs(w, x), y))
    hessian = jax.jacobian(whole)(w).reshape(w.size, w.size)
    subkey = jax.random.split(jax.random.PRNGKey(0))[1]
    z = rademacher_like(jax.random.split(subkey, 1)[0], w).ravel()
    for name in ("hutchinson", "gauss-newton", "gauss-newton-control"):
        if rows == 1 and name == "gauss-newton-control":
            continue  # refused
        state = ah.adahessian(0.1, estimator=make_estimator(name)).init(w)
        got, g = on_devices(estimates, check_vma=check_vma)(w, state, x, y)
        np.testing.assert_allclose(g, whole(w), rtol=1e-8, err_msg=name)
        inner = name == "gauss-newton-control"
        u = [signs(i, jnp.zeros((2, 2)), inner).ravel() for i in range(N)]
        parts = [a.T @ b for a, b in zip(np.split(j, N), u, strict=True)]
        squares = np.sum(parts, axis=0) ** 2, np.sum(np.square(parts), axis=0)
        for d, alone in zip(got, (False, True), strict=True):
            square = squares[alone and kind != "norm"]
            expected = {
                "hutchinson": z * (hessian @ z),
                "gauss-newton": square,
                "gauss-newton-control": square + z * ((hessian - j.T @ j) @ z),
            }[name]
            np.testing.assert_allclose(d.ravel(), expected, rtol=1e-7, err_msg=name)


@pytest.mark.skipif(not hasattr(jax, "typeof"), reason="older JAX keeps no account")
@pytest.mark.parametrize(
    "name", at_once(OPTIMIZERS[2:], ["gauss-newton-control", "newton"])
)
def test_a_forgotten_axis_name_is_refused(name):
    """And what the message asks for is all that was missing.

    Not so where derivatives alone are taken, which JAX adds up over devices.
    """

    def first_step(axis_name):
        tx = make_optimizer(name, axis_name)
        step, start = make_step(tx, name, "function", axis_name), (PARAMS,)
        return on_devices(step)(*start, tx.init(*start), X, Y)

    with pytest.raises(ValueError, match="axis_name='data' must be given"):
        first_step(None)
    first_step("data")
    tx = make_optimizer("hutchinson")

    def update(params, state, x, y):
        return tx.update(params, state, params, hessian_diag=jnp.mean(x))

    with pytest.raises(ValueError, match="axis_name='data' must be given"):
        on_devices(update)(jnp.ones(()), tx.init(jnp.ones(())), X, Y)


def collectives(step, *args):
    """Count what is exchanged in a compiled program, by kind and shape."""
    text = step.lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text)
    shapes = [(kind, re.findall(r"\w+\[[\d,]*\]", shape)) for shape, kind in found]
    return collections.Counter((kind, x) for kind, more in shapes for x in more)


def placed_like(x, other):
    """Put an array where another is, which may be on no device in particular."""
    many = len(other.sharding.device_set) > 1
    return jax.device_put(x, other.sharding if many else None)


# Explicit axes, where they are to be had, and automatic ones with more to count.
MESHES = [("Auto", "function"), ("Explicit", "fused"), ("Explicit", PARTS)]
BOTH = [(i, name, j) for i, name in enumerate(OPTIMIZERS) for j in range(2)]
MESH_CASES = [(name, *MESHES[(i + j) % 3], j == 1) for i, name, j in BOTH]
MESH_CASES += [("newton", *MESHES[1], True)]
MESH_CASES += [("subspace", *MESHES[j], j == 1) for j in range(2)]
FIRST_CASES = [c for c in MESH_CASES if c[1:] == ("Explicit", "fused", True)]


@pytest.mark.parametrize("case", at_once(MESH_CASES, FIRST_CASES), ids=str)
def test_jit_over_a_mesh(case, x64):
    """A program over sharded arrays does what it does on one device.

    Where parameters are replicated it adds parts of sums up, and moves nothing.
    """
    name, kind, path, sharded = case
    if kind == "Explicit" and not hasattr(jax, "set_mesh"):
        pytest.skip("this version of JAX has no explicit sharding")
    if name == "gauss-newton-control" and jax.__version_info__ < (0, 10):
        pytest.skip("older versions of XLA shard the bias of a replicated network")
    tx, mesh = make_optimizer(name), mesh_of(kind=kind)
    step = jax.jit(make_step(tx, name, path))
    start = train(step, PARAMS, tx.init(PARAMS), X, Y)
    expected, _ = train(step, *start, X, Y)
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    sharding = NamedSharding(mesh, P("data") if sharded else P())
    params = jax.device_put(jax.tree.map(np.asarray, start[0]), sharding)
    state = tx.init(params)
    trees = [state[0].mu, state[0].curvature.nu]
    state = jax.tree.map(placed_like, start[1], state)
    if not sharded:
        found = collectives(step, params, state, *batch)
        assert {kind for kind, _ in found} == {"all-reduce"}
    got = train(step, params, state, *batch)
    trees += [got[0], got[1][0].mu, got[1][0].curvature.nu]
    for leaf in jax.tree.leaves(trees):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert_close(got[0], expected)


SOAPS = {
    "published": ah.published.soap(0.02, precondition_frequency=2),
    "soap": ah.soap(0.02, turn_interval=2),
    "leading": ah.soap(0.02, turn_interval=2, max_dim=4, n_vectors=3),
}
SQUARE = {k: RNG.normal(size=(8, 8)) for k in ("w1", "w2")}  # whose axes are unique
SQUARE["b"] = np.zeros(8)


@pytest.mark.slow
@pytest.mark.parametrize("name", SOAPS)
@pytest.mark.parametrize("kind", ["Auto", "Explicit", "shard_map"])
def test_soap_on_devices(kind, name, x64):
    """Parameters whole, or cut along an axis, alike or not, end as on one device."""
    soap = SOAPS[name]
    if kind == "Explicit" and not hasattr(jax, "set_mesh"):
        pytest.skip("this version of JAX has no explicit sharding")

    def step(params, state, x, y):
        grads = jax.tree.map(lambda p: jnp.sin(3 * p) + p, params)
        updates, state = soap.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    start = SQUARE, soap.init(SQUARE)
    expected, _ = train(jax.jit(step), *start, X, Y, 6)
    if kind == "shard_map":
        got, _ = train(on_devices(step), *start, X, Y, 6)
        return assert_close(got, expected)
    mesh = mesh_of(kind=kind)
    rows, columns = P("data"), P(None, "data")
    for specs in ((P(), P()), (rows, rows), (rows, columns), (P(), columns)):
        pairs = zip(SQUARE, (*specs, P()), strict=True)
        cut = {k: NamedSharding(mesh, spec) for k, spec in pairs}
        params = jax.device_put(SQUARE, cut)
        batch = jax.device_put((X, Y), NamedSharding(mesh, P()))
        got, _ = train(jax.jit(step), params, soap.init(params), *batch, 6)
        if kind == "Explicit" or specs[0] == specs[1]:  # or else the compiler decides
            for k in ("w1", "w2"):
                assert got[k].sharding.is_equivalent_to(cut[k], 2)
        assert_close(got, expected)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs a newer JAX")
@pytest.mark.slow
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", ["soap", "leading"])
def test_turning_on_explicit_axes_costs_what_it_does_on_automatic_ones(name, axis):
    """In operations and in what is exchanged: whole tensors by complete bases only."""
    shape, soap = (16, 32), SOAPS[name]

    def step(params, state):
        grads = jax.tree.map(jnp.sin, params)
        updates, state = soap.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    flops, exchanged = {}, {}
    for kind in ("Auto", "Explicit"):
        mesh = mesh_of(kind=kind)
        whole = NamedSharding(mesh, P())
        w = NamedSharding(mesh, P(*[None] * axis, "data"))
        params = {"w": jnp.ones(shape, jnp.float32), "b": jnp.ones(8, jnp.float32)}
        params = jax.device_put(params, {"w": w, "b": whole})
        state = jax.tree.map(
            lambda x, w=w, whole=whole: jax.device_put(
                x, w if x.shape == shape else whole
            ),
            soap.init(params),
        )
        kept = jax.tree.map(lambda x: x.sharding, (params, state))
        with jax.set_mesh(mesh):
            jitted = jax.jit(step, out_shardings=kept)
            costs = jitted.lower(params, state).compile().cost_analysis()
            exchanged[kind] = collectives(jitted, params, state)
        flops[kind] = costs["flops"]
    assert flops["Explicit"] <= 1.02 * flops["Auto"]
    assert exchanged["Explicit"].total() <= exchanged["Auto"].total()
    gathers = [exchanged[kind]["all-gather", "f32[16,32]"] for kind in exchanged]
    assert (min(gathers) > 0) == (name == "soap")


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs a newer JAX")
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", at_once(["hutchinson", "newton"], ["newton"]))
@pytest.mark.parametrize("cut", at_once(["state", "params"], ["state"]))
def test_a_state_cut_otherwise_than_the_parameters(cut, name, kind, x64):
    """Is right on automatic axes, and refused on explicit ones."""
    tx, mesh = make_optimizer(name), mesh_of(kind=kind)
    step, start = make_step(tx, name, "function"), tx.init(PARAMS)
    expected, _ = train(jax.jit(step), PARAMS, start, X, Y, 6)
    spec = {"state": P(), "params": P(), cut: P("data")}
    params = jax.device_put(PARAMS, NamedSharding(mesh, spec["params"]))
    shapes = {np.shape(x) for x in PARAMS.values()}
    specs = [
        spec["state"] if x.shape in shapes else P() for x in jax.tree.leaves(start)
    ]
    places = [NamedSharding(mesh, one) for one in specs]
    state = jax.device_put(start, jax.tree.unflatten(jax.tree.structure(start), places))
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    with jax.set_mesh(mesh):
        kept = jax.tree.map(lambda x: x.sharding, (params, state))
        jitted = jax.jit(step, out_shardings=kept)
        if kind == "Explicit":
            with pytest.raises(
                ValueError, match=r"state.mu must be sharded over the mesh"
            ):
                jitted(params, state, *batch)
            return
        got, _ = train(jitted, params, state, *batch, 6)
    assert_close(got, expected)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs a newer JAX")
@pytest.mark.parametrize("name", at_once([*SOAPS, "hutchinson"], ["hutchinson"]))
def test_a_state_made_by_jit_is_as_good(name, x64):
    """On a mesh of explicit axes, of which ``jit`` is not told."""
    tx = SOAPS[name] if name in SOAPS else make_optimizer(name, update_interval=1)
    mesh = mesh_of(kind="Explicit")
    params = jax.device_put(SQUARE, NamedSharding(mesh, P("data")))

    def objective(p):
        return sum(jnp.sum(jnp.sin(x) ** 2 + x**4) for x in jax.tree.leaves(p))

    @jax.jit
    def step(params, state, x, y):
        grads = jax.grad(objective)(params)
        extra_args = {"obj_fn": objective} if name == "hutchinson" else {}
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    expected, _ = train(step, params, tx.init(params), X, Y)
    got, _ = train(step, params, jax.jit(tx.init)(params), X, Y)
    assert_close(got, expected)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs a newer JAX")
@pytest.mark.slow
@pytest.mark.parametrize("axes", ["a", "-b", "ab"])
def test_diagnostics_of_what_explicit_axes_cut(axes, x64):
    """And the check of a loss by one's own, at outputs that they cut."""
    kinds = (TYPES.Explicit,) * 2
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), devices=jax.devices()[:4], axis_types=kinds
    )
    soap, whole = SOAPS["leading"], jax.tree.map(jnp.float64, SQUARE)
    with jax.set_mesh(mesh):
        spec = P(*(None if a == "-" else a for a in axes))
        cut = dict.fromkeys(("w1", "w2"), NamedSharding(mesh, spec))
        cut["b"] = NamedSharding(mesh, P("a"))
        reports = []
        for params in (whole, jax.device_put(whole, cut)):
            updates, state = jax.jit(soap.update)(params, soap.init(params), params)
            look = functools.partial(ah.diagnostics, updates=updates, estimate=params)
            reports += [look(state), jax.jit(look)(state)]
        for report in reports[1:]:
            chex.assert_trees_all_close(report, reports[0], rtol=1e-5)
        L2.check(lambda f: L2(f, 0 * f), jax.device_put(whole["w1"], cut["w1"]))


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs a newer JAX")
def test_turning_where_only_one_axis_is_manual(x64):
    """Inside shard_map of an axis, beside an explicit one that cuts parameters."""
    kinds = TYPES.Auto, TYPES.Explicit
    mesh = jax.make_mesh(
        (2, 2), ("a", "b"), devices=jax.devices()[:4], axis_types=kinds
    )
    grads, soap = jax.tree.map(jnp.asarray, SQUARE), SOAPS["soap"]
    expected, _ = soap.update(grads, soap.init(SQUARE), SQUARE)
    with jax.set_mesh(mesh):
        w = jax.device_put(SQUARE, NamedSharding(mesh, P()))
        w["w1"] = jax.device_put(SQUARE["w1"], NamedSharding(mesh, P(None, "b")))

        def update(state, w):
            return soap.update(w, state, w)[0]

        specs = {"in_specs": P(), "out_specs": P(), "axis_names": {"a"}}
        got = jax.jit(jax.shard_map(update, **specs))(soap.init(w), w)
    assert_close(got, expected)


@pytest.mark.skipif(not hasattr(jax, "set_mesh"), reason="needs a newer JAX")
def test_parts_of_parameters_in_shard_map_are_refused():
    """Where signs would be the same for other parts, or other parts averaged."""
    mesh, w = mesh_of(), jnp.ones(8)

    def estimate(estimator):
        def diagonal(w):
            total = lambda w: jax.lax.psum(w, "data")  # noqa: E731
            args = {"obj_fn": lambda w: jnp.sum(total(w) ** 2), "predict_fn": total}
            return estimator.update(None, estimator.init(w), w, **args)[0]

        return jax.shard_map(
            diagonal, mesh=mesh, in_specs=P("data"), out_specs=P("data")
        )(w)

    for estimator in (
        ah.hutchinson(),
        ah.hutchinson(axis_name="data"),
        ah.gauss_newton(LOSS, axis_name="data"),
    ):
        with pytest.raises(ValueError, match="params must be the same on all devices"):
            estimate(estimator)
    np.testing.assert_allclose(estimate(ah.gauss_newton(LOSS)), 2.0)
    # Nor sums over parameters, of which each device has a part.
    model = ah.scale_by_quadratic_model(LOSS)
    over_parts = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P()
    )
    for sums in (
        lambda w: model.update(w, model.init(w), w, grad=w, predict_fn=jnp.sum)[0],
        lambda w: ah.largest_eigenvalues(jnp.sum, w).values,
    ):
        with pytest.raises(ValueError, match="params must be the same on all devices"):
            over_parts(sums)(w)


@pytest.mark.slow
def test_fully_sharded_steps_gather_no_state():
    """Parameters are gathered as often as for Adam, and the probe once.

    Not in an eigenbasis, which mixes all of an axis. An update alone exchanges how many
    entries of each leaf were not finite.
    """
    mesh = mesh_of()
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P("data")))

    def gathered(step, state):
        found = collectives(jax.jit(step), params, state, *batch)
        shapes = ("f32[16,32]", "f32[32,8]", "f32[32]")
        return sum(found["all-gather", shape] for shape in shapes)

    adam = optax.adam(1e-3)

    def adam_step(params, state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    of_adam = gathered(adam_step, adam.init(params))
    # The control's factor is that of a network linearised in a pass of its own.
    for name, passes, probes in zip(
        ESTIMATORS[:4], (1, 1, 2, 1), (1, 1, 1, 0), strict=True
    ):
        tx = make_optimizer(name, update_interval=1)
        ours = gathered(make_step(tx, name, "fused"), tx.init(params))
        assert ours <= passes * of_adam + probes * len(PARAMS), name

    def update(grads, state, params):
        return tx.update(grads, state, params, hessian_diag=grads)

    found = collectives(jax.jit(update), params, tx.init(params), params)
    assert set(found) <= {("all-reduce", "s32[]")}
    assert found.total() <= len(PARAMS)


def test_probes_are_the_same_anywhere_and_not_exchanged():
    """Each device unpacks the signs of its part, along whichever axis it is cut."""
    shapes = {"row": (2048,), "short": (264,), "matrix": (96, 200), "last": (9, 1024)}
    shapes |= {"narrow": (40, 96), "uneven": (1040,)}
    shapes |= {"column": (1040, 2), "kernel": (3, 3, 16, 24), "layers": (8, 16, 16)}
    axes = {"kernel": 3, "last": 1, "narrow": 1}
    specs = {k: P(*[None] * axes.get(k, 0), "data") for k in shapes}
    ones = {k: jnp.ones(shape) for k, shape in shapes.items()}

    @jax.jit
    def signs(key, tree):
        probe = rademacher_like(key, tree)
        return jax.tree.map(jnp.multiply, probe, tree)

    key, mesh = jax.random.key(3), mesh_of()
    cut = {k: jax.device_put(x, NamedSharding(mesh, specs[k])) for k, x in ones.items()}
    assert not collectives(signs, key, cut)
    got = signs(key, cut)
    for k, x in cut.items():
        assert got[k].sharding.is_equivalent_to(x.sharding, x.ndim)
    chex.assert_trees_all_equal(got, signs(key, ones))


def test_all_probes_of_a_device_are_summed_before_they_are_exchanged():
    def exchanged(n_samples):
        estimator = ah.hutchinson(n_samples, axis_name="data")
        tx = make_optimizer("hutchinson", estimator=estimator, update_interval=1)
        step = on_devices(make_step(tx, "hutchinson", "fused", "data"))
        return collectives(step, PARAMS, tx.init(PARAMS), X, Y)

    one = exchanged(1)
    assert one
    assert exchanged(4) == one


@pytest.mark.slow
def test_two_processes(tmp_path):
    """Two hosts of 4 devices each, and one of 8 from their checkpoint, end alike."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    script = pathlib.Path(__file__).with_name("two_processes.py")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_X64": "1"}
    env["PYTHONPATH"] = str(script.parents[1])
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    files = [tmp_path / f"{i}.npz" for i in range(3)]
    for together in ([(2, 0, files[0]), (2, 1, files[1])], [(1, 0, files[2])]):
        runs = []
        for n, i, file in together:
            argv = [sys.executable, script, address, str(n), str(i), file, tmp_path]
            runs.append(subprocess.Popen(argv, env=env, **pipes))
        for run in runs:
            output, _ = run.communicate(timeout=300)
            assert run.returncode == 0, output
    first, second, single = (dict(np.load(file)) for file in files)
    assert len(first) > 20
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_close(first, single, rtol=1e-4, atol=1e-6)
