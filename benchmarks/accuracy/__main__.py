# SPDX-License-Identifier: Apache-2.0
"""How accurate is each estimator of the Hessian's diagonal, and at what cost?

For small networks, at the start, early and late in training, the exact diagonals of
the Hessian and of the Gauss-Newton matrix are computed on one batch, and each estimator
is drawn many times on that batch. With --batch-sizes: how much less control variates
vary than plain Hutchinson, on networks that train with batches of several sizes.

Run ``python -m benchmarks.accuracy``: an hour on one core, half an hour with
--batch-sizes; without networks (--nets) it only writes the tables and the plot of
earlier results again.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

from benchmarks.accuracy import measure, report
from benchmarks.accuracy.networks import NETS
from benchmarks.cost.timing import machine


def errors(args: argparse.Namespace, path: Path) -> None:
    """Compare the estimators with the exact diagonals."""
    settings = measure.Settings()
    start = time.perf_counter()
    result: dict[str, Any] = {
        "machine": machine(),
        "settings": settings._asdict() | {"seed": args.seed},
        "nets": {},
    }
    for name in args.nets:
        found = measure.measure_net(NETS[name], settings, args.seed)
        result["nets"][name] = found
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    if result["nets"]:
        result["seconds"] = round(time.perf_counter() - start, 1)
        path.write_text(json.dumps(result, indent=1) + "\n", "utf-8")
    print(report.write(path))


def batch_sizes(args: argparse.Namespace, path: Path) -> None:
    """Compare control variates in batches of several sizes, added to what is there."""
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    how = {"seed": args.seed, "draws": 40}
    for name in [name for name in measure.BATCH_SIZES if name in args.nets]:
        rows = []
        for size in measure.BATCH_SIZES[name]:
            rows += measure.measure_batch_size(NETS[name], size, (50, 400, 2000), **how)
        results[name] = {"machine": machine(), **how, "rows": rows}
        path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    print(report.write_batch_sizes(path))


def main() -> None:
    """Run the benchmark from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path(__file__).parent.parent / "results")
    add("--seed", type=int, default=0)
    add("--nets", nargs="*", choices=NETS, metavar="NET", default=NETS)
    add("--batch-sizes", action="store_true", help="see above")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.batch_sizes:
        batch_sizes(args, args.out / "control_variates.json")
    else:
        errors(args, args.out / "estimator_accuracy.json")


if __name__ == "__main__":
    main()
