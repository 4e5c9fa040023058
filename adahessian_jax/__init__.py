# SPDX-License-Identifier: Apache-2.0
"""AdaHessian for optax, and estimators of the Hessian's diagonal."""

from adahessian_jax.averaging import block_average as block_average
from adahessian_jax.averaging import conv_spatial_average as conv_spatial_average
from adahessian_jax.control_variates import ControlVariate as ControlVariate
from adahessian_jax.control_variates import ema_control as ema_control
from adahessian_jax.control_variates import gauss_newton_control as gauss_newton_control
from adahessian_jax.diagnostics import diagnostics as diagnostics
from adahessian_jax.eigenbasis import EigenbasisState as EigenbasisState
from adahessian_jax.eigenbasis import in_eigenbasis as in_eigenbasis
from adahessian_jax.estimators import HutchinsonState as HutchinsonState
from adahessian_jax.estimators import hutchinson as hutchinson
from adahessian_jax.fused import (
    value_and_grad_with_curvature as value_and_grad_with_curvature,
)
from adahessian_jax.gauss_newton import GaussNewtonState as GaussNewtonState
from adahessian_jax.gauss_newton import gauss_newton as gauss_newton
from adahessian_jax.hvp import hessian_diag as hessian_diag
from adahessian_jax.hvp import hvp as hvp
from adahessian_jax.low_rank import LowRankState as LowRankState
from adahessian_jax.low_rank import low_rank_control as low_rank_control
from adahessian_jax.masking import unmasked as unmasked
from adahessian_jax.microbatches import microbatched as microbatched
from adahessian_jax.moving_average import HessianEMA as HessianEMA
from adahessian_jax.optimizers import adahessian as adahessian
from adahessian_jax.output_losses import check_output_loss as check_output_loss
from adahessian_jax.probes import normal_like as normal_like
from adahessian_jax.probes import rademacher_like as rademacher_like
from adahessian_jax.protocol import Curvature as Curvature
from adahessian_jax.protocol import CurvatureEstimator as CurvatureEstimator
from adahessian_jax.quadratic_model import (
    ScaleByQuadraticModelState as ScaleByQuadraticModelState,
)
from adahessian_jax.quadratic_model import (
    scale_by_quadratic_model as scale_by_quadratic_model,
)
from adahessian_jax.relative_curvature import (
    scale_by_relative_curvature as scale_by_relative_curvature,
)
from adahessian_jax.state import ScaleByAdaHessianState as ScaleByAdaHessianState
from adahessian_jax.state import (
    ScaleByRelativeCurvatureState as ScaleByRelativeCurvatureState,
)
from adahessian_jax.transform import scale_by_adahessian as scale_by_adahessian

__version__ = "0.1.0"

__all__ = [
    "ControlVariate",
    "Curvature",
    "CurvatureEstimator",
    "EigenbasisState",
    "GaussNewtonState",
    "HessianEMA",
    "HutchinsonState",
    "LowRankState",
    "ScaleByAdaHessianState",
    "ScaleByQuadraticModelState",
    "ScaleByRelativeCurvatureState",
    "adahessian",
    "block_average",
    "check_output_loss",
    "conv_spatial_average",
    "diagnostics",
    "ema_control",
    "gauss_newton",
    "gauss_newton_control",
    "hessian_diag",
    "hutchinson",
    "hvp",
    "in_eigenbasis",
    "low_rank_control",
    "microbatched",
    "normal_like",
    "rademacher_like",
    "scale_by_adahessian",
    "scale_by_quadratic_model",
    "scale_by_relative_curvature",
    "unmasked",
    "value_and_grad_with_curvature",
]
