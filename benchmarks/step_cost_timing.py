# SPDX-License-Identifier: Apache-2.0
"""Clocks, and contenders timed in turn, for the step-cost benchmark."""

import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

LOOP = 0.03  # seconds for which a step is repeated within its turn, at least once
SLOW = 10.0  # times the baseline; slower contenders are timed in fewer rounds
SLOW_ROUNDS = 3


def default_platform() -> str:
    """Ask a fresh interpreter for JAX's platform, as this one must be pinned first."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.run(
        command, capture_output=True, text=True, check=True
    ).stdout.split()[-1]


def pin_to_one_core() -> None:
    """Run on one core and one thread from now on. Call it before JAX is imported."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["OMP_NUM_THREADS"] = "1"


def machine() -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    import jax
    import optax

    on_cpu = jax.default_backend() == "cpu"
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "processor": _processor(),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": "one, on one core" if on_cpu else "default",
        "clock": "CPU time of the process" if on_cpu else "wall time, synchronised",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0].split(":")[1].strip() if names else platform.processor()


class Program(NamedTuple):
    """A step, and its part in the time of a contender.

    Attributes:
      step: called with a carry, returns the next carry without waiting for it.
      share: what fraction of a contender's steps are this one.
      cycle: time so many calls in a row, or a multiple, for a step that does not do
        the same each time.
    """

    step: Callable[[Any], Any]
    share: float = 1.0
    cycle: int = 1


class Contender:
    """Steps to be timed, with what the compiler says about them.

    Attributes:
      name: what it is called in the tables.
      costs: FLOPs and bytes, by name; None where they cannot be compared.
      seconds: time per step in each round so far, repeated as in a training loop.
      first_seconds: the same for the first step of each turn, which finds the
        processor's caches and the memory allocator as another contender left them;
        empty for a step that does not do the same each time.
    """

    def __init__(
        self,
        name: str,
        programs: Sequence[Program],
        carry: Any,
        wait: Callable[[Any], Any],
        costs: dict[str, float | None] | None = None,
    ) -> None:
        """Take programs that hand one carry on, and a function that waits for it."""
        self.name = name
        self.costs = costs or {}
        self.seconds: list[float] = []
        self.first_seconds: list[float] = []
        self._programs = programs
        self._carry = carry
        self._wait = wait
        self._repeats = [program.cycle for program in programs]

    def warm_up(self) -> float:
        """Run each program and choose how often to repeat it; return s per step."""
        self.time()
        seconds = self.seconds.pop()
        self.first_seconds.clear()
        for i, program in enumerate(self._programs):
            cycles = max(1, round(LOOP / (seconds * program.cycle)))
            self._repeats[i] = program.cycle * cycles
        return seconds

    def time(self) -> None:
        """Time one round."""
        first = repeated = 0.0
        for program, repeats in zip(self._programs, self._repeats, strict=True):
            if program.cycle == 1:
                first += program.share * self._call(program, 1)
            repeated += program.share * self._call(program, repeats)
        self.seconds.append(repeated)
        if first:
            self.first_seconds.append(first)

    def _call(self, program: Program, n: int) -> float:
        start = _clock()
        for _ in range(n):
            self._carry = program.step(self._carry)
        self._wait(self._carry)
        return (_clock() - start) / n


def compare(contenders: Sequence[Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Time contenders in turn, the first of them as the baseline of the others.

    Args:
      contenders: what to time.
      rounds: how often; those slower than ``SLOW`` times the baseline less often.

    Returns:
      For each name: milliseconds per step (median over rounds), the ratio to the
      baseline (median and quartiles of the ratios within rounds, so that a machine
      that is slow for a while is slow for both), the same of the first step in a turn,
      the number of rounds, and the ratios of costs.
    """
    baseline = contenders[0]
    first = [contender.warm_up() for contender in contenders]
    slow = [seconds > SLOW * first[0] for seconds in first]
    for i in range(rounds):
        for contender, is_slow in zip(contenders, slow, strict=True):
            if i < SLOW_ROUNDS or not is_slow:
                contender.time()
    rows = {}
    for contender in contenders:
        ratios = _ratios(contender.seconds, baseline.seconds)
        first_ratios = _ratios(contender.first_seconds, baseline.first_seconds)
        rows[contender.name] = {
            "ms": 1e3 * statistics.median(contender.seconds),
            "ratio": statistics.median(ratios),
            "quartiles": _quartiles(ratios),
            "first_ratio": statistics.median(first_ratios) if first_ratios else None,
            "rounds": len(ratios),
            **_cost_ratios(contender.costs, baseline.costs),
        }
    return rows


def _ratios(numbers: list[float], baseline: list[float]) -> list[float]:
    return [a / b for a, b in zip(numbers, baseline, strict=False)]


def _quartiles(numbers: list[float]) -> list[float]:
    if len(numbers) < 4:
        return [min(numbers), max(numbers)]
    low, _, high = statistics.quantiles(numbers, n=4)
    return [low, high]


def _cost_ratios(
    costs: dict[str, float | None], baseline: dict[str, float | None]
) -> dict[str, Any]:
    ratios = {}
    for name, cost in costs.items():
        ratios[name] = cost
        both = cost is not None and baseline.get(name)
        ratios[f"{name}_ratio"] = cost / baseline[name] if both else None
    return ratios


def _clock() -> float:
    """Read the time: that of this process alone, if it runs pinned to one CPU core."""
    import jax

    return (
        time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()
    )
