# SPDX-License-Identifier: Apache-2.0
"""A network linearised at its parameters, and the factor of its Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from adahessian_jax.checks import check_callable, check_scalar, raise_if
from adahessian_jax.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax.hvp import Floats, split_differentiable
from adahessian_jax.masking import explain_masked
from adahessian_jax.output_losses import OutputLoss
from adahessian_jax.probes import rademacher_like


class LinearizedModel(NamedTuple):
    """A network's outputs at some parameters, and its Jacobian as two functions.

    Tangents and cotangents of the parameters are lists of the floating-point leaves.
    ``evaluate`` maps parameters to loss, outputs and value, where ``value`` is the loss
    or ``(loss, aux)``.
    """

    evaluate: Callable[[optax.Params], tuple[jax.Array, jax.Array, Any]]
    value: Any
    gradient: Callable[[], Floats]
    outputs: jax.Array
    weights: jax.Array | None
    pullback: Callable[[jax.Array], Floats]
    pushforward: Callable[[Floats], jax.Array]
    floats: Floats
    as_params: Callable[[Floats], optax.Params]


def linearize(
    predict_fn: Callable[[optax.Params], Any] | None, params: optax.Params
) -> LinearizedModel:
    """Evaluate a network and prepare products with its Jacobian."""
    if predict_fn is None:
        raise ValueError(
            "Gauss-Newton needs the network's outputs and got no predict_fn. Pass a"
            " function of the parameters: tx.update(grads, state, params,"
            " predict_fn=lambda p: model.apply(p, x)). Where only the loss is at hand,"
            " use hutchinson, which takes obj_fn."
        )
    explained = _explained(predict_fn, params)

    def with_loss_of_zero(params: optax.Params) -> Any:
        return jnp.zeros(()), explained(params)

    return linearize_with_loss(with_loss_of_zero, params, name="predict_fn")


def push_forward(
    predict_fn: Callable[[optax.Params], Any], params: optax.Params, tangents: Floats
) -> tuple[jax.Array, jax.Array | None, jax.Array]:
    """Evaluate a network, and multiply its Jacobian by one vector.

    Returns:
      The outputs, the weights of their rows if ``predict_fn`` returns any, and the
      tangents of the outputs.
    """
    explained = _explained(predict_fn, params)
    floats, rebuild = split_differentiable(params)
    outputs, tangent, weights = jax.jvp(
        lambda x: _outputs_and_weights("predict_fn", explained(rebuild(x))),
        (floats,),
        ([v.astype(x.dtype) for v, x in zip(tangents, floats, strict=True)],),
        has_aux=True,
    )
    raise_if(jnp.any(jnp.isnan(outputs)), "predict_fn returned outputs that are NaN.")
    return outputs, weights, tangent


def _explained(
    predict_fn: Callable[[optax.Params], Any], params: optax.Params
) -> Callable[[optax.Params], Any]:
    check_callable("predict_fn", predict_fn, "params -> outputs")
    return explain_masked("predict_fn", predict_fn, params)


def _outputs_and_weights(name: str, result: Any) -> tuple[jax.Array, Any]:
    outputs, weights = result if isinstance(result, tuple) else (result, None)
    if not hasattr(outputs, "dtype") or not is_differentiable(outputs):
        raise TypeError(
            f"{name} must return a floating-point array of outputs, or a tuple"
            f" (outputs, weights), got {jax.tree.map(jnp.shape, result)}."
        )
    return outputs, weights


def linearize_with_loss(
    loss_fn: Callable[[optax.Params], Any],
    params: optax.Params,
    *,
    has_aux: bool = False,
    name: str = "loss_fn",
) -> LinearizedModel:
    """Do as :func:`linearize` for a function that returns loss and outputs."""
    floats, rebuild = split_differentiable(params)
    _, rebuild_diag = split_differentiable(jax.tree.map(jnp.zeros_like, params))

    def loss_and_outputs(params: optax.Params) -> tuple[Any, Any]:
        out = loss_fn(params)
        out, aux = out if has_aux else (out, None)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"{name} must return (loss, outputs) for a Gauss-Newton estimator, or"
                " (loss, (outputs, weights)), and with has_aux a pair of that and the"
                f" auxiliary values, got {jax.tree.map(jnp.shape, out)}."
            )
        loss, result = out
        outputs, weights = _outputs_and_weights(name, result)
        return (check_scalar(name, loss), outputs), (weights, aux)

    (loss, outputs), pullback, (weights, aux) = jax.vjp(
        lambda x: loss_and_outputs(rebuild(x)), floats, has_aux=True
    )
    raise_if(jnp.any(jnp.isnan(outputs)), f"{name} returned outputs that are NaN.")

    def outputs_of(x: Floats) -> jax.Array:
        return loss_and_outputs(rebuild(x))[0][1]

    def evaluate(params: optax.Params) -> tuple[jax.Array, jax.Array, Any]:
        (loss, outputs), (_, aux) = loss_and_outputs(params)
        return loss, outputs, (loss, aux) if has_aux else loss

    return LinearizedModel(
        evaluate=evaluate,
        value=(loss, aux) if has_aux else loss,
        gradient=lambda: pullback((jnp.ones_like(loss), jnp.zeros_like(outputs)))[0],
        outputs=outputs,
        weights=weights,
        pullback=lambda s: pullback((jnp.zeros_like(loss), s.astype(outputs.dtype)))[0],
        pushforward=lambda z: jax.jvp(outputs_of, (floats,), (z,))[1],
        floats=floats,
        as_params=lambda leaves: rebuild_diag(
            [y.astype(x.dtype) for x, y in zip(floats, leaves, strict=True)]
        ),
    )


def gauss_newton_factor(
    key: jax.Array,
    output_loss: OutputLoss,
    model: LinearizedModel,
    weights: jax.Array,
    targets: Any,
) -> Floats:
    """Pull S u back, for random signs u."""
    outputs = wide(model.outputs)
    signs = rademacher_like(key, outputs)
    factor = output_loss.factor(outputs, signs, targets)
    return [wide(g) for g in model.pullback(factor * jnp.sqrt(weights))]


def wide(x: jax.Array) -> jax.Array:
    """Cast to the dtype in which numbers are added up."""
    return x.astype(accumulation_dtype(x))


def squared(leaves: Floats) -> Floats:
    """Square each leaf, in the dtype in which numbers are added up."""
    return [jnp.square(wide(g)) for g in leaves]
