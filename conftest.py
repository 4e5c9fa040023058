# SPDX-License-Identifier: Apache-2.0
"""Settings for all tests and doctests."""

import os

# Read when JAX starts; the last of two settings of a flag holds. Little optimisation of
# machine code, unless asked for: tests compile for longer than they compute. XLA's own
# passes, and so operations and memory as counted, are as ever. Then several CPU devices
# for the tests that map over devices.
os.environ["XLA_FLAGS"] = " ".join(
    [
        "--xla_backend_optimization_level=0",
        os.environ.get("XLA_FLAGS", ""),
        "--xla_force_host_platform_device_count=8",
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


def pytest_configure(config):
    """Keep what is compiled: the next run takes half the time."""
    if not hasattr(config, "cache"):  # with -p no:cacheprovider
        return
    jax.config.update("jax_compilation_cache_dir", str(config.cache.mkdir("jax")))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


@pytest.fixture(autouse=True, scope="module")
def compiled_programs():
    """Let go of a module's compiled programs once its tests are done.

    Each takes several of the 65,530 memory mappings that Linux allows a process; all of
    them together can be more than that, which ends the process without a message.
    """
    yield
    jax.clear_caches()


@pytest.fixture
def standard_promotion():
    """Run a test as users do, who mix dtypes, and as parts of optax need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture
def x64():
    """Run one test in double precision."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)
