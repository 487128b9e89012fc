"""Logits of 16 bits, float16 and bfloat16: the bodies of the other files' tests, and what is special to them."""

import ml_dtypes
import numpy as np
import pytest

import fastce
from cases import LAYOUTS, finfo, make_logits, make_target
from oracle import assert_equal, half_unit

# The same bodies with this file's `dtype`.
from test_edges import (  # noqa: F401
    test_an_impossible_target_of_weight_zero_costs_nothing,
    test_infinite_loss_where_the_target_is_impossible,
    test_mean_over_nothing_is_on_empty_with_zero_gradient,
    test_no_rows,
    test_one_class_costs_nothing,
    test_one_class_with_z_loss_costs_its_square,
    test_probability_on_an_impossible_class_costs_infinity,
)
from test_inplace import (  # noqa: F401
    test_in_place_has_the_bits_of_a_new_gradient,
    test_inputs_are_never_written,
    test_softmax_works_in_place,
    test_the_layout_of_out_does_not_change_the_bits,
)
from test_nan import (  # noqa: F401
    test_nan_and_inf_spoil_their_row_only,
    test_rows_of_minus_infinity_are_nan,
    test_skipped_rows_are_zero_whatever_their_logits,
    test_statistics_of_bad_rows_are_nan,
)
from test_values import (  # noqa: F401
    test_a_row_has_the_same_bits_in_any_batch,
    test_argmax_takes_the_first_of_equals,
    test_every_layout_matches_the_definition,
    test_every_reduction_matches_the_definition,
    test_every_size_and_option_matches_the_definition,
    test_loss_alone_and_statistics_alone_match_the_definition,
    test_strided_classes_match_the_definition,
)

pytestmark = pytest.mark.every_isa

BITS = np.arange(2**16, dtype=np.uint16)


@pytest.fixture(params=[np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def dtype(request):
    return request.param


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_number_is_widened_exactly(dtype, layout):
    """The log-sum-exp of one class is the logit."""
    numbers = BITS.view(dtype)
    with np.errstate(invalid="ignore"):  # NumPy on Arm warns of signaling NaN
        expected = numbers.astype(np.float32)
    for shape in ((2**16, 1), (4, 2**14, 1)):
        lse = fastce.logsumexp(LAYOUTS[layout](numbers.reshape(shape)))
        assert_equal(lse.reshape(-1), expected)


@pytest.mark.parametrize("order", ["C", "F"])
def test_gradients_are_rounded_to_the_nearest_number(dtype, order):
    """Where one class has all of the probability, the gradient is grad_output, exactly, before it is rounded."""
    with np.errstate(invalid="ignore"):
        numbers = np.sort(BITS.view(dtype).astype(np.float32))
    numbers = numbers[np.isfinite(numbers)].astype(np.float64)
    between = ((numbers[1:] + numbers[:-1]) / 2).astype(np.float32)  # ties, to even
    values = np.concatenate(
        [numbers, between, np.nextafter(between, np.float32(np.inf)), np.nextafter(between, -np.float32(np.inf))]
    ).astype(np.float32)
    beyond = float(finfo(dtype).max) * (1 + float(finfo(dtype).eps) / 4 * np.array([0.99, 1, 1.01, 1.5]))
    values = np.concatenate([values, beyond, -beyond]).astype(np.float32)
    logits = np.full((values.size, 2), [0, -np.inf], dtype).copy(order=order)
    grad = fastce.cross_entropy_with_grad(logits, np.ones(values.size, int), reduction="none", grad_output=values)[1]
    with np.errstate(over="ignore"):
        expected = values.astype(dtype)
    assert_equal(grad[:, 0], expected)
    assert_equal(grad[:, 1], -expected)


@pytest.mark.parametrize("n_classes", [1, 2, 63, 64, 65, 130, 4095, 4097, 9000])
def test_the_maximum_is_found_whatever_the_signs(rng, dtype, n_classes):
    """Where all other logits are far below, it is the log-sum-exp; any other shift would lose or overflow it."""
    places = sorted({0, n_classes // 2, n_classes - 1})
    for top, low in ((-2000.0, -60000.0), (-0.0, -3000.0), (0.0, -3000.0), (2000.0, -2000.0), (60000.0, 1.0)):
        x = rng.uniform(low, (top + low) / 2, (len(places), n_classes)).astype(dtype)
        x[:, ::7] = -np.inf
        x[range(len(places)), places] = top
        expected = x[range(len(places)), places].astype(np.float32)
        assert_equal(fastce.logsumexp(x), expected)
        loss, grad = fastce.cross_entropy_with_grad(x, np.array(places), reduction="none")
        assert_equal(loss, 0)
        assert_equal(grad, 0)


@pytest.mark.parametrize("n_classes", [2, 10, 100, 1000, 5000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_results_are_those_of_float32_rounded(rng, dtype, n_classes, order):
    """Within half a unit of the same call in float32, give or take float32's own last places."""
    for options in ({}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"softcap": 5.0}, {"logit_scale": 0.5}):
        logits = make_logits(rng, (70, n_classes), dtype).copy(order=order)
        target = make_target(rng, "index", logits.shape)
        loss, grad = fastce.cross_entropy_with_grad(logits, target, **options)
        wide_loss, wide = fastce.cross_entropy_with_grad(logits.astype(np.float32), target, **options)
        assert loss.dtype == np.float32
        np.testing.assert_allclose(loss, wide_loss, rtol=1e-6)
        error = np.abs(grad.astype(np.float64) - wide)
        slack = 32 * np.finfo(np.float32).eps * (np.abs(wide) + 1 / 70 / n_classes)
        assert np.all(error <= half_unit(wide.astype(np.float64), dtype) + slack)


@pytest.mark.parametrize("n_classes", [2, 100, 3000])
@pytest.mark.parametrize("order", ["C", "F"])
def test_confident_rows_keep_their_gradient(dtype, n_classes, order):
    """To half a unit in the last place, where 1 - p would be 0 in 16 bits, and in 32."""
    leads = np.array([6.0, 9, 12, 15, 20, 30])
    logits = np.zeros((leads.size, n_classes), dtype).copy(order=order)
    logits[:, 1] = leads
    loss, grad = fastce.cross_entropy_with_grad(logits, np.ones(leads.size, int), reduction="sum", grad_output=1000.0)
    rest = (n_classes - 1) * np.exp(-leads)
    expected = -1000 * rest / (1 + rest)
    assert np.all(np.abs(grad[:, 1].astype(np.float64) - expected) <= half_unit(expected, dtype) * 1.01)
    np.testing.assert_allclose(loss, np.log1p(rest).sum(), rtol=1e-5)


@pytest.mark.parametrize("shape", [(300, 40), (9, 5000), (2, 3, 400), (2, 3000, 30)])
def test_bits_do_not_depend_on_the_number_of_threads(rng, dtype, shape):
    logits, target = make_logits(rng, shape, dtype), make_target(rng, "index", shape)
    for options in ({}, {"label_smoothing": 0.1, "softcap": 4.0}):
        loss, grad = fastce.cross_entropy_with_grad(logits, target, n_threads=1, **options)
        for n_threads in (2, 3, 8):
            other_loss, other = fastce.cross_entropy_with_grad(logits, target, n_threads=n_threads, **options)
            assert other_loss == loss
            assert_equal(other, grad)


def test_types_of_results(rng, dtype):
    """Losses and statistics are float32; what has the logits' shape has their dtype."""
    logits, target = make_logits(rng, (6, 4), dtype), make_target(rng, "index", (6, 4))
    weight = np.ones(4, dtype)
    loss, grad, stats = fastce.cross_entropy_with_grad(logits, target, weight=weight, return_stats=True)
    per_row = fastce.cross_entropy(logits, target, reduction="none", sample_weight=np.ones(6, dtype))
    for value in (loss, per_row, stats.lse, stats.log_prob, stats.entropy, fastce.logsumexp(logits)):
        assert value.dtype == np.float32
    for array in (grad, fastce.softmax(logits), fastce.log_softmax(logits)):
        assert array.dtype == dtype
    with pytest.raises(ValueError, match="out must have the dtype of logits"):
        fastce.cross_entropy_with_grad(logits, target, out=np.empty((6, 4), np.float32))
