"""Softmax, log-softmax and log-sum-exp along any axes, weighted sums among them: against SciPy and mpmath.

The float64 results of SciPy are the truth for shapes, types and ordinary numbers. Where SciPy overflows, underflows or
says otherwise than its own comments, mpmath is; those cases are listed where they are tested.
"""

import itertools
import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from mpmath import mp, mpf

import fastce
import fastce._weighted_sums
from cases import LAYOUTS, finfo, make_logits
from definition import remember
from device import call_on
from fastce import _reference
from oracle import arithmetic, assert_equal, assert_within, half_unit

special = pytest.importorskip("scipy.special")

NAMES = ["softmax", "log_softmax", "logsumexp"]
DTYPES = {"float32": np.float32, "float64": np.float64, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
SHAPES = [(7,), (4, 70), (3, 5, 18), (2, 3, 2, 5)]
INF, NAN = np.inf, np.nan
SCIPY = {name: remember(getattr(special, name)) for name in NAMES}  # for tests with every instruction set

every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)


def axes_of(n_dimensions):
    """Return None, every single axis and every tuple: in order, backwards, and counted from the end."""
    yield from (None, *range(-n_dimensions, n_dimensions))
    for size in range(n_dimensions + 1):
        for axes in itertools.combinations(range(n_dimensions), size):
            yield axes
            if size > 1:
                yield axes[::-1]
                yield tuple(k - n_dimensions for k in axes)


def bound_of(name, x, expected, dtype):
    """Return how far off a result may be, as in test_values: a few eps of the largest logit, of p per unit of log p."""
    size = 1 + np.abs(x.astype(np.float64)).max(initial=0) + np.log(max(1, x.size))
    bound = 4 * np.finfo(arithmetic(dtype)).eps * size * (expected if name == "softmax" else 1)
    return bound + (half_unit(expected, dtype) if name != "logsumexp" else 0)


# Axes.


@pytest.mark.every_isa
@every_dtype
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_axes_match_scipy(dtype, name, layout, rng):
    for shape in SHAPES:
        x = LAYOUTS[layout](make_logits(rng, shape, dtype))
        for axis in axes_of(len(shape)):
            expected = SCIPY[name](x.astype(np.float64), axis=axis)
            actual = getattr(fastce, name)(x, axis=axis)
            assert actual.dtype == (arithmetic(dtype) if name == "logsumexp" else dtype)
            assert_within(actual, expected, bound_of(name, x, expected, dtype), f"{name} {shape} {axis}")


@pytest.mark.parametrize("name", NAMES)
def test_none_means_all_axes_and_the_default_is_the_last(name, rng):
    x = make_logits(rng, (5, 6, 7), np.float64)
    function = getattr(fastce, name)
    assert_equal(function(x), function(x, axis=2))
    assert_equal(np.ravel(function(x, axis=None)), np.ravel(function(x.ravel())))
    assert "by default the last" in function.__doc__.partition("\n")[0]


@pytest.mark.every_isa
@every_dtype
@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_out_and_in_place_have_the_same_bits(dtype, name, layout, rng):
    """Whether the axes merge in both, in one or in none of the two arrays."""
    function = getattr(fastce, name)
    for shape in SHAPES[1:]:
        for axis in axes_of(len(shape)):
            given = make_logits(rng, shape, dtype)
            x = LAYOUTS[layout](given)
            expected = function(x, axis=axis)
            assert_equal(x, given)
            for order in LAYOUTS:
                out = LAYOUTS[order](np.full(shape, 7, dtype))
                assert function(x, axis=axis, out=out) is out
                assert_equal(out, expected, err_msg=f"{shape} {axis} {order}")
            assert function(x, axis=axis, out=x) is x
            assert_equal(x, expected, err_msg=f"{shape} {axis}")


def test_a_new_result_keeps_the_memory_order(rng):
    memory = make_logits(rng, (2, 3, 4, 5), np.float32)
    for permutation in itertools.permutations(range(4)):
        x = memory.transpose(permutation)
        for axis in axes_of(4):
            assert fastce.softmax(x, axis=axis).strides == x.strides


def test_axes_side_by_side_take_no_copy(rng):
    """In whatever order memory has them, and though others lie between in the array's own order."""
    memory = make_logits(rng, (40, 50, 60), np.float32)
    out = np.empty_like(memory)
    for permutation in itertools.permutations(range(3)):
        x, place = memory.transpose(permutation), out.transpose(permutation)
        inner = tuple(permutation.index(k) for k in (1, 2))
        for axis in (None, inner, inner[::-1], permutation.index(0)):
            tracemalloc.start()
            fastce.softmax(x, axis=axis, out=place)
            fastce.logsumexp(x, axis=axis)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak < memory.nbytes / 4


@pytest.mark.parametrize("name", NAMES)
def test_axes_are_checked(name, rng):
    x = make_logits(rng, (2, 3, 4), np.float32)
    for axis, exception, message in [
        ((0, 0), ValueError, r"axis must name no axis twice, got \(0, 0\) for 3 dimensions"),
        ((1, -2), ValueError, r"axis must name no axis twice, got \(1, -2\)"),
        ((0, 3), ValueError, r"axis must be in \[-3, 2\] for 3 dimensions, got 3"),
        (-4, ValueError, r"axis must be in \[-3, 2\] for 3 dimensions, got -4"),
        ([0, 1], TypeError, r"axis must be None, an integer or a tuple of integers, got \[0, 1\]"),
        ((0, 1.0), TypeError, r"axis must be None, an integer or a tuple of integers, got \(0, 1.0\)"),
        (True, TypeError, "axis must be None, an integer or a tuple of integers, got True"),
        ("all", TypeError, "axis must be None, an integer or a tuple of integers, got 'all'"),
    ]:
        with pytest.raises(exception, match=message):
            getattr(fastce, name)(x, axis=axis)


@pytest.mark.parametrize("name", NAMES)
def test_integers_of_any_kind_are_axes(name, rng):
    x = make_logits(rng, (2, 3, 4), np.float32)
    function = getattr(fastce, name)
    assert_equal(function(x, axis=(np.int8(0), np.uint64(2))), function(x, axis=(0, 2)))
    assert_equal(function(x, axis=np.array(1)), function(x, axis=1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [3.5, np.float32(3.5), np.array(3.5), np.array(3.5, ml_dtypes.bfloat16)], ids=type)
def test_scalars_are_one_element_along_one_axis(name, value):
    function = getattr(fastce, name)
    for axis in (None, 0, -1):
        result = function(value, axis=axis)
        assert np.shape(result) == ()
        assert result == {"softmax": 1, "log_softmax": 0, "logsumexp": 3.5}[name]
    with pytest.raises(ValueError, match=r"axis must be in \[-1, 0\] for 1 dimensions, got 1"):
        function(value, axis=1)
    out = np.empty((), np.result_type(np.float32, result))
    if name == "logsumexp" or np.asarray(value).dtype == out.dtype:
        assert function(value, out=out) is out
        assert out == result
    if name == "logsumexp":  # as SciPy
        assert fastce.logsumexp(value, keepdims=True).shape == special.logsumexp(3.5, keepdims=True).shape == (1,)
        assert fastce.logsumexp(value, axis=()).shape == special.logsumexp(3.5, axis=()).shape == (1,)


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_no_elements(name):
    for shape in [(0,), (0, 3), (3, 0), (2, 0, 3)]:
        for axis in axes_of(len(shape)):
            out = np.empty(shape, np.float32)
            assert getattr(fastce, name)(np.empty(shape, np.float32), axis=axis).shape == shape
            assert getattr(fastce, name)(np.empty(shape, np.float32), axis=axis, out=out) is out


# The log-sum-exp's own options.


def test_sums_without_terms():
    """-inf with sign 0. SciPy 1.17 says sign -1, the sign of -inf, and fails for some axes."""
    for shape in [(0,), (0, 3), (3, 0), (2, 0, 3)]:
        for axis in axes_of(len(shape)):
            for b, keepdims in itertools.product((None, 2.0, np.ones(shape)), (False, True)):
                expected = np.sum(np.empty(shape), axis=axis, keepdims=keepdims) - np.inf
                lse, sign = fastce.logsumexp(np.empty(shape), axis=axis, b=b, keepdims=keepdims, return_sign=True)
                assert np.shape(lse) == np.shape(sign) == np.shape(expected)
                assert_equal(lse, expected)
                assert_equal(sign, np.zeros(np.shape(expected)))


@every_dtype
def test_shapes_and_values_of_every_option_match_scipy(dtype, rng):
    for shape, b_shape in [
        ((7,), (7,)),
        ((4, 5), (5,)),
        ((4, 1), (1, 6)),  # both are broadcast
        ((3,), (2, 1, 3)),
        ((2, 3, 4), ()),
        ((), (3,)),
        ((2, 3, 4), (2, 1, 4)),
    ]:
        x = np.asarray(make_logits(rng, shape, dtype))
        b = rng.standard_normal(b_shape)
        n_dimensions = len(np.broadcast_shapes(shape, b_shape))
        for axis, keepdims, return_sign in itertools.product(axes_of(n_dimensions), (False, True), (False, True)):
            options = {"axis": axis, "keepdims": keepdims, "return_sign": return_sign}
            for factors in (None, b) if len(shape) == n_dimensions else (b,):
                expected = special.logsumexp(x.astype(np.float64), b=factors, **options)
                actual = fastce.logsumexp(x, b=factors, **options)
                defined = _reference.logsumexp(x, b=factors, **options)
                assert isinstance(actual, tuple) == return_sign
                # The signs exactly; the logarithms within what the sum's roundings come to for factors of order one.
                eps = np.finfo(arithmetic(dtype) if factors is None else np.float64).eps
                tolerance = {"rtol": 64 * eps, "atol": 256 * eps}
                for got, value, third in (
                    zip(actual, expected, defined, strict=True) if return_sign else [(actual, expected, defined)]
                ):
                    assert np.shape(got) == np.shape(value) == np.shape(third)
                    np.testing.assert_allclose(got, value, **tolerance, err_msg=f"{shape} {b_shape} {options}")
                    np.testing.assert_allclose(third, value, **tolerance, err_msg=f"{shape} {b_shape} {options}")


@pytest.mark.parametrize(
    "x",
    [
        [1, 2],
        np.int8([1, -2]),
        np.uint64([1, 2]),
        np.array([3, 1], ">i4"),
        [True, False],
        np.array([True]),
        np.float32([1, 2]),
        [1.0, 2.0],
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    "b",
    [
        None,
        2,
        2.0,
        True,
        [1, 2],
        [True, False],
        np.int8([1, 2]),
        np.array([1, 2], ">f4"),
        np.float32([1, 2]),
        np.float16([1, 2]),
        np.float64(2),
        np.array(2.0),
        [1.0, 2.0],
    ],
    ids=repr,
)
def test_types_match_scipy(x, b):
    """What NumPy promotes both to, and floating; SciPy has float16 too, for which this library has float32."""
    expected = special.logsumexp(x, b=b)
    for options in ({}, {"keepdims": True}):
        lse, sign = fastce.logsumexp(x, b=b, return_sign=True, **options)
        wanted = np.dtype(np.float32) if expected.dtype == np.float16 else expected.dtype
        assert lse.dtype == sign.dtype == wanted
        np.testing.assert_allclose(lse, special.logsumexp(np.float64(x), b=None if b is None else np.float64(b)), 1e-6)


@every_dtype
def test_types_of_16_bits(dtype):
    x = np.ones((2, 3), dtype)
    for b, expected in [
        (None, arithmetic(dtype)),
        (2.0, arithmetic(dtype)),
        (np.ones(3, np.float16), arithmetic(dtype)),
        (np.ones(3, ml_dtypes.bfloat16), arithmetic(dtype)),
        (np.ones(3, np.float32), arithmetic(dtype)),
        (np.ones(3, np.int16), arithmetic(dtype)),
        (np.ones(3, np.int64), np.float64),
        (np.ones(3, np.longdouble), np.float64),
    ]:
        assert fastce.logsumexp(x, b=b).dtype == expected
        np.testing.assert_allclose(fastce.logsumexp(x, b=b), 1 + np.log(3 if np.ndim(b) or b is None else 6), rtol=1e-6)


def exact(x, b):
    """Return log|sum b exp(x)| and its sign, and how many eps of float64 an accurate algorithm may be off."""
    sizes = x[b != 0] / np.log(2) + np.log2(np.abs(b[b != 0], dtype=float))
    bits = np.ptp(sizes) if sizes.size else 0  # the largest terms may cancel, and the least are left
    with mp.workprec(200 + min(6000, int(bits))):
        terms = [mpf(float(f)) * mp.exp(mpf(float(e))) for e, f in zip(x, b, strict=True) if f != 0]
        total, size = mp.fsum(terms), mp.fsum(map(abs, terms))
        if total == 0:
            return -INF, 0, 0
        value = mp.log(abs(total))
        # Each term is off by a few eps and by its exponent's rounding, the sum by some more. The exponent of the
        # largest, and its factor's logarithm, are added last.
        top = max((abs(t), e) for t, e in zip(terms, x[b != 0], strict=True))[1]
        spread = mp.fsum(abs(t) * (8 + abs(e - top)) for t, e in zip(terms, x[b != 0], strict=True)) / abs(total)
        slack = spread + 2 * (abs(top) + abs(value - top)) + 4 * len(terms) ** 0.5 * size / abs(total)
        return float(value), int(mp.sign(total)), float(slack)


def random_sums(rng):
    """Yield exponents and factors: ordinary ones, all signs, wide ranges of either, and sums that cancel."""
    for n in (1, 2, 3, 10, 60):
        for spread in (1e-3, 1.0, 30.0, 700.0, 1400.0):
            x = spread * rng.standard_normal(n)
            signs = rng.choice([-1.0, 1.0], n)
            yield x, np.abs(rng.standard_normal(n))
            yield x, signs * rng.random(n)
            yield x, signs * 10.0 ** rng.uniform(-300, 300, n)
            yield x, signs * 2.0 ** rng.uniform(-1074, 1023.9, n)
            yield x, signs * np.exp(np.clip(-x, -700, 700))  # every term is near one
            yield x + 1e4, np.where(rng.random(n) < 0.5, 0, signs)
            yield np.round(x), rng.integers(-2, 3, n)  # many of the same exponent
            yield np.float64(rng.integers(-3, 3, n)) * 1000, rng.integers(-2, 3, n)  # and far from the others


def test_weighted_sums_are_accurate(rng, monkeypatch):
    """Against mpmath; also where a row comes in many pieces."""
    for x, b in random_sums(rng):
        expected, sign, slack = exact(x, b)
        bound = slack * np.finfo(float).eps
        if bound > 0.1:
            continue  # cancelled: nothing is known of the sign
        for piece in (2**16, 7):
            monkeypatch.setattr(fastce._weighted_sums, "PIECE", piece)
            lse, actual_sign = fastce.logsumexp(x, b=b, return_sign=True)
            assert actual_sign == sign, (x, b)
            assert_within(lse, expected, bound, f"{x} {b}")
            assert_within(fastce.logsumexp(x, b=b), expected if sign >= 0 else NAN, bound, f"{x} {b}")


def test_equal_exponents_cancel_exactly():
    """What is left is the sum of the others, however far below; SciPy 1.17 says NaN or -inf for most of these."""
    huge = np.finfo(float).max
    for x, b, lse, sign in [
        ([1000, 1000, 0], [1, -1, 1], 0, 1),
        ([0, 0, -800], [1, -1, 1], -800, 1),
        ([0, 0, -800], [1, -1, -1], -800, -1),
        ([1000, 500, 1000, 500, 0], [1, -1, -1, 1, 3], np.log(3), 1),
        ([1e300, 1e300, -1e300], [1, -1, 1], -1e300, 1),
        ([5, 5, 4], [0.75, -0.75, 0], -INF, 0),
        ([3, 3, 2, 2, 1, 1], [1, -1, 2, -2, 4, -4], -INF, 0),
        ([9, 9, 0, 0, 0], [huge, -huge, huge, huge, -huge], np.log(huge), 1),
        ([2000, 2000, -2000], [5e-324, -5e-324, huge], -2000 + np.log(huge), 1),
        ([0, -800], [1e-300, 1e300], -800 + np.log(1e300), 1),  # the first is 1e-47 of the second
        ([0, 1400], [1, 1e-320], 1400 + np.log(1e-320), 1),
        ([0, 1430], [1e300, 1e-320], float(mp.log(mpf(1e300) + mpf(1e-320) * mp.exp(1430))), 1),
        ([0, 0], [huge, huge], np.log(huge) + np.log(2), 1),
        ([0, 0], [5e-324, -1e-323], np.log(5e-324), -1),
    ]:
        for times in (1, 3):  # alone and among other rows
            rows = np.array([x, *[np.arange(len(x))] * (times - 1)], float)
            factors = np.array([b, *[np.ones(len(x))] * (times - 1)], float)
            got = fastce.logsumexp(rows, b=factors, return_sign=True)
            np.testing.assert_allclose(got[0][0], lse, rtol=4 * np.finfo(float).eps)
            assert got[1][0] == sign
            np.testing.assert_allclose(got[0][1:], special.logsumexp(np.arange(len(x))), rtol=1e-15)


@pytest.mark.every_isa
def test_small_logarithms_keep_their_relative_accuracy(dtype):
    """log1p of the others where the largest term is 1: the result may be 1e-30 and has all of its digits."""
    eps = np.finfo(dtype).eps
    for far in (3, 20, 40, 80, 700) if dtype == np.float64 else (3, 20, 40, 80):
        for x, b in [
            ([0, -far], None),
            ([-far, 0, -far - 1], None),
            ([0, -far], [1, 1]),
            ([0, -far], [1, -1]),
            ([0, 0, -far], [2, -1, 1]),
            ([-far, 0, -far], [0.5, 1, 0.75]),
            ([-1, 0, -far], [0, 1, 1]),
        ]:
            rows = np.array([x, x], dtype)
            expected = exact(rows[0].astype(float), np.ones(len(x)) if b is None else np.array(b, float))[0]
            lse = fastce.logsumexp(rows, b=None if b is None else np.array(b, dtype))
            assert lse.dtype == dtype
            np.testing.assert_allclose(lse, expected, rtol=8 * eps, atol=0)
            np.testing.assert_allclose(special.logsumexp(rows.astype(float), b=b, axis=1), expected, rtol=1e-14, atol=0)
            np.testing.assert_allclose(_reference.logsumexp(rows, b=b), expected, rtol=1e-14, atol=0)


TABLE = [
    # x, b, logarithm, sign
    ([INF, 0], None, INF, 1),
    ([INF, -INF], None, INF, 1),
    ([-INF, -INF], None, -INF, 0),
    ([-INF, 3], None, 3, 1),
    ([NAN, 0], None, NAN, NAN),
    ([NAN, INF], None, NAN, NAN),
    ([NAN, -INF], None, NAN, NAN),
    ([INF, 0], [1, 1], INF, 1),
    ([INF, 0], [-1, 1], INF, -1),
    ([INF, INF], [2, 3], INF, 1),
    ([INF, INF], [1, -1], NAN, NAN),
    ([-INF, -INF], [1, -1], -INF, 0),
    ([0, 0], [0, 0], -INF, 0),
    ([1, 1], [1, -1], -INF, 0),
    ([0, 0], [1, -2], 0, -1),
    ([1e4, 1e4], [2, -1], 1e4, 1),
    # A factor of 0 leaves its term out.
    ([INF, 0], [0, 1], 0, 1),
    ([NAN, 0], [0, 1], 0, 1),
    ([NAN, 0], [-0.0, 1], 0, 1),
    ([-INF, 0], [0, 1], 0, 1),
    # Factors that are no finite numbers.
    ([0, 0], [INF, 1], INF, 1),
    ([0, 0], [-INF, 1], INF, -1),
    ([0, 0], [INF, -INF], NAN, NAN),
    ([-INF, 0], [INF, 1], NAN, NAN),
    ([0, 0], [NAN, 1], NAN, NAN),
    ([INF, 0], [NAN, 1], NAN, NAN),
]
# SciPy 1.17 says NaN to these. A factor of 0 leaves a term out only if the result is finite there.
TABLE_BEYOND_SCIPY = [
    ([INF, 800], [-1, 1e300], INF, -1),  # the second term is finite, beyond float64
    ([INF, -INF], [0, 1], -INF, 0),
    ([INF, INF], [0, 1], INF, 1),
    ([NAN, INF], [0, 1], INF, 1),
    ([NAN, NAN], [0, 0], -INF, 0),
]


@pytest.mark.every_isa
@every_dtype
@pytest.mark.parametrize("is_beyond", [False, True])
def test_infinities_and_nan(dtype, is_beyond):
    for x, b, lse, sign in TABLE_BEYOND_SCIPY if is_beyond else TABLE:
        rows = np.array([x, x], np.float64).astype(dtype)
        got = fastce.logsumexp(rows, b=b, return_sign=True)
        np.testing.assert_allclose(got, np.array([[lse] * 2, [sign] * 2]), rtol=0.01, err_msg=f"{x} {b}")
        unsigned = NAN if sign == -1 else lse
        np.testing.assert_allclose(fastce.logsumexp(rows, b=b), [unsigned] * 2, rtol=0.01, err_msg=f"{x} {b}")
        np.testing.assert_allclose(fastce.logsumexp(rows[0], b=b), unsigned, rtol=0.01, err_msg=f"{x} {b}")
        if not is_beyond:
            assert_equal(special.logsumexp(x, b=b, return_sign=True), (lse, sign), err_msg=f"{x} {b}")
        if b is None or np.isfinite(b).all():
            assert_equal(_reference.logsumexp(x, b=b, return_sign=True), (lse, sign))


def test_weighted_sums_of_16_bits_are_those_of_float64(rng):
    for dtype in (np.float16, ml_dtypes.bfloat16):
        x, b = make_logits(rng, (20, 30), dtype), rng.standard_normal((20, 30)).astype(dtype)
        lse, sign = fastce.logsumexp(x, b=b, return_sign=True)
        expected = special.logsumexp(x.astype(float), b=b.astype(float), axis=1, return_sign=True)
        assert_equal(sign, expected[1])
        np.testing.assert_allclose(lse, expected[0], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weighted_sums_have_the_bits_of_a_row_alone(layout, rng):
    """Wherever in a batch, whatever its strides, with `out` or without."""
    for shape in [(300, 7), (40, 5, 60), (3, 70000)]:
        x, b = make_logits(rng, shape, np.float64), rng.standard_normal(shape)
        expected = fastce.logsumexp(x, b=b, return_sign=True)
        got = fastce.logsumexp(LAYOUTS[layout](x), b=LAYOUTS[layout](b), return_sign=True)
        assert_equal(got, expected)
        place = tuple(n - 1 for n in shape[:-1])
        alone = fastce.logsumexp(x[place].copy(), b=b[place].copy(), return_sign=True)
        assert_equal(alone, [part[place] for part in expected])


def test_weighted_sums_take_no_copy(rng):
    """Nor any array as large as the operands: 16 MB are worked on in pieces of half a megabyte."""
    x = make_logits(rng, (2, 2000, 500), np.float64)
    for axis in (None, 0, 1, 2, (0, 2)):
        tracemalloc.start()
        fastce.logsumexp(x, b=rng.standard_normal(500), axis=axis)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The result of axis 0 is itself half of x, and there are two of them, one for the signs.
        assert peak < 9e6 + (x.nbytes if axis == 0 else 0)


def test_integers_are_summed_in_float64(rng):
    for dtype in "bhilqBHILQ":
        x = rng.integers(0, 90, (20, 7)).astype(dtype)
        for axis in (None, 0, 1, (0, 1)):
            expected = special.logsumexp(x, axis=axis)
            np.testing.assert_allclose(fastce.logsumexp(x, axis=axis), expected, rtol=1e-14)
            lse = fastce.logsumexp(x, b=x, axis=axis)
            np.testing.assert_allclose(lse, special.logsumexp(x, b=x, axis=axis), rtol=1e-14)
    assert fastce.logsumexp([]) == -INF
    assert fastce.logsumexp([[0, 0], [0, 0]], axis=None) == np.log(4)


# The argument `out` of the log-sum-exp.


@pytest.mark.parametrize("b", [None, 2.0])
@pytest.mark.parametrize("keepdims", [False, True])
def test_out_of_logsumexp(dtype, b, keepdims, rng):
    x = make_logits(rng, (3, 4, 5), dtype)
    for axis in axes_of(3):
        expected, expected_sign = fastce.logsumexp(x, axis=axis, b=b, keepdims=keepdims, return_sign=True)
        for layout in LAYOUTS:
            out = np.full(np.shape(expected), 7, dtype)
            out = LAYOUTS[layout](out) if out.ndim else out
            assert fastce.logsumexp(x, axis=axis, b=b, keepdims=keepdims, out=out) is out
            assert_equal(out, expected)
            out[...] = 7
            lse, sign = fastce.logsumexp(x, axis=axis, b=b, keepdims=keepdims, return_sign=True, out=out)
            assert lse is out
            assert_equal(out, expected)
            assert_equal(sign, expected_sign)


def test_out_of_logsumexp_of_no_elements():
    out = np.empty(3)
    assert fastce.logsumexp(np.empty((3, 0)), out=out) is out
    assert_equal(out, -INF)


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("make", "exception", "message"),
    [
        (
            lambda x, b: np.empty(6, np.float32),
            ValueError,
            r"out must have the shape of the result, \(5,\), got \(6,\)",
        ),
        (lambda x, b: np.empty((5, 1), np.float32), ValueError, "out must have the shape of the result"),
        (lambda x, b: np.empty(5), ValueError, "out must have the dtype of the result, float32, got <f8"),
        (lambda x, b: np.empty(5, ">f4"), ValueError, "out must have the dtype of the result, float32, got >f4"),
        (lambda x, b: np.empty(5, np.float16), ValueError, "out must have the dtype of the result, float32, got <f2"),
        (lambda x, b: read_only(np.empty(5, np.float32)), ValueError, "out must be writable"),
        (lambda x, b: [0.0] * 5, TypeError, "out must be a NumPy array, got a list"),
        (lambda x, b: np.ma.zeros(5, np.float32), TypeError, "out must be a NumPy array, got a MaskedArray"),
        (lambda x, b: x[:, 2], ValueError, "out must share no memory with the inputs, got an overlap with x"),
        (lambda x, b: b[::2], ValueError, "out must share no memory with the inputs, got an overlap with b"),
        (
            lambda x, b: np.lib.stride_tricks.as_strided(np.empty(1, np.float32), (5,), (0,)),
            ValueError,
            "out must have an element of its own for every entry",
        ),
    ],
)
def test_an_unsuitable_out_of_logsumexp_is_refused(make, exception, message, rng):
    x, b = make_logits(rng, (5, 10), np.float32), make_logits(rng, (10,), np.float32)
    out = make(x, b)
    before = [np.asarray(array).tobytes() for array in (x, b, out)]
    with pytest.raises(exception, match=message):
        fastce.logsumexp(x, b=b, out=out)
    assert [np.asarray(array).tobytes() for array in (x, b, out)] == before


@pytest.mark.parametrize(
    ("options", "exception", "message"),
    [
        ({"b": np.ones(4)}, ValueError, r"b must have a shape that broadcasts with that of x, \(5, 3\), got \(4,\)"),
        ({"b": [1, 2j, 3]}, TypeError, "b must be real numbers, got complex128"),
        ({"b": ["1", "2", "3"]}, TypeError, "b must be real numbers, got <U1"),
        ({"b": [None, 1, 2]}, TypeError, "b must be real numbers, got object"),
        ({"b": np.ma.ones(3)}, TypeError, "b must not be a masked array"),
        ({"axis": 2}, ValueError, "axis must be in"),
        ({"n_threads": 0}, ValueError, "n_threads must be"),
        (
            {"x": np.ones((5, 3), complex)},
            TypeError,
            "x must be real numbers, got complex128: scipy.special.logsumexp takes complex ones",
        ),
        ({"x": np.ones((5, 3), object)}, TypeError, "x must be float32, float64, float16 or bfloat16, got object"),
        ({"x": np.ones((5, 3), "M8[s]")}, TypeError, "x must be float32"),
        ({"x": np.ma.ones((5, 3), int)}, TypeError, "x must not be a masked array"),
        ({"x": None}, TypeError, "x must be float32, float64, float16 or bfloat16, got object"),
    ],
)
def test_logsumexp_refuses_and_writes_nothing(options, exception, message):
    out = np.full(5, 7.0)
    with pytest.raises(exception, match=message):
        fastce.logsumexp(**{"x": np.ones((5, 3)), "out": out, **options})
    assert_equal(out, 7)


# Around a call.


@every_dtype
@pytest.mark.every_isa
def test_no_floating_point_error_leaks(dtype, rng):
    """What is meant to overflow, to underflow or to be NaN says so where it happens; signaling NaN too."""
    bits = np.array([0x7FA00000, 0xFFA00000], np.uint32).view(np.float32)
    signaling = {2: bits.view(np.uint16)[1::2], 4: bits, 8: np.array([0x7FF4 << 48, 0xFFF4 << 48], np.uint64)}
    signaling = signaling[np.dtype(dtype).itemsize].view(dtype)
    if dtype == np.float16:
        signaling = np.array([0x7D00, 0xFD00], np.uint16).view(dtype)
    tops = [0, INF, -INF, NAN, float(finfo(dtype).max), float(finfo(dtype).min), float(finfo(dtype).smallest_subnormal)]
    rows = [[a, b, c] for a, b, c in itertools.product(tops, repeat=3)]
    with np.errstate(all="ignore"):
        x = np.concatenate([np.array(rows).astype(dtype), np.stack([signaling, signaling, signaling[::-1]], 1)])
        x[-1, 1] = 0
    factors = [
        None,
        2.0,
        [1, -1, 0],
        [1e308, 1e-308, INF],
        [NAN, 1, 5e-324],
        [0, 0, 0],
        rng.standard_normal((len(x), 3)),
    ]
    with np.errstate(all="raise"):
        for axis in (None, 0, 1, (0, 1), ()):
            fastce.softmax(x, axis=axis)
            fastce.log_softmax(x, axis=axis)
            fastce.log_softmax(x, axis=axis, out=x.copy())
            for b in factors:
                lse, _ = fastce.logsumexp(x, axis=axis, b=b, return_sign=True, keepdims=True)
                fastce.logsumexp(x, axis=axis, b=b, keepdims=True, out=np.empty_like(lse))


def test_a_row_of_infinity_and_nan_leaks_no_warning():
    """Warnings are errors in these tests."""
    for dtype in DTYPES.values():
        x = np.array([[INF, NAN], [1, 1], [NAN, INF], [INF, 1], [-INF, -INF]]).astype(dtype)
        expected = [NAN, 1 + np.log(2), NAN, INF, -INF]
        np.testing.assert_allclose(fastce.logsumexp(x), np.float32(expected))
        np.testing.assert_allclose(fastce.logsumexp(x[0]), NAN)


class Meddler:
    """An argument that reshapes or resizes another when it is converted."""

    def __init__(self, value, act):
        self.value, self.act = value, act

    def __array__(self, dtype=None, copy=None):
        self.act()
        return np.asarray(self.value)

    def __index__(self):
        self.act()
        return self.value

    def __bool__(self):
        self.act()
        return bool(self.value)


@pytest.mark.parametrize("change", [(10, 4), (4,), (100, 1000), (1,)], ids=str)
def test_arguments_that_change_others_while_they_are_converted(change):
    """Shapes are looked at when nobody can change them any more. A wrong shape is an error, a right one a result."""
    for name, option, value in [
        ("logsumexp", "b", 2.0),
        ("logsumexp", "axis", 0),
        ("logsumexp", "keepdims", False),
        ("logsumexp", "return_sign", False),
        ("logsumexp", "n_threads", 1),
        ("softmax", "axis", 0),
        ("softmax", "n_threads", 1),
        ("log_softmax", "axis", 0),
    ]:
        x = np.ones((4, 10))

        def act(x=x):
            x.resize(change, refcheck=False)

        result = getattr(fastce, name)(x, **{option: Meddler(value, act)})
        assert x.shape == change
        if option != "b":
            assert_equal(result, getattr(fastce, name)(x, **{option: value}))
        x = np.ones((4, 10))
        scalar = np.array(1.0)
        fastce.softmax(scalar, n_threads=Meddler(1, lambda scalar=scalar: scalar.resize((5, 100), refcheck=False)))


# On a GPU, or on the machine that stands in for one.


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["C", "F", "padded"])
@pytest.mark.parametrize("name", NAMES)
def test_any_axes_on_a_gpu(xp, name, layout, rng):
    shape = (3, 5, 18)
    x = make_logits(rng, shape, np.float32)
    for axis in (None, 0, (0, 1), (2, 0), (1, 2), ()):
        expected = getattr(special, name)(x.astype(np.float64), axis=axis)
        bound = 4 * bound_of(name, x, expected, np.float32)
        options = {"keepdims": True, "return_sign": True} if name == "logsumexp" else {}
        actual = call_on(xp, getattr(fastce, name), x, axis=axis, layout=layout, **options)
        if name == "logsumexp":
            actual, sign = actual
            assert sign.dtype == np.float32
            assert_equal(sign, np.ones_like(actual))
            expected = special.logsumexp(x.astype(np.float64), axis=axis, keepdims=True)
            bound = bound.reshape(np.shape(expected)) if np.ndim(bound) else bound
        assert_within(actual, expected, bound, f"{name} {axis} {layout}")
        out = xp.full(np.shape(expected), 7, np.float32)
        keep = {"keepdims": True} if name == "logsumexp" else {}
        assert getattr(fastce, name)(xp.asarray(x), axis=axis, out=out, **keep) is out
        assert_within(out.get(), expected, bound, f"{name} {axis} {layout}")
        if name != "logsumexp":
            place = xp.asarray(x).copy()
            assert getattr(fastce, name)(place, axis=axis, out=place) is place
            assert np.array_equal(place.get(), out.get())


def test_special_numbers_on_a_gpu(xp):
    for x, b, lse, sign in TABLE:
        if b is None:
            got = call_on(xp, fastce.logsumexp, np.float32(x), return_sign=True)
            assert_equal(got, np.float32([lse, sign]))


def test_integers_and_no_elements_on_a_gpu(xp):
    np.testing.assert_allclose(call_on(xp, fastce.logsumexp, np.array([[1, 2], [3, 4]]), axis=None), 4.440189698561196)
    assert call_on(xp, fastce.logsumexp, np.array(3)) == 3
    lse, sign = call_on(xp, fastce.logsumexp, np.empty((2, 0)), return_sign=True)
    assert np.array_equal(lse, [-INF, -INF]) and not sign.any()


def test_what_is_refused_on_a_gpu(xp):
    x = xp.asarray(np.ones((2, 3), np.float32))
    for b in (2.0, x, np.ones(3)):
        with pytest.raises(TypeError, match="b must be None where x is on a GPU"):
            fastce.logsumexp(x, b=b)
    with pytest.raises(TypeError, match="b must be a NumPy array like every other argument"):
        fastce.logsumexp(np.ones((2, 3)), b=x)
    with pytest.raises(TypeError, match="out must be on the GPU"):
        fastce.logsumexp(x, out=np.empty(2, np.float32))
    with pytest.raises(ValueError, match="out must share no memory with the inputs, got an overlap with x"):
        fastce.logsumexp(x, out=x[:, 0])
