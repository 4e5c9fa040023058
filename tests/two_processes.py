# SPDX-License-Identifier: Apache-2.0
"""One of several processes that train together; run by test_devices.py.

Arguments: address of the coordinator, number of processes, which of them this is, the
file to which parameters and state are saved, and a folder for checkpoints. They are
written half-way by all of several processes, and a single one goes on from them.
"""

import os
import sys

address, n_processes, process, file, folder = sys.argv[1:]
n_local = 8 // int(n_processes)
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={n_local}"

import jax  # noqa: E402
import numpy as np  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from jax.sharding import NamedSharding  # noqa: E402

if int(n_processes) > 1:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, int(n_processes), int(process))

from tests import test_devices as td  # noqa: E402

assert jax.device_count() == 8
assert jax.local_device_count() == n_local
mesh = td.mesh_of()


def placed(tree, spec):
    """Put the same whole arrays of each process on all devices, by parts or whole."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(
            np.shape(x), sharding, lambda index: np.asarray(x)[index]
        ),
        tree,
    )


leaves = []
for name in ("hutchinson", "newton"):
    tx = td.make_optimizer(name, "data")
    step = td.on_devices(td.make_step(tx, name, "fused", "data"), mesh)
    half = placed((td.PARAMS, tx.init(td.PARAMS)), td.P())
    batch = placed((td.X, td.Y), td.P("data"))
    with ocp.StandardCheckpointer() as checkpointer:
        if int(n_processes) > 1:
            half = td.train(step, *half, *batch, steps=10)
            checkpointer.save(f"{folder}/{name}", half)
        else:
            half = checkpointer.restore(f"{folder}/{name}", half)
    trained = td.train(step, *half, *batch, steps=10)
    leaves += [np.asarray(x.addressable_data(0)) for x in jax.tree.leaves(trained)]
np.savez(file, **{str(i): x for i, x in enumerate(leaves)})
