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
from importlib.metadata import version
from pathlib import Path

import jax

from benchmarks import networks
from benchmarks.ahead_of_time import programs, report

NETWORKS = networks.NETWORKS | {"GPT-2 small": networks.gpt2}
PLUGINS = {"tpu": "libtpu", "cuda": "jax-cuda12-pjrt"}


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("target", choices=programs.TARGETS)
    add("--networks", nargs="+", choices=NETWORKS, default=["MLP", "GPT", "ResNet-8"])
    steps = {"choices": programs.STEPS, "default": programs.STEPS, "metavar": "STEP"}
    add("--steps", nargs="+", **steps, help="beside Adam's; by default all")
    add("--ways", nargs="+", choices=programs.WAYS, help="by default all of them")
    add("--out", type=Path, default=Path(__file__).parent.parent / "results")
    return parser.parse_args()


def main() -> None:
    """Compile what is asked for and write the results."""
    args = parse_arguments()
    jax.config.update("jax_platforms", "cpu")  # no other is there
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / "ahead_of_time.json"
    results = json.loads(path.read_text("utf-8")) if path.exists() else {}
    devices = programs.devices_of(args.target)
    compiled_on = {"device": programs.TARGETS[args.target]}
    compiled_on |= {name: version(name) for name in ("jax", PLUGINS[args.target])}
    compiled_on |= {"on": platform.machine()}
    if results.get(args.target, {}).get("compiled") != compiled_on:  # never mixed
        results[args.target] = {"compiled": compiled_on, "networks": {}}
    for name in args.networks:
        net, large = NETWORKS[name](), name == "GPT-2 small"
        for way in args.ways or (programs.WAYS[-1:] if large else programs.WAYS):
            ways = results[args.target]["networks"].setdefault(name, {})
            rows = ways.setdefault(way, {})
            baseline = [s for s in programs.STEPS[:1] if s not in rows]
            for step in dict.fromkeys(baseline + list(args.steps)):
                print(f"{name}, {way}: {step}", flush=True)
                rows[step] = programs.measured(net, step, way, devices)
                ways[way] = rows = {k: rows[k] for k in programs.STEPS if k in rows}
                path.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    report.write(path)


if __name__ == "__main__":
    main()
