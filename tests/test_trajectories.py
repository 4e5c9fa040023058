# SPDX-License-Identifier: Apache-2.0
"""Recorded runs of the published implementations, reproduced step by step."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

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


def is_kernel(path, leaf):
    del path
    return leaf.ndim == 4


def warm_up(count):
    """Zack-Dugue's step size multiplies by 1 - b1**t where Adam divides by it."""
    return (1 - 0.9 ** (count.astype(jnp.float64) + 1)) ** 2


def zackdugue(estimator, weight_decay=0.0):
    return optax.chain(
        ah.scale_by_adahessian(
            hessian_ema="mean", hessian_power=0.5, estimator=estimator
        ),
        optax.scale_by_schedule(warm_up),
        optax.add_decayed_weights(weight_decay),
        optax.scale_by_learning_rate(0.01),
    )


FORMS = {
    "davda54_mlp_default": lambda probe: ah.adahessian(
        0.1, estimator=ah.hutchinson(probe=probe)
    ),
    "davda54_mlp_full": lambda probe: ah.adahessian(
        0.05,
        b1=0.8,
        b2=0.95,
        eps=1e-4,
        weight_decay=0.01,
        hessian_power=0.5,
        update_interval=3,
        estimator=ah.hutchinson(n_samples=2, probe=probe),
    ),
    "davda54_conv_averaged": lambda probe: ah.adahessian(
        0.05,
        averaging=ah.conv_spatial_average(is_conv=is_kernel),
        estimator=ah.hutchinson(probe=probe),
    ),
    "official_conv": lambda probe: ah.adahessian(
        0.05,
        eps=1e-4,
        weight_decay=0.01,
        averaging=ah.conv_spatial_average(is_conv=is_kernel),
        estimator=ah.hutchinson(probe=probe),
    ),
    "zackdugue_mlp_control_variate": lambda probe: zackdugue(
        ah.hutchinson(probe=probe, control_variate=ah.ema_control(unbiased=False))
    ),
    "zackdugue_mlp_plain": lambda probe: zackdugue(
        ah.hutchinson(n_samples=2, probe=probe), weight_decay=0.01
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

        n_probes = len(arrays[f"probes/{names[0]}"])
        x = jnp.asarray(arrays["x"])
        x = x.transpose(0, 2, 3, 1) if conv else x
        y = jnp.asarray(arrays["y"])
        self.loss = lambda params: (conv_loss if conv else mlp_loss)(params, x, y)
        self.init = tree("init", ...)
        self.probes = [tree("probes", i) for i in range(n_probes)]
        self.trajectory = [tree("traj", t) for t in range(meta["steps"])]
        self.losses = arrays["losses"]

    def largest_difference(self, tx, *, jit):
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
            assert abs(loss - expected_loss) <= 1e-10
        return largest


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", FORMS)
def test_reproduces_recorded_run(name):
    recording = Recording(name)
    keys = []

    def in_order(key, tree):
        del tree
        keys.append(key)
        return recording.probes[len(keys) - 1]

    with jax.disable_jit():
        tx = FORMS[name](in_order)
        assert recording.largest_difference(tx, jit=False) <= 1e-10
    assert len(keys) == len(recording.probes)

    # Compiled, a probe is found again by the key that asked for it above.
    all_keys = jnp.stack(keys)
    all_probes = jax.tree.map(lambda *probes: jnp.stack(probes), *recording.probes)

    def by_key(key, tree):
        del tree
        index = jnp.argmax(jnp.all(all_keys == key, axis=1))
        return jax.tree.map(lambda probes: probes[index], all_probes)

    tx = FORMS[name](by_key)
    assert recording.largest_difference(tx, jit=True) <= 1e-10
