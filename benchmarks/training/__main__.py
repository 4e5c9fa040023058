# SPDX-License-Identifier: Apache-2.0
"""Compare optimizers on a task: ``python -m benchmarks.training TASK``.

Learning rates are searched with seeds that are used for nothing else, then each
contender is run with others, at AdamW's number of steps and in AdamW's time. Writes a
JSON file, a table and a plot. With --only, what an earlier run under the same
conditions found of other contenders stays in the file, and so does its search of
AdamW's rate.
"""

import argparse
import inspect
import json
import math
import os
from pathlib import Path

import jax
from rich.console import Console
from rich.progress import track

from benchmarks.training import protocol, report
from benchmarks.training.contenders import CONTENDERS, VARIANTS
from benchmarks.training.tasks import TASKS

ALL = CONTENDERS | VARIANTS


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("task", choices=TASKS)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ALL,
        metavar="NAME",
        help="contenders, beside AdamW: " + ", ".join(map(repr, ALL)),
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="of AdamW; by default the task's own")
    parser.add_argument("--batch-size", type=int, help="by default the task's own")
    parser.add_argument(
        "--depth",
        type=int,
        default=1,
        help="so many of each hidden layer: transformer, autoencoder and diamonds",
    )
    parser.add_argument(
        "--evaluated", type=int, help="examples of a loss; by default the task's own"
    )
    parser.add_argument(
        "--rate", type=float, help="of all but AdamW, in place of a search"
    )
    parser.add_argument(
        "--reach",
        type=int,
        default=1,
        help="try learning rates so many half decades to either side at least; with"
        " more than 1, plot the losses of all rates",
    )
    out = Path(__file__).parent.parent / "results" / "training"
    parser.add_argument("--out", type=Path, default=out, help="a directory")
    args = parser.parse_args()
    console = Console()
    make_task = TASKS[args.task]
    if args.depth == 1:
        task = make_task()
    elif "depth" in inspect.signature(make_task).parameters:
        task = make_task(depth=args.depth)
    else:
        parser.error(f"argument --depth: {args.task} has one depth only")
    if args.batch_size is not None:
        if task.batch_size is None:
            parser.error(f"argument --batch-size: {args.task} has one batch of all")
        task = task._replace(batch_size=args.batch_size)
    if args.evaluated is not None:
        task = task._replace(evaluated=args.evaluated)
    steps = args.steps or task.steps
    names = [  # AdamW is always there: all else is compared with it
        name
        for name, contender in ALL.items()
        if contender.suits(task)
        and (name in (args.only or CONTENDERS) or name == "AdamW")
    ]
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    result = {
        "task": args.task,
        "steps": steps,
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "batch_size": task.batch_size,
        "depth": args.depth,
        "evaluated": task.evaluated,
        "device": f"{jax.devices()[0].device_kind}, {n_cores()} core(s)",
        "jax": jax.__version__,
        "contenders": {},
    }
    path = args.out / f"{args.task}.json"
    others = {}
    if args.only and path.exists():
        try:
            others = report.others(json.loads(path.read_text("utf-8")), result)
        except ValueError as error:
            parser.error(f"{path} was made otherwise: {error}. Give another --out.")
    trains = {name: protocol.make_train(task, ALL[name]) for name in names}
    for name in track(names, "searching learning rates", console=console):
        start = ALL[name].start

        def score(rate: float, train: protocol.Train = trains[name]) -> float:
            return protocol.tuning_loss(train, task, rate, steps)

        fixed = start if ALL[name].own_rate else args.rate
        if fixed is not None and name != "AdamW":
            found = {fixed: score(fixed)}
        else:
            known = {}
            if name in others and name not in args.only:  # AdamW, as the baseline
                known = report.rates_tried(others[name])
            found = protocol.search(score, start, reach=args.reach, known=known)
        result["contenders"][name] = {
            "search": {f"{rate:.4g}": loss for rate, loss in found.items()},
            "rate": protocol.best_rate(found),
            "width": protocol.good_width(found),
        }
        rate = result["contenders"][name]["rate"]
        console.print(f"{name}: {rate:.3g}, loss {min(found.values()):.4g}")
    # Interleaved, so that what else the machine does troubles all alike.
    for seed in track(seeds, "at equal steps", console=console):
        for name in names:
            found = result["contenders"][name]
            run = trains[name](found["rate"], seed, steps)
            found.setdefault("equal steps", []).append(run._asdict())
    least = {  # seconds of a step; a run that diverged was cut short
        name: min(run["seconds"] / run["steps"][-1] for run in found["equal steps"])
        for name, found in result["contenders"].items()
    }
    for seed in track(seeds, "at equal time", console=console):
        for name in names:
            found = result["contenders"][name]
            found["cost"] = least[name] / least["AdamW"]
            affordable = max(protocol.RECORDS, math.floor(steps / found["cost"]))
            run = trains[name](found["rate"], seed, affordable)
            found.setdefault("equal time", []).append(run._asdict())
    found = others | result["contenders"]
    result["contenders"] = {name: found[name] for name in ALL if name in found}
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(report.dumps(result), encoding="utf-8")
    path.with_suffix(".md").write_text(report.table(result), encoding="utf-8")
    report.plot(result, path.with_suffix(".png"))
    if args.reach > 1:
        entries = {name: result["contenders"][name] for name in names}
        report.plot_rates(entries, path.with_name(f"{args.task}_rates.png"))
    console.print(report.table(result), markup=False)


def n_cores() -> int:
    """Return how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


if __name__ == "__main__":
    main()
