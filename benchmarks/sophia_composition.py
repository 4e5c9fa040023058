# SPDX-License-Identifier: Apache-2.0
"""How ``optax.contrib.sophia`` goes where docs/composition.md has AdaHessian.

    pip install -e ".[test]"
    python benchmarks/sophia_composition.py

prints a row for each place: ``works``, or the error, or what was looked at. Sophia runs
with its own Hutchinson estimator and ``update_interval=2`` for four steps.
"""

import os

os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

import functools
import pathlib
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from jax import export
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

RNG = np.random.default_rng(0)
X = jnp.asarray(RNG.normal(size=(32, 8)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, 3, size=32))
PARAMS = {
    "encoder": {
        "w": jnp.asarray(RNG.normal(size=(8, 8)), jnp.float32),
        "b": jnp.zeros(8),
    },
    "decoder": {"w": jnp.asarray(RNG.normal(size=(8, 3)), jnp.float32)},
}
LABELS = {"encoder": "curved", "decoder": "other"}
IN_ENCODER = {"encoder": True, "decoder": False}
IN_DECODER = {"encoder": False, "decoder": True}

sophia = functools.partial(optax.contrib.sophia, 1e-2, update_interval=2)
ROWS: dict[str, Callable[[], str | None]] = {}


def row(name: str) -> Callable[[Callable[[], str | None]], None]:
    """Register a function that returns what was found, or nothing if it works."""

    def register(run: Callable[[], str | None]) -> None:
        ROWS[name] = run

    return register


def predict(params: Any, x: jax.Array) -> jax.Array:
    """Return the logits of a small network."""
    hidden = jnp.tanh(x @ params["encoder"]["w"] + params["encoder"]["b"])
    return hidden @ params["decoder"]["w"]


def cross_entropy(logits: jax.Array, y: jax.Array) -> jax.Array:
    """Return the mean over rows."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()


def loss_fn(params: Any, x: jax.Array = X, y: jax.Array = Y) -> jax.Array:
    """Return the loss of the network, by default on all the data."""
    return cross_entropy(predict(params, x), y)


def step_of(tx: Any, loss: Any = loss_fn) -> Callable[..., Any]:
    """Return a step (params, state, *batch) -> (params, state)."""

    def step(params: Any, state: Any, *batch: jax.Array) -> Any:
        def objective(p: Any) -> jax.Array:
            return loss(p, *batch)

        grads = jax.grad(objective, allow_int=True)(params)
        grads = jax.tree.map(
            lambda g, p: jnp.zeros_like(p) if g.dtype == jax.dtypes.float0 else g,
            grads,
            params,
        )
        updates, state = tx.update(grads, state, params, obj_fn=objective)
        return optax.apply_updates(params, updates), state

    return step


def train(tx: Any, params: Any = PARAMS, loss: Any = loss_fn, steps: int = 4) -> Any:
    """Return parameters and state after some steps on all the data."""
    step, state = jax.jit(step_of(tx, loss)), tx.init(params)
    for _ in range(steps):
        params, state = step(params, state)
    for leaf in jax.tree.leaves(params):
        assert not jnp.issubdtype(leaf.dtype, jnp.floating) or jnp.isfinite(leaf).all()
    return params, state


def difference(a: Any, b: Any) -> str:
    """Say how far two trees of parameters are apart."""
    largest = max(
        float(jnp.abs(np.asarray(x) - np.asarray(y)).max())
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )
    return f"parameters differ by {largest:.1e}"


def mesh() -> Mesh:
    """Return a mesh of all devices."""
    return Mesh(np.array(jax.devices()), ("data",))


WRAPPED: dict[str, Callable[[], Any]] = {
    "chain": lambda: optax.chain(
        optax.clip_by_global_norm(0.1), sophia(), optax.scale_by_schedule(lambda t: 0.5)
    ),
    "masked": lambda: optax.masked(sophia(), IN_ENCODER),
    "partition, with Adam": lambda: optax.partition(
        {"curved": sophia(), "other": optax.adam(1e-2)}, LABELS
    ),
    "partition, two Sophias": lambda: optax.partition(
        {"curved": sophia(), "other": sophia()}, LABELS
    ),
    "freeze after it": lambda: optax.chain(sophia(), optax.freeze(IN_DECODER)),
    "selective_transform": lambda: optax.selective_transform(
        sophia(), freeze_mask=IN_DECODER
    ),
    "MultiSteps": lambda: optax.MultiSteps(sophia(), 2),
    "inject_hyperparams": lambda: optax.inject_hyperparams(optax.contrib.sophia)(
        learning_rate=1e-2, update_interval=2
    ),
    "apply_if_finite": lambda: optax.apply_if_finite(sophia(), 2),
    "schedule_free": lambda: optax.contrib.schedule_free(sophia(), learning_rate=1e-2),
}
for _name, _make in WRAPPED.items():

    @row(_name)
    def _(make: Callable[[], Any] = _make) -> None:
        train(make())


@row("backtracking line search")
def _() -> None:
    tx = optax.chain(sophia(), optax.scale_by_backtracking_linesearch(10))
    value, grads = jax.value_and_grad(loss_fn)(PARAMS)
    tx.update(
        grads,
        tx.init(PARAMS),
        PARAMS,
        obj_fn=loss_fn,
        value=value,
        grad=grads,
        value_fn=lambda p, obj_fn: obj_fn(p),
    )


@row("vmap over an ensemble")
def _() -> str:
    tx = sophia()
    scales = jnp.array([0.9, 1.0, 1.1])
    members = jax.vmap(lambda s: jax.tree.map(lambda p: s * p, PARAMS))(scales)
    states = jax.vmap(tx.init)(members)
    _, states = jax.jit(jax.vmap(step_of(tx)))(members, states)
    keys = [x for x in jax.tree.leaves(states) if x.dtype == jnp.uint32]
    return f"works; {len(np.unique(keys[0], axis=0))} random state of 3 members"


@row("scan over steps")
def _() -> str:
    tx = sophia()
    (params, _), _ = jax.lax.scan(
        lambda carry, _: (step_of(tx)(*carry), None),
        (PARAMS, tx.init(PARAMS)),
        length=4,
    )
    return difference(params, train(tx)[0])


@row("checkpoint and scanned layers")
def _() -> str:
    weights = jnp.asarray(RNG.normal(size=(3, 8, 8)), jnp.float32)

    def of_layers(params: Any, checkpoint: bool) -> jax.Array:
        def layer(hidden: jax.Array, w: jax.Array) -> tuple[jax.Array, None]:
            return jnp.tanh(hidden @ w), None

        layer = jax.checkpoint(layer) if checkpoint else layer
        return jnp.mean(jax.lax.scan(layer, X, params)[0] ** 2)

    with_it, without = (
        train(sophia(), weights, functools.partial(of_layers, checkpoint=c))[0]
        for c in (True, False)
    )
    return difference(with_it, without)


@row("ahead-of-time compilation; export")
def _() -> str:
    tx = sophia()
    step, args = jax.jit(step_of(tx)), (PARAMS, tx.init(PARAMS))
    expected, _ = step(*args)
    compiled, _ = step.lower(*args).compile()(*args)

    def flat(*leaves: jax.Array) -> list[jax.Array]:
        params, state = jax.tree.unflatten(jax.tree.structure(args), leaves)
        return jax.tree.leaves(step(params, state)[0])

    leaves = jax.tree.leaves(args)
    exported = export.deserialize(export.export(jax.jit(flat))(*leaves).serialize())
    return (
        f"compiled: {difference(compiled, expected)};"
        f" exported: {difference(exported.call(*leaves), expected)}"
    )


@row("donated arguments")
def _() -> str:
    tx = sophia()
    step = jax.jit(step_of(tx), donate_argnums=(0, 1))
    params, state = jax.tree.map(jnp.array, (PARAMS, tx.init(PARAMS)))
    for _ in range(4):
        params, state = step(params, state)
    return difference(params, train(tx)[0])


@row("bfloat16 parameters")
def _() -> str:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS)
    tx = sophia()
    _, state = train(tx, half, lambda p: loss_fn(p, X.astype(jnp.bfloat16)))
    before, after = (
        [x.dtype for x in jax.tree.leaves(tree)] for tree in (tx.init(half), state)
    )
    assert before == after
    return f"works; state of {', '.join(sorted({str(d) for d in after}))}"


@row("mixed bfloat16 and float32 parameters")
def _() -> None:
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), PARAMS["encoder"])
    train(sophia(), {**PARAMS, "encoder": half})


@row("integer leaves")
def _() -> None:
    train(sophia(), {**PARAMS, "n": jnp.int32(2)}, lambda p: p["n"] * loss_fn(p))


@row("empty, scalar and None leaves")
def _() -> None:
    params = {**PARAMS, "empty": jnp.zeros((0, 2)), "s": jnp.float32(1), "none": None}
    train(sophia(), params, lambda p: p["s"] * loss_fn(p))


@row("Equinox")
def _() -> None:
    model = eqx.nn.MLP(8, 3, 8, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_inexact_array)
    train(
        sophia(),
        params,
        lambda p: cross_entropy(jax.vmap(eqx.combine(p, static))(X), Y),
    )


@row("pmap")
def _() -> str:
    return over_devices(
        lambda step: jax.pmap(step, axis_name="data", in_axes=(None, None, 0, 0))
    )


@row("shard_map")
def _() -> str:
    def mapped(step: Callable[..., Any]) -> Callable[..., Any]:
        return jax.shard_map(
            lambda p, s, x, y: jax.tree.map(
                lambda a: a[None], step(p, s, jnp.squeeze(x, 0), jnp.squeeze(y, 0))
            ),
            mesh=mesh(),
            in_specs=(P(), P(), P("data"), P("data")),
            out_specs=P("data"),
            check_vma=False,
        )

    return over_devices(mapped)


def over_devices(mapped: Callable[..., Any]) -> str:
    """Take one step, gradients averaged and a part of the batch on each device."""
    tx = sophia()

    def step(params: Any, state: Any, x: jax.Array, y: jax.Array) -> Any:
        grads = jax.lax.pmean(jax.grad(loss_fn)(params, x, y), "data")
        return tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p, x, y))

    batch = X.reshape(8, 4, 8), Y.reshape(8, 4)
    _, state = jax.jit(mapped(step))(PARAMS, tx.init(PARAMS), *batch)
    same = all(
        (replica == leaf[0]).all()
        for leaf in map(np.asarray, jax.tree.leaves(state))
        for replica in leaf
    )
    return "replicas agree" if same else "states of the replicas differ"


@row("jit over a mesh, replicated or sharded parameters")
def _() -> str:
    tx = sophia()
    expected, results = train(tx)[0], []
    for spec in (P(), P("data")):

        def placed(leaf: jax.Array, spec: P = spec) -> jax.Array:
            rows = leaf.ndim > 0 and leaf.shape[0] % 8 == 0
            return jax.device_put(leaf, NamedSharding(mesh(), spec if rows else P()))

        params = jax.tree.map(placed, PARAMS)
        state = tx.init(params)
        sharded = [
            p.sharding.is_equivalent_to(s.sharding, p.ndim)
            for p, s in zip(
                jax.tree.leaves(params),
                jax.tree.leaves(optax.tree.get(state, "mu")),
                strict=True,
            )
        ]
        batch = jax.device_put((X, Y), NamedSharding(mesh(), P("data")))
        step = jax.jit(step_of(tx))
        for _ in range(4):
            params, state = step(params, state, *batch)
        results.append(
            f"{spec}: {difference(params, expected)}, momentum sharded"
            f" {'like them' if all(sharded) else 'otherwise'}"
        )
    return "; ".join(results)


@row("Orbax")
def _() -> str:
    tx = sophia()
    step, halfway = jax.jit(step_of(tx)), train(tx, steps=3)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "checkpoint"
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path, halfway)
        with ocp.StandardCheckpointer() as checkpointer:
            like = jax.tree.map(jnp.zeros_like, halfway)
            restored = checkpointer.restore(path, like)
    return difference(step(*restored)[0], step(*halfway)[0])


@row("a state of another configuration")
def _() -> None:
    other = optax.contrib.sophia(1e-2, hessian_diagonal_fn=another_estimator())
    sophia().update(PARAMS, other.init(PARAMS), PARAMS, obj_fn=loss_fn)


def another_estimator() -> Any:
    """Return an estimator whose state is not like that of Hutchinson's."""
    return optax.GradientTransformationExtraArgs(
        lambda params: {"probes": params},
        lambda updates, state, params=None, **extra: (params, state),
    )


def main() -> None:
    """Print all rows."""
    warnings.simplefilter("ignore")
    print(f"optax {optax.__version__}, jax {jax.__version__}")
    for name, run in ROWS.items():
        try:
            result = run() or "works"
        except Exception as error:  # the table's finding
            result = f"fails: {type(error).__name__}: {str(error).splitlines()[0]}"
        print(f"{name:50} {result[:140]}", flush=True)


if __name__ == "__main__":
    main()
