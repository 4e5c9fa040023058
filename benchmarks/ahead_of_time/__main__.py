# SPDX-License-Identifier: Apache-2.0
"""Compile whole training steps for accelerators that are not there.

    pip install -e '.[tpu]'
    python -m benchmarks.ahead_of_time tpu
    pip install -e '.[cuda]'
    python -m benchmarks.ahead_of_time cuda

Each extra wants an environment of its own. Nothing is run: the compiler says how many
operations, bytes and memory a step takes, and what devices exchange. Each network is
compiled for one device, and for eight with the batch dealt out (data parallel), the
optimizer's state too (state sharded), and the parameters as well (fully sharded). Each
run replaces what it compiled in ``ahead_of_time.json`` and writes ``ahead_of_time.md``
anew from all that is there. GPT-2 small, for a TPU and fully sharded only, takes a
minute or more for each step.
"""

import argparse
import json
import platform
from pathlib import Path
from typing import Any

from benchmarks.ahead_of_time import targets

NETWORKS = ("MLP", "GPT", "ResNet-8", "GPT-2 small")


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("target", choices=targets.NAMES)
    add("--networks", nargs="+", choices=NETWORKS, default=NETWORKS[:3])
    add("--steps", nargs="+", metavar="STEP", help="beside Adam's; by default all")
    add("--ways", nargs="+", choices=targets.WAYS, help="by default all of them")
    add("--out", type=Path, default=Path(__file__).parent.parent / "results")
    return parser.parse_args()


def main() -> None:
    """Compile what is asked for and write the results."""
    args = parse_arguments()
    targets.prepare()
    from benchmarks import networks  # imports JAX: after the environment is set
    from benchmarks.ahead_of_time import programs, report

    if unknown := set(args.steps or ()) - set(programs.STEPS):
        raise SystemExit(f"--steps: no {sorted(unknown)} among {programs.STEPS}.")
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "ahead_of_time.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    devices = targets.devices(args.target)
    compiled_on = {"device": targets.NAMES[args.target], **_versions(args.target)}
    if results.get(args.target, {}).get("compiled") != compiled_on:  # never mixed
        results[args.target] = {"compiled": compiled_on, "networks": {}}
    for name in args.networks:
        large = name == "GPT-2 small"
        net = networks.gpt2() if large else networks.NETWORKS[name]()
        for way in args.ways or (targets.WAYS[-1:] if large else targets.WAYS):
            ways = results[args.target]["networks"].setdefault(name, {})
            rows = ways.setdefault(way, {})
            baseline = [s for s in programs.STEPS[:1] if s not in rows]
            for step in dict.fromkeys(baseline + list(args.steps or programs.STEPS)):
                print(f"{name}, {way}: {step}", flush=True)
                rows[step] = programs.measured(net, step, way, devices)
                path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    report.write(path)


def _versions(target: str) -> dict[str, Any]:
    from importlib.metadata import version

    plugin = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}[target]
    packages = {name: version(name) for name in ("jax", plugin)}
    return {**packages, "on": platform.machine()}


if __name__ == "__main__":
    main()
