# SPDX-License-Identifier: Apache-2.0
"""The optimizer steps whose cost is compared, in JAX."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from networks import Network
from step_cost_timing import Contender, Program

import adahessian_jax as ah

INTERVAL = 10
LEARNING_RATE = 1e-4

Step = Callable[..., Any]


class Recipe(NamedTuple):
    """An optimizer and one or more steps with it.

    Attributes:
      tx: something with an ``init`` of the parameters.
      steps: functions ``(params, state, *batch)`` to ``(params, state, ...)``.
      shares: what fraction of all steps each of them is.
      cycle: after how many calls a single step has done all that it does.
      loops: whether there is a loop or branch inside, whose FLOPs the compiler's
        analysis does not count as they are executed.
      slow_convolutions: whether a gradient is inside a loop or branch, where XLA does
        not optimise convolutions on CPU.
    """

    tx: Any
    steps: tuple[Step, ...]
    shares: tuple[float, ...] = (1.0,)
    cycle: int = 1
    loops: bool = False
    slow_convolutions: bool = False


def recipes(net: Network) -> dict[str, Recipe]:
    """Return all steps, the baseline first."""
    new_statistics = jax.eval_shape(net.loss_fn, net.params, *net.batch)[1]
    has_aux = bool(jax.tree.leaves(new_statistics))

    def loss_fn(params: Any, *batch: Any) -> Any:
        (loss, _), statistics = net.loss_fn(params, *batch)
        return (loss, statistics) if has_aux else loss

    def loss_and_outputs_fn(params: Any, *batch: Any) -> Any:
        out = net.loss_fn(params, *batch)
        return out if has_aux else out[0]

    def loss_only(params: Any, *batch: Any) -> jax.Array:
        return net.loss_fn(params, *batch)[0][0]

    def with_objective(tx: Any) -> Step:
        def step(params: Any, state: Any, *batch: Any) -> Any:
            value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(params, *batch)
            updates, state = optax.with_extra_args_support(tx).update(
                grads, state, params, obj_fn=lambda p: loss_only(p, *batch)
            )
            return optax.apply_updates(params, updates), state, value

        return step

    def fused(
        tx: Any,
        estimator: Any,
        refresh: bool | None = None,
        more: Callable[..., Any] | None = None,
        **options: Any,
    ) -> Step:
        needs_outputs = estimator.needs_outputs
        value_and_grad = ah.value_and_grad_with_curvature(
            loss_and_outputs_fn if needs_outputs else loss_fn,
            estimator,
            has_aux=has_aux,
            **options,
        )

        def step(params: Any, state: Any, *batch: Any) -> Any:
            value, grads, curvature = value_and_grad(
                params, *batch, state=state, refresh=refresh
            )
            if more is not None:
                curvature = more(curvature, params, batch)
            updates, state = tx.update(grads, state, params, curvature=curvature)
            return optax.apply_updates(params, updates), state, value

        return step

    def every_step(estimator: Any, **options: Any) -> Recipe:
        tx = ah.adahessian(LEARNING_RATE, estimator=estimator)
        return Recipe(tx, (fused(tx, estimator, **options),))

    def delayed(
        estimator: Any,
        interval: int = INTERVAL,
        curvature_batch: int | None = None,
        **options: Any,
    ) -> Recipe:
        tx = ah.adahessian(
            LEARNING_RATE, estimator=estimator, update_interval=interval, **options
        )
        return Recipe(
            tx,
            tuple(
                fused(tx, estimator, refresh, curvature_batch=curvature_batch)
                for refresh in (True, False)
            ),
            (1 / interval, 1 - 1 / interval),
        )

    def every_10_by_cond(estimator: Any) -> Recipe:
        tx = ah.adahessian(LEARNING_RATE, estimator=estimator, update_interval=INTERVAL)
        return Recipe(
            tx,
            (fused(tx, estimator),),
            cycle=INTERVAL,
            loops=True,
            slow_convolutions=True,
        )

    def scanned_probes(n: int) -> Recipe:
        estimator = ah.hutchinson()

        def more(curvature: Any, params: Any, batch: Any) -> Any:
            """Add n - 1 samples, in a loop, to the one that came with the gradient."""

            def one(carry: Any, _: None) -> Any:
                total, state = carry
                diag, state = estimator.update(
                    None, state, params, obj_fn=lambda p: loss_only(p, *batch)
                )
                return (jax.tree.map(jnp.add, total, diag), state), None

            (total, state), _ = jax.lax.scan(
                one,
                (curvature.hessian_diag, curvature.estimator_state),
                length=n - 1,
            )
            mean = jax.tree.map(lambda d: d / n, total)
            return curvature._replace(hessian_diag=mean, estimator_state=state)

        recipe = every_step(estimator, more=more)
        return recipe._replace(loops=True, slow_convolutions=True)

    def sophia(interval: int) -> Recipe:
        tx = optax.contrib.sophia(LEARNING_RATE, update_interval=interval)
        return Recipe(
            tx,
            (with_objective(tx),),
            cycle=interval,
            loops=True,
            slow_convolutions=True,
        )

    adam = optax.adam(LEARNING_RATE)
    plain = ah.adahessian(LEARNING_RATE)
    part = jax.tree.leaves(net.batch)[0].shape[0] // 4
    factor = ah.gauss_newton("softmax_cross_entropy")
    return {
        "optax.adam": Recipe(adam, (with_objective(adam),)),
        "every step": every_step(ah.hutchinson()),
        "every step, obj_fn": Recipe(plain, (with_objective(plain),)),
        "every 10": delayed(ah.hutchinson()),
        "every 10, no reuse": delayed(ah.hutchinson(), reuse_estimate=False),
        "every 10, cond": every_10_by_cond(ah.hutchinson()),
        "every 10, quarter batch": delayed(ah.hutchinson(), curvature_batch=part),
        "every 10, quarter batch, no reuse": delayed(
            ah.hutchinson(), reuse_estimate=False, curvature_batch=part
        ),
        "4 probes": every_step(ah.hutchinson(4)),
        "4 probes, scan": scanned_probes(4),
        "Gauss-Newton": every_step(factor),
        "Gauss-Newton, every 10": delayed(factor),
        "eigenbasis, every 20": delayed(
            ah.in_eigenbasis(factor),
            interval=20,
            b2=0.9,
            hessian_ema="mean",
            reuse_estimate=False,
            clip_threshold=0.1,
        ),
        "optax sophia": sophia(1),
        "optax sophia, every 10": sophia(INTERVAL),
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

    return Recipe(method, (step,), slow_convolutions=True)


def prepare(name: str, recipe: Recipe, params: Any, batch: Sequence[Any]) -> Contender:
    """Compile the steps of a recipe, with donated parameters and state."""
    # Donated buffers are gone: each contender needs parameters of its own.
    params, state = jax.tree.map(jnp.copy, (params, recipe.tx.init(params)))
    programs, flops, memory = [], 0.0, 0
    for function, share in zip(recipe.steps, recipe.shares, strict=True):
        compiled = (
            jax.jit(function, donate_argnums=(0, 1))
            .lower(params, state, *batch)
            .compile()
        )

        def step(carry: Any, compiled: Any = compiled) -> Any:
            return compiled(*carry, *batch)[:2]

        programs.append(Program(step, share, recipe.cycle))
        analysis = compiled.cost_analysis() or {}
        flops += share * analysis.get("flops", 0.0)
        usage = compiled.memory_analysis()
        memory = max(memory, usage.temp_size_in_bytes if usage else 0)
    return Contender(
        name,
        programs,
        (params, state),
        jax.block_until_ready,
        {"flops": None if recipe.loops else flops, "memory": memory},
    )
