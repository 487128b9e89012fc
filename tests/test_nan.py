"""NaN stays in its row: bad rows spoil no other, and skipped rows are zero whatever they hold."""

import numpy as np
import pytest

import fastce
from cases import EDGE_ROWS, as_kind, edge_options, edge_places, make_logits, make_target
from oracle import assert_equal, with_grad

pytestmark = pytest.mark.every_isa

KINDS = ["index", "prob"]
BAD = {"nan": np.nan, "-nan": -np.nan, "+inf": np.inf}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", BAD)
def test_nan_and_inf_spoil_their_row_only(problem, n_classes, dtype, kind, bad):
    logits, y = problem
    target = as_kind(y, kind, n_classes, dtype)
    for options in edge_options(n_classes):
        clean = with_grad(logits, target, reduction="none", **options)
        for i, k in zip((0, 7, 15, 16, 19) * 3, edge_places(n_classes), strict=False):
            x = logits.copy(order="K")
            x[i, k] = BAD[bad]
            loss, grad = with_grad(x, target, reduction="none", **options)
            assert np.isnan(loss[i])
            assert np.isnan(grad[i]).all()
            loss[i], grad[i] = clean[0][i], clean[1][i]
            assert np.array_equal(loss, clean[0])
            assert np.array_equal(grad, clean[1])
        # the last of them once more, under the mean
        assert np.isnan(fastce.cross_entropy(x, target, **options))
        grad = with_grad(x, target, **options)[1]
        assert np.isnan(grad[i]).all()
        assert np.isfinite(np.delete(grad, i, 0)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_minus_infinity_are_nan(problem, n_classes, dtype, kind):
    logits, y = problem
    target = as_kind(y, kind, n_classes, dtype)
    hit = [0, 15, 16]
    for options in edge_options(n_classes):
        clean = with_grad(logits, target, reduction="none", **options)
        x = logits.copy(order="K")
        x[hit] = -np.inf
        loss, grad = with_grad(x, target, reduction="none", **options)
        assert np.isnan(loss[hit]).all()
        assert np.isnan(grad[hit]).all()
        assert_equal(np.delete(loss, hit), np.delete(clean[0], hit))
        assert_equal(np.delete(grad, hit, 0), np.delete(clean[1], hit, 0))


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
def test_skipped_rows_are_zero_whatever_their_logits(problem, n_classes, order, dtype, kind, bad):
    """Ignored or of sample weight 0: loss and gradient exactly 0, with every option and any upstream gradient."""
    logits, y = problem
    skipped = [0, 2, 15, 17]
    is_skipped = np.isin(np.arange(EDGE_ROWS), skipped)
    x = logits.copy(order="K")
    x[skipped] = bad
    target = as_kind(y, kind, n_classes, dtype).copy()
    ways = [{"sample_weight": np.where(is_skipped, 0, 1.0)}]
    if kind == "index":
        ways.append({})
        target[skipped] = -100
    else:
        target[skipped] = np.nan
    for way in ways:
        for options in edge_options(n_classes):
            options = {**options, **way}
            rest = {name: np.delete(v, skipped) if name == "sample_weight" else v for name, v in options.items()}
            few_logits, few_target = logits[~is_skipped].copy(order=order), target[~is_skipped]
            few_loss, few_grad = with_grad(
                few_logits, few_target, reduction="none", grad_output=np.ones(few_target.shape[:1]), **rest
            )
            grad_output = np.where(is_skipped, np.nan, 1.0)
            loss, grad = with_grad(x, target, reduction="none", grad_output=grad_output, **options)
            assert not loss[skipped].any()
            assert not grad[skipped].any()
            stats = fastce.cross_entropy_stats(x, target, **options)
            assert [set(field[skipped].tolist()) for field in stats] == [{0}, {0}, {-1}, {0}]
            # The other rows have other places in their groups now, which may not matter either.
            assert_equal(np.delete(loss, skipped), few_loss)
            assert_equal(np.delete(grad, skipped, 0), few_grad)


@pytest.mark.parametrize("kind", KINDS)
def test_statistics_of_bad_rows_are_nan(problem, n_classes, dtype, kind):
    logits, y = problem
    target = as_kind(y, kind, n_classes, dtype)
    hit = [0, 15, 16]
    clean = fastce.cross_entropy_stats(logits, target)
    for k in edge_places(n_classes):
        logits[hit, k] = np.nan
        stats = fastce.cross_entropy_stats(logits, target)
        for name in ("lse", "log_prob", "entropy"):
            assert np.isnan(getattr(stats, name)[hit]).all()
            assert_equal(np.delete(getattr(stats, name), hit), np.delete(getattr(clean, name), hit))
        assert_equal(np.delete(stats.argmax, hit), np.delete(clean.argmax, hit))
        assert (stats.argmax[hit] == -1).all()


def test_a_softcap_makes_infinite_logits_finite(dtype, order):
    """The table speaks of capped logits: +-inf become +-cap. NaN stays."""
    logits = np.array(
        [[np.inf, 0, 1], [-np.inf, 0, 1], [-np.inf, -np.inf, -np.inf], [np.nan, 0, 1]], dtype, order=order
    )
    capped = np.array([[2, 0, 2 * np.tanh(0.5)], [-2, 0, 2 * np.tanh(0.5)], [-2, -2, -2]])
    loss, grad = with_grad(logits, np.zeros(4, int), reduction="none", softcap=2.0)
    expected = np.log(np.exp(capped).sum(axis=1)) - capped[:, 0]
    np.testing.assert_allclose(loss[:3], expected, rtol=8 * np.finfo(dtype).eps)
    assert not grad[:3, 0].any()  # there the cap is flat
    assert np.isfinite(grad[:3]).all()
    assert np.isnan(loss[3])
    assert np.isnan(grad[3]).all()


@pytest.mark.parametrize("bad", BAD)
def test_softmax_family_keeps_nan_in_its_row(problem, n_classes, bad):
    logits, _ = problem
    functions = fastce.softmax, fastce.log_softmax, fastce.logsumexp
    clean = [function(logits) for function in functions]
    for i, k in zip((0, 7, 15, 16, 19) * 3, edge_places(n_classes), strict=False):
        x = logits.copy(order="K")
        x[i, k] = BAD[bad]
        for function, expected in zip(functions, clean, strict=True):
            actual = function(x)
            assert_equal(np.delete(actual, i, 0), np.delete(expected, i, 0))
            if function is fastce.logsumexp and bad == "+inf":
                assert actual[i] == np.inf
            else:
                assert np.isnan(actual[i]).all()


def test_softmax_family_of_minus_infinity(problem, n_classes):
    """Among finite numbers p = 0 and log p = -inf; alone no softmax, but an empty sum, as SciPy has it."""
    logits, _ = problem
    gone = [k for k in edge_places(n_classes) if k != 0]
    logits[:, gone] = -np.inf
    assert not fastce.softmax(logits)[:, gone].any()
    assert np.all(fastce.log_softmax(logits)[:, gone] == -np.inf)
    np.testing.assert_allclose(fastce.softmax(logits).sum(axis=1), 1, rtol=1e-5)
    assert np.isfinite(fastce.logsumexp(logits)).all()
    logits[3] = -np.inf
    assert np.isnan(fastce.softmax(logits)[3]).all()
    assert np.isnan(fastce.log_softmax(logits)[3]).all()
    assert fastce.logsumexp(logits)[3] == -np.inf
    assert np.isfinite(np.delete(fastce.logsumexp(logits), 3)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_nll_loss_of_impossible_classes(dtype, kind):
    """-inf at the target is infinite, anywhere else and under a weight of zero it is nothing; NaN is NaN."""
    probs = np.array([[0.5, 0.5, 0], [0, 0.25, 0], [0.5, 0, 0.5], [0.5, np.nan, 0.5]], dtype)
    log_probs = np.log(probs, where=probs != 0, out=np.full_like(probs, -np.inf))
    target = as_kind(np.array([0, 1, 1, 1]), kind, 3, dtype)
    loss = fastce.nll_loss(log_probs, target, reduction="none")
    np.testing.assert_allclose(loss, [np.log(2), np.log(4), np.inf, np.nan], rtol=4 * np.finfo(dtype).eps)
    weightless = fastce.nll_loss(log_probs[:3], target[:3], reduction="none", weight=[1, 0, 1])
    np.testing.assert_allclose(weightless, [np.log(2), 0, 0], rtol=4 * np.finfo(dtype).eps)
    skipped = fastce.nll_loss(log_probs, target, reduction="none", sample_weight=[1, 1, 0, 0])
    assert_equal(skipped[2:], 0)
    for on_empty, expected in (("nan", np.nan), ("zero", 0)):
        empty = fastce.nll_loss(log_probs, target, sample_weight=np.zeros(4), on_empty=on_empty)
        np.testing.assert_equal(float(empty), expected)


@pytest.mark.every_isa
@pytest.mark.parametrize("n_classes", [1, 2, 3, 5, 10, 63, 65, 128, 200, 3000])
def test_rows_without_a_largest_logit_under_class_probabilities(n_classes, dtype, order, rng):
    """NaN in these rows and nothing else: their arg-max, at which a gradient is stored by itself, is no class."""
    logits = make_logits(rng, (EDGE_ROWS, n_classes), dtype).copy(order=order)
    prob = make_target(rng, "prob", logits.shape).astype(dtype)
    expected_grad, expected_hess = fastce.cross_entropy_grad_hess(logits, prob, reduction="sum")
    logits[3], logits[5], logits[82] = np.nan, -np.inf, np.nan
    logits[82, 0] = -np.inf
    bad = np.isin(np.arange(EDGE_ROWS), (3, 5, 82))
    grad, hess = fastce.cross_entropy_grad_hess(logits, prob, reduction="sum")
    assert np.isnan(grad[bad]).all() and np.isnan(hess[bad]).all()
    assert_equal(grad[~bad], expected_grad[~bad])
    assert_equal(hess[~bad], expected_hess[~bad])
    for softcap in (None, 3.0):
        product = fastce.cross_entropy_hvp(logits, prob, np.ones_like(logits), softcap=softcap)
        with_nan = [3, 82] if n_classes > 1 else [3]  # a softcap makes numbers of -inf
        assert np.isnan(product[with_nan]).all()
        assert np.isfinite(product[~bad]).all()
