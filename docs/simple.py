# SPDX-License-Identifier: Apache-2.0
"""AdaHessian, and what is recommended, on one page: to be read beside the papers.

No options, plain dicts of arrays, every axis turned by a complete basis, and random
signs from outside. The tests hold the library against this file.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

Params = dict[str, jax.Array]
Function = Callable[[Params], jax.Array]

B1_ADAHESSIAN, B2_ADAHESSIAN, B1, B2, EPS = 0.9, 0.999, 0.85, 0.9, 1e-8
FIRST, INTERVAL, CLIP, DECAY, TURN = 10, 20, 0.3, 0.95, 10
FRACTION, DECAY_MODEL = 0.7, 0.9


class State(NamedTuple):
    """What is remembered from step to step; AdaHessian uses the first four."""

    step: int
    estimates: int
    mu: Params  # average of gradients
    nu: Params  # average of D^2, or of curvature in the bases
    traces: dict[str, list[jax.Array]]  # L of each axis, average of g g^T
    bases: dict[str, list[jax.Array]]  # Q of each axis, near L's eigenvectors
    model: jax.Array  # averages of the loss's slope and curvature along the updates


def init(params: Params) -> State:
    """Return the state before the first step of either optimizer."""
    zeros = jax.tree.map(jnp.zeros_like, params)
    bases = {k: [jnp.eye(n, dtype=p.dtype) for n in p.shape] for k, p in params.items()}
    traces = jax.tree.map(jnp.zeros_like, bases)
    return State(0, 0, zeros, zeros, traces, bases, jnp.zeros(2))


def adahessian(
    loss_fn: Function, params: Params, state: State, z: Params, learning_rate: float
) -> tuple[Params, State]:
    """Yao et al. (2021), algorithm 1: Adam with D = z * H z below, z random signs."""
    grads, hz = jax.jvp(jax.grad(loss_fn), (params,), (z,))
    t, mu, nu, new = state.step + 1, {}, {}, {}
    for k, p in params.items():
        mu[k] = B1_ADAHESSIAN * state.mu[k] + (1 - B1_ADAHESSIAN) * grads[k]
        nu[k] = B2_ADAHESSIAN * state.nu[k] + (1 - B2_ADAHESSIAN) * (z[k] * hz[k]) ** 2
        m, v = mu[k] / (1 - B1_ADAHESSIAN**t), nu[k] / (1 - B2_ADAHESSIAN**t)
        new[k] = p - learning_rate * m / (jnp.sqrt(v) + EPS)
    return new, state._replace(step=t, estimates=t, mu=mu, nu=nu)


def newton(
    predict_fn: Function,
    labels: jax.Array,
    params: Params,
    state: State,
    signs: jax.Array,
    learning_rate: float | jax.Array | None = None,
) -> tuple[Params, State]:
    """Divide momentum by curvature in the bases and clip; signs are like outputs."""
    grads = jax.grad(lambda p: cross_entropy(predict_fn(p), labels))(params)
    if state.step < FIRST or state.step % INTERVAL == 0:
        state = with_estimate(state, factor(predict_fn, params, signs))
    t, mu, update = state.step + 1, {}, {}
    for k, g in grads.items():
        mu[k] = B1 * state.mu[k] + (1 - B1) * g
        m = B1 * mu[k] / (1 - B1 ** (t + 1)) + (1 - B1) * g / (1 - B1**t)  # Nesterov's
        v = state.nu[k] / (1 - B2**state.estimates)
        u = jnp.clip(turn(m, state.bases[k]) / (v + EPS), -CLIP, CLIP)
        update[k] = turn(u, [q.T for q in state.bases[k]])
    state = with_turned_axes(state, grads)._replace(step=t, mu=mu)
    if learning_rate is None:
        learning_rate, state = own_rate(predict_fn, params, grads, update, state)
    return {k: p - learning_rate * update[k] for k, p in params.items()}, state


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Return the mean over rows of -log p(label)."""
    log_p = jax.nn.log_softmax(logits)
    return -jnp.mean(jnp.take_along_axis(log_p, labels[..., None], axis=-1))


def factor(predict_fn: Function, params: Params, signs: jax.Array) -> Params:
    r"""Martens et al. (2012): g with :math:`\mathrm{E}\, g g^\top = G`, Gauss-Newton.

    :math:`g = J^\top S u / \sqrt{B}` for B rows of outputs, J their Jacobian, u signs,
    and :math:`S S^\top = \mathrm{diag}(p) - p p^\top`, the loss's Hessian in a row.
    """
    outputs, pullback = jax.vjp(predict_fn, params)
    p = jax.nn.softmax(outputs)
    su = jnp.sqrt(p) * signs
    su = su - p * jnp.sum(su, axis=-1, keepdims=True)
    return pullback(su / (p.size / p.shape[-1]) ** 0.5)[0]


def with_estimate(state: State, g: Params) -> State:
    r"""George et al. (2018): average :math:`(Q^\top g)^2`, a diagonal in the bases."""
    pairs = {k: (state.nu[k], turn(x, state.bases[k])) for k, x in g.items()}
    nu = {k: B2 * v + (1 - B2) * x**2 for k, (v, x) in pairs.items()}
    return state._replace(estimates=state.estimates + 1, nu=nu)


def with_turned_axes(state: State, grads: Params) -> State:
    r"""Vyas et al. (2024): bases and averages follow :math:`g g^\top` of each axis."""
    nu, traces, bases = dict(state.nu), {}, dict(state.bases)
    for k, g in grads.items():
        rows = [jnp.moveaxis(g, i, 0).reshape(n, -1) for i, n in enumerate(g.shape)]
        olds = zip(state.traces[k], rows, strict=True)
        traces[k] = [DECAY * old + (1 - DECAY) * r @ r.T for old, r in olds]
        if state.step < TURN or state.step % TURN == TURN - 1:
            bases[k] = list(map(iterate, traces[k], state.bases[k]))
            pairs = zip(state.bases[k], bases[k], strict=True)
            nu[k] = turn(nu[k], [(old.T @ new) ** 2 for old, new in pairs])
    return state._replace(nu=nu, traces=traces, bases=bases)


def iterate(trace: jax.Array, q: jax.Array) -> jax.Array:
    """Take a step of orthogonal iteration; vectors without curvature stay in place."""
    lq, kept = trace @ q, float(jnp.finfo(q.dtype).eps) ** 0.5
    largest = jnp.max(jnp.abs(lq))
    return jnp.linalg.qr(lq / jnp.where(largest > 0, largest, 1) + kept * q)[0]


def turn(x: jax.Array, bases: list[jax.Array]) -> jax.Array:
    """Multiply each axis by its basis, transposed; axes come out in their order."""
    for q in bases:
        x = jnp.tensordot(x, q, (0, 0))  # takes the first axis away, and adds a last
    return x


def own_rate(
    predict_fn: Function, params: Params, grads: Params, update: Params, state: State
) -> tuple[jax.Array, State]:
    r"""Martens and Grosse (2015), section 6.4: 0.7 of the way to a model's minimum.

    It is :math:`-\alpha g^\top u + \alpha^2 u^\top G u / 2`, by averages of both terms.
    """
    outputs, v = jax.jvp(predict_fn, (params,), (update,))
    p = jax.nn.softmax(outputs)
    variance = jnp.sum(p * v**2, axis=-1) - jnp.sum(p * v, axis=-1) ** 2
    slope = jax.tree.reduce(jnp.add, jax.tree.map(jnp.vdot, grads, update))
    model = jnp.stack([slope, jnp.mean(variance)])
    slope, bend = model = DECAY_MODEL * state.model + (1 - DECAY_MODEL) * model
    rate = FRACTION * jnp.maximum(slope, 0) / jnp.where(bend > 0, bend, jnp.inf)
    return rate, state._replace(model=model)
