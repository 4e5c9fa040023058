# SPDX-License-Identifier: Apache-2.0
"""Training with and without curvature, on tasks with real data and tuned baselines."""
