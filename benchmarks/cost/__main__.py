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
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax

from benchmarks.cost import report, timing
from benchmarks.cost.contenders import prepare, recipes, somax_recipe
from benchmarks.networks import NETWORKS, gpt, mlp

Cases = Iterator[tuple[str, dict[str, Any]]]
BASELINE = "optax.adam"


def steps(args: argparse.Namespace) -> Cases:
    """Compare whole steps on each network."""
    for name in args.networks:
        net = NETWORKS[name]()
        chosen = recipes(net)
        if "somax" in args.peers:
            chosen["somax"] = somax_recipe(net)
        contenders = []
        for label, recipe in chosen.items():
            peer = label.startswith(("optax sophia", "somax"))
            convolutions = name == "ResNet-20" if peer else name.startswith("ResNet")
            takes_minutes = convolutions and (peer or recipe.loops)
            fast = args.slow or not takes_minutes or jax.default_backend() != "cpu"
            if fast and (args.only is None or label in {BASELINE, *args.only}):
                print(f"{name}: compiling {label}", flush=True)
                contenders.append(prepare(label, recipe, net.params, net.batch))
        yield name, timing.compare(contenders, args.rounds)
        if "torch" in args.peers:
            from benchmarks.cost import torch_peers

            yield name, timing.compare(torch_peers.contenders(name), args.rounds)


def scaling(args: argparse.Namespace) -> Cases:
    """Compare steps by width of an MLP and depth of a GPT."""
    cases = {
        f"MLP, {784 * n + n**2 + 12 * n:.1e} parameters": partial(mlp, (784, n, n, 10))
        for n in [110, 290, 680, 1390, 2790] + [9600] * args.full
    }
    cases |= {f"GPT, {n} layer{'s'[: n > 1]}": partial(gpt, n) for n in (1, 2, 4, 8)}
    names = [BASELINE, "every step", "davda54, every 10", "Gauss-Newton"]
    for case, make in cases.items():
        net = make()
        chosen = {k: v for k, v in recipes(net).items() if k in names}
        contenders = [prepare(k, v, net.params, net.batch) for k, v in chosen.items()]
        yield case, timing.compare(contenders, args.rounds)


TABLES = {"steps": steps, "scaling": scaling}


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
    add("--full", action="store_true", help="scale to 1e8 parameters (takes 8 GB)")
    add("--slow", action="store_true", help="see what the tables say")
    add("--out", type=Path, default=Path(__file__).parent.parent / "results")
    return parser.parse_args()


def main() -> None:
    """Measure the tables that are asked for and write the results."""
    args = parse_arguments()
    if args.tables and timing.default_platform() == "cpu":
        timing.pin_to_one_core()
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "step_cost.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for table in args.tables:
        for case, rows in TABLES[table](args):
            print(f"{table}: {case}", flush=True)
            machine = timing.machine()
            if results.get(table, {}).get("machine") != machine:  # never mix machines
                results[table] = {"machine": machine, "cases": {}}
            found = results[table]["cases"].setdefault(case, {})
            if args.only and BASELINE in found:  # whose ratios the others have
                rows.pop(BASELINE, None)
            found.update(rows)
            path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    report.write(path)


if __name__ == "__main__":
    timing.keep_memory()
    main()
