# SPDX-License-Identifier: Apache-2.0
"""Bad input: the type and the message of each error, and that its advice works."""

import inspect
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import adahessian_jax as ah

W = {"w": jnp.ones(3), "b": {"c": jnp.ones(2)}}
NO_C = {"w": W["w"]}
# Gradients here are not those of the functions.
pytestmark = pytest.mark.filterwarnings("ignore:The curvature of params")
L = ah.losses
SOFTMAX, SQUARED = L.softmax_cross_entropy, L.squared_error
SUM = SQUARED.replace(reduction="sum")
QUARTIC = L.of_row(lambda f, y: jnp.sum((f - y) ** 4))
CONCAVE = L.of_row(lambda f: -jnp.sum(f**2))
HUTCHINSON, GN = ah.hutchinson(), ah.gauss_newton(SOFTMAX)
OPTAX_ESTIMATOR = optax.contrib.hutchinson_estimator_diag_hessian()
EMA = ah.hutchinson(control_variate=ah.ema_control())
CONTROL = ah.hutchinson(control_variate=ah.gauss_newton_control(SQUARED))
MODEL = ah.scale_by_quadratic_model(SOFTMAX)
REMEMBERING = ah.scale_by_quadratic_model(SOFTMAX, memory=1)
F, Y, ONES = jnp.ones((4, 2)), jnp.zeros((4, 2)), jnp.ones(4)
AVERAGE = ah.conv_spatial_average()
CONV, FIVE = jnp.ones((3, 3, 2, 4)), jnp.ones((2, 3, 3, 2, 4))


def is_5d(path, leaf):
    return leaf.ndim == 5


def ada(estimator=HUTCHINSON, **options):
    return ah.adahessian(0.1, estimator=estimator, **options)


ADA, EVERY_2, TURNED = ada(), ada(update_interval=2), ada(ah.in_eigenbasis(GN))
NEWTON, OF_LABELS = (ah.newton(0.1, of) for of in (SQUARED, QUARTIC))


def loss(params):
    return jnp.sum(params["w"] ** 2) + jnp.sum(params["b"]["c"] ** 2)


def predict(params):
    return params["w"]


def of_batch(params, batch):
    return loss(params) * jnp.sum(batch)


ESTIMATE = {"fun": of_batch, "params": W, "batches": [ONES], "estimator": HUTCHINSON}
ESTIMATE |= {"n_samples": 1}


def both(params, *batch):
    return SQUARED(params["w"], W["w"]), params["w"]


def update(tx=ADA, params=W, grads=W, state=None, **kwargs):
    return tx.update(grads, tx.init(W) if state is None else state, params, **kwargs)


def estimate(estimator=HUTCHINSON, params=W, **kwargs):
    return estimator.update(None, estimator.init(W), params, **kwargs)[0]


def gauss_newton(predict_fn, of=SOFTMAX):
    return estimate(ah.gauss_newton(of), predict_fn=predict_fn)


def groups(*estimators):
    txs = {i: ada(e) for i, e in enumerate(estimators)}
    return optax.partition(txs, {"w": 0, "b": 1})


def fused(tx=ADA, loss_fn=loss, *batch, of=None, then=None, maker=None, **call):
    """Make a fused estimate by the optimizer ``of``, and update."""
    value_and_grad = ah.value_and_grad_with_curvature(loss_fn, of or tx, **maker or {})
    state = tx.init(W)
    _, grads, curvature = value_and_grad(W, *batch, state=state, **call)
    return tx.update(grads, state, W, curvature=curvature, **then or {})


def in_parts(x, n):
    return fused(ADA, lambda p, x: x.sum() * loss(p), x, maker={"microbatches": n})


def two_steps(anew):
    value_and_grad, state = ah.value_and_grad_with_curvature(loss, ADA), ADA.init(W)
    _, grads, curvature = value_and_grad(W, state=state)
    _, state = ADA.update(grads, state, W, curvature=curvature)
    if anew:
        _, grads, curvature = value_and_grad(W, state=state)
    return ADA.update(grads, state, W, curvature=curvature)


def injected(**static):
    make = optax.inject_hyperparams(ah.adahessian, **static)
    return make(learning_rate=0.1, mu_dtype=jnp.bfloat16).init(W)


def injected_mask():
    def mask(params):
        return jax.tree.map(lambda x: x.ndim > 0, params)

    make = optax.inject_hyperparams(ah.adahessian)
    return make(0.1, weight_decay=0.1, weight_decay_mask=mask).init(W)


def init_with_rule(rule, name="w"):
    return ada(averaging=rule).init({name: CONV[:, :, :, :3], "x": FIVE})


def diagnostics(state=None, **kwargs):
    return ah.diagnostics(ADA.init(W) if state is None else state, **kwargs)


def in_sophia(estimator):
    with jax.numpy_dtype_promotion("standard"):  # Sophia needs it
        update(optax.contrib.sophia(0.1, hessian_diagonal_fn=estimator), obj_fn=loss)


def in_vmap(estimator):
    mapped = jax.vmap(lambda _: estimate(estimator, obj_fn=loss), axis_name="batch")
    return mapped(jnp.arange(2))


# What is said, and by what call.
# fmt: off
VALUE_ERRORS = {
    "twice, and got no obj_fn. Either": lambda: update(),
    "got no obj_fn, only value.": lambda: update(value=1.0),
    "params must be given": lambda: update(ah.published.soap(), params=None),
    "params must be given: the": lambda: update(params=None, obj_fn=loss),
    "params. The leaf ['b']['c'] is missing.": lambda: update(hessian_diag=NO_C),
    "['z'] is not a parameter.": lambda: update(hessian_diag=W | {"z": 1.0}),
    "hessian_diag['w'] must have": lambda: update(hessian_diag=W | {"w": jnp.ones(1)}),
    "updates must have the same": lambda: update(grads=NO_C, hessian_diag=W),
    "optimizer in turned axes": lambda: update(TURNED, hessian_diag=W),
    "tangents must have the same": lambda: ah.hvp(loss, W, NO_C),
    "axis_name='x' is not": lambda: estimate(ah.hutchinson(axis_name="x"), obj_fn=loss),
    "ema_control needs the": lambda: fused(ada(EMA)),
    "ema_control needs": lambda: in_sophia(EMA),
    "the probe must have the same":
        lambda: estimate(ah.hutchinson(probe=lambda key, p: p["w"]), obj_fn=loss),
    "outputs and got no predict_fn.": lambda: update(NEWTON, obj_fn=loss),
    "outputs of shape (3, 1) do not": lambda: gauss_newton(lambda p: p["w"][:, None]),
    "outputs of shape () do not fit": lambda: gauss_newton(lambda p: p["w"][0]),
    "returned outputs that are NaN": lambda: gauss_newton(lambda p: p["w"] * jnp.nan),
    "it must have the shape of": lambda: SQUARED(F, Y, where=ONES[:3]),
    "where must not be negative": lambda: SQUARED(F, Y, where=-ONES),
    "labels of shape (4,) do not match outputs of": lambda: SQUARED(F[:, :1], ONES),
    "labels of shape (4, 1) do not match outputs of": lambda: SOFTMAX(F, Y[:, :1]),
    "that are not classes must add up to 1": lambda: SOFTMAX(F, Y),
    "must be classes from 0 to 1": lambda: SOFTMAX(F, jnp.array([0, 1, -1, 0])),
    "outputs must be known numbers: call check outside jax.jit":
        lambda: jax.jit(lambda f: SQUARED.check(lambda f: f.sum(), f))(F),
    "labels must be given to losses.squared_error": lambda: SQUARED(F, None),
    "labels must be given to losses.of_row(": lambda: QUARTIC(F),
    "losses.of_row(<lambda>) takes labels of shape (4,)":
        lambda: QUARTIC(F, ONES[:3]),
    "takes rows along the last 3 axes": lambda: SUM.replace(event_ndim=3)(F, F),
    "curvature of losses.of_row(<lambda>) depends on the labels and got none":
        lambda: update(OF_LABELS, predict_fn=predict),
    "loss must be convex in the": lambda: gauss_newton(predict, CONCAVE),
    "loss must be convex":
        lambda: gauss_newton(lambda p: 0 * p["w"], L.of_element(jnp.cos)),
    "loss_fn has 8 times the curvature": lambda: SQUARED.check(lambda f: SUM(f, Y), F),
    "loss_fn has -2 times": lambda: SQUARED.check(lambda f: -2 * SQUARED(f, Y), F),
    "loss_fn has 1.01 times": lambda: SQUARED.check(lambda f: 1.01 * SQUARED(f, Y), F),
    "not even a multiple":
        lambda: SQUARED.check(lambda f: jnp.sum(f**4), jnp.arange(3.0)),
    "or loss_fn has no finite curvature":
        lambda: SQUARED.check(lambda f: SQUARED(f, Y, where=Y[:, 0]), F, where=Y[:, 0]),
    "network returned outputs that are NaN":
        lambda: SQUARED.check(lambda f: SQUARED(f**2, Y), F * jnp.nan),
    "outputs and got no labels.": lambda: estimate(CONTROL, predict_fn=predict),
    "rank must not exceed the number of parameters, 5, got 6.":
        lambda: ah.hutchinson(control_variate=ah.low_rank_control(6)).init(W),
    "loss) with n_samples=1 for": lambda: ah.in_eigenbasis(
        ah.gauss_newton(SOFTMAX, n_samples=2), axes_from="factors"
    ),
    "shares no pass with the gradient: use":
        lambda: fused(ada(ah.in_eigenbasis(ah.squared_gradient())), loss),
    "in_eigenbasis(...) inside of something else":
        lambda: ada(optax.chain(ah.in_eigenbasis(GN))).init(W),
    "grad must be given: the slope": lambda: update(MODEL, predict_fn=predict),
    "network's outputs and got no predict_fn. Pass a": lambda: update(MODEL, grad=W),
    "memory must be that of the optimizer that made the state":
        lambda: update(REMEMBERING, state=MODEL.init(W), grad=W, predict_fn=predict),
    "grad must have": lambda: update(MODEL, grad=NO_C, predict_fn=predict),
    "and got no predict_fn. Pass": lambda: fused(ah.newton(None, SQUARED), both),
    "learning_rate=0.1 and schedule are both rates":
        lambda: ah.newton(0.1, SQUARED, schedule=optax.constant_schedule(1.0)),
    "scale_by_adahessian, and there is none in this": lambda: fused(optax.adam(0.1)),
    "tx must be that of an optimizer by curvature": lambda: fused(of=optax.adam(0.1)),
    "state must be that of an": lambda: diagnostics(optax.adam(0.1).init(W)),
    "states of 2 transformations by curvature: pass that of one":
        lambda: diagnostics(groups(HUTCHINSON, HUTCHINSON).init(W)),
    "not a part of it": lambda: diagnostics(ADA.init(W)[0].curvature),
    "previous_estimate must be None, for": lambda: diagnostics(previous_estimate=W),
    "clip_threshold must be None, for": lambda: diagnostics(clip_threshold=1.0),
    "tx has 2 estimators that": lambda: fused(groups(HUTCHINSON, ah.hutchinson(2))),
    "shares no pass with the gradient": lambda: fused(ada(OPTAX_ESTIMATOR)),
    "computed for another state": lambda: two_steps(anew=False),
    "another estimator than the optimizer's": lambda: fused(of=ada(GN)),
    "refresh=False before any": lambda: fused(EVERY_2, refresh=False),
    "reduction='sum' contradicts": lambda: fused(NEWTON, both, F, maker=SUM_OF_PARTS),
    "batch[0] of shape (4, 2) cannot be cut along its first": lambda: in_parts(F, 3),
    "array to cut into 2 parts, got 1 scalars only.": lambda: in_parts(F[0, 0], 2),
    "an axis or more beside its channels":
        lambda: init_with_rule(ah.conv_spatial_average(stacked=lambda *_: 2), "conv"),
    "layout must say where the": lambda: init_with_rule(AVERAGE, "conv.weight"),
    "got None for ['b']['c'] of":
        lambda: ah.soap(0.1, stacked=lambda *_: None).init(W),
    "got 9 for ['b']['c'] of":
        lambda: ah.newton(0.1, SUM, stacked=lambda *_: 9).init(W),
    "block_average(axis=0, size=2)": lambda: init_with_rule(ah.block_average(0, 2)),
    "a leaf that broadcasts": lambda: init_with_rule(lambda path, leaf: leaf[:1, :2]),
}
TYPE_ERRORS = {
    "argument 'objfn': did you mean 'obj_fn'?": lambda: update(objfn=loss),
    "unexpected argument where: predict_fn returns":
        lambda: update(NEWTON, predict_fn=predict, where=ONES),
    "mean 'hessian_diag'?": lambda: update(obj_fn=loss, hesian_diag=W),
    "did you mean 'refresh'?": lambda: fused(refesh=False),
    "where is an argument of loss_fn and was given by name": lambda: (
        ah.value_and_grad_with_curvature(lambda p, where=None: loss(p), ADA)(
            W, state=ADA.init(W), where=ONES
        )
    ),
    "unexpected argument train: loss_fn gets": lambda: fused(train=False),
    "refresh must be True or False, got 1.": lambda: fused(refresh=1),
    "mu_dtype must be None or a floating-point dtype (in": lambda: injected(),
    "weight_decay_mask must be None, a tree of bools": lambda: injected_mask(),
    "params['f'] must be an array or a number, got": lambda: (
        ah.value_and_grad_with_curvature(loss, ADA)(W | {"f": loss}, state=ADA.init(W))
    ),
    "params['w'] must be an array or a number, got 'a'": lambda: ADA.init({"w": "a"}),
    "params['w'] has dtype": lambda: ADA.init({"w": jnp.ones(2, jnp.complex64)}),
    "obj_fn must be a callable params -> loss, got 3.0.": lambda: update(obj_fn=3.0),
    "obj_fn must return a scalar, got an array of": lambda: update(obj_fn=predict),
    "loss, got a tuple. If it": lambda: update(obj_fn=lambda p: (loss(p), p)),
    "loss, got dtype int32.": lambda: update(obj_fn=lambda p: jnp.asarray(1)),
    "predict_fn must be a callable": lambda: estimate(GN, predict_fn=W["w"]),
    "or a tuple (outputs, where), got {'b'": lambda: gauss_newton(lambda p: p),
    "Several outputs make one array": lambda: gauss_newton(lambda p: (p["w"],) * 3),
    "outputs must be floating point": lambda: SQUARED(jnp.arange(3), Y),
    "outputs must be one array": lambda: SQUARED({"a": F}, Y),
    "labels must be one array": lambda: QUARTIC(F, {"a": F}),
    "labels must be integers": lambda: SOFTMAX(F, ONES),
    "loss must return a scalar, got an array of shape (2,)":
        lambda: L.of_row(lambda f: f**2)(F),
    "is a raw PRNG key, or looks like one":
        lambda: in_parts(jax.random.PRNGKey(0), 2),
    "decay must be a number (in optax.inject_hyperparams": lambda: (
        ah.low_rank_control(2, decay=jnp.array(0.5))
    ),
    "tangents['w'] has dtype complex64":
        lambda: ah.hvp(loss, W, W | {"w": jnp.zeros(3, jnp.complex64)}),
    "losses.of_row(f) or of_element(f) for a": lambda: ah.newton(0.1, "l2"),
    "missing 1 required positional argument: 'loss'": lambda: ah.newton(SQUARED),
    "learning_rate must be a number, a": lambda: ah.newton(SQUARED, 0.1),
    "schedule or None, got a loss": lambda: ah.newton(SQUARED, SQUARED),
    "loss_fn must return one scalar array": lambda: fused(ADA, both),
    "loss_fn must return (loss, outputs) for a": lambda: fused(NEWTON),
    "a pair (loss, aux) with": lambda: fused(maker={"has_aux": True}),
    "curvature must be what value_and": lambda: update(curvature=W),
    "state must be a ScaleByAdaHessianState, got a ScaleByAdamState. Restore":
        lambda: ah.scale_by_adahessian().update(W, optax.scale_by_adam().init(W), W),
    "betas must be a pair": lambda: ah.published.davda54(betas=0.9),
}
# fmt: on
SUM_OF_PARTS = {"microbatches": 2, "reduction": "sum"}
ERRORS = [(ValueError, *case) for case in VALUE_ERRORS.items()]
ERRORS += [(TypeError, *case) for case in TYPE_ERRORS.items()]


@pytest.mark.parametrize(
    ("error", "message", "call"), ERRORS, ids=[case[1] for case in ERRORS]
)
def test_message(error, message, call):
    with pytest.raises(error, match=re.escape(message)) as caught:
        call()
    assert caught.type is error


# What messages advise, by a part of the advice; the call must end without NaN.
# fmt: off
WAYS_OUT = {
    "the estimator needs, predict_fn": lambda: update(TURNED, predict_fn=predict),
    "jax.vmap with that axis name": lambda: in_vmap(ah.hutchinson(axis_name="batch")),
    "hessian_ema='mean'": lambda: fused(ada(EMA, hessian_ema="mean")),
    "predict_fn=lambda p: model.apply(p,": lambda: update(NEWTON, predict_fn=predict),
    "logit per row use losses.sigmoid_binary_cross_entropy":
        lambda: gauss_newton(lambda p: p["w"][:, None], L.sigmoid_binary_cross_entropy),
    "pass labels=y, beside predict_fn to tx.update, or to what": lambda: (
        update(OF_LABELS, predict_fn=predict, labels=jnp.zeros(3)),
        fused(OF_LABELS, both, labels=jnp.zeros(3)),
    ),
    "Use hutchinson()": lambda: update(obj_fn=lambda p: CONCAVE(p["w"], None)),
    "correct the reduction": lambda: SUM.check(lambda f: SUM(f, Y), F),
    "with rows that have weight":
        lambda: SQUARED.check(lambda f: SQUARED(f, Y, where=ONES), F, where=ONES),
    "predict_fn=lambda p: model.apply(p, x), labels=y); or to what": lambda: (
        estimate(CONTROL, predict_fn=predict, labels=jnp.zeros(3)),
        fused(ada(CONTROL), both, labels=jnp.zeros(3)),
    ),
    "gauss_newton(loss) with n_samples=1":
        lambda: ah.in_eigenbasis(GN, axes_from="factors").init(W),
    "pass in_eigenbasis(...) itself, and what":
        lambda: ada(ah.in_eigenbasis(optax.chain(OPTAX_ESTIMATOR))).init(W),
    "leave axes_from at 'gradients'":
        lambda: ah.in_eigenbasis(ah.squared_gradient()).init(W),
    "the state new by tx.init":
        lambda: update(REMEMBERING, grad=W, predict_fn=predict),
    "use jax.value_and_grad, and give tx.update":
        lambda: update(ada(ah.in_eigenbasis(ah.squared_gradient()))),
    "params, grad=grads, predict_fn=": lambda: (
        update(MODEL, grad=W, predict_fn=predict),
        fused(ah.newton(None, SQUARED), both, then={"grad": W, "predict_fn": predict}),
    ),
    "newton(schedule, loss), or learning_rate=None":
        lambda: ah.newton(None, SQUARED, schedule=optax.constant_schedule(1.0)).init(W),
    "newton(0.03, loss), or newton(None, loss)": lambda: [
        update(ah.newton(rate, SQUARED), predict_fn=predict) for rate in (0.03, None)
    ],
    "losses.of_row(f) or of_element(f) for a function of your own": lambda: (
        gauss_newton(predict, L.of_row(lambda f: jnp.sum(f**2))),
        gauss_newton(predict, L.of_element(jnp.square)),
    ),
    "for optax.partition state.inner_states[label]":
        lambda: diagnostics(groups(HUTCHINSON, HUTCHINSON).init(W).inner_states[0]),
    "pass obj_fn to tx.update, or": lambda: update(ada(OPTAX_ESTIMATOR), obj_fn=loss),
    "pass estimate= as well": lambda: diagnostics(estimate=W, previous_estimate=W),
    "pass updates= as well":
        lambda: diagnostics(clip_threshold=1.0, updates=W)["clipped_share"],
    "all groups of parameters": lambda: fused(groups(ah.hutchinson(), ah.hutchinson())),
    "or pass obj_fn and predict_fn to tx.update": lambda: update(
        groups(HUTCHINSON, ah.hutchinson(2)), obj_fn=ah.unmasked(loss, W)
    ),
    "function with the state that is given to update": lambda: two_steps(anew=True),
    "Give both the same estimator": lambda: fused(NEWTON, both, of=NEWTON),
    "the first call needs refresh=True or None":
        lambda: [fused(EVERY_2, refresh=refresh) for refresh in (True, None)],
    "loss.replace(reduction='sum')":
        lambda: fused(ah.newton(0.1, SUM), both, F, maker=SUM_OF_PARTS),
    "with is_conv=":
        lambda: init_with_rule(ah.conv_spatial_average(is_conv=is_5d), "conv"),
    "layout='OIHW', last":
        lambda: init_with_rule(ah.conv_spatial_average(layout="OIHW"), "conv.weight"),
    "with is_blocked=": lambda: init_with_rule(
        ah.block_average(0, 2, is_blocked=is_5d)
    ),
    "pass static_args=('mu_dtype',)": lambda: injected(static_args=("mu_dtype",)),
    "with jnp.mean for": lambda: update(obj_fn=lambda p: jnp.mean(predict(p))),
    "loss_fn(params, batch)[0].": lambda: update(obj_fn=lambda p: (loss(p), p)[0]),
}
# fmt: on


@pytest.mark.parametrize("advice", WAYS_OUT)
def test_advice_works(advice):
    for leaf in jax.tree.leaves(WAYS_OUT[advice]()):
        assert not np.isnan(np.asarray(leaf, np.float32)).any()


def test_advice_is_given():
    """Every piece is in a message; those of warnings and notes have tests beside."""
    messages = []
    for _, _, call in ERRORS:
        with pytest.raises((ValueError, TypeError)) as caught:
            call()
        messages.append(str(caught.value))
    for advice in WAYS_OUT:
        assert any(advice in message for message in messages), advice


def test_complex_parameters_as_advised():
    """By jax.lax.complex of real and imaginary parts: |z|^4 bends by 12, 4."""
    parts = {"re": jnp.ones(2), "im": jnp.zeros(2)}

    def objective(p):
        return jnp.sum(jnp.abs(jax.lax.complex(p["re"], p["im"])) ** 4)

    updates, _ = ADA.update(parts, ADA.init(parts), parts, obj_fn=objective)
    np.testing.assert_allclose(updates["re"], -0.1 * 1 / 12, rtol=1e-5)
    np.testing.assert_array_equal(updates["im"], jnp.zeros(2))


def test_a_rule_that_averages_nothing_warns():
    with pytest.warns(UserWarning, match=r"none of the 2 parameters, such as \['w'\]"):
        init_with_rule(AVERAGE)
    init_with_rule(ah.conv_spatial_average(is_conv=lambda *_: True))  # as it advises


# What arguments must not be, by the error; some names are of one function only.
NUMBERS = ["0.1", True, (0.1,)]
FROM_ZERO = "event_ndim initial_refreshes memory n_vectors"
FROM_ONE = (
    "chunk_size every k max_dim max_precond_dim max_products mc_iters microbatches"
    " n_samples precondition_frequency rank size turn_interval update_each"
    " update_interval"
)
# fmt: off
WRONG = [  # names, TypeError, ValueError
    ("b1 b2 decay shampoo_beta", NUMBERS, [1.0, -0.1, np.nan]),
    ("damping learning_rate lr eps weight_decay wd rtol", NUMBERS, [-1e-3, np.inf]),
    ("clip_threshold fraction hessian_power", NUMBERS, [0.0, -1.0]),
    (FROM_ONE, [2.0, True], [0]),
    (FROM_ZERO, [2.0, False], [-1]),
    ("axis", [1.0, None, True], []),
    ("abs_first average_conv_kernel has_aux nesterov precondition_1d progress"
     " turn_vectors unbiased"
     " unroll zack_dugue.control_variate", [1, "yes"], []),
    ("axes_from hessian_ema layout mode reduction", [], ["no such", ["rms"]]),
    ("sign", [], [0, 2, "no such"]),
    ("loss", ["l2_loss", optax.l2_loss, None], []),
    ("estimator tx", ["hutchinson", ah.hutchinson], []),
    ("control_variate", ["ema", ah.ema_control], []),
    ("averaging fun is_blocked is_conv labels_fn loss_fn of_element.loss of_row.loss"
     " stacked", [3, "relu"], []),
    ("largest_eigenvalues.loss preconditioned_sharpness sharpness start",
     ["l2", W], []),
    ("batches", [3], []),
    ("mu_dtype nu_dtype", [int, "float33", complex], []),
    ("seed", ["0", 1.5, True, W], []),
    ("axis_name", [3, ("batch", 0)], []),
    ("probe", [3, None], ["uniform"]),
    ("weight_decay_mask", [3, ("w", "b")], []),
    ("estimate preconditioner tangents updates", [], [3, NO_C]),
    ("state", [], [3, None]),
    # Trees of any form, and what is tried above.
    ("betas labels name outputs params previous_estimate schedule tree where", [], []),
]
# fmt: on
WRONG = {
    name: [(TypeError, x) for x in types] + [(ValueError, x) for x in values]
    for names, types, values in WRONG
    for name in names.split()
}
# Each function, and a right call of it.
BARE = [ah.conv_spatial_average, ah.ema_control, ah.hutchinson, SQUARED.replace]
BARE += [ah.published.soap]
BARE += [ah.scale_by_adahessian, ah.published.paper, ah.published.zack_dugue]
OF_LOSS = [ah.gauss_newton, ah.gauss_newton_control, ah.scale_by_quadratic_model]
OF_LOSS += [ah.subspace_newton]
# fmt: off
RIGHT = {f: {} for f in BARE} | {f: {"loss": SQUARED} for f in OF_LOSS} | {
    ah.adahessian: {"learning_rate": 0.1},
    ah.block_average: {"axis": 0, "size": 2},
    ah.diagnostics: {"state": ADA.init(W), "updates": W},
    ah.estimate_diagonal: ESTIMATE,
    ah.hessian_diag: {"fun": loss, "params": W},
    ah.hvp: {"fun": loss, "params": W, "tangents": W},
    ah.in_eigenbasis: {"estimator": GN},
    ah.largest_eigenvalues: {"fun": loss, "params": W},
    ah.low_rank_control: {"rank": 2},
    ah.newton: {"learning_rate": 0.1, "loss": SQUARED},
    ah.soap: {"learning_rate": 0.1},
    ah.unmasked: {"fun": loss, "params": W},
    ah.value_and_grad_with_curvature: {"loss_fn": loss, "tx": HUTCHINSON},
    ah.published.davda54: {"average_conv_kernel": True},
    ah.losses.of_row: {"loss": jnp.sum},
    ah.losses.of_element: {"loss": jnp.square},
    SQUARED.check: {"loss_fn": lambda f: SQUARED(f, Y), "outputs": F},
}
# fmt: on


def arguments(function):
    return inspect.signature(function).parameters.values()


def wrong_arguments():
    for function, right in RIGHT.items():
        for argument in arguments(function):
            own = f"{function.__name__}.{argument.name}"
            for error, value in WRONG.get(own, WRONG[argument.name]):
                shown = getattr(value, "__name__", str(value))
                name = f"{function.__name__}-{argument.name}-{shown}"
                call = {**right, argument.name: value}
                yield pytest.param(function, call, argument.name, error, id=name)


def test_the_least_number_is_allowed():
    least = dict.fromkeys(FROM_ZERO.split(), 0) | dict.fromkeys(FROM_ONE.split(), 1)
    for function, right in RIGHT.items():
        for name in inspect.signature(function).parameters.keys() & least.keys():
            function(**{**right, name: least[name]})


def test_wrong_arguments_cover_all_public_functions():
    public = {getattr(ah, name) for name in ah.__all__}
    public -= {ah.losses, ah.published, ah.squared_gradient}  # takes nothing
    assert public < set(RIGHT)
    for function, right in RIGHT.items():
        function(**right)
        with pytest.raises(TypeError, match="unexpected keyword argument 'parms'"):
            function(**right, parms=1)
        for argument in arguments(function):  # none is swallowed, few go by position
            assert argument.kind != argument.VAR_KEYWORD


@pytest.mark.parametrize(("function", "call", "name", "error"), [*wrong_arguments()])
def test_wrong_argument(function, call, name, error):
    with pytest.raises(error, match=rf"^{name} must .*\.$") as caught:
        function(**call)
    assert caught.type is error
    assert caught.value.__cause__ is None


@pytest.fixture(autouse=True)
def nothing_is_changed():
    """Whatever fails, parameters and what was passed as state are as before."""
    trees = W, [RIGHT[ah.diagnostics]["state"]]
    before = jax.tree.map(lambda x: np.array(x, copy=True), trees)
    yield
    chex.assert_trees_all_equal(trees, before)


def test_values_inside_jit_are_checked_by_checkify():
    for of, predict_fn, message in (
        (SQUARED, lambda p: p["w"] * jnp.nan, "outputs that are NaN"),
        (SQUARED, lambda p: (p["w"], -jnp.ones(3)), "where must not be negative"),
        (CONCAVE, predict, "loss must be convex"),
    ):

        def step(of=of, predict_fn=predict_fn):
            return gauss_newton(predict_fn, of)

        with jax.enable_checks(True):
            error, _ = jax.jit(checkify.checkify(step))()
        with pytest.raises(ValueError, match=message):
            error.throw()
        jax.jit(step)()  # cannot see values, and does not raise


def test_no_index_is_out_of_bounds():
    """As ``checkify`` sees it, where vectors of a long axis are not known yet."""
    w, tx = jnp.ones((70, 3)), ah.soap(0.1)
    step = checkify.checkify(tx.update, errors=checkify.index_checks)
    error, _ = jax.jit(step)(w, tx.init(w), w)
    assert error.get() is None


def test_a_stale_curvature_inside_jit_gives_nan():
    updates, _ = jax.jit(lambda: two_steps(anew=False))()
    assert np.isnan(updates["w"]).all()
