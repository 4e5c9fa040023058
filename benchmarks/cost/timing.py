# SPDX-License-Identifier: Apache-2.0
"""Clocks, and contenders that are timed in turn."""

import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

LOOP = 0.03  # seconds for which a step is repeated within its turn, at least once
SLOW = 10.0  # times the baseline; slower contenders are timed in fewer rounds
SLOW_ROUNDS = 3


def default_platform() -> str:
    """Ask a fresh interpreter for JAX's platform, as this one must be pinned first."""
    command = [sys.executable, "-c", "import jax; print(jax.default_backend())"]
    return subprocess.check_output(command, text=True).split()[-1]


def keep_memory() -> None:
    """Start the process anew, unless it was told how, with a glibc that keeps memory.

    By default it hands temporaries above 32 MB back after every step, which costs more
    than some of the steps, and then ratios say whether a step is just above or below.
    """
    sizes = {"mmap_threshold": 2**32, "trim_threshold": 2**33, "top_pad": 2**28}
    kept = ":".join(f"glibc.malloc.{name}={size}" for name, size in sizes.items())
    if "GLIBC_TUNABLES" not in os.environ:  # it is read when a process starts
        os.execve(sys.executable, sys.orig_argv, os.environ | {"GLIBC_TUNABLES": kept})


def pin_to_one_core() -> None:
    """Run on one core and one thread from now on. Call it before JAX computes."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    flags = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}".strip()
    os.environ["OMP_NUM_THREADS"] = "1"


def machine() -> dict[str, Any]:
    """Describe what the numbers were measured on."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text("utf-8").splitlines() if cpus.exists() else []
    models = [x.split(":")[1].strip() for x in lines if x.startswith("model name")]
    on_cpu = jax.default_backend() == "cpu"
    return {
        "platform": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "processor": models[0] if models else platform.processor(),
        "architecture": platform.machine(),
        "cpu_count": os.cpu_count(),
        "threads": "one, on one core" if on_cpu else "default",
        "clock": "CPU time of the process" if on_cpu else "wall time, synchronised",
        "python": platform.python_version(),
        "jax": jax.__version__,
        "optax": optax.__version__,
    }


class Program(NamedTuple):
    """A step, and its part in the time of a contender."""

    step: Callable[[Any], Any]  # from a carry to the next, without waiting for it
    share: float = 1.0  # of the contender's steps
    cycle: int = 1  # after how many calls in a row it has done all that it does


class Contender:
    """Programs that hand one carry on, and what the compiler says about them.

    Attributes:
      name: what it is called in the tables.
      costs: FLOPs and bytes, by name; None where they cannot be compared.
      seconds: time per step in each round so far.
    """

    def __init__(
        self,
        name: str,
        programs: Sequence[Program],
        carry: Any,
        costs: dict[str, float | None] | None = None,
    ) -> None:
        """Take the programs and their first carry."""
        self.name, self.costs = name, costs or {}
        self.seconds: list[float] = []
        self._programs, self._carry = programs, carry
        self._repeats = [program.cycle for program in programs]

    def warm_up(self) -> float:
        """Run each program and choose how often to repeat it; return s per step."""
        self.time()
        seconds = self.seconds.pop()
        for i, program in enumerate(self._programs):
            cycles = max(1, round(LOOP / (seconds * program.cycle)))
            self._repeats[i] = program.cycle * cycles
        return seconds

    def time(self) -> None:
        """Time one round, each program having run once before, as in a loop."""
        total = 0.0
        for program, repeats in zip(self._programs, self._repeats, strict=True):
            if program.cycle == 1:
                self._call(program, 1)
            total += program.share * self._call(program, repeats)
        self.seconds.append(total)

    def _call(self, program: Program, n: int) -> float:
        start = _clock()
        for _ in range(n):
            self._carry = program.step(self._carry)
        jax.block_until_ready(self._carry)
        return (_clock() - start) / n


def compare(contenders: Sequence[Contender], rounds: int) -> dict[str, dict[str, Any]]:
    """Time contenders in turn, the first of them as the baseline of the others.

    Returns:
      For each name: milliseconds per step (median over rounds), the ratio to the
      baseline (median and quartiles of the ratios within rounds, so that a machine
      that is slow for a while is slow for both), the number of rounds, fewer where it
      is slow, and costs with their ratios.
    """
    baseline = contenders[0]
    first = [contender.warm_up() for contender in contenders]
    for i in range(rounds):
        for contender, seconds in zip(contenders, first, strict=True):
            if i < SLOW_ROUNDS or seconds <= SLOW * first[0]:
                contender.time()
    rows = {}
    for contender in contenders:
        n = len(contender.seconds)
        ratios = np.divide(contender.seconds, baseline.seconds[:n])
        rows[contender.name] = row = {
            "ms": 1e3 * float(np.median(contender.seconds)),
            "ratio": float(np.median(ratios)),
            "quartiles": np.quantile(ratios, [0.25, 0.75]).tolist(),
            "rounds": n,
        }
        for name, cost in contender.costs.items():
            known = cost is not None and baseline.costs.get(name)
            row[name] = cost
            row[f"{name}_ratio"] = cost / baseline.costs[name] if known else None
    return rows


def _clock() -> float:
    """Read the time: that of this process alone, if it runs pinned to one CPU core."""
    on_cpu = jax.default_backend() == "cpu"
    return time.process_time() if on_cpu else time.perf_counter()
