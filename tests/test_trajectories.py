# SPDX-License-Identifier: Apache-2.0
"""Recorded runs of the published implementations, reproduced step by step."""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import io_callback

import adahessian_jax as ah
from tests.problems import cross_entropy

DATA = pathlib.Path(__file__).parent / "data"


def mlp_loss(params, x, y):
    hidden = jnp.tanh(jnp.dot(x, params["w1"]) + params["b1"])
    return cross_entropy(jnp.dot(hidden, params["w2"]) + params["b2"], y)


def conv_loss(params, x, y):
    h = jax.lax.conv_general_dilated(
        x, params["k"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NCHW")
    )
    h = jnp.tanh(h + params["kb"][:, None, None])
    return cross_entropy(jnp.dot(h.reshape(len(x), -1), params["w"]) + params["b"], y)


AVERAGE = ah.conv_spatial_average(is_conv=lambda path, leaf: leaf.ndim == 4)


FORMS = {
    "davda54_mlp_default": lambda probe: ah.published.davda54(0.1, probe=probe),
    "davda54_mlp_full": lambda probe: ah.published.davda54(
        0.05, (0.8, 0.95), 1e-4, 0.01, 0.5, update_each=3, n_samples=2, probe=probe
    ),
    "davda54_conv_averaged": lambda probe: ah.published.davda54(
        0.05, average_conv_kernel=AVERAGE, probe=probe
    ),
    "official_conv": lambda probe: ah.published.paper(
        0.05, weight_decay=0.01, average_conv_kernel=AVERAGE, probe=probe
    ),
    "zackdugue_mlp_control_variate": lambda probe: ah.published.zack_dugue(
        0.01, control_variate=True, probe=probe
    ),
    "zackdugue_mlp_plain": lambda probe: ah.published.zack_dugue(
        0.01, wd=0.01, mc_iters=2, probe=probe
    ),
}


class Recording:
    """One recorded run, with 4-D kernels in Flax's HWIO layout."""

    def __init__(self, name):
        with np.load(DATA / f"{name}.npz") as file:
            arrays = {k: v for k, v in file.items() if k != "meta"}
            meta = json.loads(str(file["meta"]))
        names, conv = meta["param_order"], meta["kind"] == "conv"

        def tree(group, *index):
            return {n: jnp.asarray(hwio(arrays[f"{group}/{n}"][index])) for n in names}

        def hwio(array):
            return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array

        n_probes = len(arrays.get(f"probes/{names[0]}", ()))
        x = jnp.asarray(arrays["x"])
        x = x.transpose(0, 2, 3, 1) if conv else x
        y = jnp.asarray(arrays["y"])
        self.loss = lambda params: (conv_loss if conv else mlp_loss)(params, x, y)
        self.init = tree("init", ...)
        self.probes = [tree("probes", i) for i in range(n_probes)]
        self.trajectory = [tree("traj", t) for t in range(meta["steps"])]
        self.losses = arrays["losses"]

    def largest_difference(self, tx, *, jit, loss_difference=1e-10):
        """Run the optimizer and compare every parameter at every step."""

        def step(params, state):
            loss, grads = jax.value_and_grad(self.loss)(params)
            updates, state = tx.update(grads, state, params, obj_fn=self.loss)
            return loss, optax.apply_updates(params, updates), state

        step = jax.jit(step) if jit else step
        params, state, largest = self.init, tx.init(self.init), 0.0
        for expected, expected_loss in zip(self.trajectory, self.losses, strict=True):
            loss, params, state = step(params, state)
            for name, value in params.items():
                largest = max(largest, float(jnp.abs(value - expected[name]).max()))
            assert abs(loss - expected_loss) <= loss_difference
        return largest


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("name", "jit"),
    [(name, True) for name in FORMS]
    + [("davda54_mlp_full", False), ("zackdugue_mlp_control_variate", False)],
)
def test_reproduces_recorded_run(name, jit):
    recording = Recording(name)
    probes = iter(recording.probes)

    def in_order(key, tree):
        del key
        return io_callback(lambda: next(probes), tree, ordered=True)

    tx = FORMS[name](in_order)
    assert recording.largest_difference(tx, jit=jit) <= 1e-10
    assert next(probes, None) is None


SOAP = {
    "soap_mlp_default": ah.published.soap(0.01),
    "soap_mlp_every3": ah.published.soap(
        0.02, (0.9, 0.99), precondition_frequency=3, weight_decay=0.0
    ),
    "soap_conv_limited": ah.published.soap(
        0.01, precondition_frequency=4, max_precond_dim=10
    ),
}


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", SOAP)
def test_reproduces_recorded_run_of_soap(name):
    """Its sums of eigenvectors' squares are as exact as eigenvectors are."""
    compare = functools.partial(Recording(name).largest_difference, SOAP[name])
    assert compare(jit=True, loss_difference=1e-8) <= 1e-8
