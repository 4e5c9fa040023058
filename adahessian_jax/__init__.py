# SPDX-License-Identifier: Apache-2.0
"""Curvature in an optax training loop: AdaHessian, and what came of it."""

from adahessian_jax import losses, published
from adahessian_jax._src.masking import unmasked
from adahessian_jax.curvature.diagnostics import diagnostics
from adahessian_jax.curvature.eigenvalues import largest_eigenvalues
from adahessian_jax.curvature.estimate import estimate_diagonal
from adahessian_jax.curvature.products import hessian_diag, hvp
from adahessian_jax.estimators.control_variates import ema_control, gauss_newton_control
from adahessian_jax.estimators.eigenbasis import in_eigenbasis
from adahessian_jax.estimators.gauss_newton import gauss_newton
from adahessian_jax.estimators.hutchinson import hutchinson
from adahessian_jax.estimators.low_rank import low_rank_control
from adahessian_jax.estimators.squared_gradient import squared_gradient
from adahessian_jax.fused import value_and_grad_with_curvature
from adahessian_jax.optimizers.adahessian import adahessian
from adahessian_jax.optimizers.newton import newton
from adahessian_jax.optimizers.soap import soap
from adahessian_jax.optimizers.subspace_newton import subspace_newton
from adahessian_jax.transforms.adahessian import scale_by_adahessian
from adahessian_jax.transforms.averaging import block_average, conv_spatial_average
from adahessian_jax.transforms.quadratic_model import scale_by_quadratic_model

__version__ = "0.1.0"

__all__ = [
    "adahessian",
    "block_average",
    "conv_spatial_average",
    "diagnostics",
    "ema_control",
    "estimate_diagonal",
    "gauss_newton",
    "gauss_newton_control",
    "hessian_diag",
    "hutchinson",
    "hvp",
    "in_eigenbasis",
    "largest_eigenvalues",
    "losses",
    "low_rank_control",
    "newton",
    "published",
    "scale_by_adahessian",
    "scale_by_quadratic_model",
    "soap",
    "squared_gradient",
    "subspace_newton",
    "unmasked",
    "value_and_grad_with_curvature",
]
