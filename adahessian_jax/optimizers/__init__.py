# SPDX-License-Identifier: Apache-2.0
"""Whole optimizers, each in a file of its own."""
