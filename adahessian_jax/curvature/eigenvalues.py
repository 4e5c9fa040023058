# SPDX-License-Identifier: Apache-2.0
"""The largest eigenvalues of a Hessian or Gauss-Newton matrix, such as sharpness."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src import checks, masking
from adahessian_jax._src.axes import check_whole
from adahessian_jax._src.curvature_state import find_state
from adahessian_jax._src.derivatives import (
    Floats,
    check_mode,
    split_differentiable,
    squared_norm,
    value_grad_and_hvp,
)
from adahessian_jax._src.dtypes import (
    accumulation_dtype,
    dtype_of,
    map_floats,
    never_estimated,
    wide,
)
from adahessian_jax._src.estimator import find_averages
from adahessian_jax._src.lanczos import lanczos, random_vector
from adahessian_jax._src.linearized import linearize, push_forward
from adahessian_jax._src.loss import Loss, check_loss
from adahessian_jax._src.orthogonal import rotate_tree
from adahessian_jax._src.probes import as_key
from adahessian_jax._src.xla import is_traced
from adahessian_jax.estimators.eigenbasis import find_bases

Product = Callable[[Floats], Floats]


class Eigenpairs(NamedTuple):
    """Eigenvalues of a symmetric matrix, largest by magnitude first.

    Attributes:
      values: shape (k,), float32 or wider.
      vectors: of length 1; structure of the parameters, each leaf with a new first axis
        of k, float32 or wider; zero at leaves that are held fixed.
      residuals: norms of the matrix times a vector less the value times it, (k,). There
        is an eigenvalue of the matrix as near as that to each value.
      n_products: how many products with the matrix this took, shape (), int32.
    """

    values: Array
    vectors: optax.Params
    residuals: Array
    n_products: Array


def largest_eigenvalues(
    fun: Callable[[optax.Params], Any],
    params: optax.Params,
    k: int = 1,
    *,
    loss: Loss | None = None,
    labels: Any = None,
    preconditioner: Any = None,
    start: Eigenpairs | None = None,
    rtol: float = 0.01,
    max_products: int = 30,
    mode: str = "forward-over-reverse",
    seed: int | Array = 0,
) -> Eigenpairs:
    r"""Find the largest eigenvalues of a Hessian, by magnitude, and their vectors.

    The first is the sharpness of a loss. With a ``loss`` object the matrix is the
    Gauss-Newton matrix of a network; with a ``preconditioner`` D it is
    :math:`D^{-1/2} H D^{-1/2}`, of the eigenvalues of :math:`D^{-1} H`. Gradient
    descent of learning rate :math:`\alpha` with D is stable on a quadratic function if
    those are below :math:`2 / \alpha`; with an average of the gradient of decay
    :math:`\beta_1` below :math:`c / \alpha` for :math:`c = 2 (1 + \beta_1) / (1 -
    \beta_1)`, and with Nesterov's as well below :math:`c / ((1 + 2 \beta_1) \alpha)`.

    This is Lanczos' method. It stops when all k residuals are at most ``rtol`` times
    the largest value: after some ten products at first, and two to four where ``start``
    is what was found a few steps of training before.

    Args:
      fun: maps parameters to a real scalar; with ``loss``, to a network's outputs or to
        ``(outputs, where)``.
      params: any pytree of arrays. Integer and boolean leaves are held fixed.
      k: how many eigenvalues.
      loss: what the network is trained with, from :mod:`adahessian_jax.losses`.
      labels: for a loss whose curvature depends on them.
      preconditioner: the entries of D, above 0, a tree like ``params``, infinite where
        nothing moves; or ``(tx, state)``, an optimizer by curvature and its state, for
        what it divides momentum by, in its axes.
      start: what an earlier call found: the Krylov space begins with the sum of its
        vectors.
      rtol: which residuals suffice, relative to the largest eigenvalue.
      max_products: when to stop at the latest, at least k. There are no more than
        parameters.
      mode: how to differentiate twice, see :func:`adahessian_jax.hvp`.
      seed: an int or a PRNG key, of the vector to begin with.

    Returns:
      The :class:`.Eigenpairs`. Residuals say how exact they are, at ``max_products``
      too. Inside ``jit`` values are NaN where a product is not finite.

    Raises:
      ValueError: if an argument is out of range or does not match ``params``, if there
        are fewer than k floating-point parameters, or, outside ``jit``, if a product
        is not finite.
      TypeError: if ``fun`` returns something else, or a parameter is complex.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> def loss_fn(w): return jnp.sum(jnp.array([1.0, -5.0, 3.0]) * w**2)
      >>> top = ah.largest_eigenvalues(loss_fn, jnp.ones(3), k=2)
      >>> [round(x, 2) for x in top.values.tolist()]
      [-10.0, 6.0]

    References:
      Lanczos, `An iteration method for the solution of the eigenvalue problem
      <https://doi.org/10.6028/jres.045.026>`_, 1950; Cohen et al., `Gradient Descent on
      Neural Networks Typically Occurs at the Edge of Stability
      <https://arxiv.org/abs/2103.00065>`_, 2021, and `Adaptive Gradient Methods at the
      Edge of Stability <https://arxiv.org/abs/2207.14484>`_, 2022

    .. note::
      It keeps ``max_products + 1`` copies of the parameters, outside ``jit`` twice as
      many. An eigenvalue that occurs several times counts once, unless the matrix has
      few others. A ``start`` follows the vectors that it has: ask for k = 2 where
      another may overtake them. The momentum of ``optax.sgd`` adds gradients up in
      place of averaging: its learning rate is that above times 1 less its decay.
    """
    checks.check_callable("fun", fun, "params -> loss, or outputs with a loss object")
    checks.check_int("k", k, 1)
    checks.check_int("max_products", max_products, k)
    checks.check_float("rtol", rtol, 0.0)
    checks.check_seed(seed)
    check_mode(mode)
    checks.check_params(params)
    checks.check_real("params", params)
    check_whole(params, None, along="all")
    floats, _ = split_differentiable(params)
    size = sum(x.size for x in floats)
    rule = f"at most the number of floating-point parameters, {size}"
    checks.require(k <= size, ValueError, "k", rule, k)
    if loss is None:
        product = _hessian(fun, params, mode)
    else:
        check_loss(loss)
        product = _gauss_newton(fun, params, loss, labels)
    if preconditioner is not None:
        product = _between(_inverse_root(preconditioner, params), product)
    like = [jnp.zeros_like(x, accumulation_dtype(*floats)) for x in floats]
    key = as_key(seed)
    first = random_vector(key, like)
    if start is not None:
        first = _sum(start, params, otherwise=first)
    values, vectors, residuals, n_products = lanczos(
        product,
        first,
        key,
        known=start is not None,
        k=k,
        rtol=rtol,
        max_products=min(max_products, size),
    )
    checks.raise_if(
        ~jnp.all(jnp.isfinite(residuals)),
        "fun must have finite second derivatives at params, and their product with a"
        " vector is not finite.",
    )
    fixed = jax.tree.map(lambda x: jnp.zeros((k, *jnp.shape(x)), dtype_of(x)), params)
    rebuild = split_differentiable(fixed)[1]
    return Eigenpairs(values, rebuild(vectors), residuals, n_products)


def _hessian(fun: Any, params: Any, mode: str) -> Product:
    floats, rebuild = split_differentiable(params)
    explained = masking.explain("fun", fun, params)
    objective = checks.objective("fun", lambda floats: explained(rebuild(floats)))

    def product(v: Floats) -> Floats:
        image = value_grad_and_hvp(objective, floats, v, mode=mode)[2]
        return [x.astype(y.dtype) for x, y in zip(image, v, strict=True)]

    return product


def _gauss_newton(fun: Any, params: Any, loss: Loss, labels: Any) -> Product:
    model = linearize(None, fun, params, None)
    here = loss.at(model.outputs, labels, model.where)

    def product(v: Floats) -> Floats:
        tangents = push_forward(fun, params, [v], None)[-1][0]
        image = model.pullback(here.times(here.seen(tangents)))
        return [x.astype(y.dtype) for x, y in zip(image, v, strict=True)]

    return product


def _between(root: Product, product: Product) -> Product:
    return lambda v: root(product(root(v)))


def _inverse_root(preconditioner: Any, params: Any) -> Product:
    """Return the function that divides a vector by the root of D."""
    pair = preconditioner if isinstance(preconditioner, tuple) else (None,)
    if hasattr(pair[0], "init") and hasattr(pair[0], "update"):
        tx, state = pair
        roots, bases = _of_optimizer(tx, state, params)
    else:
        checks.check_like("preconditioner", preconditioner, params)
        entries, rebuild = split_differentiable(preconditioner, params)
        pairs = zip(entries, split_differentiable(params)[0], strict=True)
        entries = [d.astype(accumulation_dtype(d, p)) for d, p in pairs]
        bad = [jnp.any(~(d > 0)) for d in entries]
        checks.raise_if(
            jnp.any(jnp.stack(bad)),
            "preconditioner must be positive, what momentum is divided by; infinity"
            " for parameters that do not move.",
        )
        roots = rebuild(list(map(jax.lax.rsqrt, entries)))
        bases = ()

    def divided(v: Floats) -> Floats:
        tree = masking.mask_like(split_differentiable(params)[1](v), roots)
        scaled = jax.tree.map(jnp.multiply, rotate_tree(tree, bases), roots)
        tree = rotate_tree(scaled, bases, back=True)
        filled = masking.fill_masked(tree, jax.tree.map(jnp.zeros_like, params))
        leaves, _ = split_differentiable(filled, params)
        return [x.astype(y.dtype) for x, y in zip(leaves, v, strict=True)]

    return divided


def _of_optimizer(tx: Any, state: Any, params: Any) -> Any:
    """Return the inverse roots of what an optimizer divides by, and its bases."""
    averages = find_averages(tx, params)
    if len(averages) != 1 or is_traced((averages[0].eps, averages[0].hessian_power)):
        raise ValueError(
            "preconditioner must be an optimizer of one average of curvature, whose eps"
            f" and hessian_power are known, got {len(averages)} averages. Pass the"
            " entries of D in place of (tx, state)."
        )
    inner = find_state(state)

    def root(v: Array, p: Any) -> Array:
        v, never = wide(v), never_estimated(v)
        x = jnp.where(never, 0, jax.lax.rsqrt(averages[0].denominator(v)))
        return jnp.broadcast_to(x, jnp.shape(p))

    shown = masking.mask_like(params, inner.nu)
    leaves, treedef = jax.tree.flatten(shown)
    # Flax NNX has variables of another kind in the optimizer's state.
    entries = jax.tree.leaves(inner.nu)
    rule = "of the state of these params; with Flax NNX as nnx.as_pure gives both"
    fits = len(entries) == len(leaves)
    checks.require(fits, ValueError, "preconditioner", rule, inner.nu)
    nu = jax.tree.unflatten(treedef, entries)
    return map_floats(root, nu, shown), find_bases(inner)


def _sum(start: Eigenpairs, params: Any, *, otherwise: Floats) -> Floats:
    """Return the sum of the vectors of an earlier call, if it found some."""
    if not isinstance(start, Eigenpairs):
        raise TypeError(
            f"start must be what largest_eigenvalues returned, or None, got {start!r}."
        )
    vectors = jax.tree.map(lambda x: jnp.sum(x, 0), start.vectors)
    checks.check_like("start.vectors, summed,", vectors, params)
    found = split_differentiable(vectors, params)[0]
    size = squared_norm(found)
    there = jnp.isfinite(size) & (size > 0)
    pairs = zip(found, otherwise, strict=True)
    return [jnp.where(there, x.astype(y.dtype), y) for x, y in pairs]
