# SPDX-License-Identifier: Apache-2.0
"""What a user sees of a long Python loop, and how it is interrupted."""

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any


@contextlib.contextmanager
def interruptible() -> Iterator[list[int]]:
    """Let Ctrl-C fill a list, so that it can't fall into the middle of an update.

    A second one interrupts at once.
    """
    pressed: list[int] = []

    def handler(number: int, frame: Any) -> None:
        if pressed:
            signal.default_int_handler(number, frame)
        pressed.append(number)

    usual = signal.getsignal(signal.SIGINT)
    own = threading.current_thread() is threading.main_thread()
    if own and usual is signal.default_int_handler:
        signal.signal(signal.SIGINT, handler)
    try:
        yield pressed
    finally:
        if signal.getsignal(signal.SIGINT) is handler:
            signal.signal(signal.SIGINT, usual)


@contextlib.contextmanager
def progress_bar(
    progress: bool, batches: Any, n_samples: int | None
) -> Iterator[Callable[[Any], None]]:
    """Yield what shows an estimate: its samples, and its error after each."""
    if not progress:
        yield lambda estimate: None
        return
    from rich.progress import Progress

    with Progress() as bar:
        task = bar.add_task("", total=n_samples)
        length = len(batches) if hasattr(batches, "__len__") else math.inf

        def show(estimate: Any) -> None:
            n, part = estimate.n_samples, estimate.n_batches / length
            error = None if part else f"error {float(estimate.relative_error):.1%}"
            bar.update(task, completed=n + part, description=error)

        yield show
