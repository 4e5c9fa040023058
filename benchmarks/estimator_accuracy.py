# SPDX-License-Identifier: Apache-2.0
"""How accurate is each estimator of the Hessian's diagonal, and at what cost?

For small networks, at the start, early and late in training, the exact diagonals of
the Hessian H and of the Gauss-Newton matrix G are computed on one batch. Each estimator
is then drawn many times on that batch:

- relative error: the root mean square of |d - t| / |t|, where t is the diagonal that
  the estimator is an unbiased estimate of;
- cost: the operations that XLA counts in the compiled function that returns the loss,
  its gradient and the estimate, less those of the loss and the gradient alone, in units
  of the latter. Loops are unrolled, because XLA counts a loop's body once.

Run ``python benchmarks/estimator_accuracy.py``: an hour on one core, two minutes
with ``--quick``. It needs the ``demo`` extra, for the data and the figure.
"""

import argparse
import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from estimator_nets import NETS, Net, Objective, training
from estimator_report import write_report

import adahessian_jax as ah
from adahessian_jax.demo.data import Examples, batches

SOFTMAX = "softmax_cross_entropy"


class Estimator(NamedTuple):
    """A transformation that estimates a diagonal, and which one."""

    transformation: optax.GradientTransformationExtraArgs
    target: str  # "hessian" or "gauss_newton"
    learns_from: str = ""  # "training" or "one batch": what its state has seen
    takes_parts: bool = False  # it cuts the batch
    draws: int = 1  # how many times as often it is drawn


PARTS = 8
LOW_RANK = ah.hutchinson(control_variate=ah.low_rank_control(8))
GAUSS_NEWTON_CONTROL = ah.hutchinson(control_variate=ah.gauss_newton_control(SOFTMAX))
# Each part is a sample: the same memory of steps.
LOW_RANK_OF_PARTS = ah.hutchinson(
    control_variate=ah.low_rank_control(8, decay=0.98 ** (1 / PARTS))
)


def in_parts(estimator: optax.GradientTransformation) -> Any:
    """Estimate on parts of the batch, not in a loop, whose operations count once."""
    return ah.microbatched(estimator, PARTS, unroll=True)


ESTIMATORS = {
    "optax hutchinson": Estimator(
        optax.contrib.hutchinson_estimator_diag_hessian(), "hessian"
    ),
    "hutchinson": Estimator(ah.hutchinson(), "hessian"),
    "hutchinson normal": Estimator(ah.hutchinson(probe="normal"), "hessian"),
    "hutchinson n=4": Estimator(ah.hutchinson(4), "hessian"),
    "microbatched 8": Estimator(in_parts(ah.hutchinson()), "hessian", takes_parts=True),
    "low_rank_control": Estimator(
        LOW_RANK,
        "hessian",
        learns_from="training",
    ),
    "low_rank_control, one batch": Estimator(
        LOW_RANK,
        "hessian",
        learns_from="one batch",
    ),
    "microbatched 8, low_rank_control": Estimator(
        in_parts(LOW_RANK_OF_PARTS),
        "hessian",
        learns_from="training",
        takes_parts=True,
    ),
    "gauss_newton_control": Estimator(GAUSS_NEWTON_CONTROL, "hessian"),
    "microbatched 8, gauss_newton_control": Estimator(
        in_parts(GAUSS_NEWTON_CONTROL), "hessian", takes_parts=True
    ),
    # Its error is held against a bound that it comes close to: draw it more often.
    "gauss_newton": Estimator(ah.gauss_newton(SOFTMAX), "gauss_newton", draws=4),
    "gauss_newton n=4": Estimator(
        ah.gauss_newton(SOFTMAX, n_samples=4), "gauss_newton"
    ),
    "gauss_newton hutchinson": Estimator(
        ah.gauss_newton(SOFTMAX, method="hutchinson"), "gauss_newton"
    ),
    "gauss_newton sampled-labels": Estimator(
        ah.gauss_newton(SOFTMAX, method="sampled-labels"), "gauss_newton"
    ),
}


class Settings(NamedTuple):
    """How much is measured."""

    draws: int = 400
    large_draws: int = 120  # where only some coordinates are known
    early: int = 50  # steps
    late: int = 2000
    tracked: int = 400  # steps from which a stateful estimator has learnt, late
    n_states: int = 2  # independent states of each stateful estimator
    warm_up_draws: int = 120
    max_coordinates: int | None = None


QUICK = Settings(
    draws=24, late=300, tracked=100, n_states=1, warm_up_draws=24, max_coordinates=200
)
STAGES = ("init", "early", "late")


def compile_step(
    objective: Objective, estimator: Estimator, params: Any, batch: Examples
) -> Any:
    """Compile one function of loss, gradient, estimate and the estimator's state."""

    def step(params: Any, batch: Examples, state: Any) -> Any:
        value, grads = jax.value_and_grad(objective)(params, batch)
        args = objective.extra_args(batch, estimator.takes_parts)
        diag, state = estimator.transformation.update(grads, state, params, **args)
        return value, grads, jax.flatten_util.ravel_pytree(diag)[0], state

    state = estimator.transformation.init(params)
    return jax.jit(step).lower(params, batch, state).compile()


def exact_diagonals(
    objective: Objective,
    params: Any,
    batch: Examples,
    coordinates: np.ndarray,
    chunk_size: int,
) -> dict[str, np.ndarray]:
    """Compute entries of the diagonals of the Hessian and the Gauss-Newton matrix."""
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def columns(params: Any, batch: Examples, index: jax.Array) -> Any:
        basis = unravel(jnp.zeros_like(flat).at[index].set(1))
        product = ah.hvp(lambda p: objective(p, batch), params, basis)
        _, tangent = jax.jvp(
            lambda p: objective.predict(p, batch.inputs), (params,), (basis,)
        )
        return jax.flatten_util.ravel_pytree(product)[0][index], tangent

    one = columns if chunk_size == 1 else jax.vmap(columns, in_axes=(None, None, 0))
    one = jax.jit(one)
    logits = np.asarray(objective.predict(params, batch.inputs), float)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    # The Hessian in the logits is diag(p) - p p', so an entry of the Gauss-Newton
    # diagonal is the variance under p of the derivative of the logits.
    h, g = [], []
    chunks = np.resize(coordinates, -(-len(coordinates) // chunk_size) * chunk_size)
    for chunk in chunks.reshape(-1, chunk_size):
        entry, tangent = one(params, batch, chunk[0] if chunk_size == 1 else chunk)
        t = np.asarray(tangent, float).reshape(len(chunk), *p.shape)
        centred = t - np.sum(p * t, axis=-1, keepdims=True)
        h.append(np.atleast_1d(entry))
        g.append(np.sum(p * centred**2, axis=-1).reshape(len(chunk), -1).mean(-1))
    n = len(coordinates)
    return {
        "hessian": np.concatenate(h)[:n].astype(float),
        "gauss_newton": np.concatenate(g)[:n],
    }


def choose_coordinates(
    params: Any, n: int | None, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Choose about ``n`` entries, as many from each leaf; all by default.

    A leaf's entries are weighted by the inverse of the part that was chosen, so that
    weighted sums of squares estimate those over all entries.
    """
    rng = np.random.default_rng(seed)
    sizes = [x.size for x in jax.tree.leaves(params)]
    chosen, weights, start = [], [], 0
    for size in sizes:
        k = size if n is None else min(size, -(-n // len(sizes)))
        chosen.append(start + np.sort(rng.permutation(size)[:k]))
        weights.append(np.full(k, size / k))
        start += size
    return np.concatenate(chosen), np.concatenate(weights)


def draw(
    step: Any, params: Any, batch: Examples, states: list[Any], keys: Any, where: Any
) -> np.ndarray:
    """Draw independent estimates, dividing the draws among the states."""
    return np.stack(
        [
            np.asarray(
                step(params, batch, states[i % len(states)]._replace(key=key))[2]
            )[where]
            for i, key in enumerate(keys)
        ]
    )


def errors(
    estimates: np.ndarray, exact: np.ndarray, weights: np.ndarray
) -> dict[str, float]:
    """Compare draws with the exact diagonal."""
    n, norm2 = len(estimates), float(weights @ exact**2)
    squared = (estimates - exact) ** 2 @ weights / norm2
    along = estimates @ (weights * exact) / norm2 - 1  # mean 0 if unbiased
    spread = estimates.std(axis=0, ddof=1)
    known = spread > 1e-6 * np.abs(exact).max()
    z = (estimates.mean(axis=0) - exact)[known] / spread[known] * np.sqrt(n)
    return {
        "relative_error": float(np.sqrt(squared.mean())),
        "relative_variance": float(squared.mean()),
        "relative_variance_se": float(squared.std(ddof=1) / np.sqrt(n)),
        "bias_overall_in_se": float(along.mean() / along.std(ddof=1) * np.sqrt(n)),
        "bias_max_in_se": float(np.abs(z).max(initial=0)),
    }


def total_variance(estimates: np.ndarray) -> float:
    """Add up the variances of all entries."""
    return float(estimates.var(axis=0, ddof=1, dtype=float).sum())


def measure_net(
    name: str,
    net: Net,
    settings: Settings,
    stages: list[str],
    seed: int,
    estimators: dict[str, Estimator] = ESTIMATORS,
) -> dict[str, Any]:
    """Train a network, stopping at each stage to measure the estimators."""
    examples = net.load()
    stream = batches(examples, net.batch_size, seed=seed + 1)
    batch = next(batches(examples, net.batch_size, seed=seed))
    params = net.model.init(jax.random.key(seed), batch.inputs)
    objective = Objective(net.model.apply)
    n_params = sum(x.size for x in jax.tree.leaves(params))
    coordinates, weights = choose_coordinates(
        params, net.n_coordinates or settings.max_coordinates, seed
    )
    n_draws = settings.large_draws if net.n_coordinates else settings.draws

    gradient = jax.jit(jax.value_and_grad(objective)).lower(params, batch).compile()
    unit = gradient.cost_analysis()["flops"]
    compiled, steps, costs = {}, {}, {}
    for label, estimator in estimators.items():
        if estimator.transformation not in compiled:
            step = compile_step(objective, estimator, params, batch)
            compiled[estimator.transformation] = step
        steps[label] = compiled[estimator.transformation]
        costs[label] = steps[label].cost_analysis()["flops"] / unit - 1

    def new_states(estimator: Estimator, seed: int) -> list[Any]:
        state = estimator.transformation.init(params)
        keys = jax.random.split(jax.random.PRNGKey(seed), settings.n_states)
        return (
            [state._replace(key=k) for k in keys] if estimator.learns_from else [state]
        )

    def fresh(seed: int) -> dict[str, list[Any]]:
        return {label: new_states(e, seed) for label, e in estimators.items()}

    def measure(params: Any, states: dict[str, list[Any]], step: int) -> dict[str, Any]:
        exact = exact_diagonals(objective, params, batch, coordinates, net.chunk_size)
        scale = np.abs(exact["hessian"]).max()
        difference = np.abs(exact["hessian"] - exact["gauss_newton"]).max() / scale
        result: dict[str, Any] = {
            "step": step,
            "loss": float(objective(params, batch)),
            "max_difference_of_diagonals": float(difference),
            "relative_difference_of_diagonals": float(
                np.linalg.norm(exact["hessian"] - exact["gauss_newton"])
                / np.linalg.norm(exact["hessian"])
            ),
            "estimators": {},
        }
        for label, estimator in estimators.items():
            key = jax.random.PRNGKey(seed + step)
            keys = jax.random.split(key, n_draws * estimator.draws)
            d = draw(steps[label], params, batch, states[label], keys, coordinates)
            row = errors(d, exact[estimator.target], weights)
            if estimator.target == "gauss_newton":
                against = errors(d, exact["hessian"], weights)
                row["relative_error_to_hessian"] = against["relative_error"]
            result["estimators"][label] = row
        return result

    def gains(params: Any, states: dict[str, list[Any]], step: int) -> dict[str, Any]:
        n = settings.warm_up_draws // (3 if net.n_coordinates else 1)
        keys = jax.random.split(jax.random.PRNGKey(seed + 7 * step), n)
        plain = estimators["hutchinson"]
        plain_state = [plain.transformation.init(params)]
        plain_variance = total_variance(
            draw(steps["hutchinson"], params, batch, plain_state, keys, slice(None))
        )
        learnt_from = min(step, settings.tracked)
        result: dict[str, Any] = {"step": step, "learnt_from": learnt_from}
        for label in estimators:
            if "control" in label:
                result[label] = [
                    plain_variance
                    / total_variance(
                        draw(steps[label], params, batch, [s], keys, slice(None))
                    )
                    for s in states[label]
                ]
        return result

    train_step, opt_state = training(net, objective, params)

    at = {0: "init", settings.early: "early", settings.late: "late"}
    last = max(step for step, stage in at.items() if stage in stages)
    curve_steps = [1, 2, 5, 10, 20, 50, 100, 400]
    curve_steps = [s for s in curve_steps if s <= min(last, settings.tracked)]
    result: dict[str, Any] = {
        "parameters": n_params,
        "coordinates": len(coordinates),
        "piecewise_linear": net.piecewise_linear,
        "gradient_flops": unit,
        "cost_beyond_gradient": costs,
        "stages": {},
        "variance_gains": [],
    }
    states = fresh(seed + 100)
    for step in range(last + 1):
        if step == settings.late - settings.tracked:
            states = fresh(seed + 200)
        if step in curve_steps or step == settings.late:
            result["variance_gains"].append(gains(params, states, step))
        if at.get(step) in stages:
            result["stages"][at[step]] = measure(params, states, step)
            report_progress(name, at[step], result["stages"][at[step]])
        fresh_batch = next(stream)
        if step < settings.tracked or step >= settings.late - settings.tracked:
            for label, estimator in estimators.items():
                if estimator.learns_from:
                    seen = fresh_batch if estimator.learns_from == "training" else batch
                    states[label] = [
                        steps[label](params, seen, s)[3] for s in states[label]
                    ]
        params, opt_state = train_step(params, opt_state, fresh_batch)
    return result


def report_progress(name: str, stage: str, measured: dict[str, Any]) -> None:
    """Say what was measured."""
    line = ", ".join(
        f"{label} {row['relative_error']:.2f}"
        for label, row in measured["estimators"].items()
    )
    print(f"{name}, {stage} (loss {measured['loss']:.4f}): {line}", flush=True)


def machine() -> dict[str, Any]:
    """Say what a result was made on."""
    return {
        "platform": jax.default_backend(),
        "device_kind": jax.devices()[0].device_kind,
        "cpu_count": os.cpu_count(),
        "jax": jax.__version__,
        "optax": optax.__version__,
        "adahessian_jax": ah.__version__,
    }


def make_parser(
    description: str | None, nets: Iterable[str], quick: str
) -> argparse.ArgumentParser:
    """Make a parser of the options that benchmarks of these networks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default_out = Path(__file__).parent / "results"
    parser.add_argument("--out", type=Path, default=default_out, help="a directory")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--nets", nargs="+", choices=nets, metavar="NET")
    return parser


def main() -> None:
    """Run the benchmark from the command line."""
    parser = make_parser(__doc__, NETS, "two nets, few draws")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    args = parser.parse_args()
    settings = QUICK if args.quick else Settings()
    names = args.nets or (["tanh MLP", "ReLU CNN"] if args.quick else list(NETS))
    start = time.perf_counter()
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": settings._asdict() | {"quick": args.quick, "seed": args.seed},
        "nets": {},
    }
    for name in names:
        net_start = time.perf_counter()
        result["nets"][name] = measure_net(
            name, NETS[name], settings, args.stages, args.seed
        )
        result["nets"][name]["seconds"] = round(time.perf_counter() - net_start, 1)
    result["seconds"] = round(time.perf_counter() - start, 1)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "estimator_accuracy.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(write_report(path))


if __name__ == "__main__":
    main()
