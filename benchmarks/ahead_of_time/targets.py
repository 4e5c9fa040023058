# SPDX-License-Identifier: Apache-2.0
"""Devices to compile for, on a machine that has none of them.

Nothing here imports JAX before :func:`prepare` has set what it reads when it starts.
"""

import os
from pathlib import Path
from typing import Any

N_DEVICES = 8
WAYS = ("one device", "data parallel", "state sharded", "fully sharded")
_H100 = Path(__file__).parent / "h100.txtpb"  # in the terms of XLA
NAMES = {"tpu": "TPU v5e", "cuda": "NVIDIA H100"}

# The compiler for a TPU asks its host for these.
_ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_PLATFORMS": "cpu",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TPU_ACCELERATOR_TYPE": f"v5litepod-{N_DEVICES}",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
}


def prepare() -> None:
    """Set the environment, before JAX is imported."""
    os.environ.update(_ENVIRONMENT)


def devices(platform: str) -> list[Any]:
    """Return eight devices of a platform, that programs can be compiled for."""
    from jax.experimental import topologies

    if platform == "tpu":
        topology = topologies.get_topology_desc("v5e:2x4", platform="tpu")
    else:
        described = {"topology": "1x1x8", "target_config": _H100.read_text("utf-8")}
        topology = topologies.get_topology_desc(platform="cuda", **described)
    return list(topology.devices)
