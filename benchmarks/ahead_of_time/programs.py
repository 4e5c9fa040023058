# SPDX-License-Identifier: Apache-2.0
"""Which steps are compiled, how their arrays lie on devices, and what is read off."""

import collections
import math
import os
import re
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks.cost.contenders import recipes
from benchmarks.networks import Network

TARGETS = {"tpu": "TPU v5e", "cuda": "NVIDIA H100"}
WAYS = ("one device", "data parallel", "state sharded", "fully sharded")
_H100 = Path(__file__).parent / "h100.txtpb"  # in the terms of XLA
_TPU = {  # the compiler for a TPU asks its host for these
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}
_COLLECTIVES = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
_ROWS = {  # of the table of costs, what is compiled here: its name and which program
    "optax.adam": ("optax.adam", 0),
    "optax sophia": ("optax sophia", 0),
    "hutchinson": ("every step", 0),
    "4 probes": ("4 probes", 0),
    "gauss_newton": ("Gauss-Newton", 0),
    "newton, estimate": ("newton", 0),
    "newton, between": ("newton", 1),
    "newton, own rate, estimate": ("newton, own rate", 0),
    "newton, own rate, between": ("newton, own rate", 1),
    "soap": ("soap", 0),
    "published.paper": ("paper", 0),
    "published.davda54": ("davda54, every 10", 0),
    "published.zack_dugue": ("zack_dugue", 0),
}
STEPS = tuple(_ROWS)


def devices_of(target: str) -> list[Any]:
    """Return eight devices, not there, that programs can be compiled for."""
    if target == "tpu":
        os.environ.update(_TPU)
        topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    else:
        described = {"topology": "1x1x8", "target_config": _H100.read_text("utf-8")}
        topology = topologies.get_topology_desc(platform="cuda", **described)
    return list(topology.devices)


def step_and_optimizer(net: Network, name: str) -> tuple[Any, Any]:
    """Return the step of a row, ``(params, state, *batch)``, and its optimizer."""
    key, index = _ROWS[name]
    recipe = recipes(net)[key]
    return recipe.steps[index], recipe.tx


def measured(net: Network, name: str, way: str, devices: list[Any]) -> dict[str, Any]:
    """Compile a step for devices and return what the compiler says of it.

    FLOPs and bytes that a step accesses (None where the compiler does not count),
    memory in bytes, and what is exchanged, are for each device. A loop's body is
    counted once, and of a branch the dearer side. Seconds are those of this process.
    """
    step, tx = step_and_optimizer(net, name)
    n = 1 if way == "one device" else len(devices)
    mesh = Mesh(np.array(devices[:n]), ("data",), axis_types=(AxisType.Auto,))
    shapes = {x.shape for x in jax.tree.leaves(net.params)}
    first_state = jax.eval_shape(tx.init, net.params)
    params = _laid_out(net.params, mesh, shapes if way == "fully sharded" else ())
    state = _laid_out(first_state, mesh, shapes if way.endswith("sharded") else ())
    # Parameters and state stay where they are.
    places = jax.tree.map(lambda x: x.sharding, (params, state))
    batch = [_placed(x, mesh, PartitionSpec("data")) for x in net.batch]
    start = time.process_time()
    with jax.sharding.set_mesh(mesh):
        jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, None))
        lowered = jitted.lower(params, state, *batch)
        traced = time.process_time()
        program = lowered.compile()
    end = time.process_time()
    costs, memory = program.cost_analysis() or {}, program.memory_analysis()
    text = program.as_text()
    return {
        "flops": costs.get("flops"),
        "bytes": costs.get("bytes accessed"),
        "memory": memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes,
        "exchanged": collectives(text),
        "callbacks": len(re.findall(r"custom_call_target=\"[^\"]*callback", text)),
        "float64": len(re.findall(r"= \(?f64", text)),
        "loops": len(re.findall(r" while\(", text)),
        "seconds": {"trace": traced - start, "compile": end - traced},
    }


def collectives(text: str) -> dict[str, dict[str, float]]:
    """Count what a compiled program exchanges: of each kind how many, and megabytes.

    The megabytes are those of the results on one device.
    """
    found: dict[str, dict[str, float]] = collections.defaultdict(dict)
    pattern = rf"= (.*?) ({_COLLECTIVES})(-start)?\(.*?channel_id=(\d+)"
    for result, kind, start, channel in re.findall(pattern, text):
        if start and result.startswith("(("):  # of operands and results
            result = result.split("), ", 1)[1]
        arrays = [
            _size(*x) for x in re.findall(r"\b([a-z]+\d*)\w*\[([\d,]*)\]", result)
        ]
        if start and kind == "collective-permute":
            arrays = arrays[1:2]  # the operand, the result, and contexts
        found[kind][channel] = sum(arrays)
    return {
        kind: {"number": len(sizes), "megabytes": sum(sizes.values()) / 1e6}
        for kind, sizes in sorted(found.items())
    }


def _size(dtype: str, shape: str) -> int:
    bits = int(dtype.lstrip("abcdefghijklmnopqrstuvwxyz") or 8)  # pred has none
    return math.prod(map(int, filter(None, shape.split(",")))) * bits // 8


def _laid_out(tree: Any, mesh: Mesh, cut: Collection[tuple[int, ...]]) -> Any:
    """Give each array its sharding, along its longest axis if its shape is cut."""

    def placed(x: Any) -> Any:
        spec: list[str | None] = [None] * x.ndim
        fitting = [a for a in range(x.ndim) if x.shape[a] % mesh.size == 0]
        if x.shape in cut and fitting:
            spec[max(fitting, key=lambda a: x.shape[a])] = "data"
        return _placed(x, mesh, PartitionSpec(*spec))

    return jax.tree.map(placed, tree)


def _placed(x: Any, mesh: Mesh, spec: PartitionSpec) -> jax.ShapeDtypeStruct:
    sharding = NamedSharding(mesh, spec)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
