# SPDX-License-Identifier: Apache-2.0
"""Compare optimizers on a task: ``python -m benchmarks.training TASK``.

Learning rates are searched with seeds that are used for nothing else, then each
contender is run with others, at AdamW's number of steps and in AdamW's time. Writes a
JSON file and a table. With --only, what an earlier run under the same conditions found
of other contenders stays in the file, and so does its search of AdamW's rate. With
--searched all of its searches stay, and the runs are made again.
"""

import argparse
import json
import math
import os
from functools import partial
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.progress import track

from benchmarks.cost.timing import keep_memory
from benchmarks.training import protocol, report
from benchmarks.training.contenders import ALL, CONTENDERS
from benchmarks.training.published import PUBLISHED_TASKS
from benchmarks.training.tasks import TASKS as OWN_TASKS
from benchmarks.training.tasks import Task

TASKS = OWN_TASKS | PUBLISHED_TASKS
CONSOLE = Console()


def main() -> None:
    """Run the comparison that the command line asks for."""
    parser = make_parser()
    args = parser.parse_args()
    task = TASKS[args.task]()
    jax.config.update("jax_enable_x64", task.x64)
    own = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    result = {
        "task": args.task,
        "steps": args.steps or task.steps,
        "seeds": args.seeds,
        "first_seed": args.first_seed,
        "batch_size": task.batch_size,
        "evaluated": task.evaluated,
        "device": f"{jax.devices()[0].device_kind}, {len(own(0))} core(s)",
        "jax": jax.__version__,
    }
    path = args.out / f"{args.task}.json"
    others = {}
    if (args.only or args.searched) and path.exists():
        earlier = json.loads(path.read_text("utf-8"))
        others = earlier["contenders"]
        differing = [
            f"{key} is {earlier.get(key)} there and {value} here"
            for key, value in result.items()
            if earlier.get(key) != value
        ]
        if differing:
            what = f"{path} was made otherwise: {', '.join(differing)}"
            parser.error(f"{what}. Give another --out.")
    entries = others | compare(task, args, result["steps"], others)
    result["contenders"] = {name: entries[name] for name in ALL if name in entries}
    args.out.mkdir(parents=True, exist_ok=True)
    path.write_text(report.dumps(result), encoding="utf-8")
    path.with_suffix(".md").write_text(report.table(result), encoding="utf-8")
    CONSOLE.print(report.table(result), markup=False)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("task", choices=TASKS)
    names = "contenders, beside AdamW: " + ", ".join(map(repr, ALL))
    add("--only", nargs="+", choices=ALL, metavar="NAME", help=names)
    add("--seeds", type=int, default=5)
    add("--first-seed", type=int, default=0)
    add("--steps", type=int, help="of AdamW; by default the task's own")
    add("--rate", type=float, help="of all but AdamW, in place of a search")
    keep = "take the learning rates that an earlier run found"
    add("--searched", action="store_true", help=keep)
    add("--out", type=Path, default=report.RESULTS, help="a directory")
    return parser


def compare(
    task: Task, args: argparse.Namespace, steps: int, others: dict[str, Any]
) -> dict[str, Any]:
    """Search the rates of the contenders and run them, at equal steps and time."""
    chosen = {"AdamW", *(args.only or CONTENDERS)}  # all else is compared with it
    names = [n for n, contender in ALL.items() if n in chosen and contender.suits(task)]
    trains = {name: protocol.make_train(task, ALL[name]) for name in names}
    entries: dict[str, Any] = {}
    for name in track(names, "searching learning rates", console=CONSOLE):
        score = partial(protocol.tuning_loss, trains[name], task, steps)
        start = ALL[name].start
        fixed = start if ALL[name].own_rate else args.rate
        if fixed is not None and name != "AdamW":
            found = {fixed: score(fixed)}
        else:
            known = {}
            baseline = args.only and name not in args.only
            if name in others and (args.searched or baseline):
                known = {
                    float(rate): math.inf if loss is None else loss
                    for rate, loss in others[name]["search"].items()
                }
            found = protocol.search(score, start, known)
        entries[name] = {
            "search": {f"{rate:.4g}": loss for rate, loss in found.items()},
            "rate": protocol.best_rate(found),
            "width": protocol.good_width(found),
            "equal steps": [],
        }
        rate, loss = entries[name]["rate"], min(found.values())
        CONSOLE.print(f"{name}: {rate:.3g}, loss {loss:.4g}")
    seeds = range(args.first_seed, args.first_seed + args.seeds)
    # Interleaved, so that what else the machine does troubles all alike.
    for seed in track(seeds, "at equal steps", console=CONSOLE):
        for name, entry in entries.items():
            run = trains[name](entry["rate"], seed, steps)
            entry["equal steps"].append(run._asdict())
    least = {  # seconds of a step; a run that diverged was cut short
        name: min(run["seconds"] / run["steps"][-1] for run in entry["equal steps"])
        for name, entry in entries.items()
    }
    for name, entry in entries.items():
        entry |= {"equal time": [], "cost": least[name] / least["AdamW"]}
    for seed in track(seeds, "at equal time", console=CONSOLE):
        for name, entry in entries.items():
            affordable = max(protocol.RECORDS, math.floor(steps / entry["cost"]))
            run = trains[name](entry["rate"], seed, affordable)
            entry["equal time"].append(run._asdict())
    return entries


if __name__ == "__main__":
    keep_memory()
    main()
