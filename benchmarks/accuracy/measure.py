# SPDX-License-Identifier: Apache-2.0
"""Estimators beside the exact diagonals, and their variance in batches of any size."""

from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax

import adahessian_jax as ah
from benchmarks.accuracy.networks import LOSS, Net, Run


class Estimator(NamedTuple):
    """A transformation that estimates a diagonal, and which one."""

    transformation: optax.GradientTransformationExtraArgs
    target: str = "hessian"  # or "gauss_newton"
    learns_from: str = ""  # "training" or "one batch": what its state has seen
    draws: int = 1  # how many times as often it is drawn


LOW_RANK = ah.hutchinson(control_variate=ah.low_rank_control(8))
ESTIMATORS = {
    "optax hutchinson": Estimator(optax.contrib.hutchinson_estimator_diag_hessian()),
    "hutchinson": Estimator(ah.hutchinson()),
    "hutchinson normal": Estimator(ah.hutchinson(probe="normal")),
    "hutchinson n=4": Estimator(ah.hutchinson(4)),
    "low_rank_control": Estimator(LOW_RANK, learns_from="training"),
    "low_rank_control, one batch": Estimator(LOW_RANK, learns_from="one batch"),
    "gauss_newton_control": Estimator(
        ah.hutchinson(control_variate=ah.gauss_newton_control(LOSS))
    ),
    # Its error is held against a bound that it comes close to: draw it more often.
    "gauss_newton": Estimator(ah.gauss_newton(LOSS), "gauss_newton", draws=4),
    "gauss_newton n=4": Estimator(ah.gauss_newton(LOSS, n_samples=4), "gauss_newton"),
}


class Settings(NamedTuple):
    """How much is measured."""

    draws: int = 400
    large_draws: int = 120  # where only some coordinates are known
    early: int = 50  # steps
    late: int = 2000
    tracked: int = 400  # steps from which a stateful estimator has learnt, late
    n_states: int = 2  # independent states of each stateful estimator


def exact_diagonals(
    run: Run, params: Any, coordinates: np.ndarray
) -> dict[str, np.ndarray]:
    """Compute entries of the diagonals of the Hessian and the Gauss-Newton matrix.

    The Hessian in the logits is diag(p) - p p', so that an entry of the Gauss-Newton
    diagonal is the variance under p of the derivative of the logits.
    """
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    @jax.jit
    def entries(params: Any, batch: Any, index: jax.Array) -> jax.Array:
        unit = unravel(jnp.zeros_like(flat).at[index].set(1))
        column = ah.hvp(lambda p: run.loss(p, batch), params, unit)
        logits, tangent = jax.jvp(
            lambda p: run.predict(p, batch.inputs), (params,), (unit,)
        )
        p = jax.nn.softmax(logits)
        centred = tangent - jnp.sum(p * tangent, axis=-1, keepdims=True)
        variance = jnp.sum(p * jnp.square(centred), axis=-1)
        column, _ = jax.flatten_util.ravel_pytree(column)
        return jnp.stack([column[index], jnp.mean(variance)])

    found = np.array([entries(params, run.batch, i) for i in coordinates], float)
    return {"hessian": found[:, 0], "gauss_newton": found[:, 1]}


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
    step: Any, states: list[Any], keys: Any, *known: Any, where: Any = slice(None)
) -> np.ndarray:
    """Draw independent estimates, dividing the draws among the states."""
    chosen = [states[i % len(states)]._replace(key=k) for i, k in enumerate(keys)]
    return np.stack([np.asarray(step(*known, s)[0])[where] for s in chosen])


def errors(
    estimates: np.ndarray, exact: np.ndarray, weights: np.ndarray
) -> dict[str, float]:
    """Compare draws with the exact diagonal."""
    n, norm2 = len(estimates), float(weights @ exact**2)
    squared = (estimates - exact) ** 2 @ weights / norm2
    along = estimates @ (weights * exact) / norm2 - 1  # mean 0 if unbiased
    return {
        "relative_error": float(np.sqrt(squared.mean())),
        "relative_variance": float(squared.mean()),
        "relative_variance_se": float(squared.std(ddof=1) / np.sqrt(n)),
        "bias_overall_in_se": float(along.mean() / along.std(ddof=1) * np.sqrt(n)),
    }


def measure_net(net: Net, settings: Settings, seed: int) -> dict[str, Any]:
    """Train a network, stopping at each stage to measure the estimators."""
    run = Run(net, seed)
    coordinates, weights = choose_coordinates(run.params, net.n_coordinates, seed)
    n_draws = settings.large_draws if net.n_coordinates else settings.draws
    compiled = {k: run.compile(e.transformation) for k, e in ESTIMATORS.items()}

    def fresh_states(seed: int) -> dict[str, list[Any]]:
        keys = jax.random.split(jax.random.PRNGKey(seed), settings.n_states)
        first = {k: e.transformation.init(run.params) for k, e in ESTIMATORS.items()}
        return {k: [s._replace(key=key) for key in keys] for k, s in first.items()}

    def measure(params: Any, states: dict[str, list[Any]], step: int) -> dict[str, Any]:
        exact = exact_diagonals(run, params, coordinates)
        difference = np.linalg.norm(exact["hessian"] - exact["gauss_newton"])
        rows = {}
        for label, estimator in ESTIMATORS.items():
            key = jax.random.PRNGKey(seed + step)
            keys = jax.random.split(key, n_draws * estimator.draws)
            known = compiled[label][0], states[label], keys, params, run.batch
            d = draw(*known, where=coordinates)
            rows[label] = errors(d, exact[estimator.target], weights)
        return {
            "step": step,
            "loss": float(run.loss(params, run.batch)),
            "relative_difference_of_diagonals": float(
                difference / np.linalg.norm(exact["hessian"])
            ),
            "estimators": rows,
        }

    at = {0: "init", settings.early: "early", settings.late: "late"}
    result: dict[str, Any] = {
        "parameters": sum(x.size for x in jax.tree.leaves(run.params)),
        "coordinates": len(coordinates),
        "gradient_flops": run.gradient_flops,
        "cost_beyond_gradient": {k: flops - 1 for k, (_, flops) in compiled.items()},
        "stages": {},
    }
    learnt_late = settings.late - settings.tracked
    states = fresh_states(seed + 100)
    for step, params, fresh_batch in run.train(settings.late):
        if step == learnt_late:
            states = fresh_states(seed + 200)
        if step in at:
            result["stages"][at[step]] = measure(params, states, step)
        for label, estimator in ESTIMATORS.items():
            if estimator.learns_from and not settings.tracked <= step < learnt_late:
                seen = fresh_batch if estimator.learns_from == "training" else run.batch
                states[label] = [
                    compiled[label][0](params, seen, s)[1] for s in states[label]
                ]
    return result


CONTROLLED = ("hutchinson", "low_rank_control", "gauss_newton_control")
BATCH_SIZES = {
    "ReLU CNN": (128, 512),
    "large ReLU MLP": (128, 512),
    "large transformer": (8, 128),
}
LEARNT = 400  # steps from which the second of them has learnt


def measure_batch_size(
    net: Net, size: int, at: tuple[int, ...], draws: int, seed: int
) -> list[dict[str, Any]]:
    """Train with batches of one size; compare variances, over all parameters."""
    run = Run(net._replace(batch_size=size), seed)
    compiled = {k: run.compile(ESTIMATORS[k].transformation) for k in CONTROLLED}
    states = {k: ESTIMATORS[k].transformation.init(run.params) for k in CONTROLLED}
    rows = []
    for step, params, fresh_batch in run.train(max(at)):
        known = {}
        for label, (estimate, cost) in compiled.items():
            learns = bool(ESTIMATORS[label].learns_from)
            if step in at and not (learns and step > LEARNT):
                keys = jax.random.split(jax.random.PRNGKey(seed + step), draws)
                d = draw(estimate, [states[label]], keys, params, run.batch)
                squared = np.sum((d - d.mean(axis=0)) ** 2, axis=1, dtype=float)
                known[label] = {
                    "variance": float(squared.sum() / (draws - 1)),
                    "variance_se": float(squared.std(ddof=1) / np.sqrt(draws)),
                    "cost": float(cost),
                }
            if learns and step < LEARNT:
                states[label] = estimate(params, fresh_batch, states[label])[1]
        if known:
            loss = float(run.loss(params, run.batch))
            row = {"batch_size": size, "step": step, "loss": loss, "estimators": known}
            rows.append(row)
    return rows
