"""The table of extended values: one test per row of it, with every option that touches the case."""

import numpy as np
import pytest

import fastce
from cases import make_logits, make_target
from oracle import assert_matches_reference, assert_within

pytestmark = pytest.mark.usefixtures("isa")

N_ROWS = 20  # a full group of rows and a remainder
KINDS = ["index", "prob"]
REDUCTIONS = ["none", "mean", "sum"]
BAD = {"nan": np.nan, "-nan": -np.nan, "+inf": np.inf}


@pytest.fixture(
    params=[2, 10, 70, 5000],  # less than a vector, than a tile; a tile and a remainder; several blocks
    ids=lambda n: f"C{n}",
)
def n_classes(request):
    return request.param


@pytest.fixture(params=["C", "F"])
def order(request):
    """Which kernel family."""
    return request.param


@pytest.fixture
def problem(rng, dtype, n_classes, order):
    shape = (N_ROWS, n_classes)
    return make_logits(rng, shape, dtype).copy(order=order), make_target(rng, "index", shape)


def places(n_classes):
    """Return classes at the edges of vectors, tiles and blocks."""
    candidates = (0, 1, 15, 16, 31, 63, 64, 69, 2047, 2048, 4095, 4096, n_classes - 1)
    return sorted({k for k in candidates if k < n_classes})


def with_grad(logits, target, **options):
    """Return loss and gradient, after a check that working in place makes no difference."""
    loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
    logits = logits.copy(order="K")
    in_place = fastce.cross_entropy_with_grad(logits, target, out=logits, **options)
    np.testing.assert_array_equal(in_place[0], loss)
    np.testing.assert_array_equal(logits, grad)
    return loss, grad


def as_kind(target, kind, n_classes, dtype):
    return target if kind == "index" else np.eye(n_classes, dtype=dtype)[target]


def options_touching(n_classes):
    """Return the options that reach into a row, each alone and together."""
    weight = np.linspace(0.5, 2, n_classes)
    alone = [
        {},
        {"weight": weight},
        {"label_smoothing": 0.1},
        {"logit_scale": 2.0},
        {"z_loss": 0.01},
        {"sample_weight": np.linspace(0.5, 2, N_ROWS)},
    ]
    return [*alone, {name: value for options in alone for name, value in options.items()}]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0.0, np.nan, np.inf, -np.inf])
def test_mean_over_nothing_is_on_empty_with_zero_gradient(problem, n_classes, dtype, kind, bad):
    logits, y = problem
    logits[::2] = bad
    target = as_kind(y, kind, n_classes, dtype)
    causes = [{"sample_weight": np.zeros(N_ROWS)}]
    if kind == "index":
        causes += [
            {"ignore_index": 0},
            {"weight": np.arange(n_classes) > 0},
        ]
        target = np.zeros_like(y)
        causes[-1]["weight"] = causes[-1]["weight"].astype(dtype)
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
    assert loss.dtype == dtype
    assert all(field.shape == rows for field in stats)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_one_class_costs_nothing(dtype, order, reduction):
    logits = np.array([[0.0], [-3e38], [3e38], [1e-40], [-7.5]], dtype, order=order)
    target = np.zeros(5, int)
    for options in ({}, {"label_smoothing": 0.1}, {"weight": [2.0]}, {"logit_scale": 0.5}, {"softcap": 3.0}):
        loss, grad = with_grad(logits, target, reduction=reduction, **options)
        assert not np.any(loss)
        assert not grad.any()


def test_one_class_with_z_loss_costs_its_square(dtype, order):
    logits = np.array([[0.0], [-4.0], [3.0], [0.5]], dtype, order=order)
    loss, grad = with_grad(logits, np.zeros(4, int), reduction="none", z_loss=0.25)
    np.testing.assert_array_equal(loss, [0, 4, 2.25, 0.0625])
    np.testing.assert_array_equal(grad[:, 0], [0, -2, 1.5, 0.25])


@pytest.mark.parametrize("kind", KINDS)
def test_infinite_loss_where_the_target_is_impossible(problem, n_classes, dtype, kind):
    """x_y = -inf: the loss is +inf, the gradient p - onehot as ever."""
    logits, y = problem
    hit = [0, 3, 16, 19]
    logits[hit, y[hit]] = -np.inf
    target = as_kind(y, kind, n_classes, dtype)
    for options in options_touching(n_classes):
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
    gone = [k for k in places(n_classes) if k != n_classes // 2]
    logits[:, gone] = -np.inf
    target = as_kind(y, kind, n_classes, dtype)
    kept = np.delete(np.arange(n_classes), gone)
    for options in ({}, {"logit_scale": 2.0}, {"z_loss": 0.01}, {"sample_weight": np.linspace(0.5, 2, N_ROWS)}):
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
    """x_c = -inf with smoothing and a weight: +inf as in PyTorch, with the formula's finite gradient; without weight, no."""
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
    for k in places(n_classes):
        x = logits.copy(order="K")
        x[4, k] = -np.inf
        loss, grad = with_grad(x, target, reduction="none")
        assert loss[4] == np.inf
        assert np.isfinite(np.delete(loss, 4)).all()
        assert np.isfinite(grad).all()
        assert grad[4, k] == -target[4, k]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
def test_nan_and_inf_spoil_their_row_only(problem, n_classes, dtype, kind, bad):
    logits, y = problem
    target = as_kind(y, kind, n_classes, dtype)
    for options in options_touching(n_classes):
        clean = with_grad(logits, target, reduction="none", **options)
        for i, k in zip((0, 7, 15, 16, 19) * 3, places(n_classes), strict=False):
            x = logits.copy(order="K")
            x[i, k] = BAD[bad]
            loss, grad = with_grad(x, target, reduction="none", **options)
            assert np.isnan(loss[i])
            assert np.isnan(grad[i]).all()
            np.testing.assert_array_equal(np.delete(loss, i), np.delete(clean[0], i))
            np.testing.assert_array_equal(np.delete(grad, i, 0), np.delete(clean[1], i, 0))
            assert np.isnan(fastce.cross_entropy(x, target, **options))
            grad_of_mean = with_grad(x, target, **options)[1]
            assert np.isnan(grad_of_mean[i]).all()
            assert np.isfinite(np.delete(grad_of_mean, i, 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_minus_infinity_are_nan(problem, n_classes, dtype, kind):
    logits, y = problem
    target = as_kind(y, kind, n_classes, dtype)
    hit = [0, 15, 16]
    for options in options_touching(n_classes):
        clean = with_grad(logits, target, reduction="none", **options)
        x = logits.copy(order="K")
        x[hit] = -np.inf
        loss, grad = with_grad(x, target, reduction="none", **options)
        assert np.isnan(loss[hit]).all()
        assert np.isnan(grad[hit]).all()
        np.testing.assert_array_equal(np.delete(loss, hit), np.delete(clean[0], hit))
        np.testing.assert_array_equal(np.delete(grad, hit, 0), np.delete(clean[1], hit, 0))


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_row_is_nan_even_where_its_class_weighs_nothing(problem, n_classes, bad):
    """Weight 0 does not skip a row."""
    logits, y = problem
    y[:] = 1
    weight = np.ones(n_classes)
    weight[1] = 0
    logits[5, 0] = BAD[bad]
    logits[6] = -np.inf
    loss, grad = with_grad(logits, y, reduction="none", weight=weight)
    assert np.isnan(loss[5:7]).all()
    assert np.isnan(grad[5:7]).all()
    assert not np.delete(loss, [5, 6]).any()
    assert not np.delete(grad, [5, 6], 0).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_skipped_rows_are_zero_whatever_their_logits(problem, n_classes, dtype, kind, bad):
    """Ignored or of sample weight 0: loss and gradient exactly 0, with every option and any upstream gradient."""
    logits, y = problem
    skipped = [0, 2, 15, 17]
    x = logits.copy(order="K")
    x[skipped] = bad
    ways = [{"sample_weight": np.where(np.isin(np.arange(N_ROWS), skipped), 0, 1.0)}]
    target = as_kind(y, kind, n_classes, dtype)
    if kind == "index":
        target = target.copy()
        target[skipped] = -100
        ways.append({})
    else:
        target[skipped] = np.nan
    for way in ways:
        for options in options_touching(n_classes):
            options = {**options, **way}
            clean = with_grad(
                np.delete(logits, skipped, 0),
                np.delete(target, skipped, 0),
                reduction="none",
                **{
                    name: np.delete(value, skipped) if name == "sample_weight" else value
                    for name, value in options.items()
                },
            )
            grad_output = np.where(np.isin(np.arange(N_ROWS), skipped), np.nan, 1.0)
            loss, grad = with_grad(x, target, reduction="none", grad_output=grad_output, **options)
            assert not loss[skipped].any()
            assert not grad[skipped].any()
            # The other rows sit elsewhere in their groups, which may not matter either.
            np.testing.assert_array_equal(np.delete(loss, skipped), clean[0])
            np.testing.assert_array_equal(np.delete(grad, skipped, 0), clean[1])
            stats = fastce.cross_entropy_stats(x, target, **options)
            assert [set(field[skipped].tolist()) for field in stats] == [{0}, {0}, {-1}, {0}]
