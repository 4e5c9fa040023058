# SPDX-License-Identifier: Apache-2.0
"""How accurate estimators of the Hessian's diagonal are, and at what cost."""
