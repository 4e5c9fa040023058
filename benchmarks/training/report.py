# SPDX-License-Identifier: Apache-2.0
"""The file, the table and the plot of a comparison."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Result = dict[str, Any]


def final(runs: list[dict[str, Any]], which: str = "validation") -> np.ndarray:
    """Return the last loss of each run, infinite where it diverged."""
    last = np.array([run[which][-1] for run in runs], float)  # None becomes NaN
    return np.where(np.isfinite(last), last, np.inf)


def difference(
    runs: list[Any], baseline: list[Any], which: str = "validation"
) -> tuple[float, float, float]:
    """Return by how much, relative to a baseline, the loss differs, and its bounds.

    Means are geometric, because losses may span orders of magnitude, and of pairs with
    the same seed. The bounds are two standard errors away. All three are infinite if a
    run diverged.
    """
    ratio = np.log(final(runs, which) / final(baseline, which))
    if not np.isfinite(ratio).all():
        return math.inf, math.inf, math.inf
    error = ratio.std(ddof=1) / math.sqrt(len(ratio)) if len(ratio) > 1 else math.nan
    mean = float(ratio.mean())
    return tuple(math.expm1(mean + k * error) for k in (0, -2, 2))


def geometric_mean(losses: np.ndarray) -> float:
    """Return the geometric mean: infinite if any of them is, 0 if any of them is."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(losses).mean()))


def cost_to_reach(entry: dict[str, Any], baseline: dict[str, Any], steps: int) -> float:
    """Return the share of AdamW's time in which its final loss is reached.

    Of the means over seeds of the curves at equal steps and at equal time, the one that
    is there first. Both have their schedules still to run then, so a shorter run might
    be faster. Infinite if neither gets there.
    """
    target = np.log(final(baseline["equal steps"])).mean()
    reached = [math.inf]
    for setting in ("equal steps", "equal time"):
        runs = entry[setting]
        if not np.isfinite(final(runs)).all():
            continue
        curve = np.mean([np.log(run["validation"]) for run in runs], axis=0)
        below = np.flatnonzero(curve <= target)
        if below.size == 0:
            continue
        i, at = below[0], runs[0]["steps"]
        if i == 0:
            count = at[0]
        else:
            share = (curve[i - 1] - target) / (curve[i - 1] - curve[i])
            count = at[i - 1] + share * (at[i] - at[i - 1])
        reached.append(count * entry["cost"] / steps)
    return float(min(reached))


def change(
    runs: list[Any], baseline: list[Any], unit: str = "", which: str = "validation"
) -> str:
    """Return a difference in percent, with its bounds, as a table's cell."""
    mean, low, high = (f"{100 * x:+.3g}" for x in difference(runs, baseline, which))
    return "diverged" if mean == "+inf" else f"{mean}{unit} ({low} to {high})"


def time_to_loss(entry: dict[str, Any], baseline: dict[str, Any], steps: int) -> str:
    """Return the share of AdamW's time as a table's cell."""
    share = cost_to_reach(entry, baseline, steps)
    return f"{share:.2f}" if math.isfinite(share) else "never"


def good_width(entry: dict[str, Any]) -> str:
    """Return the width of the good rates as a cell, if there was a search for them."""
    return f"{entry['width']:.1f}" if len(entry["search"]) > 1 else "-"


def rates_tried(entry: dict[str, Any]) -> dict[float, float]:
    """Return the loss of each rate of a search, infinite where it diverged."""
    return {
        float(rate): math.inf if loss is None else loss
        for rate, loss in entry["search"].items()
    }


def of_batch(result: Result) -> str:
    """Say how large a batch is."""
    size = result["batch_size"]
    return "one batch of all" if size is None else f"batches of {size}"


def others(earlier: Result, result: Result) -> dict[str, Any]:
    """Return the contenders of an earlier result under the same conditions.

    Raises:
      ValueError: if the conditions differ; the message says which.
    """
    differing = [
        f"{key} is {earlier.get(key)} there and {value} here"
        for key, value in result.items()
        if key != "contenders" and earlier.get(key) != value
    ]
    if differing:
        raise ValueError(", ".join(differing))
    return dict(earlier["contenders"])


def dumps(result: Result) -> str:
    """Return the result as JSON, which has no numbers that are not finite: null."""

    def finite(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        if isinstance(x, list):
            return [finite(value) for value in x]
        return None if isinstance(x, float) and not math.isfinite(x) else x

    return json.dumps(finite(result), indent=1, allow_nan=False) + "\n"


def table(result: Result) -> str:
    """Lay the result out in Markdown."""
    found = result["contenders"]
    lines = [
        f"# {result['task']}",
        "",
        f"{result['steps']} steps, {of_batch(result)}, depth {result['depth']},"
        f" {result['seeds']} seeds, {result['device']}, JAX"
        f" {result['jax']}. Losses are geometric means over seeds; differences to AdamW"
        " are of validation losses, pair by pair, and lie with two standard errors"
        " between the figures in brackets. Good is a rate whose loss is within 5 % of"
        " the best of the same optimizer. Cost is the time of a step, and the last"
        " column that in which AdamW's final loss is reached, as shares of AdamW's.",
        "",
        "| | rate | good within a factor | cost | training loss | validation loss |"
        " to AdamW, equal steps | to AdamW, equal time | time to AdamW's loss |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, entry in found.items():
        cells = [name, f"{entry['rate']:.3g}", good_width(entry)]
        cells += [f"{entry['cost']:.2f}"]
        for which in ("train", "validation"):
            losses = final(entry["equal steps"], which)
            cells.append(f"{geometric_mean(losses):.4g}")
        for setting in ("equal steps", "equal time"):
            cells.append(change(entry[setting], found["AdamW"][setting], " %"))
        cells.append(time_to_loss(entry, found["AdamW"], result["steps"]))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def across_tasks(
    results: dict[str, Result],
    cell: Callable[[Result, str], str],
    names: Iterable[str] = (),
) -> str:
    """Lay out a cell for each contender, or each that is named, on each task."""
    names = names or dict.fromkeys(n for r in results.values() for n in r["contenders"])
    lines = [
        "| | " + " | ".join(results) + " |",
        "|---|" + "---|" * len(results),
    ]
    for name in names:
        cells = [
            cell(r, name) if name in r["contenders"] else "not run"
            for r in results.values()
        ]
        lines.append("| " + " | ".join([name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def at_equal_time(result: Result, name: str) -> str:
    """Return the difference to AdamW at equal time as a cell."""
    found = result["contenders"]
    return change(found[name]["equal time"], found["AdamW"]["equal time"])


def rate(result: Result, name: str) -> str:
    """Return the learning rate that was chosen as a cell."""
    return f"{result['contenders'][name]['rate']:.2g}"


def beside(result: Result, name: str) -> str:
    """Lay out how the others differ from one contender at equal steps."""
    found = result["contenders"]
    lines = ["| | rate | difference, % |", "|---|---|---|"]
    for other, entry in found.items():
        if other != name:
            cell = change(entry["equal steps"], found[name]["equal steps"])
            lines.append(f"| {other} | {rate(result, other)} | {cell} |")
    return "\n".join(lines) + "\n"


def of_delay(results: dict[str, Result], delayed: dict[str, str]) -> str:
    """Lay out by how much delayed estimates change the training loss, at equal steps.

    ``delayed`` has the name of the contender with delayed estimates for that without.
    """

    def cell(result: Result, name: str) -> str:
        found = result["contenders"]
        runs = found[delayed[name]]["equal steps"]
        return change(runs, found[name]["equal steps"], which="train")

    return across_tasks(results, cell, delayed)


def of_one(results: dict[str, Result], name: str) -> str:
    """Lay out what one contender does on each task."""
    lines = [
        "| | rate | cost of a step | to AdamW, equal steps, % | equal time, % |"
        " time to AdamW's loss | good rates | AdamW's |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task, result in results.items():
        entry, adamw = result["contenders"][name], result["contenders"]["AdamW"]
        cells = [task, rate(result, name), f"{entry['cost']:.2f}"]
        for setting in ("equal steps", "equal time"):
            cells.append(change(entry[setting], adamw[setting]))
        cells.append(time_to_loss(entry, adamw, result["steps"]))
        cells += [good_width(entry), good_width(adamw)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(result: Result, path: Path) -> None:
    """Draw the final losses of each contender at equal time, and the searches."""
    found = result["contenders"]
    figure = Figure(figsize=(10, 0.34 * len(found) + 1.8), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1, 1))
    ticks = range(len(found))
    for ax, setting in ((left, "equal steps"), (right, "equal time")):
        for y, entry in enumerate(found.values()):
            bounds = difference(entry[setting], found["AdamW"][setting])
            if math.isfinite(bounds[0]):
                mean, low, high = (100 * x for x in bounds)
                ax.plot([low, high], [y, y], color="#0072b2")
                ax.plot(mean, y, "o", color="#0072b2")
            else:
                ax.text(0, y, " diverged", va="center", fontsize=8, color="#777777")
        ax.axvline(0, color="#d55e00", linewidth=1)
        if max(map(abs, ax.get_xlim())) > 60:
            ax.set_xscale("symlog", linthresh=10)
            ax.xaxis.set_major_formatter("{x:g}")
        ax.set(title=setting, xlabel="validation loss beside AdamW's, %")
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    left.set_yticks(ticks, found)
    left.set_ylim(len(found) - 0.5, -0.5)
    figure.suptitle(result["task"], fontsize=11)
    figure.savefig(path, dpi=120)


def plot_rates(entries: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw the losses that searches found over the learning rate.

    Those above twice the least are not shown.
    """
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    least = math.inf
    for name, entry in entries.items():
        tried = rates_tried(entry)
        losses = list(tried.values())
        least = min(least, *losses)
        if len(tried) == 1:
            ax.axhline(losses[0], color="#777777", linestyle="--", label=name)
        else:
            ax.plot(list(tried), losses, "o-", label=name)
    ax.set(xscale="log", xlabel="learning rate", ylabel="validation loss")
    ax.set(ylim=(0.97 * least, 2 * least), title=path.stem.replace("_", ", "))
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120)
