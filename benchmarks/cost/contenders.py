# SPDX-License-Identifier: Apache-2.0
"""The steps whose cost is compared, in JAX."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adahessian_jax as ah
from benchmarks.cost.timing import Contender, Program
from benchmarks.networks import LOSS, Network

LEARNING_RATE = 1e-4
Step = Callable[..., Any]


class Recipe(NamedTuple):
    """An optimizer and one or more steps with it."""

    tx: Any  # something with an ``init`` of the parameters
    steps: tuple[Step, ...]  # ``(params, state, *batch)`` to ``(params, state, ...)``
    shares: tuple[float, ...] = (1.0,)  # what fraction of all steps each of them is
    cycle: int = 1  # after how many calls a single step has done all that it does
    # Whether there is a gradient inside a loop or branch, where XLA does not optimise
    # convolutions on CPU.
    loops: bool = False


def without_outputs(net: Network) -> Callable[..., Any]:
    """Return the loss and new statistics of a network as a function."""

    def loss_fn(params: Any, *batch: Any) -> Any:
        (loss, _), statistics = net.loss_fn(params, *batch)
        return loss, statistics

    return loss_fn


def with_objective(net: Network, tx: Any) -> Step:
    """Return a step with the gradient, and an update that takes the objective."""
    tx, loss_fn = optax.with_extra_args_support(tx), without_outputs(net)

    def step(params: Any, state: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss_fn, has_aux=True)(params, *batch)
        more = {"obj_fn": lambda p: loss_fn(p, *batch)[0]}
        updates, state = tx.update(grads, state, params, **more)
        return optax.apply_updates(params, updates), state, value

    return step


def fused(net: Network, tx: Any, outputs: bool = False, refresh: Any = None) -> Step:
    """Return a step with gradient and curvature from one pass."""
    loss_fn = net.loss_fn if outputs else without_outputs(net)
    value_and_grad = ah.value_and_grad_with_curvature(loss_fn, tx, has_aux=True)

    def step(params: Any, state: Any, *batch: Any) -> Any:
        known = {"state": state, "refresh": refresh}
        value, grads, curvature = value_and_grad(params, *batch, **known)
        more = {"predict_fn": lambda p: net.loss_fn(p, *batch)[0][1]}
        updates, state = tx.update(grads, state, params, curvature=curvature, **more)
        return optax.apply_updates(params, updates), state, value

    return step


def every(
    interval: int, net: Network, tx: Any, *, outputs: bool = False, cycle: int = 1
) -> Recipe:
    """Refresh every so many steps, chosen on the host: two compiled steps."""
    if interval == 1:
        return Recipe(tx, (fused(net, tx, outputs),))
    steps = tuple(fused(net, tx, outputs, refresh) for refresh in (True, False))
    return Recipe(tx, steps, (1 / interval, 1 - 1 / interval), cycle)


def recipes(net: Network) -> dict[str, Recipe]:
    """Return all steps, the baseline first."""
    convolutional = any(x.ndim == 4 for x in jax.tree.leaves(net.params))
    adam = optax.adam(LEARNING_RATE)

    def adahessian(interval: int = 1, **options: Any) -> Any:
        return ah.adahessian(LEARNING_RATE, update_interval=interval, **options)

    def sophia(interval: int) -> Recipe:
        tx = optax.contrib.sophia(LEARNING_RATE, update_interval=interval)
        return Recipe(tx, (with_objective(net, tx),), cycle=interval, loops=True)

    plain = adahessian()
    davda54_10 = ah.published.davda54(LEARNING_RATE, update_each=10)
    paper = ah.published.paper(LEARNING_RATE, average_conv_kernel=convolutional)
    with_control = ah.published.zack_dugue(LEARNING_RATE, control_variate=True)
    factor = ah.gauss_newton(LOSS)
    turning: dict[str, Any] = {"stacked": net.stacked, "turn_interval": 10}
    soap = ah.soap(LEARNING_RATE, **turning)
    cycle = turning["turn_interval"]
    newton = partial(every, 20, net, outputs=True, cycle=cycle)
    return {
        "optax.adam": Recipe(adam, (with_objective(net, adam),)),
        "every step": every(1, net, plain),
        "every step, obj_fn": Recipe(plain, (with_objective(net, plain),)),
        "every 10": every(10, net, adahessian(10)),
        "paper": every(1, net, paper),
        "davda54, every 10": every(10, net, davda54_10),
        "davda54, every 10, cond": Recipe(
            davda54_10, (fused(net, davda54_10),), cycle=10, loops=True
        ),
        "zack_dugue": every(1, net, with_control),
        "4 probes": every(1, net, adahessian(estimator=ah.hutchinson(4))),
        "Gauss-Newton": every(1, net, adahessian(estimator=factor), outputs=True),
        "Gauss-Newton, every 10": every(
            10, net, adahessian(10, estimator=factor), outputs=True
        ),
        "soap": Recipe(soap, (with_objective(net, soap),), cycle=cycle),
        "newton": newton(ah.newton(LEARNING_RATE, LOSS, **turning)),
        "newton, own rate": newton(ah.newton(None, LOSS, **turning)),
        "optax sophia": sophia(1),
        "optax sophia, every 10": sophia(10),
    }


def somax_recipe(net: Network) -> Recipe:
    """Return python-somax's AdaHessian, of version 1.0.1.

    Batch statistics are not returned: its loss function has no auxiliary output.
    """
    import somax

    method = somax.adahessian(
        loss_fn=lambda params, batch: net.loss_fn(params, *batch)[0][0],
        learning_rate=LEARNING_RATE,
        spatial_averaging=False,
    )

    def step(params: Any, state: Any, *batch: Any) -> Any:
        key = jax.random.fold_in(jax.random.key(0), state.step)
        return method.step(params, batch, state, key)

    return Recipe(method, (step,))


def prepare(name: str, recipe: Recipe, params: Any, batch: Sequence[Any]) -> Contender:
    """Compile the steps of a recipe, with donated parameters and state."""
    # Donated buffers are gone: each contender needs parameters of its own.
    params, state = jax.tree.map(jnp.copy, (params, recipe.tx.init(params)))
    programs, flops, memory = [], 0.0, 0
    for function, share in zip(recipe.steps, recipe.shares, strict=True):
        jitted = jax.jit(function, donate_argnums=(0, 1))
        compiled = jitted.lower(params, state, *batch).compile()

        def step(carry: Any, compiled: Any = compiled) -> Any:
            return compiled(*carry, *batch)[:2]

        programs.append(Program(step, share, recipe.cycle))
        flops += share * (compiled.cost_analysis() or {}).get("flops", 0.0)
        usage = compiled.memory_analysis()
        memory = max(memory, usage.temp_size_in_bytes if usage else 0)
    # The compiler does not count a loop's or a branch's FLOPs as they are executed.
    counted = not recipe.loops and recipe.cycle == 1
    costs = {"flops": flops if counted else None, "memory": memory}
    return Contender(name, programs, (params, state), costs)
