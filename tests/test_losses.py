# SPDX-License-Identifier: Apache-2.0
"""Losses as numbers, and their curvature against ``jax.hessian`` of the numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import adahessian_jax as ah
from adahessian_jax import losses
from tests.problems import all_signs, at_once

pytestmark = pytest.mark.usefixtures("x64")
RNG = np.random.default_rng(0)
SHAPE = (3, 2, 2)  # batch, time, classes
F = RNG.normal(size=SHAPE)
CLASSES = RNG.integers(0, 2, size=SHAPE[:2])
SMOOTHED = np.asarray(0.8 * np.eye(2)[CLASSES] + 0.1)
REAL = RNG.normal(size=SHAPE)
BITS = RNG.integers(0, 2, size=SHAPE)
COUNTS = RNG.poisson(2.0, size=SHAPE)
WHERE = {
    "all": None,
    "mask": np.array([True, False, True]),
    "weights": np.array([[1.0, 0.0], [0.5, 2.0], [0.0, 3.0]]),
}


def log_softmax(f):
    return f - np.log(np.sum(np.exp(f), axis=-1, keepdims=True))


def of_classes(f):
    return -np.take_along_axis(log_softmax(f), CLASSES[..., None], axis=-1)[..., 0]


def quartic(row, label):
    return jnp.sum(jnp.square(row - label)) ** 2 + jnp.sum(row) ** 2


def quartics(f):
    return np.sum((f - REAL) ** 2, -1) ** 2 + np.sum(f, -1) ** 2


def log_cosh(f, y=0.0):
    return jnp.log(jnp.cosh(f - y))


def log_cosh_of_0(f):
    return log_cosh(f)


def log_sum(row):
    return jax.nn.logsumexp(row)


def needing(f, y):
    return log_cosh(f, y)


SOFTMAX = losses.softmax_cross_entropy
BINARY = losses.sigmoid_binary_cross_entropy
# Name: the loss, its labels, and the losses of rows (or of elements) in NumPy.
CASES = {
    "classes": (SOFTMAX, CLASSES, of_classes),
    "smoothed": (SOFTMAX, SMOOTHED, lambda f: -np.sum(SMOOTHED * log_softmax(f), -1)),
    "sigmoid": (BINARY, BITS, lambda f: np.log1p(np.exp(f)) - BITS * f),
    "squared": (losses.squared_error, REAL, lambda f: (f - REAL) ** 2),
    "l2": (losses.l2_loss, REAL, lambda f: (f - REAL) ** 2 / 2),
    "poisson": (losses.poisson_nll_loss, COUNTS, lambda f: np.exp(f) - COUNTS * f),
    "row": (losses.of_row(log_sum), None, lambda f: np.log(np.exp(f).sum(-1))),
    "row-labels": (losses.of_row(quartic), REAL, quartics),
    "element": (losses.of_element(log_cosh_of_0), None, lambda f: np.log(np.cosh(f))),
    "element-labels": (losses.of_element(needing), REAL, lambda f: log_cosh(f, REAL)),
}
OPTIONS = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "events": {"event_ndim": 2},
    "sum of events": {"reduction": "sum", "event_ndim": 3},
}


def broadcast(where):
    where = np.ones(()) if where is None else np.asarray(where, float)
    return np.broadcast_to(where.reshape(*where.shape, *[1] * (3 - where.ndim)), SHAPE)


def by_hand(elements, where, loss):
    """Reduce the losses of rows, or of elements, as the object says it does."""
    weights = broadcast(where)
    per_row = np.prod(SHAPE[len(SHAPE) - loss.event_ndim :])
    total = np.sum((weights if elements.ndim == 3 else weights[..., 0]) * elements)
    return total / (weights.sum() / per_row if loss.reduction == "mean" else 1)


THREES = [  # each pair of two
    (name, options, list(WHERE)[(i + j) % 3])
    for i, name in enumerate(CASES)
    for j, options in enumerate(OPTIONS)
]
SOON = THREES[::2]


@pytest.mark.parametrize("case", at_once(THREES, SOON), ids=lambda x: "-".join(x))
def test_value_gradient_and_curvature(case):
    """The factor is exact in the mean over all signs, not on the average of some."""
    name, options, where = case
    loss, labels, elements = CASES[name]
    options, where = OPTIONS[options], WHERE[where]
    loss = loss.replace(**options)
    if where is not None and where.ndim > len(SHAPE) - loss.event_ndim:
        with pytest.raises(ValueError, match=r"where of shape .* does not match"):
            loss(F, labels, where=where)
        return
    # Rows without weight may hold anything.
    counts = broadcast(where) > 0
    poisoned, bad = np.where(counts, F, np.nan), labels
    if labels is not None:
        counts = counts[..., 0] if labels.ndim < F.ndim else counts
        bad = np.where(counts, labels, 99 if labels.dtype == int else np.nan)

    @jax.jit
    def called(f):
        return loss(f, bad, where=where)

    np.testing.assert_allclose(called(F), by_hand(elements(F), where, loss))
    np.testing.assert_allclose(called(poisoned), called(F), rtol=1e-14)
    gradient = np.asarray(jax.jit(jax.grad(called))(poisoned))
    hessian = np.asarray(jax.jit(jax.hessian(called))(F)).reshape(F.size, F.size)
    np.testing.assert_allclose(gradient, jax.jit(jax.grad(called))(F), atol=1e-15)

    @jax.jit
    @jax.vmap
    def weighted(u):
        u = jnp.where(np.isnan(poisoned), np.nan, u.reshape(SHAPE))
        here = loss.at(jnp.asarray(poisoned), bad, where)
        return here.root(u).ravel(), here.times(here.seen(u)).ravel()

    samples, products = weighted(all_signs(F.size))
    np.testing.assert_allclose(samples.T @ samples / len(samples), hessian, atol=1e-12)
    np.testing.assert_allclose(products, all_signs(F.size) @ hessian, atol=1e-12)
    # And as something to check one's own loss by.
    loss.check(called, jnp.asarray(poisoned), bad, where=where)
    with pytest.raises(ValueError, match=r"3 times the curvature of losses\."):
        loss.check(lambda f: 3 * called(f), F, bad, where=where)


def test_no_row_may_have_weight():
    def no_weight(f):
        return losses.l2_loss(f, REAL, where=np.zeros(SHAPE[:1]))

    value, gradient = jax.value_and_grad(no_weight)(F * np.nan)
    assert value == 0
    np.testing.assert_array_equal(gradient, 0)


@pytest.mark.parametrize("name", ["classes", "sigmoid", "squared", "row-labels"])
def test_half_precision_is_added_up_in_single(name):
    loss, labels, elements = CASES[name]
    f = jnp.asarray(F, jnp.bfloat16)
    if name == "row-labels":
        labels = np.float32(labels)
    value = loss(f, labels)
    assert value.dtype == jnp.float32
    assert jax.grad(lambda f: loss(f, labels))(f).dtype == jnp.bfloat16
    expected = np.mean(elements(np.asarray(f, float)))
    np.testing.assert_allclose(value, expected, rtol=1e-5)


def test_parts_over_devices_add_up_to_the_whole():
    where = WHERE["weights"]
    part = jax.vmap(lambda *a: SOFTMAX.part(*a, "devices"), axis_name="devices")
    parts = part(F[:, None], CLASSES[:, None], where[:, None])
    np.testing.assert_allclose(parts.sum(), SOFTMAX(F, CLASSES, where=where))


def test_objects_compare_print_and_hash():
    loss = losses.squared_error
    assert loss.replace(reduction="sum") == loss.replace(reduction="sum") != loss
    assert len({loss, loss.replace(), loss.replace(event_ndim=1)}) == 2
    assert repr(loss) == "losses.squared_error"
    changed = repr(loss.replace(event_ndim=2, reduction="sum"))
    assert changed == "losses.squared_error.replace(event_ndim=2, reduction='sum')"
    assert repr(losses.of_row(quartic)) == "losses.of_row(quartic)"
    assert repr(losses.of_element(needing, "mine")) == "losses.of_element(mine)"
    assert losses.of_row(quartic).needs_labels
    assert losses.of_element(log_cosh).needs_labels  # with a default, too


F1 = np.ones((4, 2))


def squares(f, scale=0.5):
    return scale * jnp.sum(f**2)


L2, NONE = losses.l2_loss, "no finite curvature"


def test_check_refuses_where_there_is_nothing_to_compare():
    saturated = np.array([[1e4, 0.0, 0.0]])
    for loss, f in ((L2, np.ones((0, 2))), (SOFTMAX, saturated)):
        with pytest.raises(ValueError, match=NONE):
            loss.check(squares, f)
    L2.check(lambda f: squares(f, 1.01 / 16), F1, rtol=0.02)


def test_refuses_labels_of_a_curvature_that_do_not_fit():
    loss, f = losses.of_element(lambda f, y: (f - y) ** 4), jnp.zeros((4, 3))
    estimator, args = ah.gauss_newton(loss), {"predict_fn": lambda f: f}
    with pytest.raises(ValueError, match=r"labels of shape .* do not match outputs"):
        estimator.update(None, estimator.init(f), f, labels=f.T, **args)
    with pytest.raises(ValueError, match=r"labels of shape .* do not match outputs"):
        loss.check(lambda f: loss(f, 0 * f), f, f.T)


def test_a_concave_function_is_refused():
    for make in (losses.of_row, losses.of_element):
        loss = make(lambda f: -jnp.sum(f**2))
        with pytest.raises(ValueError, match="loss must be convex in the outputs"):
            loss.at(jnp.asarray(F1), None).root(jnp.ones_like(F1))
        compiled = jax.jit(lambda f, loss=loss: loss.at(f, None).root(f))(F1)
        assert np.all(np.isnan(compiled))  # where nothing could raise


@pytest.mark.parametrize("scale", [3.0, 10.0, 30.0])
def test_rows_that_are_nearly_certain_have_a_curvature_of_zero(scale):
    """Of which rounding leaves less than that; no row is NaN, nor refused."""
    f = np.float32(scale * RNG.normal(size=(200, 5)))
    p = np.exp(f - f.max(axis=1, keepdims=True), dtype=float)
    p /= p.sum(axis=1, keepdims=True)
    exact = p[:, :, None] * (np.eye(5) - p[:, None, :])
    labels, signs = jnp.argmax(f, axis=1), jnp.float32(all_signs(5))
    row = losses.of_row(optax.softmax_cross_entropy_with_integer_labels)
    for u in (lambda z: row.factor(f, z, labels), lambda z: SOFTMAX.factor(f, z, None)):
        samples = jax.vmap(lambda z, u=u: u(jnp.broadcast_to(z, f.shape)))(signs)
        got = np.einsum("sri,srj->rij", samples, samples) / len(samples)
        np.testing.assert_allclose(got, exact, atol=2e-6)  # 16 eps, of sums of five
    f = np.clip(f, -40, 40)  # where cosh is still finite
    one = losses.of_element(log_cosh).factor(jnp.asarray(f), jnp.ones_like(f), None)
    np.testing.assert_allclose(one**2, np.cosh(np.float64(f)) ** -2, atol=2e-6)


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_singular_curvature_is_convex_at_any_scale(scale):
    """An eigenvalue of zero is rounded to one below; a concave one is no rounding."""
    f = jnp.asarray(RNG.normal(size=(50, 7)))
    for curvature in (1.0, -1e-3):

        def of_row(row, *, c=curvature):
            return scale * (jnp.sum(row) ** 2 + c * row[0] ** 2)

        here = losses.of_row(of_row).at(f, None)
        if curvature > 0:
            assert np.all(np.isfinite(here.root(jnp.ones_like(f))))
            continue
        with pytest.raises(ValueError, match="must be convex"):
            here.root(jnp.ones_like(f))


def test_a_loss_passes_its_own_check_in_half_precision():
    f = jnp.asarray(RNG.normal(size=(99, 5)), jnp.bfloat16)
    for loss, labels in ((SOFTMAX, np.zeros(99, int)), (losses.l2_loss, f)):
        loss.check(lambda f, x=(loss, labels): x[0](f, x[1]), f)


def test_classes_that_there_are_not():
    """Where nothing can raise they make the loss NaN; -1 is not the last class."""
    labels = jnp.asarray(CLASSES)
    for bad in (-1, 2):
        value = jax.jit(lambda y: SOFTMAX(F, y))(labels.at[0, 0].set(bad))
        assert np.isnan(value)


@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e6])
def test_a_convex_loss_of_any_scale_is_no_other(scale):
    """Nearly certain elements are rounded to below zero."""
    f = np.linspace(-20, 20, 401, dtype=np.float32)
    loss = losses.of_element(lambda f: scale * log_cosh(f))
    root = loss.replace(reduction="sum").at(jnp.asarray(f), None).root(jnp.ones_like(f))
    exact = scale * np.cosh(np.float64(f)) ** -2
    np.testing.assert_allclose(root**2, exact, atol=2e-6 * max(scale, 1))


def test_padding_may_be_concave_and_outputs_there_nan():
    """Outside jit too, where errors are raised."""
    loss = losses.of_element(lambda f, y: y * jnp.exp(-f) + f)
    y, mask = jnp.array([1.0, 2.0, -1.0]), jnp.array([1, 1, 0])
    estimator, w = ah.gauss_newton(loss), jnp.zeros(3)

    def padded(w):
        return jnp.where(mask > 0, w, jnp.nan), mask

    for predict in (lambda w: (w, mask), padded):
        given = {"predict_fn": predict, "labels": y}
        d, _ = estimator.update(None, estimator.init(w), w, **given)
        np.testing.assert_allclose(d, [0.5, 1.0, 0.0], rtol=1e-6)
    with pytest.raises(ValueError, match="returned outputs that are NaN"):
        losses.l2_loss.at(jnp.array([1.0, jnp.nan]), None)
