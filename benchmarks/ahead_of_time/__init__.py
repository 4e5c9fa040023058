# SPDX-License-Identifier: Apache-2.0
"""Whole training steps, compiled for accelerators that are not there."""
