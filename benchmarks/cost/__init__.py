# SPDX-License-Identifier: Apache-2.0
"""What a step costs, in steps of Adam."""
