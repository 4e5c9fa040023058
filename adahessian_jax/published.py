# SPDX-License-Identifier: Apache-2.0
"""The published AdaHessians, and SOAP, with the arguments that their users know.

Each reproduces recorded runs of its code to rounding: ``tests/test_trajectories.py``.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src.averaging_rule import AveragingRule
from adahessian_jax._src.axes import AxisName
from adahessian_jax._src.checks import check_flag, check_float, check_int, require
from adahessian_jax._src.curvature_average import CurvatureAverage
from adahessian_jax._src.decay_and_rate import (
    decay_after_step,
    decoupled_weight_decay,
    scale_by_rate,
)
from adahessian_jax.estimators.control_variates import ema_control
from adahessian_jax.estimators.hutchinson import Probe, hutchinson
from adahessian_jax.transforms.adahessian import divide_by, scale_by_adahessian
from adahessian_jax.transforms.averaging import conv_spatial_average
from adahessian_jax.transforms.soap import scale_by_soap

Betas = tuple[ArrayLike, ArrayLike]


def paper(
    lr: optax.ScalarOrSchedule = 0.15,
    betas: Betas = (0.9, 0.999),
    eps: ArrayLike = 1e-4,
    weight_decay: ArrayLike = 0.0,
    hessian_power: ArrayLike = 1.0,
    *,
    average_conv_kernel: bool | AveragingRule = True,
    weight_decay_mask: Any = None,
    probe: str | Probe = "rademacher",
    seed: int | Array = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaHessian of the paper and its official code, for images.

    It is :func:`davda54` with an estimate on every step, averages over convolution
    kernels and an ``eps`` of 1e-4.

    Args:
      lr: learning rate, and so on: all as there.
      betas: decay rates.
      eps: added to the denominator.
      weight_decay: decoupled weight decay.
      hessian_power: exponent of the curvature.
      average_conv_kernel: average absolute values over convolution kernels.
      weight_decay_mask: which parameters decay.
      probe: of the estimator.
      seed: an int or a PRNG key.
      axis_name: of devices over which the batch is split.

    Returns:
      As :func:`davda54`.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import adahessian_jax as ah
      >>> tx = ah.published.paper(0.15, weight_decay=5e-4)

    References:
      Yao et al., `ADAHESSIAN <https://arxiv.org/abs/2006.00719>`_, 2021, and
      `amirgholami/adahessian <https://github.com/amirgholami/adahessian>`_
    """
    options = {"weight_decay_mask": weight_decay_mask, "probe": probe, "seed": seed}
    options["axis_name"] = axis_name
    numbers = lr, betas, eps, weight_decay, hessian_power, 1, 1, average_conv_kernel
    return davda54(*numbers, **options)


def davda54(
    lr: optax.ScalarOrSchedule = 0.1,
    betas: Betas = (0.9, 0.999),
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.0,
    hessian_power: ArrayLike = 1.0,
    update_each: int = 1,
    n_samples: int = 1,
    average_conv_kernel: bool | AveragingRule = False,
    *,
    weight_decay_mask: Any = None,
    probe: str | Probe = "rademacher",
    seed: int | Array = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    """AdaHessian of davda54/ada-hessian.

    Args:
      lr: learning rate, a number or a schedule.
      betas: decay rates of the averages of gradient and squared curvature.
      eps: added to the denominator.
      weight_decay: decoupled weight decay.
      hessian_power: exponent of the curvature.
      update_each: estimate on every so many-th update, at least 1. In between the last
        estimate enters the average again.
      n_samples: how many probes an estimate averages, at least 1.
      average_conv_kernel: average absolute values over convolution kernels, by the
        rule :func:`adahessian_jax.conv_spatial_average` or by another that is given.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      probe: as for :func:`adahessian_jax.hutchinson`.
      seed: an int or a PRNG key.
      axis_name: as for :func:`adahessian_jax.hutchinson`.

    Returns:
      A transformation, whose ``update`` takes ``obj_fn``, from parameters to the loss.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import adahessian_jax as ah
      >>> tx = ah.published.davda54(0.1, update_each=10, n_samples=2)

    References:
      David Samuel, `ada-hessian <https://github.com/davda54/ada-hessian>`_, 2020
    """
    check_int("update_each", update_each, 1)
    averaging: Any = average_conv_kernel
    if not callable(averaging):
        check_flag("average_conv_kernel", averaging)
        averaging = conv_spatial_average() if averaging else None
    estimator = hutchinson(n_samples, probe=probe, seed=seed, axis_name=axis_name)
    b1, b2 = _pair(betas)
    parts = b2, "rms", estimator, update_each, 0, averaging, None, eps, hessian_power
    return optax.chain(
        divide_by(CurvatureAverage(*parts, reuse_estimate=True), b1),
        decoupled_weight_decay(weight_decay, weight_decay_mask),
        scale_by_rate(lr, "lr"),
    )


def zack_dugue(
    lr: optax.ScalarOrSchedule = 1e-3,
    betas: Betas = (0.9, 0.999),
    eps: ArrayLike = 1e-8,
    wd: ArrayLike = 0.0,
    *,
    control_variate: bool = False,
    mc_iters: int = 1,
    weight_decay_mask: Any = None,
    probe: str | Probe = "normal",
    seed: int | Array = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""AdaHessian of Zack-Dugue/AdaHessian, which averages the Hessian itself.

    It divides by the square root of the average's absolute value, and multiplies the
    step by :math:`1 - \beta_1^t` where Adam divides.

    Args:
      lr: learning rate, a number or a schedule.
      betas: decay rates of the averages of gradient and curvature.
      eps: added to the denominator.
      wd: decoupled weight decay.
      control_variate: subtract the average from the product, as the code can, which
        biases it: see :func:`adahessian_jax.ema_control`.
      mc_iters: how many probes an estimate averages, at least 1.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.
      probe: Gaussian, as in the code; its text says Rademacher.
      seed: an int or a PRNG key.
      axis_name: as for :func:`adahessian_jax.hutchinson`.

    Returns:
      A transformation, whose ``update`` takes ``obj_fn``, from parameters to the loss.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import adahessian_jax as ah
      >>> tx = ah.published.zack_dugue(1e-3)

    References:
      Zack Dugue, `AdaHessian <https://github.com/Zack-Dugue/AdaHessian>`_, 2023
    """
    check_int("mc_iters", mc_iters, 1)
    check_flag("control_variate", control_variate)
    control = ema_control(unbiased=False) if control_variate else None
    estimator = hutchinson(
        mc_iters, probe=probe, control_variate=control, seed=seed, axis_name=axis_name
    )
    b1, b2 = _pair(betas)

    def warm_up(count: Array) -> Array:
        steps = count.astype(jax.dtypes.canonicalize_dtype("float64")) + 1
        return (1 - jnp.asarray(b1, steps.dtype) ** steps) ** 2

    return optax.chain(
        scale_by_adahessian(
            b1, b2, eps, hessian_ema="mean", hessian_power=0.5, estimator=estimator
        ),
        optax.scale_by_schedule(warm_up),
        decoupled_weight_decay(wd, weight_decay_mask, "wd"),
        scale_by_rate(lr, "lr"),
    )


def soap(
    lr: optax.ScalarOrSchedule = 3e-3,
    betas: Betas = (0.95, 0.95),
    shampoo_beta: ArrayLike | None = None,
    eps: ArrayLike = 1e-8,
    weight_decay: ArrayLike = 0.01,
    precondition_frequency: int = 10,
    max_precond_dim: int = 10_000,
    precondition_1d: bool = False,
    *,
    weight_decay_mask: Any = None,
) -> optax.GradientTransformation:
    """SOAP of nikhilvyas/SOAP: Adam in turned axes, which needs no curvature.

    Args:
      lr: learning rate, a number or a schedule.
      betas: decay rates of the averages of the gradient and its square.
      shampoo_beta: of those that the axes are turned by; None for the second of these.
      eps: added to the denominator.
      weight_decay: decoupled, of the parameter after its step, as in the code.
      precondition_frequency: turn the axes on every so many-th update.
      max_precond_dim: longer axes are not turned.
      precondition_1d: turn tensors of one axis, too.
      weight_decay_mask: which parameters decay, as in ``optax.adamw``.

    Returns:
      A transformation. Its first update is 0 and only starts the axes, as in the code.

    Raises:
      ValueError: if an argument is out of range.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import adahessian_jax as ah
      >>> tx = ah.published.soap(3e-3)

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024, and
      `nikhilvyas/SOAP <https://github.com/nikhilvyas/SOAP>`_
    """
    check_int("precondition_frequency", precondition_frequency, 1)
    check_int("max_precond_dim", max_precond_dim, 1)
    check_flag("precondition_1d", precondition_1d)
    if shampoo_beta is not None:
        check_float("shampoo_beta", shampoo_beta, 0.0, 1.0)
    b1, b2 = _pair(betas)
    options: dict[str, Any] = {"every": precondition_frequency, "decay": shampoo_beta}
    options |= {"max_dim": max_precond_dim, "turn_vectors": precondition_1d}
    decay = decoupled_weight_decay(weight_decay, weight_decay_mask)
    rate = scale_by_rate(lr, "lr")
    scale = scale_by_soap(b1, b2, eps, **options)
    return optax.chain(scale, rate, decay_after_step(decay, rate))


def _pair(betas: Any) -> Any:
    is_pair = isinstance(betas, tuple | list) and len(betas) == 2
    require(is_pair, TypeError, "betas", "a pair of decay rates", betas)
    for i, beta in enumerate(betas):
        check_float(f"betas[{i}]", beta, 0.0, 1.0)
    return betas
