# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests and doctests."""

import os

# Read when JAX starts. Several CPU devices for the tests that map over devices, and
# little optimisation of machine code: tests compile for longer than they compute. What
# the flag leaves alone are XLA's own passes, and so operations and memory as counted.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_force_host_platform_device_count=8",
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),  # the last of two settings holds
    ]
)

import flax.nnx
import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")

# Programs that tests run.
collect_ignore = ["tests/two_processes.py", "tests/resumable_run.py"]
if not hasattr(flax.nnx, "as_pure"):  # Flax before 0.12
    collect_ignore.append("adahessian_jax/nnx.py")


@pytest.fixture
def x64():
    """Run one test in double precision."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
