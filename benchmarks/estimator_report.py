# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of the estimators' accuracy, from the benchmark's JSON file.

``python benchmarks/estimator_report.py FILE`` makes them again without measuring.
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, NullFormatter

PEER = "optax hutchinson"
PEER_LABEL = "optax's Hutchinson"
IN_PARTS = "microbatched 8, "
Result = dict[str, Any]
Values = dict[str, float]
Measure = Callable[[Result, Result], float]  # of a net and its estimators


def write_report(path: Path) -> str:
    """Write the tables and the figure beside the JSON file; return the summary."""
    result = json.loads(path.read_text())
    summary = _summary(result)
    tables = [_net_table(name, net) for name, net in result["nets"].items()]
    learning = _learning_table(result)
    text = "\n\n".join([_heading(result), summary, *tables, learning])
    path.with_suffix(".md").write_text(text + "\n")
    _plot(result, path.with_suffix(".png"))
    return summary


def _heading(result: Result) -> str:
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(
        f"{name} {machine[name]}" for name in ("jax", "optax", "adahessian_jax")
    )
    spread = [
        row["relative_variance_se"] / row["relative_variance"] / 2
        for net in result["nets"].values()
        for measured in net["stages"].values()
        for row in measured["estimators"].values()
    ]
    return (
        "# Accuracy and cost of the estimators\n\n"
        f"Made by `python benchmarks/estimator_accuracy.py"
        f"{' --quick' if settings['quick'] else ''}` in {result['seconds']:.0f} s on"
        f" {machine['device_kind']} ({machine['cpu_count']} cores), {versions}, seed"
        f" {settings['seed']}. `early` is {settings['early']} steps of Adam, `late`"
        f" {settings['late']}; {settings['draws']} draws of each estimator on one batch"
        f" ({settings['large_draws']} for the large networks, where errors are"
        " estimated from random entries, as many from each tensor).\n\n"
        "Relative error is the root mean square of ‖d - t‖ / ‖t‖, where t is the exact"
        " diagonal that the estimator is an unbiased estimate of: that of the Hessian,"
        " or of the Gauss-Newton matrix for `gauss_newton`. Cost is in gradients: the"
        " operations of loss, gradient and estimate in one compiled function, divided"
        " by those of loss and gradient, less 1. Variance is the relative error"
        " squared. The standard error of the relative errors is"
        f" {100 * sorted(spread)[len(spread) // 2]:.0f}% in the median and"
        f" {100 * max(spread):.0f}% at most."
    )


class _Summary:
    """Rows of the summary: a figure beside what it should be."""

    def __init__(self) -> None:
        self.lines = [
            "## Summary",
            "",
            "| | target | worst | where | all |",
            "|---|---|---|---|---|",
        ]

    def add(
        self, label: str, target: float, values: Values, *, at_least: bool = True
    ) -> None:
        """Add a row, unless nothing of the kind was measured."""
        if not values:
            return
        sign, worst_of = ("≥", min) if at_least else ("≤", max)
        worst = worst_of(values, key=lambda name: values[name])
        value = values[worst]
        good = value >= target if at_least else value <= target
        listed = "; ".join(f"{name} {v:.3g}" for name, v in values.items())
        if len(values) > 6:
            listed = f"{min(values.values()):.3g} to {max(values.values()):.3g}"
        cells = [label, f"{sign} {target:g}", f"{value:.3g}", worst, listed]
        if not good:
            cells[2] += " (missed)"
        self.lines.append("| " + " | ".join(cells) + " |")


def _summary(result: Result) -> str:
    nets = result["nets"]
    summary = _Summary()

    def over(function: Measure, *, relu: bool = False, kind: str = "") -> Values:
        return {
            f"{name}, {stage}": function(net, measured["estimators"])
            for name, net in nets.items()
            for stage, measured in net["stages"].items()
            if kind in name and (net["piecewise_linear"] or not relu)
        }

    def at(stage: str, function: Measure, *, relu: bool = False) -> Values:
        suffix = f", {stage}"
        cells = over(function, relu=relu).items()
        return {k.removesuffix(suffix): v for k, v in cells if k.endswith(suffix)}

    error = "`gauss_newton()`: relative error"
    summary.add(
        error,
        1.45,
        over(lambda net, rows: rows["gauss_newton"]["relative_error"]),
        at_least=False,
    )
    summary.add(
        f"{error} against the Hessian's diagonal, ReLU nets",
        1.45,
        over(
            lambda net, rows: rows["gauss_newton"]["relative_error_to_hessian"],
            relu=True,
        ),
        at_least=False,
    )
    summary.add(
        "`gauss_newton()`: cost, in gradients",
        0.72,
        {
            name: net["cost_beyond_gradient"]["gauss_newton"]
            for name, net in nets.items()
        },
        at_least=False,
    )
    label = f"{PEER_LABEL}: variance x cost, over that of `gauss_newton()`"
    summary.add(f"{label}, ReLU nets", 30, over(_peer_over_gauss_newton, relu=True))
    summary.add(
        f"{label}, transformers", 25, over(_peer_over_gauss_newton, kind="transformer")
    )
    for in_parts, where in (("", ""), (IN_PARTS, ", on eight parts of the batch")):
        label = f"{in_parts}gauss_newton_control"
        for stage in ("early", "late"):
            for what, shared in _EQUAL_COST.items():
                title = (
                    f"`gauss_newton_control`{where}: gain in variance at equal cost of"
                    f" {what}, {stage}"
                )
                gain = partial(_gain, label=label, shared=shared)
                summary.add(title, 2, at(stage, gain))
                summary.add(f"{title}, ReLU nets", 7, at(stage, gain, relu=True))
    low_rank = "`low_rank_control(8)`"
    for label, title in (
        ("low_rank_control", f"{low_rank}: gain in variance"),
        ("low_rank_control, one batch", "the same, trained on one batch"),
        (
            f"{IN_PARTS}low_rank_control",
            f"{low_rank}, on eight parts of the batch: gain in variance",
        ),
    ):
        for kind, target in (("MLP", 3), ("CNN", 5), ("transformer", 1.3)):
            summary.add(
                f"{title} after {result['settings']['tracked']} steps, {kind}",
                target,
                {
                    f"{name}, step {row['step']}": _mean(row[label])
                    for name, net in nets.items()
                    for row in net["variance_gains"]
                    if kind in name
                    and row["learnt_from"] == result["settings"]["tracked"]
                },
            )
        summary.add(
            f"{title}, least in the first 50 steps",
            0.95,
            {
                name: min(
                    min(row[label])
                    for row in net["variance_gains"]
                    if row["step"] <= 50
                )
                for name, net in nets.items()
                if net["variance_gains"]
            },
        )
    return "\n".join(summary.lines)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _peer_over_gauss_newton(net: Result, rows: Result) -> float:
    cost = net["cost_beyond_gradient"]
    peer, ours = (
        rows[label]["relative_variance"] * cost[label]
        for label in (PEER, "gauss_newton")
    )
    return peer / ours


def _gain(net: Result, rows: Result, *, label: str, shared: float) -> float:
    """Gain of a control variate over none, where ``shared`` is paid anyway."""
    cost = net["cost_beyond_gradient"]
    plain, ours = (
        rows[which]["relative_variance"] * (cost[which] + shared)
        for which in ("hutchinson", label)
    )
    return plain / ours


_EQUAL_COST = {"gradient and estimate": 1.0, "the estimate": 0.0}  # and what is shared


def _net_table(name: str, net: Result) -> str:
    stages = net["stages"]
    first = next(iter(stages.values()))["estimators"]
    head = ["estimator", "cost"]
    head += [f"error, {stage}" for stage in stages]
    head += [f"variance x cost, {stage}" for stage in stages]
    head += ["bias / s.e."]
    lines = [
        f"## {name}",
        "",
        f"{net['parameters']:,} parameters, {net['coordinates']:,} of them measured. "
        + " ".join(
            f"{stage.capitalize()}: step {m['step']}, loss {m['loss']:.4f},"
            " ‖diag H - diag G‖ / ‖diag H‖ ="
            f" {m['relative_difference_of_diagonals']:.2g}."
            for stage, m in stages.items()
        ),
        "",
        "| " + " | ".join(head) + " |",
        "|---|" + "---:|" * (len(head) - 1),
    ]
    for label in first:
        cost = net["cost_beyond_gradient"][label]
        rows = [m["estimators"][label] for m in stages.values()]
        cells = [f"`{label}`", f"{cost:.2f}"]
        cells += [f"{row['relative_error']:.2f}" for row in rows]
        cells += [f"{row['relative_variance'] * cost:.3g}" for row in rows]
        bias = max((row["bias_overall_in_se"] for row in rows), key=abs)
        lines.append("| " + " | ".join([*cells, f"{bias:+.1f}"]) + " |")
    return "\n".join(lines)


def _learning_table(result: Result) -> str:
    labels = ["low_rank_control", "low_rank_control, one batch", "gauss_newton_control"]
    labels += [f"{IN_PARTS}low_rank_control", f"{IN_PARTS}gauss_newton_control"]
    lines = [
        "## Variance of plain Hutchinson over that with a control variate",
        "",
        "Along the training; in brackets the least of the independent runs. `one batch`"
        " has learnt from the batch on which it is measured, the other from the"
        " training's batches.",
        "",
        "| net | step | steps learnt from | "
        + " | ".join(f"`{label}`" for label in labels)
        + " |",
        "|---|" + "---:|" * (2 + len(labels)),
    ]
    for name, net in result["nets"].items():
        for row in net["variance_gains"]:
            cells = [name, str(row["step"]), str(row["learnt_from"])]
            for label in labels:
                low = f" ({min(row[label]):.2f})" if len(row[label]) > 1 else ""
                cells.append(f"{_mean(row[label]):.2f}{low}")
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


# The colours that the notebooks give to the same estimators.
BLACK, BLUE, SKY, AMBER, GREEN, PURPLE = (
    *("#222222", "#0072b2", "#56b4e9", "#cc8a00", "#009e73", "#aa4499"),
)
STYLE = {  # colour, marker, label
    PEER: (BLACK, "X", PEER_LABEL),
    "hutchinson": (BLUE, "o", "hutchinson()"),
    "hutchinson n=4": (BLUE, "s", "hutchinson(4)"),
    "microbatched 8": (SKY, "D", "microbatched(hutchinson(), 8)"),
    "low_rank_control": (AMBER, "P", "hutchinson, low_rank_control(8)"),
    "gauss_newton_control": (PURPLE, "^", "hutchinson, gauss_newton_control"),
    "microbatched 8, gauss_newton_control": (PURPLE, "D", "the same, microbatched"),
    "gauss_newton": (GREEN, "o", "gauss_newton()"),
    "gauss_newton n=4": (GREEN, "s", "gauss_newton, n_samples=4"),
    "gauss_newton sampled-labels": (GREEN, "v", 'gauss_newton, "sampled-labels"'),
    "gauss_newton hutchinson": (GREEN, "X", 'gauss_newton, "hutchinson"'),
}
X_TICKS, Y_TICKS = (0.5, 1, 2, 5, 10), (0.5, 1, 2, 5, 10, 20, 50)


def _plot(result: Result, path: Path) -> None:
    """Draw error against cost, one panel for each net."""
    nets = result["nets"]
    n_columns = min(3, len(nets))
    n_rows = -(-len(nets) // n_columns)
    fig, axes = plt.subplots(
        n_rows,
        n_columns,
        figsize=(max(3.2 * n_columns, 7.2), 2.9 * n_rows + 1.6),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for ax in axes.flat[len(nets) :]:
        ax.set_axis_off()
    for ax, (name, net) in zip(axes.flat, nets.items(), strict=False):
        _panel(ax, name, net)
    drawn = [
        measured["estimators"][label]["relative_error"]
        for net in nets.values()
        for measured in net["stages"].values()
        for label in STYLE
    ]
    axes[0, 0].set_ylim(min(drawn) / 1.4, max(drawn) * 1.4)
    for ax in axes[:, 0]:
        ax.set_ylabel("relative error")
    axes[-1, n_columns // 2].set_xlabel("cost beyond the gradient, in gradients")
    stages = list(next(iter(nets.values()))["stages"])
    fig.suptitle(
        f"One estimate of the diagonal. Markers: {stages[-1]} in training; bars: range"
        f" over {', '.join(stages)}.\nGrey lines: equal variance x cost, a factor of 10"
        " apart.",
        fontsize=10,
    )
    handles = [
        Line2D([], [], color=color, marker=marker, linestyle="", label=label)
        for color, marker, label in STYLE.values()
    ]
    fig.legend(
        handles=handles,
        loc="outside lower center",
        ncols=3 if n_columns == 3 else 2,
        fontsize=10,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.2,
    )
    fig.savefig(path, dpi=150)
    plt.close(fig)


def _panel(ax: Any, name: str, net: Result) -> None:
    ax.set_xscale("log")
    ax.set_yscale("log")
    x = (0.38, 13)
    for product in (0.1, 1, 10, 100, 1000, 10000):
        y = [(product / cost) ** 0.5 for cost in x]
        ax.plot(x, y, color="#dddddd", linewidth=0.9, zorder=0)
    for label, (color, marker, _) in STYLE.items():
        cost = net["cost_beyond_gradient"][label]
        errors = [
            stage["estimators"][label]["relative_error"]
            for stage in net["stages"].values()
        ]
        ends = [min(errors), max(errors)]
        ax.plot([cost, cost], ends, color=color, linewidth=1.6, alpha=0.55, zorder=1)
        ax.plot(
            *(cost, errors[-1]),
            color=color,
            marker=marker,
            markersize=8,
            markeredgecolor="white",
            markeredgewidth=0.7,
            zorder=3 if label == PEER else 2,
        )
    ax.set_title(name, fontsize=11)
    ax.set_xlim(*x)
    for axis, ticks in ((ax.xaxis, X_TICKS), (ax.yaxis, Y_TICKS)):
        axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_ticks(ticks)
    ax.spines[["top", "right"]].set_visible(False)


def main() -> None:
    """Write the report of a JSON file again."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path)
    print(write_report(parser.parse_args().file))


if __name__ == "__main__":
    main()
