# SPDX-License-Identifier: Apache-2.0
"""A basis for each tensor in which its curvature is nearly diagonal."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.typing import ArrayLike

from adahessian_jax._src import checks, dtypes, turning
from adahessian_jax._src.curvature_state import nodes_of_type
from adahessian_jax._src.estimator import Estimator, as_estimator
from adahessian_jax._src.meshes import replicated_beside
from adahessian_jax._src.orthogonal import Bases, rotate_tree
from adahessian_jax._src.stacks import Stacked, alike, check_stacked, stack_ndim, stacks
from adahessian_jax._src.turning import Traces
from adahessian_jax._src.xla import cond


class EigenbasisState(NamedTuple):
    """State of an estimator in an eigenbasis.

    Attributes:
      estimator_state: that of the estimator inside.
      traces: for each parameter, in the order of ``jax.tree.leaves``, a tuple of one
        for each axis: the moving average of the partial trace over all other axes,
        (size, size), or its product with leading vectors, (size, number of vectors);
        None for an axis that is not turned. Parameters of one shape, whose paths differ
        in numbers alone, are stacked to one, at the place of the first.
      bases: the same of orthogonal matrices, whole or by their leading vectors.
    """

    estimator_state: optax.OptState
    traces: tuple[Traces, ...]
    bases: tuple[Bases, ...]


def in_eigenbasis(
    estimator: optax.GradientTransformation,
    *,
    axes_from: str = "gradients",
    decay: ArrayLike = 0.95,
    turn_interval: int | Array = 10,
    max_dim: int = 64,
    n_vectors: int = 8,
    stacked: Stacked | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Estimate the diagonal in a basis in which the curvature is nearly diagonal.

    A diagonal says nothing of how parameters interact. This estimator turns the axes of
    each tensor so that they interact less, and estimates the diagonal there; this
    library's optimizers step in the turned axes and turn the step back. For a matrix
    with gradients :math:`g_t` the axes follow the eigenvectors of

    .. math::
      L_t \leftarrow \rho L_{t-1} + (1 - \rho) g_t g_t^\top, \qquad
      R_t \leftarrow \rho R_{t-1} + (1 - \rho) g_t^\top g_t,

    where :math:`\rho` is ``decay``, by steps of orthogonal iteration, :math:`Q
    \leftarrow \mathrm{qr}(L Q)`. Tensors of any order have such a partial trace for
    each axis. For an axis longer than ``max_dim`` the basis follows the leading
    eigenvectors and leaves the rest nearly as it is; entries that never have a gradient
    it leaves exactly so. Estimates are made in bases of earlier gradients; when these
    turn, the average of curvature is taken along.

    With :func:`adahessian_jax.gauss_newton` and one sample, or
    :func:`adahessian_jax.squared_gradient`, the estimate is the square of the turned
    factor :math:`Q_L^\top g Q_R`: in the mean, the exact diagonal in that basis. Any
    other estimator, and optax's, is given the turned parameters and the function of
    them, in which they and the probes are rounded to the parameters' own dtype.

    Args:
      estimator: of the curvature.
      axes_from: ``"gradients"`` of every update, or ``"factors"``: those that
        ``gauss_newton`` with one sample squares, where there is an estimate.
      decay: decay rate of the averages of partial traces, in [0, 1). Factors are fewer:
        0.98.
      turn_interval: turn on every so many-th update, at least 1, and on each of as many
        first ones.
      max_dim: axes of up to this size n, at least 1, have a complete basis: 2 n²
        numbers of state, and 6 n operations for each entry of the tensor in an update.
      n_vectors: how many leading eigenvectors a longer axis has: 3 n k numbers for k of
        them, and 10 k operations for each entry. With 0 it is left as it is.
      stacked: how many leading axes of a leaf are stacks of layers, as ``nn.scan`` and
        ``jax.lax.scan`` have them: a function of ``(path, leaf)``, such as ``lambda
        path, leaf: "blocks" in jax.tree_util.keystr(path)``. Each layer has its bases.

    Returns:
      A transformation for :func:`adahessian_jax.adahessian` and
      :func:`adahessian_jax.scale_by_adahessian` only: ``optax.contrib.sophia``, say,
      would take its diagonal for that in the parameters' own axes, and nothing would
      turn these. ``update`` takes what that of ``estimator`` takes and returns the
      diagonal in the bases of its state, an :class:`.EigenbasisState`.

    Raises:
      ValueError: if an argument is out of range, or ``estimator`` has no single factor
        where axes are to come from it.
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
      Vyas et al., `SOAP <https://arxiv.org/abs/2409.11321>`_, 2024, for bases of every
      axis by gradients, and their orthogonal iteration; George et al., `Fast
      Approximate Natural Gradient Descent in a Kronecker-factored Eigenbasis
      <https://arxiv.org/abs/1806.03884>`_, 2018, for curvature in an eigenbasis
    """
    checks.check_choice("axes_from", axes_from, ("gradients", "factors"))
    # Factors are seen in the pass over the network, which does not see the optimizer.
    of_factors = axes_from == "factors"
    check_decay = checks.check_number if of_factors else checks.check_float
    check_decay("decay", decay, 0.0, 1.0)
    checks.check_int("turn_interval", turn_interval, 1, traceable=True)
    checks.check_int("max_dim", max_dim, 1)
    checks.check_int("n_vectors", n_vectors, 0)
    check_stacked(stacked)
    inner: Any = as_estimator(estimator)
    if isinstance(inner.update, Estimator):
        inner = inner.update
    factor = getattr(inner, "factor", None)
    if of_factors and factor is None:
        raise ValueError(
            "estimator must be gauss_newton(loss) with n_samples=1 for"
            f" axes_from='factors': they are what it squares. Got {estimator!r}; or"
            " leave axes_from at 'gradients'."
        )
    return _InEigenbasis(
        getattr(inner, "axis_name", None),
        getattr(inner, "loss", None),
        f"in_eigenbasis({getattr(inner, 'kind', '')}, {axes_from})",
        inner if factor is None else factor,
        factor is not None,
        axes_from,
        decay,
        turn_interval,
        max_dim,
        n_vectors,
        stacked,
    ).transformation


@dataclasses.dataclass(frozen=True, eq=False)
class _InEigenbasis(Estimator):
    """The estimator with the arguments of :func:`in_eigenbasis`.

    Attributes:
      inner: one of this library's, or any transformation.
      squares: whether the estimate is the square of what ``inner`` returns.
    """

    inner: Any
    squares: bool
    axes_from: str
    decay: ArrayLike
    turn_interval: int | Array
    max_dim: int
    n_vectors: int
    stacked: Stacked | None

    def init(self, params: optax.Params) -> EigenbasisState:
        leaves = jax.tree_util.tree_leaves_with_path(params)
        if not leaves:  # or optax.tree.map_params has a stand-in for all of them
            nothing: Any = [jnp.zeros(0), jnp.zeros(0)]
            return EigenbasisState(self.inner.init(params), *nothing)
        groups = alike(params)
        bases = tuple(self._first_bases([leaves[i] for i in g]) for g in groups)
        traces = turning.first_traces(bases)
        return EigenbasisState(self.inner.init(params), traces, bases)

    def value_and_grad(
        self, fun: Any, state: EigenbasisState, params: Any, **extra_args: Any
    ) -> tuple[Any, Any, optax.Updates, EigenbasisState]:
        inner, inner_state = self.inner, state.estimator_state
        bases = state.bases
        if self.squares:
            value, grads, factor, inner_state = inner.value_and_grad(
                fun, inner_state, params, **extra_args
            )
            turned = rotate_tree(factor, bases)
            if self.axes_from == "factors" and any(bases):
                state = self._seen(state, factor, turned)
            diag = dtypes.map_floats(jnp.square, turned)
            return value, grads, diag, state._replace(estimator_state=inner_state)

        def back(turned: Any) -> Any:
            return _as(params, rotate_tree(turned, bases, back=True))

        def of_turned(function: Any) -> Any:
            return None if function is None else lambda x: function(back(x))

        functions = {k: of_turned(extra_args.get(k)) for k in ("obj_fn", "predict_fn")}
        extra_args |= {k: f for k, f in functions.items() if f is not None}
        at = rotate_tree(params, bases)
        if isinstance(inner, Estimator):
            value, grads, diag, inner_state = inner.value_and_grad(
                of_turned(fun), inner_state, at, **extra_args
            )
            grads = None if grads is None else back(grads)
        elif fun is None:
            value, grads = None, rotate_tree(extra_args.pop("updates"), bases)
            diag, inner_state = inner.update(grads, inner_state, at, **extra_args)
        else:
            raise ValueError(
                "The estimator in in_eigenbasis shares no pass with the gradient: use"
                " jax.value_and_grad, and give tx.update what the estimator needs."
            )
        return value, grads, diag, state._replace(estimator_state=inner_state)

    def observe(
        self,
        updates: optax.Updates,
        turned: optax.Updates,
        state: EigenbasisState,
        averages: tuple[optax.Updates, optax.Updates],
        count: Array,
    ) -> tuple[Any, EigenbasisState]:
        """Look at the gradients of an update, with an estimate or without.

        ``turned`` are those in the bases of the state, and ``averages`` those of the
        gradient and of the curvature there, ``count`` says how many updates there were
        with this one. Returns the averages in the bases of the state for the next
        update, and that state.
        """
        if self.axes_from == "gradients":
            state = self._seen(state, updates, turned)
        k = self.turn_interval
        due = (count <= k) | (count % k == 0)
        groups = alike(updates)

        def turn(x: tuple[Any, Any, Any]) -> Any:
            return turning.turned_tree(*x, groups)

        x = averages, state.traces, state.bases
        averages, traces, bases = cond(due, turn, lambda x: x, x)
        leaves = jax.tree.leaves(updates)
        firsts = [leaves[group[0]] for group in groups]
        bases, traces = (
            tuple(map(replicated_beside, firsts, part)) for part in (bases, traces)
        )
        return averages, state._replace(traces=traces, bases=bases)

    def _seen(self, state: EigenbasisState, tree: Any, turned: Any) -> EigenbasisState:
        """Average in what axes come from."""
        groups = alike(tree)
        trees = (stacks(t, groups) for t in (tree, turned))
        parts = zip(*trees, state.traces, state.bases, strict=True)
        traces = tuple(turning.averaged(self.decay, *x) for x in parts)
        return state._replace(traces=traces)

    def _first_bases(self, group: list[tuple[Any, Any]]) -> Bases:
        """Return the bases of parameters that are alike."""
        leaves = [leaf for _, leaf in group]
        shape = jnp.shape(leaves[0])
        if not all(map(dtypes.is_differentiable, leaves)) or 0 in shape:
            return ()
        dtype = dtypes.accumulation_dtype(*leaves)
        n, *others = (stack_ndim(self.stacked, *x) for x in group)
        checks.require(
            all(other == n for other in others),
            ValueError,
            "stacked",
            "alike for parameters whose paths differ in numbers alone",
            [n, *others],
        )
        size = self.max_dim, self.n_vectors
        bases = [turning.first_basis(length, *size, dtype) for length in shape[n:]]
        layers = (*[len(group)][: len(others)], *shape[:n])
        repeated = jax.tree.map(lambda x: jnp.tile(x, (*layers, 1, 1)), bases)
        return (*[None] * len(layers), *repeated)


def find_bases(estimator_state: Any) -> tuple[Bases, ...]:
    """Return the bases of parameters that are alike, if the estimator has some."""
    found = nodes_of_type(EigenbasisState, estimator_state)
    return found[0].bases if found else ()


def _as(like: Any, tree: Any) -> Any:
    """Cast floating-point leaves to the dtypes of others."""
    return dtypes.map_floats(lambda p, x: x.astype(dtypes.dtype_of(p)), like, tree)
