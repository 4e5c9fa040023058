# SPDX-License-Identifier: Apache-2.0
"""A network linearised at its parameters, and the factor of its Gauss-Newton matrix."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from adahessian_jax._src.axes import (
    AxisName,
    as_varying,
    axis_size,
    check_replicas,
    communicates,
    sum_over_axis,
    takes_step,
)
from adahessian_jax._src.checks import check_callable, check_scalar
from adahessian_jax._src.derivatives import Floats, normalized, split_differentiable
from adahessian_jax._src.dtypes import is_differentiable, wide
from adahessian_jax._src.loss import Loss
from adahessian_jax._src.masking import explain
from adahessian_jax._src.probes import rademacher_like


class LinearizedModel(NamedTuple):
    """A network's outputs at some parameters, and its transposed Jacobian.

    Cotangents of the parameters are lists of the floating-point leaves. ``evaluate``
    maps parameters to loss, outputs and value, where ``value`` is ``(loss, aux)``.
    """

    evaluate: Callable[[Any], tuple[Array, Array, Any]]
    value: Any
    gradient: Callable[[], Floats]
    outputs: Array
    where: Array | None
    pullback: Callable[[Array], Floats]
    as_params: Callable[[Floats], Any]
    communicates: bool


def linearize(
    fun: Any, predict_fn: Any, params: Any, axis_name: AxisName
) -> LinearizedModel:
    """Evaluate a network and prepare products with its transposed Jacobian.

    ``fun`` maps parameters to ``((loss, outputs), aux)``; ``predict_fn`` maps them to
    outputs, where ``fun`` is None.
    """
    name = "predict_fn" if fun is None else "loss_fn"
    predict = _explained(predict_fn, params) if fun is None else None
    floats, rebuild = split_differentiable(params)
    _, rebuild_diag = split_differentiable(jax.tree.map(jnp.zeros_like, params))

    def loss_and_outputs(params: Any) -> tuple[Any, Any]:
        out, aux = ((jnp.zeros(()), predict(params)), None) if predict else fun(params)
        if not (isinstance(out, tuple) and len(out) == 2):
            raise TypeError(
                f"{name} must return (loss, outputs) for a Gauss-Newton estimator, or"
                " (loss, (outputs, where)), and with has_aux a pair of that and the"
                f" auxiliary values, got {jax.tree.map(jnp.shape, out)}."
            )
        outputs, where = _outputs_and_where(name, out[1])
        loss = check_scalar(name, out[0])
        return (as_varying(loss, axis_name), outputs), (where, (loss, aux))

    def evaluate(params: Any) -> tuple[Array, Array, Any]:
        (loss, outputs), (_, value) = loss_and_outputs(params)
        return loss, outputs, value

    (loss, outputs), pullback, (where, value) = jax.vjp(
        lambda x: loss_and_outputs(rebuild(x)), floats, has_aux=True
    )
    check_replicas(outputs, floats, axis_name)
    return LinearizedModel(
        evaluate=evaluate,
        value=value,
        gradient=lambda: pullback((jnp.ones_like(loss), jnp.zeros_like(outputs)))[0],
        outputs=outputs,
        where=where,
        pullback=lambda s: pullback((jnp.zeros_like(loss), s.astype(outputs.dtype)))[0],
        as_params=rebuild_diag,
        communicates=communicates(loss_and_outputs, params, axis_name),
    )


def push_forward(
    predict_fn: Any, params: Any, directions: list[Floats], axis_name: AxisName
) -> Any:
    """Return a network's outputs, ``where``, and its Jacobian times each direction.

    The products are stacked along a new first axis.
    """
    predict = _explained(predict_fn, params)
    floats, rebuild = split_differentiable(params)

    def function(x: Floats) -> tuple[Array, Any]:
        return _outputs_and_where("predict_fn", predict(rebuild(x)))

    # Where a step has a rule for its transposed Jacobian alone, the transpose of that:
    # inside ``jit`` a product can be evaluated, and fails when it is compiled.
    twice = takes_step(function, floats, lambda x: "custom_vjp" in x.primitive.name)

    def pushed(direction: Floats) -> tuple[Array, Any, Array]:
        largest: Any = 1
        if any(wide(x).dtype != x.dtype for x in floats):
            direction, largest = normalized(direction)
        v = [t.astype(x.dtype) for x, t in zip(floats, direction, strict=True)]
        if twice:
            outputs, product, where = _transposed_twice(function, floats, v)
        else:
            outputs, product, where = jax.jvp(function, (floats,), (v,), has_aux=True)
        return outputs, where, largest * wide(product)

    if len(directions) == 1:
        outputs, where, product = pushed(directions[0])
        products = product[None]
    else:
        together = [jnp.stack(x) for x in zip(*directions, strict=True)]
        out_axes = None, None, 0
        outputs, where, products = jax.vmap(pushed, out_axes=out_axes)(together)
    check_replicas(outputs, floats, axis_name)
    return outputs, where, products


def _transposed_twice(
    function: Any, primal: Floats, tangent: Floats
) -> tuple[Array, Array, Any]:
    """Do as ``jax.jvp`` with auxiliary values, by reverse mode alone."""
    outputs, pullback, where = jax.vjp(function, primal, has_aux=True)
    try:
        _, transposed = jax.vjp(lambda c: pullback(c)[0], jnp.zeros_like(outputs))
        (product,) = transposed(tangent)
    except ValueError as error:
        error.add_note(
            "This is the product of the network's Jacobian with a step, for a"
            " learning rate of its own: give one, which needs no such product."
        )
        raise
    return outputs, product, where


def _explained(predict_fn: Any, params: Any) -> Callable[[Any], Any]:
    if predict_fn is None:
        raise ValueError(
            "Gauss-Newton needs the network's outputs and got no predict_fn. Pass a"
            " function of the parameters: tx.update(grads, state, params,"
            " predict_fn=lambda p: model.apply(p, x)). Where only the loss is at hand,"
            " use hutchinson, which takes obj_fn."
        )
    check_callable("predict_fn", predict_fn, "params -> outputs")
    return explain("predict_fn", predict_fn, params)


def _outputs_and_where(name: str, result: Any) -> tuple[Any, Any]:
    pair = result if isinstance(result, tuple) else (result, None)
    outputs, where = pair if len(pair) == 2 else (pair, None)
    if not hasattr(outputs, "dtype") or not is_differentiable(outputs):
        raise TypeError(
            f"{name} must return a floating-point array of outputs, or a tuple"
            f" (outputs, where), got {jax.tree.map(jnp.shape, result)}. Several outputs"
            " make one array, by jnp.concatenate for example."
        )
    return outputs, where


def gauss_newton_factor(
    key: Array, loss: Loss, model: LinearizedModel, labels: Any, axis_name: Any
) -> Floats:
    """Pull S u back, for random signs u."""
    here = loss.at(model.outputs, labels, model.where, axis_name)
    factor = here.root(rademacher_like(key, here.outputs))
    return [wide(g) for g in model.pullback(factor)]


def gauss_newton_part(
    key: Array, loss: Loss, model: LinearizedModel, labels: Any, axis_name: AxisName
) -> Floats:
    """Return a device's part of an estimate of the diagonal; their sum is the whole."""
    factor = gauss_newton_factor(key, loss, model, labels, axis_name)
    if model.communicates:  # then the square is that of the sum
        whole = sum_over_axis(factor, axis_name)
        factor = [g / axis_size(axis_name) ** 0.5 for g in whole]
    return [jnp.square(g) for g in factor]
