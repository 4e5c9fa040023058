# SPDX-License-Identifier: Apache-2.0
"""Estimators of the Hessian's diagonal, in the form of optax transformations."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.axes import AxisName, as_varying, axis_key, mean_over_axis
from adahessian_jax.checks import (
    check_axis_name,
    check_callable,
    check_choice,
    check_flag,
    check_int,
    check_like,
    check_params,
    check_real,
    check_seed,
    scalar_function,
)
from adahessian_jax.control_variates import ControlVariate, multiply
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax.hvp import check_mode, value_grad_and_hvp
from adahessian_jax.masking import explain_masked
from adahessian_jax.probes import as_key, normal_like, rademacher_like
from adahessian_jax.protocol import CurvatureEstimator

Probe = Callable[[jax.Array, optax.Params], optax.Params]

_PROBES: dict[str, Probe] = {"rademacher": rademacher_like, "normal": normal_like}


class HutchinsonState(NamedTuple):
    """State of Hutchinson's estimator.

    Attributes:
      key: the PRNG key that the next update splits.
      control_variate: the state of the control variate, () without one.
    """

    key: jax.Array
    control_variate: Any


def hutchinson(
    n_samples: int = 1,
    *,
    probe: str | Probe = "rademacher",
    mode: str = "forward-over-reverse",
    control_variate: ControlVariate | None = None,
    seed: int | jax.Array = 0,
    axis_name: AxisName = None,
    unroll: bool | None = None,
) -> CurvatureEstimator:
    r"""Estimate the Hessian's diagonal by Hutchinson's method.

    .. math::
      d = \frac{1}{n} \sum_{s=1}^{n} z_s \odot H z_s,
      \qquad \mathrm{E}\, z_s z_s^\top = I

    where :math:`n` is ``n_samples`` and the probes :math:`z_s` are independent.
    The estimate is unbiased. Its variance is :math:`\frac{1}{n} \sum_{j \neq i}
    H_{ij}^2` with Rademacher probes, that is exact if H is diagonal; Gaussian probes
    add :math:`\frac{2}{n} H_{ii}^2`. On a neural network the off-diagonal row norm is
    many times :math:`|H_{ii}|`, so one sample has a relative error of 4 to 15 with a
    few thousand parameters, more with more (``benchmarks/estimator_accuracy.py``): the
    root mean square of such estimates, which AdaHessian divides by, is an estimate of
    the Hessian's *row norms* :math:`(\sum_j H_{ij}^2)^{1/2}` rather than of its
    diagonal. A less noisy estimate is a smaller denominator: lower the learning rate.

    The result is an ``optax.GradientTransformationExtraArgs`` whose ``update`` returns
    the diagonal in place of the updates, so it serves as ``estimator`` of
    :func:`adahessian_jax.scale_by_adahessian` and as ``hessian_diagonal_fn`` of
    ``optax.contrib.sophia``. Each sample costs one Hessian-vector product, about two
    gradients in time (its forward pass is shared with a gradient computed in the same
    ``jit``), and the memory of a second set of activations.

    Args:
      n_samples: how many probes are averaged, at least 1.
      probe: ``"rademacher"``, ``"normal"``, or a function ``(key, params) -> probes``
        with uncorrelated entries of mean 0 and variance 1.
      mode: how to differentiate twice, see :func:`adahessian_jax.hvp`.
      control_variate: what is known of the Hessian beforehand, for example
        :func:`adahessian_jax.ema_control`.
      seed: an int or a PRNG key, typed or raw, from which all probes follow.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split. Each device then draws probes of its own and the estimates are
        averaged over the axis, which has a smaller variance than the same probe on
        all devices.
      unroll: how several samples are compiled: True, one after the other; False, the
        first and a ``jax.lax.scan`` over the rest, which compiles faster. Both need
        the memory of one sample. None unrolls up to 8 samples, and any number if the
        objective has convolutions and runs on CPU, where those are an order of
        magnitude slower inside a loop.

    Returns:
      A transformation. ``update(updates, state, params, obj_fn=f)`` ignores the
      updates and returns the estimate for ``f`` at ``params``, of the structure,
      shapes and dtypes of ``params``, and the new state.

    Raises:
      ValueError: if ``n_samples`` < 1 or ``probe`` or ``mode`` is unknown; at update,
        if ``params`` or ``obj_fn`` is missing.
      TypeError: if an argument is of the wrong type, or ``obj_fn`` does not return a
        real scalar, or a parameter is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> params = jnp.array([1.0, 2.0])
      >>> estimator = ah.hutchinson(seed=1)
      >>> state = estimator.init(params)
      >>> diag, state = estimator.update(
      ...   None, state, params, obj_fn=lambda w: jnp.sum(w**3))  # H = diag(6 w)
      >>> diag.tolist()
      [6.0, 12.0]

    References:
      Bekas, Kokiopoulou and Saad, `An estimator for the diagonal of a matrix
      <https://doi.org/10.1016/j.apnum.2007.01.003>`_, 2007, equation 3

      Yao et al., `ADAHESSIAN: An Adaptive Second Order Optimizer for Machine Learning
      <https://arxiv.org/abs/2006.00719>`_, 2021, section 3.1
    """
    check_int("n_samples", n_samples, 1)
    check_mode(mode)
    if isinstance(probe, str):
        check_choice("probe", probe, _PROBES)
        draw = _PROBES[probe]
    elif callable(probe):
        draw = probe
    else:
        raise TypeError(
            "probe must be 'rademacher', 'normal' or a callable (key, params) ->"
            f" probes, got {probe!r}."
        )
    if not isinstance(control_variate, ControlVariate | None):
        raise TypeError(
            "control_variate must be None or a ControlVariate, as ema_control()"
            f" returns, got {control_variate!r}."
        )
    check_seed(seed)
    check_axis_name(axis_name)
    if unroll is not None:
        check_flag("unroll", unroll)

    needs_outputs = control_variate is not None and control_variate.needs_outputs

    def init_fn(params: optax.Params) -> HutchinsonState:
        check_real("params", params)
        return HutchinsonState(
            key=as_key(seed),
            control_variate=control_variate.init(params) if control_variate else (),
        )

    def update_fn(
        updates: optax.Updates,
        state: HutchinsonState,
        params: optax.Params | None = None,
        *,
        obj_fn: Callable[[optax.Params], jax.Array] | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, HutchinsonState]:
        del updates
        check_params(params)
        objective = None if obj_fn is None else _checked_objective(obj_fn, params)
        _, diag, state = estimate(objective, state, params, False, extra_args)
        return diag, state

    def value_and_grad(
        fun: Callable[[optax.Params], Any],
        state: HutchinsonState,
        params: optax.Params,
        *,
        has_aux: bool = False,
        **extra_args: Any,
    ) -> tuple[Any, optax.Updates, optax.Updates, HutchinsonState]:
        if needs_outputs:
            extra_args = {**extra_args, "loss_fn": fun, "has_aux": has_aux}
        passes, diag, state = estimate(fun, state, params, has_aux, extra_args)
        return *passes[0], diag, state

    def estimate(
        fun: Callable[[optax.Params], Any] | None,
        state: HutchinsonState,
        params: optax.Params,
        has_aux: bool,
        extra_args: dict[str, Any],
    ) -> tuple[list[Any], optax.Updates, HutchinsonState]:
        """Return values and gradients of the passes over ``fun``, and the estimate."""
        key, subkey = jax.random.split(state.key)
        params = as_varying(params, axis_name)
        passes: list[Any] = []

        def one_sample(key: jax.Array, cv_state: Any) -> tuple[optax.Updates, Any]:
            z = draw(key, params)
            check_like("the probe", z, params)

            def product(
                other: Callable[[optax.Params], tuple[jax.Array, Any]] | None = None,
            ) -> optax.Updates:
                """Multiply the probe by the Hessian, the objective's by default."""
                if other is not None:
                    (_, value), grads, y = value_grad_and_hvp(
                        other, params, z, mode=mode, has_aux=True
                    )
                elif fun is not None:
                    value, grads, y = value_grad_and_hvp(
                        fun, params, z, mode=mode, has_aux=has_aux
                    )
                else:
                    raise ValueError(_needs_obj_fn(extra_args))
                passes.append((value, grads))
                return _materialized(key, y)

            if control_variate is None:
                return multiply(z, product()), cv_state
            return control_variate.correct(
                cv_state,
                z,
                product,
                params=params,
                key=jax.random.fold_in(key, 1),
                axis_name=axis_name,
                **extra_args,
            )

        keys = jax.random.split(axis_key(subkey, axis_name), n_samples)
        total, cv_state = one_sample(keys[0], state.control_variate)

        def add_sample(carry: tuple[Any, Any], key: jax.Array) -> tuple[Any, None]:
            total, cv_state = carry
            d, cv_state = one_sample(key, cv_state)
            return (jax.tree.map(_add, total, d), cv_state), None

        if n_samples > 1:
            total = jax.tree.map(_widened, total)
        objective = extra_args.get("predict_fn") if fun is None else fun
        if _unrolled(n_samples, objective, params) if unroll is None else unroll:
            for sample_key in keys[1:]:
                ready = _after(sample_key, total, otherwise=subkey)
                (total, cv_state), _ = add_sample((total, cv_state), ready)
        else:
            (total, cv_state), _ = jax.lax.scan(add_sample, (total, cv_state), keys[1:])
        diag = jax.tree.map(
            lambda d, p: (d / n_samples).astype(p.dtype) if is_differentiable(d) else d,
            total,
            params,
        )
        diag = _materialized(key, mean_over_axis(diag, axis_name))
        return passes[:1], diag, HutchinsonState(key=key, control_variate=cv_state)

    return CurvatureEstimator(
        init_fn,
        update_fn,
        value_and_grad,
        needs_outputs=needs_outputs,
        axis_name=axis_name,
    )


def _checked_objective(
    obj_fn: Any, params: optax.Params
) -> Callable[[optax.Params], jax.Array]:
    check_callable("obj_fn", obj_fn, "params -> loss")
    return scalar_function("obj_fn", explain_masked("obj_fn", obj_fn, params))


def _needs_obj_fn(extra_args: dict[str, Any]) -> str:
    given = ", ".join(sorted(extra_args.keys() - {"hessian_ema"}))
    return (
        "hutchinson needs the objective, to differentiate it twice, and got no"
        f" obj_fn{f', only {given}' if given else ''}. Either pass it:"
        " tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p, batch)). Or"
        " pass an estimate of your own to the optimizer: tx.update(grads, state,"
        " params, hessian_diag=diag)."
    )


def _unrolled(n_samples: int, objective: Any, params: optax.Params) -> bool:
    if n_samples <= 8:
        return True
    if jax.default_backend() != "cpu":
        return False
    # XLA's CPU compiler leaves convolutions inside loops in their slowest form.
    return "conv_general_dilated" in str(jax.make_jaxpr(objective)(params))


def _materialized(key: jax.Array, tree: optax.Updates) -> optax.Updates:
    """Return a tree, on CPU in a way that it is written out before it is used.

    For a layer amid a network, the product is the transpose of a sum. XLA's CPU
    compiler fuses that into what the optimizer does with it, which then reads memory in
    strides: a fifth of the time of an MLP's step. And it would multiply by the probe,
    unpacked from its bits, in every place where the estimate is used. The operands of a
    loop it leaves alone.
    """
    if jax.default_backend() != "cpu":
        return tree
    # Never true, but the compiler cannot know.
    never = jax.random.key_data(key).ravel()[0].astype(jnp.float32) > jnp.inf

    def through_loop(x: jax.Array) -> jax.Array:
        return _through_loop(x, never) if x.ndim > 1 and is_differentiable(x) else x

    return jax.tree.map(through_loop, tree)


@jax.custom_jvp
def _through_loop(x: jax.Array, never: jax.Array) -> jax.Array:
    return jax.lax.while_loop(
        lambda carry: carry[1],
        lambda carry: (carry[0][::-1], jnp.zeros_like(carry[1])),
        (x, never),
    )[0]


@_through_loop.defjvp
def _through_loop_jvp(primals: Any, tangents: Any) -> Any:
    return _through_loop(*primals), tangents[0]


def _after(key: jax.Array, done: optax.Updates, *, otherwise: jax.Array) -> jax.Array:
    """Return ``key``, in a way that it cannot be known before ``done``.

    The compiler would otherwise interleave the samples, whose memory then adds up.
    """
    leaves = [x for x in jax.tree.leaves(done) if is_differentiable(x) and x.size]
    if not leaves:
        return key
    # Never true, but the compiler cannot know.
    never = jnp.any(jnp.stack([x[(0,) * x.ndim] > jnp.inf for x in leaves]))
    return jnp.where(never, otherwise, key)


def _widened(d: jax.Array) -> jax.Array:
    return d.astype(accumulation_dtype(d)) if is_differentiable(d) else d


def _add(total: jax.Array, d: jax.Array) -> jax.Array:
    return total + d.astype(total.dtype) if is_differentiable(d) else total
