# SPDX-License-Identifier: Apache-2.0
"""Bad input: the type and the message of each error."""

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


def loss(params):
    return jnp.sum(params["w"] ** 2) + jnp.sum(params["b"]["c"] ** 2)


def update(tx=None, params=W, grads=W, **kwargs):
    tx = ah.adahessian(0.1) if tx is None else tx
    return tx.update(grads, tx.init(W), params, **kwargs)


def estimate(estimator, params=W, **kwargs):
    return estimator.update(None, estimator.init(W), params, **kwargs)


def through_sophia():
    estimator = ah.hutchinson(control_variate=ah.ema_control())
    with jax.numpy_dtype_promotion("standard"):  # Sophia needs it
        update(optax.contrib.sophia(0.1, hessian_diagonal_fn=estimator), obj_fn=loss)


def fused_update(estimator, tx=None, refresh=None, loss_fn=loss, batch=(), **options):
    tx = ah.adahessian(0.1, estimator=estimator) if tx is None else tx
    state = tx.init(W)
    fused = ah.value_and_grad_with_curvature(loss_fn, estimator, **options)
    _, grads, curvature = fused(W, *batch, state=state, refresh=refresh)
    return tx.update(grads, state, W, curvature=curvature)


def fused_update_of_batch(x, **options):
    def loss_fn(params, x):
        return jnp.mean(x) * loss(params)

    return fused_update(ah.hutchinson(), loss_fn=loss_fn, batch=(x,), **options)


def stale_curvature():
    estimator = ah.hutchinson()
    tx = ah.adahessian(0.1, estimator=estimator)
    state = tx.init(W)
    fused = ah.value_and_grad_with_curvature(loss, estimator)
    _, grads, curvature = fused(W, state=state)
    _, state = tx.update(grads, state, W, curvature=curvature)
    tx.update(grads, state, W, curvature=curvature)


def whole(path, leaf):
    return leaf.mean(keepdims=True)


GAUSS_NEWTON = ah.gauss_newton("softmax_cross_entropy")
CONV = (jax.tree_util.DictKey("conv"),)

# At construction: what is called, the error, the whole message or its beginning.
CONSTRUCTION = {
    "learning_rate-negative": (
        lambda: ah.adahessian(-0.1),
        ValueError,
        "learning_rate must lie in [0, inf), got -0.1.",
    ),
    "learning_rate-none": (
        lambda: ah.adahessian(None),
        TypeError,
        "learning_rate must be a number or a scalar array, got None.",
    ),
    "b1-one": (
        lambda: ah.adahessian(0.1, b1=1.0),
        ValueError,
        "b1 must lie in [0, 1), got 1.0.",
    ),
    "b1-negative": (
        lambda: ah.adahessian(0.1, b1=-0.1),
        ValueError,
        "b1 must lie in [0, 1), got -0.1.",
    ),
    "b2-above-one": (
        lambda: ah.scale_by_adahessian(b2=1.5),
        ValueError,
        "b2 must lie in [0, 1), got 1.5.",
    ),
    "b2-nan": (
        lambda: ah.scale_by_adahessian(b2=float("nan")),
        ValueError,
        "b2 must lie in [0, 1), got nan.",
    ),
    "b2-string": (
        lambda: ah.scale_by_adahessian(b2="0.9"),
        TypeError,
        "b2 must be a number or a scalar array, got '0.9'.",
    ),
    "b1-vector": (
        lambda: ah.scale_by_adahessian(b1=jnp.ones(2)),
        TypeError,
        "b1 must be a number or a scalar array, got Array",
    ),
    "betas-as-in-torch": (
        lambda: ah.adahessian(0.1, (0.9, 0.999)),
        TypeError,
        "b1 must be a number or a scalar array, got (0.9, 0.999).",
    ),
    "eps-negative": (
        lambda: ah.adahessian(0.1, eps=-1e-8),
        ValueError,
        "eps must lie in [0, inf), got -1e-08.",
    ),
    "hessian_power-zero": (
        lambda: ah.adahessian(0.1, hessian_power=0),
        ValueError,
        "hessian_power must lie in (0, inf), got 0.",
    ),
    "hessian_power-negative": (
        lambda: ah.adahessian(0.1, hessian_power=-1.0),
        ValueError,
        "hessian_power must lie in (0, inf), got -1.0.",
    ),
    "relative_damping-negative": (
        lambda: ah.adahessian(0.1, relative_damping=-1.0),
        ValueError,
        "relative_damping must lie in [0, inf), got -1.0.",
    ),
    "weight_decay-negative": (
        lambda: ah.adahessian(0.1, weight_decay=-1e-4),
        ValueError,
        "weight_decay must lie in [0, inf), got -0.0001.",
    ),
    "hessian_ema-unknown": (
        lambda: ah.adahessian(0.1, hessian_ema="median"),
        ValueError,
        "hessian_ema must be one of 'rms', 'mean', got 'median'.",
    ),
    "hessian_ema-unhashable": (
        lambda: ah.adahessian(0.1, hessian_ema=["rms"]),
        ValueError,
        "hessian_ema must be one of 'rms', 'mean', got ['rms'].",
    ),
    "update_interval-zero": (
        lambda: ah.adahessian(0.1, update_interval=0),
        ValueError,
        "update_interval must be >= 1, got 0.",
    ),
    "update_interval-float": (
        lambda: ah.adahessian(0.1, update_interval=10.0),
        TypeError,
        "update_interval must be an int, got 10.0.",
    ),
    "update_interval-bool": (
        lambda: ah.adahessian(0.1, update_interval=True),
        TypeError,
        "update_interval must be an int, got True.",
    ),
    "initial_refreshes-negative": (
        lambda: ah.adahessian(0.1, initial_refreshes=-1),
        ValueError,
        "initial_refreshes must be >= 0, got -1.",
    ),
    "reuse_estimate-int": (
        lambda: ah.adahessian(0.1, reuse_estimate=1),
        TypeError,
        "reuse_estimate must be True or False, got 1.",
    ),
    "averaging-string": (
        lambda: ah.adahessian(0.1, averaging="conv"),
        TypeError,
        "averaging must be a callable (path, leaf) -> leaf, got 'conv'.",
    ),
    "mu_dtype-int": (
        lambda: ah.adahessian(0.1, mu_dtype=jnp.int32),
        TypeError,
        "mu_dtype must be None or a floating-point dtype, got",
    ),
    "nu_dtype-unknown": (
        lambda: ah.adahessian(0.1, nu_dtype="float33"),
        TypeError,
        "nu_dtype must be None or a floating-point dtype, got 'float33'.",
    ),
    "estimator-not-called": (
        lambda: ah.adahessian(0.1, estimator=ah.hutchinson),
        TypeError,
        "estimator must be an optax.GradientTransformation, as hutchinson() returns",
    ),
    "misspelt": (
        lambda: ah.adahessian(0.1, hesian_power=1.0),
        TypeError,
        "adahessian() got an unexpected keyword argument 'hesian_power'",
    ),
    "misspelt-estimator": (
        lambda: ah.hutchinson(samples=2),
        TypeError,
        "hutchinson() got an unexpected keyword argument 'samples'",
    ),
    "n_samples-zero": (
        lambda: ah.hutchinson(0),
        ValueError,
        "n_samples must be >= 1, got 0.",
    ),
    "n_samples-float": (
        lambda: ah.hutchinson(2.0),
        TypeError,
        "n_samples must be an int, got 2.0.",
    ),
    "n_samples-array": (
        lambda: ah.hutchinson(jnp.asarray(2)),
        TypeError,
        "n_samples must be an int, got Array(2",
    ),
    "probe-unknown": (
        lambda: ah.hutchinson(probe="gaussian"),
        ValueError,
        "probe must be one of 'rademacher', 'normal', got 'gaussian'.",
    ),
    "probe-number": (
        lambda: ah.hutchinson(probe=3),
        TypeError,
        "probe must be 'rademacher', 'normal' or a callable (key, params) -> probes,",
    ),
    "mode-unknown": (
        lambda: ah.hutchinson(mode="forward"),
        ValueError,
        "mode must be one of 'forward-over-reverse', 'reverse-over-reverse',"
        " 'finite-difference', got 'forward'.",
    ),
    "control_variate-function": (
        lambda: ah.hutchinson(control_variate=ah.ema_control),
        TypeError,
        "control_variate must be None or a ControlVariate, as ema_control() returns,",
    ),
    "seed-float": (
        lambda: ah.hutchinson(seed=0.5),
        TypeError,
        "seed must be an int or one PRNG key, from jax.random.key(0) for example,",
    ),
    "seed-several-keys": (
        lambda: ah.hutchinson(seed=jax.random.split(jax.random.key(0))),
        TypeError,
        "seed must be an int or one PRNG key",
    ),
    "axis_name-int": (
        lambda: ah.hutchinson(axis_name=0),
        TypeError,
        "axis_name must be None, a string or a tuple of strings, got 0.",
    ),
    "unroll-int": (
        lambda: ah.hutchinson(unroll=1),
        TypeError,
        "unroll must be True or False, got 1.",
    ),
    "unbiased-string": (
        lambda: ah.ema_control(unbiased="no"),
        TypeError,
        "unbiased must be True or False, got 'no'.",
    ),
    "gauss_newton-unknown": (
        lambda: ah.gauss_newton("cross_entropy"),
        ValueError,
        "loss must be one of 'softmax_cross_entropy', 'sigmoid_binary_cross_entropy',",
    ),
    "gauss_newton-number": (
        lambda: ah.gauss_newton(2),
        TypeError,
        "loss must be a callable row -> scalar or the name of a loss, got 2.",
    ),
    "gauss_newton-n_samples": (
        lambda: ah.gauss_newton("l2_loss", n_samples=0),
        ValueError,
        "n_samples must be >= 1, got 0.",
    ),
    "gauss_newton-method": (
        lambda: ah.gauss_newton("l2_loss", method="labels"),
        ValueError,
        "method must be one of 'factor', 'hutchinson', 'sampled-labels', got 'labels'.",
    ),
    "gauss_newton-reduction": (
        lambda: ah.gauss_newton("l2_loss", reduction="average"),
        ValueError,
        "reduction must be one of 'mean', 'sum', got 'average'.",
    ),
    "gauss_newton-event_ndim": (
        lambda: ah.gauss_newton(jnp.square, event_ndim=2),
        ValueError,
        "event_ndim must be one of 0, 1, got 2.",
    ),
    "gauss_newton-no-labels-to-sample": (
        lambda: ah.gauss_newton(jnp.square, method="sampled-labels"),
        ValueError,
        "method='sampled-labels' needs a loss that is the likelihood of a known",
    ),
    "gauss_newton-seed": (
        lambda: ah.gauss_newton("l2_loss", seed="0"),
        TypeError,
        "seed must be an int or one PRNG key",
    ),
    "gauss_newton_control-unknown": (
        lambda: ah.gauss_newton_control("mse"),
        ValueError,
        "loss must be one of 'softmax_cross_entropy',",
    ),
    "rank-zero": (
        lambda: ah.low_rank_control(0),
        ValueError,
        "rank must be >= 1, got 0.",
    ),
    "rank-decay": (
        lambda: ah.low_rank_control(2, decay=1.0),
        ValueError,
        "decay must lie in [0, 1), got 1.0.",
    ),
    "microbatches-zero": (
        lambda: ah.microbatched(ah.hutchinson(), 0),
        ValueError,
        "microbatches must be >= 1, got 0.",
    ),
    "microbatched-function": (
        lambda: ah.microbatched(ah.hutchinson, 2),
        TypeError,
        "estimator must be an optax.GradientTransformation, as hutchinson() returns",
    ),
    "fused-loss": (
        lambda: ah.value_and_grad_with_curvature(1.0, ah.hutchinson()),
        TypeError,
        "loss_fn must be a callable (params, *batch) -> loss, got 1.0.",
    ),
    "fused-estimator": (
        lambda: ah.value_and_grad_with_curvature(loss, "hutchinson"),
        TypeError,
        "estimator must be an optax.GradientTransformation, as hutchinson() returns",
    ),
    "fused-has_aux": (
        lambda: ah.value_and_grad_with_curvature(loss, ah.hutchinson(), has_aux=1),
        TypeError,
        "has_aux must be True or False, got 1.",
    ),
    "curvature_batch-zero": (
        lambda: ah.value_and_grad_with_curvature(
            loss, ah.hutchinson(), curvature_batch=0
        ),
        ValueError,
        "curvature_batch must be >= 1, got 0.",
    ),
    "microbatches-and-curvature_batch": (
        lambda: ah.value_and_grad_with_curvature(
            loss, ah.hutchinson(), curvature_batch=3, microbatches=2
        ),
        ValueError,
        "curvature_batch and microbatches exclude each other, got 3 and 2.",
    ),
    "spatial_ndim-zero": (
        lambda: ah.conv_spatial_average(0),
        ValueError,
        "spatial_ndim must be >= 1, got 0.",
    ),
    "is_conv-string": (
        lambda: ah.conv_spatial_average(is_conv="Conv"),
        TypeError,
        "is_conv must be a callable (path, leaf) -> bool, got 'Conv'.",
    ),
    "abs_first-none": (
        lambda: ah.conv_spatial_average(abs_first=None),
        TypeError,
        "abs_first must be True or False, got None.",
    ),
    "block-axis-float": (
        lambda: ah.block_average(0.0, 2),
        TypeError,
        "axis must be an int, got 0.0.",
    ),
    "block-size-zero": (
        lambda: ah.block_average(0, 0),
        ValueError,
        "size must be >= 1, got 0.",
    ),
    "block-is_blocked": (
        lambda: ah.block_average(0, 2, is_blocked=True),
        TypeError,
        "is_blocked must be a callable (path, leaf) -> bool, got True.",
    ),
    "chunk_size-zero": (
        lambda: ah.hessian_diag(loss, W, chunk_size=0),
        ValueError,
        "chunk_size must be >= 1, got 0.",
    ),
}

# At use.
USE = {
    "no-way-to-an-estimate": (
        lambda: update(),
        ValueError,
        "hutchinson needs the objective, to differentiate it twice, and got no obj_fn."
        " Either pass it: tx.update(grads, state, params, obj_fn=lambda p: loss_fn(p,"
        " batch)). Or pass an estimate of your own to the optimizer: tx.update(grads,"
        " state, params, hessian_diag=diag).",
    ),
    "misspelt-obj_fn": (
        lambda: update(objfn=loss),
        TypeError,
        "got an unexpected keyword argument 'objfn': did you mean 'obj_fn'?",
    ),
    "misspelt-beside-obj_fn": (
        lambda: update(obj_fn=loss, hesian_diag=W),
        TypeError,
        "got an unexpected keyword argument 'hesian_diag': did you mean",
    ),
    "another-argument": (
        lambda: update(value=1.0),
        ValueError,
        "hutchinson needs the objective, to differentiate it twice, and got no obj_fn,"
        " only value.",
    ),
    "misspelt-refresh": (
        lambda: ah.value_and_grad_with_curvature(loss, ah.hutchinson())(
            W, state=ah.adahessian(0.1).init(W), refesh=False
        ),
        TypeError,
        "got an unexpected keyword argument 'refesh': did you mean 'refresh'?",
    ),
    "another-averaging": (
        lambda: ah.adahessian(0.1, averaging=whole).update(
            W, ah.adahessian(0.1).init(W), W, hessian_diag=W
        ),
        ValueError,
        "state must come from an optimizer with the same averaging: its nu has the"
        " shapes [(2,), (3,)], this one's averages have [(1,), (1,)].",
    ),
    "state-of-adam": (
        lambda: ah.scale_by_adahessian().update(
            W, optax.scale_by_adam().init(W), W, obj_fn=loss
        ),
        TypeError,
        "state must be a ScaleByAdaHessianState, got a ScaleByAdamState. Restore",
    ),
    "injected-dtype": (
        lambda: optax.inject_hyperparams(ah.adahessian)(
            learning_rate=0.1, mu_dtype=jnp.bfloat16
        ).init(W),
        TypeError,
        "mu_dtype must be None or a floating-point dtype, got",
    ),
    "parameters-of-text": (
        lambda: ah.adahessian(0.1).init({"w": "abc"}),
        TypeError,
        "params['w'] must be an array or a number, got 'abc'.",
    ),
    "probes-of-text": (
        lambda: ah.rademacher_like(jax.random.key(0), ["abc"]),
        TypeError,
        "tree[0] must be an array or a number, got 'abc'.",
    ),
    "unmasked-not-callable": (
        lambda: ah.unmasked(3, W),
        TypeError,
        "fun must be a callable params -> result, got 3.",
    ),
    "check_output_loss-not-callable": (
        lambda: ah.check_output_loss("l2_loss", 3, jnp.ones(2)),
        TypeError,
        "output_loss must be a callable outputs -> loss, got 3.",
    ),
    "no-params": (
        lambda: update(params=None, obj_fn=loss),
        ValueError,
        "params must be given: the curvature is estimated at the parameters. Call"
        " tx.update(grads, state, params, ...).",
    ),
    "estimator-no-params": (
        lambda: estimate(ah.hutchinson(), params=None, obj_fn=loss),
        ValueError,
        "params must be given: the curvature is estimated at the parameters.",
    ),
    "obj_fn-not-callable": (
        lambda: update(obj_fn=3.0),
        TypeError,
        "obj_fn must be a callable params -> loss, got 3.0.",
    ),
    "obj_fn-vector": (
        lambda: update(obj_fn=lambda p: p["w"]),
        TypeError,
        "obj_fn must return a scalar, got an array of shape (3,). Reduce the losses of"
        " the examples first, with jnp.mean for example.",
    ),
    "obj_fn-tuple": (
        lambda: update(obj_fn=lambda p: (loss(p), p)),
        TypeError,
        "obj_fn must return one scalar array, the loss, got a tuple. If it also"
        " returns auxiliary values, drop them: obj_fn=lambda params: loss_fn(params,"
        " batch)[0].",
    ),
    "obj_fn-none": (
        lambda: update(obj_fn=lambda p: None),
        TypeError,
        "obj_fn must return one scalar array, the loss, got a NoneType.",
    ),
    "obj_fn-integer": (
        lambda: update(obj_fn=lambda p: jnp.asarray(1)),
        TypeError,
        "obj_fn must return a real floating-point loss, got dtype int32.",
    ),
    "obj_fn-complex": (
        lambda: update(obj_fn=lambda p: loss(p).astype(jnp.complex64)),
        TypeError,
        "obj_fn must return a real floating-point loss, got dtype complex64.",
    ),
    "hvp-vector": (
        lambda: ah.hvp(lambda p: p["w"], W, W),
        TypeError,
        "fun must return a scalar, got an array of shape (3,).",
    ),
    "hvp-mode": (
        lambda: ah.hvp(loss, W, W, mode="reverse"),
        ValueError,
        "mode must be one of 'forward-over-reverse',",
    ),
    "hvp-tangents": (
        lambda: ah.hvp(loss, W, {"w": W["w"]}),
        ValueError,
        "tangents must have the same tree structure as params. The leaf ['b']['c'] is"
        " missing.",
    ),
    "hvp-tangents-shape": (
        lambda: ah.hvp(loss, W, {"w": W["w"], "b": {"c": jnp.ones(3)}}),
        ValueError,
        "tangents['b']['c'] must have the shape of the parameter, (2,), got (3,).",
    ),
    "hessian_diag-missing-leaf": (
        lambda: update(hessian_diag={"w": W["w"]}),
        ValueError,
        "hessian_diag must have the same tree structure as params. The leaf ['b']['c']"
        " is missing.",
    ),
    "hessian_diag-extra-leaf": (
        lambda: update(hessian_diag={**W, "z": jnp.ones(1)}),
        ValueError,
        "hessian_diag must have the same tree structure as params. The leaf ['z'] is"
        " not a parameter.",
    ),
    "hessian_diag-shape": (
        lambda: update(hessian_diag={"w": jnp.ones(3), "b": {"c": jnp.ones((2, 2))}}),
        ValueError,
        "hessian_diag['b']['c'] must have the shape of the parameter, (2,), got"
        " (2, 2).",
    ),
    "hessian_diag-broadcastable-shape": (
        lambda: update(hessian_diag={"w": jnp.ones(1), "b": {"c": jnp.ones(2)}}),
        ValueError,
        "hessian_diag['w'] must have the shape of the parameter, (3,), got (1,).",
    ),
    "grads-structure": (
        lambda: update(grads={"w": W["w"]}, obj_fn=loss),
        ValueError,
        "updates must have the same tree structure as params. The leaf ['b']['c'] is"
        " missing.",
    ),
    "complex-params": (
        lambda: ah.adahessian(0.1).init({"w": jnp.ones(2, jnp.complex64)}),
        TypeError,
        "params['w'] has dtype complex64: the Hessian's diagonal is defined for real"
        " parameters only. Wrap the optimizer in"
        " optax.contrib.split_real_and_imaginary.",
    ),
    "complex-params-of-an-estimator": (
        lambda: ah.hutchinson().init({"w": jnp.ones(2, jnp.complex64)}),
        TypeError,
        "params['w'] has dtype complex64:",
    ),
    "complex-params-of-hvp": (
        lambda: ah.hvp(loss, jnp.ones(2, jnp.complex64), jnp.ones(2)),
        TypeError,
        "params has dtype complex64:",
    ),
    "unbound-axis": (
        lambda: estimate(ah.hutchinson(axis_name="batch"), obj_fn=loss),
        ValueError,
        "axis_name='batch' is not bound here: call update inside jax.pmap,"
        " jax.shard_map or jax.vmap with that axis name, or leave axis_name out.",
    ),
    "ema_control-with-rms": (
        lambda: update(
            ah.adahessian(
                0.1, estimator=ah.hutchinson(control_variate=ah.ema_control())
            ),
            obj_fn=loss,
        ),
        ValueError,
        "ema_control needs the optimizer's moving average of the Hessian itself: use"
        " scale_by_adahessian or adahessian with hessian_ema='mean'.",
    ),
    "ema_control-in-sophia": (through_sophia, ValueError, "ema_control needs"),
    "probe-structure": (
        lambda: estimate(ah.hutchinson(probe=lambda key, p: p["w"]), obj_fn=loss),
        ValueError,
        "the probe must have the same tree structure as params.",
    ),
    "no-predict_fn": (
        lambda: update(ah.adahessian(0.1, estimator=GAUSS_NEWTON), obj_fn=loss),
        ValueError,
        "Gauss-Newton needs the network's outputs and got no predict_fn. Pass a"
        " function of the parameters: tx.update(grads, state, params,"
        " predict_fn=lambda p: model.apply(p, x)).",
    ),
    "predict_fn-array": (
        lambda: estimate(GAUSS_NEWTON, predict_fn=jnp.ones(3)),
        TypeError,
        "predict_fn must be a callable params -> outputs, got Array",
    ),
    "outputs-integer": (
        lambda: estimate(GAUSS_NEWTON, predict_fn=lambda p: jnp.arange(3)),
        TypeError,
        "predict_fn must return a floating-point array of outputs, or a tuple (outputs,"
        " weights), got (3,).",
    ),
    "outputs-dict": (
        lambda: estimate(GAUSS_NEWTON, predict_fn=lambda p: p),
        TypeError,
        "predict_fn must return a floating-point array of outputs, or a tuple (outputs,"
        " weights), got {'b': {'c': (2,)}, 'w': (3,)}.",
    ),
    "outputs-without-classes": (
        lambda: estimate(GAUSS_NEWTON, predict_fn=lambda p: p["w"][0]),
        ValueError,
        "predict_fn returned outputs of shape (), but the loss takes rows along the"
        " last axis, the classes.",
    ),
    "outputs-one-class": (
        lambda: estimate(GAUSS_NEWTON, predict_fn=lambda p: p["w"][:, None]),
        ValueError,
        "predict_fn returned outputs of shape (3, 1): softmax over one class has no"
        " curvature. The classes must lie along the last axis; for one logit per row"
        " use loss='sigmoid_binary_cross_entropy'.",
    ),
    "outputs-classes-first": (
        lambda: estimate(
            GAUSS_NEWTON,
            predict_fn=lambda p: (jnp.ones((10, 4)) * p["w"][0], jnp.ones(4)),
        ),
        ValueError,
        "weights of shape (4,) do not match outputs of shape (10, 4): they must have"
        " the shape of its leading axes, (10,), the last axis being that of the"
        " classes.",
    ),
    "outputs-nan": (
        lambda: estimate(GAUSS_NEWTON, predict_fn=lambda p: p["w"] * jnp.nan),
        ValueError,
        "predict_fn returned outputs that are NaN.",
    ),
    "weights-shape": (
        lambda: estimate(
            ah.gauss_newton("l2_loss"), predict_fn=lambda p: (p["w"], jnp.ones((3, 1)))
        ),
        ValueError,
        "weights of shape (3, 1) do not match outputs of shape (3,): they must have the"
        " shape of its leading axes, (3,).",
    ),
    "weights-negative": (
        lambda: estimate(
            ah.gauss_newton("l2_loss"),
            predict_fn=lambda p: (p["w"], jnp.array([1.0, -1.0, 1.0])),
        ),
        ValueError,
        "weights must not be negative, got some.",
    ),
    "loss-not-convex": (
        lambda: estimate(
            ah.gauss_newton(lambda row: -jnp.sum(row**2)),
            predict_fn=lambda p: p["w"][None],
        ),
        ValueError,
        "loss must be convex in the outputs, but its second derivative there is"
        " negative in some direction:",
    ),
    "element-loss-not-convex": (
        lambda: estimate(
            ah.gauss_newton(jnp.cos, event_ndim=0), predict_fn=lambda p: p["w"] * 0
        ),
        ValueError,
        "loss must be convex in the outputs,",
    ),
    "gauss_newton-unbound-axis": (
        lambda: estimate(
            ah.gauss_newton("l2_loss", axis_name="batch"), predict_fn=lambda p: p["w"]
        ),
        ValueError,
        "axis_name='batch' is not bound here:",
    ),
    "control-without-output_loss": (
        lambda: estimate(
            ah.hutchinson(control_variate=ah.gauss_newton_control("l2_loss")),
            predict_fn=lambda p: p["w"],
        ),
        ValueError,
        "gauss_newton_control needs the loss as a function of the outputs and got no"
        " output_loss.",
    ),
    "fused-control-without-output_loss": (
        lambda: fused_update(
            ah.hutchinson(control_variate=ah.gauss_newton_control("l2_loss")),
            loss_fn=lambda p: (loss(p), p["w"]),
        ),
        ValueError,
        "gauss_newton_control needs the loss as a function of the outputs and got no"
        " output_loss.",
    ),
    "control-output_loss-vector": (
        lambda: estimate(
            ah.hutchinson(control_variate=ah.gauss_newton_control("l2_loss")),
            predict_fn=lambda p: p["w"],
            output_loss=lambda f: f,
        ),
        TypeError,
        "output_loss must return a scalar, got an array of shape (3,).",
    ),
    "rank-above-parameters": (
        lambda: ah.hutchinson(control_variate=ah.low_rank_control(6)).init(W),
        ValueError,
        "rank must not exceed the number of parameters, 5, got 6.",
    ),
    "microbatched-without-batch": (
        lambda: estimate(ah.microbatched(ah.hutchinson(), 2), obj_fn=loss),
        ValueError,
        "microbatched needs the batch to cut and got none.",
    ),
    "microbatched-indivisible": (
        lambda: estimate(
            ah.microbatched(ah.hutchinson(), 2), obj_fn=loss, batch={"x": jnp.ones(3)}
        ),
        ValueError,
        "batch['x'] of shape (3,) cannot be cut along its first axis into 2 equal",
    ),
    "diagnostics-of-adam": (
        lambda: ah.diagnostics(optax.adam(0.1).init(W)),
        ValueError,
        "state must contain the state of an adahessian, scale_by_adahessian or"
        " scale_by_relative_curvature, and there is none in one of type tuple.",
    ),
    "diagnostics-estimate": (
        lambda: ah.diagnostics(ah.adahessian(0.1).init(W), estimate={"w": W["w"]}),
        ValueError,
        "estimate must have the same tree structure as params. The leaf ['b']['c'] is",
    ),
    "diagnostics-nothing-to-compare": (
        lambda: ah.diagnostics(ah.adahessian(0.1).init(W), previous_estimate=W),
        ValueError,
        "previous_estimate was given, but there is no estimate to compare it with",
    ),
    "diagnostics-nothing-clipped": (
        lambda: ah.diagnostics(ah.adahessian(0.1).init(W), clip_threshold=1.0),
        ValueError,
        "clip_threshold was given, but no updates to look at",
    ),
    "curvature-of-another-count": (
        stale_curvature,
        ValueError,
        "curvature was computed for another state of the optimizer:",
    ),
    "curvature-of-another-estimator": (
        lambda: fused_update(
            ah.hutchinson(), ah.adahessian(0.1, estimator=GAUSS_NEWTON)
        ),
        ValueError,
        "curvature comes from another estimator than the optimizer's:",
    ),
    "curvature-array": (
        lambda: update(curvature=W),
        TypeError,
        "curvature must be what value_and_grad_with_curvature returned, got",
    ),
    "refresh-false-first": (
        lambda: fused_update(
            ah.hutchinson(), ah.adahessian(0.1, update_interval=2), refresh=False
        ),
        ValueError,
        "refresh=False before any estimate was made: the first call needs refresh=True",
    ),
    "refresh-int": (
        lambda: fused_update(ah.hutchinson(), refresh=1),
        TypeError,
        "refresh must be True or False, got 1.",
    ),
    "fused-without-state": (
        lambda: ah.value_and_grad_with_curvature(loss, ah.hutchinson())(W),
        ValueError,
        "state must contain the state of an adahessian, scale_by_adahessian or"
        " scale_by_relative_curvature, and there is none in one of type NoneType.",
    ),
    "fused-vector": (
        lambda: fused_update(ah.hutchinson(), loss_fn=lambda p: p["w"]),
        TypeError,
        "loss_fn must return a scalar, got an array of shape (3,).",
    ),
    "fused-aux-not-announced": (
        lambda: fused_update(ah.hutchinson(), loss_fn=lambda p: (loss(p), p)),
        TypeError,
        "loss_fn must return one scalar array, the loss, got a tuple.",
    ),
    "fused-no-outputs": (
        lambda: fused_update(GAUSS_NEWTON),
        TypeError,
        "loss_fn must return (loss, outputs) for a Gauss-Newton estimator, or",
    ),
    "fused-ema_control": (
        lambda: fused_update(ah.hutchinson(control_variate=ah.ema_control())),
        ValueError,
        "ema_control needs the optimizer's moving average of the Hessian itself:",
    ),
    "curvature_batch-above-batch": (
        lambda: fused_update_of_batch(jnp.ones(3), curvature_batch=4),
        ValueError,
        "curvature_batch=4 needs arrays of at least 4 examples, all of the same number"
        " along their first axis, got [(3,)].",
    ),
    "fused-microbatches-indivisible": (
        lambda: fused_update_of_batch(jnp.ones(3), microbatches=2),
        ValueError,
        "batch[0] of shape (3,) cannot be cut along its first axis into 2 equal parts.",
    ),
    "microbatches-of-scalars": (
        lambda: fused_update_of_batch(jnp.asarray(2.0), microbatches=2),
        ValueError,
        "batch must have an array to cut into 2 parts, got 1 scalars only.",
    ),
    "conv-too-few-axes": (
        lambda: ah.conv_spatial_average(3)(CONV, jnp.ones((3, 3, 2, 4))),
        ValueError,
        "conv_spatial_average takes ['conv'] for a convolution kernel with 3 spatial"
        " axes, but its shape is (3, 3, 2, 4): kernels are (*spatial, in, out).",
    ),
    "block-not-a-multiple": (
        lambda: ah.block_average(0, 4)(CONV, jnp.ones((6, 2))),
        ValueError,
        "block_average(axis=0, size=4) does not fit ['conv'] of shape (6, 2): the axis"
        " must exist and be a multiple of size.",
    ),
    "block-no-such-axis": (
        lambda: ah.block_average(2, 1)(CONV, jnp.ones((6, 2))),
        ValueError,
        "block_average(axis=2, size=1) does not fit ['conv'] of shape (6, 2):",
    ),
    "averaging-shape": (
        lambda: ah.adahessian(0.1, averaging=lambda path, leaf: leaf[:2]).init(W),
        ValueError,
        "averaging must return a leaf that broadcasts to the shape of the parameter,",
    ),
}


# What an argument of each kind must not be, with the error.
NUMBERS = [
    ("0.1", TypeError),
    (None, TypeError),
    (True, TypeError),
    ((0.1,), TypeError),
]
WRONG = {
    "decay": [
        *NUMBERS,
        (1.0, ValueError),
        (-0.1, ValueError),
        (float("nan"), ValueError),
    ],
    "not negative": [*NUMBERS, (-1e-3, ValueError), (float("inf"), ValueError)],
    "positive": [*NUMBERS, (0.0, ValueError), (-1.0, ValueError)],
    "count": [(0, ValueError), (-1, ValueError), (2.0, TypeError), (True, TypeError)],
    "count or 0": [(-1, ValueError), (2.0, TypeError), (False, TypeError)],
    "int": [(1.0, TypeError), (None, TypeError), ("0", TypeError)],
    "flag": [(1, TypeError), ("yes", TypeError)],
    "choice": [("no such", ValueError)],
    "loss": [("no such", ValueError), (3, TypeError), (None, TypeError)],
    "0 or 1": [(2, ValueError), ("1", ValueError)],
    "estimator": [("hutchinson", TypeError), (ah.hutchinson, TypeError)],
    "control variate": [("ema", TypeError), (ah.ema_control, TypeError)],
    "function": [(3, TypeError), ("relu", TypeError)],
    "float dtype": [
        (int, TypeError),
        ("float33", TypeError),
        (jnp.complex64, TypeError),
    ],
    "seed": [("0", TypeError), (1.5, TypeError), (None, TypeError), (True, TypeError)],
    "key": [(0, TypeError), ("0", TypeError), (None, TypeError)],
    "axis name": [(3, TypeError), (("batch", 0), TypeError)],
    "probe": [("uniform", ValueError), (3, TypeError), (None, TypeError)],
    "mask": [(3, TypeError), (("w", "b"), TypeError)],
    "tree like the parameters": [
        (3, ValueError),
        (None, ValueError),
        ("w", ValueError),
    ],
    "optimizer's state": [(3, ValueError), (None, ValueError)],
}
KIND = {
    "abs_first": "flag",
    "averaging": "function",
    "axis": "int",
    "axis_name": "axis name",
    "b1": "decay",
    "b2": "decay",
    "chunk_size": "count",
    "clip_threshold": "positive",
    "control_variate": "control variate",
    "curvature_batch": "count",
    "damping": "positive",
    "decay": "decay",
    "eps": "not negative",
    "estimate": "tree like the parameters",
    "estimator": "estimator",
    "event_ndim": "0 or 1",
    "fraction": "positive",
    "fun": "function",
    "has_aux": "flag",
    "hessian_ema": "choice",
    "hessian_power": "positive",
    "initial_refreshes": "count or 0",
    "is_blocked": "function",
    "is_conv": "function",
    "key": "key",
    "learning_rate": "not negative",
    "loss": "loss",
    "loss_fn": "function",
    "max_dim": "count",
    "max_learning_rate": "positive",
    "method": "choice",
    "microbatches": "count",
    "mode": "choice",
    "mu_dtype": "float dtype",
    "n_samples": "count",
    "n_vectors": "count or 0",
    "nu_dtype": "float dtype",
    "output_loss": "function",
    "power": "not negative",
    "probe": "probe",
    "rank": "count",
    "reduction": "choice",
    "relative_damping": "not negative",
    "reuse_estimate": "flag",
    "rtol": "not negative",
    "seed": "seed",
    "size": "count",
    "spatial_ndim": "count",
    "state": "optimizer's state",
    "tangents": "tree like the parameters",
    "unbiased": "flag",
    "unroll": "flag",
    "update_interval": "count",
    "updates": "tree like the parameters",
    "weight_decay": "not negative",
    "weight_decay_mask": "mask",
}
# Trees of any form, whose leaves are tried above.
ANY = {"outputs", "params", "previous_estimate", "targets", "tree", "weights"}
# What else a right call of each function has.
RIGHT = {
    "adahessian": {"learning_rate": 0.1},
    "block_average": {"axis": 0, "size": 2},
    "check_output_loss": {
        "loss": "l2_loss",
        "output_loss": lambda f: jnp.mean(f**2) / 2,
        "outputs": jnp.ones(3),
    },
    "conv_spatial_average": {},
    "diagnostics": {"state": ah.adahessian(0.1).init(W), "updates": W},
    "ema_control": {},
    "gauss_newton": {"loss": "l2_loss"},
    "gauss_newton_control": {"loss": "l2_loss"},
    "hessian_diag": {"fun": loss, "params": W},
    "hutchinson": {},
    "hvp": {"fun": loss, "params": W, "tangents": W},
    "in_eigenbasis": {"estimator": ah.gauss_newton("l2_loss")},
    "low_rank_control": {"rank": 2},
    "microbatched": {"estimator": ah.hutchinson(), "microbatches": 2},
    "normal_like": {"key": jax.random.key(0), "tree": W},
    "rademacher_like": {"key": jax.random.key(0), "tree": W},
    "scale_by_adahessian": {},
    "scale_by_quadratic_model": {"loss": "l2_loss"},
    "scale_by_relative_curvature": {},
    "unmasked": {"fun": loss, "params": W},
    "value_and_grad_with_curvature": {"loss_fn": loss, "estimator": ah.hutchinson()},
}


def wrong_arguments():
    for function in RIGHT:
        for name in inspect.signature(getattr(ah, function)).parameters:
            for value, error in WRONG.get(KIND.get(name), []):
                optional = inspect.signature(getattr(ah, function)).parameters[name]
                if value is not None or optional.default is not None:
                    shown = getattr(value, "__name__", str(value))
                    label = f"{function}-{name}-{shown}"
                    yield pytest.param(function, name, value, error, id=label)


def test_wrong_arguments_cover_all_public_functions():
    functions = {name for name in ah.__all__ if not inspect.isclass(getattr(ah, name))}
    assert functions == set(RIGHT)
    for function in functions:
        getattr(ah, function)(**RIGHT[function])
        arguments = set(inspect.signature(getattr(ah, function)).parameters)
        assert arguments <= set(KIND) | ANY
    assert len(list(wrong_arguments())) >= 200


@pytest.mark.parametrize(
    ("function", "name", "value", "error"), list(wrong_arguments())
)
def test_wrong_argument(function, name, value, error):
    with pytest.raises(error) as caught:
        getattr(ah, function)(**{**RIGHT[function], name: value})
    message = str(caught.value)
    assert message.startswith(f"{name} must ")
    assert type(caught.value) is error
    assert caught.value.__cause__ is None
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize("function", RIGHT)
def test_misspelt_argument(function):
    with pytest.raises(TypeError, match="unexpected keyword argument 'parms'"):
        getattr(ah, function)(**RIGHT[function], parms=1)


@pytest.fixture(autouse=True)
def nothing_is_changed():
    """Whatever fails, parameters and what was passed as state are as before."""
    trees = W, [RIGHT["diagnostics"]["state"]]
    before = jax.tree.map(lambda x: np.array(x, copy=True), trees)
    yield
    chex.assert_trees_all_equal(trees, before)


@pytest.mark.parametrize(
    ("call", "error", "message"), CONSTRUCTION.values(), ids=CONSTRUCTION.keys()
)
def test_at_construction(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


@pytest.mark.parametrize(("call", "error", "message"), USE.values(), ids=USE.keys())
def test_at_use(call, error, message):
    with pytest.raises(error, match="^" + re.escape(message)):
        call()


def test_errors_are_raised_under_jit_too():
    tx = ah.adahessian(0.1, update_interval=2)
    with pytest.raises(ValueError, match="got no obj_fn"):
        jax.jit(lambda s: tx.update(W, s, W))(tx.init(W))


@pytest.mark.parametrize(
    ("estimator", "predict_fn", "message"),
    [
        (GAUSS_NEWTON, lambda p: p["w"] * jnp.nan, "outputs that are NaN"),
        (
            ah.gauss_newton("l2_loss"),
            lambda p: (p["w"], -jnp.ones(3)),
            "weights must not be negative",
        ),
        (
            ah.gauss_newton(lambda row: -jnp.sum(row**2)),
            lambda p: p["w"][None],
            "loss must be convex",
        ),
    ],
    ids=["nan", "weights", "convex"],
)
def test_values_inside_jit_are_checked_by_checkify(estimator, predict_fn, message):
    def step(state):
        return estimator.update(None, state, W, predict_fn=predict_fn)

    with jax.enable_checks(True):
        error, _ = jax.jit(checkify.checkify(step))(estimator.init(W))
    with pytest.raises(ValueError, match=message):
        error.throw()
    jax.jit(step)(estimator.init(W))  # cannot see values, and does not raise
