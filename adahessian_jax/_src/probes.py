# SPDX-License-Identifier: Apache-2.0
"""Random probe vectors with the structure, shapes and dtypes of the parameters."""

import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.dtypes import is_differentiable
from adahessian_jax._src.xla import part

_WORD = 32
_SHORT = 1024  # entries of a tensor whose signs are not packed
# An axis that is as long as a vocabulary is often cut among devices: eight then have
# whole words. XLA for TPU else writes out a word for each sign: for the logits of GPT-2
# small 412 MB on each of eight devices.
_LONG = 8192


def rademacher_like(key: Array, tree: optax.Params) -> optax.Params:
    r"""Draw independent random signs, -1 or +1, in the form of a tree.

    All leaves take their signs from one draw of random 32-bit words, so that no two
    entries share a sign. Tensors of more than 1,024 entries take up to 32 signs from a
    word, at as small a part of the cost of a draw per entry. Over devices that hold
    parts of the leaves nothing is exchanged: each draws all words, and unpacks those of
    its parts.

    Leaves that are not floating point cannot be probed and are zero.
    """
    leaves, treedef = jax.tree.flatten(tree)
    shapes = [jnp.shape(x) if is_differentiable(x) else (0,) for x in leaves]
    packings = [_packing(shape) for shape in shapes]
    ends = list(itertools.accumulate(math.prod(p.shape) for p in packings))
    drawn = jax.random.bits(key, (ends[-1] if ends else 0,), jnp.uint32)
    signs = []
    for leaf, shape, packing, end in zip(leaves, shapes, packings, ends, strict=True):
        if is_differentiable(leaf):
            one = jnp.ones((), jnp.result_type(leaf))
            signs.append(jnp.where(_bits(drawn, end, packing, shape), one, -one))
        else:
            signs.append(jnp.zeros_like(leaf))
    return jax.tree.unflatten(treedef, signs)


class _Packing(NamedTuple):
    """How random words become the signs of a tensor.

    Attributes:
      shape: that of the words.
      axis: along which axis words are unpacked, None where each is a sign.
      signs: how many signs a word has.
    """

    shape: tuple[int, ...]
    axis: int | None
    signs: int


def _packing(shape: tuple[int, ...]) -> _Packing:
    if math.prod(shape) <= _SHORT:
        return _Packing(shape, None, 1)
    words = [-(-n // _WORD) for n in shape]
    axis = len(shape) - 1  # devices most often hold whole rows
    if words[axis] * _WORD > 1.25 * shape[axis]:  # too many would be drawn in vain
        axis = min(reversed(range(len(shape))), key=lambda a: words[a] / shape[a])
    n, signs = shape[axis], _WORD
    if n >= _LONG:
        signs = next((s for s in (32, 16, 8) if n % (8 * s) == 0), _WORD)
    return _Packing((*shape[:axis], -(-n // signs), *shape[axis + 1 :]), axis, signs)


def _bits(drawn: Array, end: int, packing: _Packing, shape: tuple[int, ...]) -> Array:
    """Return random booleans for a tensor whose words end as given."""
    packed, axis, signs = packing
    size = math.prod(packed)
    words = part(drawn, end - size, size).reshape(packed)
    if axis is None:
        return (words >> (_WORD - 1)) != 0
    masks = jnp.uint32(1) << jnp.arange(signs, dtype=jnp.uint32)
    masks = masks.reshape(-1, *[1] * (len(shape) - axis - 1))
    bits = (jnp.expand_dims(words, axis + 1) & masks) != 0
    bits = bits.reshape(*shape[:axis], -1, *shape[axis + 1 :])
    return part(bits, 0, shape[axis], axis)


def normal_like(key: Array, tree: optax.Params) -> optax.Params:
    """Draw independent standard normal numbers in the form of a tree."""
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
