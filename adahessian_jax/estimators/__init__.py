# SPDX-License-Identifier: Apache-2.0
"""Estimators of curvature, and their control variates, one a file."""
