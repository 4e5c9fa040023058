# SPDX-License-Identifier: Apache-2.0
"""What is read off compiled programs, and the committed table."""

import json
import pathlib

import jax
import numpy as np
import pytest

import benchmarks
from benchmarks import networks
from benchmarks.ahead_of_time import programs

RESULTS = pathlib.Path(benchmarks.__file__).parent / "results"
# As compilers for CPU, TPU and CUDA write them.
TEXT = """
  %a = f32[512]{0} all-reduce(%x), channel_id=1, to_apply=%add
  %b = (f32[4,8]{1,0:T(8)}, bf16[8]{0}, pred[16]{0}) all-reduce(%x, %y), channel_id=2
  %c = bf16[512,2]{1,0} all-gather(%x), channel_id=3
  %c.again = bf16[512,2]{1,0} all-gather(%y), channel_id=3
%d = ((f32[2,4]{1,0}, f32[2]{0}), (f32[16,4]{1,0}, f32[16]{0})) all-gather-start(%x), \
    channel_id=4
  %e = (f32[42]{0}, f32[42]{0}, u32[]{:S(2)}) collective-permute-start(%x), channel_id=1
  %f = f32[512]{0} add(%x, %y)
"""


def test_collectives_are_counted_by_their_results():
    """Those of one channel are one, and a started one names its operands as well."""
    assert programs.collectives(TEXT) == {
        "all-gather": {"number": 2, "megabytes": (2048 + 4 * (64 + 16)) / 1e6},
        "all-reduce": {"number": 2, "megabytes": (4 * 512 + 128 + 16 + 16) / 1e6},
        "collective-permute": {"number": 1, "megabytes": 4 * 42 / 1e6},
    }


@pytest.mark.parametrize("way", programs.WAYS)
def test_a_step_is_compiled_in_every_way(way):
    """For the CPU's devices; rows of the batch are dealt out, and what the way says."""
    net = networks.mlp((64, 64, 8), batch=16)
    got = programs.measured(net, "hutchinson", way, jax.devices())
    alone = programs.measured(net, "hutchinson", "one device", jax.devices())
    parameters = sum(x.nbytes for x in jax.tree.leaves(net.params))
    assert got["loops"] > 0
    assert got["callbacks"] == got["float64"] == 0
    if way == "one device":
        assert not got["exchanged"]
        return
    assert got["flops"] < alone["flops"] / 2
    summed = sum(
        got["exchanged"].get(kind, {"megabytes": 0})["megabytes"]
        for kind in ("all-reduce", "reduce-scatter")
    )
    whole = 2 * parameters / 1e6  # the gradient, and the product
    np.testing.assert_allclose(summed, whole, rtol=0.1)
    assert ("all-gather" in got["exchanged"]) == way.endswith("sharded")


def test_every_step_is_one_of_the_costs():
    """By its name, and can be traced."""
    net = networks.mlp((8, 8, 3), batch=8)
    for name in programs.STEPS:
        step, tx = programs.step_and_optimizer(net, name)
        jax.eval_shape(step, net.params, tx.init(net.params), *net.batch)


def test_no_committed_step_calls_the_host_or_computes_in_float64():
    """As the documentation says."""
    results = json.loads((RESULTS / "ahead_of_time.json").read_text("utf-8"))
    for target in results.values():
        for ways in target["networks"].values():
            for row in (row for rows in ways.values() for row in rows.values()):
                assert row["callbacks"] == row["float64"] == 0
