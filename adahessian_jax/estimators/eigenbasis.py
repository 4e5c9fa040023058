# SPDX-License-Identifier: Apache-2.0
"""A basis for each tensor in which its curvature is nearly diagonal."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src import axes, checks, dtypes
from adahessian_jax._src.estimator import Estimator, as_estimator
from adahessian_jax._src.loss import Loss
from adahessian_jax._src.moving_average import ema
from adahessian_jax._src.orthogonal import (
    PRECISION,
    Bases,
    Orthogonal,
    Reflectors,
    first_columns,
    layers_ndim,
    orthogonal_from_columns,
    rotate,
)
from adahessian_jax._src.stacks import Stacked, check_stacked, over_layers, stack_ndim

Products = tuple[Array | None, ...]


class EigenbasisState(NamedTuple):
    """State of an estimator in an eigenbasis.

    Attributes:
      estimator_state: that of the estimator inside.
      products: for each parameter, in the order of ``jax.tree.leaves``, a tuple of one
        for each axis: the moving average of the curvature's partial trace over all
        other axes, times the basis's vectors, (size, number of vectors); None for an
        axis that is not turned.
      bases: the same of orthogonal matrices, whose first columns are these vectors.
    """

    estimator_state: optax.OptState
    products: tuple[Products, ...]
    bases: tuple[Bases, ...]


def in_eigenbasis(
    estimator: optax.GradientTransformation,
    *,
    decay: ArrayLike = 0.98,
    max_dim: int = 64,
    n_vectors: int = 8,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate the diagonal in a basis in which the curvature is nearly diagonal.

    A diagonal says nothing of how parameters interact. This estimator turns the axes of
    each tensor so that they interact less, and estimates the diagonal there; this
    library's optimizers step in the turned axes and turn the step back. For a matrix
    :math:`W` with Gauss-Newton matrix :math:`G_{(ij),(kl)}`, the axes are the
    eigenvectors of its partial traces

    .. math::
      L_{ik} = \sum_j G_{(ij),(kj)} = \mathrm{E}\, (g g^\top)_{ik}, \qquad
      R_{jl} = \sum_i G_{(ij),(il)} = \mathrm{E}\, (g^\top g)_{jl},

    where :math:`g` is the Gauss-Newton factor as a matrix, whose square is the estimate
    of :func:`adahessian_jax.gauss_newton`. With the eigenvectors :math:`Q_L, Q_R` as
    columns, the estimate is the square of :math:`Q_L^\top g\, Q_R`: in the mean, the
    exact diagonal in that basis, whether or not G is a Kronecker product. Tensors of
    any order have a partial trace for each axis; a vector's is its whole block of G.

    Partial traces are moving averages over estimates, each of which moves the bases by
    one step of orthogonal iteration, :math:`Q \leftarrow \mathrm{qr}(L Q)`. For an axis
    longer than ``max_dim`` it follows the leading eigenvectors, which have most of the
    curvature, and leaves the rest nearly as it is. Use an ``update_interval`` of 20.

    Args:
      estimator: :func:`adahessian_jax.gauss_newton` with one sample.
      decay: decay rate of the moving averages of partial traces, in [0, 1).
      max_dim: axes of up to this size n, at least 1, have a complete basis: 2 n²
        numbers of state, and 4 n operations for each entry of the tensor in an update.
      n_vectors: how many leading eigenvectors a longer axis has: 3 n k numbers for k of
        them, and 8 k operations for each entry. With 0 it is left as it is.
      stacked: how many leading axes of a leaf are stacks of layers, as ``nn.scan`` and
        ``jax.lax.scan`` have them: a function of ``(path, leaf)``, such as ``lambda
        path, leaf: "blocks" in jax.tree_util.keystr(path)``. Each layer has its bases.

    Returns:
      A transformation for :func:`adahessian_jax.adahessian` and
      :func:`adahessian_jax.scale_by_adahessian` only: ``optax.contrib.sophia``, say,
      would take its diagonal for that in the parameters' own axes. ``update`` takes
      what that of ``estimator`` takes and returns the diagonal in the bases of the new
      state, an :class:`.EigenbasisState`, of the structure and dtypes of ``params``.

    Raises:
      ValueError: if an argument is out of range, or ``estimator`` has no single factor.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> x = jnp.array([[9.0, 9.1, 1.0], [5.0, 4.8, -3.0], [-7.0, -7.2, 2.0]])
      >>> tx = ah.adahessian(0.3, b2=0.95, hessian_ema="mean", clip_threshold=1.0,
      ...   estimator=ah.in_eigenbasis(ah.gauss_newton(ah.losses.squared_error)))
      >>> w = jnp.ones((3, 1))
      >>> state = tx.init(w)
      >>> for _ in range(200):
      ...   loss, grads = jax.value_and_grad(lambda w: jnp.mean((x @ w) ** 2))(w)
      ...   updates, state = tx.update(grads, state, w, predict_fn=lambda w: x @ w)
      ...   w = w + updates
      >>> bool(loss < 1e-6)
      True

    References:
      George et al., `Fast Approximate Natural Gradient Descent in a Kronecker-factored
      Eigenbasis <https://arxiv.org/abs/1806.03884>`_, 2018, for the diagonal in an
      eigenbasis, there that of the factors of K-FAC; Gupta, Koren and Singer, `Shampoo
      <https://arxiv.org/abs/1802.09568>`_, 2018, and Vyas et al., `SOAP
      <https://arxiv.org/abs/2409.11321>`_, 2024, for bases of every axis and their
      orthogonal iteration, there from gradients
    """
    checks.check_float("decay", decay, 0.0, 1.0)
    checks.check_int("max_dim", max_dim, 1)
    checks.check_int("n_vectors", n_vectors, 0)
    inner = getattr(as_estimator(estimator).update, "factor", None)
    if inner is None:
        raise ValueError(
            "estimator must be gauss_newton(loss) with n_samples=1: the bases come from"
            f" the signs of its factor. Got {estimator!r}."
        )
    check_stacked(stacked)
    options = decay, max_dim, n_vectors, stacked
    return _InEigenbasis(inner.axis_name, inner, *options).transformation


@dataclasses.dataclass(frozen=True, eq=False)
class _InEigenbasis(Estimator):
    """The estimator with the arguments of :func:`in_eigenbasis`."""

    inner: Estimator
    decay: ArrayLike
    max_dim: int
    n_vectors: int
    stacked: Stacked | None

    @property
    def loss(self) -> Loss | None:
        return self.inner.loss

    @property
    def kind(self) -> str:
        return f"in_eigenbasis({self.inner.kind})"

    def init(self, params: optax.Params) -> EigenbasisState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        if not leaves:  # or optax.tree.map_params has a stand-in for all of them
            nothing: Any = [jnp.zeros(0), jnp.zeros(0)]
            return EigenbasisState(self.inner.init(params), *nothing)
        bases = tuple(self._first_bases(path, leaf) for path, leaf in leaves)
        products = jax.tree.map(
            lambda q: jnp.zeros_like(q.right if isinstance(q, Reflectors) else q),
            bases,
            is_leaf=lambda q: isinstance(q, Reflectors),
        )
        return EigenbasisState(self.inner.init(params), products, bases)

    def value_and_grad(
        self, fun: Any, state: EigenbasisState, params: Any, **extra_args: Any
    ) -> tuple[Any, Any, optax.Updates, EigenbasisState]:
        value, grads, factor, inner_state = self.inner.value_and_grad(
            fun, state.estimator_state, params, **extra_args
        )
        leaves, treedef = jax.tree.flatten(factor)
        if not leaves:
            return value, grads, factor, state._replace(estimator_state=inner_state)
        # Bases of earlier factors only: in those fitted to this one, its square would
        # be too large along the first vectors and too small along the others.
        bases = jax.tree.map(_turned, state.products, state.bases)
        each = zip(state.products, state.bases, bases, leaves, strict=True)
        products = tuple(_moved(*x, self.decay) for x in each)
        diag = dtypes.map_floats(
            lambda g, q: jnp.square(rotate(g, q)),
            factor,
            jax.tree.unflatten(treedef, bases),
        )
        return value, grads, diag, EigenbasisState(inner_state, products, bases)

    def _first_bases(self, path: Any, leaf: Any) -> Bases:
        if not dtypes.is_differentiable(leaf):
            return ()
        dtype, shape = dtypes.accumulation_dtype(leaf), jnp.shape(leaf)
        n = stack_ndim(self.stacked, path, leaf)
        bases = [self._first_basis(size, dtype) for size in shape[n:]]
        repeated = jax.tree.map(lambda x: jnp.tile(x, (*shape[:n], 1, 1)), bases)
        return (*[None] * n, *repeated)

    def _first_basis(self, n: int, dtype: Any) -> Orthogonal | None:
        if 1 < n <= max(self.max_dim, self.n_vectors):
            return jnp.eye(n, dtype=dtype)
        if n <= self.max_dim or self.n_vectors == 0:
            return None
        # Cosines: unlike an entry's own axis, none is without curvature where pixels at
        # the edge of every image are black, and would stay so.
        i, j = jnp.arange(n, dtype=dtype), jnp.arange(self.n_vectors, dtype=dtype)
        return orthogonal_from_columns(jnp.cos(jnp.pi / n * (i[:, None] + 0.5) * j))


def find_bases(estimator_state: Any, n_leaves: int) -> tuple[Bases, ...]:
    """Return the bases of each parameter, none where the estimator has none."""
    parts = jax.tree.leaves(
        estimator_state, is_leaf=lambda x: isinstance(x, EigenbasisState)
    )
    bases = [x.bases for x in parts if isinstance(x, EigenbasisState)]
    return bases[0] if bases else ((),) * n_leaves


def _turned(product: Array, basis: Orthogonal) -> Orthogonal:
    """Turn a basis towards the eigenvectors, by one step of orthogonal iteration."""
    if product.ndim > 2:
        return over_layers(_turned, product.ndim - 2)(product, basis)
    largest = jnp.max(jnp.abs(product))
    relative = product / jnp.where(largest > 0, largest, 1)
    # The second term keeps vectors without curvature where they are, well above the
    # rounding errors of the first.
    kept = float(jnp.finfo(product.dtype).eps) ** 0.5
    return orthogonal_from_columns(relative + kept * first_columns(basis))


def _moved(
    products: Products, old_bases: Bases, bases: Bases, factor: Array, decay: Any
) -> Products:
    """Take products to new bases, and average in a factor's, if that is finite."""
    if all(product is None for product in products):
        return products
    factor, _ = axes.gathered(factor)
    if n := layers_ndim(bases):
        rest = over_layers(functools.partial(_moved, decay=decay), n)(
            products[n:], old_bases[n:], bases[n:], factor
        )
        return (*[None] * n, *rest)

    def one(axis: int, product: Any, old: Any, new: Any) -> Array | None:
        if product is None:
            return None
        q, g = first_columns(new), factor.astype(product.dtype)
        others = [a for a in range(g.ndim) if a != axis]
        turned = jnp.tensordot(g, q, (axis, 0), precision=PRECISION)
        fresh = jnp.tensordot(
            g, turned, (others, list(range(g.ndim - 1))), precision=PRECISION
        )
        # Exact if the basis is complete; otherwise what the trace does outside of the
        # vectors is forgotten, little by little as they turn.
        overlap = jnp.dot(first_columns(old).T, q, precision=PRECISION)
        carried = jnp.dot(product, overlap, precision=PRECISION)
        moved = ema(decay, fresh, carried)
        return jnp.where(jnp.all(jnp.isfinite(fresh)), moved, carried)

    return tuple(map(one, range(len(bases)), products, old_bases, bases))
