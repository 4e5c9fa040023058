# SPDX-License-Identifier: Apache-2.0
"""Gradient transformations, without a learning rate, one formula a file."""
