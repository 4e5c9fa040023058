# SPDX-License-Identifier: Apache-2.0
"""Plots of comparisons."""

import math
from pathlib import Path

import matplotlib.pyplot as plt
import pandas as pd
import seaborn as sns

from benchmarks.training.report import Result, difference


def plot(result: Result, path: Path) -> None:
    """Draw the final losses of each contender beside AdamW's."""
    found, adamw = result["contenders"], result["contenders"]["AdamW"]
    rows = [
        (name, setting, 100 * bound if math.isfinite(bound) else math.nan)
        for name, entry in found.items()
        for setting in ("equal steps", "equal time")
        for bound in difference(entry[setting], adamw[setting])
    ]
    height = 0.34 * len(found) + 1.8
    long = pd.DataFrame(rows, columns=["contender", "setting", "percent"])
    grid = sns.catplot(
        long,
        kind="point",
        x="percent",
        y="contender",
        col="setting",
        order=list(found),
        estimator="median",  # of the mean and its bounds, so the mean
        errorbar=("pi", 100),  # and its bounds
        linestyle="none",
        height=height,
        aspect=5 / height,
        sharex=False,
        markersize=5,
        linewidth=1.5,
    )
    for setting, ax in grid.axes_dict.items():
        ax.axvline(0, color="#d55e00", linewidth=1)
        for y, name in enumerate(found):
            if not math.isfinite(difference(found[name][setting], adamw[setting])[0]):
                ax.text(0, y, " diverged", va="center", fontsize=8, color="#777777")
        if max(map(abs, ax.get_xlim())) > 60:
            ax.set_xscale("symlog", linthresh=10)
            ax.set_xlim(left=max(ax.get_xlim()[0], -120))  # none is below -100
            ax.xaxis.set_major_formatter("{x:g}")
        ax.tick_params(axis="x", labelsize=8)
        ax.grid(alpha=0.3)
    grid.set_titles("{col_name}")
    grid.set_axis_labels("validation loss beside AdamW's, %", "")
    grid.figure.suptitle(result["task"], fontsize=11, y=1.0, va="bottom")
    grid.savefig(path, dpi=120)
    plt.close(grid.figure)
