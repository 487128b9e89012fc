"""The table of extended values: one test per row of it, with every option that touches the case.

Rows with NaN, +inf or nothing but -inf are in test_nan.py.
"""

import numpy as np
import pytest

import fastce
from cases import EDGE_ROWS, as_kind, edge_options, edge_places, finfo
from oracle import arithmetic, assert_equal, assert_matches_reference, assert_within, with_grad

pytestmark = pytest.mark.every_isa

KINDS = ["index", "prob"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_mean_over_nothing_is_on_empty_with_zero_gradient(problem, n_classes, dtype, kind, bad):
    logits, y = problem
    logits[::2] = bad
    target = as_kind(y, kind, n_classes, dtype)
    causes = [{"sample_weight": np.zeros(EDGE_ROWS)}]
    if kind == "index":
        target = np.zeros_like(y)
        causes += [{"ignore_index": 0}, {"weight": np.arange(n_classes) / n_classes}]  # a weight of zero for class 0
    for cause in causes:
        for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}, {"softcap": 2.0}):
            for on_empty, expected in (("nan", np.nan), ("zero", 0.0)):
                loss, grad = with_grad(logits, target, on_empty=on_empty, **cause, **options)
                np.testing.assert_equal(float(loss), expected)
                assert grad.shape == logits.shape
                assert not grad.any()
                alone = fastce.cross_entropy(logits, target, on_empty=on_empty, **cause, **options)
                np.testing.assert_equal(float(alone), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(0, 5), (0, 1000), (0, 5, 3), (3, 5, 0), (0, 0)])
def test_no_rows(dtype, kind, shape):
    logits = np.empty(shape, dtype)
    rows = shape[:1] + shape[2:]
    target = np.empty(rows, int) if kind == "index" else np.empty(shape, dtype)
    for on_empty, expected in (("nan", np.nan), ("zero", 0.0)):
        loss, grad = with_grad(logits, target, on_empty=on_empty)
        np.testing.assert_equal(float(loss), expected)
        assert grad.shape == shape
    loss, grad = with_grad(logits, target, reduction="sum")
    assert loss == 0
    loss, grad, stats = fastce.cross_entropy_with_grad(logits, target, reduction="none", return_stats=True)
    assert loss.shape == rows
    assert loss.dtype == arithmetic(dtype)
    assert all(field.shape == rows for field in stats)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_one_class_costs_nothing(dtype, order, reduction):
    largest, smallest = float(finfo(dtype).max), float(finfo(dtype).smallest_subnormal)
    logits = np.array([[0.0], [-largest], [largest], [smallest], [-7.5]], dtype, order=order)
    target = np.zeros(5, int)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": [2.0]}, {"logit_scale": 0.5}, {"softcap": 3.0}):
        loss, grad = with_grad(logits, target, reduction=reduction, **options)
        assert not np.any(loss)
        assert not grad.any()


def test_one_class_with_z_loss_costs_its_square(dtype, order):
    logits = np.array([[0.0], [-4.0], [3.0], [0.5]], dtype, order=order)
    loss, grad = with_grad(logits, np.zeros(4, int), reduction="none", z_loss=0.25)
    assert_equal(loss, [0, 4, 2.25, 0.0625])
    assert_equal(grad[:, 0], [0, -2, 1.5, 0.25])


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_loss_where_the_target_is_impossible(problem, n_classes, dtype, kind):
    """x_y = -inf: the loss is +inf, the gradient p - onehot as ever."""
    logits, y = problem
    hit = [0, 3, 16, 19]
    logits[hit, y[hit]] = -np.inf
    target = as_kind(y, kind, n_classes, dtype)
    for options in edge_options(n_classes):
        loss, grad = with_grad(logits, target, reduction="none", **options)
        assert np.all(loss[hit] == np.inf)
        assert np.isfinite(np.delete(loss, hit)).all()
        assert np.isfinite(grad).all()
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, reduction="none", **options)
        for reduction in ("mean", "sum"):
            assert fastce.cross_entropy(logits, target, reduction=reduction, **options) == np.inf
    grad = with_grad(logits, target, reduction="none")[1]
    assert np.all(grad[hit, y[hit]] == -1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_impossible_target_of_weight_zero_costs_nothing(problem, n_classes, dtype, kind):
    """A term whose weight is 0 is 0, whatever its other factor."""
    logits, y = problem
    y[:] = 1
    logits[::2, 1] = -np.inf
    weight = np.ones(n_classes)
    weight[1] = 0
    target = as_kind(y, kind, n_classes, dtype)
    loss, grad = with_grad(logits, target, reduction="none", weight=weight)
    assert not loss.any()
    assert not grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_other_impossible_classes_are_as_if_they_were_not_there(problem, n_classes, dtype, kind):
    """x_c = -inf without smoothing; with probabilities those have q_c = 0, where PyTorch says NaN."""
    logits, y = problem
    y[:] = n_classes // 2
    gone = [k for k in edge_places(n_classes) if k != n_classes // 2]
    logits[:, gone] = -np.inf
    target = as_kind(y, kind, n_classes, dtype)
    kept = np.delete(np.arange(n_classes), gone)
    for options in ({}, {"logit_scale": 2.0}, {"z_loss": 0.01}, {"sample_weight": np.linspace(0.5, 2, EDGE_ROWS)}):
        loss, grad = with_grad(logits, target, reduction="none", **options)
        few_target = np.searchsorted(kept, y) if kind == "index" else target[:, kept]
        few_loss, few_grad = with_grad(logits[:, kept], few_target, reduction="none", **options)
        eps = 8 * np.finfo(dtype).eps * (1 + np.abs(few_loss).max())
        assert_within(loss, few_loss, eps, "loss")
        assert_within(grad[:, kept], few_grad, eps, "grad")
        assert not grad[:, gone].any()
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, reduction="none", **options)


@pytest.mark.parametrize("kind", KINDS)
def test_smoothing_makes_an_impossible_class_cost_infinity(problem, n_classes, dtype, kind):
    """x_c = -inf with smoothing and a weight: +inf as in PyTorch, with a finite gradient. Without weight: finite."""
    logits, y = problem
    y[:] = 0
    target = as_kind(y, kind, n_classes, dtype)
    last = n_classes - 1
    logits[::3, last] = -np.inf
    for smoothing in (1e-3, 0.1, 1.0):
        loss, grad = with_grad(logits, target, reduction="none", label_smoothing=smoothing)
        assert np.all(loss[::3] == np.inf)
        assert np.isfinite(np.delete(loss, np.s_[::3])).all()
        np.testing.assert_allclose(grad[::3, last], -smoothing / n_classes, rtol=4 * np.finfo(dtype).eps)
        weight = np.ones(n_classes)
        weight[last] = 0
        options = {"reduction": "none", "label_smoothing": smoothing, "weight": weight}
        loss, grad = with_grad(logits, target, **options)
        assert np.isfinite(loss).all()
        assert not grad[::3, last].any()
        assert_matches_reference(fastce.cross_entropy_with_grad, logits, target, **options)


def test_probability_on_an_impossible_class_costs_infinity(problem, n_classes, dtype):
    logits, _ = problem
    target = np.full(logits.shape, 1 / n_classes, dtype)
    for k in edge_places(n_classes):
        x = logits.copy(order="K")
        x[4, k] = -np.inf
        loss, grad = with_grad(x, target, reduction="none")
        assert loss[4] == np.inf
        assert np.isfinite(np.delete(loss, 4)).all()
        assert np.isfinite(grad).all()
        assert grad[4, k] == -target[4, k]
