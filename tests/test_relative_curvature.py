# SPDX-License-Identifier: Apache-2.0
"""The factor itself; that its average is AdaHessian's; and where it may be put."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding

import adahessian_jax as ah
from tests import test_composition, test_devices, test_resume
from tests.test_composition import GaussNewton, Hutchinson, assert_close, norm
from tests.test_resume import restore, save


@pytest.fixture
def standard_promotion():
    """Optax's Adam needs it."""
    with jax.numpy_dtype_promotion("standard"):
        yield


def factor_by_hand(h, k, c):
    """The factor of one tensor, in float64."""
    h = np.asarray(h, np.float64)
    return ((1 + c) * h.mean() / (h + c * h.mean())) ** k


def factors(h, **options):
    """The factor that the transformation takes from one estimate."""
    h = jnp.asarray(h)
    options = {"update_interval": 1, **options}
    tx = ah.scale_by_relative_curvature(**options)
    ones = jnp.ones(h.shape, h.dtype)
    updates, _ = tx.update(ones, tx.init(ones), ones, hessian_diag=h)
    return updates


@pytest.mark.parametrize("injected", [False, True])
@pytest.mark.parametrize("power", [0.0, 0.25, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("hessian_ema", ["mean", "rms"])
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_three_updates_by_hand(hessian_ema, power, injected):
    rng = np.random.default_rng(0)
    make, b2, c = ah.scale_by_relative_curvature, 0.8, 0.3
    if injected:
        make = optax.inject_hyperparams(make)
    tx = make(power, c, b2=b2, hessian_ema=hessian_ema, update_interval=1)
    params = {"a": jnp.ones((3, 4)), "b": jnp.ones(5)}
    state, v = tx.init(params), {"a": 0.0, "b": 0.0}
    for t in range(3):
        diag = {name: rng.normal(size=p.shape) for name, p in params.items()}
        incoming = {name: rng.normal(size=p.shape) for name, p in params.items()}
        updates, state = tx.update(incoming, state, params, hessian_diag=diag)
        for name, d in diag.items():
            order = 2 if hessian_ema == "rms" else 1
            v[name] = b2 * v[name] + (1 - b2) * d**order
            unbiased = np.abs(v[name] / (1 - b2 ** (t + 1))) ** (1 / order)
            expected = incoming[name] * factor_by_hand(unbiased, power, c)
            np.testing.assert_allclose(updates[name], expected, rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 1e6, 1e30])
@pytest.mark.parametrize(("power", "damping"), [(0.25, 0.1), (1.0, 0.01), (3.0, 2.0)])
def test_factor_is_bounded_and_knows_no_scale(power, damping, scale):
    h = np.float32([0.0, 1e-20, 1e-3, 1.0, 1e4])
    got = factors(h * np.float32(scale), power=power, damping=damping)
    expected = factor_by_hand(h, power, damping)
    np.testing.assert_allclose(got, expected, rtol=1e-5 * max(power, 1))
    assert got.max() <= ((1 + damping) / damping) ** power * (1 + 1e-5)


@pytest.mark.parametrize(
    "h",
    {
        "even": [3.0, 3.0, 3.0],
        "none": [0.0, 0.0, 0.0],
        "subnormal": [1e-42, 2e-42, 0.0],
        "mean-overflows": [3e38, 3e38, 1.0],
        "all-infinite": [np.inf, np.inf, np.nan],
    }.values(),
    ids=str,
)
def test_updates_stay_where_curvature_says_nothing(h):
    np.testing.assert_allclose(factors(np.float32(h), b2=0.0), 1, rtol=1e-6)


def test_an_entry_without_an_estimate_keeps_its_update():
    first = jnp.array([1.0, jnp.nan, 4.0, 1.0])
    got = factors(first)
    assert got[1] == 1
    expected = factor_by_hand([1.0, 0.0, 4.0, 1.0], 0.25, 0.1)
    np.testing.assert_allclose(got, [*expected[:1], 1, *expected[2:]], rtol=1e-6)


def test_negative_curvature_counts_by_its_size():
    np.testing.assert_array_equal(
        factors(jnp.array([1.0, -2.0, 3.0])), factors(jnp.array([1.0, 2.0, 3.0]))
    )


def test_parameters_that_are_not_floating_point_keep_their_updates():
    params = {"w": jnp.ones(2), "n": jnp.array([1, 2])}
    updates = {"w": jnp.ones(2), "n": jnp.array([3, 4])}
    tx = ah.scale_by_relative_curvature()
    got, _ = tx.update(
        updates, tx.init(params), params, obj_fn=lambda p: jnp.sum(p["w"] ** 4)
    )
    np.testing.assert_array_equal(got["n"], [3, 4])


def test_dtypes_stay_and_nothing_is_compiled_twice():
    params = {"half": jnp.ones(3, jnp.bfloat16), "single": jnp.ones(2)}
    tx = ah.scale_by_relative_curvature(nu_dtype=jnp.float32)
    state, compiled = tx.init(params), []

    @jax.jit
    def update(updates, state):
        compiled.append(1)
        d = jax.tree.map(lambda p: p * 2, params)
        return tx.update(updates, state, params, hessian_diag=d)

    for _ in range(3):
        updates, new = update(params, state)
        chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
        chex.assert_trees_all_equal_shapes_and_dtypes(new, state)
        state = new
    assert state.nu["half"].dtype == jnp.float32
    assert len(compiled) == 1


def test_averaging_makes_one_factor_of_a_kernel():
    kernel = jnp.arange(1.0, 13.0).reshape(2, 2, 3, 1)
    averaged = jnp.mean(kernel, (0, 1), keepdims=True)
    np.testing.assert_allclose(
        factors(
            kernel,
            averaging=ah.conv_spatial_average(is_conv=lambda path, leaf: True),
        ),
        jnp.broadcast_to(factors(averaged), kernel.shape),
        rtol=1e-6,
    )


SCHEDULES = {
    "every": {"update_interval": 1},
    "interval": {"update_interval": 3, "initial_refreshes": 0},
    "initial": {"update_interval": 3, "initial_refreshes": 2},
    "no-reuse": {
        "update_interval": 3,
        "initial_refreshes": 0,
        "reuse_estimate": False,
    },
}
METHODS = {"hutchinson": Hutchinson, "gauss-newton": GaussNewton}


@pytest.mark.parametrize("path", ["obj_fn", "fused"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_average_is_that_of_adahessian(schedule, method, path):
    """On the path of an SGD, step by step, that of ``hessian_ema="mean"``."""
    method = METHODS[method]()
    options = {"b2": 0.9, "estimator": method.estimator, **SCHEDULES[schedule]}
    tx = optax.chain(ah.scale_by_relative_curvature(0.0, **options), optax.scale(-0.1))
    adahessian = ah.scale_by_adahessian(hessian_ema="mean", **options)
    step = test_composition.steps_of(tx, path, method, True)
    same = test_composition.steps_of(adahessian, path, method, True)
    params = test_composition.PARAMS
    state, other = tx.init(params), adahessian.init(params)
    x, y = test_composition.X, test_composition.Y
    for _ in range(7):
        updates, state = step(params, state, x, y)
        _, other = same(params, other, x, y)
        params = optax.apply_updates(params, updates)
        for field in state[0]._fields:
            assert_close(getattr(state[0], field), getattr(other, field))
    assert norm(state[0].nu) > 0


def recipe(before=None, **options):
    options = {"update_interval": 2, "initial_refreshes": 3, **options}
    return optax.chain(
        optax.scale_by_adam() if before is None else before,
        ah.scale_by_relative_curvature(**options),
        optax.scale_by_learning_rate(0.05),
    )


def only_matrices(params):
    return jax.tree.map(lambda p: p.ndim == 2, params)


LABELS = {"encoder": "curved", "decoder": "rest"}
WRAPPERS = {
    "alone": lambda tx: tx,
    "masked": lambda tx: optax.masked(tx, only_matrices),
    "partition": lambda tx: optax.partition(
        {"curved": tx, "rest": optax.adam(0.05)}, LABELS
    ),
    "beside-adahessian": lambda tx: optax.partition(
        {"curved": tx, "rest": ah.adahessian(0.05)}, LABELS
    ),
    "multi-steps": lambda tx: optax.MultiSteps(tx, 2),
    "if-finite": lambda tx: optax.apply_if_finite(tx, 3),
    "clipped": lambda tx: optax.chain(optax.clip_by_global_norm(1.0), tx),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_inside_wrappers(wrapper):
    """It trains, and the fused path takes the steps that ``obj_fn`` does."""
    tx = WRAPPERS[wrapper](recipe())
    by_function, state = test_composition.train(tx, steps=6)
    if wrapper == "beside-adahessian":  # groups share a fused estimate
        tx = WRAPPERS[wrapper](recipe(update_interval=1))
        by_function, state = test_composition.train(tx, "fused", steps=6)
        curved, rest = both_states(state)
        assert (curved.refreshes, rest.refreshes) == (6, 6)
    else:
        fused, _ = test_composition.train(tx, "fused", steps=6)
        assert_close(by_function, fused)
    losses = [
        test_composition.loss_fn(p, test_composition.X, test_composition.Y)
        for p in (test_composition.PARAMS, by_function[-1])
    ]
    assert losses[1] < losses[0]


def both_states(state):
    kinds = ah.ScaleByAdaHessianState | ah.ScaleByRelativeCurvatureState
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds))
    return [x for x in leaves if isinstance(x, kinds)]


@pytest.mark.parametrize(
    "before",
    {
        "adam": optax.scale_by_adam(),
        "lion": optax.scale_by_lion(),
        "muon": optax.contrib.muon(1.0),
        "momentum": optax.trace(0.9),
    }.values(),
    ids=["adam", "lion", "muon", "momentum"],
)
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_after_other_optimizers(before):
    """The factor is of the estimate alone, whatever the updates."""
    x, y = test_composition.X, test_composition.Y
    params = {"w": test_composition.PARAMS["decoder"]["w"]}
    features = jnp.tanh(jnp.dot(x, test_composition.PARAMS["encoder"]["w"]))

    def loss(p):
        return test_composition.cross_entropy(jnp.dot(features, p["w"]), y)

    grads = jax.grad(loss)(params)
    incoming, _ = before.update(grads, before.init(params), params)
    updates, _ = recipe(before).update(
        grads, recipe(before).init(params), params, obj_fn=loss
    )
    diag, _ = ah.hutchinson().update(
        grads, ah.hutchinson().init(params), params, obj_fn=loss
    )
    expected = incoming["w"] * factor_by_hand(jnp.abs(diag["w"]), 0.25, 0.1)
    np.testing.assert_allclose(updates["w"], -0.05 * expected, rtol=1e-9)


@pytest.mark.parametrize("name", test_devices.ESTIMATORS)
@pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices")
@pytest.mark.usefixtures("x64", "standard_promotion")
def test_over_devices(name):
    """Replicas of ``pmap`` stay the same bits; ``jit`` over a mesh is one device."""
    params, x, y = jax.tree.map(
        jnp.float64, (test_devices.PARAMS, test_devices.X, test_devices.Y)
    )
    with jax.threefry_partitionable(True):
        estimator = test_devices.make_estimator(name, "data")
        tx = recipe(estimator=estimator)
        step = test_devices.make_step(tx, estimator, "fused", "data")
        start = jax.tree.map(lambda a: jnp.stack([a] * 8), (params, tx.init(params)))
        parts = [a.reshape(8, -1, *a.shape[1:]) for a in (x, y)]
        replicas = test_devices.train(jax.pmap(step, "data"), *start, *parts)
        for leaf in jax.tree.leaves(replicas):
            raw = np.asarray(leaf)
            np.testing.assert_array_equal(raw, np.broadcast_to(raw[:1], raw.shape))

        estimator = test_devices.make_estimator(name)
        tx = recipe(estimator=estimator)
        step = jax.jit(test_devices.make_step(tx, estimator, "fused"))
        # Bases are known to rounding after more estimates than they have vectors.
        trained = test_devices.train(step, params, tx.init(params), x, y, 100)
        trained = jax.tree.map(np.asarray, trained)
        alone = test_devices.train(step, *trained, x, y)
        mesh = test_devices.mesh_of(8)
        whole, sharded = (
            NamedSharding(mesh, spec)
            for spec in (test_devices.P(), test_devices.P("data"))
        )
        start = jax.device_put(trained, whole)
        batch = jax.device_put((x, y), sharded)
        over_mesh = test_devices.train(step, *start, *batch)
    chex.assert_trees_all_close(over_mesh[0], alone[0], rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.usefixtures("standard_promotion")
def test_goes_on_from_a_checkpoint_bit_for_bit(schedule, tmp_path):
    estimator = test_devices.make_estimator("hutchinson")
    tx = recipe(estimator=estimator, **SCHEDULES[schedule])
    step = jax.jit(test_devices.make_step(tx, estimator, "fused"))
    params = jax.tree.map(jnp.asarray, test_devices.PARAMS)
    batch = test_devices.X, test_devices.Y
    halfway = test_devices.train(step, params, tx.init(params), *batch, 5)
    save(tmp_path / "checkpoint", halfway)
    undisturbed = test_devices.train(step, *halfway, *batch, 5)
    like = jax.tree.map(jnp.zeros_like, (params, tx.init(params)))
    resumed = test_devices.train(
        step, *restore(tmp_path / "checkpoint", like), *batch, 5
    )
    chex.assert_trees_all_equal(resumed, undisturbed)


OTHER = {
    "adahessian": (
        lambda: test_resume.a_state(update_interval=10),
        TypeError,
        "state must be a ScaleByRelativeCurvatureState, got a ScaleByAdaHessianState",
    ),
    "other-parameters": (
        lambda: ah.scale_by_relative_curvature().init({"w": jnp.ones(2)}),
        ValueError,
        "state.nu must have the same tree structure as params",
    ),
    "other-shapes": (
        lambda: ah.scale_by_relative_curvature().init(
            {**test_devices.PARAMS, "b": jnp.ones(3)}
        ),
        ValueError,
        "state must come from an optimizer with the same averaging",
    ),
    "interval": (
        lambda: ah.scale_by_relative_curvature(update_interval=1).init(
            test_devices.PARAMS
        ),
        ValueError,
        "another update_interval",
    ),
}


@pytest.mark.parametrize(("state", "error", "message"), OTHER.values(), ids=OTHER)
def test_a_state_of_another_configuration_is_refused(state, error, message):
    params = test_devices.PARAMS
    with pytest.raises(error, match=message):
        ah.scale_by_relative_curvature().update(
            params, state(), params, hessian_diag=params
        )


def test_curvature_of_another_state():
    """An error outside ``jit``, and NaN inside, where none can be raised."""
    loss, params = lambda p: jnp.sum(p**4), jnp.array([1.0, 2.0])
    tx = ah.scale_by_relative_curvature(update_interval=1)
    fused = ah.value_and_grad_with_curvature(loss, ah.hutchinson())
    state = tx.init(params)
    _, grads, curvature = fused(params, state=state)
    updates, new = tx.update(grads, state, params, curvature=curvature)
    assert jnp.isfinite(updates).all()
    with pytest.raises(ValueError, match="curvature was computed for another state"):
        tx.update(grads, new, params, curvature=curvature)
    updates, _ = jax.jit(tx.update)(grads, new, params, curvature=curvature)
    assert jnp.isnan(updates).all()


def test_diagnostics():
    params = {"w": jnp.ones(4), "b": jnp.zeros(2)}
    tx = ah.scale_by_relative_curvature(b2=0.0)
    diag = {"w": jnp.array([1.0, -2.0, 3.0, 10.0]), "b": jnp.zeros(2)}
    updates, state = tx.update(params, tx.init(params), params, hessian_diag=diag)
    report = ah.diagnostics(state, updates=updates, clip_threshold=100.0)
    assert (report["count"], report["trace"], report["clipped_share"]) == (1, 12, 0)
    np.testing.assert_allclose(report["negative_share"], 1 / 6)
    for q in (0.05, 0.5, 0.95):
        np.testing.assert_allclose(
            report[f"relative_curvature/w/{q}"],
            np.quantile([0.25, 0.5, 0.75, 2.5], q),
            rtol=1e-6,
        )
    assert jnp.isnan(report["relative_curvature/b/0.5"])
    mixed = {**params, "n": jnp.arange(3)}
    assert not any("/n/" in key for key in ah.diagnostics(tx.init(mixed)))
    with pytest.raises(ValueError, match="updates must have the same tree structure"):
        ah.diagnostics(state, updates={"w": jnp.ones(4)})
