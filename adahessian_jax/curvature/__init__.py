# SPDX-License-Identifier: Apache-2.0
"""Curvature to look at: products, eigenvalues, diagonals with their error."""
