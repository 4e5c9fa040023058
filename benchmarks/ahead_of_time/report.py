# SPDX-License-Identifier: Apache-2.0
"""Tables of what compilers say of steps."""

import json
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.tables import markdown

_BASELINE = "optax.adam"
_HEAD = """# Steps compiled for accelerators

Compiled, not run, for devices that were not there. FLOPs / bytes accessed / memory are
those of one device, beside the same network's Adam step laid out in the same way:
memory is what parameters, state, batch and temporaries take together. A loop's body is
counted once, and of a branch the dearer side, so that `newton` and `soap` are counted
as if their axes turned on every step. What is exchanged is given as the number of
collectives and the megabytes of their results: summed (all-reduce, reduce-scatter), or
moved (all-gather, all-to-all, permutations); in loops and branches each is counted
once. The last column is the processor's time to compile, beside Adam's. For a GPU the
compiler says neither FLOPs nor bytes: -.
"""


def write(path: Path) -> None:
    """Write the tables beside the results in JSON."""
    parts = [_HEAD]
    for result in json.loads(path.read_text("utf-8")).values():
        compiled = dict(result["compiled"])
        device, machine = compiled.pop("device"), compiled.pop("on")
        versions = ", ".join(f"{k} {v}" for k, v in compiled.items())
        parts.append(f"## {device}\n\nBy {versions}, on {machine}.\n")
        for network, ways in result["networks"].items():
            for way, rows in ways.items():
                parts.append(f"### {network}, {way}\n\n{markdown(table(rows))}")
    path.with_suffix(".md").write_text("\n".join(parts), "utf-8")


def table(rows: dict[str, Any]) -> pd.DataFrame:
    """Lay out the steps of one network, laid out in one way, beside Adam's."""
    adam = rows[_BASELINE]
    return pd.DataFrame(
        {
            "FLOPs / bytes / memory": {k: _costs(r, adam) for k, r in rows.items()},
            "summed": {k: _exchanged(r, True) for k, r in rows.items()},
            "moved": {k: _exchanged(r, False) for k, r in rows.items()},
            "compile": {
                k: f"{r['seconds']['compile'] / adam['seconds']['compile']:.1f}"
                for k, r in rows.items()
            },
        }
    )


def _costs(row: dict[str, Any], adam: dict[str, Any]) -> str:
    if row is adam:
        flops = "-" if row["flops"] is None else f"{row['flops'] / 1e9:.2f} G"
        accessed = "-" if row["bytes"] is None else f"{row['bytes'] / 1e6:.0f} MB"
        return f"{flops} / {accessed} / {row['memory'] / 1e6:.1f} MB"
    ratios = ((row[k], adam[k]) for k in ("flops", "bytes", "memory"))
    return " / ".join("-" if None in r else f"{r[0] / r[1]:.2f}" for r in ratios)


def _exchanged(row: dict[str, Any], summed: bool) -> str:
    kinds = ("all-reduce", "reduce-scatter")
    chosen = [v for k, v in row["exchanged"].items() if (k in kinds) == summed]
    if not chosen:
        return "-"
    number, megabytes = (sum(v[k] for v in chosen) for k in ("number", "megabytes"))
    return f"{number}: {megabytes:.2f} MB"
