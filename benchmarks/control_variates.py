# SPDX-License-Identifier: Apache-2.0
"""Do control variates gain more on larger batches?

Networks of ``estimator_accuracy.py`` are trained by Adam with batches of several sizes.
At some steps each estimator is drawn many times on one batch of that size, and

- its gain is the variance of plain Hutchinson, added up over all parameters, divided by
  its own;
- its gain at equal cost is that of as many estimates as the same operations pay for, a
  loss and a gradient with each.

``low_rank_control`` learns from the first 400 batches of the training.

Run ``python benchmarks/control_variates.py``: half an hour on one core, some minutes
of compilation with ``--quick``. Networks can be run one by one (``--nets``). It needs
the ``demo`` extra.
"""

import json
import time
from typing import Any

import jax
import numpy as np
from estimator_accuracy import ESTIMATORS, compile_step, draw, machine, make_parser
from estimator_nets import NETS, Net, Objective, training

from adahessian_jax.demo.data import batches

Row = dict[str, Any]

LABELS = {  # of the estimators, and of the columns
    "low_rank_control": "`low_rank_control(8)`",
    "microbatched 8, low_rank_control": "on eight parts",
    "gauss_newton_control": "`gauss_newton_control`",
    "microbatched 8, gauss_newton_control": "on eight parts",
}
BATCH_SIZES = {
    "ReLU CNN": (128, 512),
    "large ReLU MLP": (128, 512),
    "large transformer": (8, 128),
}
LEARNT = 400  # steps
STEPS, QUICK_STEPS = (50, 400, 2000), (5, 10)


def measure_batch_size(
    net: Net, size: int, at: tuple[int, ...], n_draws: int, seed: int
) -> list[Row]:
    """Train with batches of one size, and compare the estimators at some steps."""
    examples = net.load()
    stream = batches(examples, size, seed=seed + 1)
    batch = next(batches(examples, size, seed=seed))
    params = net.model.init(jax.random.key(seed), batch.inputs)
    objective = Objective(net.model.apply)
    gradient = jax.jit(jax.value_and_grad(objective)).lower(params, batch).compile()
    unit = gradient.cost_analysis()["flops"]
    used = {label: ESTIMATORS[label] for label in ("hutchinson", *LABELS)}
    steps = {k: compile_step(objective, e, params, batch) for k, e in used.items()}
    states = {k: e.transformation.init(params) for k, e in used.items()}

    train_step, opt_state = training(net, objective, params)

    def variance(label: str, step: int) -> Row:
        keys = jax.random.split(jax.random.PRNGKey(seed + step), n_draws)
        d = draw(steps[label], params, batch, [states[label]], keys, slice(None))
        squared = np.sum((d - d.mean(axis=0)) ** 2, axis=1, dtype=float)
        return {
            "variance": float(squared.sum() / (n_draws - 1)),
            "variance_se": float(squared.std(ddof=1) / np.sqrt(n_draws)),
            "cost": float(steps[label].cost_analysis()["flops"] / unit),
        }

    rows = []
    for step in range(max(at) + 1):
        if step in at:
            loss = float(objective(params, batch))
            known = {
                label: variance(label, step)
                for label, estimator in used.items()
                if step <= LEARNT or not estimator.learns_from
            }
            rows.append(
                {"batch_size": size, "step": step, "loss": loss, "estimators": known}
            )
        fresh_batch = next(stream)
        for label, estimator in used.items():
            if estimator.learns_from and step < LEARNT:
                states[label] = steps[label](params, fresh_batch, states[label])[3]
        params, opt_state = train_step(params, opt_state, fresh_batch)
    return rows


def gain(plain: Row, ours: Row) -> tuple[float, float, float]:
    """Return the gain in variance, its standard error, and that at equal cost."""
    value = plain["variance"] / ours["variance"]
    spread = [row["variance_se"] / row["variance"] for row in (plain, ours)]
    return value, value * np.hypot(*spread), value * plain["cost"] / ours["cost"]


def table(result: Row) -> str:
    """Lay out the gains of all networks."""
    lines = [
        "# Control variates and the size of the batch",
        "",
        "Made by `python benchmarks/control_variates.py`: the variance of plain"
        " Hutchinson over that with a control variate, with one standard error, and in"
        " brackets the gain at equal cost of loss, gradient and estimate.",
        "",
        "| net | batch | step | " + " | ".join(LABELS.values()) + " |",
        "|---|" + "---:|" * (2 + len(LABELS)),
    ]
    for name, net in result.items():
        for row in net["rows"]:
            cells = [name, str(row["batch_size"]), str(row["step"])]
            known = row["estimators"]
            for label in LABELS:
                cell = ""
                if label in known:
                    value, error, equal = gain(known["hutchinson"], known[label])
                    cell = f"{value:.2f} ± {error:.2f} ({equal:.2f})"
                cells.append(cell)
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the benchmark from the command line."""
    args = make_parser(__doc__, BATCH_SIZES, "few steps and draws").parse_args()
    at, n_draws = (QUICK_STEPS, 5) if args.quick else (STEPS, 40)
    path = args.out / "control_variates.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    for name in args.nets or BATCH_SIZES:
        start = time.perf_counter()
        rows = []
        for size in BATCH_SIZES[name]:
            rows += measure_batch_size(NETS[name], size, at, n_draws, args.seed)
            print(name, size, f"{time.perf_counter() - start:.0f} s", flush=True)
        found[name] = {
            "machine": machine(),
            "seed": args.seed,
            "draws": n_draws,
            "seconds": round(time.perf_counter() - start, 1),
            "rows": rows,
        }
    args.out.mkdir(parents=True, exist_ok=True)
    result = {name: found[name] for name in BATCH_SIZES if name in found}
    path.write_text(json.dumps(result, indent=1) + "\n")
    text = table(result)
    path.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
