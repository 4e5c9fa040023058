# SPDX-License-Identifier: Apache-2.0
"""Settings for the tests of the benchmarks."""

import jax
import pytest


@pytest.fixture(autouse=True)
def standard_promotion():
    """Parts of optax need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield
