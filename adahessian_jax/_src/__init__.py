# SPDX-License-Identifier: Apache-2.0
"""What the public modules are made of; nothing here is part of the interface."""
