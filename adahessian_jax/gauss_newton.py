# SPDX-License-Identifier: Apache-2.0
"""Estimators of the diagonal of the Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.axes import AxisName, as_varying, axis_key
from adahessian_jax.checks import (
    check_axis_name,
    check_choice,
    check_int,
    check_params,
    check_real,
    check_seed,
)
from adahessian_jax.hvp import Floats
from adahessian_jax.linearized import (
    LinearizedModel,
    gauss_newton_factor,
    linearize,
    linearize_with_loss,
    squared,
    wide,
)
from adahessian_jax.output_losses import OutputLoss, as_output_loss, row_weights
from adahessian_jax.probes import as_key, rademacher_like
from adahessian_jax.protocol import CurvatureEstimator


class GaussNewtonState(NamedTuple):
    """State of a Gauss-Newton estimator.

    Attributes:
      key: the PRNG key that the next update splits.
    """

    key: jax.Array


def gauss_newton(
    loss: str | Callable[..., jax.Array],
    *,
    n_samples: int = 1,
    method: str = "factor",
    reduction: str = "mean",
    event_ndim: int = 1,
    seed: int | jax.Array = 0,
    axis_name: AxisName = None,
) -> CurvatureEstimator:
    r"""Estimate the diagonal of the Gauss-Newton matrix from a network's outputs.

    For a loss :math:`\sum_r w_r \ell(f_r)` of the rows :math:`f_r` of a network's
    outputs, with Jacobians :math:`J_r` and :math:`\nabla^2 \ell(f_r) = S_r S_r^\top`,
    the generalised Gauss-Newton matrix is
    :math:`G = \sum_r w_r J_r^\top S_r S_r^\top J_r`. The estimate is

    .. math::
      d = g \odot g, \qquad
      g = \sum_r \sqrt{w_r} \, J_r^\top S_r u_r

    with random signs :math:`u_r`. It is unbiased for diag G and never negative. With
    one sample the variance of each entry is at most :math:`2 G_{ii}^2`, because
    :math:`\mathrm{E}\, g_i^4 \leq 3 (\mathrm{E}\, g_i^2)^2` for a sum of independent
    signs: a relative error of at most :math:`\sqrt{2}` whatever the network, where
    Hutchinson's estimator has 4 to 15 on networks of a few thousand parameters and 11
    to 46 at 200,000 (``benchmarks/estimator_accuracy.py``). For networks that are
    piecewise linear in each parameter separately (ReLU, max-pooling, no
    normalisation), diag G is the Hessian's diagonal exactly.

    The cost of a sample is one pullback of the outputs, two thirds of a gradient, where
    a gradient of the same batch is computed in the same ``jit`` and shares the forward
    pass; no Jacobian is formed, and the extra memory is that of one array of outputs.

    Args:
      loss: the name of the loss in optax, or a function of one row.

        - ``"softmax_cross_entropy"``: outputs are logits, classes along the last axis;
          integer or dense labels, smoothed or not (the factor does not depend on them).
        - ``"sigmoid_binary_cross_entropy"``: every output is a logit.
        - ``"squared_error"``, :math:`(f - y)^2`, or ``"l2_loss"``,
          :math:`(f - y)^2 / 2`, of every output.
        - ``"poisson_nll_loss"``: every output is a logarithmic rate,
          :math:`e^f - y f`.
        - a function ``row -> scalar``, or ``(row, target) -> scalar`` if ``update`` is
          given ``targets``. It must be convex in the row.
      n_samples: how many estimates are averaged, at least 1.
      method: ``"factor"`` as above; ``"hutchinson"``, Hutchinson's estimator of G
        itself, for comparison and for losses without a factor; ``"sampled-labels"``,
        the gradient for labels drawn from the model in place of S u, as in Sophia-G:
        the same mean, but far noisier where the model is confident.
      reduction: ``"mean"`` if the objective is the mean of the losses of the rows
        (weighted: the sum of weight times loss over the sum of weights), ``"sum"`` if
        it is their sum. Every element is a row for the losses "of every output".
      event_ndim: for a loss given as a function, 1 if a row is the last axis of the
        outputs, 0 if every element is a row.
      seed: an int or a PRNG key, typed or raw.
      axis_name: name of a ``jax.pmap`` or ``jax.shard_map`` axis over which the batch
        is split; means are then those of the whole batch, and each device draws signs
        of its own.

    Returns:
      A transformation. ``update(updates, state, params, predict_fn=h)`` ignores the
      updates and returns the estimate at ``params``, of the structure, shapes and
      dtypes of ``params``, and the new state. ``h`` maps parameters to the outputs, or
      to ``(outputs, weights)`` with weights of the shape of the leading axes of the
      outputs, zero for rows that are masked.

    Raises:
      ValueError: if an argument is out of range or unknown; at update, if ``params`` or
        ``predict_fn`` is missing or weights do not match the outputs; outside ``jit``
        also if outputs are NaN, weights negative or the loss not convex. Inside
        ``jit``, ``jax.experimental.checkify.checkify`` brings the latter to light if
        the step is traced under ``jax.enable_checks(True)``.
      TypeError: if an argument is of the wrong type, or a parameter is complex.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x = jnp.array([[1.0, 2.0], [3.0, 4.0]])
      >>> estimator = ah.gauss_newton("l2_loss", reduction="sum")
      >>> w = jnp.array([[1.0], [1.0]])
      >>> d, _ = estimator.update(
      ...   None, estimator.init(w), w, predict_fn=lambda w: x @ w)
      >>> bool(jnp.all(d >= 0))  # of mean diag(x.T @ x) = [10, 20]
      True

    References:
      Martens, `New insights and perspectives on the natural gradient method
      <https://arxiv.org/abs/1412.1193>`_, 2020, section 8

      Martens, Sutskever and Swersky, `Estimating the Hessian by Back-propagating
      Curvature <https://arxiv.org/abs/1206.6464>`_, 2012

      Liu et al., `Sophia <https://arxiv.org/abs/2305.14342>`_, 2023, section 2.3, for
      ``"sampled-labels"``

    .. note::
      The scale matters. If your objective is a sum, or a mean over other rows than
      these, say so by ``reduction`` and weights: for outputs (B, D) and an objective
      that is the mean over B of the sum over D of squared errors, use
      ``reduction="sum"`` and return ``(outputs, jnp.full(B, 1 / B))``.
      :func:`adahessian_jax.check_output_loss` tests the agreement.
    """
    output_loss = as_output_loss(loss, event_ndim)
    check_int("n_samples", n_samples, 1)
    check_choice("method", method, _METHODS)
    check_choice("reduction", reduction, ("mean", "sum"))
    if method == "sampled-labels" and output_loss.sampled_gradient is None:
        raise ValueError(
            "method='sampled-labels' needs a loss that is the likelihood of a known"
            " distribution, one of those with a name, got a function."
        )
    check_seed(seed)
    check_axis_name(axis_name)
    factor = None
    if method == "factor" and n_samples == 1:
        factor = _estimator(
            gauss_newton_factor, output_loss, n_samples, reduction, seed, axis_name
        )
    return _estimator(
        _METHODS[method], output_loss, n_samples, reduction, seed, axis_name, factor
    )


Sample = Callable[[jax.Array, OutputLoss, LinearizedModel, jax.Array, Any], Floats]


def _estimator(
    sample: Sample,
    output_loss: OutputLoss,
    n_samples: int,
    reduction: str,
    seed: int | jax.Array,
    axis_name: AxisName,
    factor: CurvatureEstimator | None = None,
) -> CurvatureEstimator:
    """Return an estimator that averages samples."""

    def init_fn(params: optax.Params) -> GaussNewtonState:
        check_real("params", params)
        return GaussNewtonState(as_key(seed))

    def update_fn(
        updates: optax.Updates,
        state: GaussNewtonState,
        params: optax.Params | None = None,
        *,
        predict_fn: Callable[[optax.Params], Any] | None = None,
        targets: Any = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, GaussNewtonState]:
        del updates, extra_args
        check_params(params)
        key, keys = split_keys(state)
        model = linearize(predict_fn, as_varying(params, axis_name))
        return estimate(keys, model, targets), GaussNewtonState(key)

    def value_and_grad(
        fun: Callable[[optax.Params], Any],
        state: GaussNewtonState,
        params: optax.Params,
        *,
        has_aux: bool = False,
        targets: Any = None,
        **extra_args: Any,
    ) -> tuple[Any, optax.Updates, optax.Updates, GaussNewtonState]:
        del extra_args
        key, keys = split_keys(state)
        params = as_varying(params, axis_name)
        model = linearize_with_loss(fun, params, has_aux=has_aux)
        grads = model.as_params(model.gradient())
        diag = estimate(keys, model, targets)
        return model.value, grads, diag, GaussNewtonState(key)

    def split_keys(state: GaussNewtonState) -> tuple[jax.Array, jax.Array]:
        key, subkey = jax.random.split(state.key)
        return key, jax.random.split(axis_key(subkey, axis_name), n_samples)

    def estimate(keys: jax.Array, model: LinearizedModel, targets: Any) -> Any:
        weights = row_weights(
            model.outputs, model.weights, output_loss.event_ndim, reduction, axis_name
        )
        samples = [sample(key, output_loss, model, weights, targets) for key in keys]
        mean = [sum(d[1:], start=d[0]) / n_samples for d in zip(*samples, strict=True)]
        if axis_name is not None:
            mean = jax.lax.psum(mean, axis_name)
        return model.as_params(mean)

    return CurvatureEstimator(
        init_fn,
        update_fn,
        value_and_grad,
        needs_outputs=True,
        axis_name=axis_name,
        factor=factor,
    )


def _sampled_labels_estimate(
    key: jax.Array,
    output_loss: OutputLoss,
    model: LinearizedModel,
    weights: jax.Array,
    targets: Any,
) -> Floats:
    del targets
    assert output_loss.sampled_gradient is not None
    gradient = output_loss.sampled_gradient(key, wide(model.outputs))
    return squared(model.pullback(gradient * jnp.sqrt(weights)))


def _hutchinson_estimate(
    key: jax.Array,
    output_loss: OutputLoss,
    model: LinearizedModel,
    weights: jax.Array,
    targets: Any,
) -> Floats:
    z = rademacher_like(key, model.floats)
    tangent = wide(model.pushforward(z))
    product = output_loss.product(wide(model.outputs), tangent, targets)
    columns = model.pullback(product * weights)
    return [wide(a) * wide(b) for a, b in zip(z, columns, strict=True)]


_METHODS = {
    "factor": lambda *args: squared(gauss_newton_factor(*args)),
    "hutchinson": _hutchinson_estimate,
    "sampled-labels": _sampled_labels_estimate,
}
