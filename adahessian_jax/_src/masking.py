# SPDX-License-Identifier: Apache-2.0
"""Parameters of which optax.masked, partition or selective_transform shows a part."""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
import optax

from adahessian_jax._src.checks import check_callable

Result = TypeVar("Result")


def unmasked(
    fun: Callable[[optax.Params], Result], params: optax.Params
) -> Callable[[optax.Params], Result]:
    """Let a function of all parameters take those that a wrapper has masked.

    Inside ``optax.masked``, ``optax.partition`` and ``optax.selective_transform`` an
    optimizer gets, and hands to ``obj_fn`` and ``predict_fn``, an ``optax.MaskedNode``
    in place of each parameter that is not its own. Those functions need all of them.

    Args:
      fun: a function of the parameters.
      params: all parameters.

    Returns:
      ``fun`` with ``params``, as constants, put in where its argument is masked.

    Raises:
      TypeError: if ``fun`` is not callable.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> import adahessian_jax as ah
      >>> def loss_fn(p): return jnp.sum(p["w"] ** 2 * p["scale"])
      >>> params = {"w": jnp.ones(2), "scale": jnp.array(3.0)}
      >>> labels = {"w": "curved", "scale": "sgd"}
      >>> tx = optax.partition(
      ...   {"curved": ah.adahessian(0.1), "sgd": optax.sgd(1e-3)}, labels)
      >>> updates, state = tx.update(jax.grad(loss_fn)(params), tx.init(params),
      ...   params, obj_fn=ah.unmasked(loss_fn, params))
      >>> [round(u, 4) for u in updates["w"].tolist()]  # -0.1 * gradient / curvature
      [-0.1, -0.1]
    """
    check_callable("fun", fun, "params -> result")
    return lambda masked: fun(fill_masked(masked, params))


def fill_masked(tree: optax.Params, whole: optax.Params) -> optax.Params:
    """Replace each masked node by what ``whole`` has in its place."""
    return _map_shown(lambda x, y: y if _is_masked(x) else x, tree, whole)


def mask_like(tree: Any, masked: Any) -> Any:
    """Mask what is masked in another tree; leave a tree that does not match it."""
    if not has_masked(masked):
        return tree
    try:
        return _map_shown(lambda x, y: x if _is_masked(x) else y, masked, tree)
    except ValueError:
        return tree


def has_masked(tree: Any) -> bool:
    """Whether any part of a tree is masked."""
    return any(map(_is_masked, jax.tree.leaves(tree, is_leaf=_is_masked)))


def masked_in_all(tree: Any, masked: list[Any]) -> Any:
    """Mask what is masked in each of other trees."""
    if len(masked) == 1:
        return mask_like(tree, masked[0])

    def is_shown(x: Any, subtree: Any) -> Any:
        return jax.tree.map(lambda _: not _is_masked(x), subtree)

    shown = [_map_shown(is_shown, other, tree) for other in masked]
    return jax.tree.map(lambda x, *s: x if any(s) else optax.MaskedNode(), tree, *shown)


def explain(name: str, fun: Callable[[Any], Any], params: Any) -> Callable[[Any], Any]:
    """Let a function that fails on parameters that it does not expect say what helps.

    These are masked parameters, and those of a Flax NNX module in place of the module.
    """
    is_nnx = "flax.nnx" in str(type(params))
    if not (has_masked(params) or is_nnx):
        return fun

    def explained(params: Any) -> Any:
        try:
            return fun(params)
        except Exception as error:
            note = (
                f"{name} was called with a Flax NNX state, the parameters, and not with"
                " the module. If it is a function of the module:"
                f" {name}=adahessian_jax.nnx.functional({name}, model)."
                if is_nnx
                else f"{name} was called with optax.MaskedNode in place of the"
                " parameters that optax.masked, partition or selective_transform leaves"
                f" to others. If it needs all of them: tx.update(..., {name}="
                f"adahessian_jax.unmasked({name}, params))."
            )
            if not getattr(error, "__notes__", None):  # functional has its own
                error.add_note(note)
            raise

    return explained


def _map_shown(function: Any, tree: Any, other: Any) -> Any:
    """Map what is in a tree, masked nodes included, and what another has there."""
    return jax.tree.map(function, tree, other, is_leaf=_is_masked)


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)
