# SPDX-License-Identifier: Apache-2.0
"""Tables and a plot of what steps cost."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from benchmarks.tables import markdown

CONTENDERS = {  # name: what it is
    "optax.adam": "Adam, the baseline of all below but torch's",
    "every step": "`adahessian`, one pass by `value_and_grad_with_curvature`",
    "every step, obj_fn": "`adahessian`, `tx.update(..., obj_fn=f)`",
    "every 10": "refresh every 10 steps, chosen on the host (two compiled steps)",
    "paper": "`published.paper`, averaging where there are convolutions",
    "davda54, every 10": "`published.davda54(update_each=10)`, chosen on the host",
    "davda54, every 10, cond": "the same, by `jax.lax.cond`",
    "zack_dugue": "`published.zack_dugue(control_variate=True)`",
    "4 probes": "`hutchinson(4)`, every step",
    "Gauss-Newton": "`gauss_newton`, every step",
    "Gauss-Newton, every 10": "`gauss_newton`, every 10 steps, chosen on the host",
    "soap": "`soap(learning_rate)`, of the gradient alone",
    "newton": "`newton(learning_rate, loss)`, every 20, chosen on the host",
    "newton, own rate": "the same of `newton(None, loss)`, by the whole batch",
    "optax sophia": "`optax.contrib.sophia`, `update_interval=1`",
    "optax sophia, every 10": "`optax.contrib.sophia`, `update_interval=10`",
    "somax": "python-somax 1.0.1, `adahessian`, every step",
    "torch.optim.Adam": "the baseline of the two below",
    "pytorch_optimizer": "`AdaHessian`, every step",
    "pytorch_optimizer, every 10": "`AdaHessian(update_period=10)`",
}
PEERS = ("optax sophia", "somax", "pytorch_optimizer")
STEPS = """## Steps

Ratio to the same network's Adam step: time / FLOPs / peak temporary memory.
All steps are run in turn; the time is the median over 7 to 15 rounds, or as
many as stand beside it, each step having run once untimed in its turn, as in
a training loop.
FLOPs and memory are the compiler's. FLOPs are left out where a step has a
loop or a branch, because the compiler counts the body of a loop once and the
dearer side of a branch, and for torch.
"""
AFTER_STEPS = """A dash: not measured. On CPU, XLA does not optimise convolutions
inside a branch or a loop, and a ResNet's gradient there takes 17 to 24 times as
long; `--slow` measures those steps too.
"""


def write(path: Path) -> None:
    """Write the tables and the plot beside the results in JSON."""
    results = json.loads(path.read_text("utf-8"))
    parts = ["# What a step costs\n"]
    for name, make in (("steps", steps), ("scaling", scaling)):
        if name in results:
            machine = results[name]["machine"].items()
            described = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in machine)
            parts += [make(results[name]["cases"]), f"Measured on: {described}.\n"]
    path.with_suffix(".md").write_text("\n".join(parts), "utf-8")
    if "steps" in results:
        plot(results["steps"]["cases"], path.with_suffix(".png"))


def steps(cases: dict[str, Any]) -> str:
    """Lay out whole steps, and say what each is."""
    measured = {
        k: v for k, v in CONTENDERS.items() if any(k in c for c in cases.values())
    }
    frame = pd.DataFrame({k: pd.Series(c).map(_triple) for k, c in cases.items()})
    notes = [f"- {name}: {text}.\n" for name, text in measured.items()]
    table = markdown(frame.reindex(measured).fillna("-"))
    return "\n".join([STEPS, table, "".join(notes), AFTER_STEPS])


def scaling(cases: dict[str, Any]) -> str:
    """Lay out steps by size."""
    frame = pd.DataFrame(cases).T.map(_triple, na_action="ignore").fillna("-")
    ms = {case: f"{rows['optax.adam']['ms']:.2f}" for case, rows in cases.items()}
    frame["optax.adam"] = pd.Series(ms)
    table = markdown(frame.rename(columns={"optax.adam": "Adam, ms"}))
    return f"## Scaling\n\nRatio to the Adam step, as in the first table.\n\n{table}"


def _triple(row: dict[str, Any]) -> str:
    costs = [row["ratio"], row.get("flops_ratio"), row.get("memory_ratio")]
    parts = ["-" if x is None else f"{x:.2f}" if x < 10 else f"{x:.0f}" for x in costs]
    few = f" ({row['rounds']} rounds)" if row["rounds"] < 7 else ""
    return " / ".join(parts).removesuffix(" / -").removesuffix(" / -") + few


def plot(cases: dict[str, Any], path: Path) -> None:
    """Draw the time ratios as bars, a panel for each network."""
    ours, peers = "adahessian_jax", "others"
    frame = pd.DataFrame(
        [
            (network, name, row["ratio"], peers if name.startswith(PEERS) else ours)
            for network, rows in cases.items()
            for name, row in rows.items()
            if name in CONTENDERS and name not in ("optax.adam", "torch.optim.Adam")
        ],
        columns=["network", "step", "ratio", "whose"],
    )
    order = [name for name in CONTENDERS if name in set(frame["step"])]
    height = 0.8 + 0.32 * len(order)
    grid = sns.catplot(
        frame,
        kind="bar",
        x="ratio",
        y="step",
        hue="whose",
        col="network",
        order=order,
        hue_order=[ours, peers],
        palette=["#1f6feb", "#9aa0a6"],
        dodge=False,
        legend_out=False,
        height=height,
        aspect=(2 + 3.2 / len(cases)) / height,
    )
    longest = 2.2 * frame["ratio"].max()
    grid.set(xscale="log", xticks=(1, 2, 5, 10, 20, 50), xlim=(0.9, longest))
    for ax in grid.axes.flat:
        ax.axvline(1, color="black", linewidth=0.8)
        for bars in ax.containers:
            ax.bar_label(bars, fmt="{:.3g}", padding=2, fontsize=8)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    grid.set_titles("{col_name}")
    grid.set_axis_labels("", "")
    grid.figure.supxlabel("time of a step, in steps of Adam", fontsize=10)
    sns.move_legend(grid, "lower left", title=None, frameon=False)
    grid.savefig(path, dpi=150)
    plt.close(grid.figure)
