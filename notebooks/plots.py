# SPDX-License-Identifier: Apache-2.0
"""How the notebooks draw: a colour means the same optimizer or estimator in all."""

import matplotlib.pyplot as plt

# Apart for every kind of colour vision (Okabe and Ito), and dark enough on white.
BLACK, GREY, BLUE, SKY = "#222222", "#8a8a8a", "#0072b2", "#56b4e9"
VERMILION, GREEN, PURPLE, AMBER = "#d55e00", "#009e73", "#aa4499", "#cc8a00"

OPTIMIZERS = {
    "SGD": GREY,
    "Adam": VERMILION,
    "AdamW": VERMILION,
    "Sophia": AMBER,
    "L-BFGS": BLACK,
    "AdaHessian": BLUE,
    "AdaHessian, Gauss-Newton": GREEN,
    "newton": PURPLE,
    "newton, own rate": SKY,
    "subspace_newton": SKY,
}
ESTIMATORS = {
    "optax's Hutchinson": BLACK,
    "hutchinson": BLUE,
    "hutchinson, 2 samples": SKY,
    "low_rank_control": AMBER,
    "gauss_newton_control": PURPLE,
    "gauss_newton": GREEN,
}


def use_style() -> None:
    """Make matplotlib's figures small, legible and without clutter."""
    plt.rcParams.update(
        {
            "figure.figsize": (7, 3.2),
            "figure.dpi": 90,
            "figure.constrained_layout.use": True,
            "axes.grid": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.3,
            "font.size": 10,
            "legend.frameon": False,
            "lines.linewidth": 1.8,
        }
    )
