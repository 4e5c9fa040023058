# SPDX-License-Identifier: Apache-2.0
"""How a run is made and timed, how learning rates are found, and what is compared."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import adahessian_jax as ah
from benchmarks.training.contenders import Contender, WarmupCosine
from benchmarks.training.tasks import Task

RECORDS = 20  # how often a run is evaluated
FACTOR = 10**0.5  # between learning rates of the search
PARTS = 4  # a quadratic model is of the first of so many parts of a changing batch
TUNING_SEED = 1000  # and those that follow


class Run(NamedTuple):
    """Losses along a run, and how long its steps took."""

    steps: list[int]
    train: list[float]
    validation: list[float]
    seconds: float


Train = Callable[..., Run]


def make_train(task: Task, contender: Contender) -> Train:
    """Return ``(peak, seed, steps) -> Run``, compiled once for all of them."""
    data = jax.device_put(task.train)
    n = len(jax.tree.leaves(data)[0])

    def optimizer(peak: Any, steps: Any, key: jax.Array) -> Any:
        tx = contender.make(WarmupCosine(peak, steps), task, key)
        return optax.with_extra_args_support(tx)

    def batch_of(data: Any, key: jax.Array, count: Any) -> Any:
        if task.batch_size is None:
            return data
        # With replacement: permuting all examples would take longer than some steps.
        key = jax.random.fold_in(key, count)
        rows = jax.random.randint(key, (task.batch_size,), 0, n)
        return jax.tree.map(lambda x: x[rows], data)

    def step(carry: Any, count: Any, peak: Any, steps: Any, data: Any, refresh: Any):
        params, state, _, keys = carry
        tx = optimizer(peak, steps, keys[1])
        batch = batch_of(data, keys[0], count)
        grads, extra_args, kept = differentiate(
            task, contender, tx, carry, batch, count=count, refresh=refresh
        )
        updates, state = tx.update(grads, state, params, **extra_args)
        return optax.apply_updates(params, updates), state, kept, keys

    def init(peak: Any, seed: Any, steps: Any) -> Any:
        init_key, batch_key, probe_key = jax.random.split(jax.random.key(seed), 3)
        params, kept = task.init(init_key), None
        if contender.kept is not None:
            estimator_state = contender.kept(task, probe_key).init(params)
            kept = jax.tree.map(jnp.zeros_like, params), estimator_state
        state = optimizer(peak, steps, probe_key).init(params)
        return params, state, kept, (batch_key, probe_key)

    @jax.jit
    def several(carry: Any, start: Any, end: Any, peak: Any, steps: Any, data: Any):
        return jax.lax.fori_loop(
            start, end, lambda t, c: step(c, t, peak, steps, data, None), carry
        )

    one = jax.jit(step, static_argnames="refresh", donate_argnums=0)
    start_of = jax.jit(init)
    evaluate = make_evaluate(task)

    def train(peak: float, seed: int, steps: int) -> Run:
        carry = start_of(peak, seed, steps)
        run = Run([], [], [], 0.0)
        seconds = 0.0
        ends = [round(steps * (i + 1) / RECORDS) for i in range(RECORDS)]
        for begin, end in zip([0, *ends], ends, strict=False):
            started = time.perf_counter()
            if task.loops:
                for t in range(begin, end):
                    refresh = contender.is_due(t)
                    carry = one(carry, t, peak, steps, data, refresh=refresh)
            else:
                carry = several(carry, begin, end, peak, steps, data)
            jax.block_until_ready(carry[0])
            seconds += time.perf_counter() - started
            losses = evaluate(carry[0])
            run.steps.append(end)
            run.train.append(losses[0])
            run.validation.append(losses[1])
            if not math.isfinite(losses[1]):
                break
        return run._replace(seconds=seconds)

    return train


def differentiate(
    task: Task,
    contender: Contender,
    tx: Any,
    carry: Any,
    batch: Any,
    *,
    count: Any,
    refresh: bool | None,
) -> tuple[Any, dict[str, Any], Any]:
    """Return the gradient, what else an update takes, and what is kept.

    That is the last estimate and its estimator's state, where that is not in the
    optimizer. ``refresh`` says whether to estimate; with None the count does.
    """
    params, state, kept, (_, key) = carry

    def loss_only(p: Any, batch: Any = batch) -> jax.Array:
        return task.loss_fn(p, batch)[0]

    def predict_fn(p: Any, parts: int = 1 if contender.whole_batch else PARTS) -> Any:
        part = jax.tree.map(lambda x: x[: max(1, len(x) // parts)], batch)
        return task.loss_fn(p, part)[1]

    if contender.line_search:
        value_and_grad = optax.value_and_grad_from_state(loss_only)
        value, grads = value_and_grad(params, state=state)
        return grads, {"value": value, "grad": grads, "value_fn": loss_only}, kept
    if contender.curvature:
        loss_fn = task.loss_fn if contender.curvature == "outputs" else loss_only
        fused = ah.value_and_grad_with_curvature(loss_fn, tx)
        _, grads, curvature = fused(params, batch, state=state, refresh=refresh)
        more = {"curvature": curvature, "grad": grads, "predict_fn": predict_fn}
        return grads, more, kept
    grads = jax.grad(loss_only)(params)
    if contender.kept is None:
        return grads, {}, kept

    def fresh(kept: Any) -> Any:
        functions = {"obj_fn": loss_only, "predict_fn": partial(predict_fn, parts=1)}
        update = contender.kept(task, key).update
        return update(grads, kept[1], params, **functions)

    if refresh is None:
        due = contender.is_due(count)
        kept = jax.lax.cond(due, fresh, lambda kept: kept, kept)
    elif refresh:
        kept = fresh(kept)
    return grads, {"hessian_diag": kept[0], "obj_fn": loss_only}, kept


def make_evaluate(task: Task) -> Callable[[Any], tuple[float, float]]:
    """Return the function from parameters to what is reported of both sets."""

    def some(tree: Any) -> Any:
        n = len(jax.tree.leaves(tree)[0])
        rows = np.linspace(0, n - 1, min(n, task.evaluated)).astype(int)
        return jax.device_put(jax.tree.map(lambda x: np.asarray(x)[rows], tree))

    sets = some(task.train), some(task.validation)
    loss = jax.jit(lambda params, batch: task.loss_fn(params, batch)[0])
    of_validation = loss if task.metric is None else jax.jit(task.metric)
    pairs = tuple(zip((loss, of_validation), sets, strict=True))
    return lambda params: tuple(float(f(params, batch)) for f, batch in pairs)


def tuning_loss(train: Train, task: Task, steps: int, peak: float) -> float:
    """Return the geometric mean of final losses, infinite if a run diverged."""
    seeds = range(TUNING_SEED, TUNING_SEED + task.tuning_seeds)
    losses = [train(peak, seed, steps).validation[-1] for seed in seeds]
    losses = [x if math.isfinite(x) else math.inf for x in losses]
    return math.exp(sum(map(math.log, losses)) / len(losses))


def search(
    score: Callable[[float], float], start: float, known: dict[float, float]
) -> dict[float, float]:
    """Return the score of learning rates around the best, which has the least.

    The rates lie half a decade apart: the first, one to either side, and more at either
    edge until the best is not there. What is known from an earlier search from the same
    start is kept, and not tried again.
    """
    found = {round(math.log(r / start, FACTOR)): loss for r, loss in known.items()}
    missing = [k for k in (-1, 0, 1) if k not in found]
    for _ in range(12):
        for power in missing:
            found[power] = score(start * FACTOR**power)
        best = min(found, key=lambda k: (found[k], k))  # the lower, if all diverge
        missing = [k for k in (best - 1, best + 1) if k not in found]
        if not missing:
            break
    return {start * FACTOR**k: found[k] for k in sorted(found)}


def best_rate(found: dict[float, float]) -> float:
    """Return the rate with the least loss."""
    return min(found, key=lambda rate: found[rate])


def good_width(found: dict[float, float], tolerance: float = 0.05) -> float:
    """Return by what factor the rates span whose loss is within 5 % of the best.

    Between rates that were tried, the logarithm of the loss is taken to be a straight
    line in that of the rate.
    """
    rates = sorted(found)
    x = np.log10(rates)
    y = np.array([min(math.log(max(found[r], 1e-30)), 1e3) for r in rates])
    fine = np.linspace(x[0], x[-1], 2001)
    losses = np.interp(fine, x, y)
    best = int(np.argmin(losses))
    bad = np.flatnonzero(losses > losses[best] + math.log1p(tolerance))
    low = max(bad[bad < best], default=-1) + 1
    high = min(bad[bad > best], default=len(fine)) - 1
    return float(10 ** (fine[high] - fine[low]))
