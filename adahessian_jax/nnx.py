# SPDX-License-Identifier: Apache-2.0
"""Flax NNX modules as functions of their parameters; needs Flax 0.12."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import optax
from flax import nnx
from jax import Array

from adahessian_jax import fused
from adahessian_jax._src.checks import check_callable, check_flag
from adahessian_jax._src.dtypes import is_differentiable
from adahessian_jax._src.masking import fill_masked


def functional(
    fun: Callable[[nnx.Module], Any], model: nnx.Module, *, wrt: Any = nnx.Param
) -> Callable[[optax.Params], Any]:
    """Turn a function of a module into one of its parameters.

    Every call sees the module as it is now, batch statistics and the state of its
    random number generators included: dropout has one mask, and what a call changes in
    the module is dropped. So make it in each step, and not once before the loop.

    Args:
      fun: a function of the module, to the loss or to the outputs.
      model: the module.
      wrt: which variables are the parameters, as in ``nnx.Optimizer``.

    Returns:
      The function for ``obj_fn`` or ``predict_fn``. Parameters that a wrapper such as
      ``optax.partition`` has masked are those of the module.

    Raises:
      ValueError: at a call, if the parameters have another structure than the module's.
      TypeError: if ``fun`` is not callable.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import adahessian_jax as ah
      >>> from adahessian_jax.nnx import functional
      >>> model, x = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.ones((4, 2))
      >>> optimizer = nnx.Optimizer(model, ah.adahessian(0.1), wrt=nnx.Param)
      >>> def loss_fn(model): return jnp.mean(model(x) ** 2)
      >>> loss, grads = nnx.value_and_grad(loss_fn)(model)
      >>> updates = optimizer.update(model, grads, obj_fn=functional(loss_fn, model))
      >>> bool(loss_fn(model) < loss)
      True
    """
    check_callable("fun", fun, "module -> result")
    graphdef, params, rest = _split(model, wrt)

    def of_params(some: optax.Params) -> Any:
        try:
            whole = fill_masked(nnx.as_pure(some), params)
        except ValueError as error:
            raise ValueError(
                "The optimizer's parameters are other variables of the module than"
                f" wrt={wrt!r}: call functional(fun, model, wrt=...) with the wrt that"
                " nnx.Optimizer was made with."
            ) from error
        return _called("fun", fun, nnx.merge(graphdef, whole, rest))

    return of_params


def value_and_grad_with_curvature(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, **options: Any
) -> Callable[..., tuple[Any, optax.Updates, Any]]:
    """Do as :func:`adahessian_jax.value_and_grad_with_curvature` for modules.

    Args:
      loss_fn: ``(model, *batch)`` to the loss, or to what an estimator or ``has_aux``
        want in its place. The estimator is the optimizer's, and so are the variables
        that are the parameters.
      has_aux: whether ``loss_fn`` returns auxiliary values as well.
      **options: ``microbatches``, ``reduction`` and ``unroll``, as there. Each part
        begins with the module as it is; batch statistics become the mean of the parts'.

    Returns:
      A function ``(model, *batch, optimizer, refresh=None)`` to ``(value, grads,
      curvature)``, for ``optimizer.update(model, grads, curvature=curvature)``. It
      changes the module as a call of ``loss_fn`` does: batch statistics and the counts
      of random number generators move on once.

    Raises:
      ValueError: if ``microbatches`` < 1; at the call, if the optimizer has no
        curvature, or an array of the batch cannot be cut into equal parts.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from flax import nnx
      >>> import adahessian_jax as ah
      >>> from adahessian_jax.nnx import value_and_grad_with_curvature
      >>> model, x = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), jnp.ones((4, 2))
      >>> optimizer = nnx.Optimizer(model, ah.adahessian(0.1), wrt=nnx.Param)
      >>> value_and_grad = value_and_grad_with_curvature(
      ...   lambda model, x: jnp.mean(model(x) ** 2))
      >>> loss, grads, curvature = value_and_grad(model, x, optimizer=optimizer)
      >>> updates = optimizer.update(model, grads, curvature=curvature)
    """
    check_callable("loss_fn", loss_fn, "(model, *batch) -> loss")
    check_flag("has_aux", has_aux)
    fused_function = fused.value_and_grad_with_curvature
    make: Any = functools.partial(fused_function, has_aux=True, **options)
    make(loss_fn, optax.identity())  # checks the options

    def value_and_grad_fn(
        model: nnx.Module, *batch: Any, optimizer: nnx.Optimizer, **call: Any
    ) -> tuple[Any, optax.Updates, Any]:
        wrt = optimizer.wrt
        graphdef, params, rest = _split(model, wrt)

        @functools.wraps(loss_fn)
        def loss_and_rest(params: optax.Params, *batch: Any) -> tuple[Any, Any]:
            copy = nnx.merge(graphdef, params, rest)
            out = _called("loss_fn", loss_fn, copy, *batch)
            out, aux = out if has_aux else (out, None)
            return out, (aux, _split(copy, wrt)[2])

        call["state"] = nnx.as_pure(optimizer.opt_state)
        (value, (aux, new_rest)), grads, curvature = make(loss_and_rest, optimizer.tx)(
            params, *batch, **call
        )
        if options.get("microbatches", 1) > 1:
            new_rest = jax.tree.map(_of_parts, new_rest)
        nnx.update(model, new_rest)
        # The optimizer selects gradients by the kind of their variables.
        treedef = jax.tree.structure(nnx.state(model, wrt))
        grads = jax.tree.unflatten(treedef, jax.tree.leaves(grads))
        return (value, aux) if has_aux else value, grads, curvature

    return value_and_grad_fn


def _called(name: str, fun: Callable[..., Any], model: nnx.Module, *args: Any) -> Any:
    """Call a function of a module; say what helps if it is one of the parameters."""
    try:
        return fun(model, *args)
    except (AttributeError, TypeError) as error:
        error.add_note(
            f"{name} was called with the module. A function of the parameters is passed"
            " as it is, without adahessian_jax.nnx."
        )
        raise


def _of_parts(x: Array) -> Array:
    """Return the mean over parts; of counts and keys, which are alike, the last."""
    return x.mean(axis=0) if is_differentiable(x) else x[-1]


def _split(model: nnx.Module, wrt: Any) -> tuple[Any, Any, Any]:
    """Return a module's structure, and the arrays of its parameters and the rest."""
    split: Any = nnx.split
    graphdef, params, rest = split(model, wrt, ...)
    # Variables belong to the trace that they were made in; arrays do not.
    return graphdef, nnx.as_pure(params), nnx.as_pure(rest)
