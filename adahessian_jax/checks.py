# SPDX-License-Identifier: Apache-2.0
"""Argument checks: every message names the argument, the rule and what was given."""

import difflib
from collections.abc import Callable, Iterable
from numbers import Number, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import checkify

from adahessian_jax.dtypes import dtype_of


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}."
        )


def check_int(name: str, value: Any, minimum: int, *, traceable: bool = False) -> None:
    """Raise unless ``value`` is an int, at least ``minimum``.

    With ``traceable``, an integer array passes unchecked, because
    ``optax.inject_hyperparams`` turns every int into one.
    """
    if traceable and _is_scalar_array(value, jnp.integer):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}.")


def check_float(
    name: str,
    value: Any,
    minimum: float,
    below: float = float("inf"),
    *,
    exclusive: bool = False,
) -> None:
    """Raise unless a Python number lies in ``[minimum, below)``.

    With ``exclusive``, the minimum itself is out of range. Scalar arrays pass
    unchecked, so that hyperparameters stay traceable.
    """
    if isinstance(value, bool) or not (
        isinstance(value, Real) or _is_scalar_array(value, jnp.number)
    ):
        raise TypeError(f"{name} must be a number or a scalar array, got {value!r}.")
    if isinstance(value, Real):
        number = float(value)
        above = number > minimum if exclusive else number >= minimum
        if not (above and number < below):
            opening = "(" if exclusive else "["
            raise ValueError(
                f"{name} must lie in {opening}{minimum:g}, {below:g}), got {value}."
            )


def check_float_dtype(name: str, dtype: Any) -> Any:
    """Return ``dtype`` in the precision that is enabled; raise unless a float."""
    if dtype is None:
        return None
    if isinstance(dtype, jax.Array):
        raise TypeError(
            f"{name} must be None or a floating-point dtype, got {dtype!r}. In"
            f" optax.inject_hyperparams pass static_args=({name!r},)."
        )
    try:
        kind = jnp.dtype(dtype)
    except TypeError:
        kind = None
    if kind is None or not jnp.issubdtype(kind, jnp.floating):
        raise TypeError(
            f"{name} must be None or a floating-point dtype, got {dtype!r}."
        )
    return jax.dtypes.canonicalize_dtype(kind)


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_callable(name: str, value: Any, signature: str) -> None:
    """Raise TypeError unless ``value`` can be called."""
    if not callable(value):
        raise TypeError(f"{name} must be a callable {signature}, got {value!r}.")


def check_mask(name: str, mask: Any) -> None:
    """Raise TypeError unless ``mask`` is a function or a tree of bools."""
    if callable(mask):
        return
    for leaf in jax.tree.leaves(mask):
        if not isinstance(leaf, bool | np.bool_):
            raise TypeError(
                f"{name} must be None, a tree of bools or a callable params -> such a"
                f" tree, got {leaf!r}."
            )


def check_spelling(given: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise TypeError if an extra argument looks like a misspelt one of ours.

    Others pass, because transformations in a chain hand on those of their neighbours.
    """
    for name in set(given) - set(known):
        meant = difflib.get_close_matches(name, known, n=1, cutoff=0.75)
        if meant:
            raise TypeError(
                f"got an unexpected keyword argument {name!r}: did you mean"
                f" {meant[0]!r}?"
            )


def check_axis_name(axis_name: Any) -> None:
    """Raise TypeError unless ``axis_name`` could name an axis, or several."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if axis_name is not None and not all(isinstance(name, str) for name in names):
        raise TypeError(
            "axis_name must be None, a string or a tuple of strings, got"
            f" {axis_name!r}."
        )


def check_seed(seed: Any) -> None:
    """Raise TypeError unless ``seed`` is an int or a PRNG key."""
    if isinstance(seed, int) and not isinstance(seed, bool):
        return
    if not _is_key(seed):
        raise TypeError(
            "seed must be an int or one PRNG key, from jax.random.key(0) for example,"
            f" got {seed!r}."
        )


def check_key(key: Any) -> None:
    """Raise TypeError unless ``key`` is one PRNG key, typed or raw."""
    if not _is_key(key):
        raise TypeError(
            "key must be one PRNG key, from jax.random.key(0) for example, got"
            f" {key!r}."
        )


def check_params(params: optax.Params | None) -> None:
    """Raise ValueError if an update was called without parameters."""
    if params is None:
        raise ValueError(
            "params must be given: the curvature is estimated at the parameters. Call"
            " tx.update(grads, state, params, ...)."
        )


def check_real(name: str, tree: optax.Params) -> None:
    """Raise TypeError if a leaf is complex or no number at all, naming its path."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not hasattr(leaf, "dtype") and not isinstance(leaf, Number):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} must be an array or a number, got"
                f" {leaf!r}."
            )
        if jnp.issubdtype(dtype_of(leaf), jnp.complexfloating):
            raise TypeError(
                f"{name}{jax.tree_util.keystr(path)} has dtype {dtype_of(leaf)}: the"
                " Hessian's diagonal is defined for real parameters only. Wrap the"
                " optimizer in optax.contrib.split_real_and_imaginary."
            )


def check_structure(name: str, tree: Any, params: optax.Params) -> None:
    """Raise ValueError unless ``tree`` has the structure of ``params``."""
    got: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if got != expected:
        raise ValueError(
            f"{name} must have the same tree structure as params."
            f"{_first_difference(tree, params)} Got {got}, where params has"
            f" {expected}. Inside optax.masked or"
            " optax.partition, pass mask_compatible_extra_args=True to the wrapper."
        )


def check_like(name: str, tree: Any, params: optax.Params) -> None:
    """Raise ValueError unless ``tree`` has the structure and shapes of ``params``."""
    check_structure(name, tree, params)
    leaves = jax.tree.leaves(tree)
    for (path, leaf), other in zip(
        jax.tree_util.tree_leaves_with_path(params), leaves, strict=True
    ):
        if jnp.shape(other) != jnp.shape(leaf):
            raise ValueError(
                f"{name}{jax.tree_util.keystr(path)} must have the shape of the"
                f" parameter, {jnp.shape(leaf)}, got {jnp.shape(other)}."
            )


def scalar_function(
    name: str, fun: Callable[[optax.Params], jax.Array]
) -> Callable[[optax.Params], jax.Array]:
    """Return ``fun`` with a check that its output is one floating-point scalar."""
    return lambda params: check_scalar(name, fun(params))


def check_scalar(name: str, value: Any) -> jax.Array:
    """Return ``value``; raise TypeError unless it is one floating-point scalar."""
    if isinstance(value, tuple | list | dict) or not hasattr(value, "dtype"):
        raise TypeError(
            f"{name} must return one scalar array, the loss, got a"
            f" {type(value).__name__}. If it also returns auxiliary values, drop"
            f" them: {name}=lambda params: loss_fn(params, batch)[0]."
        )
    if jnp.shape(value) != ():
        raise TypeError(
            f"{name} must return a scalar, got an array of shape {jnp.shape(value)}."
            " Reduce the losses of the examples first, with jnp.mean for example."
        )
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(
            f"{name} must return a real floating-point loss, got dtype {value.dtype}."
        )
    return value


def raise_if(wrong: jax.Array, message: str) -> None:
    """Raise ValueError if an array is true, as far as values can be seen.

    Inside ``jit`` they cannot. There the check is made under ``jax.enable_checks``, for
    a step that ``jax.experimental.checkify`` has functionalised; otherwise it is left
    out, because it would take every compiled step off JAX's fast path of dispatch.
    """
    if isinstance(wrong, jax.core.Tracer):
        if jax.config.jax_enable_checks:  # type: ignore[attr-defined,unused-ignore]
            checkify.debug_check(~wrong, message)
    elif wrong:
        raise ValueError(message)


def _is_key(key: Any) -> bool:
    if not isinstance(key, jax.Array | np.ndarray):
        return False
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key.shape == ()
    return key.dtype == jnp.uint32 and key.ndim == 1


def _is_scalar_array(value: Any, kind: Any) -> bool:
    return (
        hasattr(value, "dtype")
        and jnp.shape(value) == ()
        and bool(jnp.issubdtype(value.dtype, kind))
    )


def _first_difference(tree: Any, params: optax.Params) -> str:
    paths, others = (
        [jax.tree_util.keystr(p) for p, _ in jax.tree_util.tree_leaves_with_path(t)]
        for t in (params, tree)
    )
    for path in paths:
        if path not in others:
            return f" The leaf {path} is missing."
    for path in others:
        if path not in paths:
            return f" The leaf {path} is not a parameter."
    return ""
