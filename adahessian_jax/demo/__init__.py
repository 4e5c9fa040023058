# SPDX-License-Identifier: Apache-2.0
"""Curvature beside Adam on small data: ``python -m adahessian_jax.demo --help``."""
