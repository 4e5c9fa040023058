# SPDX-License-Identifier: Apache-2.0
"""What optax asks of its own optimizers, of every estimator and option.

The problems, tolerances and wrappers are those of optax's tests for its contributed
optimizers.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah


@pytest.fixture(autouse=True)
def standard_promotion():
    """Parts of optax need it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


# The problems as sums of squares, so that Gauss-Newton has outputs to work with.
def parabola(params):
    return params - jnp.array([1.0, -1.0, 1.0], params.dtype)


def rosenbrock(params):
    x, y = params
    return jnp.array([1 - x, 10 * (y - x**2)])


PROBLEMS = {
    "parabola": (parabola, [-1.0, 10.0, 1.0], [1.0, -1.0, 1.0]),
    "rosenbrock": (rosenbrock, [0.0, 0.0], [1.0, 1.0]),
}

ESTIMATORS = {
    "hutchinson": lambda: ah.hutchinson(),
    "hutchinson-4": lambda: ah.hutchinson(4),
    "normal": lambda: ah.hutchinson(2, probe="normal"),
    "reverse": lambda: ah.hutchinson(mode="reverse-over-reverse"),
    "finite-difference": lambda: ah.hutchinson(mode="finite-difference"),
    "low-rank": lambda: ah.hutchinson(control_variate=ah.low_rank_control(1)),
    "gauss-newton-control": lambda: ah.hutchinson(
        control_variate=ah.gauss_newton_control("squared_error", reduction="sum")
    ),
    "gauss-newton": lambda: ah.gauss_newton("squared_error", reduction="sum"),
    "in-eigenbasis": lambda: ah.in_eigenbasis(
        ah.gauss_newton("squared_error", reduction="sum")
    ),
    "gauss-newton-hutchinson": lambda: ah.gauss_newton(
        "squared_error", reduction="sum", method="hutchinson"
    ),
    "microbatched": lambda: ah.microbatched(ah.hutchinson(), 2),
    "optax's": lambda: optax.contrib.hutchinson_estimator_diag_hessian(),
}
OPTIONS = {
    "mean": {"hessian_ema": "mean", "relative_damping": 0.1},
    "ema-control": {
        "hessian_ema": "mean",
        "estimator": lambda: ah.hutchinson(control_variate=ah.ema_control()),
        "relative_damping": 0.1,
    },
    "half-power": {"hessian_power": 0.5},
    "every-10": {"update_interval": 10},
    "every-10-no-reuse": {"update_interval": 10, "reuse_estimate": False},
    "initial-refreshes": {"update_interval": 10, "initial_refreshes": 50},
    "damped": {"relative_damping": 0.1},
    "no-momentum": {"b1": 0.0},
    "averaged": {"averaging": lambda path, leaf: jnp.mean(leaf, keepdims=True)},
    "eps": {"eps": 1e-2},
    "half-precision-momentum": {"mu_dtype": jnp.bfloat16},
    "decay-masked-off": {"weight_decay": 0.1, "weight_decay_mask": False},
    "schedule": {"learning_rate": optax.cosine_decay_schedule(0.5, 20_000)},
}
CASES = {
    **{name: {"estimator": make} for name, make in ESTIMATORS.items()},
    **OPTIONS,
}


def options_of(case):
    options = {"learning_rate": 0.2, **CASES[case]}
    if "estimator" in options:
        options["estimator"] = options["estimator"]()
    return options


def make(case):
    return ah.adahessian(**options_of(case))


def extra_args(residuals, case):
    """Return all that any estimator may ask for."""
    if case == "microbatched":
        return {
            "obj_fn": lambda p, part: jnp.mean(part) * jnp.sum(residuals(p) ** 2),
            "batch": jnp.ones(4),
        }
    return {
        "obj_fn": lambda p: jnp.sum(residuals(p) ** 2),
        "predict_fn": residuals,
        "output_loss": lambda f: jnp.sum(f**2),
    }


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.parametrize("case", CASES)
def test_reaches_the_minimum(case, problem):
    residuals, start, minimum = PROBLEMS[problem]
    tx = make(case)

    def step(_, carry):
        params, state = carry
        grads = jax.grad(lambda p: jnp.sum(residuals(p) ** 2))(params)
        extra = extra_args(residuals, case)
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    params = jnp.array(start, jnp.float32)
    # Nothing changes, but every leaf of the state is told from the parameters'.
    state = optax.tree.map_params(tx, lambda v: v, tx.init(params))
    params, _ = jax.jit(lambda *c: jax.lax.fori_loop(0, 20_000, step, c))(params, state)
    np.testing.assert_allclose(params, minimum, rtol=3e-2, atol=3e-2)


PARAMS = [-jnp.ones((2, 3)), jnp.ones((2, 5, 2)), None, jnp.float32(0.5)]
GRADS = jax.tree.map(jnp.negative, PARAMS)


def residuals_of_tree(params):
    return jnp.concatenate([jnp.ravel(jnp.sin(x)) for x in jax.tree.leaves(params)])


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "no-jit"])
@pytest.mark.parametrize("case", CASES)
def test_one_update(case, jit):
    """Form and dtypes stay, under jit and without, and nothing passed is changed."""
    tx = make(case)
    state = tx.init(PARAMS)
    before = jax.tree.map(np.array, (PARAMS, GRADS, state))
    update = jax.jit(
        lambda g, s, p: tx.update(g, s, p, **extra_args(residuals_of_tree, case))
    )
    if not jit:
        with jax.disable_jit():
            updates, new = update(GRADS, state, PARAMS)
    else:
        updates, new = update(GRADS, state, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, PARAMS)
    chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
    chex.assert_tree_all_finite((updates, new))
    chex.assert_trees_all_equal((PARAMS, GRADS, state), before)
    inner = ah.diagnostics(new)
    assert (inner["count"], inner["refreshes"], inner["nonfinite"]) == (1, 1, 0)


@pytest.mark.parametrize("case", CASES)
def test_injected_hyperparameters_change_nothing(case):
    static = ("averaging", "mu_dtype")  # callables, which optax takes for schedules
    inject = optax.inject_hyperparams(ah.adahessian, static_args=static)
    injected = inject(**options_of(case))
    tx, extra = make(case), extra_args(residuals_of_tree, case)
    updates, state = tx.update(GRADS, tx.init(PARAMS), PARAMS, **extra)
    others, other = injected.update(GRADS, injected.init(PARAMS), PARAMS, **extra)
    chex.assert_trees_all_close(others, updates, rtol=1e-4)
    # With an injected interval the state has room for what an interval of 1 needs not.
    chex.assert_trees_all_close(
        ah.diagnostics(other.inner_state)["refreshes"],
        ah.diagnostics(state)["refreshes"],
    )


@pytest.mark.parametrize("case", CASES)
def test_an_empty_tree_and_a_chain_of_one(case):
    tx = optax.chain(make(case))
    extra = extra_args(lambda p: jnp.zeros(1), case)
    updates, _ = tx.update({}, tx.init({}), {}, **extra)
    assert updates == {}
