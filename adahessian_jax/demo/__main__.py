# SPDX-License-Identifier: Apache-2.0
"""Entry point of ``python -m adahessian_jax.demo``."""

from adahessian_jax.demo.cli import main

if __name__ == "__main__":
    main()
