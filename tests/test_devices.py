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

N = 8
pytestmark = pytest.mark.skipif(
    jax.device_count() < N, reason=f"needs {N} devices; conftest.py makes CPU ones"
)
P = PartitionSpec
TYPES = getattr(jax.sharding, "AxisType", None)
SLOW = pytest.mark.slow
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16))
Y = RNG.normal(size=(64, 8))
PARAMS = {
    "w": RNG.normal(size=(16, 32)) / 4,
    "b": np.zeros(32),
    "v": RNG.normal(size=(32, 8)) / 5,
}


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


LOSS = ah.losses.squared_error


def loss_fn(params, x, y):
    return LOSS(predict(params, x), y)


def loss_and_outputs(params, x, y):
    outputs = predict(params, x)
    return LOSS(outputs, y), outputs


def make_estimator(name, axis_name=None, loss=LOSS):
    gauss_newton = ah.gauss_newton(loss, axis_name=axis_name)
    if name == "gauss-newton":
        return gauss_newton
    if name == "in-eigenbasis":
        return ah.in_eigenbasis(gauss_newton, max_dim=16, n_vectors=4)
    control = {
        "hutchinson": None,
        "low-rank": ah.low_rank_control(2),
        "gauss-newton-control": ah.gauss_newton_control(loss),
    }[name]
    return ah.hutchinson(control_variate=control, axis_name=axis_name)


ESTIMATORS = (
    "hutchinson",
    "low-rank",
    "gauss-newton-control",
    "gauss-newton",
    "in-eigenbasis",
)
OPTIMIZERS = (*ESTIMATORS, "newton")


def make_optimizer(name, axis_name=None, estimator=None, **options):
    if name == "newton":  # with its own learning rate
        options = {"update_interval": 2, "initial_refreshes": 1}
        return ah.newton(None, LOSS, axis_name=axis_name, **options)
    estimator = estimator or make_estimator(name, axis_name)
    options = {"update_interval": 2, "clip_threshold": 1.0} | options
    return ah.adahessian(0.02, estimator=estimator, **options)


def make_step(tx, name, path, axis_name=None):
    """Return a step for one device's part of the batch."""
    wants_outputs = name in ("newton", "gauss-newton-control", *ESTIMATORS[3:])
    fused = ah.value_and_grad_with_curvature(
        loss_and_outputs if wants_outputs else loss_fn,
        tx,
        microbatches=2 if path == "two parts" else 1,
    )
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


# More estimates than an axis has vectors: those of a basis for which no curvature was
# seen yet are known to the root of rounding only.
WARM_UP = 80

# In double precision the order of sums changes a step by 1e-16 or so.
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-12, atol=1e-13)


def mesh_of(n=N, kind="Auto"):
    kinds = {"axis_types": (getattr(TYPES, kind),)} if TYPES else {}
    return jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], **kinds)


def on_devices(kind, step, mesh=None):
    """Return a step for the whole batch; by pmap all else has an axis of devices."""
    if kind == "pmap":
        many = jax.pmap(step, axis_name="data")
        return lambda params, state, *batch: many(
            params, state, *(x.reshape(N, -1, *x.shape[1:]) for x in batch)
        )
    specs = {
        "mesh": mesh or mesh_of(),
        "in_specs": (P(), P(), P("data"), P("data")),
        "out_specs": (P(), P()),
    }
    if hasattr(jax, "shard_map"):
        return jax.jit(jax.shard_map(step, check_vma=kind == "shard_map", **specs))
    from jax.experimental.shard_map import shard_map

    # Its check does not know lax.cond.
    return jax.jit(shard_map(step, check_rep=False, **specs))


def train_on_devices(kind, step, params, state, steps=4):
    """Train, see that all devices end with the same bits, and return those of one."""
    start = jax.tree.map(jnp.asarray, (params, state))
    if kind == "pmap":
        start = jax.tree.map(lambda x: jnp.stack([x] * N), start)
    end = train(on_devices(kind, step), *start, X, Y, steps)
    first, *others = (
        jax.tree.map(lambda x, i=i: np.asarray(x.addressable_shards[i].data), end)
        for i in range(N)
    )
    for other in others:
        chex.assert_trees_all_equal(first, other)
    return jax.tree.map(lambda x, like: x.reshape(like.shape), first[0], params)


def emulated(step, params, state, steps):
    """Train on one device, as if on many; return what the first has."""
    many = jax.vmap(step, in_axes=(None, None, 0, 0), axis_name="data", axis_size=N)
    first = jax.jit(lambda *args: jax.tree.map(lambda x: x[0], many(*args)))
    batch = X.reshape(N, -1, 16), Y.reshape(N, -1, 8)
    warm = train(first, params, state, *batch, WARM_UP)
    return warm, train(first, *warm, *batch, steps)[0]


KINDS = ("pmap", "shard_map", "shard_map-unchecked")
PATHS = ("function", "fused", "two parts")
# Each optimizer in each kind, the paths in turn; two thirds of it in CI only.
CASES = [
    pytest.param(name, kind, PATHS[(i + 2 * j) % 3], marks=[SLOW] * ((i + j) % 3 > 0))
    for i, name in enumerate(OPTIMIZERS)
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("name", "kind", "path"), CASES)
def test_all_ways_over_devices_are_the_same(name, kind, path, x64):
    """shard_map's account of what varies changes nothing; replicas stay the same."""
    tx = make_optimizer(name, "data")
    same = path if path == "two parts" else "function"  # its parts draw on their own
    oracle = make_step(tx, name, same, "data")
    start, expected = emulated(oracle, PARAMS, tx.init(PARAMS), 4)
    step = make_step(tx, name, path, "data")
    assert_close(train_on_devices(kind, step, *start), expected)


def test_the_same_probe_on_each_device_gives_the_run_of_one(x64):
    """Hutchinson's estimate is linear in the batch if the probe is the same."""
    signs = ah.rademacher_like(jax.random.key(3), PARAMS)
    ends = []
    for axis_name in ("data", None):
        estimator = ah.hutchinson(probe=lambda key, p: signs, axis_name=axis_name)
        tx = make_optimizer("hutchinson", estimator=estimator)
        step = make_step(tx, "hutchinson", "fused", axis_name)
        step = on_devices("shard_map", step) if axis_name else jax.jit(step)
        ends.append(train(step, PARAMS, tx.init(PARAMS), X, Y, 20)[0])
    chex.assert_trees_all_close(*ends, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_estimate_is_that_of_the_whole_batch(kind):
    """Rows weigh the same whichever device has them: exact, as for one device.

    Each parameter has a row of its own, so no estimate depends on the signs.
    """
    x = jnp.asarray(RNG.normal(size=16), jnp.float32)
    weights = jnp.asarray(RNG.uniform(0.1, 2.0, size=16), jnp.float32).at[3].set(0.0)
    even, params = jnp.ones(16), jnp.ones(16)
    loss = ah.losses.l2_loss
    cases = [(name, loss, weights) for name in ESTIMATORS[2:]]
    cases += [(name, loss.replace(reduction="sum"), weights) for name in ESTIMATORS[2:]]
    cases += [(name, loss, even) for name in ESTIMATORS[:2]]

    def estimates(params, state, x, weights_and_rows):
        results = []
        for name, loss, w in cases:
            weights, rows = weights_and_rows.T
            rows = rows.astype(int)
            where = jnp.ones_like(weights) if w is even else weights

            def outputs(p, rows=rows, where=where):
                return (p[rows] * x)[:, None], where

            def objective(p, loss=loss, outputs=outputs):
                return loss(outputs(p)[0], jnp.zeros((len(x), 1)))

            estimator = make_estimator(name, "data", loss)
            results.append(
                estimator.update(
                    None,
                    estimator.init(params),
                    params,
                    predict_fn=outputs,
                    obj_fn=objective,
                    labels=jnp.zeros((len(x), 1)),
                )[0]
            )
        return tuple(results), state

    batch = x, jnp.stack([weights, jnp.arange(16.0)], axis=1)
    start = jax.tree.map(lambda x: jnp.stack([x] * N) if kind == "pmap" else x, params)
    got, _ = on_devices(kind, estimates)(start, (), *batch)
    for (name, loss, w), d in zip(cases, got, strict=True):
        expected = w * x**2 / (jnp.sum(w) if loss.reduction == "mean" else 1)
        d = d[0] if kind == "pmap" else d
        np.testing.assert_allclose(d, expected, rtol=1e-5, err_msg=f"{name} {loss}")


def collectives(step, *args):
    """Count what is exchanged in a compiled program, by kind and shape."""
    text = step.lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = collections.Counter()
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[[\d,]*\]", shapes):
            found[kind, shape] += 1
    return found


def placed_like(x, other):
    """Put an array where another is, which may be on no device in particular."""
    devices = other.sharding.device_set
    return jax.device_put(x, other.sharding if len(devices) > 1 else None)


MESHES = [("Auto", "function"), ("Auto", "fused"), ("Explicit", "fused")]
MESHES += [("Auto", "two parts"), ("Explicit", "two parts")]
# Each optimizer with replicated and with sharded parameters, the rest in turn.
MESH_CASES = [
    pytest.param(
        name, *MESHES[(3 * i + j) % 5], j == 1, marks=[SLOW] * ((i + j) % 3 > 0)
    )
    for i, name in enumerate(OPTIMIZERS)
    for j in range(2)
]


@pytest.mark.parametrize(("name", "kind", "path", "sharded"), MESH_CASES)
def test_jit_over_a_mesh(name, kind, path, sharded, x64):
    """A program over sharded arrays does what it does on one device.

    Where parameters are replicated it adds parts of sums up, and moves nothing.
    """
    if kind == "Explicit" and not hasattr(jax, "set_mesh"):
        pytest.skip("this version of JAX has no explicit sharding")
    if name == "gauss-newton-control" and jax.__version_info__ < (0, 10):
        pytest.skip("older versions of XLA shard the bias of a replicated network")
    tx, mesh = make_optimizer(name), mesh_of(kind=kind)
    step = jax.jit(make_step(tx, name, path))
    start = train(step, PARAMS, tx.init(PARAMS), X, Y, WARM_UP)
    expected, _ = train(step, *start, X, Y)
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    sharding = NamedSharding(mesh, P("data") if sharded else P())
    params = jax.device_put(jax.tree.map(np.asarray, start[0]), sharding)
    state = tx.init(params)
    trees = [state[0].mu, state[0].curvature.nu]
    if name == "low-rank":
        basis = state[0].curvature.estimator_state.control_variate.basis
        trees.append(jax.tree.map(lambda q: q[0], basis))
    state = jax.tree.map(placed_like, start[1], state)
    if not sharded:
        found = collectives(step, params, state, *batch)
        assert {kind for kind, _ in found} == {"all-reduce"}
    got = train(step, params, state, *batch)
    trees += [got[0], got[1][0].mu, got[1][0].curvature.nu]
    for leaf in jax.tree.leaves(trees):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert_close(got[0], expected)


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
    for name, passes, probes in (
        ("hutchinson", 1, 1),
        ("low-rank", 1, 1),
        ("gauss-newton-control", 2, 1),
        ("gauss-newton", 1, 0),
    ):
        tx = make_optimizer(name, update_interval=1)
        ours = gathered(make_step(tx, name, "fused"), tx.init(params))
        assert ours <= passes * of_adam + probes * len(PARAMS), name

    def update(grads, state, params):
        return tx.update(grads, state, params, hessian_diag=grads)

    found = collectives(jax.jit(update), params, tx.init(params), params)
    assert set(found) <= {("all-reduce", "s32[]")}
    assert found.total() <= len(PARAMS)


@SLOW
def test_two_processes(tmp_path):
    """Two hosts of 4 devices each on loopback end with the run of one of 8."""
    with socket.socket() as s:
        s.bind(("localhost", 0))
        address = f"localhost:{s.getsockname()[1]}"
    script = pathlib.Path(__file__).with_name("two_processes.py")
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    env |= {
        "PYTHONPATH": str(script.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": "1",
    }
    files = [tmp_path / f"{i}.npz" for i in range(3)]
    runs = [
        subprocess.Popen(
            [sys.executable, str(script), address, str(n), str(i), str(file)],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for n, i, file in [(2, 0, files[0]), (2, 1, files[1]), (1, 0, files[2])]
    ]
    for run in runs:
        output, _ = run.communicate(timeout=300)
        assert run.returncode == 0, output
    first, second, single = (dict(np.load(file)) for file in files)
    assert len(first) > 20
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_close(first, single, rtol=1e-4, atol=1e-6)
