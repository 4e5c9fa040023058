# SPDX-License-Identifier: Apache-2.0
"""Random probe vectors with the structure, shapes and dtypes of the parameters."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.checks import check_key, check_real
from adahessian_jax._src.dtypes import is_differentiable

_WORD = 32


def rademacher_like(key: Array, tree: optax.Params) -> optax.Params:
    r"""Draw independent random signs, -1 or +1, in the form of a tree.

    All leaves take their signs from one draw of random 32-bit words, 32 signs to a
    word, so no two leaves share a sign and the cost is that of a 32nd of the numbers
    that one draw per element would need.

    Args:
      key: a PRNG key, typed or raw.
      tree: a pytree of arrays; only structure, shapes and dtypes are used.

    Returns:
      A pytree with the structure, shapes and dtypes of ``tree``. Leaves that are not
      floating point cannot be probed and are zero.

    Raises:
      TypeError: if ``key`` is no PRNG key, or a leaf is complex or no array.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> z = ah.rademacher_like(jax.random.key(0), {"w": jnp.ones((2, 3))})
      >>> jnp.abs(z["w"]).tolist()
      [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    check_key(key)
    check_real("tree", tree)
    leaves, treedef = jax.tree.flatten(tree)
    sizes = [math.prod(jnp.shape(x)) if is_differentiable(x) else 0 for x in leaves]
    n_words = [-(-size // _WORD) for size in sizes]
    words = jax.random.bits(key, (sum(n_words),), jnp.uint32)
    masks = jnp.uint32(1) << jnp.arange(_WORD, dtype=jnp.uint32)
    signs, start = [], 0
    for leaf, size, n in zip(leaves, sizes, n_words, strict=True):
        if not is_differentiable(leaf):
            signs.append(jnp.zeros_like(leaf))
            continue
        bits = words[start : start + n, None] & masks[None, :]
        bits = bits.reshape(-1)[:size].reshape(jnp.shape(leaf))
        dtype = jnp.result_type(leaf)
        signs.append(jnp.where(bits != 0, jnp.ones((), dtype), -jnp.ones((), dtype)))
        start += n
    return jax.tree.unflatten(treedef, signs)


def normal_like(key: Array, tree: optax.Params) -> optax.Params:
    """Draw independent standard normal numbers in the form of a tree.

    Args:
      key: a PRNG key, typed or raw; each leaf uses a key of its own, split from it.
      tree: as for :func:`rademacher_like`, and so what is returned.
    """
    check_key(key)
    check_real("tree", tree)
    leaves, treedef = jax.tree.flatten(tree)
    keys = jax.random.split(key, max(len(leaves), 1))
    numbers = [
        jax.random.normal(k, jnp.shape(x), jnp.result_type(x))
        if is_differentiable(x)
        else jnp.zeros_like(x)
        for k, x in zip(keys, leaves, strict=False)
    ]
    return jax.tree.unflatten(treedef, numbers)


def as_key(seed: int | Array) -> Array:
    """Make a PRNG key of an int; return a key as a new array.

    It is a raw one, if JAX allows it and the key is of the kind in use: it lives in the
    optimizer's state, and raw keys pass through every checkpoint format.
    """
    config: Any = jax.config
    key = jax.random.key(seed) if isinstance(seed, int) else jnp.copy(seed)
    if config.jax_legacy_prng_key != "allow" or key.dtype == jnp.uint32:
        return key
    usual = str(jax.random.key_impl(key)) == config.jax_default_prng_impl
    return jax.random.key_data(key) if usual else key
