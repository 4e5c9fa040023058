# SPDX-License-Identifier: Apache-2.0
"""Hutchinson's estimator of the Hessian's diagonal."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import axes, checks, derivatives, dtypes, probes, xla
from adahessian_jax._src.axes import AxisName
from adahessian_jax._src.estimator import Estimator
from adahessian_jax._src.masking import explain
from adahessian_jax.estimators.control_variates import ControlVariate, multiply

Probe = Callable[[Array, optax.Params], optax.Params]

_PROBES: dict[str, Probe] = {
    "rademacher": probes.rademacher_like,
    "normal": probes.normal_like,
}


class HutchinsonState(NamedTuple):
    """State of Hutchinson's estimator.

    Attributes:
      key: the PRNG key that the next update splits.
      control_variate: the state of the control variate, () without one.
    """

    key: Array
    control_variate: Any


def hutchinson(
    n_samples: int = 1,
    *,
    probe: str | Probe = "rademacher",
    mode: str = "forward-over-reverse",
    control_variate: ControlVariate | None = None,
    seed: int | Array = 0,
    axis_name: AxisName = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate the Hessian's diagonal by Hutchinson's method.

    .. math::
      d = \frac{1}{n} \sum_{s=1}^{n} z_s \odot H z_s, \qquad \mathrm{E} z_s z_s^\top = I

    where :math:`n` is ``n_samples`` and the probes :math:`z_s` are independent. The
    estimate is unbiased. Its variance is :math:`\frac{1}{n} \sum_{j \neq i}
    H_{ij}^2` with Rademacher probes, that is exact if H is diagonal; Gaussian probes
    add :math:`\frac{2}{n} H_{ii}^2`. On a neural network the off-diagonal row norm is
    many times :math:`|H_{ii}|`, so one sample has a relative error of 4 to 15 with a
    few thousand parameters, more with more (``python -m benchmarks.accuracy``): the
    root mean square of such estimates, which AdaHessian divides by, is an estimate of
    the Hessian's *row norms* :math:`(\sum_j H_{ij}^2)^{1/2}` rather than of its
    diagonal. A less noisy estimate is a smaller denominator: lower the learning rate.

    Each sample costs one Hessian-vector product, about two gradients in time (its
    forward pass is shared with a gradient computed in the same ``jit``). All together
    take the memory of a second set of activations, as one does. More than 8 are a loop,
    in which convolutions are an order of magnitude slower on CPU.

    Args:
      n_samples: how many probes are averaged, at least 1.
      probe: ``"rademacher"``, ``"normal"``, or a function ``(key, params) -> probes``
        with uncorrelated entries of mean 0 and variance 1.
      mode: how to differentiate twice, see :func:`adahessian_jax.hvp`.
      control_variate: what is known of H, such as :func:`adahessian_jax.ema_control`.
      seed: an int or a PRNG key, typed or raw, from which all probes follow.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split. Each device then draws probes of its own and the estimates are
        averaged, which has a smaller variance than the same probe on all devices.

    Returns:
      A transformation, for ``estimator`` of :func:`adahessian_jax.scale_by_adahessian`
      and ``hessian_diagonal_fn`` of ``optax.contrib.sophia``. ``update(updates, state,
      params, obj_fn=f)`` ignores the updates and returns the estimate for ``f`` at
      ``params``, of the structure, shapes and dtypes of ``params``, and the new state.

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
      <https://doi.org/10.1016/j.apnum.2007.01.003>`_, 2007, equation 3; Yao et al.,
      `ADAHESSIAN <https://arxiv.org/abs/2006.00719>`_, 2021, section 3.1
    """
    checks.check_int("n_samples", n_samples, 1)
    derivatives.check_mode(mode)
    draw: Any = probe
    if isinstance(probe, str):
        checks.check_choice("probe", probe, _PROBES)
        draw = _PROBES[probe]
    rule = "'rademacher', 'normal' or a callable (key, params) -> probes"
    checks.require(callable(draw), TypeError, "probe", rule, probe)
    known = isinstance(control_variate, ControlVariate | None)
    rule = "None or a ControlVariate, as ema_control() returns"
    checks.require(known, TypeError, "control_variate", rule, control_variate)
    checks.check_seed(seed)
    checks.check_axis_name(axis_name)
    loss = getattr(control_variate, "loss", None)
    kind = f"hutchinson({getattr(control_variate, 'name', '')})"
    arguments = n_samples, draw, mode, control_variate, seed
    return _Hutchinson(axis_name, loss, kind, *arguments).transformation


@dataclasses.dataclass(frozen=True, eq=False)
class _Hutchinson(Estimator):
    """The estimator with the arguments of :func:`hutchinson`."""

    n_samples: int
    draw: Probe
    mode: str
    control_variate: ControlVariate | None
    seed: int | Array

    def init(self, params: optax.Params) -> HutchinsonState:
        checks.check_real("params", params)
        control = self.control_variate
        known = () if control is None else control.init(params)
        return HutchinsonState(probes.as_key(self.seed), known)

    def value_and_grad(
        self, fun: Any, state: HutchinsonState, params: Any, **extra_args: Any
    ) -> tuple[Any, Any, optax.Updates, HutchinsonState]:
        obj_fn = extra_args.pop("obj_fn", None)
        if fun is not None and self.loss is not None:
            extra_args["loss_fn"] = fun
        elif fun is None and obj_fn is not None:
            checks.check_callable("obj_fn", obj_fn, "params -> loss")
            fun = checks.objective("obj_fn", explain("obj_fn", obj_fn, params))
        key, subkey = jax.random.split(state.key)
        axis = self.axis_name
        axes.check_whole(params, axis, along="all")
        params = axes.as_varying(params, axis)
        own_key = axes.axis_key(subkey, axis)
        function = extra_args.get("predict_fn") if fun is None else fun
        shared = function is not None and axes.communicates(function, params, axis)
        sample: Any = functools.partial(self._sample, fun, params, extra_args)
        n = self.n_samples
        unroll = n <= 8

        def add_sample(carry: tuple[Any, Any], keys: Any) -> tuple[Any, None]:
            total, cv_state = carry
            if unroll:  # one after the other, in the memory of one
                keys = xla.after(keys[0], total, otherwise=subkey), keys[1]
            _, d, cv_state = sample(*keys, cv_state)
            return (dtypes.map_floats(jnp.add, total, d), cv_state), None

        own_keys = jax.random.split(own_key, n)
        keys = (jax.random.split(subkey, n) if shared else own_keys), own_keys
        first, rest = [k[0] for k in keys], [k[1:] for k in keys]
        first_pass, total, cv_state = sample(*first, state.control_variate)
        if n > 1:
            carry = total, cv_state
            (total, cv_state), _ = xla.scan(add_sample, carry, rest, unroll=unroll)
        mean = dtypes.map_floats(lambda d: d / n, total)
        diag = xla.materialized(key, axes.mean_over_axis(mean, axis))
        return *first_pass, diag, HutchinsonState(key, cv_state)

    def _sample(
        self, fun: Any, params: Any, extra_args: Any, key: Any, own_key: Any, state: Any
    ) -> tuple[Any, optax.Updates, Any]:
        """Return value and gradient, one sample, and the control variate's state.

        ``key`` is that of the probe: each device's own, as ``own_key`` is, or one for
        all of them, where the function exchanges something between them.
        """
        z = axes.as_varying(self.draw(key, params), self.axis_name)
        checks.check_like("the probe", z, params)
        passes = []  # of value and gradient; control variates multiply once or more

        def product(other: Any = None) -> optax.Updates:
            """Multiply the probe by the Hessian, the objective's by default."""
            objective = fun if other is None else other
            if objective is None:
                raise ValueError(_needs_obj_fn(extra_args))

            def own(params: Any) -> tuple[Array, Any]:
                value, aux = objective(params)
                return axes.as_varying(value, self.axis_name), (value, aux)

            (_, value), grads, y = derivatives.value_grad_and_hvp(
                own, params, z, mode=self.mode
            )
            passes.append((value if other is None else value[1], grads))
            return xla.materialized(key, y)

        if self.control_variate is None:
            diag = multiply(z, product())
        else:
            given = {"params": params, "axis_name": self.axis_name}
            given["key"] = jax.random.fold_in(own_key, 1)
            diag, state = self.control_variate.correct(
                state, z, product, **given, **extra_args
            )
        return passes[0], diag, state


def _needs_obj_fn(extra_args: dict[str, Any]) -> str:
    given = ", ".join(sorted(extra_args.keys() - {"curvature_ema", "updates"}))
    return (
        "hutchinson needs the objective, to differentiate it twice, and got no"
        f" obj_fn{f', only {given}' if given else ''}. Either pass it:"
        " tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p, batch)). Or"
        " pass an estimate of your own to the optimizer: tx.update(grads, state,"
        " params, hessian_diag=diag)."
    )
