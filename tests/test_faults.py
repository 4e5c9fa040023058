# SPDX-License-Identifier: Apache-2.0
"""Long runs, killed runs, full counters and full memory."""

import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah

LARGEST = jnp.iinfo(jnp.int32).max


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("hessian_ema", ["rms", "mean"])
@pytest.mark.parametrize(
    ("interval", "reuse"), [(1, True), (7, True), (7, False)], ids=str
)
def test_a_hundred_thousand_updates(interval, reuse, hessian_ema, dtype, x64):
    """Counters are exact, averages as exact as rounding once a step lets them be."""
    steps, b1, b2, order = 100_000, 0.9, 0.999, 2 if hessian_ema == "rms" else 1
    phases = np.array([0.0, 1.0, 2.0, 3.0])

    def row(t, cos):  # gradients and curvature, the last with a mean above zero
        return cos(0.01 * t + phases), 2 + cos(0.37 * t + phases)

    tx = ah.scale_by_adahessian(
        b1,
        b2,
        hessian_ema=hessian_ema,
        update_interval=interval,
        reuse_estimate=reuse,
    )
    params = jnp.zeros(4, dtype)

    def step(carry, _):
        _, state = carry
        g, d = row(state.count.astype(jnp.float64), jnp.cos)
        updates, state = tx.update(
            g.astype(dtype), state, params, hessian_diag=d.astype(dtype)
        )
        return (updates, state), None

    start = jnp.zeros(4, dtype), tx.init(params)
    (updates, state), _ = jax.jit(
        lambda carry: jax.lax.scan(step, carry, length=steps)
    )(start)

    m = v = np.zeros(4)
    last, refreshes = None, 0
    for t in range(steps):
        g, d = row(t, np.cos)
        m = b1 * m + (1 - b1) * g
        if t % interval == 0:
            last, refreshes = d, refreshes + 1
        if reuse or t % interval == 0:
            v = b2 * v + (1 - b2) * last**order
    assert state.count == steps
    assert state.refreshes == refreshes
    # A step rounds by at most 4 half units, and what it rounds decays with the average.
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(state.mu, m, atol=2 * eps / (1 - b1))
    np.testing.assert_allclose(state.nu, v, rtol=2 * eps / (1 - b2))
    v_hat = v / (1 - b2 ** (steps if reuse else refreshes))
    expected = m / (np.sqrt(v_hat) if order == 2 else v_hat)
    np.testing.assert_allclose(
        updates, expected, atol=2 * eps / (1 - b1) + 2 * eps / (1 - b2)
    )


@pytest.mark.parametrize("options", [{}, {"update_interval": 2}], ids=str)
def test_full_counters_stay_full(options):
    """After 2**31 updates; the averages go on, and no bias is left to correct."""
    tx = ah.scale_by_adahessian(eps=0.0, **options)
    w = jnp.array([1.0, 2.0])
    _, state = tx.update(w, tx.init(w), w, hessian_diag=w)
    state = state._replace(
        count=jnp.int32(LARGEST - 1), refreshes=jnp.int32(LARGEST - 1), mu=w, nu=w**2
    )
    for _ in range(3):
        updates, state = tx.update(w, state, w, hessian_diag=w)
        np.testing.assert_allclose(updates, [1.0, 1.0], rtol=1e-6)
        assert state.count == LARGEST
        assert state.refreshes >= LARGEST - 1


def run(folder, file):
    """Start the run in a process of its own."""
    program = pathlib.Path(__file__).parent / "resumable_run.py"
    return subprocess.Popen(
        [sys.executable, str(program), str(folder), str(file)],
        cwd=program.parent.parent,
        stdout=subprocess.PIPE,
        text=True,
    )


def kill_at(process, line):
    """Send SIGKILL as soon as the process says a line; return what it said first."""
    first = process.stdout.readline()
    for said in process.stdout:
        if said.strip() == line:
            break
    else:
        raise AssertionError(f"the run ended without {line!r}")
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    return first.strip()


def test_a_killed_run_ends_with_the_same_bits(tmp_path):
    """Killed between checkpoints, and twice while one is being written."""
    undisturbed = run(tmp_path / "undisturbed", tmp_path / "undisturbed.npz")
    killed = tmp_path / "killed"
    starts = [
        kill_at(run(killed, tmp_path / "no.npz"), line)
        for line in ("step 10", "saving 20", "saving 32")
    ]
    assert starts[0] == "from 0"
    assert starts[1] in ("from 4", "from 8")  # whichever was whole
    assert starts[2] in ("from 16", "from 20")
    resumed = run(killed, tmp_path / "resumed.npz")
    for process in (undisturbed, resumed):
        process.communicate()
        assert process.returncode == 0
    assert not (tmp_path / "no.npz").exists()
    expected, got = (
        np.load(tmp_path / f"{name}.npz") for name in ("undisturbed", "resumed")
    )
    assert len(expected.files) > 10
    for name in expected.files:
        np.testing.assert_array_equal(got[name], expected[name])


NO_MEMORY = "(?i)out of memory"


def loss(w):
    return jnp.sum(jnp.cos(w) * jnp.arange(1.0, 1 + w.size) / w.size)


def test_an_estimator_that_needs_too_much_memory_leaves_the_caller_its_state():
    """The old optimizer goes on as if the other had never been tried."""
    n = 10**7  # a basis of n x n numbers of 4 bytes is 400 TB
    w = jnp.ones(n)
    tx = ah.adahessian(0.1)
    step = jax.jit(lambda w, state: tx.update(jax.grad(loss)(w), state, w, obj_fn=loss))
    _, state = step(w, tx.init(w))
    before = jax.tree.map(np.array, (w, state))
    greedy = ah.adahessian(
        0.1, estimator=ah.hutchinson(control_variate=ah.low_rank_control(n))
    )
    with pytest.raises(RuntimeError, match=NO_MEMORY):
        jax.block_until_ready(greedy.init(w))
    chex.assert_trees_all_equal((w, state), before)
    _, state = step(w, state)
    assert state[0].count == 2


def test_an_update_that_needs_too_much_memory_leaves_the_caller_its_state():
    """A step that keeps its arguments can be tried again with less."""
    n = 10**7
    w = jnp.ones(n)

    def all_pairs_at_once(p):
        return jnp.sum(jnp.dot(jnp.tanh(jnp.outer(p, p)), p))

    tx = ah.adahessian(0.1)
    state = tx.init(w)
    before = jax.tree.map(np.array, (w, state))

    def step(w, state, objective):
        updates, state = tx.update(w, state, w, obj_fn=objective)
        return optax.apply_updates(w, updates), state

    step = jax.jit(step, static_argnums=2)
    with pytest.raises(RuntimeError, match=NO_MEMORY):
        jax.block_until_ready(step(w, state, all_pairs_at_once))
    chex.assert_trees_all_equal((w, state), before)
    _, state = step(w, state, loss)
    assert state[0].count == 1
