# SPDX-License-Identifier: Apache-2.0
"""Argument checks: every message names the argument, the rule and what was given."""

import difflib
import warnings
from collections.abc import Callable, Iterable
from numbers import Number, Real
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import checkify
from jax.tree_util import keystr, tree_leaves_with_path

from adahessian_jax._src.dtypes import dtype_of, is_differentiable
from adahessian_jax._src.xla import is_traced


def require(ok: Any, error: type[Exception], name: str, rule: str, got: Any) -> None:
    """Raise an error unless something holds."""
    if not ok:
        raise error(f"{name} must be {rule}, got {got!r}.")


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``."""
    choices = list(choices)
    rule = f"one of {', '.join(map(repr, choices))}"
    require(value in choices, ValueError, name, rule, value)


def check_int(name: str, value: Any, minimum: int, *, traceable: bool = False) -> None:
    """Raise unless ``value`` is an int, at least ``minimum``."""
    # optax.inject_hyperparams turns every int into an array.
    if traceable and _is_scalar_array(value, jnp.integer):
        return
    is_int = isinstance(value, int) and not isinstance(value, bool)
    require(is_int, TypeError, name, "an int" + _static(name, value), value)
    require(value >= minimum, ValueError, name, f">= {minimum}", value)


def check_float(
    name: str, value: Any, low: float, below: float = np.inf, *, exclusive: bool = False
) -> None:
    """Raise unless a Python number lies in ``[low, below)``, or in ``(low, below)``.

    Scalar arrays pass unchecked, so that hyperparameters stay traceable.
    """
    if _is_scalar_array(value, jnp.number) and not isinstance(value, Real):
        return
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    require(is_number, TypeError, name, "a number or a scalar array", value)
    above = value > low if exclusive else value >= low
    rule = f"in {'(' if exclusive else '['}{low:g}, {below:g})"
    require(above and value < below, ValueError, name, rule, value)


def check_number(name: str, value: Any, low: float, below: float) -> None:
    """Raise unless ``value`` is a Python number in ``[low, below)``, and no array."""
    rule = "a number" + _static(name, value)
    require(not isinstance(value, Array), TypeError, name, rule, value)
    check_float(name, value, low, below)


def check_float_dtype(name: str, dtype: Any) -> Any:
    """Return ``dtype`` in the precision that is enabled; raise unless a float."""
    if dtype is None:
        return None
    rule = "None or a floating-point dtype" + _static(name, dtype)
    try:
        kind = jnp.dtype(int if isinstance(dtype, Array) else dtype)
    except TypeError:
        kind = jnp.dtype(int)
    require(jnp.issubdtype(kind, jnp.floating), TypeError, name, rule, dtype)
    return jax.dtypes.canonicalize_dtype(kind)


def _static(name: str, value: Any) -> str:
    """Say what keeps optax.inject_hyperparams from making an array of a value."""
    hint = f" (in optax.inject_hyperparams pass static_args=({name!r},))"
    return hint if isinstance(value, Array) else ""


def check_flag(name: str, value: Any) -> None:
    """Raise TypeError unless ``value`` is a bool."""
    require(isinstance(value, bool), TypeError, name, "True or False", value)


def check_callable(name: str, value: Any, signature: str) -> None:
    """Raise TypeError unless ``value`` can be called."""
    require(callable(value), TypeError, name, f"a callable {signature}", value)


def check_mask(name: str, mask: Any) -> None:
    """Raise TypeError unless ``mask`` is None, a function or a tree of bools."""
    rule = "None, a tree of bools or a callable params -> such a tree"
    # What optax.inject_hyperparams makes of a function of the number of axes.
    injected = f"{rule} (in optax.inject_hyperparams pass static_args=({name!r},))"
    require(mask is not False, TypeError, name, injected, mask)
    for leaf in () if callable(mask) else jax.tree.leaves(mask):
        require(isinstance(leaf, bool | np.bool_), TypeError, name, rule, leaf)


def check_spelling(given: Iterable[str], known: tuple[str, ...]) -> None:
    """Raise TypeError if an extra argument looks like a misspelt one of ours.

    Others pass, because transformations in a chain hand on those of their neighbours.
    """
    for name in set(given) - set(known):
        for meant in difflib.get_close_matches(name, known, n=1, cutoff=0.75):
            raise TypeError(f"unexpected argument {name!r}: did you mean {meant!r}?")


def check_axis_name(axis_name: Any) -> None:
    """Raise TypeError unless ``axis_name`` could name an axis, or several."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    ok = axis_name is None or all(isinstance(name, str) for name in names)
    rule = "None, a string or a tuple of strings"
    require(ok, TypeError, "axis_name", rule, axis_name)


def check_seed(seed: Any) -> None:
    """Raise TypeError unless ``seed`` is an int or a PRNG key."""
    ok = _is_key(seed) or (isinstance(seed, int) and not isinstance(seed, bool))
    rule = f"an int or {_A_KEY}" + _static("seed", seed)
    require(ok, TypeError, "seed", rule, seed)


_A_KEY = "one PRNG key, from jax.random.key(0) for example"


def _is_key(key: Any) -> bool:
    if not isinstance(key, Array | np.ndarray):
        return False
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim == 0 if typed else key.dtype == jnp.uint32 and key.ndim == 1


def check_params(params: Any) -> None:
    """Raise an error if there are no parameters, or a module in their place."""
    if any(base.__module__ == "flax.nnx.module" for base in type(params).mro()):
        raise TypeError(
            f"params must be a tree of arrays, got the module {type(params).__name__}:"
            " use adahessian_jax.nnx.value_and_grad_with_curvature, or nnx.Optimizer."
        )
    if params is None:
        raise ValueError(
            "params must be given: the curvature is estimated at the parameters. Call"
            " tx.update(grads, state, params, ...)."
        )


def check_state_type(state: Any, kind: type) -> None:
    """Raise TypeError if a state is of another type: one restored may be a dict."""
    if not isinstance(state, kind):
        raise TypeError(
            f"state must be a {kind.__name__}, got a {type(state).__name__}. Restore"
            " checkpoints into the structure of tx.init(params)."
        )


def check_real(name: str, tree: Any) -> None:
    """Raise TypeError if a leaf is complex or no number at all, naming its path."""
    for path, leaf in tree_leaves_with_path(tree):
        full_name = name + keystr(path)
        is_number = hasattr(leaf, "dtype") or isinstance(leaf, Number)
        require(is_number, TypeError, full_name, "an array or a number", leaf)
        if jnp.issubdtype(dtype_of(leaf), jnp.complexfloating):
            raise TypeError(
                f"{full_name} has dtype {dtype_of(leaf)}: the Hessian's diagonal is"
                " defined for real parameters only. Make real and imaginary parts"
                " parameters, and complex numbers of them in the loss, by"
                " jax.lax.complex."
            )


def check_like(name: str, tree: Any, params: Any) -> None:
    """Raise ValueError unless ``tree`` has the structure and shapes of ``params``."""
    got: Any = jax.tree.structure(tree)
    expected: Any = jax.tree.structure(params)
    if got != expected:
        raise ValueError(_other_structure(name, tree, params))
    shapes = map(jnp.shape, jax.tree.leaves(tree))
    for (path, leaf), shape in zip(tree_leaves_with_path(params), shapes, strict=True):
        if shape != jnp.shape(leaf):
            raise ValueError(
                f"{name}{keystr(path)} must have the shape of the parameter,"
                f" {jnp.shape(leaf)}, got {shape}."
            )


def _other_structure(name: str, tree: Any, params: Any) -> str:
    paths, others = (
        {keystr(path) for path, _ in tree_leaves_with_path(t)} for t in (params, tree)
    )
    first = "".join(
        f" The leaf {path} is {'missing' if path in paths else 'not a parameter'}."
        for path in sorted(paths ^ others)[:1]
    )
    return (
        f"{name} must have the same tree structure as params.{first} Got"
        f" {jax.tree.structure(tree)}, where params has {jax.tree.structure(params)}."
    )


def objective(name: str, fun: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return ``fun``, with None beside its output, which must be one scalar."""
    return lambda params: (check_scalar(name, fun(params)), None)


def check_scalar(name: str, value: Any) -> Array:
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
    if not is_differentiable(value):
        raise TypeError(
            f"{name} must return a real floating-point loss, got dtype {value.dtype}."
        )
    return value


def one_array(name: str, x: Any) -> Array:
    """Return something as an array; raise TypeError if it is a tree of several."""
    one = jax.tree_util.all_leaves([x]) or isinstance(x, list | tuple)
    require(one, TypeError, name, "one array", x)
    return jnp.asarray(x)


def raise_if(wrong: Array, message: str) -> None:
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


def warn_if_flat(diag: Any, updates: Any) -> None:
    """Warn, as far as values can be seen, of gradients without curvature."""
    pairs = zip(tree_leaves_with_path(diag), jax.tree.leaves(updates), strict=True)
    for (path, d), g in pairs:
        if is_differentiable(d) and d.size and not is_traced((d, g)):
            flat = ~jnp.any(d) & jnp.any(g)
            if not isinstance(flat, jax.core.Tracer) and flat:
                warnings.warn(
                    f"The curvature of params{keystr(path)} is zero and its gradient is"
                    " not: its step is divided by eps alone. Set clip_threshold,"
                    " or take the curvature of the outputs by ah.gauss_newton(loss).",
                    stacklevel=7,
                )


def _is_scalar_array(value: Any, kind: Any) -> bool:
    is_scalar = hasattr(value, "dtype") and jnp.shape(value) == ()
    return is_scalar and bool(jnp.issubdtype(value.dtype, kind))
