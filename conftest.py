# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests and doctests."""

import os

# Several CPU devices for the tests that map over devices; read when JAX starts.
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
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
