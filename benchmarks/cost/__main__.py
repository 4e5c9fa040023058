# SPDX-License-Identifier: Apache-2.0
"""Measure what an optimizer step costs, as a multiple of an Adam step.

    python -m benchmarks.cost --tables steps
    python -m benchmarks.cost --tables scaling

Peers in the first table need more::

    pip install python-somax==1.0.1
    python -m benchmarks.cost --tables steps --peers somax
    pip install torch==2.13.0 pytorch_optimizer
    python -m benchmarks.cost --tables steps --peers torch

Each run replaces what it measured in ``step_cost.json`` and writes ``step_cost.md`` and
``step_cost.png`` anew from all that is there; without tables it only does the latter.
On CPU everything runs on one core and one thread, and the clock is the CPU time of the
process, which other processes disturb least; on an accelerator it is the wall time of
steps that are waited for.
"""

import argparse
import json
from pathlib import Path

from benchmarks.cost import report, timing

NETWORKS = ["MLP", "GPT", "ResNet-8", "ResNet-20"]
TABLES = ["steps", "scaling"]


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--tables", nargs="*", choices=TABLES, default=TABLES)
    add("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    add("--peers", nargs="+", choices=("somax", "torch"), default=(), help="see above")
    add("--only", nargs="+", metavar="STEP", help="time these steps and the baseline")
    add("--rounds", type=int, default=15, help="how often each step is timed")
    add("--quick", action="store_true", help="some minutes: 3 rounds, small sizes")
    add("--full", action="store_true", help="scale to 1e8 parameters (takes 8 GB)")
    add("--slow", action="store_true", help="see what the tables say")
    add("--out", type=Path, default=Path(__file__).parent.parent / "results")
    return parser.parse_args()


def main() -> None:
    """Measure the tables that are asked for and write the results."""
    args = parse_arguments()
    if args.tables and timing.default_platform() == "cpu":
        timing.pin_to_one_core()
    from benchmarks.cost import tables  # imports JAX: after this process is pinned

    rounds = min(args.rounds, 3) if args.quick else args.rounds
    names = args.networks[:2] if args.quick else args.networks
    measured = {
        "steps": tables.steps(names, args.peers, args.only, rounds, args.slow),
        "scaling": tables.scaling(rounds, args.quick, args.full),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "step_cost.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for table in args.tables:
        for case, rows in measured[table]:
            print(f"{table}: {case}", flush=True)
            machine = timing.machine()
            if results.get(table, {}).get("machine") != machine:  # never mix machines
                results[table] = {"machine": machine, "cases": {}}
            results[table]["cases"].setdefault(case, {}).update(rows)
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    report.write(path)


if __name__ == "__main__":
    main()
