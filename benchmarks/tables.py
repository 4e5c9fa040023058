# SPDX-License-Identifier: Apache-2.0
"""Tables in Markdown, as they are included in the documentation."""

import pandas as pd


def markdown(frame: pd.DataFrame) -> str:
    """Lay out a frame of text, with its index as the first column."""
    rows = [("", *frame.columns), *frame.itertuples()]
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    lines[0] = lines[0].replace("|  |", "| |", 1)
    lines.insert(1, "|" + "---|" * (frame.shape[1] + 1))
    return "\n".join(lines) + "\n"
