# SPDX-License-Identifier: Apache-2.0
"""What each of the tables measures: functions that yield ``(case, rows)``."""

from collections.abc import Iterator
from functools import partial
from typing import Any

import jax

from benchmarks import networks
from benchmarks.cost.contenders import prepare, recipes, somax_recipe
from benchmarks.cost.timing import compare

Cases = Iterator[tuple[str, dict[str, Any]]]


def steps(
    names: list[str], peers: list[str], only: list[str] | None, rounds: int, slow: bool
) -> Cases:
    """Compare whole steps on each network."""
    for name in names:
        net = networks.NETWORKS[name]()
        chosen = recipes(net)
        if "somax" in peers:
            chosen["somax"] = somax_recipe(net)
        contenders = []
        for label, recipe in chosen.items():
            peer = label.startswith(("optax sophia", "somax"))
            convolutions = name == "ResNet-20" if peer else name.startswith("ResNet")
            takes_minutes = convolutions and (peer or recipe.loops)
            fast = slow or not takes_minutes or jax.default_backend() != "cpu"
            if fast and (only is None or label in {"optax.adam", *only}):
                print(f"{name}: compiling {label}", flush=True)
                contenders.append(prepare(label, recipe, net.params, net.batch))
        yield name, compare(contenders, rounds)
        if "torch" in peers:
            from benchmarks.cost import torch_peers

            yield name, compare(torch_peers.contenders(name), rounds)


def scaling(rounds: int, quick: bool, full: bool) -> Cases:
    """Compare steps by width of an MLP and depth of a GPT."""
    widths = [110, 290, 680, 1390, 2790] + ([9600] if full else [])
    cases = {
        f"MLP, {784 * n + n**2 + 12 * n:.1e} parameters": partial(
            networks.mlp, (784, n, n, 10)
        )
        for n in (widths[:3] if quick else widths)
    }
    for n in (1, 2) if quick else (1, 2, 4, 8):
        cases[f"GPT, {n} layer{'s'[: n > 1]}"] = partial(networks.gpt, n)
    names = ["optax.adam", "every step", "davda54, every 10", "Gauss-Newton"]
    for case, make in cases.items():
        net = make()
        chosen = {k: v for k, v in recipes(net).items() if k in names}
        contenders = [prepare(k, v, net.params, net.batch) for k, v in chosen.items()]
        yield case, compare(contenders, rounds)
