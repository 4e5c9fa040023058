# SPDX-License-Identifier: Apache-2.0
"""A control variate that tracks the dominant eigenvectors of the Hessian."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from adahessian_jax._src.axes import axis_size, mean_over_axis
from adahessian_jax._src.checks import check_int, check_number
from adahessian_jax._src.derivatives import Floats, split_differentiable, squared_norm
from adahessian_jax._src.dtypes import accumulation_dtype
from adahessian_jax.estimators.control_variates import ControlVariate, Product


class LowRankState(NamedTuple):
    r"""What a low-rank control variate tracks.

    Attributes:
      basis: orthonormal directions :math:`q_i`, zero where there is none yet; the
        structure of the parameters, with a leading axis of size ``rank``.
      lengths: of the tracked products along them, shape (rank,).
      moments: moving averages of :math:`(q_i \cdot Hz)(q_j \cdot z)`, :math:`(q_i
        \cdot Hz)(q_j \cdot Hz)`, :math:`(q_i \cdot z)(q_j \cdot z)`: (3, rank, rank).
      weight: sum of the weights of the samples in these averages, shape ().
      squared_weight: sum of their squares, shape ().
    """

    basis: optax.Updates
    lengths: Array
    moments: Array
    weight: Array
    squared_weight: Array


def low_rank_control(rank: int, *, decay: float = 0.98) -> ControlVariate:
    r"""Use a low-rank approximation of the Hessian as control variate.

    The products :math:`y = H z` that Hutchinson's estimator computes anyway point to
    the Hessian's dominant eigenvectors. From past ones, a basis Q of ``rank``
    orthonormal directions and eigenvalues :math:`\Lambda` are tracked, and

    .. math::
      d = z \odot (y - Q \Lambda Q^\top z) + \mathrm{diag}(Q \Lambda Q^\top)

    has the mean diag H, because Q and :math:`\Lambda` do not depend on this z. Its
    variance is that of plain Hutchinson for :math:`H - Q \Lambda Q^\top`, smaller where
    a few eigenvalues dominate. No further products are needed. The gain is limited by
    how much the Hessian differs between batches: 2 to 19 times on a fixed batch and 1.7
    to 5 on changing batches of 128, on networks of a few thousand parameters, and none
    on a transformer of 240,000 (``python -m benchmarks.accuracy``). With batches of
    512 it is 7 to 8 times where it was 1.4 to 3.4 with 128
    (``python -m benchmarks.accuracy --batch-sizes``).

    The basis is the one of largest weight in :math:`B \leftarrow [\sqrt{\rho} B,
    \sqrt{1 - \rho} y]`, from the eigenvectors of its Gram matrix, with :math:`\rho` the
    ``decay``. The eigenvalues are

    .. math::
      \lambda_i = \hat\lambda_i \max \left( 0, 1 - \frac{\mathrm{Var}\, \hat\lambda_i}
      {\hat\lambda_i^2} \right), \qquad \hat\lambda_i = \frac{\mathrm{EMA}
      [(q_i \cdot y)(q_i \cdot z)]}{\mathrm{EMA}[(q_i \cdot z)^2]}, \qquad
      \mathrm{Var}\, \hat\lambda_i \approx \frac{\|H q_i\|^2 + \hat\lambda_i^2}{n_i}

    where :math:`\|H q_i\|^2 \approx \mathrm{EMA}[(q_i \cdot y)^2] / \mathrm{EMA}[(q_i
    \cdot z)^2]` and :math:`n_i` is the effective number of samples in the averages. The
    factor leaves a direction out until it is known well enough to be of use. Averages
    take each sample in the basis from before it: directions chosen with a sample's help
    say too much about that sample.

    Args:
      rank: how many directions are tracked, at least 1. The state takes that many
        copies of the parameters, an update one more. With an ``axis_name`` all devices
        track the same, from the mean of their products: one more average over them.
      decay: of the averages, in [0, 1): how long old products count.

    Returns:
      A control variate for :func:`adahessian_jax.hutchinson`.

    Raises:
      ValueError: if an argument is out of range, or at ``init`` if ``rank`` exceeds the
        number of parameters.
      TypeError: if an argument is of the wrong type.

    Examples:
      >>> import jax.numpy as jnp
      >>> import adahessian_jax as ah
      >>> estimator = ah.hutchinson(control_variate=ah.low_rank_control(rank=2))
      >>> estimator.init({"w": jnp.ones(5)}).control_variate.basis["w"].shape
      (2, 5)

    References:
      Meyer et al., `Hutch++ <https://arxiv.org/abs/2010.09649>`_, 2021, for taking a
      matrix's dominant part, found by a sketch of its range, out of a stochastic
      estimate; to spread that over training steps is our own construction
    """
    check_int("rank", rank, 1)
    check_number("decay", decay, 0.0, 1.0)

    def init_fn(params: optax.Params) -> LowRankState:
        floats, _ = split_differentiable(params)
        n = sum(x.size for x in floats)
        if floats and rank > n:
            raise ValueError(
                f"rank must not exceed the number of parameters, {n}, got {rank}."
            )
        dtype = accumulation_dtype(*floats)

        def stacked(x: Any) -> Array:  # sharded like x
            return jnp.broadcast_to(jnp.zeros_like(x), (rank, *jnp.shape(x)))

        shapes = (rank,), (3, rank, rank), (), ()
        zeros = (jnp.zeros(shape, dtype) for shape in shapes)
        return LowRankState(jax.tree.map(stacked, params), *zeros)

    def correct(
        state: LowRankState, probes: Any, product: Product, *, axis_name: Any, **_: Any
    ) -> tuple[optax.Updates, LowRankState]:
        z, rebuild = split_differentiable(probes)
        y = split_differentiable(product(), probes)[0]
        raw_y, y = y, _finite_part(y)  # the rest would stay in the averages for ever
        q, rebuild_basis = split_differentiable(state.basis)
        dtype = state.lengths.dtype
        qz, qy = _dots(q, z, state.lengths), _dots(q, y, state.lengths)
        eigenvalues = _eigenvalues(state)

        def estimate(z: Array, y: Array, q: Array) -> Array:
            wide_q = q.astype(dtype)
            known_product = jnp.tensordot(eigenvalues * qz, wide_q, axes=1)
            known_diagonal = jnp.tensordot(eigenvalues, wide_q**2, axes=1)
            return z.astype(dtype) * (y.astype(dtype) - known_product) + known_diagonal

        diag = [estimate(*leaves) for leaves in zip(z, raw_y, q, strict=True)]

        # Each device has samples of its own, but all go on from the same state.
        n_devices = axis_size(axis_name)
        outer = jnp.stack([jnp.outer(qy, qz), jnp.outer(qy, qy), jnp.outer(qz, qz)])
        outer = mean_over_axis(outer, axis_name)
        if axis_name is not None:
            y = mean_over_axis(y, axis_name)
            qy = _dots(q, y, state.lengths)

        # B = Q diag(lengths) with a new column y: its Gram matrix is known from qy.
        rho = jnp.asarray(decay, dtype)
        old, new = jnp.sqrt(rho) * state.lengths, jnp.sqrt(1 - rho)
        cross = (old * new * qy)[:, None]
        corner = new**2 * squared_norm(y)[None, None]
        gram = jnp.block([[jnp.diag(old**2), cross], [cross.T, corner]])
        values, vectors = jnp.linalg.eigh(gram)
        values, vectors = values[1:][::-1], vectors[:, 1:][:, ::-1]
        kept = values > _DEGENERATE * jnp.maximum(values[0], 0)
        lengths = jnp.sqrt(jnp.where(kept, values, 0))
        # Coefficients of the new directions in the old basis and y.
        scale = jnp.where(kept, 1 / jnp.where(kept, lengths, 1), 0)
        in_basis = old[:, None] * vectors[:-1] * scale[None]
        in_y = new * vectors[-1] * scale

        def turn(q: Array, y: Array) -> Array:
            turned = jnp.tensordot(in_basis.T, q.astype(dtype), axes=1)
            along_y = in_y.reshape(-1, *[1] * y.ndim) * y.astype(dtype)[None]
            return (turned + along_y).astype(q.dtype)

        basis = [turn(*leaves) for leaves in zip(q, y, strict=True)]
        # Q_new' Q_old, which carries the averages over to the new basis.
        rotation = in_basis.T + in_y[:, None] * qy[None, :]

        moments = rho * state.moments + (1 - rho) * outer
        return rebuild(diag), LowRankState(
            basis=rebuild_basis(basis),
            lengths=lengths,
            moments=jnp.einsum("ab,mbc,dc->mad", rotation, moments, rotation),
            weight=rho * state.weight + (1 - rho),
            squared_weight=rho**2 * state.squared_weight + (1 - rho) ** 2 / n_devices,
        )

    return ControlVariate(init_fn, correct, "low_rank_control")


_DEGENERATE = 1e-5  # of the largest eigenvalue of the Gram matrix


def _eigenvalues(state: LowRankState) -> Array:
    """Estimate the eigenvalues along the basis, shrunk by what noise there is."""
    guess, squared_norm, seen = jnp.diagonal(state.moments, axis1=1, axis2=2)
    known = (state.lengths > 0) & (seen > 1e-6)
    seen = jnp.where(known, seen, 1)
    guess, squared_norm = guess / seen, squared_norm / seen
    # Directions that are new to the basis were seen by a part of the samples only.
    some = state.weight > 0
    share = jnp.minimum(seen / jnp.where(some, state.weight, 1), 1)
    n_samples = state.weight**2 / jnp.where(some, state.squared_weight, 1) * share
    variance = (squared_norm + guess**2) / jnp.maximum(n_samples, 1e-6)
    confidence = 1 - variance / jnp.where(guess != 0, guess**2, 1)
    usable = known & (guess != 0) & (n_samples > 1)
    return jnp.where(usable, guess * jnp.maximum(confidence, 0), 0)


def _finite_part(y: Floats) -> Floats:
    """Return a product with 0 where it is not finite, or all 0 if squares overflow."""
    y = [jnp.where(jnp.isfinite(a), a, 0) for a in y]
    usable = jnp.isfinite(squared_norm(y))
    return [jnp.where(usable, a, 0) for a in y]


def _dots(q: Floats, x: Floats, like: Array) -> Array:
    """Return the product of each direction of a basis with a vector."""
    # Not a matrix product, which JAX refuses where q is sharded by explicit types.
    pairs = zip(q, x, strict=True)
    wide = ((a.astype(like.dtype), b.astype(like.dtype)[None]) for a, b in pairs)
    products = [jnp.sum(a * b, axis=range(1, a.ndim)) for a, b in wide]
    return sum(products, start=jnp.zeros_like(like))
