# SPDX-License-Identifier: Apache-2.0
"""Features in pairs: each of the 815 valid pairs of the factors below is in a case.

82 cases are enough for that; one more holds three features that failed together. Each
trains a small network for a few steps by the library, and the parameters after each are
held against the formulas, written out here for dense float64 matrices and the probes
that follow from the seed.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from allpairspy import AllPairs
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

import adahessian_jax as ah
from adahessian_jax._src.probes import normal_like, rademacher_like
from adahessian_jax.linen import TrainState
from adahessian_jax.nnx import functional
from adahessian_jax.nnx import value_and_grad_with_curvature as nnx_value_and_grad
from tests.problems import quadratic

eqx = pytest.importorskip("equinox")
P = PartitionSpec

VALUES = {
    "estimator": "hutchinson hutchinson_3 normal gauss_newton gauss_newton_2"
    " in_eigenbasis axes_of_factors turned_hutchinson squared_gradient"
    " gauss_newton_control low_rank_control ema_control",
    "path": "separate fused microbatches hessian_diag",
    "wrapper": "none chain partition inject multi_steps if_finite",
    "dtype": "float64 float32 bfloat16",
    "loss": "classes dense_labels sum masked row_function",
    "container": "dict list nnx linen equinox",
    "devices": "one shard_map mesh",
    "schedule": "always interval first host",
    "formula": "rms mean",
}
FACTORS = {name: values.split() for name, values in VALUES.items()}
Case = dataclasses.make_dataclass("Case", FACTORS, frozen=True)

TURNED = "in_eigenbasis axes_of_factors turned_hutchinson squared_gradient"
INVALID = [
    {"path": "hessian_diag", "estimator": TURNED},  # refused in turned axes
    # Turned probes are rounded in the network, unlike signs: too far for the tolerance.
    {"estimator": "turned_hutchinson", "dtype": "bfloat16"},
    # It shares no pass.
    {"estimator": "squared_gradient", "path": "fused microbatches"},
    {"estimator": "squared_gradient", "schedule": "host"},
    {"path": "separate hessian_diag", "schedule": "host"},  # of the fused function
    {"estimator": "ema_control", "formula": "rms"},  # needs the average of H itself
    # Refused: b2 is known while running only.
    {"estimator": "ema_control", "wrapper": "inject", "path": "fused microbatches"},
]


def matches(case, rule):
    return all(case.get(name) in values.split() for name, values in rule.items())


def is_valid(case):
    return not any(matches(case, rule) for rule in INVALID)


def every_pair():
    """Return the valid pairs, as sets of two (factor, value)."""
    for a, b in itertools.combinations(FACTORS, 2):
        for x, y in itertools.product(FACTORS[a], FACTORS[b]):
            if is_valid({a: x, b: y}):
                yield frozenset({(a, x), (b, y)})


def pairs_of(case):
    return set(map(frozenset, itertools.combinations(case.items(), 2)))


def covering():
    """Return cases by allpairspy, and one for each pair that its filter left out."""

    def named(row):
        return dict(zip(FACTORS, row, strict=False))

    rows = AllPairs(FACTORS.values(), filter_func=lambda row: is_valid(named(row)))
    cases = list(map(named, rows))
    for pair in sorted(map(sorted, every_pair())):
        if not any(set(pair) <= case.items() for case in cases):
            some = FACTORS | {name: [value] for name, value in pair}
            every = map(named, itertools.product(*some.values()))
            cases.append(next(filter(is_valid, every)))
    return [Case(**case) for case in cases]


CASES = covering()
# Three that were wrong where any two of them were right.
TOGETHER = {"loss": "masked", "path": "microbatches", "devices": "shard_map"}
CASES += [dataclasses.replace(CASES[0], **TOGETHER, formula="mean")]
AT_ONCE, LATER = CASES[:14], CASES[14:]  # which have fewer new pairs
MARKED = [*AT_ONCE, *(pytest.param(case, marks=pytest.mark.slow) for case in LATER)]


def test_every_valid_pair_is_in_a_case():
    covered = set().union(*(pairs_of(dataclasses.asdict(case)) for case in CASES))
    assert covered == set(every_pair())
    assert (len(covered), len(CASES)) == (815, 83)  # as the docstring says


# The network, in five containers with the same order of leaves -----------------------

ROWS, INPUTS, HIDDEN, OUTPUTS, DEVICES = 16, 3, 4, 3, 4
SHAPES = [(HIDDEN,), (INPUTS, HIDDEN), (OUTPUTS,), (HIDDEN, OUTPUTS)]
RNG = np.random.default_rng(0)
START = [RNG.normal(size=s) / s[0] ** 0.5 for s in SHAPES]


def network(leaves, x):
    b1, w1, b2, w2 = leaves
    return jnp.dot(jnp.tanh(jnp.dot(x, w1) + b1), w2) + b2


class Linen(nn.Module):
    dtype: str

    @nn.compact
    def __call__(self, x):
        dense = functools.partial(nn.Dense, dtype=self.dtype, param_dtype=self.dtype)
        hidden = nn.tanh(dense(HIDDEN)(x))  # first, for the order of names
        return dense(OUTPUTS)(hidden)


class Nnx(nnx.Module):
    def __init__(self, dtype):
        options = {"dtype": dtype, "param_dtype": dtype, "rngs": nnx.Rngs(0)}
        linear = functools.partial(nnx.Linear, **options)
        self.a, self.b = linear(INPUTS, HIDDEN), linear(HIDDEN, OUTPUTS)

    def __call__(self, x):
        return self.b(jnp.tanh(self.a(x)))


class Equinox(eqx.Module):
    b1: jax.Array
    w1: jax.Array
    b2: jax.Array
    w2: jax.Array
    activation: callable = eqx.field(static=True, default=jnp.tanh)

    def __call__(self, x):
        return jnp.dot(self.activation(x @ self.w1 + self.b1), self.w2) + self.b2


def contained(case):
    """Return parameters in their container, and the function to the outputs."""
    b1, w1, b2, w2 = leaves = [jnp.asarray(x, case.dtype) for x in START]
    if case.container == "list":
        return [(b1, w1), (b2, w2)], lambda p, x: network([*p[0], *p[1]], x)
    if case.container == "equinox":
        return Equinox(*leaves), lambda model, x: model(x)
    if case.container == "nnx":
        model = Nnx(case.dtype)
        treedef = jax.tree.structure(nnx.state(model, nnx.Param))
        nnx.update(model, jax.tree.unflatten(treedef, leaves))
        return model, lambda model, x: model(x)
    params = {"Dense_0": {"bias": b1, "kernel": w1}}
    params |= {"Dense_1": {"bias": b2, "kernel": w2}}
    if case.container == "linen":
        return params, lambda p, x: Linen(case.dtype).apply({"params": p}, x)
    return params, lambda p, x: network(jax.tree.leaves(p), x)


# Losses: the library's, that of a row, and the factor S of its Hessian ---------------


def cross_entropy_of(f, y):
    return jax.nn.logsumexp(f) - f[y]


def dense_cross_entropy_of(f, y):
    return jax.nn.logsumexp(f) - jnp.sum(f * y)


def softmax_factor(f, u, y):
    del y
    p = np.exp(f) / np.exp(f).sum(axis=-1, keepdims=True)
    half = np.sqrt(p) * u
    return half - p * half.sum(axis=-1, keepdims=True)


SCALES = np.array([0.1, 1.0, 4.0])  # so that the order of eigenvalues is known


def scaled_log_cosh(f, y):
    element = jnp.square(f - y) / 2 + jnp.log(jnp.cosh(f - y))
    return jnp.sum(jnp.asarray(SCALES, f.dtype) * element)


CLASSES = RNG.integers(0, OUTPUTS, size=(8, ROWS))
SMOOTH = 0.9 * np.eye(OUTPUTS)[CLASSES] + 0.1 / OUTPUTS
REAL = RNG.normal(size=(8, ROWS, OUTPUTS)) / 2
X = RNG.normal(size=(8, ROWS, INPUTS))
# The same for each device, but not for each part; without weight, anything may be.
WHERE = np.array([1.0, 0.0, 0.5, 2.0] * DEVICES)

SOFTMAX = ah.losses.softmax_cross_entropy
ANY = np.where(WHERE > 0, CLASSES, 99)
LOSSES = {
    "classes": (SOFTMAX, cross_entropy_of, softmax_factor, CLASSES),
    "dense_labels": (SOFTMAX, dense_cross_entropy_of, softmax_factor, SMOOTH),
    "masked": (SOFTMAX, cross_entropy_of, softmax_factor, ANY),
    "sum": (
        ah.losses.squared_error.replace(reduction="sum"),
        lambda f, y: jnp.sum((f - y) ** 2),
        lambda f, u, y: np.sqrt(2) * u,
        REAL,
    ),
    "row_function": (
        ah.losses.of_row(scaled_log_cosh),
        scaled_log_cosh,
        lambda f, u, y: np.sqrt(SCALES * (1 + np.cosh(f - y) ** -2)) * u,
        REAL,
    ),
}

# The library's side ------------------------------------------------------------------

B1, B2, EPS, RATE, DECAY, SGD, RANK, MEMORY = 0.8, 0.7, 0.3, 0.3, 0.1, 0.05, 2, 0.9
SEED = 7
FORMULAS = {
    "rms": {"hessian_ema": "rms", "hessian_power": 1.0, "clip_threshold": None},
    "mean": {
        "hessian_ema": "mean",
        "hessian_power": 0.5,
        "clip_threshold": 0.4,
        "nesterov": True,
    },
}
SCHEDULES = {"always": (1, 0), "interval": (3, 0), "first": (3, 2), "host": (1, 0)}


def needs_outputs(case):
    return any(
        name in case.estimator
        for name in ("gauss_newton", "in_eigenbasis", "axes_of_factors")
    )


def needs_labels(case):
    control = case.estimator == "gauss_newton_control"
    return control or (needs_outputs(case) and case.loss == "row_function")


def make_estimator(case):
    loss = LOSSES[case.loss][0]
    axis_name = "data" if case.devices == "shard_map" else None
    options = {"seed": SEED, "axis_name": axis_name}
    hutchinson = functools.partial(ah.hutchinson, **options)
    normal = functools.partial(hutchinson, probe="normal")
    gauss_newton = functools.partial(ah.gauss_newton, loss, **options)
    low_rank = ah.low_rank_control(RANK, decay=MEMORY)
    control = ah.gauss_newton_control(loss)
    turned = functools.partial(ah.in_eigenbasis, decay=MEMORY)
    return {
        "hutchinson": hutchinson(),
        "hutchinson_3": hutchinson(3),
        "normal": normal(),
        "gauss_newton": gauss_newton(),
        "gauss_newton_2": gauss_newton(n_samples=2),
        "in_eigenbasis": turned(gauss_newton()),
        "axes_of_factors": turned(gauss_newton(), axes_from="factors"),
        "turned_hutchinson": turned(hutchinson()),
        "squared_gradient": turned(ah.squared_gradient()),
        "gauss_newton_control": hutchinson(control_variate=control),
        "low_rank_control": hutchinson(control_variate=low_rank),
        "ema_control": normal(control_variate=ah.ema_control()),
    }[case.estimator]


def make_optimizer(case):
    interval, first = SCHEDULES[case.schedule]
    options = dict(FORMULAS[case.formula], b1=B1, b2=B2, eps=EPS)
    options |= {"update_interval": interval, "initial_refreshes": first}
    options["estimator"] = make_estimator(case)
    wide = "float32" if case.dtype == "bfloat16" else case.dtype
    if case.dtype != wide:
        options |= {"mu_dtype": wide, "nu_dtype": wide}
    named = {"learning_rate": RATE, "weight_decay": DECAY, **options}
    if case.wrapper == "chain":
        return optax.chain(
            optax.clip_by_global_norm(1e9),
            ah.scale_by_adahessian(**options),
            optax.add_decayed_weights(DECAY),
            optax.scale_by_learning_rate(RATE),
        )
    if case.wrapper == "partition":

        def labels(params):
            leaves, treedef = jax.tree.flatten(params)
            return treedef.unflatten(["curved"] * (len(leaves) - 1) + ["sgd"])

        parts = {"curved": ah.adahessian(**named), "sgd": optax.sgd(SGD)}
        return optax.partition(parts, labels)
    if case.wrapper == "inject":
        static = ("estimator", "hessian_ema", "mu_dtype", "nu_dtype")
        kinds = {"static_args": static, "hyperparam_dtype": jnp.dtype(wide)}
        return optax.inject_hyperparams(ah.adahessian, **kinds)(**named)
    tx = ah.adahessian(**named)
    if case.wrapper == "multi_steps":
        steps = optax.MultiSteps(tx, 2, accumulator_dtype=wide)
        return steps.gradient_transformation()
    if case.wrapper == "if_finite":
        return optax.apply_if_finite(tx, 3)
    return tx


class Trained:
    """A case as its user would write it: a carry and a step to the next one."""

    def __init__(self, case):
        self.case, self.tx = case, make_optimizer(case)
        self.loss = LOSSES[case.loss][0]
        self.model, self.predict = contained(case)
        # An objective is the mean of those of the devices, or for Gauss-Newton
        # estimators of a sum, their sum.
        n = DEVICES if case.devices == "shard_map" else 1
        added = case.loss == "sum" and needs_outputs(case)
        self.scale = n if case.loss == "sum" and not added else 1
        self.divisor = 1 if added else n
        if case.container == "nnx":
            optimizer = nnx.Optimizer(self.model, self.tx, wrt=nnx.Param)
            self.graphdef, self.carry = nnx.split((self.model, optimizer))
        elif case.container == "linen":
            options = {"apply_fn": self.predict, "params": self.model, "tx": self.tx}
            self.carry = TrainState.create(**options)
        else:
            self.carry = self.model, self.tx.init(self.model)

    def objective(self, model, x, y, where):
        outputs = self.predict(model, x)
        return self.scale * self.loss(outputs, y, where=where), outputs

    def loss_fn(self, model, x, y, where):
        loss, outputs = self.objective(model, x, y, where)
        if not needs_outputs(self.case):
            return loss
        return loss, (outputs if where is None else (outputs, where))

    def fused(self, params, batch, **state):
        case, make, options = self.case, ah.value_and_grad_with_curvature, {}
        options["microbatches"] = 2 if case.path == "microbatches" else 1
        if case.loss == "sum" and not needs_outputs(case):
            options["reduction"] = "sum"
        if case.container == "nnx":
            make = nnx_value_and_grad
        else:
            options["tx"] = self.tx
        if needs_labels(case):
            state["labels"] = batch[1]
        if not needs_outputs(case):
            state["where"] = batch[2]
        _, grads, curvature = make(self.loss_fn, **options)(params, *batch, **state)
        if case.devices == "shard_map":
            total = jax.lax.psum(grads, "data")
            grads = jax.tree.map(lambda g: g / self.divisor, total)
        return grads, {"curvature": curvature}

    def separate(self, model, params, batch):
        """Return gradients, and what ``update`` takes beside them."""
        case = self.case

        def function(fun):  # of the parameters
            if case.container == "nnx":
                return functional(fun, model)
            return ah.unmasked(fun, params) if case.wrapper == "partition" else fun

        objective = function(lambda m: self.objective(m, *batch)[0])
        # Over devices these are sums, for all share the parameters.
        over = functools.partial(jax.tree.map, lambda g: g / self.divisor)
        grads = over(jax.grad(objective)(params))
        if case.path == "hessian_diag":
            return grads, {"hessian_diag": over(ah.hessian_diag(objective, params))}
        if not needs_outputs(case):
            return grads, {"obj_fn": objective}
        extra_args = {"predict_fn": function(lambda m: self.loss_fn(m, *batch)[1])}
        return grads, extra_args | ({"labels": batch[1]} if needs_labels(case) else {})

    def step(self, carry, x, y, where, *, refresh=None):
        case, batch = self.case, (x, y, where)
        is_fused = case.path in ("fused", "microbatches")
        if case.container == "nnx":
            model, optimizer = nnx.merge(self.graphdef, carry)
            state = {"optimizer": optimizer, "refresh": refresh}
            if is_fused:
                grads, extra_args = self.fused(model, batch, **state)
            else:
                params = nnx.as_pure(nnx.state(model, nnx.Param))
                grads, extra_args = self.separate(model, params, batch)
                treedef = jax.tree.structure(nnx.state(model, nnx.Param))
                grads = treedef.unflatten(jax.tree.leaves(grads))
            optimizer.update(model, grads, **extra_args)
            return nnx.state((model, optimizer))
        if case.container == "linen":
            params, state = carry.params, carry.opt_state
        else:
            params, state = carry
        if is_fused:
            grads, extra_args = self.fused(params, batch, state=state, refresh=refresh)
        else:
            grads, extra_args = self.separate(None, params, batch)
        if case.container == "linen":
            return carry.apply_gradients(grads=grads, extra_args=extra_args)
        updates, state = self.tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state

    def leaves(self, carry):
        if self.case.container == "nnx":
            model, _ = nnx.merge(self.graphdef, carry)
            params = nnx.state(model, nnx.Param)
        else:
            params = carry.params if self.case.container == "linen" else carry[0]
        leaves = jax.tree.leaves(params)
        assert {str(x.dtype) for x in leaves} == {self.case.dtype}
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in leaves])

    def run(self):
        """Return all parameters before the first and after each of the steps."""
        case, history = self.case, [self.leaves(self.carry)]
        mesh = jax.sharding.Mesh(jax.devices()[:DEVICES], ("data",))
        compiled = {}
        for t, refresh in enumerate(schedule(case)):
            refresh = refresh if case.schedule == "host" else None
            if refresh not in compiled:
                step = functools.partial(self.step, refresh=refresh)
                if case.devices == "shard_map":
                    specs = (P(), P("data"), P("data"), P("data"))
                    step = jax.shard_map(step, mesh=mesh, in_specs=specs, out_specs=P())
                compiled[refresh] = jax.jit(step)
            batch = [jnp.asarray(X[t], case.dtype), self.labels(t), None]
            if case.loss == "masked":
                batch[2] = jnp.asarray(WHERE, "float32")
            if case.devices != "one":
                batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
                self.carry = jax.device_put(self.carry, NamedSharding(mesh, P()))
            # Many steps at once, of more devices than cores, can deadlock on CPU.
            self.carry = jax.block_until_ready(compiled[refresh](self.carry, *batch))
            history.append(self.leaves(self.carry))
        return history

    def labels(self, t):
        labels = LOSSES[self.case.loss][3][t]
        double = self.case.dtype == "float64"
        wide = jnp.float64 if double else jnp.float32
        return jnp.asarray(labels, jnp.int32 if labels.dtype == int else wide)


def schedule(case):
    """Return for each call whether there is an estimate that counts."""
    if case.schedule == "host":
        due = [True, False, False, True]
    else:
        interval, first = SCHEDULES[case.schedule]
        due = [t % interval == 0 or t < first for t in range(4)]
    return [x for x in due for _ in range(2 if case.wrapper == "multi_steps" else 1)]


# The formulas ------------------------------------------------------------------------

SIZES = [int(np.prod(s)) for s in SHAPES]
ENDS = np.cumsum(SIZES)[:-1]


@functools.cache
def rows_of(name):
    """Return a function to the exact derivatives of each row's loss."""
    row_loss = LOSSES[name][1]

    def outputs(flat, x):
        leaves = zip(jnp.split(flat, ENDS), SHAPES, strict=True)
        return network([a.reshape(s) for a, s in leaves], x)

    def one(flat, x, y):
        f = outputs(flat, x)

        def loss(w):
            return row_loss(outputs(w, x), y)

        jacobian = jax.jacobian(outputs)(flat, x)
        bend = jax.hessian(row_loss)(f, y)
        ggn = jacobian.T @ bend @ jacobian
        return f, jacobian, jax.grad(loss)(flat), jax.hessian(loss)(flat), ggn

    return jax.jit(jax.vmap(one, (None, 0, 0)))


class LowRank:
    """The control variate's C, and what it is tracked from, by singular values."""

    def __init__(self, n):
        self.q, self.lengths = np.zeros((n, RANK)), np.zeros(RANK)
        self.yz, self.yy, self.zz = np.zeros((3, RANK, RANK))
        self.weight = self.squares = 0.0

    def matrix(self):
        if self.weight == 0:
            return 0 * self.q @ self.q.T
        seen = np.diag(self.zz)
        known = (self.lengths > 0) & (seen > 1e-6)
        seen = np.where(known, seen, 1)
        guess = np.diag(self.yz) / seen
        n = self.weight**2 / self.squares * np.minimum(seen / self.weight, 1)
        noise = (np.diag(self.yy) / seen + guess**2) / np.maximum(n, 1e-6)
        with np.errstate(divide="ignore", invalid="ignore"):
            shrunk = guess * np.maximum(0, 1 - noise / guess**2)
        values = np.where(known & (n > 1) & (guess != 0), shrunk, 0)
        return self.q * values @ self.q.T

    def move(self, zs, ys):
        n = len(zs)
        pairs = [(self.q.T @ y, self.q.T @ z) for y, z in zip(ys, zs, strict=True)]
        y = n**0.5 * np.mean(ys, axis=0)
        old, new = MEMORY**0.5, (1 - MEMORY) ** 0.5
        columns = np.column_stack([old * self.q * self.lengths, new * y])
        u, s, _ = np.linalg.svd(columns, full_matrices=False)
        s = s[:RANK]
        kept = s**2 > 1e-5 * s[0] ** 2
        q = u[:, :RANK] * kept
        turn = q.T @ self.q

        def moved(average, products):
            average = MEMORY * average + (1 - MEMORY) * np.mean(products, axis=0)
            return turn @ average @ turn.T

        self.yz = moved(self.yz, [np.outer(a, b) for a, b in pairs])
        self.yy = moved(self.yy, [np.outer(a, a) for a, _ in pairs])
        self.zz = moved(self.zz, [np.outer(b, b) for _, b in pairs])
        self.q, self.lengths = q, s * kept
        self.weight = MEMORY * self.weight + 1 - MEMORY
        self.squares = MEMORY**2 * self.squares + (1 - MEMORY) ** 2 / n


class Bases:
    """Each leaf's axes, by orthogonal iteration on complete partial traces."""

    def __init__(self, shapes, rounding):
        self.rounding = rounding
        self.bases = [[np.eye(n) for n in s] for s in shapes]
        self.traces = [[np.zeros((n, n)) for n in s] for s in shapes]

    def see(self, leaves):
        for g, traces in zip(leaves, self.traces, strict=True):
            for axis, trace in enumerate(traces):
                rows = np.moveaxis(g, axis, 0).reshape(len(trace), -1)
                traces[axis] = MEMORY * trace + (1 - MEMORY) * rows @ rows.T

    def turn(self, leaves):
        """Return a diagonal in the new bases."""
        carried = []
        for x, bases, traces in zip(leaves, self.bases, self.traces, strict=True):
            for axis, (q, trace) in enumerate(zip(bases, traces, strict=True)):
                lq = trace @ q
                lq = lq / (np.abs(lq).max() or 1) + self.rounding**0.5 * q
                bases[axis] = np.linalg.qr(lq)[0]
                x = np.tensordot(x, (q.T @ bases[axis]) ** 2, (0, 0))
            carried.append(x.ravel())
        return np.concatenate(carried)

    def dense(self):
        whole = (functools.reduce(np.kron, bases) for bases in self.bases)
        return jax.scipy.linalg.block_diag(*whole)

    def turned(self, leaves, *, back=False):
        result = []
        for x, bases in zip(leaves, self.bases, strict=True):
            for q in bases:
                x = np.tensordot(x, q.T if back else q, (0, 0))
            result.append(x.ravel())
        return np.concatenate(result)


class Oracle:
    """The same optimizer, from dense matrices."""

    def __init__(self, case):
        self.case = case
        self.key = jax.random.PRNGKey(SEED)
        self.shapes = SHAPES[:-1] if case.wrapper == "partition" else SHAPES
        self.n = sum(SIZES[: len(self.shapes)])
        rounding = 2.0**-52 if case.dtype == "float64" else 2.0**-23
        self.low_rank, self.bases = LowRank(self.n), Bases(self.shapes, rounding)
        self.mu, self.nu = np.zeros(self.n), np.zeros(self.n)
        self.count = self.refreshes = 0

    def split(self, flat):
        ends = np.cumsum(SIZES[: len(self.shapes)])[:-1]
        leaves = zip(np.split(flat, ends), self.shapes, strict=True)
        return [a.reshape(s) for a, s in leaves]

    def probe(self, key):
        draw = rademacher_like
        if self.case.estimator in ("normal", "ema_control"):
            draw = normal_like
        z = draw(key, [jnp.zeros(s, self.case.dtype) for s in self.shapes])
        return np.concatenate([np.asarray(x, np.float64).ravel() for x in z])

    def at(self, params, t):
        """Return the whole gradient and Hessian, and what depends on rows."""
        name = self.case.loss
        weights = WHERE if name == "masked" else np.ones(ROWS)
        labels = LOSSES[name][3][t]
        if name == "masked":
            labels = np.where(WHERE > 0, labels, 0)
        of_rows = map(np.asarray, rows_of(name)(params, X[t], labels))
        *rows, grads, hessians, ggns = of_rows
        total = 1 if name == "sum" else weights.sum()
        self.data = weights, labels, rows, hessians, ggns
        return weights @ grads / total, np.tensordot(weights, hessians, 1) / total

    def estimate(self, grads):
        """Return the estimate of the estimator, moved on."""
        if self.case.estimator == "squared_gradient":
            return self.bases.turned(self.split(grads[: self.n])) ** 2
        case = self.case
        n_parts = 2 if case.path == "microbatches" else 1
        n = DEVICES if case.devices == "shard_map" else 1
        blocks = np.arange(ROWS).reshape(n, -1)
        diag, total = np.zeros(self.n), 0.0
        for part in range(n_parts):
            rows = blocks[:, part::n_parts]
            weight = self.data[0][rows].sum()
            self.key, subkey = jax.random.split(self.key)
            keys = [subkey]
            if n > 1:
                keys = [jax.random.fold_in(subkey, i) for i in range(n)]
            divisor = 1 if case.loss == "sum" else weight
            weight = 1.0 if case.loss == "sum" else weight
            diag += weight * self.of_part(keys, rows, divisor)
            total += weight
        return diag / (1 if case.loss == "sum" else total)

    def of_part(self, keys, rows, divisor):
        case, n = self.case, len(keys)
        weights, labels, (outputs, jacobians), hessians, ggns = self.data
        n_samples = {"hutchinson_3": 3, "gauss_newton_2": 2}.get(case.estimator, 1)
        keys = [jax.random.split(key, n_samples) for key in keys]

        def matrix(i, of_rows):  # whose mean over the devices is the whole one
            w = n * weights[rows[i]] / divisor
            return np.tensordot(w, of_rows[rows[i], : self.n, : self.n], 1)

        def factor(i, key):
            r = rows[i]
            u = rademacher_like(key, jnp.zeros((len(r), OUTPUTS)))
            su = LOSSES[case.loss][2](outputs[r], np.asarray(u), labels[r])
            su = su * np.sqrt(weights[r] / divisor)[:, None]
            return np.einsum("rc,rcn->n", su, jacobians[r])[: self.n]

        def mean(sample):
            samples = [[sample(i, key) for key in ks] for i, ks in enumerate(keys)]
            return np.mean(samples, axis=(0, 1))

        if case.estimator in ("gauss_newton", "gauss_newton_2"):
            return n * mean(lambda i, key: factor(i, key) ** 2)
        if case.estimator in ("in_eigenbasis", "axes_of_factors"):
            g = self.split(n * mean(factor))
            if case.estimator == "axes_of_factors":
                self.bases.see(g)
            return self.bases.turned(g) ** 2
        hs = [matrix(i, hessians) for i in range(n)]
        if case.estimator == "turned_hutchinson":
            q = np.asarray(self.bases.dense())
            hs = [q.T @ h @ q for h in hs]
        if case.estimator == "gauss_newton_control":
            rests = [h - matrix(i, ggns) for i, h in enumerate(hs)]

            def sample(i, key):
                z = self.probe(key)
                g = factor(i, jax.random.fold_in(key, 1))
                return n * g**2 + z * (rests[i] @ z)

            return mean(sample)
        c = 0 * hs[0]
        if case.estimator == "ema_control" and self.refreshes:
            c = np.diag(self.nu / (1 - B2**self.refreshes))
        if case.estimator == "low_rank_control":
            c = self.low_rank.matrix()
            zs = [self.probe(key) for (key,) in keys]
            self.low_rank.move(zs, [h @ z for h, z in zip(hs, zs, strict=True)])

        def corrected(i, key):
            z = self.probe(key)
            return z * ((hs[i] - c) @ z) + np.diag(c)

        return mean(corrected)

    def update(self, params, grads, hessian, *, refresh):
        """Return what is added to the parameters."""
        case, formula, n = self.case, FORMULAS[self.case.formula], self.n
        order = 2 if case.formula == "rms" else 1
        if refresh:
            exact = case.path == "hessian_diag"
            d = np.diag(hessian)[:n] if exact else self.estimate(grads)
            self.nu = B2 * self.nu + (1 - B2) * d**order
            self.refreshes += 1
        self.count += 1
        self.mu = B1 * self.mu + (1 - B1) * grads[:n]
        m = self.mu / (1 - B1**self.count)
        if formula.get("nesterov"):
            m = B1 * self.mu / (1 - B1 ** (self.count + 1))
            m += (1 - B1) * grads[:n] / (1 - B1**self.count)
        m = self.bases.turned(self.split(m))
        h = np.abs(self.nu / (1 - B2**self.refreshes)) ** (1 / order)
        bound = formula["clip_threshold"] or np.inf
        step = np.clip(m / (h ** formula["hessian_power"] + EPS), -bound, bound)
        step = self.bases.turned(self.split(step), back=True)
        if case.estimator in TURNED.split():
            if case.estimator != "axes_of_factors":
                self.bases.see(self.split(grads[:n]))
            self.nu = self.bases.turn(self.split(self.nu))
        curved = -RATE * (step + DECAY * params[:n])
        return np.concatenate([curved, -SGD * grads[n:]])


TOLERANCES = {"float64": 1e-8, "float32": 2e-3, "bfloat16": 0.1}


def needs_newer_versions(case):
    return (
        # Older versions draw other signs on several devices.
        (case.devices != "one" and not hasattr(jax, "shard_map"))
        or (case.container in ("nnx", "linen") and not hasattr(nnx, "as_pure"))
        or (case.wrapper == "multi_steps" and not hasattr(nnx, "as_pure"))
    )


@pytest.mark.parametrize("case", MARKED, ids=lambda c: "-".join(dataclasses.astuple(c)))
def test_case(case):
    if needs_newer_versions(case):
        pytest.skip("for newer versions of JAX, Flax or optax")
    jax.config.update("jax_enable_x64", case.dtype == "float64")
    try:
        with jax.numpy_dtype_promotion("standard"):
            history = Trained(case).run()
        jax.config.update("jax_enable_x64", True)
        oracle, grads = Oracle(case), []
        for t, refresh in enumerate(schedule(case)):
            params = history[t]
            g, hessian = oracle.at(params, t)
            grads.append(g)
            expected = np.zeros_like(params)
            if case.wrapper != "multi_steps" or t % 2:
                mean = np.mean(grads, axis=0)
                expected = oracle.update(params, mean, hessian, refresh=refresh)
                grads = []
            error = np.abs(history[t + 1] - params - expected)
            rounding = float(jnp.finfo(case.dtype).eps) * np.abs(params)
            allowed = TOLERANCES[case.dtype] * np.abs(expected).max() + rounding
            assert np.all(error <= allowed), f"step {t}: {error} above {allowed}"
    finally:
        jax.config.update("jax_enable_x64", False)


@pytest.mark.usefixtures("x64")
def test_low_rank_control_when_it_has_learned():
    """After more steps than those above, so that there is something to subtract."""
    (params, _), h = quadratic()
    h = np.asarray(h) + 30 * np.outer(np.ones(8), np.arange(8))
    h = (h + h.T) / 2
    control = ah.low_rank_control(RANK, decay=MEMORY)
    estimator = ah.hutchinson(control_variate=control)

    def loss(p):
        w = jnp.concatenate([p["a"], p["b"]])
        return w @ h @ w / 2

    def step(state, _):
        diag, new = estimator.update(None, state, params, obj_fn=loss)
        return new, (jnp.concatenate([diag["a"], diag["b"]]), state.key)

    start = estimator.init(params)
    _, diags = jax.jit(lambda s: jax.lax.scan(step, s, length=40))(start)
    known = LowRank(8)
    for diag, key in zip(*diags, strict=True):
        (subkey,) = jax.random.split(jax.random.split(key)[1], 1)
        z = np.concatenate(list(rademacher_like(subkey, params).values()))
        c = known.matrix()
        np.testing.assert_allclose(diag, z * ((h - c) @ z) + np.diag(c), atol=1e-8)
        known.move([z], [h @ z])
    assert np.linalg.norm(c) > 0.5 * np.linalg.norm(h)
