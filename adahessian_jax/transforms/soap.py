# SPDX-License-Identifier: Apache-2.0
"""SOAP: Adam in the eigenbases of the gradients' covariances."""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src import checks
from adahessian_jax._src.dtypes import accumulation_dtype, is_differentiable
from adahessian_jax._src.meshes import (
    as_if_automatic,
    check_sharded_alike,
    replicated_beside,
)
from adahessian_jax._src.moving_average import as_dtype, debias, ema, root
from adahessian_jax._src.orthogonal import PRECISION, rotate
from adahessian_jax._src.turning import Traces, averaged
from adahessian_jax._src.xla import cond


class ScaleBySoapState(NamedTuple):
    """State of SOAP.

    Attributes:
      count: number of updates so far, shape (), int32.
      mu: moving average of the gradient; structure and shapes of the parameters.
      nu: that of its square in the turned axes, of the same structure.
      grams: for each parameter, in the order of ``jax.tree.leaves``, a tuple of one for
        each axis: the moving average of the gradient times itself over all other axes,
        (size, size); None for an axis that is not turned.
      bases: the same of orthogonal matrices, whose columns are the axes.
    """

    count: Array  # type: ignore[assignment]  # hides tuple.count
    mu: optax.Updates
    nu: optax.Updates
    grams: tuple[Traces, ...]
    bases: tuple[Traces, ...]


def scale_by_soap(
    b1: ArrayLike = 0.95,
    b2: ArrayLike = 0.95,
    eps: ArrayLike = 1e-8,
    *,
    decay: ArrayLike | None = None,
    every: int | Array = 10,
    max_dim: int = 10_000,
    turn_vectors: bool = False,
) -> optax.GradientTransformation:
    r"""Rescale gradients as Adam does, in axes turned by their covariances.

    For a matrix with gradients :math:`g_t` and averages of them :math:`m_t`,

    .. math::
      \begin{align*}
        v_t &\leftarrow \beta_2 v_{t-1} + (1 - \beta_2) (Q_L^\top g_t Q_R)^2 \\
        u_t &\leftarrow Q_L \left( \frac{\sqrt{1 - \beta_2^t}}{1 - \beta_1^t}
          \frac{Q_L^\top m_t Q_R}{\sqrt{v_t} + \varepsilon} \right) Q_R^\top \\
        L_t &\leftarrow \rho L_{t-1} + (1 - \rho) g_t g_t^\top, \quad
        R_t \leftarrow \rho R_{t-1} + (1 - \rho) g_t^\top g_t
      \end{align*}

    where :math:`\rho` is ``decay``. The first update only starts :math:`Q_L, Q_R`, at
    the eigenvectors of :math:`L` and :math:`R`; each ``every``-th one moves them by a
    step of orthogonal iteration, :math:`Q \leftarrow \mathrm{qr}(L Q)`.

    Updates are 0 for the first gradient and for parameters that are not floating point.
    A gradient that is not finite never enters the axes. An axis of n, up to
    ``max_dim``, takes 2 n² numbers of state and 8 n operations for each entry of the
    tensor, and n³ to turn. The arguments are those of
    :func:`adahessian_jax.published.soap`.

    References:
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024, algorithm 3, and
      `nikhilvyas/SOAP <https://github.com/nikhilvyas/SOAP>`_
    """
    checks.check_float("eps", eps, 0.0)

    def first_grams(leaf: Any) -> Traces:
        shape, dtype = jnp.shape(leaf), accumulation_dtype(leaf)
        if not is_differentiable(leaf) or len(shape) < 1 + (not turn_vectors):
            return (None,) * len(shape)
        turned = (1 < n <= max_dim for n in shape)
        pairs = zip(shape, turned, strict=True)
        return tuple(jnp.zeros((n, n), dtype) if yes else None for n, yes in pairs)

    def init_fn(params: optax.Params) -> ScaleBySoapState:
        checks.check_real("params", params)
        mu, nu = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        leaves = jax.tree.leaves(params)
        grams: Any = tuple(map(first_grams, leaves))
        if not leaves:  # or optax.tree.map_params has a stand-in for all of them
            grams = jnp.zeros(0)
        bases = jax.tree.map(jnp.zeros_like, grams)
        return ScaleBySoapState(jnp.zeros([], jnp.int32), mu, nu, grams, bases)

    def update_fn(
        updates: Any, state: ScaleBySoapState, params: Any = None
    ) -> tuple[optax.Updates, ScaleBySoapState]:
        del params
        checks.check_state_type(state, ScaleBySoapState)
        checks.check_like("updates", updates, state.mu)
        check_sharded_alike("state.mu", state.mu, updates)
        check_sharded_alike("state.nu", state.nu, updates)
        count, first = state.count, state.count == 0
        t = jnp.maximum(count, 1)
        scale = debias(b1, t) / jnp.sqrt(debias(b2, t))

        def rescale(g: Any, m: Array, v: Array, q: Traces) -> tuple[Any, Any, Any]:
            if not is_differentiable(m):
                return jnp.zeros_like(m), m, v
            new_m = ema(b1, g, m)
            new_v = ema(b2, jnp.square(rotate(g.astype(new_m.dtype), q)), v)
            step = rotate(new_m, q) * scale.astype(new_m.dtype)
            step /= root(new_v) + as_dtype(eps, new_v.dtype)
            step = jnp.where(first, 0, rotate(step, q, back=True))
            m, v = (
                jnp.where(first, old, new.astype(old.dtype))
                for old, new in ((m, new_m), (v, new_v))
            )
            return step.astype(g.dtype), m, v

        leaves, treedef = jax.tree.flatten(updates)
        if not leaves:
            return updates, state._replace(count=optax.safe_increment(count))
        old = map(jax.tree.leaves, (state.mu, state.nu))
        each = zip(leaves, *old, state.bases, strict=True)
        rescaled = [rescale(*x) for x in each]
        steps, mu, nu = (tuple(x[i] for x in rescaled) for i in range(3))
        memory = b2 if decay is None else decay
        seen = zip(leaves, leaves, state.grams, state.bases, strict=True)
        grams = tuple(averaged(memory, *x) for x in seen)

        def start(nu_and_bases: Any) -> Any:
            # Eigenvectors of the largest eigenvalues are first.
            bases = jax.tree.map(lambda x: jnp.linalg.eigh(x)[1][:, ::-1], grams)
            return nu_and_bases[0], bases

        def turn(nu_and_bases: Any) -> Any:
            turned = list(map(_turned, nu_and_bases[0], grams, nu_and_bases[1]))
            return tuple(tuple(x[i] for x in turned) for i in range(2))

        def later(nu_and_bases: Any) -> Any:
            return cond(count % every == 0, turn, lambda x: x, nu_and_bases)

        nu, bases = cond(first, start, later, (nu, state.bases))
        grams, bases = (
            tuple(map(replicated_beside, leaves, part)) for part in (grams, bases)
        )
        steps, mu, nu = (jax.tree.unflatten(treedef, x) for x in (steps, mu, nu))
        count = optax.safe_increment(count)
        return steps, ScaleBySoapState(count, mu, nu, grams, bases)

    return optax.GradientTransformation(init_fn, update_fn)


def _turned(v: Array, grams: Traces, bases: Traces) -> tuple[Array, Traces]:
    """Move bases by a step of orthogonal iteration, and an average's entries along."""
    new: list[Array | None] = []
    for axis, (gram, q) in enumerate(zip(grams, bases, strict=True)):
        if gram is None or q is None:
            new.append(None)
            continue
        product = jnp.dot(gram, q, precision=PRECISION)
        order = jnp.argsort(jnp.sum(q * product, axis=0))[::-1]
        v = as_if_automatic(functools.partial(jnp.take, axis=axis))(v, order)
        new.append(jnp.linalg.qr(product[:, order])[0])
    return v, tuple(new)
