# SPDX-License-Identifier: Apache-2.0
"""The file and the tables of comparisons."""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.tables import markdown
from benchmarks.training.contenders import ALL

Result = dict[str, Any]
RESULTS = Path(__file__).parent.parent / "results" / "training"


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
        if below.size:
            around = [below[0], max(below[0] - 1, 0)]
            at = np.array(runs[0]["steps"])[around]
            count = np.interp(target, curve[around], at)
            reached.append(count * entry["cost"] / steps)
    return float(min(reached))


def change(
    runs: list[Any], baseline: list[Any], unit: str = "", which: str = "validation"
) -> str:
    """Return a difference in percent, with its bounds, as a table's cell."""
    mean, low, high = (f"{100 * x:+.3g}" for x in difference(runs, baseline, which))
    return "diverged" if mean == "+inf" else f"{mean}{unit} ({low} to {high})"


def to_adamw(result: Result, name: str, setting: str, unit: str = "") -> str:
    """Return the difference to AdamW as a table's cell."""
    found = result["contenders"]
    return change(found[name][setting], found["AdamW"][setting], unit)


def time_to_loss(result: Result, name: str) -> str:
    """Return the share of AdamW's time as a table's cell."""
    found = result["contenders"]
    share = cost_to_reach(found[name], found["AdamW"], result["steps"])
    return f"{share:.2f}" if math.isfinite(share) else "never"


def mean_loss(entry: dict[str, Any], which: str) -> str:
    """Return the geometric mean of final losses as a table's cell."""
    with np.errstate(divide="ignore"):
        return f"{np.exp(np.log(final(entry['equal steps'], which)).mean()):.4g}"


def good_width(entry: dict[str, Any]) -> str:
    """Return the width of the good rates as a cell, if there was a search for them."""
    return f"{entry['width']:.1f}" if len(entry["search"]) > 1 else "-"


def dumps(result: Result) -> str:
    """Return the result as JSON, which has no numbers that are not finite: null."""
    finite = json.loads(json.dumps(result), parse_constant=lambda _: None)
    return json.dumps(finite, indent=1) + "\n"


def table(result: Result) -> str:
    """Lay the result out in Markdown."""
    found = result["contenders"]
    rows = {
        name: {
            "rate": rate(result, name),
            "good within a factor": good_width(entry),
            "cost": f"{entry['cost']:.2f}",
            "training loss": mean_loss(entry, "train"),
            "validation loss": mean_loss(entry, "validation"),
            "to AdamW, equal steps": to_adamw(result, name, "equal steps", " %"),
            "to AdamW, equal time": to_adamw(result, name, "equal time", " %"),
            "time to AdamW's loss": time_to_loss(result, name),
        }
        for name, entry in found.items()
    }
    size = result["batch_size"]
    batch = "one batch of all" if size is None else f"batches of {size}"
    return (
        f"# {result['task']}\n\n{result['steps']} steps, {batch},"
        f" {result['seeds']} seeds, {result['device']}, JAX"
        f" {result['jax']}. Losses are geometric means over seeds; differences to AdamW"
        " are of validation losses, pair by pair, and lie with two standard errors"
        " between the figures in brackets. Good is a rate whose loss is within 5 % of"
        " the best of the same optimizer. Cost is the time of a step, and the last"
        " column that in which AdamW's final loss is reached, as shares of AdamW's.\n\n"
        + markdown(pd.DataFrame.from_dict(rows, orient="index"))
        + beside_published(result)
    )


def beside_published(result: Result) -> str:
    """Lay out what is reported after some steps beside published figures, if any."""
    table = pd.read_csv(RESULTS / "published.csv").query("task == @result['task']")
    if table.empty:
        return ""
    figures = table.pivot(index="steps", columns="optimizer", values="reported")
    figures = figures[table["optimizer"].unique()].loc[: result["steps"]]
    rows = figures.add_suffix(", published").to_dict()
    for name, entry in result["contenders"].items():
        runs = entry["equal steps"]
        curve = np.exp(np.mean([np.log(run["validation"]) for run in runs], axis=0))
        rows[name] = dict(zip(runs[0]["steps"], curve, strict=False))
    frame = pd.DataFrame(rows).reindex(figures.index).T
    frame = frame.map("{:.4g}".format, na_action="ignore").fillna("-")
    cells = markdown(frame.rename(columns="{:,} steps".format))
    source = table["source"].iloc[0]
    return f"\n`{result['task']}` beside published figures ({source}):\n\n{cells}"


def across_tasks(
    results: dict[str, Result],
    cell: Callable[[Result, str], str],
    names: Iterable[str] = (),
) -> str:
    """Lay out a cell for each contender, or each that is named, on each task."""
    names = names or dict.fromkeys(n for r in results.values() for n in r["contenders"])
    columns = {
        task: {n: cell(r, n) if n in r["contenders"] else "not run" for n in names}
        for task, r in results.items()
    }
    return markdown(pd.DataFrame(columns))


def to_best_of(names: Iterable[str]) -> Callable[[Result, str], str]:
    """Return the cell of the difference to the best of some, at equal time."""

    def cell(result: Result, name: str) -> str:
        found = result["contenders"]
        known = [found[n]["equal time"] for n in names if n in found]
        best = min(known, key=lambda runs: float(np.log(final(runs)).mean()))
        return change(found[name]["equal time"], best)

    return cell


def rate(result: Result, name: str) -> str:
    """Return the learning rate that was chosen as a cell, if one was."""
    own = ALL[name].own_rate
    return "own" if own else f"{result['contenders'][name]['rate']:.2g}"


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
    rows = {
        task: {
            "rate": rate(result, name),
            "cost of a step": f"{result['contenders'][name]['cost']:.2f}",
            "to AdamW, equal steps, %": to_adamw(result, name, "equal steps"),
            "equal time, %": to_adamw(result, name, "equal time"),
            "time to AdamW's loss": time_to_loss(result, name),
            "good rates": good_width(result["contenders"][name]),
            "AdamW's": good_width(result["contenders"]["AdamW"]),
        }
        for task, result in results.items()
    }
    return markdown(pd.DataFrame.from_dict(rows, orient="index"))
