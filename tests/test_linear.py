"""The loss of a linear layer, chunk by chunk, against its definition, the kernels and PyTorch.

The products are BLAS's, whose error depends on the order in which it adds. So results are held within a few times the
worst error of the plain NumPy computation in the same precision, which makes the same products of the same numbers at
once, plus what the kernels may be off (see oracle.py), carried through the products.
"""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest

import fastce
from cases import OPTION_SETS, make_target, options_for
from fastce import _linear, _reference
from oracle import Bounds, arithmetic, assert_within, half_unit

N_ROWS, N_FEATURES, N_CLASSES = 23, 9, 12
SHAPE = N_ROWS, N_CLASSES
CHUNKS = (1, 7, None)
REDUCTIONS = ("mean", "sum", "none")
NAMES = ("loss", "grad_features", "grad_linear_weight", "grad_linear_bias")
# By how much another order of additions, and rounded sums of chunks, may be worse than the plain computation.
WORSE = 4


def make_layer(rng, dtype=np.float32, n_rows=N_ROWS, n_features=N_FEATURES, n_classes=N_CLASSES):
    """Return features, weight and bias."""
    arrays = (n_rows, n_features), (n_classes, n_features), (n_classes,)
    return [rng.standard_normal(shape).astype(dtype) for shape in arrays]


def dense(features):
    return features.toarray() if hasattr(features, "toarray") else np.asarray(features)


def assert_linear(features, linear_weight, target, *, linear_bias=None, chunk_rows=None, what="", **options):
    """Hold loss and gradients against the definition; the loss alone must have the same bits."""
    keywords = {"linear_bias": linear_bias, "chunk_rows": chunk_rows, **options}
    actual = fastce.linear_cross_entropy_with_grad(features, linear_weight, target, **keywords)
    keywords.pop("grad_output", None)
    alone = fastce.linear_cross_entropy(features, linear_weight, target, **keywords)
    np.testing.assert_array_equal(alone, actual[0], err_msg=what)

    given = dense(features)
    dtype, work = given.dtype, arithmetic(given.dtype)
    assert actual[0].dtype == work, what
    assert [a.dtype for a in actual[1:3]] == [dtype, dtype], what
    assert (actual[3] is None) == (linear_bias is None), what
    bias = np.zeros(len(linear_weight)) if linear_bias is None else linear_bias
    expected = _reference.linear_cross_entropy(given, linear_weight, target, linear_bias=bias, **options)

    x, w = np.asarray(given, work), np.asarray(linear_weight, work)
    with np.errstate(invalid="ignore"):
        logits = x @ w.T + np.asarray(bias, work)
    of_logits = _reference.cross_entropy(logits, target, **options)
    grad = of_logits.grad.astype(work)
    x = np.where(grad.any(axis=1, keepdims=True), x, 0)  # skipped rows
    naive = of_logits.loss, grad @ w, grad.T @ x, grad.sum(axis=0)
    bounds = Bounds(of_logits, logits, target, **options)
    off = np.broadcast_to(bounds.grad, logits.shape)
    carried = bounds.loss, off @ np.abs(w), off.T @ np.abs(x), off.sum(axis=0)
    for name, got, wanted, plain, kernel in zip(NAMES, actual, expected, naive, carried, strict=True):
        if got is not None:
            error = np.max(np.abs(plain - wanted), initial=0)
            rounding = half_unit(wanted, got.dtype)
            assert_within(got, wanted, WORSE * error + kernel + rounding, f"{what} {name}")
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
        np.testing.assert_array_equal(loss, np.float32(wanted))
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
            np.testing.assert_array_equal(one, other)


def test_products_in_blocks_of_classes(rng, monkeypatch):
    """As with many classes, where a chunk's part of the weight's gradient is made block by block."""
    monkeypatch.setattr(_linear, "_PRODUCT_BYTES", 5 * N_FEATURES * 8)
    monkeypatch.setattr(_linear, "_LOGITS_BYTES", 6 * N_CLASSES * 8)
    features, linear_weight, bias = make_layer(rng, np.float64)
    for order in "CF":
        for kind in ("index", "prob"):
            target = make_target(rng, kind, SHAPE)
            sample_weight = rng.random(N_ROWS) * (rng.random(N_ROWS) < 0.7)
            weight = linear_weight.copy(order=order)
            assert_linear(features, weight, target, linear_bias=bias, what=order)
            assert_linear(features, weight, target, linear_bias=bias, sample_weight=sample_weight, what=order)


FEATURES, WEIGHT, BIAS = make_layer(np.random.default_rng(7))
TARGET = np.random.default_rng(8).integers(0, N_CLASSES, N_ROWS)
CASES = {
    # shapes
    "features 1-D": ({"features": FEATURES[0]}, ValueError, ["features", "(N, d)", "(9,)"]),
    "features 3-D": ({"features": FEATURES[None]}, ValueError, ["features", "(N, d)", "(1, 23, 9)"]),
    "features a scalar": ({"features": 1.0}, ValueError, ["features", "scalar"]),
    "weight 1-D": ({"linear_weight": WEIGHT[0]}, ValueError, ["linear_weight", "(C, d)", "(9,)"]),
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
    "axis 0": ({"axis": 0}, ValueError, ["axis", "1", "0"]),
    "axis -1": ({"axis": -1}, ValueError, ["axis", "1", "-1"]),
    "fractional axis": ({"axis": 1.0}, TypeError, ["axis", "integer", "1.0"]),
    "chunk_rows 0": ({"chunk_rows": 0}, ValueError, ["chunk_rows", "0"]),
    "chunk_rows fractional": ({"chunk_rows": 1.5}, TypeError, ["chunk_rows", "integer", "1.5"]),
    "negative class weight": ({"weight": -np.ones(N_CLASSES)}, ValueError, ["weight", "-1"]),
    "negative sample weight": ({"sample_weight": -np.ones(N_ROWS)}, ValueError, ["sample_weight", "-1"]),
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

    monkeypatch.setattr(_linear, "_solve_layer", compute)
    monkeypatch.setattr(_linear, "_Grads", compute)
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


def test_sparse_features_that_are_refused():
    sparse = pytest.importorskip("scipy.sparse")
    for features, exception, parts in [
        (sparse.csc_array(FEATURES), TypeError, ["features", "CSR", "csc", "tocsr"]),
        (sparse.coo_matrix(FEATURES), TypeError, ["features", "CSR", "coo", "tocsr"]),
        (sparse.csr_array(FEATURES.astype(int)), TypeError, ["features", "int64"]),
        (sparse.csr_array(FEATURES.astype(float)), TypeError, ["features", "float64", "float32"]),
        (sparse.csr_array(FEATURES[:, :5]), ValueError, ["linear_weight", "(23, 5)", "(12, 9)"]),
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


@pytest.mark.parametrize("names", ["plain", "all"])
@pytest.mark.parametrize("kind", ["index", "prob"])
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
        buffers = _linear._LOGITS_BYTES if chunk_rows is None else 4 * chunk_rows * n_classes
        if kind == "prob" and names == "all" and chunk_rows is not None:
            buffers *= 2  # the probabilities of the rows that are kept
        for function in (fastce.linear_cross_entropy, fastce.linear_cross_entropy_with_grad):
            peak = peak_besides_results(function, *arguments, linear_bias=bias, chunk_rows=chunk_rows, **options)
            assert peak < buffers + min(_linear._PRODUCT_BYTES, linear_weight.nbytes) + rest < logits_bytes
            assert peak > buffers / 2  # the measure sees them


def test_the_loss_and_gradients_of_pytorch(dtype, rng):
    torch = pytest.importorskip("torch")
    layer = make_layer(rng, dtype, 40, 16, 30)
    for kind in ("index", "prob"):
        target = make_target(rng, kind, (40, 30))
        weight = rng.uniform(0.5, 2, 30)
        if kind == "index":
            target[::6] = -100
        for reduction in ("mean", "sum"):
            for options in ({}, {"label_smoothing": 0.1, "weight": weight}):
                leaves = [torch.from_numpy(a.astype(np.float64)).requires_grad_() for a in layer]
                logits = torch.nn.functional.linear(*leaves)
                given = {name: torch.from_numpy(v) if name == "weight" else v for name, v in options.items()}
                loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(target), reduction=reduction, **given)
                loss.backward()
                features, linear_weight, bias = layer
                for chunk_rows in CHUNKS:
                    result = fastce.linear_cross_entropy_with_grad(
                        features,
                        linear_weight,
                        target,
                        linear_bias=bias,
                        chunk_rows=chunk_rows,
                        reduction=reduction,
                        **options,
                    )
                    wanted = [loss.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]
                    for got, value in zip(result, wanted, strict=True):
                        # Sums of up to 40 products, each rounded, of numbers of the size of the largest result.
                        np.testing.assert_allclose(
                            got, value, rtol=0, atol=40 * np.finfo(dtype).eps * max(1, np.abs(value).max())
                        )


def test_drawn_problems_match_the_definition():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(max_examples=60, deadline=None, derandomize=True, database=None)
    @hypothesis.given(st.data())
    def check(data):
        n_rows, n_features = data.draw(st.integers(0, 20)), data.draw(st.integers(0, 12))
        n_classes = data.draw(st.one_of(st.integers(1, 12), st.sampled_from((31, 64, 65, 200))))
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        dtype = data.draw(st.sampled_from((np.float32, np.float64, np.float16, ml_dtypes.bfloat16)))
        features, linear_weight, bias = make_layer(rng, dtype, n_rows, n_features, n_classes)
        kind = data.draw(st.sampled_from(("index", "prob")))
        shape = n_rows, n_classes
        chosen = data.draw(st.sets(st.sampled_from(OPTION_SETS["all"])))
        reduction = data.draw(st.sampled_from(REDUCTIONS))
        assert_linear(
            features,
            linear_weight,
            make_target(rng, kind, shape),
            linear_bias=data.draw(st.sampled_from((None, bias))),
            chunk_rows=data.draw(st.one_of(st.none(), st.integers(1, 25))),
            reduction=reduction,
            grad_output=rng.standard_normal(n_rows) if reduction == "none" else rng.standard_normal(),
            axis=data.draw(st.sampled_from((None, 1))),
            **options_for(rng, sorted(chosen), kind, shape),
        )

    check()
