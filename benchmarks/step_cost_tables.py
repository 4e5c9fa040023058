# SPDX-License-Identifier: Apache-2.0
"""The tables of the step-cost benchmark: what each of them measures."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import networks
import optax
from step_cost_contenders import Recipe, prepare, recipes, somax_recipe
from step_cost_timing import Contender, Program, compare

import adahessian_jax as ah

Rows = dict[str, Any]


def steps(
    names: list[str],
    *,
    peers: list[str],
    only: list[str] | None,
    rounds: int,
    include_slow: bool,
    save: Callable[[Rows], None],
) -> None:
    """Compare whole steps on each network; the result is ``{network: rows}``."""
    for name in names:
        net = networks.NETWORKS[name]()
        chosen = recipes(net)
        if "somax" in peers:
            chosen["somax"] = somax_recipe(net)
        if only is not None:
            chosen = {k: v for k, v in chosen.items() if k in {"optax.adam", *only}}
        if not include_slow:
            chosen = {k: v for k, v in chosen.items() if not _left_out(name, k, v)}
        contenders = []
        for label, recipe in chosen.items():
            _say(f"{name}: compiling {label}")
            contenders.append(prepare(label, recipe, net.params, net.batch))
        _say(f"{name}: timing")
        save({name: compare(contenders, rounds)})
        if "torch" in peers:
            import step_cost_torch

            _say(f"{name}: timing torch")
            contenders = step_cost_torch.contenders(name)
            save({name: compare(contenders, rounds)})


def _left_out(network: str, contender: str, recipe: Recipe) -> bool:
    """Whether a step would run for minutes: see ``--slow`` in the help."""
    if jax.default_backend() != "cpu" or not recipe.slow_convolutions:
        return False
    peer = "optax" in contender or contender == "somax"
    return network == "ResNet-20" or (network == "ResNet-8" and not peer)


def probes(*, rounds: int, quick: bool, save: Callable[[Rows], None]) -> None:
    """Draw random signs for trees of 8 leaves; ``{elements: rows}``."""

    def per_leaf(key: jax.Array, tree: Any) -> Any:
        leaves, treedef = jax.tree.flatten(tree)
        keys = jax.random.split(key, len(leaves))
        signs = [
            jax.random.rademacher(k, x.shape, x.dtype)
            for k, x in zip(keys, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, signs)

    draws = {
        "jax.random.rademacher": per_leaf,
        "rademacher_like": ah.rademacher_like,
        "normal_like": ah.normal_like,
    }
    for exponent in (5, 6) if quick else (5, 6, 7, 8):
        n = 10**exponent
        tree = [jax.ShapeDtypeStruct((n // 8,), jnp.float32)] * 8
        contenders = []
        for name, draw in draws.items():
            contenders.append(_draw_alone(name, draw, tree))
        _say(f"probes: {n:.0e} elements")
        rows = compare(contenders, max(3, rounds // 3) if exponent == 8 else rounds)
        for row in rows.values():
            row["ns_per_element"] = 1e6 * row["ms"] / n
        save({f"{n:.0e}": rows})


def _draw_alone(name: str, draw: Callable[..., Any], tree: Any) -> Contender:
    @jax.jit
    def split_and_draw(key: jax.Array) -> Any:
        key, subkey = jax.random.split(key)
        return key, draw(subkey, tree)

    def step(carry: Any) -> Any:
        return split_and_draw(carry[0])

    return Contender(name, [Program(step)], (jax.random.key(0),), jax.block_until_ready)


def updates(*, rounds: int, quick: bool, save: Callable[[Rows], None]) -> None:
    """Time ``tx.update`` alone, with the estimate ready-made; ``{case: rows}``."""
    scale = 10 if quick else 1
    trees = {
        "25M parameters in 8 leaves": [jnp.ones(25_000_000 // 8 // scale)] * 8,
        "5M parameters in 500 leaves": [jnp.ones(10_000 // scale)] * 500,
    }
    for case, params in trees.items():
        contenders = [
            _update_alone("optax.adam", optax.adam(1e-3), params),
            _update_alone("adahessian", ah.adahessian(1e-3), params),
            _update_alone(
                "adahessian, mean", ah.adahessian(1e-3, hessian_ema="mean"), params
            ),
        ]
        _say(f"updates: {case}")
        save({case: compare(contenders, rounds)})
    width = 64 if quick else 256
    params = {f"conv{i}": jnp.ones((3, 3, width, width)) for i in range(8)}
    case = f"8 kernels of 3 x 3 x {width} x {width}"
    contenders = [_update_alone("adahessian", ah.adahessian(1e-3), params)]
    for abs_first in (True, False):
        rule = ah.conv_spatial_average(abs_first=abs_first)
        tx = ah.adahessian(1e-3, averaging=rule)
        name = f"conv_spatial_average, abs_first={abs_first}"
        contenders.append(_update_alone(name, tx, params))
    _say(f"updates: {case}")
    save({case: compare(contenders, rounds)})


def _update_alone(name: str, tx: Any, params: Any) -> Contender:
    tx = optax.with_extra_args_support(tx)
    if name == "optax.adam":
        extra_args = {}
    else:
        extra_args = {"hessian_diag": jax.tree.map(jnp.ones_like, params)}
    grads = jax.tree.map(lambda p: 0.01 * p, params)
    state = jax.tree.map(jnp.copy, tx.init(params))
    compiled = (
        jax.jit(
            lambda state, grads, params, extra_args: tx.update(
                grads, state, params, **extra_args
            )[::-1],
            donate_argnums=0,
        )
        .lower(state, grads, params, extra_args)
        .compile()
    )

    def step(carry: Any) -> Any:
        return compiled(carry[0], grads, params, extra_args)

    return Contender(name, [Program(step)], (state,), jax.block_until_ready)


def scaling(
    *, rounds: int, quick: bool, full: bool, save: Callable[[Rows], None]
) -> None:
    """Compare steps by width of an MLP and depth of a GPT; ``{size: rows}``."""
    cases: dict[str, Callable[[], networks.Network]] = {}
    mlp_widths = [110, 290, 680, 1390, 2790] + ([9600] if full else [])
    for width in mlp_widths[:3] if quick else mlp_widths:
        n = 784 * width + width**2 + 12 * width
        cases[f"MLP, {n:.1e} parameters"] = lambda width=width: networks.mlp(
            (784, width, width, 10)
        )
    for layers in (1, 2) if quick else (1, 2, 4, 8):
        cases[f"GPT, {layers} layer{'s'[: layers > 1]}"] = lambda layers=layers: (
            networks.gpt(layers)
        )
    names = ["optax.adam", "every step", "every 10", "Gauss-Newton"]
    for case, make in cases.items():
        net = make()
        _say(f"scaling: {case}")
        contenders = [
            prepare(label, recipe, net.params, net.batch)
            for label, recipe in recipes(net).items()
            if label in names
        ]
        save({case: compare(contenders, rounds)})


def _say(text: str) -> None:
    print(text, flush=True)
