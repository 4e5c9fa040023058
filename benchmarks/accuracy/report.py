# SPDX-License-Identifier: Apache-2.0
"""Tables and the figure of the estimators' accuracy."""

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns

from benchmarks.tables import markdown

Result = dict[str, Any]
# The colours that the notebooks give to the same estimators.
COLORS = ["#222222", "#0072b2", "#0072b2", "#cc8a00", "#aa4499", "#009e73", "#009e73"]
MARKERS = ["X", "o", "s", "P", "^", "o", "s"]
LABELS = {  # of the figure, and its order
    "optax hutchinson": "optax's Hutchinson",
    "hutchinson": "hutchinson()",
    "hutchinson n=4": "hutchinson(4)",
    "low_rank_control": "hutchinson, low_rank_control(8)",
    "gauss_newton_control": "hutchinson, gauss_newton_control",
    "gauss_newton": "gauss_newton()",
    "gauss_newton n=4": "gauss_newton, n_samples=4",
}


def rows_of(result: Result) -> pd.DataFrame:
    """Lay a result out with a row for each net, estimator and stage."""
    return pd.DataFrame(
        [
            {
                "net": name,
                "estimator": label,
                "stage": stage,
                "cost": net["cost_beyond_gradient"][label],
                **row,
            }
            for name, net in result["nets"].items()
            for stage, measured in net["stages"].items()
            for label, row in measured["estimators"].items()
        ]
    )


def write(path: Path) -> str:
    """Write the tables and the figure beside the JSON file; return the overview."""
    result = json.loads(path.read_text("utf-8"))
    frame = rows_of(result)
    summary = overview(frame)
    parts = [heading(result, frame), summary]
    parts += [of_net(name, net, frame) for name, net in result["nets"].items()]
    path.with_suffix(".md").write_text("\n".join(parts), "utf-8")
    plot(frame, path.with_suffix(".png"))
    return summary


def heading(result: Result, frame: pd.DataFrame) -> str:
    """Say what was measured, how and on what."""
    machine, settings = result["machine"], result["settings"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("jax", "optax"))
    error = 50 * frame["relative_variance_se"] / frame["relative_variance"]
    return (
        "# Accuracy and cost of the estimators\n\n"
        f"Made by `python -m benchmarks.accuracy` in {result['seconds']:.0f} s on"
        f" {machine['device']} ({machine['cpu_count']} cores), {versions}, seed"
        f" {settings['seed']}. `early` is {settings['early']} steps of Adam, `late`"
        f" {settings['late']}; {settings['draws']} draws of each estimator on one batch"
        f" ({settings['large_draws']} for the large networks, where errors are"
        " estimated from random entries, as many from each tensor).\n\n"
        "Relative error is the root mean square of ‖d - t‖ / ‖t‖, where t is the exact"
        " diagonal that the estimator is an unbiased estimate of: that of the Hessian,"
        " or of the Gauss-Newton matrix for `gauss_newton`. Cost is in gradients: the"
        " operations of loss, gradient and estimate in one compiled function, divided"
        " by those of loss and gradient, less 1. Variance is the relative error"
        f" squared. The standard error of the relative errors is {error.median():.0f}%"
        f" in the median and {error.max():.0f}% at most.\n"
    )


def overview(frame: pd.DataFrame) -> str:
    """Lay out the ranges over networks."""

    def span(values: pd.Series) -> str:
        return f"{values.min():.1f} to {values.max():.1f}"

    large, start = frame["net"].str.startswith("large"), frame["stage"] == "init"
    table = pd.DataFrame(
        {
            title: frame[rows].groupby("estimator", sort=False)[column].agg(span)
            for title, rows, column in (
                ("cost", ~large, "cost"),
                ("error at the start", ~large & start, "relative_error"),
                ("error later", ~large & ~start, "relative_error"),
                ("large networks, later", large & ~start, "relative_error"),
            )
        }
    )
    table = table.reindex(frame["estimator"].unique()).rename("`{}`".format).fillna("-")
    return "## Overview\n\nRanges over the networks.\n\n" + markdown(table)


def of_net(name: str, net: Result, frame: pd.DataFrame) -> str:
    """Lay out all estimators on one network."""
    frame = frame[frame["net"] == name]
    frame = frame.assign(product=frame["relative_variance"] * frame["cost"])
    pivot = frame.pivot(index="estimator", columns="stage")
    table = pd.DataFrame({"cost": pivot["cost"].iloc[:, 0].map("{:.2f}".format)})
    for title, column, form in (
        ("error", "relative_error", "{:.2f}"),
        ("variance x cost", "product", "{:.3g}"),
    ):
        for stage in net["stages"]:
            table[f"{title}, {stage}"] = pivot[column][stage].map(form.format)
    bias = pivot["bias_overall_in_se"]
    table["bias / s.e."] = bias.apply(lambda row: f"{max(row, key=abs):+.1f}", axis=1)
    table = table.reindex(frame["estimator"].unique()).rename("`{}`".format)
    stages = " ".join(
        f"{stage.capitalize()}: step {m['step']}, loss {m['loss']:.4f}, ‖diag H - diag"
        f" G‖ / ‖diag H‖ = {m['relative_difference_of_diagonals']:.2g}."
        for stage, m in net["stages"].items()
    )
    sizes = f"{net['parameters']:,} parameters, {net['coordinates']:,} of them measured"
    return f"## {name}\n\n{sizes}. {stages}\n\n{markdown(table)}"


def plot(frame: pd.DataFrame, path: Path) -> None:
    """Draw error against cost, one panel for each net, a line through the stages."""
    frame = frame.assign(estimator=frame["estimator"].map(LABELS)).dropna()
    order = {"hue_order": LABELS.values(), "style_order": LABELS.values()}
    look = {"palette": COLORS, "markers": MARKERS, "dashes": False, "markersize": 7}
    grid = sns.relplot(
        frame,
        kind="line",
        x="cost",
        y="relative_error",
        hue="estimator",
        style="estimator",
        col="net",
        col_wrap=min(3, frame["net"].nunique()),
        sort=False,
        estimator=None,
        height=2.9,
        aspect=1.1,
        **order,
        **look,
    )
    grid.set(xscale="log", xlim=(0.38, 13), xticks=(0.5, 1, 2, 5, 10))
    grid.set(yscale="log", yticks=(0.5, 1, 2, 5, 10, 20, 50))
    x, look = np.array([0.3, 20]), {"color": "#dddddd", "linewidth": 0.9, "zorder": 0}
    for ax in grid.axes.flat:
        for product in (0.1, 1, 10, 100, 1000, 10000):
            ax.plot(x, (product / x) ** 0.5, **look, scalex=False, scaley=False)
        ax.xaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()
    grid.set_titles("{col_name}")
    grid.set_axis_labels("cost beyond the gradient, in gradients", "relative error")
    place = {"bbox_to_anchor": (0.4, 0.0), "ncols": 3, "title": None}
    sns.move_legend(grid, "upper center", **place)
    title = "One estimate of the diagonal, at three stages of training.\n"
    title += "Grey lines: equal variance x cost, a factor of 10 apart."
    grid.figure.suptitle(title, fontsize=10, x=0.4, y=1.0, va="bottom")
    grid.savefig(path, dpi=150)
    plt.close(grid.figure)


def write_batch_sizes(path: Path) -> str:
    """Write the table of control variates in batches of several sizes; return it."""
    results = json.loads(path.read_text("utf-8"))
    names = {
        "low_rank_control": "`low_rank_control(8)`",
        "gauss_newton_control": "`gauss_newton_control`",
    }
    rows = {}
    for net, result in results.items():
        for row in result["rows"]:
            known = row["estimators"]
            rows[f"{net}, {row['batch_size']}, {row['step']}"] = {
                title: gain(known["hutchinson"], known[label]) if label in known else ""
                for label, title in names.items()
            }
    text = (
        "# Control variates and the size of the batch\n\n"
        "Made by `python -m benchmarks.accuracy --batch-sizes`: by network, size of the"
        " batch and step, the variance of plain Hutchinson over that with a control"
        " variate, with one standard error, and in brackets the gain at equal cost of"
        " loss, gradient and estimate.\n\n"
        + markdown(pd.DataFrame.from_dict(rows, orient="index"))
    )
    path.with_suffix(".md").write_text(text, "utf-8")
    return text


def gain(plain: dict[str, float], ours: dict[str, float]) -> str:
    """Return the gain in variance, its standard error, and the gain at equal cost."""
    value = plain["variance"] / ours["variance"]
    error = np.hypot(*(row["variance_se"] / row["variance"] for row in (plain, ours)))
    equal = value * plain["cost"] / ours["cost"]
    return f"{value:.2f} ± {value * error:.2f} ({equal:.2f})"
