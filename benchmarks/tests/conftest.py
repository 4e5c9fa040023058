# SPDX-License-Identifier: Apache-2.0
"""Settings for the tests of the benchmarks."""

import pytest


@pytest.fixture(autouse=True)
def as_run(standard_promotion):
    """Benchmarks run with JAX's default settings."""
