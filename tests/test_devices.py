# SPDX-License-Identifier: Apache-2.0
"""Training on several devices: pmap, shard_map, and jit over a mesh."""

import collections
import functools
import itertools
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
from adahessian_jax.axes import as_varying

N = 8
pytestmark = pytest.mark.skipif(
    jax.device_count() < N, reason=f"needs {N} devices; conftest.py makes CPU ones"
)
P = PartitionSpec
TYPES = getattr(jax.sharding, "AxisType", None)
RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 16)).astype(np.float32)
Y = RNG.normal(size=(64, 8)).astype(np.float32)
PARAMS = {
    "w": RNG.normal(size=(16, 32)).astype(np.float32) / 4,
    "b": np.zeros(32, np.float32),
    "v": RNG.normal(size=(32, 8)).astype(np.float32) / 5,
}


@pytest.fixture(autouse=True)
def settings():
    """Let optax.adam mix dtypes, and every device draw its part of the random bits."""
    with jax.numpy_dtype_promotion("standard"), jax.threefry_partitionable(True):
        yield


@pytest.fixture
def double(x64, monkeypatch):
    """Double precision, because small curvature magnifies the rounding of sums."""
    for name in ("PARAMS", "X", "Y"):
        numbers = jax.tree.map(np.float64, globals()[name])
        monkeypatch.setitem(globals(), name, numbers)


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


def loss_of_outputs(outputs, y):
    return jnp.mean((outputs - y) ** 2)


def loss_fn(params, x, y):
    return loss_of_outputs(predict(params, x), y)


def loss_and_outputs(params, x, y):
    outputs = predict(params, x)
    return loss_of_outputs(outputs, y), outputs


def make_estimator(name, axis_name=None, **options):
    if name == "gauss-newton":
        return ah.gauss_newton("squared_error", axis_name=axis_name, **options)
    if name == "in-eigenbasis":
        return ah.in_eigenbasis(make_estimator("gauss-newton", axis_name, **options))
    if name == "few-vectors":
        inner = make_estimator("gauss-newton", axis_name, **options)
        return ah.in_eigenbasis(inner, max_dim=16, n_vectors=4)
    control_variate = {
        "hutchinson": None,
        "low-rank": ah.low_rank_control(2),
        "gauss-newton-control": ah.gauss_newton_control("squared_error"),
    }[name]
    return ah.hutchinson(
        control_variate=control_variate, axis_name=axis_name, **options
    )


ESTIMATORS = (
    "hutchinson",
    "low-rank",
    "gauss-newton-control",
    "gauss-newton",
    "in-eigenbasis",
    "few-vectors",
)
TURNED = ("in-eigenbasis", "few-vectors")
EVERY_ESTIMATOR = pytest.mark.parametrize("name", ESTIMATORS)


# In double precision the order of sums changes a step by 1e-16 or so.
assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-12, atol=1e-13)


def arguments(x, y):
    """What any of the estimators may ask for."""
    return {
        "obj_fn": lambda p: loss_fn(p, x, y),
        "predict_fn": lambda p: predict(p, x),
        "output_loss": lambda outputs: loss_of_outputs(outputs, y),
    }


ARGUMENTS_OF_PARTS = {
    "obj_fn": lambda p, part: loss_fn(p, *part),
    "predict_fn": lambda p, part: predict(p, part[0]),
    "output_loss": lambda outputs, part: loss_of_outputs(outputs, part[1]),
}


def of_two(function):
    return lambda value, x, y: function(value, (x, y))


def make_step(tx, estimator, path, axis_name=None):
    """Return a step for one device's part of the batch."""
    needs_outputs = getattr(estimator, "needs_outputs", False)
    fused = ah.value_and_grad_with_curvature(
        loss_and_outputs if needs_outputs else loss_fn,
        estimator,
        microbatches=2 if path == "fused, two parts" else 1,
    )

    def step(params, state, x, y):
        extra_args = arguments(x, y)
        if path == "two parts":
            extra_args = ARGUMENTS_OF_PARTS | {"batch": (x, y)}
        elif path == "fused, two parts":
            extra_args = {k: of_two(f) for k, f in ARGUMENTS_OF_PARTS.items()}
        if path.startswith("fused"):
            output_loss = extra_args["output_loss"]
            _, grads, curvature = fused(
                params, x, y, state=state, output_loss=output_loss
            )
            extra_args = {"curvature": curvature}
        else:
            grads = jax.grad(loss_fn)(as_varying(params, axis_name), x, y)
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


def alone(tx, estimator, params, state, steps=4, path="obj_fn"):
    """Train on one device and the whole batch."""
    step = jax.jit(make_step(tx, estimator, path))
    return train(step, params, state, X, Y, steps)


def optimizer(estimator):
    return ah.adahessian(
        0.02, estimator=estimator, update_interval=2, clip_threshold=1.0
    )


@functools.cache
def trained(name):
    """Parameters and state after more estimates than an axis has vectors.

    Those of a basis for which no curvature was seen yet are known to the root of
    rounding only.
    """
    estimator = make_estimator(name)
    tx = optimizer(estimator)
    got = alone(tx, estimator, PARAMS, tx.init(PARAMS), steps=100)
    return jax.tree.map(np.asarray, got)


def mesh_of(n=N, kind="Auto"):
    kinds = {"axis_types": (getattr(TYPES, kind),)} if TYPES else {}
    return jax.make_mesh((n,), ("data",), devices=jax.devices()[:n], **kinds)


def shard_mapped(step, mesh, *, check):
    specs = {
        "mesh": mesh,
        "in_specs": (P(), P(), P("data"), P("data")),
        "out_specs": (P(), P()),
    }
    if hasattr(jax, "shard_map"):
        return jax.jit(jax.shard_map(step, check_vma=check, **specs))
    from jax.experimental.shard_map import shard_map

    # Its check does not know lax.cond.
    return jax.jit(shard_map(step, check_rep=False, **specs))


def train_on_devices(kind, step, params, state, steps=4):
    params, state = jax.tree.map(jnp.asarray, (params, state))
    if kind == "pmap":
        step = jax.pmap(step, axis_name="data")
        copies = jax.tree.map(lambda x: jnp.stack([x] * N), (params, state))
        return train(step, *copies, X.reshape(N, -1, 16), Y.reshape(N, -1, 8), steps)
    step = shard_mapped(step, mesh_of(), check=kind == "shard_map")
    return train(step, params, state, X, Y, steps)


def copies_of(tree):
    """Return the tree on each device."""
    return [
        jax.tree.map(lambda x, i=i: np.asarray(x.addressable_shards[i].data), tree)
        for i in range(N)
    ]


def first_copy(params):
    """Return the first device's parameters, without the axis that pmap has."""
    first = copies_of(params)[0]
    return {name: x.reshape(PARAMS[name].shape) for name, x in first.items()}


KINDS = pytest.mark.parametrize("kind", ["pmap", "shard_map", "shard_map-unchecked"])
PATHS = pytest.mark.parametrize("path", ["obj_fn", "fused"])


@KINDS
@EVERY_ESTIMATOR
def test_replicas_stay_bit_identical(name, kind):
    """Parameters and all of the state, while each device has probes of its own."""
    estimator = make_estimator(name, axis_name="data")
    tx = ah.adahessian(0.02, estimator=estimator, update_interval=2)
    step = make_step(tx, estimator, "fused", axis_name="data")
    result = train_on_devices(kind, step, PARAMS, tx.init(PARAMS), 200)
    first, *others = copies_of(result)
    for other in others:
        chex.assert_trees_all_equal(first, other)


@KINDS
@EVERY_ESTIMATOR
def test_all_ways_over_devices_are_the_same(name, kind, double):
    """shard_map's account of what varies between devices changes nothing."""
    estimator = make_estimator(name, axis_name="data")
    tx, start = optimizer(estimator), trained(name)
    expected = emulated(make_step(tx, estimator, "obj_fn", axis_name="data"), *start)
    for path in ("obj_fn", "fused"):
        step = make_step(tx, estimator, path, axis_name="data")
        params, _ = train_on_devices(kind, step, *start)
        assert_close(first_copy(params), expected)


def emulated(step, params, state):
    """Train on one device, as if on many; return the parameters of the first."""
    many = jax.vmap(step, in_axes=(None, None, 0, 0), axis_name="data", axis_size=N)
    first = jax.jit(lambda *args: jax.tree.map(lambda x: x[0], many(*args)))
    return train(first, params, state, X.reshape(N, -1, 16), Y.reshape(N, -1, 8))[0]


@KINDS
@EVERY_ESTIMATOR
def test_parts_of_each_device_s_batch(name, kind, double):
    """Accumulated gradients, and the estimate of ``microbatched``."""
    start = trained(name)

    def step(path, wrap=lambda estimator: estimator):
        estimator = wrap(make_estimator(name, axis_name="data"))
        return make_step(optimizer(estimator), estimator, path, axis_name="data")

    params, _ = train_on_devices(kind, step("fused, two parts"), *start)
    in_two = functools.partial(ah.microbatched, microbatches=2)
    assert_close(first_copy(params), emulated(step("two parts", in_two), *start))


@KINDS
@PATHS
def test_the_same_probe_on_each_device_gives_the_run_of_one(path, kind, double):
    """Hutchinson's estimate is linear in the batch if the probe is the same."""
    signs = ah.rademacher_like(jax.random.key(3), PARAMS)

    def estimator(axis_name=None):
        return ah.hutchinson(probe=lambda key, params: signs, axis_name=axis_name)

    tx = ah.adahessian(0.02, estimator=estimator("data"), update_interval=2)
    step = make_step(tx, estimator("data"), path, axis_name="data")
    params, _ = train_on_devices(kind, step, PARAMS, tx.init(PARAMS), 20)
    tx = ah.adahessian(0.02, estimator=estimator(), update_interval=2)
    expected, _ = alone(tx, estimator(), PARAMS, tx.init(PARAMS), 20)
    chex.assert_trees_all_close(first_copy(params), expected, rtol=1e-5, atol=1e-8)


def test_variance_falls_with_independent_probes():
    """On a ReLU MLP and 8 devices it is at least 3 times smaller than for one probe."""
    rng = np.random.default_rng(1)
    sizes = (8, 24, 24, 4)
    params = [
        (rng.normal(size=s) * np.sqrt(2 / s[0])).astype(np.float32)
        for s in itertools.pairwise(sizes)
    ]
    x = rng.normal(size=(128, 8)).astype(np.float32)
    y = rng.integers(0, 4, size=128)

    def loss(params, x, y):
        for w in params[:-1]:
            x = jax.nn.relu(jnp.dot(x, w))
        logits = jnp.dot(x, params[-1])
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, y))

    def estimate(axis_name, key, x, y):
        estimator = ah.hutchinson(seed=key, axis_name=axis_name)
        objective = {"obj_fn": lambda p: loss(p, x, y)}
        return estimator.update(None, estimator.init(params), params, **objective)[0]

    keys = jax.random.split(jax.random.key(0), 400)
    one = jax.jit(jax.vmap(lambda key: estimate(None, key, x, y)))(keys)
    of_part = jax.vmap(functools.partial(estimate, "data"), in_axes=(0, None, None))
    many = jax.pmap(of_part, axis_name="data", in_axes=(None, 0, 0))(
        keys, x.reshape(N, -1, 8), y.reshape(N, -1)
    )
    one, many = (
        np.concatenate([np.reshape(d, (len(keys), -1)) for d in draws], axis=1)
        for draws in (one, [d[0] for d in many])
    )

    def ratio(draws_of_one=slice(None), draws_of_many=slice(None)):
        return one[draws_of_one].var(0).sum() / many[draws_of_many].var(0).sum()

    resampled = [ratio(*rng.integers(0, len(keys), (2, len(keys)))) for _ in range(200)]
    standard_error = np.std(resampled)
    print(f"variance falls {ratio():.2f} times, standard error {standard_error:.2f}")
    assert ratio() - 2 * standard_error >= 3


LAYOUTS = pytest.mark.parametrize("layout", ["data-parallel", "fully-sharded"])


def skip_if_partitioned_otherwise(name):
    if name == "gauss-newton-control" and jax.__version_info__ < (0, 10):
        pytest.skip("older versions of XLA shard the bias of a replicated network")


def sharding_of(layout, mesh):
    return NamedSharding(mesh, P("data") if layout == "fully-sharded" else P())


def placed_like(x, other):
    """Put an array where another is, which may be on no device in particular."""
    devices = other.sharding.device_set
    return jax.device_put(x, other.sharding if len(devices) > 1 else None)


@LAYOUTS
@EVERY_ESTIMATOR
@pytest.mark.parametrize(
    ("kind", "path"), [("Auto", "obj_fn"), ("Auto", "fused"), ("Explicit", "fused")]
)
def test_jit_over_a_mesh(kind, path, name, layout, double):
    """A program over sharded arrays does what it does on one device."""
    if kind == "Explicit" and not hasattr(jax, "set_mesh"):
        pytest.skip("this version of JAX has no explicit sharding")
    skip_if_partitioned_otherwise(name)
    estimator = make_estimator(name)
    tx = ah.adahessian(
        0.02, estimator=estimator, update_interval=2, relative_damping=0.1
    )
    mesh = mesh_of(kind=kind)
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    sharding = sharding_of(layout, mesh)
    start = trained(name)
    params = jax.device_put(start[0], sharding)
    state = tx.init(params)
    trees = [state[0].mu, state[0].nu, state[0].hessian_diag]
    if name == "low-rank":
        basis = state[0].estimator_state.control_variate.basis
        trees.append(jax.tree.map(lambda q: q[0], basis))
    state = jax.tree.map(placed_like, start[1], state)
    step = jax.jit(make_step(tx, estimator, path))
    got = train(step, params, state, *batch)
    trees += [got[0], got[1][0].mu, got[1][0].nu]
    for leaf in jax.tree.leaves(trees):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
    assert_close(got[0], alone(tx, estimator, *start)[0])


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", ["hutchinson", "gauss-newton"])
def test_parts_over_a_mesh_leave_rows_where_they_are(kind, name, double):
    """Each device has a share of every part, and the run is that of one device."""
    if kind == "Explicit" and not hasattr(jax, "set_mesh"):
        pytest.skip("this version of JAX has no explicit sharding")
    estimator = make_estimator(name)
    tx = ah.adahessian(
        0.02, estimator=estimator, update_interval=2, relative_damping=0.1
    )
    mesh = mesh_of(kind=kind)
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    start = trained(name)
    params, state = jax.device_put(start, NamedSharding(mesh, P()))
    path = "fused, two parts"
    step = jax.jit(make_step(tx, estimator, path))
    text = step.lower(params, state, *batch).compile().as_text()
    for moving in ("all-gather", "all-to-all", "collective-permute"):
        assert moving not in text
    got, _ = train(step, params, state, *batch)
    assert_close(got, alone(tx, estimator, *start, path=path)[0])


def collectives(step, *args):
    """Count what is exchanged in a compiled program, by kind and shape."""
    text = jax.jit(step).lower(*args).compile().as_text()
    kinds = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
    found = collections.Counter()
    for shapes, kind in re.findall(rf"= (.*?) ({kinds})(?:-start)?\(", text):
        for shape in re.findall(r"\w+\[[\d,]*\]", shapes):
            found[kind, shape] += 1
    return found


@EVERY_ESTIMATOR
def test_data_parallel_steps_exchange_sums_only(name):
    """Parts of gradient and estimate are added up, and nothing is gathered."""
    skip_if_partitioned_otherwise(name)
    estimator = make_estimator(name)
    tx = ah.adahessian(0.02, estimator=estimator)
    mesh = mesh_of()
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P()))
    step = make_step(tx, estimator, "fused")
    found = collectives(step, params, tx.init(params), *batch)
    assert {kind for kind, _ in found} == {"all-reduce"}


@pytest.mark.parametrize("name", [x for x in ESTIMATORS if x not in TURNED])
def test_fully_sharded_steps_gather_no_state(name):
    """Parameters are gathered as often as for Adam, and the probe once.

    Not in an eigenbasis, which mixes all of an axis.

    An update alone exchanges how many entries of each leaf were not finite.
    """
    mesh = mesh_of()
    batch = jax.device_put((X, Y), NamedSharding(mesh, P("data")))
    params = jax.device_put(PARAMS, NamedSharding(mesh, P("data")))

    def gathered(step, state):
        found = collectives(step, params, state, *batch)
        return sum(
            n
            for (kind, shape), n in found.items()
            if kind == "all-gather" and shape in ("f32[16,32]", "f32[32,8]", "f32[32]")
        )

    adam = optax.adam(1e-3)

    def adam_step(params, state, x, y):
        grads = jax.grad(loss_fn)(params, x, y)
        updates, state = adam.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    estimator = make_estimator(name)
    tx = ah.adahessian(0.02, estimator=estimator)
    state = tx.init(params)
    probes = 0 if name == "gauss-newton" else len(PARAMS)
    ours = gathered(make_step(tx, estimator, "fused"), state)
    # The control's factor is that of a network linearised in a pass of its own.
    passes = 2 if name == "gauss-newton-control" else 1
    assert ours <= passes * gathered(adam_step, adam.init(params)) + probes

    def update(grads, state, params):
        return tx.update(grads, state, params, hessian_diag=grads)

    found = collectives(update, params, state, params)
    assert set(found) <= {("all-reduce", "s32[]")}
    assert found.total() <= len(PARAMS)


@KINDS
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_gauss_newton_weights_are_those_of_the_whole_batch(reduction, kind):
    """Rows weigh the same whichever device has them: exact, as for one device.

    Each parameter has a row of its own, so the estimate does not depend on the signs.
    """
    x = jnp.asarray(RNG.normal(size=16), jnp.float32)
    weights = jnp.asarray(RNG.uniform(0.1, 2.0, size=16), jnp.float32)
    weights = weights.at[3].set(0.0)
    rows = jnp.arange(16)
    params = jnp.ones(16)

    def estimate(axis_name, x, weights, rows):
        estimator = ah.gauss_newton("l2_loss", reduction=reduction, axis_name=axis_name)
        diag, _ = estimator.update(
            None,
            estimator.init(params),
            params,
            predict_fn=lambda p: ((p[rows] * x)[:, None], weights),
        )
        return diag

    batch = x, weights, rows
    expected = weights * x**2
    if reduction == "mean":
        expected = expected / jnp.sum(weights)
    chex.assert_trees_all_close(estimate(None, *batch), expected, rtol=1e-5)
    on_device = functools.partial(estimate, "data")
    if kind == "pmap":
        parts = jax.tree.map(lambda a: a.reshape(N, -1), batch)
        got = jax.pmap(on_device, axis_name="data")(*parts)[0]
    else:

        def step(params, state, x, weights_and_rows):
            return on_device(x, *weights_and_rows), state

        step = shard_mapped(step, mesh_of(), check=kind == "shard_map")
        got, _ = step(params, (), x, (weights, rows))
    chex.assert_trees_all_close(got, expected, rtol=1e-5)


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
    assert len(first) > 5
    chex.assert_trees_all_equal(first, second)
    chex.assert_trees_all_close(first, single, rtol=1e-6, atol=1e-9)
