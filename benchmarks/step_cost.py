# SPDX-License-Identifier: Apache-2.0
"""Measure what an optimizer step costs, as a multiple of an Adam step.

Needs jax, optax and matplotlib. One command per table::

    python benchmarks/step_cost.py --tables steps
    python benchmarks/step_cost.py --tables probes
    python benchmarks/step_cost.py --tables updates
    python benchmarks/step_cost.py --tables scaling

Peers in the first table need more::

    pip install python-somax==1.0.1
    python benchmarks/step_cost.py --tables steps --peers somax
    pip install torch==2.13.0 pytorch_optimizer
    python benchmarks/step_cost.py --tables steps --peers torch

Each run replaces what it measured in ``step_cost.json`` and writes ``step_cost.md`` and
``step_cost.png`` anew from all that is there. On CPU everything runs on one core and
one thread, and the clock is the CPU time of the process, which other processes disturb
least; on an accelerator it is the wall time of steps that are waited for.
"""

import argparse
import pathlib

import step_cost_report
import step_cost_timing

NETWORKS = ("MLP", "GPT", "ResNet-8", "ResNet-20")
TABLES = ("steps", "probes", "updates", "scaling")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES)
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=NETWORKS)
    parser.add_argument(
        "--peers", nargs="+", choices=("somax", "torch"), default=(), help="see above"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="STEP",
        help="time only these steps, named as in the table, and the baseline",
    )
    parser.add_argument(
        "--rounds", type=int, default=15, help="how often each step is timed"
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a check of a minute: 3 rounds, small sizes",
    )
    parser.add_argument(
        "--full", action="store_true", help="scale to 1e8 parameters (takes 8 GB)"
    )
    parser.add_argument(
        "--slow",
        action="store_true",
        help="on CPU, time steps with a ResNet's gradient inside a loop or branch too",
    )
    parser.add_argument(
        "--out",
        type=pathlib.Path,
        default=pathlib.Path(__file__).parent / "results",
        help="where results are written (default: %(default)s)",
    )
    return parser.parse_args()


def main() -> None:
    """Measure the tables that are asked for and write the results."""
    args = parse_arguments()
    if step_cost_timing.default_platform() == "cpu":
        step_cost_timing.pin_to_one_core()
    import step_cost_tables as tables

    results = step_cost_report.Results(args.out, step_cost_timing.machine())
    rounds = min(args.rounds, 3) if args.quick else args.rounds
    names = args.networks
    if args.quick and names == NETWORKS:
        names = ("MLP", "GPT")

    def save_to(table: str):
        return lambda rows: results.add(table, rows)

    if "steps" in args.tables:
        tables.steps(
            names,
            peers=args.peers,
            only=args.only,
            rounds=rounds,
            include_slow=args.slow,
            save=save_to("steps"),
        )
    if "probes" in args.tables:
        tables.probes(rounds=rounds, quick=args.quick, save=save_to("probes"))
    if "updates" in args.tables:
        tables.updates(rounds=rounds, quick=args.quick, save=save_to("updates"))
    if "scaling" in args.tables:
        tables.scaling(
            rounds=rounds, quick=args.quick, full=args.full, save=save_to("scaling")
        )
    step_cost_report.write(args.out)


if __name__ == "__main__":
    main()
