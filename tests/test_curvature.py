"""Products with the Hessian and diagonals of curvature: against the definition, differences and other libraries.

The bounds follow from those of the gradient (see oracle.py): a second derivative has one factor more of f' times v, and
a difference from the mean doubles it twice; under a softcap, f'' is at most 2 f' / cap.
"""

import ml_dtypes
import mpmath
import numpy as np
import pytest

import fastce
from cases import LAYOUTS, OPTION_SETS, make_logits, make_target, options_for, row_shape
from definition import remember
from fastce import _reference
from fastce._curvature import CURVATURES
from oracle import assert_curvatures, assert_equal, assert_within

pytestmark = pytest.mark.every_isa

KINDS = ["index", "prob"]
DTYPES = [np.float32, np.float64, np.float16, ml_dtypes.bfloat16]
SHAPES = [
    (17, 1),
    (100, 2),
    (300, 10),  # several groups of 16 rows and a remainder
    (33, 70),
    (3, 10),  # few rows, which fill the vector along their classes
    (19, 130),
    (5, 2113),  # more than a block, and a single class in the last tile
    (2, 5000),
    (3, 21, 5, 7),
    (9,),
]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values(shape, kind, rng):
    for dtype in DTYPES:
        logits, target = make_logits(rng, shape, dtype), make_target(rng, kind, shape)
        v = rng.standard_normal(shape).astype(dtype)
        for name in OPTION_SETS if dtype == np.float32 and logits.size < 4000 else ("plain", "all"):
            options = options_for(rng, OPTION_SETS[name], kind, shape)
            for reduction in ("mean", "none"):
                grad_output = rng.standard_normal(row_shape(shape)) if reduction == "none" else 1.3
                assert_curvatures(
                    logits, target, v, f"{dtype} {name}", grad_output=grad_output, reduction=reduction, **options
                )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(21, 10), (9, 140), (4, 5, 20), (2, 130, 3, 4)], ids=str)
def test_layouts(shape, layout, rng):
    for dtype in DTYPES:
        logits, v = make_logits(rng, shape, dtype), rng.standard_normal(shape).astype(dtype)
        for kind in KINDS:
            for axis in {1, len(shape) - 1}:
                target = make_target(rng, kind, shape, axis)
                for name in ("plain", "all"):
                    options = options_for(rng, OPTION_SETS[name], kind, shape, axis)
                    arrays = (LAYOUTS[layout](array) for array in (logits, target, v))
                    assert_curvatures(*arrays, f"{dtype} {name}", curvatures=("exact",), axis=axis, **options)
    # operands that differ in strides
    function = fastce.cross_entropy_hvp
    expected = function(logits, target, v, axis=axis)
    out = LAYOUTS[layout](np.zeros_like(logits))
    assert function(logits, target, v, axis=axis, out=out) is out
    assert_equal(out, expected)


def test_v_of_other_types_and_strides(rng):
    shape = 40, 150
    logits, target = make_logits(rng, shape, np.float32), make_target(rng, "index", shape)
    v = rng.integers(-3, 3, shape)
    expected = fastce.cross_entropy_hvp(logits, target, v.astype(np.float32))
    for other in (v, v.tolist(), v.astype(np.float64), v.astype(np.float16), v.astype(">f4"), v.astype(bool) * v):
        assert_equal(fastce.cross_entropy_hvp(logits, target, other), expected)
    row = fastce.cross_entropy_hvp(logits, target, np.broadcast_to(v[0], shape))
    assert_equal(row, fastce.cross_entropy_hvp(logits, target, np.tile(v[0], (40, 1))))


def test_in_place(rng):
    for shape in ((33, 10), (7, 300), (3, 5, 4, 4)):
        for dtype in DTYPES:
            logits, v = make_logits(rng, shape, dtype), rng.standard_normal(shape).astype(dtype)
            for kind in KINDS:
                target = make_target(rng, kind, shape)
                for name in ("plain", "all"):
                    options = options_for(rng, OPTION_SETS[name], kind, shape)
                    expected = fastce.cross_entropy_hvp(logits, target, v, **options)
                    x, y = logits.copy(), v.copy()
                    assert fastce.cross_entropy_hvp(x, target, v, out=x, **options) is x
                    assert fastce.cross_entropy_hvp(logits, target, y, out=y, **options) is y
                    assert_equal(x, expected)
                    assert_equal(y, expected)
                    grad, hess = fastce.cross_entropy_grad_hess(logits, target, **options)
                    x, y = logits.copy(), np.empty_like(logits)
                    result = fastce.cross_entropy_grad_hess(x, target, out=x, hess_out=y, **options)
                    assert result[0] is x and result[1] is y
                    assert_equal(x, grad)
                    assert_equal(y, hess)
        x = logits.copy()
        assert_equal(fastce.cross_entropy_hvp(x, target, x, out=x), fastce.cross_entropy_hvp(logits, target, logits))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(20, 7), (4, 150)], ids=str)
def test_the_product_is_the_gradients_derivative(shape, kind, rng):
    """Central differences are off by h^2 / 6 of a third derivative, and by rounding divided by h."""
    logits, v = rng.standard_normal(shape), rng.standard_normal(shape)
    target = make_target(rng, kind, shape)
    h = 1e-5
    for names in OPTION_SETS.values():
        options = {"reduction": "sum", **options_for(rng, names, kind, shape)}
        ahead, behind = (fastce.cross_entropy_with_grad(logits + s * h * v, target, **options)[1] for s in (1, -1))
        actual = fastce.cross_entropy_hvp(logits, target, v, **options)
        np.testing.assert_allclose(actual, (ahead - behind) / (2 * h), rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_diagonal_is_that_of_the_products(kind, rng):
    shape = 30, 9
    logits, target = rng.standard_normal(shape), make_target(rng, kind, shape)
    for names in OPTION_SETS.values():
        options = options_for(rng, names, kind, shape)
        grad, hess = fastce.cross_entropy_grad_hess(logits, target, **options)
        np.testing.assert_allclose(grad, fastce.cross_entropy_with_grad(logits, target, **options)[1], atol=1e-15)
        for k in range(shape[1]):
            v = np.zeros(shape)
            v[:, k] = 1
            product = fastce.cross_entropy_hvp(logits, target, v, **options)
            np.testing.assert_allclose(hess[:, k], product[:, k], rtol=1e-13, atol=1e-15)


def test_scikit_learn_has_the_same_diagonal(rng):
    loss = pytest.importorskip("sklearn._loss").HalfMultinomialLoss(n_classes=7)
    logits, target = rng.standard_normal((50, 7)), rng.integers(7, size=50)
    weight = rng.random(50)
    expected = loss.gradient_hessian(target.astype(float), logits, sample_weight=weight)
    actual = fastce.cross_entropy_grad_hess(logits, target, sample_weight=weight, reduction="sum")
    for one, other in zip(actual, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-15)


def test_pytorch_has_the_same_product(rng):
    """With all that its loss knows, and what can be put around it."""
    torch = pytest.importorskip("torch")
    shape = 12, 8
    logits, v, weight = rng.standard_normal(shape), rng.standard_normal(shape), rng.random(8)
    for kind in KINDS:
        target = make_target(rng, kind, shape)
        tensor = torch.from_numpy(target)

        def loss(x, target=tensor):
            x = 3 * torch.tanh(1.5 * x / 3)
            value = torch.nn.functional.cross_entropy(
                x, target, weight=torch.from_numpy(weight), label_smoothing=0.2, reduction="sum"
            )
            return value + 0.05 * torch.logsumexp(x, 1).square().sum()

        _, expected = torch.autograd.functional.hvp(loss, torch.from_numpy(logits), torch.from_numpy(v))
        options = {"weight": weight, "label_smoothing": 0.2, "logit_scale": 1.5, "softcap": 3.0, "z_loss": 0.05}
        actual = fastce.cross_entropy_hvp(logits, target, v, reduction="sum", **options)
        np.testing.assert_allclose(actual, expected.numpy(), rtol=1e-12, atol=1e-14)
        hess = fastce.cross_entropy_grad_hess(logits, target, reduction="sum", **options)[1]
        whole = torch.autograd.functional.hessian(loss, torch.from_numpy(logits)).numpy().reshape(96, 96)
        np.testing.assert_allclose(hess.reshape(-1), np.diag(whole), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("lead", [5, 17, 40, 80])
@pytest.mark.parametrize("n_classes", [2, 10, 200])
def test_confident_rows_keep_their_digits(n_classes, lead, dtype, rng):
    """Against 100 digits: where the largest p is 1 to the last bit, every result has its relative accuracy.

    An exponential is within 2 ulp more than its argument, which is exact here; sums and products add a few. v rises, so
    that the products' terms have one sign.
    """
    n_rows = 20
    logits = np.round(8 * rng.standard_normal((n_rows, n_classes))) / 8
    top = rng.integers(n_classes, size=n_rows)
    logits[np.arange(n_rows), top] = logits.max() + lead
    logits = logits.astype(dtype)
    v = np.round(8 * rng.random((n_rows, n_classes))) / 8 + 1
    v[np.arange(n_rows), top] = 1000
    product = fastce.cross_entropy_hvp(logits, top, v.astype(dtype), reduction="sum")
    hess = fastce.cross_entropy_grad_hess(logits, top, reduction="sum")[1]
    rtol = (16 + np.sqrt(n_classes)) * np.finfo(dtype).eps
    tiny = 4 * np.finfo(dtype).smallest_subnormal
    expected_product, expected_hess = exact(logits, v)
    np.testing.assert_allclose(product, expected_product, rtol=rtol, atol=1000 * tiny)
    np.testing.assert_allclose(hess, expected_hess, rtol=rtol, atol=tiny)


@remember
def exact(logits, v):
    """Return the products with the Hessian and its diagonals for sums over rows, from 100 digits."""
    products, diagonals = [], []
    with mpmath.workdps(100):
        for x, weights in zip(logits.tolist(), v.tolist(), strict=True):
            e = [mpmath.exp(mpmath.mpf(number)) for number in x]
            total = mpmath.fsum(e)
            mean = mpmath.fsum(a * b for a, b in zip(e, weights, strict=True)) / total
            products.append([float(a / total * (mpmath.mpf(b) - mean)) for a, b in zip(e, weights, strict=True)])
            diagonals.append([float(a / total * (total - a) / total) for a in e])
    return np.array(products), np.array(diagonals)


@pytest.mark.parametrize("n_classes", [3, 40, 190])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_tiny_diagonals_do_not_underflow(n_classes, dtype, rng):
    """A factor that is too small for the type, but not with the sum of exponentials."""
    logits, target = rng.standard_normal((20, n_classes)).astype(dtype), rng.integers(n_classes, size=20)
    factor = 2e-3 * float(np.finfo(dtype).tiny)
    _, hess = fastce.cross_entropy_grad_hess(logits, target, reduction="sum", grad_output=factor)
    _, expected = _reference.cross_entropy_grad_hess(logits.astype(float), target, reduction="sum")
    # All of it is subnormal: two steps, one for each rounding.
    atol = 2.5 * float(np.finfo(dtype).smallest_subnormal)
    np.testing.assert_allclose(hess, expected * factor, rtol=0, atol=atol)


@pytest.mark.parametrize("n_classes", [3, 40, 190])
def test_tiny_factors_of_products_keep_their_digits(n_classes, rng):
    """A factor that is subnormal in float32 while v is large."""
    logits, target = rng.standard_normal((20, n_classes), np.float32), rng.integers(n_classes, size=20)
    v, factor, large = rng.standard_normal(logits.shape, np.float32), 1e-41, np.float32(1e30)
    product = fastce.cross_entropy_hvp(logits, target, v * large, reduction="sum", grad_output=factor)
    expected = _reference.cross_entropy_hvp(logits.astype(float), target, (v * large).astype(float), reduction="sum")
    atol = 16 * float(np.finfo(np.float32).eps) * factor * np.abs(expected).max()
    np.testing.assert_allclose(product, expected * factor, rtol=0, atol=atol)


def test_a_constant_vector_gives_exactly_zero(rng):
    """The softmax does not see a common offset, nor does the difference from the mean."""
    for shape in ((40, 10), (5, 333)):
        logits, target = make_logits(rng, shape, np.float32), make_target(rng, "index", shape)
        assert not fastce.cross_entropy_hvp(logits, target, np.full(shape, np.float32(0.7))).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_rows_stay_by_themselves(problem, n_classes, dtype, kind, bad):
    """NaN and +inf anywhere, or nothing but -inf: NaN in that row; zeros if it is skipped."""
    logits, y = problem[0][:33], problem[1][:33]
    target = y if kind == "index" else np.eye(n_classes, dtype=dtype)[y]
    v = np.cos(np.arange(logits.size)).reshape(logits.shape).astype(dtype)
    hit = np.array([0, 15, 16, 32])
    spoilt = logits.copy(order="K")
    spoilt[hit, slice(None) if bad == -np.inf else -1] = bad
    skip = np.ones(len(logits))
    skip[hit] = 0
    for options in ({}, {"softcap": 5.0, "label_smoothing": 0.1, "z_loss": 0.1}):
        if options and not np.isnan(bad):
            continue  # a softcap makes numbers of infinities
        for function in SWEEPS if n_classes == 10 else SWEEPS[:2]:
            clean = function(logits, target, v, reduction="sum", **options)
            for one, other in zip(function(spoilt, target, v, reduction="sum", **options), clean, strict=True):
                assert np.isnan(one[hit]).all()
                assert_equal(np.delete(one, hit, 0), np.delete(other, hit, 0))
            for one in function(spoilt, target, v, sample_weight=skip, **options):
                assert not one[hit].any()
                assert np.isfinite(one).all()
            if kind == "index":
                ignored = y.copy()
                ignored[hit] = -100
                for one in function(spoilt, ignored, v, **options):
                    assert not one[hit].any()
                    assert np.isfinite(one).all()


SWEEPS = [
    lambda logits, target, v, **options: (fastce.cross_entropy_hvp(logits, target, v, **options),),
    *(
        lambda logits, target, v, name=name, **options: fastce.cross_entropy_grad_hess(
            logits, target, curvature=name, **options
        )
        for name in CURVATURES
    ),
]


def test_nan_in_v_stays_in_its_row(problem):
    logits, target = problem
    v = np.ones_like(logits)
    v[16, 0] = np.nan
    product = fastce.cross_entropy_hvp(logits, target, v)
    assert np.isnan(product[16]).all()
    assert not np.delete(product, 16, 0).any()


def test_logits_of_minus_infinity_contribute_nothing(problem, n_classes):
    logits, target = problem
    v = np.sin(np.arange(logits.size)).reshape(logits.shape).astype(logits.dtype)
    target[:] = 0
    k = n_classes - 1
    cut = logits.copy(order="K")
    cut[:, k] = -np.inf
    for function in SWEEPS[:-1]:  # LightGBM's factor knows the number of classes
        for one, other in zip(
            function(cut, target, v, z_loss=0.1),
            function(np.ascontiguousarray(cut[:, :k]), target, np.ascontiguousarray(v[:, :k]), z_loss=0.1),
            strict=True,
        ):
            np.testing.assert_allclose(one[:, :k], other, rtol=1e-4, atol=1e-7)
            assert not (np.abs(one[:, k]) > 1e-16).any()
    # of the target itself: p - onehot, and a Hessian that does not know the target
    hidden = logits.copy(order="K")
    hidden[:, 0] = -np.inf
    grad, hess = fastce.cross_entropy_grad_hess(hidden, target, reduction="sum")
    assert (grad[:, 0] == -1).all()
    assert not hess[:, 0].any()
    assert_equal(hess, fastce.cross_entropy_grad_hess(hidden, target * 0 + k, reduction="sum")[1])


def test_nothing_to_divide_by(rng):
    logits = make_logits(rng, (20, 10), np.float32)
    logits[3] = np.nan
    v = np.ones_like(logits)
    for function in SWEEPS:
        for one in function(logits, np.full(20, -100), v):
            assert not one.any()
        for one in function(logits, np.zeros(20, int), v, weight=np.eye(10)[1]):
            assert not one.any()
        for one in function(logits[:0], np.zeros(0, int), v[:0]):
            assert one.shape == (0, 10)


@pytest.mark.parametrize("shape", [(20_001, 10), (1_001, 200), (7, 20_000), (20, 12, 17, 19)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_the_bits(shape, kind, rng):
    for dtype, order in ((np.float32, "C"), (np.float64, "F")):
        logits = make_logits(rng, shape, dtype).copy(order=order)
        target, v = make_target(rng, kind, shape), rng.standard_normal(shape).astype(dtype)
        options = options_for(rng, OPTION_SETS["all"], kind, shape)
        for function in SWEEPS[:2]:
            first = function(logits, target, v, n_threads=1, **options)
            for n_threads in (2, 3, None):
                for one, other in zip(function(logits, target, v, n_threads=n_threads, **options), first, strict=True):
                    assert one.tobytes() == other.tobytes()


def test_the_loss_object_passes_its_options_on(rng):
    shape = 20, 10
    logits, target = make_logits(rng, shape, np.float32), make_target(rng, "index", shape)
    v = rng.standard_normal(shape).astype(np.float32)
    options = options_for(rng, OPTION_SETS["all"], "index", shape)
    loss = fastce.CrossEntropyLoss(**options)
    out = np.empty_like(logits)
    assert_equal(
        loss.hvp(logits, target, v, grad_output=2.0), 2 * fastce.cross_entropy_hvp(logits, target, v, **options)
    )
    result = loss.grad_hess(logits, target, curvature="xgboost", hess_out=out)
    assert result[1] is out
    expected = fastce.cross_entropy_grad_hess(logits, target, curvature="xgboost", **options)
    assert_equal(result, expected)


LOGITS = np.zeros((4, 3), np.float32)
TARGET = np.zeros(4, int)
GPU_ARRAY = type("ndarray", (), {"__module__": "cupy", "__cuda_array_interface__": {}})()
REFUSED = {
    "v's shape": ({"v": LOGITS[:3]}, ValueError, r"v must have the shape of logits, \(4, 3\), got \(3, 3\)"),
    "v's kind": ({"v": LOGITS.astype(complex)}, TypeError, "v must be real numbers, got complex64|complex128"),
    "a masked v": ({"v": np.ma.zeros((4, 3))}, TypeError, "v must not be a masked array"),
    "v on a GPU": ({"v": GPU_ARRAY}, TypeError, "v must be a NumPy array .* got a CuPy array"),
    "logits on a GPU": ({"logits": GPU_ARRAY}, TypeError, "logits must be a NumPy array .* got a CuPy array"),
    "a class": ({"target": TARGET + 3}, IndexError, r"target\[0\] is 3"),
    "an option": ({"z_loss": -1.0}, ValueError, "z_loss"),
}


@pytest.mark.parametrize(("changes", "error", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(changes, error, match):
    arguments = {"logits": LOGITS, "target": TARGET, "v": LOGITS, **changes}
    out, hess = np.full_like(LOGITS, 7), np.full_like(LOGITS, 7)
    with pytest.raises(error, match=match):
        fastce.cross_entropy_hvp(**arguments, out=out)
    if "v" not in changes:
        del arguments["v"]
        with pytest.raises(error, match=match):
            fastce.cross_entropy_grad_hess(**arguments, out=out, hess_out=hess)
    assert (out == 7).all() and (hess == 7).all()


def test_unknown_curvatures_are_refused():
    with pytest.raises(ValueError, match=r"curvature must be one of 'exact', 'gauss_newton', .*, got 'newton'"):
        fastce.cross_entropy_grad_hess(LOGITS, TARGET, curvature="newton")


def test_overlaps_are_refused():
    memory = np.zeros(200, np.float32)
    memory[:] = np.arange(200)
    before = memory.copy()
    x, v = (memory[start : start + 60].reshape(20, 3) for start in (0, 60))
    y = np.zeros(20, int)
    cases = [
        (fastce.cross_entropy_hvp, (v,), {"out": memory[1:61].reshape(20, 3)}, "overlap with logits"),
        (fastce.cross_entropy_hvp, (v,), {"out": memory[59:119].reshape(20, 3)}, "overlap with logits"),
        (fastce.cross_entropy_hvp, (v,), {"out": memory[61:121].reshape(20, 3)}, "logits itself or v itself .* with v"),
        (fastce.cross_entropy_hvp, (v,), {"out": v[::-1]}, "overlap with v"),
        (fastce.cross_entropy_hvp, (v,), {"out": v, "weight": memory[62:65]}, "overlap with weight"),
        (fastce.cross_entropy_hvp, (x[::-1],), {"out": x}, "overlap with v"),
        (fastce.cross_entropy_grad_hess, (), {"hess_out": x}, "hess_out must share no memory .* with logits"),
        (fastce.cross_entropy_grad_hess, (), {"out": v, "hess_out": v}, "hess_out must .* overlap with out"),
        (fastce.cross_entropy_grad_hess, (), {"out": x, "hess_out": x}, "hess_out must .* overlap with logits"),
        (fastce.cross_entropy_grad_hess, (), {"hess_out": v, "weight": memory[62:65]}, "hess_out .* with weight"),
        (fastce.cross_entropy_grad_hess, (), {"hess_out": v[:5]}, "hess_out must have the shape"),
    ]
    for function, arguments, keywords, match in cases:
        with pytest.raises(ValueError, match=match):
            function(x, y, *arguments, **keywords)
        assert_equal(memory, before)
    with pytest.raises(ValueError, match="out must"):
        fastce.cross_entropy_hvp(x, v, v, out=v)  # which are the class probabilities too


def test_the_reference_is_the_derivative_of_its_gradient(rng):
    """The oracle itself, by central differences."""
    shape, h = (6, 5), 1e-5
    logits, v = rng.standard_normal(shape), rng.standard_normal(shape)
    for kind in KINDS:
        target = make_target(rng, kind, shape)
        options = {"reduction": "sum", **options_for(rng, OPTION_SETS["all"], kind, shape)}
        ahead, behind = (_reference.cross_entropy(logits + s * h * v, target, **options).grad for s in (1, -1))
        product = _reference.cross_entropy_hvp(logits, target, v, **options)
        assert_within(product, (ahead - behind) / (2 * h), 1e-8, "product")
