# SPDX-License-Identifier: Apache-2.0
"""What the demo shows at the end: a table, a summary and a plot."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from rich import box
from rich.table import Table

from adahessian_jax.demo.training import Curve, Run

# Apart for every kind of colour vision, and dark enough on white.
COLORS = {"Adam": "#d55e00", "AdaHessian": "#0072b2", "Newton": "#009e73"}


def table(runs: dict[str, Run]) -> Table:
    """Lay out the figures of each run, one a row."""
    result = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    result.add_column("", no_wrap=True)
    for header in (
        "training\nloss",
        "test\nloss",
        "test\naccuracy",
        "compile\nseconds",
        "training\nseconds",
        "ms per\nstep",
        "time vs\nAdam",
    ):
        result.add_column(header, justify="right", no_wrap=True)
    for name, run in runs.items():
        result.add_row(
            f"[{COLORS[name]}]{name}",
            f"{run.train.loss:.4f}",
            f"{run.test.loss:.4f}",
            f"{run.test.accuracy:.2%}",
            f"{run.compile_seconds:.1f}",
            f"{run.seconds:.1f}",
            f"{step_ms(run):.1f}",
            f"{step_ms(run) / step_ms(runs['Adam']):.2f}",
        )
    return result


def summary(runs: dict[str, Run], *, n_labels: int) -> str:
    """Say by how much accuracies and times differ from Adam's."""
    # Of the figures as they are shown, so that they add up.
    percents = {k: round(100 * run.test.accuracy, 2) for k, run in runs.items()}
    lines = [f"Beside Adam, on {n_labels:,} labels and one seed:"]
    for name in list(runs)[1:]:
        points = percents[name] - percents["Adam"]
        ratio = step_ms(runs[name]) / step_ms(runs["Adam"])
        lines.append(f"{name} {points:+.2f} points, {ratio:.2f} times as long a step.")
    return "\n".join(lines)


def step_ms(run: Run) -> float:
    """Return the mean duration of a step in milliseconds."""
    return 1e3 * run.seconds / len(run.batch_curve.steps)


def plot(runs: dict[str, Run], path: Path, *, title: str) -> None:
    """Save losses against steps and seconds; sharpness and step sizes against steps."""
    figure = Figure(figsize=(9, 7), layout="constrained")
    FigureCanvasAgg(figure)
    (by_step, by_second), (sharpness, sizes) = figure.subplots(2, 2)
    for name, run in runs.items():
        batches, color = _binned(run.batch_curve, n_bins=50), COLORS[name]
        for axes, of in ((by_step, "steps"), (by_second, "seconds")):
            axes.plot(getattr(batches, of), batches.losses, color=color, alpha=0.4)
            x = getattr(run.test_curve, of)
            axes.plot(x, run.test_curve.losses, color=color, lw=2, marker="o", ms=3)
        steps, (low, median, high) = run.looks.steps, np.transpose(run.looks.step_sizes)
        values = [float(top.values[0]) for top in run.looks.tops]
        for axes, y in ((sharpness, values), (sizes, median)):
            axes.plot(steps, _above_0(y), color=color, lw=2, marker="o", ms=3)
        sizes.fill_between(steps, _above_0(low), _above_0(high), color=color, alpha=0.1)
    by_step.set(xlabel="steps", ylabel="loss (cross-entropy)")
    by_second.set(xlabel="seconds of training, without compilation")
    sharpness.set(xlabel="steps", ylabel="sharpness (largest eigenvalue)")
    sizes.set(xlabel="steps", ylabel="step of a unit of momentum")
    for axes in (sharpness, sizes):  # after one step there may be nothing above 0
        if any(np.isfinite(line.get_ydata()).any() for line in axes.lines):
            axes.set_yscale("log")
    by_second.sharey(by_step)
    for axes in (by_step, by_second, sharpness, sizes):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    _scale_losses(by_step, runs)
    handles = _legend(runs)
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=150)


def _above_0(values: ArrayLike) -> np.ndarray:
    """Leave out what a logarithmic axis can't show."""
    values = np.asarray(values, float)
    return np.where(values > 0, values, np.nan)


def _legend(runs: dict[str, Run]) -> list[Line2D]:
    test = [Line2D([], [], color=COLORS[n], lw=2, marker="o", ms=3) for n in runs]
    train = [Line2D([], [], color=COLORS[n], alpha=0.4) for n in runs]
    for line, name in zip(test, runs, strict=True):
        line.set_label(f"{name}, test")
    for line, name in zip(train, runs, strict=True):
        line.set_label(f"{name}, training batches")
    return test + train


def _scale_losses(axes: Axes, runs: dict[str, Run]) -> None:
    losses = np.concatenate([r.batch_curve.losses for r in runs.values()])
    losses = losses[np.isfinite(losses) & (losses > 0)]
    if len(losses) and losses.max() > 20 * losses.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")


def _binned(curve: Curve, n_bins: int) -> Curve:
    """Average a curve over stretches of steps."""
    n_bins = min(n_bins, len(curve.steps))
    steps, seconds, losses = (
        [float(part.mean()) for part in np.array_split(np.asarray(column), n_bins)]
        for column in curve
    )
    return Curve(steps, seconds, losses)
