# SPDX-License-Identifier: Apache-2.0
"""JSON, Markdown and a plot of the step-cost benchmark."""

import json
import pathlib
from typing import Any

TARGETS = {  # at most so many times the baseline, by contender and network
    "every step": {"MLP": 2.7, "GPT": 2.7, "ResNet-8": 2.9},
    "4 probes": {"MLP": 6.0, "GPT": 6.2, "ResNet-8": 7.2},
    "every 10": {"MLP": 1.08, "GPT": 1.15, "ResNet-8": 1.17},
    "every 10, no reuse": {"MLP": 1.08, "GPT": 1.15, "ResNet-8": 1.17},
    "Gauss-Newton": {"MLP": 1.75, "GPT": 1.75, "ResNet-8": 1.85},
    "every 10, quarter batch": {"MLP": 1.06, "GPT": 1.06, "ResNet-8": 1.08},
    "every 10, quarter batch, no reuse": {"MLP": 1.06, "GPT": 1.06, "ResNet-8": 1.08},
}
CONV_AVERAGE_TARGET = 1.3

CONTENDERS = {  # name: what it is
    "optax.adam": "Adam, the baseline of all below but torch's",
    "every step": "adahessian, one pass by `value_and_grad_with_curvature`",
    "every step, obj_fn": "adahessian, `tx.update(..., obj_fn=f)`",
    "every 10": "refresh every 10 steps, chosen on the host (two compiled steps)",
    "every 10, no reuse": "the same with `reuse_estimate=False`, as in optax's sophia",
    "every 10, cond": "refresh every 10 steps, by `jax.lax.cond`",
    "every 10, quarter batch": "chosen on the host, estimates from a quarter batch",
    "every 10, quarter batch, no reuse": "the same with `reuse_estimate=False`",
    "4 probes": "`hutchinson(4)`, every step",
    "4 probes, scan": "one probe with the gradient, three more in `jax.lax.scan`",
    "Gauss-Newton": "`gauss_newton`, every step",
    "Gauss-Newton, every 10": "`gauss_newton`, every 10 steps, chosen on the host",
    "eigenbasis, every 20": "`gauss_newton` `in_eigenbasis`, chosen on the host",
    "optax sophia": "`optax.contrib.sophia`, `update_interval=1`",
    "optax sophia, every 10": "`optax.contrib.sophia`, `update_interval=10`",
    "somax": "python-somax 1.0.1, `adahessian`, every step",
    "torch.optim.Adam": "the baseline of the two below",
    "pytorch_optimizer": "`AdaHessian`, every step",
    "pytorch_optimizer, every 10": "`AdaHessian(update_period=10)`",
}


class Results:
    """Results of all tables in one JSON file, kept up to date as they come in."""

    def __init__(self, folder: pathlib.Path, machine: dict[str, Any]) -> None:
        """Read what an earlier run left in the folder."""
        self._path = folder / "step_cost.json"
        self._machine = machine
        self.tables: dict[str, Any] = {}
        if self._path.exists():
            self.tables = json.loads(self._path.read_text())
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, table: str, rows: dict[str, Any]) -> None:
        """Replace the rows that were measured anew, and write the file."""
        entry = self.tables.setdefault(table, {"machine": {}, "cases": {}})
        if entry["machine"] != self._machine:  # never mix machines in one table
            entry.update(machine=self._machine, cases={})
        for case, new in rows.items():
            entry["cases"].setdefault(case, {}).update(new)
        self._path.write_text(json.dumps(self.tables, indent=1) + "\n")


def write(folder: pathlib.Path) -> None:
    """Make the Markdown tables and the plot from the JSON file."""
    tables = json.loads((folder / "step_cost.json").read_text())
    parts = ["# What a step costs", ""]
    writers = {
        "steps": _steps,
        "probes": _probes,
        "updates": _updates,
        "scaling": _scaling,
    }
    for name, writer in writers.items():
        if name in tables:
            parts += writer(tables[name]["cases"])
            parts += ["", f"Measured on: {_describe(tables[name]['machine'])}.", ""]
    (folder / "step_cost.md").write_text("\n".join(parts))
    if "steps" in tables:
        plot(tables["steps"]["cases"], folder / "step_cost.png")


def _steps(cases: dict[str, Any]) -> list[str]:
    lines = [
        "## Steps",
        "",
        "Ratio to the same network's Adam step: time / FLOPs / peak temporary memory.",
        "All steps are run in turn, in several rounds; the time is the median over",
        "rounds, each step having run once untimed in its turn, as in a training loop.",
        "FLOPs and memory are the compiler's. FLOPs are left out where a step has a",
        "loop or a branch, because the compiler counts the body of a loop once and the",
        "dearer side of a branch, and for torch.",
        "",
        *_table(
            ["step", *cases],
            [
                [name, *[_triple(rows.get(name)) for rows in cases.values()]]
                for name in CONTENDERS
                if any(name in rows for rows in cases.values())
            ],
        ),
        "",
        *[f"- {name}: {text}." for name, text in CONTENDERS.items()],
        "",
        "A dash: not measured. On CPU, XLA does not optimise convolutions inside a",
        "branch or a loop, and a ResNet's gradient there takes 17 to 24 times as long;",
        "`--slow` measures those steps too.",
        "",
        "### Targets",
        "",
        "The last column is the ratio of the first step in each turn to the baseline's",
        "first, which find caches and memory allocator as other programs left them.",
        "",
    ]
    rows = []
    for name, targets in TARGETS.items():
        for network, target in targets.items():
            row = cases.get(network, {}).get(name)
            if row is not None:
                low, high = row["quartiles"]
                met = "met" if row["ratio"] <= target else "missed"
                measured = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
                first = f"{row['first_ratio']:.2f}" if row["first_ratio"] else "-"
                rows.append([name, network, f"{target}", measured, met, first])
    headings = [
        "step",
        "network",
        "time at most",
        "measured (quartiles)",
        "",
        "first step",
    ]
    return lines + _table(headings, rows)


def _triple(row: dict[str, Any] | None) -> str:
    if row is None:
        return "-"
    time = row["ratio"]
    few = f" ({row['rounds']} rounds)" if row["rounds"] < 10 else ""
    parts = [f"{time:.2f}" if time < 10 else f"{time:.0f}"]
    for cost in ("flops_ratio", "memory_ratio"):
        value = row.get(cost)
        parts.append("-" if value is None else f"{value:.2f}")
    while parts[-1] == "-":
        parts.pop()
    return " / ".join(parts) + few


def _probes(cases: dict[str, Any]) -> list[str]:
    names = list(next(iter(cases.values())))
    rows = [
        [case, *[f"{rows[name]['ns_per_element']:.2f}" for name in names]]
        for case, rows in cases.items()
    ]
    title = ["## Probes", "", "Nanoseconds per element, trees of 8 leaves.", ""]
    return title + _table(["elements", *names], rows)


def _updates(cases: dict[str, Any]) -> list[str]:
    rows = []
    for case, entries in cases.items():
        for name, row in entries.items():
            low, high = row["quartiles"]
            ratio = f"{row['ratio']:.2f} ({low:.2f} to {high:.2f})"
            rows.append([case, name, f"{row['ms']:.2f}", ratio])
    return [
        "## The update alone",
        "",
        "`tx.update` with `hessian_diag` given and donated state; the ratio is to the",
        "first row of each group. The target for the averages over convolution kernels",
        f"is at most {CONV_AVERAGE_TARGET}.",
        "",
        *_table(["parameters", "update", "ms", "ratio (quartiles)"], rows),
    ]


def _scaling(cases: dict[str, Any]) -> list[str]:
    names = list(next(iter(cases.values())))
    rows = [
        [case, f"{rows[names[0]]['ms']:.2f}", *[_triple(rows[n]) for n in names[1:]]]
        for case, rows in cases.items()
    ]
    text = ["## Scaling", "", "Ratio to the Adam step, as in the first table.", ""]
    return text + _table(["network", "Adam, ms", *names[1:]], rows)


def _table(headings: list[str], rows: list[list[str]]) -> list[str]:
    lines = [headings, ["---"] * len(headings), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def _describe(machine: dict[str, Any]) -> str:
    return ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in machine.items())


def plot(cases: dict[str, Any], path: pathlib.Path) -> None:
    """Draw the time ratios as bars, a panel per network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    left_out = {"optax.adam", "torch.optim.Adam"}
    names = [
        name
        for name in CONTENDERS
        if name not in left_out and any(name in rows for rows in cases.values())
    ]
    peers = ("optax sophia", "somax", "pytorch_optimizer")
    colors = ["#9aa0a6" if name.startswith(peers) else "#1f6feb" for name in names]
    figure, axes = plt.subplots(
        1,
        len(cases),
        figsize=(2.6 + 2.1 * len(cases), 0.8 + 0.3 * len(names)),
        sharey=True,
        layout="constrained",
        squeeze=False,
    )
    longest = max(
        rows[name]["ratio"] for rows in cases.values() for name in names if name in rows
    )
    for ax, (network, rows) in zip(axes[0], cases.items(), strict=True):
        for y, (name, color) in enumerate(zip(names, colors, strict=True)):
            if name not in rows:
                ax.text(1.06, y, "not measured", va="center", fontsize=8, color="#777")
                continue
            ratio = rows[name]["ratio"]
            ax.barh(y, ratio - 1, left=1, height=0.72, color=color)
            text = f"{ratio:.2f}" if ratio < 10 else f"{ratio:.0f}"
            ax.text(max(ratio, 1) * 1.06, y, text, va="center", fontsize=9)
        ax.set_xscale("log")
        ax.set_xlim(1, longest * 2.2)
        ticks = [t for t in (1, 2, 5, 10, 20, 50, 100) if t <= longest * 1.1]
        ax.set_xticks(ticks, [f"{t}" for t in ticks])
        ax.minorticks_off()
        ax.set_title(network, fontsize=11)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_yticks(range(len(names)), names, fontsize=10)
    axes[0, 0].invert_yaxis()
    figure.supxlabel(
        "time of a step, in steps of Adam (blue: adahessian_jax, grey: peers)",
        fontsize=10,
    )
    figure.savefig(path, dpi=150)
    plt.close(figure)
