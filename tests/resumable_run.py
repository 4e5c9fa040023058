# SPDX-License-Identifier: Apache-2.0
"""A training run that saves its state and goes on from there; run by test_resume.py.

Arguments: the folder of the checkpoints, and the file for the parameters and the state
at the end. It says where it starts, and each step and each checkpoint as they begin.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

import adahessian_jax as ah

STEPS, SAVE_EVERY = 40, 4
folder, file = sys.argv[1:]

estimator = ah.hutchinson(control_variate=ah.low_rank_control(2))
tx = ah.adahessian(0.05, estimator=estimator, update_interval=3)
params = {"w": jnp.ones((6, 5)) / 3, "v": jnp.ones((5, 1)) / 2}


def loss_fn(params, x):
    hidden = jnp.tanh(jnp.dot(x, params["w"]))
    return jnp.mean((jnp.dot(hidden, params["v"])[:, 0] - jnp.sin(x[:, 0])) ** 2)


value_and_grad = ah.value_and_grad_with_curvature(loss_fn, tx)


@jax.jit
def step(params, state, x):
    _, grads, curvature = value_and_grad(params, x, state=state)
    updates, state = tx.update(grads, state, params, curvature=curvature)
    return optax.apply_updates(params, updates), state


carry, start = (params, tx.init(params)), 0
options = ocp.CheckpointManagerOptions(max_to_keep=2)
with ocp.CheckpointManager(folder, options=options) as manager:
    if manager.latest_step() is not None:
        start = manager.latest_step()
        carry = manager.restore(start, args=ocp.args.StandardRestore(carry))
    print("from", start, flush=True)
    for t in range(start, STEPS):
        print("step", t, flush=True)
        carry = step(*carry, jax.random.normal(jax.random.key(t), (16, 6)))
        if (t + 1) % SAVE_EVERY == 0:
            manager.save(t + 1, args=ocp.args.StandardSave(carry))
            print("saving", t + 1, flush=True)

np.savez(file, **{str(i): np.asarray(x) for i, x in enumerate(jax.tree.leaves(carry))})
