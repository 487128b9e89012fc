"""The loss of a linear layer, chunk by chunk, against its definition, the kernels and PyTorch.

The products are BLAS's, whose error depends on the order in which it adds. So results are held within a few times the
worst error of the plain NumPy computation in the same precision, which makes the same products of the same numbers at
once, plus what the kernels may be off (see oracle.py), carried through the products.
"""

import math
import tracemalloc
import warnings

import ml_dtypes
import numpy as np
import pytest

import fastce
from cases import LAYOUTS, OPTION_SETS, make_target, options_for, row_shape, slow_except
from fastce import _linear, _linear_chunks, _linear_grads, _reference
from oracle import Bounds, arithmetic, assert_equal, assert_within, half_unit

N_ROWS, N_FEATURES, N_CLASSES = 23, 9, 12
SHAPE = N_ROWS, N_CLASSES
CHUNKS = (1, 7, None)
REDUCTIONS = ("mean", "sum", "none")
NAMES = ("loss", "grad_features", "grad_linear_weight", "grad_linear_bias")
NAMES_OF_LEAVES = ("features", "linear_weight", "linear_bias")
# By how much another order of additions, and rounded sums of chunks, may be worse than the plain computation.
WORSE = 4


# Leading dimensions of the features, and d1, ..., dK of the weight.
SHAPES = {
    "a row": ((), ()),
    "batch and time": ((4, 6), ()),
    "three leading": ((2, 1, 5), ()),
    "K = 1": ((7,), (3,)),
    "K = 3, ones": ((5,), (1, 2, 1)),
    "a row, K = 1": ((), (4,)),
    "batch and time, K = 2": ((3, 2), (2, 3)),
}


def make_layer(rng, dtype=np.float32, n_rows=N_ROWS, n_features=N_FEATURES, n_classes=N_CLASSES):
    """Return features, weight and bias."""
    return make_shaped(rng, dtype, (n_rows,), (), n_features, n_classes)


def make_shaped(rng, dtype, lead, outer, n_features=N_FEATURES, n_classes=N_CLASSES):
    """Return features, weight and bias of any shape."""
    arrays = (*lead, n_features), (n_classes, *outer, n_features), (n_classes, *outer)
    return [np.asarray(rng.standard_normal(shape)).astype(dtype) for shape in arrays]


def logits_shape(features, linear_weight):
    """Return the shape of the logits and their class axis."""
    lead = np.shape(features)[:-1]
    return (*lead, *np.shape(linear_weight)[:-1]), len(lead)


def dense(features):
    return features.toarray() if hasattr(features, "toarray") else np.asarray(features)


def assert_linear(features, linear_weight, target, *, linear_bias=None, chunk_rows=None, what="", **options):
    """Hold loss, gradients and statistics against the definition; without gradients the rest has the same bits."""
    keywords = {"linear_bias": linear_bias, "chunk_rows": chunk_rows, **options}
    actual = fastce.linear_cross_entropy_with_grad(features, linear_weight, target, **keywords)
    *with_stats, stats = fastce.linear_cross_entropy_with_grad(
        features, linear_weight, target, return_stats=True, **keywords
    )
    keywords.pop("grad_output", None)
    alone = fastce.linear_cross_entropy(features, linear_weight, target, **keywords)
    assert_equal(alone, actual[0], err_msg=what)
    alone, stats_alone = fastce.linear_cross_entropy(features, linear_weight, target, return_stats=True, **keywords)
    for one, other in zip((with_stats[0], *stats), (alone, *stats_alone), strict=True):
        assert_equal(one, other, err_msg=what)

    given = dense(features)
    dtype, work = given.dtype, arithmetic(given.dtype)
    assert actual[0].dtype == work, what
    assert [a.dtype for a in actual[1:3]] == [dtype, dtype], what
    assert [field.dtype for field in stats] == [work, work, np.int64, work], what
    assert (actual[3] is None) == (linear_bias is None), what
    shape, axis = logits_shape(given, linear_weight)
    options["axis"] = axis
    bias = np.zeros(np.shape(linear_weight)[:-1]) if linear_bias is None else linear_bias
    expected = _reference.linear_cross_entropy(given, linear_weight, target, linear_bias=bias, **options)

    # The plain computation, as matrices
    x, w = np.asarray(given, work), np.asarray(linear_weight, work)
    n_features = x.shape[-1]
    x, w = x.reshape(math.prod(shape[:axis]), n_features), w.reshape(math.prod(shape[axis:]), n_features)
    with np.errstate(invalid="ignore"):
        logits = (x @ w.T + np.asarray(bias, work).reshape(-1)).reshape(shape)
    of_logits = _reference.cross_entropy(logits, target, **options)
    grad = of_logits.grad.astype(work).reshape(len(x), len(w))
    x = np.where(grad.any(axis=1, keepdims=True), x, 0)  # skipped rows
    naive = of_logits.loss, grad @ w, grad.T @ x, grad.sum(axis=0)
    bounds = Bounds(of_logits, logits, target, **options)
    off = np.broadcast_to(bounds.grad, shape).reshape(grad.shape)
    carried = bounds.loss, off @ np.abs(w), off.T @ np.abs(x), off.sum(axis=0)
    for i, (name, wanted) in enumerate(zip(NAMES, expected[:4], strict=True)):
        plain, kernel = np.reshape(naive[i], np.shape(wanted)), np.reshape(carried[i], np.shape(wanted))
        error = np.max(np.abs(plain - wanted), initial=0)
        for got in (actual[i], with_stats[i]):
            if got is not None:
                rounding = half_unit(wanted, got.dtype)
                assert_within(got, wanted, WORSE * error + kernel + rounding, f"{what} {name}")
    for name in ("lse", "log_prob", "entropy"):
        wanted, plain = getattr(expected.stats, name), getattr(of_logits.stats, name)
        error = np.max(np.abs(plain - wanted), initial=0, where=np.isfinite(wanted))
        assert_within(getattr(stats, name), wanted, WORSE * error + getattr(bounds, name), f"{what} {name}")
    # Logits within rounding of each other may change places.
    assert stats.argmax.shape == expected.stats.argmax.shape, what
    assert np.array_equal(stats.argmax < 0, expected.stats.argmax < 0), what
    if logits.size:
        chosen = np.take_along_axis(logits, np.expand_dims(np.maximum(stats.argmax, 0), axis), axis).squeeze(axis)
        size = np.max(np.abs(logits), initial=1, where=np.isfinite(logits))
        close = chosen >= logits.max(axis=axis) - 16 * np.finfo(work).eps * size
        assert (close | (stats.argmax < 0)).all(), what
    return actual


@pytest.mark.parametrize("names", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_options_match_the_definition(dtype, kind, names, rng):
    features, linear_weight, bias = make_layer(rng, dtype)
    target = make_target(rng, kind, SHAPE)
    options = options_for(rng, names, kind, SHAPE)
    for reduction in REDUCTIONS:
        grad_output = rng.standard_normal(N_ROWS) if reduction == "none" else 0.7
        for chunk_rows in CHUNKS:
            for linear_bias in (None, bias):
                assert_linear(
                    features,
                    linear_weight,
                    target,
                    linear_bias=linear_bias,
                    chunk_rows=chunk_rows,
                    reduction=reduction,
                    grad_output=grad_output,
                    what=f"{reduction} {chunk_rows} {linear_bias is None}",
                    **options,
                )


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_any_leading_shape_and_k_dimensional_losses(dtype, kind, name, rng):
    features, linear_weight, bias = make_shaped(rng, dtype, *SHAPES[name])
    shape, axis = logits_shape(features, linear_weight)
    target = make_target(rng, kind, shape, axis)
    for names in ("plain", "all"):
        options = options_for(rng, OPTION_SETS[names], kind, shape, axis)
        for reduction in REDUCTIONS:
            grad_output = rng.standard_normal(row_shape(shape, axis)) if reduction == "none" else -0.7
            for chunk_rows in CHUNKS:
                for linear_bias in (None, bias):
                    result = assert_linear(
                        features,
                        linear_weight,
                        target,
                        linear_bias=linear_bias,
                        chunk_rows=chunk_rows,
                        reduction=reduction,
                        grad_output=grad_output,
                        axis=axis if linear_bias is None else axis - len(shape),
                        what=f"{names} {reduction} {chunk_rows} {linear_bias is None}",
                        **options,
                    )
                    assert np.shape(result[0]) == (row_shape(shape, axis) if reduction == "none" else ())


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
def test_shapes_of_sixteen_bits(dtype, rng):
    for lead, outer in SHAPES.values():
        features, linear_weight, bias = make_shaped(rng, dtype, lead, outer)
        shape, axis = logits_shape(features, linear_weight)
        target = make_target(rng, "index", shape, axis)
        options = options_for(rng, OPTION_SETS["all"], "index", shape, axis)
        result = assert_linear(features, linear_weight, target, linear_bias=bias, chunk_rows=2, **options)
        assert [a.dtype for a in result[1:]] == [dtype] * 3


def test_leading_dimensions_of_any_strides(dtype, rng):
    """Some can be seen as one dimension, others not, such as time before batch; class probabilities too."""
    for lead, outer in (((4, 6), ()), ((3, 2), (2, 3)), ((2, 1, 5), (2,))):
        features, linear_weight, bias = make_shaped(rng, dtype, lead, outer)
        shape, axis = logits_shape(features, linear_weight)
        prob = make_target(rng, "prob", shape, axis).astype(dtype)
        index = make_target(rng, "index", shape, axis)
        sample_weight = np.ones(index.shape)
        sample_weight[0] = 0  # so that rows are left out
        for name, change in LAYOUTS.items():
            x, w, b, t = (change(a) for a in (features, linear_weight, bias, prob))
            x.flags.writeable = w.flags.writeable = b.flags.writeable = t.flags.writeable = False
            for chunk_rows in (4, None):
                what = f"{name} {chunk_rows} {lead} {outer}"
                for options in ({}, {"sample_weight": sample_weight}):
                    assert_linear(x, w, t, linear_bias=b, chunk_rows=chunk_rows, what=what, **options)
                    assert_linear(x, w, change(index), linear_bias=b, chunk_rows=chunk_rows, what=what, **options)


def test_a_row_of_sparse_features(rng):
    """One-dimensional arrays are SciPy's since 1.15."""
    sparse = pytest.importorskip("scipy.sparse")
    features, linear_weight, bias = make_shaped(rng, np.float64, (), (3,))
    features[::2] = 0
    try:
        x = sparse.csr_array(features)
    except ValueError:
        pytest.skip("this SciPy knows matrices only")
    target = make_target(rng, "index", (N_CLASSES, 3), 0)
    result = assert_linear(x, linear_weight, target, linear_bias=bias, label_smoothing=0.1)
    assert result[1].shape == (N_FEATURES,)


def test_sparse_features_of_k_dimensional_losses(dtype, rng):
    sparse = pytest.importorskip("scipy.sparse")
    features, linear_weight, bias = make_shaped(rng, dtype, (N_ROWS,), (2, 3))
    features *= rng.random(features.shape) < 0.3
    shape = N_ROWS, N_CLASSES, 2, 3
    for kind in ("index", "prob"):
        target = make_target(rng, kind, shape)
        for names in ("plain", "all"):
            options = options_for(rng, OPTION_SETS[names], kind, shape)
            for chunk_rows in CHUNKS:
                assert_linear(
                    sparse.csr_array(features),
                    linear_weight,
                    target,
                    linear_bias=bias,
                    chunk_rows=chunk_rows,
                    what=f"{kind} {names} {chunk_rows}",
                    **options,
                )


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
@pytest.mark.parametrize("place", ["features", "linear_weight"])
def test_positions_that_are_skipped_reach_no_gradient(place, is_sparse, rng):
    """A row may be skipped at some positions only; 0 times a NaN of the features or of the weight is no part of it."""
    features, linear_weight, bias = make_shaped(rng, np.float64, (N_ROWS,), (3,))
    target = make_target(rng, "index", (N_ROWS, N_CLASSES, 3))
    target[::2, 0] = -100
    target[4, :] = -100
    target[5, 1:] = -100
    if place == "features":
        features[4], features[5] = np.nan, np.inf
        features = features if not is_sparse else pytest.importorskip("scipy.sparse").csr_array(features)
    else:
        target[:, 0] = -100
        linear_weight[1, 0], linear_weight[2, 0] = np.nan, np.inf
        features = features if not is_sparse else pytest.importorskip("scipy.sparse").csr_array(features)
    wanted = _reference.linear_cross_entropy(dense(features), linear_weight, target, linear_bias=bias)
    for chunk_rows in CHUNKS:
        _, *grads = fastce.linear_cross_entropy_with_grad(
            features, linear_weight, target, linear_bias=bias, chunk_rows=chunk_rows
        )
        for name, got, expected in zip(NAMES[1:], grads, wanted[1:4], strict=True):
            # A few roundings of numbers below 10
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-14, err_msg=name)
        if place == "features":
            assert np.isnan(grads[0][5]).all() and np.isfinite(np.delete(grads[0], 5, 0)).all()
            assert np.isfinite(grads[1][:, 1:]).all() and np.isnan(grads[1][:, 0]).all()
        else:
            assert np.isfinite(grads[0]).all() and np.isfinite(grads[1]).all()


WRT = [(), ("features",), ("linear_weight",), ("linear_bias",), ("features", "linear_bias"), NAMES_OF_LEAVES]


@pytest.mark.parametrize("is_sparse", [False, True], ids=["dense", "sparse"])
def test_gradients_that_nobody_wants_are_left_out(is_sparse, rng):
    """The others have the bits that they have anyway, and no product is made in vain."""
    for lead, outer in ((N_ROWS,), ()), ((N_ROWS,), (3,)):
        features, linear_weight, bias = make_shaped(rng, np.float64, lead, outer)
        x = pytest.importorskip("scipy.sparse").csr_array(features) if is_sparse else features
        target = make_target(rng, "index", (*lead, N_CLASSES, *outer))
        target[3] = -100
        for chunk_rows in CHUNKS:
            options = {"linear_bias": bias, "chunk_rows": chunk_rows}
            loss, *grads = fastce.linear_cross_entropy_with_grad(x, linear_weight, target, **options)
            for wrt in WRT:
                for form in (wrt, list(wrt), set(wrt), dict.fromkeys(wrt), *wrt[: len(wrt) == 1]):
                    some, *found = fastce.linear_cross_entropy_with_grad(x, linear_weight, target, wrt=form, **options)
                    assert some == loss
                    for name, one, other in zip(NAMES_OF_LEAVES, found, grads, strict=True):
                        if name in wrt:
                            assert_equal(one, other)
                        else:
                            assert one is None


def test_what_is_left_out_is_not_multiplied(rng, monkeypatch):
    features, linear_weight, bias = make_layer(rng)
    target = make_target(rng, "index", SHAPE)
    matmul, products = np.matmul, []
    monkeypatch.setattr(np, "matmul", lambda *arrays, **options: products.append(1) or matmul(*arrays, **options))
    for wrt, expected in (((), 1), ("linear_bias", 1), ("features", 2), ("linear_weight", 2), (NAMES_OF_LEAVES, 3)):
        products.clear()
        fastce.linear_cross_entropy_with_grad(features, linear_weight, target, linear_bias=bias, wrt=wrt)
        assert len(products) == expected


def test_a_name_of_no_gradient_is_refused():
    for wrt, exception, parts in [
        ("weight", ValueError, ["wrt", "'features', 'linear_weight', 'linear_bias'", "'weight'"]),
        (("features", "bias"), ValueError, ["wrt", "'features', 'linear_weight', 'linear_bias'", "'bias'"]),
        ("", ValueError, ["wrt", "''"]),
        ((0,), ValueError, ["wrt", "0"]),
        (None, TypeError, ["wrt", "'features', 'linear_weight', 'linear_bias'", "None"]),
        (3, TypeError, ["wrt", "3"]),
    ]:
        with pytest.raises(exception) as caught:
            fastce.linear_cross_entropy_with_grad(FEATURES, WEIGHT, TARGET, wrt=wrt)
        assert all(part in str(caught.value) for part in parts), caught.value


def test_statistics_where_a_mean_has_nothing_to_divide_by(rng):
    """The rows are not skipped: their softmax is known, though it counts for nothing."""
    features, linear_weight, bias = make_layer(rng, np.float64)
    target = make_target(rng, "index", SHAPE)
    target[2] = -100
    options = {"linear_bias": bias, "weight": np.zeros(N_CLASSES)}
    wanted = _reference.linear_cross_entropy(features, linear_weight, target, **options).stats
    for chunk_rows in CHUNKS:
        loss, *grads, stats = fastce.linear_cross_entropy_with_grad(
            features, linear_weight, target, chunk_rows=chunk_rows, return_stats=True, **options
        )
        assert np.isnan(loss)
        assert not any(grad.any() for grad in grads)
        for one, other in zip(stats, wanted, strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-14)  # a few roundings of numbers below 10
        assert [field[2] for field in stats] == [0, 0, -1, 0]


def test_rows_of_nan_have_no_statistics_and_spoil_no_others(dtype, rng):
    for lead, outer in SHAPES.values():
        features, linear_weight, bias = make_shaped(rng, dtype, (5, *lead), outer)
        features[1], features[3] = np.nan, np.inf
        shape, axis = logits_shape(features, linear_weight)
        for kind in ("index", "prob"):
            target = make_target(rng, kind, shape, axis)
            loss, grad, _, _, stats = fastce.linear_cross_entropy_with_grad(
                features, linear_weight, target, linear_bias=bias, reduction="none", return_stats=True
            )
            wanted = fastce.linear_cross_entropy_with_grad(
                features[::2], linear_weight, target[::2], linear_bias=bias, reduction="none", return_stats=True
            )
            # The same rows in another chunk: up to 9 products of numbers below 20, in another order
            near = {"rtol": 0, "atol": 200 * np.finfo(dtype).eps}
            for got, expected in zip((loss, grad, *stats), (*wanted[:2], *wanted[4]), strict=True):
                np.testing.assert_allclose(got[::2], expected, **near)
            for got in (loss, grad, stats.lse, stats.log_prob, stats.entropy):
                assert np.isnan(got[1::2]).all()
            assert (stats.argmax[1::2] == -1).all()


def test_gradients_are_the_slopes_of_the_loss(rng):
    """By central differences, whose error is of the order of h^2 and of the spacing of the loss over h."""
    for lead, outer in SHAPES.values():
        layer = make_shaped(rng, np.float64, lead, outer, n_classes=4)
        shape, axis = logits_shape(*layer[:2])
        for kind in ("index", "prob"):
            target = make_target(rng, kind, shape, axis)
            options = options_for(rng, OPTION_SETS["all"], kind, shape, axis)

            def loss(arrays, target=target, options=options):
                features, linear_weight, bias = arrays
                return fastce.linear_cross_entropy(
                    features, linear_weight, target, linear_bias=bias, on_empty="zero", **options
                )

            _, *grads = fastce.linear_cross_entropy_with_grad(*layer[:2], target, linear_bias=layer[2], **options)
            for i, grad in enumerate(grads):
                direction = rng.standard_normal(layer[i].shape)
                h = 1e-5
                ends = [[a + side * h * direction if i == j else a for j, a in enumerate(layer)] for side in (-1, 1)]
                slope = (loss(ends[1]) - loss(ends[0])) / (2 * h)
                assert np.vdot(grad, direction) == pytest.approx(slope, abs=1e-7)


@pytest.mark.parametrize("kind", ["index", "prob"])
def test_weights_of_any_sign(dtype, kind, rng):
    """A mean divides by their signed sum; rows of weight 0 alone are skipped."""
    for lead, outer in SHAPES.values():
        features, linear_weight, bias = make_shaped(rng, dtype, lead, outer)
        shape, axis = logits_shape(features, linear_weight)
        rows = row_shape(shape, axis)
        options = {
            "weight": rng.standard_normal(N_CLASSES),
            "sample_weight": np.asarray(rng.standard_normal(rows) * (rng.random(rows) < 0.8)),
            "label_smoothing": 0.1,
            "z_loss": 0.01,
        }
        target = make_target(rng, kind, shape, axis)
        for reduction in REDUCTIONS:
            for chunk_rows in (2, None):
                assert_linear(
                    features,
                    linear_weight,
                    target,
                    linear_bias=bias,
                    chunk_rows=chunk_rows,
                    reduction=reduction,
                    grad_output=rng.standard_normal(rows) if reduction == "none" else -0.7,
                    what=f"{lead} {outer} {reduction} {chunk_rows}",
                    **options,
                )


def test_a_mean_over_weights_that_cancel_has_no_gradient(rng):
    features, linear_weight, bias = make_layer(rng, np.float64)
    target = make_target(rng, "index", SHAPE)
    sample_weight = np.where(np.arange(N_ROWS) % 2, -1.0, 1.0)
    sample_weight[0] = 0
    options = {"linear_bias": bias, "sample_weight": sample_weight, "return_stats": True}
    for on_empty, wanted in (("nan", np.nan), ("zero", 0.0)):
        loss, *grads, stats = fastce.linear_cross_entropy_with_grad(
            features, linear_weight, target, on_empty=on_empty, **options
        )
        assert_equal(loss, wanted)
        assert not any(grad.any() for grad in grads)
        expected = _reference.linear_cross_entropy(features, linear_weight, target, linear_bias=bias).stats
        for one, other in zip(stats, expected, strict=True):
            np.testing.assert_allclose(one[1:], other[1:], rtol=0, atol=1e-14)  # a few roundings of numbers below 10


@pytest.mark.parametrize("size", [2.0**-1070, 2.0**-600, 2.0**600, 2.0**1020])
def test_a_mean_knows_no_size_of_weights(dtype, size, rng):
    """As small and as large as float64 has them: their sum divides all the same."""
    features, linear_weight, bias = make_layer(rng, dtype)
    sample_weight = rng.integers(1, 4, N_ROWS).astype(float)
    for kind in ("index", "prob"):
        target = make_target(rng, kind, SHAPE)
        for chunk_rows in CHUNKS:
            options = {"linear_bias": bias, "chunk_rows": chunk_rows}
            wanted = assert_linear(features, linear_weight, target, sample_weight=sample_weight, **options)
            found = fastce.linear_cross_entropy_with_grad(
                features, linear_weight, target, sample_weight=size * sample_weight, **options
            )
            for one, other in zip(found, wanted, strict=True):
                # Weights are rounded to a type and multiplied: a few roundings more or less
                np.testing.assert_allclose(one, other, rtol=0, atol=16 * np.finfo(dtype).eps * np.abs(other).max())


@pytest.mark.parametrize("name", ["float64", "float32", "float16", "bfloat16"])
def test_nothing_is_said_of_what_overflows_or_underflows(name, rng):
    """Whatever the caller has set NumPy to raise: these are results like others."""
    dtype = np.dtype(getattr(ml_dtypes, name) if name == "bfloat16" else name)
    sparse = pytest.importorskip("scipy.sparse")
    tiny, huge = float(ml_dtypes.finfo(dtype).smallest_subnormal), float(ml_dtypes.finfo(dtype).max)
    for lead, outer in SHAPES.values():
        layer = make_shaped(rng, dtype, lead, outer)
        shape, axis = logits_shape(*layer[:2])
        for kind in ("index", "prob"):
            target = make_target(rng, kind, shape, axis)
            options = options_for(rng, OPTION_SETS["all"], kind, shape, axis)
            options["weight"][0] = 1e-60  # which float32 has not
            options["sample_weight"] = options["sample_weight"].astype(np.longdouble) * np.longdouble("1e-40")
            if kind == "prob":
                target = target.astype(np.longdouble) * np.longdouble("1e-330")
            for size in (tiny, 1e-6, 1.0, 1e3, huge, np.inf):
                with np.errstate(all="ignore"):
                    features, linear_weight, bias = ((size * a.astype(np.float64)).astype(dtype) for a in layer)
                forms = [features]
                if features.ndim == 2 and name in ("float32", "float64"):
                    forms.append(sparse.csr_array(features))
                for x in forms:
                    for grad_output in (1e-300, 1e-5, 1e300):
                        with np.errstate(all="raise"):
                            for chunk_rows in (2, None):
                                fastce.linear_cross_entropy_with_grad(
                                    x,
                                    linear_weight,
                                    target,
                                    linear_bias=bias,
                                    chunk_rows=chunk_rows,
                                    grad_output=grad_output,
                                    return_stats=True,
                                    **options,
                                )


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"])
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_sixteen_bits_are_multiplied_in_float32(dtype, kind, rng):
    features, linear_weight, bias = make_layer(rng, dtype)
    target = make_target(rng, kind, SHAPE)
    for names in ("plain", "all"):
        options = options_for(rng, OPTION_SETS[names], kind, SHAPE)
        for chunk_rows in CHUNKS:
            result = assert_linear(
                features, linear_weight, target, linear_bias=bias, chunk_rows=chunk_rows, what=names, **options
            )
            assert result[0].dtype == np.float32
            assert result[3].dtype == dtype


def test_sixteen_bits_overflow_without_a_warning():
    features, linear_weight = np.full((1, 2), 6e4, np.float16), np.full((3, 2), 100, np.float16)
    result = fastce.linear_cross_entropy_with_grad(features, linear_weight, [0], grad_output=1e3, reduction="sum")
    assert np.isinf(result[2]).any()


@pytest.mark.parametrize("kind", ["csr_array", "csr_matrix"])
def test_sparse_features(dtype, kind, rng):
    sparse = pytest.importorskip("scipy.sparse")
    features, linear_weight, bias = make_layer(rng, dtype)
    features *= rng.random(features.shape) < 0.3
    features[4] = 0
    features = getattr(sparse, kind)(features)
    for target_kind in ("index", "prob"):
        target = make_target(rng, target_kind, SHAPE)
        for names in ("plain", "all"):
            options = options_for(rng, OPTION_SETS[names], target_kind, SHAPE)
            for chunk_rows in CHUNKS:
                for order in "CF":
                    result = assert_linear(
                        features,
                        linear_weight.copy(order=order),
                        target,
                        linear_bias=bias,
                        chunk_rows=chunk_rows,
                        what=f"{names} {chunk_rows} {order}",
                        **options,
                    )
                    assert all(type(a) is np.ndarray for a in result[1:])


def layouts(x):
    yield "C", x
    yield "Fortran", np.asfortranarray(x)
    yield "reversed", np.flip(np.flip(x).copy())
    yield "step", np.repeat(np.repeat(x, 2, 0), 2, 1)[::2, ::2]
    yield "padded", np.concatenate([x, x], axis=1)[:, : x.shape[1]]
    yield "unaligned", np.frombuffer(b"\0" + x.tobytes(), np.uint8)[1:].view(x.dtype).reshape(x.shape)


def test_any_strides(dtype, rng):
    features, linear_weight, bias = make_layer(rng, dtype)
    target = make_target(rng, "index", SHAPE)
    for (name, x), (weight_name, w) in zip(layouts(features), reversed(list(layouts(linear_weight))), strict=True):
        x.flags.writeable = w.flags.writeable = False
        for chunk_rows in CHUNKS:
            assert_linear(x, w, target, linear_bias=bias, chunk_rows=chunk_rows, what=f"{name} {weight_name}")


def test_gradients_keep_the_memory_order(rng):
    features, linear_weight, _ = make_layer(rng)
    target = make_target(rng, "index", SHAPE)
    for order in "CF":
        x, w = features.copy(order=order), linear_weight.copy(order=order)
        _, grad_features, grad_weight, _ = fastce.linear_cross_entropy_with_grad(x, w, target, chunk_rows=7)
        assert grad_features.strides == x.strides
        assert grad_weight.strides == w.strides


def test_array_likes_are_converted():
    result = assert_linear([[1.0, 0.0], [0.0, 2.0]], [[2.0, 0.0], [0.0, 1.5], [0.0, 0.0]], [0, 2])
    assert result[0].dtype == np.float64


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_sizes_at_the_edge(kind, reduction, rng):
    """No rows, no features, one of each."""
    for n_rows, n_features, n_classes in [(0, 3, 4), (5, 0, 4), (5, 3, 1), (1, 1, 1), (1, 3, 2)]:
        features, linear_weight, bias = make_layer(rng, np.float64, n_rows, n_features, n_classes)
        target = rng.random((n_rows, n_classes)) if kind == "prob" else np.zeros(n_rows, int)
        for on_empty in ("nan", "zero"):
            for chunk_rows in CHUNKS:
                result = assert_linear(
                    features,
                    linear_weight,
                    target,
                    linear_bias=bias,
                    chunk_rows=chunk_rows,
                    reduction=reduction,
                    on_empty=on_empty,
                    what=f"{n_rows} {n_features} {n_classes} {on_empty} {chunk_rows}",
                )
                assert [a.shape for a in result[1:]] == [features.shape, linear_weight.shape, bias.shape]


def test_no_rows_of_no_classes():
    """Which the definition divides by."""
    loss, *grads = fastce.linear_cross_entropy_with_grad(np.ones((0, 3)), np.ones((0, 3)), np.zeros(0, int))
    assert np.isnan(loss)
    assert [np.shape(grad) for grad in grads] == [(0, 3), (0, 3), ()]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_skipped_rows_reach_no_gradient_whatever_they_hold(bad, reduction, rng):
    features, linear_weight, bias = make_layer(rng, np.float64)
    target = make_target(rng, "index", SHAPE)
    target[::4] = -100
    sample_weight = rng.random(N_ROWS)
    sample_weight[1::5] = 0
    skipped = (target == -100) | (sample_weight == 0)
    features[skipped] = bad
    for chunk_rows in CHUNKS:
        options = {"linear_bias": bias, "chunk_rows": chunk_rows, "reduction": reduction}
        result = assert_linear(features, linear_weight, target, sample_weight=sample_weight, **options)
        assert all(np.isfinite(a).all() for a in result)
        assert not result[1][skipped].any()
        prob = np.eye(N_CLASSES)[np.maximum(target, 0)]
        result = assert_linear(features, linear_weight, prob, sample_weight=np.where(skipped, 0, 1.0), **options)
        assert all(np.isfinite(a).all() for a in result)


@pytest.mark.parametrize(
    "options",
    [{"target": np.full(N_ROWS, -100)}, {"weight": np.zeros(N_CLASSES)}, {"sample_weight": np.zeros(N_ROWS)}],
    ids=lambda options: next(iter(options)),
)
def test_a_mean_over_nothing_has_no_gradient(options, rng):
    features, linear_weight, bias = make_layer(rng)
    features[3] = np.nan
    options = {"target": make_target(rng, "index", SHAPE), **options}
    for on_empty, wanted in (("nan", np.nan), ("zero", 0.0)):
        loss, *grads = fastce.linear_cross_entropy_with_grad(
            features, linear_weight, linear_bias=bias, on_empty=on_empty, **options
        )
        assert_equal(loss, np.float32(wanted))
        assert not any(grad.any() for grad in grads)


def test_a_mean_is_that_of_the_whole_batch(rng):
    """Chunks that differ in their kept rows and weights do not each have a mean of their own."""
    features, linear_weight, _ = make_layer(rng, np.float64)
    target = make_target(rng, "index", SHAPE)
    target[:7] = -100
    target[8:14] = -100
    weight = np.linspace(0.1, 3, N_CLASSES)
    wanted = fastce.cross_entropy(features @ linear_weight.T, target, weight=weight)
    for chunk_rows in range(1, N_ROWS + 2):
        loss = fastce.linear_cross_entropy(features, linear_weight, target, weight=weight, chunk_rows=chunk_rows)
        assert loss == pytest.approx(wanted, rel=1e-14)


def test_the_number_of_threads_does_not_change_the_bits(rng):
    """Enough numbers for several threads; BLAS's own threads are left as they are."""
    features, linear_weight, bias = make_layer(rng, np.float32, 300, 8, 500)
    target = make_target(rng, "index", (300, 500))
    results = [
        fastce.linear_cross_entropy_with_grad(
            features, linear_weight, target, linear_bias=bias, chunk_rows=100, n_threads=n, label_smoothing=0.1
        )
        for n in (1, 2, 3, 8, None)
    ]
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert_equal(one, other)


def test_products_in_blocks_of_classes(rng, monkeypatch):
    """As with many classes, where a chunk's part of the weight's gradient is made block by block."""
    monkeypatch.setattr(_linear_grads, "PRODUCT_BYTES", 5 * N_FEATURES * 8)
    monkeypatch.setattr(_linear_chunks, "LOGITS_BYTES", 6 * N_CLASSES * 8)
    features, linear_weight, bias = make_layer(rng, np.float64)
    for order in "CF":
        for kind in ("index", "prob"):
            target = make_target(rng, kind, SHAPE)
            sample_weight = rng.random(N_ROWS) * (rng.random(N_ROWS) < 0.7)
            weight = linear_weight.copy(order=order)
            assert_linear(features, weight, target, linear_bias=bias, what=order)
            assert_linear(features, weight, target, linear_bias=bias, sample_weight=sample_weight, what=order)


class Meddler:
    """Something that NumPy can make an array of, and that does something to another array then."""

    def __init__(self, array, meddle):
        self.array, self.meddle = array, meddle

    def __array__(self, dtype=None, copy=None):
        self.meddle()
        return self.array


class Number:
    """A number that does something when it is looked at."""

    def __init__(self, value, meddle):
        self.value, self.meddle = value, meddle

    def __index__(self):
        self.meddle()
        return self.value

    def __float__(self):
        self.meddle()
        return float(self.value)

    def __bool__(self):
        self.meddle()
        return True


def test_an_argument_that_changes_another_is_seen_with_the_change(rng):
    """All are taken in before any shape is looked at. Otherwise memory is read that is no longer there."""

    class Derived(np.ndarray):
        pass

    def give(changed, meddling, change, derived):
        arrays = dict(zip(NAMES_OF_LEAVES, make_shaped(rng, np.float64, (400,), ()), strict=True))
        arrays |= {
            "target": make_target(rng, "index", (400, N_CLASSES)),
            "weight": np.ones(N_CLASSES),
            "sample_weight": np.ones(400),
            "grad_output": np.ones(400),
        }
        # Of its own memory, so that it can be resized; of another class, so that it becomes a view
        victim = Derived(arrays[changed].shape, arrays[changed].dtype) if derived else arrays[changed].copy()
        victim[...] = arrays[changed]
        arrays[changed] = victim
        numbers = {"chunk_rows": 7, "softcap": 3.0, "n_threads": 1, "return_stats": True}
        if meddling in numbers:
            numbers[meddling] = Number(1, lambda: change(victim))
        else:
            arrays[meddling] = Meddler(arrays[meddling], lambda: change(victim))
        return arrays | numbers | {"reduction": "none"}

    def shrink(array):
        array.resize((1, *array.shape[1:]), refcheck=False)

    def reshape(array):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            array.shape = array.shape[::-1] if array.ndim > 1 else (2, array.size // 2)

    arrays = (*NAMES_OF_LEAVES, "target", "weight", "sample_weight", "grad_output")
    for derived in (False, True):
        for changed in arrays:
            for meddling in (*arrays, "chunk_rows", "softcap", "n_threads", "return_stats"):
                if meddling == changed:
                    continue
                for change in (shrink, reshape):
                    with pytest.raises(ValueError, match="must have"):
                        fastce.linear_cross_entropy_with_grad(**give(changed, meddling, change, derived))


FEATURES, WEIGHT, BIAS = make_layer(np.random.default_rng(7))
TARGET = np.random.default_rng(8).integers(0, N_CLASSES, N_ROWS)
CASES = {
    # shapes
    "features 1-D": ({"features": FEATURES[0]}, ValueError, ["target", "()", "(12,)", "(23,)"]),
    "features 3-D": ({"features": FEATURES[None]}, ValueError, ["target", "(1, 23)", "(1, 23, 12)", "(23,)"]),
    "features a scalar": ({"features": 1.0}, ValueError, ["features", "scalar"]),
    "weight 1-D": ({"linear_weight": WEIGHT[0]}, ValueError, ["linear_weight", "(C, d)", "(9,)"]),
    "weight 3-D": (
        {"linear_weight": WEIGHT.reshape(4, 3, 9), "linear_bias": BIAS.reshape(4, 3)},
        ValueError,
        ["target", "(23, 3)", "(23, 4, 3)", "class axis 1"],
    ),
    "bias of classes alone": (
        {"linear_weight": WEIGHT.reshape(4, 3, 9), "linear_bias": BIAS[:4]},
        ValueError,
        ["linear_bias", "(4, 3)", "(4, 3, 9)", "(4,)"],
    ),
    "weight transposed": ({"linear_weight": WEIGHT.T}, ValueError, ["linear_weight", "(C, 9)", "(23, 9)", "(9, 12)"]),
    "no classes": ({"linear_weight": WEIGHT[:0], "linear_bias": BIAS[:0]}, ValueError, ["class", "(23, 0)"]),
    "bias too short": ({"linear_bias": BIAS[:-1]}, ValueError, ["linear_bias", "(12,)", "(11,)"]),
    "bias a scalar": ({"linear_bias": np.float32(1)}, ValueError, ["linear_bias", "(12,)", "()"]),
    "target too short": ({"target": TARGET[:-1]}, ValueError, ["target", "(23,)", "(22,)"]),
    "class weights": ({"weight": np.ones(9)}, ValueError, ["weight", "(12,)", "(9,)"]),
    "sample weights": ({"sample_weight": np.ones(9)}, ValueError, ["sample_weight", "(23,)", "(9,)"]),
    # kinds
    "integer features": ({"features": FEATURES.astype(int)}, TypeError, ["features", "int64"]),
    "features of another dtype": ({"features": FEATURES.astype(float)}, TypeError, ["features", "float64", "float32"]),
    "weight of another dtype": (
        {"linear_weight": WEIGHT.astype(np.float16)},
        TypeError,
        ["linear_weight", "features", "float32", "float16"],
    ),
    "bias of another dtype": (
        {"linear_bias": BIAS.astype(float)},
        TypeError,
        ["linear_bias", "features", "float32", "float64"],
    ),
    "bias in another byte order": ({"linear_bias": BIAS.astype(">f4")}, TypeError, ["linear_bias", "byte order"]),
    "features in another byte order": ({"features": FEATURES.astype(">f4")}, TypeError, ["features", "byte order"]),
    "masked features": ({"features": np.ma.masked_array(FEATURES)}, TypeError, ["features", "masked"]),
    "masked bias": ({"linear_bias": np.ma.masked_array(BIAS)}, TypeError, ["linear_bias", "masked"]),
    "no weight": ({"linear_weight": None}, TypeError, ["linear_weight", "object"]),
    "one-hot": ({"target": np.eye(N_CLASSES, dtype=int)[TARGET]}, TypeError, ["target", "one-hot"]),
    # numbers
    "class above": (
        {"target": np.where(np.arange(N_ROWS) == 17, 12, TARGET)},
        IndexError,
        ["target[17] is 12, but there are 12 classes (0..11) and ignore_index is -100"],
    ),
    "axis 0": ({"axis": 0}, ValueError, ["axis", "1", "(23, 12)", "0"]),
    "axis 2": ({"axis": 2}, ValueError, ["axis", "[-2, 1]", "2"]),
    "fractional axis": ({"axis": 1.0}, TypeError, ["axis", "integer", "1.0"]),
    "chunk_rows 0": ({"chunk_rows": 0}, ValueError, ["chunk_rows", "0"]),
    "chunk_rows fractional": ({"chunk_rows": 1.5}, TypeError, ["chunk_rows", "integer", "1.5"]),
    "infinite class weight": ({"weight": np.full(N_CLASSES, np.inf)}, ValueError, ["weight", "finite", "inf"]),
    "sample weight of NaN": (
        {"sample_weight": np.full(N_ROWS, np.nan)},
        ValueError,
        ["sample_weight", "finite", "nan"],
    ),
    "softcap of no float32": ({"softcap": 1e39}, ValueError, ["softcap", "1e+39"]),
    "logit_scale of no float32": ({"logit_scale": 1e-46}, ValueError, ["logit_scale", "1e-46"]),
    "reduction": ({"reduction": "avg"}, ValueError, ["reduction", "'avg'"]),
    "softcap": ({"softcap": -1.0}, ValueError, ["softcap", "-1.0"]),
    "n_threads": ({"n_threads": 0}, ValueError, ["n_threads", "0"]),
    "ignore_index with probabilities": (
        {"target": np.ones(SHAPE), "ignore_index": 3},
        ValueError,
        ["ignore_index", "sample_weight"],
    ),
}


@pytest.mark.parametrize(("change", "exception", "parts"), CASES.values(), ids=CASES.keys())
def test_what_is_refused_computes_nothing(change, exception, parts, monkeypatch):
    def compute(*_):
        raise AssertionError("computed before all was checked")

    monkeypatch.setattr(_linear, "solve", compute)
    monkeypatch.setattr(_linear, "LayerGrads", compute)
    options = {"features": FEATURES, "linear_weight": WEIGHT, "target": TARGET, "linear_bias": BIAS, **change}
    for function in (fastce.linear_cross_entropy, fastce.linear_cross_entropy_with_grad):
        with pytest.raises(exception) as caught:
            function(**options)
        message = str(caught.value)
        assert all(part in message for part in parts), message


def test_an_upstream_gradient_of_another_shape_is_refused():
    for reduction, grad_output in (("mean", np.ones(N_ROWS)), ("none", 1.0), ("none", np.ones(3))):
        with pytest.raises(ValueError, match="grad_output"):
            fastce.linear_cross_entropy_with_grad(
                FEATURES, WEIGHT, TARGET, grad_output=grad_output, reduction=reduction
            )


def broken(sparse):
    """Return sparse features that SciPy multiplies although their indices lead elsewhere."""
    for name, place, value in [
        ("indices", 3, 9),
        ("indices", 3, -1),
        ("indices", -1, 2**31 - 1),
        ("indptr", 4, 2**31 - 1),
        ("indptr", 4, -5),
        ("indptr", 0, 1),
        ("indptr", -1, N_ROWS * N_FEATURES + 1),
    ]:
        features = sparse.csr_array(FEATURES)
        getattr(features, name)[place] = value
        yield features, ValueError, [f"features.{name}", "must be"]
    features = sparse.csr_array(FEATURES)
    features.indices = features.indices[:-1]
    yield features, ValueError, ["features.indptr", "206"]
    features = sparse.csr_array(FEATURES)
    features.indptr = features.indptr[:-1]
    yield features, ValueError, ["features.indptr", "24"]


def test_sparse_features_that_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    for features, exception, parts in [
        (sparse.csc_array(FEATURES), TypeError, ["features", "CSR", "csc", "tocsr"]),
        (sparse.coo_matrix(FEATURES), TypeError, ["features", "CSR", "coo", "tocsr"]),
        (sparse.csr_array(FEATURES.astype(int)), TypeError, ["features", "int64"]),
        (sparse.csr_array(FEATURES.astype(float)), TypeError, ["features", "float64", "float32"]),
        (sparse.csr_array(FEATURES[:, :5]), ValueError, ["linear_weight", "(23, 5)", "(12, 9)"]),
        *broken(sparse),
    ]:
        with pytest.raises(exception) as caught:
            fastce.linear_cross_entropy_with_grad(features, WEIGHT, TARGET)
        assert all(part in str(caught.value) for part in parts), caught.value
    with pytest.raises(TypeError, match="linear_weight must be"):
        fastce.linear_cross_entropy(FEATURES, sparse.csr_array(WEIGHT), TARGET)


def test_arrays_on_a_gpu_are_refused():
    cupy_array = type("ndarray", (), {"__module__": "cupy", "__cuda_array_interface__": {}})()
    for name in ("features", "linear_weight", "target", "linear_bias"):
        arguments = {"features": FEATURES, "linear_weight": WEIGHT, "target": TARGET, name: cupy_array}
        with pytest.raises(TypeError, match=f"{name} must be a NumPy array"):
            fastce.linear_cross_entropy(**arguments)


def peak_besides_results(function, *arguments, **options):
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    result = function(*arguments, **options)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    return peak - sum(a.nbytes for a in result[1:] if a is not None) if isinstance(result, tuple) else peak


@pytest.mark.parametrize("names", slow_except(["plain"], ["plain", "all"]))
@pytest.mark.parametrize("kind", slow_except(["index"], ["index", "prob"]))
def test_the_logits_are_never_held_whole(kind, names, rng):
    """131 MB of logits; the buffers may take what the constants say, and the rest 1 MiB, 64 bytes per row and a bit."""
    n_rows, n_features, n_classes = 4096, 16, 8000
    features, linear_weight, bias = make_layer(rng, np.float32, n_rows, n_features, n_classes)
    shape = n_rows, n_classes
    target = rng.random(shape, np.float32) if kind == "prob" else make_target(rng, kind, shape)
    options = options_for(rng, OPTION_SETS[names], kind, shape)
    logits_bytes = 4 * n_rows * n_classes
    rest = 2**20 + 64 * n_rows + 2 * (features.nbytes + linear_weight.nbytes)
    arguments = features, linear_weight, target
    for chunk_rows in (64, None):
        buffers = _linear_chunks.LOGITS_BYTES if chunk_rows is None else 4 * chunk_rows * n_classes
        if kind == "prob" and names == "all" and chunk_rows is not None:
            buffers *= 2  # the probabilities of the rows that are kept
        for function in (fastce.linear_cross_entropy, fastce.linear_cross_entropy_with_grad):
            peak = peak_besides_results(function, *arguments, linear_bias=bias, chunk_rows=chunk_rows, **options)
            assert peak < buffers + min(_linear_grads.PRODUCT_BYTES, linear_weight.nbytes) + rest < logits_bytes
            assert peak > buffers / 2  # the measure sees them


def test_leading_dimensions_are_not_merged_by_a_copy(rng):
    """Time before batch: 8 MiB of features, and 8 MiB of class probabilities, are taken chunk by chunk."""
    features, linear_weight, _ = make_shaped(rng, np.float32, (32, 1024), (), 64, 64)
    prob = make_target(rng, "prob", (32, 1024, 64), 2).astype(np.float32)
    index = make_target(rng, "index", (32, 1024, 64), 2)
    x, prob, index = features.swapaxes(0, 1), prob.swapaxes(0, 1), index.swapaxes(0, 1)
    chunk_bytes = 4 * 1024 * 64
    for target in (prob, index):
        for function in (fastce.linear_cross_entropy, fastce.linear_cross_entropy_with_grad):
            peak = peak_besides_results(function, x, linear_weight, target, chunk_rows=1024, n_threads=1)
            # A row's loss and target, a chunk's logits, features, probabilities and a product, and 1 MiB
            assert peak < 20 * 32 * 1024 + 5 * chunk_bytes + 2**20 < features.nbytes / 2


@pytest.mark.parametrize("return_stats", slow_except([False], [False, True]))
def test_k_dimensional_logits_are_never_held_whole(return_stats, rng):
    """66 MB of logits."""
    n_rows, n_classes, outer = 2048, 500, (4, 4)
    features, linear_weight, bias = make_shaped(rng, np.float32, (n_rows,), outer, 16, n_classes)
    target = make_target(rng, "index", (n_rows, n_classes, *outer))
    for function in (fastce.linear_cross_entropy, fastce.linear_cross_entropy_with_grad):
        tracemalloc.start()
        options = {"linear_bias": bias, "chunk_rows": 64, "return_stats": return_stats, "n_threads": 1}
        function(features, linear_weight, target, **options)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        # The logits of a chunk, gradients and a product, 40 bytes per softmax, and 1 MiB
        buffers = 4 * 64 * n_classes * 16
        most = buffers + 3 * (features.nbytes + linear_weight.nbytes) + 40 * n_rows * 16 + 2**20
        assert buffers < peak < most < 4 * n_rows * n_classes * 16 / 4


def test_gradients_that_nobody_wants_take_no_memory(rng):
    """A weight of 16 MiB and features of 8 MiB, in a chunk whose logits take 2 MiB."""
    features, linear_weight, bias = make_shaped(rng, np.float32, (1024,), (), 2048, 2048)
    target = make_target(rng, "index", (1024, 2048))
    for wrt, results in {
        (): 0,
        ("linear_bias",): bias.nbytes,
        ("features",): features.nbytes,
        ("linear_weight",): linear_weight.nbytes + _linear_grads.PRODUCT_BYTES,
        NAMES_OF_LEAVES: features.nbytes + linear_weight.nbytes + _linear_grads.PRODUCT_BYTES,
    }.items():
        tracemalloc.start()
        fastce.linear_cross_entropy_with_grad(
            features, linear_weight, target, linear_bias=bias, chunk_rows=256, wrt=wrt, n_threads=1
        )
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert results + 2**21 <= peak < results + 2**21 + 2**20


# Of in_features, classes, and d1, ..., dK: those of PyTorch's own samples.
TORCH_SHAPES = [
    ((), 3, 4, ()),
    ((8,), 3, 4, ()),
    ((4,), 3, 2, (3,)),
    ((8,), 8, 2, (3,)),
    ((4,), 2, 2, (1, 2, 1)),
    ((40,), 16, 30, ()),
]


@pytest.mark.parametrize(("lead", "n_features", "n_classes", "outer"), TORCH_SHAPES)
def test_the_loss_and_gradients_of_pytorch(lead, n_features, n_classes, outer, dtype, rng):
    functional = pytest.importorskip("torch.nn.functional")
    if not hasattr(functional, "linear_cross_entropy"):
        pytest.skip("this PyTorch has no loss of a linear layer")
    from torch import from_numpy

    layer = make_shaped(rng, dtype, lead, outer, n_features, n_classes)
    shape, axis = logits_shape(*layer[:2])
    for kind in ("index", "prob"):
        target = make_target(rng, kind, shape, axis)
        weight = rng.uniform(0.5, 2, n_classes)
        sets = [{}, {"label_smoothing": 0.1, "weight": weight}]
        if kind == "index" and lead:
            target[::6] = -100
            sets.append({"ignore_index": int(target[1].flat[0])})
            target[0] = target[0] if target.ndim == 1 else np.where(target[0] < 0, 0, target[0])
            target[target < 0] = sets[-1]["ignore_index"]
            target[0] = (sets[-1]["ignore_index"] + 1) % n_classes
        for reduction in REDUCTIONS:
            for options in sets:
                for has_bias in (False, True):
                    leaves = [from_numpy(a.astype(np.float64)).requires_grad_() for a in layer]
                    loss = functional.linear_cross_entropy(
                        *leaves[:2],
                        from_numpy(np.asarray(target)),
                        linear_bias=leaves[2] if has_bias else None,
                        reduction=reduction,
                        **{name: from_numpy(v) if name == "weight" else v for name, v in options.items()},
                    )
                    upstream = rng.standard_normal(loss.shape)
                    loss.backward(from_numpy(np.asarray(upstream)))
                    for chunk_rows in CHUNKS:
                        result = fastce.linear_cross_entropy_with_grad(
                            *layer[:2],
                            target,
                            linear_bias=layer[2] if has_bias else None,
                            chunk_rows=chunk_rows,
                            grad_output=upstream,
                            reduction=reduction,
                            **options,
                        )
                        wanted = [loss, *(leaf.grad for leaf in leaves)]
                        for got, tensor in zip(result, wanted, strict=True):
                            assert (got is None) == (tensor is None)
                            if tensor is not None:
                                value = tensor.detach().numpy()
                                # Sums of up to 40 products, each rounded, of numbers of the size of the largest result.
                                atol = 40 * np.finfo(dtype).eps * max(1, np.abs(value).max())
                                assert got.shape == value.shape
                                np.testing.assert_allclose(got, value, rtol=0, atol=atol)


def test_drawn_problems_match_the_definition():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.data())
    def check(data):
        lead = data.draw(st.one_of(st.tuples(st.integers(0, 20)), st.lists(st.integers(0, 4), max_size=3).map(tuple)))
        outer = data.draw(st.one_of(st.just(()), st.lists(st.integers(1, 3), max_size=3).map(tuple)))
        n_features = data.draw(st.integers(0, 12))
        n_classes = data.draw(st.one_of(st.integers(1, 12), st.sampled_from((31, 64, 65, 200))))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        dtype = data.draw(st.sampled_from((np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))
        features, linear_weight, bias = make_shaped(rng, dtype, lead, outer, n_features, n_classes)
        kind = data.draw(st.sampled_from(("index", "prob")))
        shape, axis = logits_shape(features, linear_weight)
        chosen = data.draw(st.sets(st.sampled_from(OPTION_SETS["all"])))
        reduction = data.draw(st.sampled_from(REDUCTIONS))
        rows = row_shape(shape, axis)
        assert_linear(
            features,
            linear_weight,
            make_target(rng, kind, shape, axis),
            linear_bias=data.draw(st.sampled_from((None, bias))),
            chunk_rows=data.draw(st.one_of(st.none(), st.integers(1, 25))),
            reduction=reduction,
            grad_output=rng.standard_normal(rows) if reduction == "none" else rng.standard_normal(),
            axis=data.draw(st.sampled_from((None, axis, axis - len(shape)))),
            **options_for(rng, sorted(chosen), kind, shape, axis),
        )

    check()
