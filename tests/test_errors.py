"""What is refused: one table of calls, exceptions and parts of their messages. Such a call has written nothing."""

import numpy as np
import pytest

import fastce

_rng = np.random.default_rng(5)
LOGITS = _rng.standard_normal((20, 10)).astype(np.float32)
TARGET = _rng.integers(0, 10, 20)
PROB = _rng.random((20, 10), np.float32)
IMAGES = _rng.standard_normal((4, 10, 5))  # logits of rows in two dimensions
LABELS = _rng.integers(0, 10, (4, 5))
ONE_HOT = np.eye(10, dtype=int)[TARGET]
ONES = np.ones(20)


def changed(array, place, value, dtype=None):
    array = array.astype(dtype or array.dtype)
    array[place] = value
    return array


def masked(array):
    return np.ma.masked_array(array, np.zeros(array.shape, bool))


def no_class(place, value, ignore_index=-100):
    return f"target{place} is {value}, but there are 10 classes (0..9) and ignore_index is {ignore_index}"


# name: (arguments that differ from those above, exception, parts of the message)
CASES = {
    # classes that are not there
    "above": ({"target": changed(TARGET, 17, 12)}, IndexError, [no_class("[17]", 12)]),
    "just above": ({"target": changed(TARGET, 0, 10)}, IndexError, [no_class("[0]", 10)]),
    "negative": ({"target": changed(TARGET, 19, -1)}, IndexError, [no_class("[19]", -1)]),
    "first of several": ({"target": changed(TARGET, [5, 17], 12)}, IndexError, [no_class("[5]", 12)]),
    "default is not ignored": (
        {"target": changed(TARGET, 3, -100), "ignore_index": -1},
        IndexError,
        [no_class("[3]", -100, -1)],
    ),
    "uint8": ({"target": changed(TARGET, 3, 255, np.uint8)}, IndexError, [no_class("[3]", 255)]),
    "int64 at its least": ({"target": changed(TARGET, 3, -(2**63))}, IndexError, [no_class("[3]", -(2**63))]),
    "uint64 at its most": (
        {"target": changed(TARGET, 3, 2**64 - 1, np.uint64)},
        IndexError,
        [no_class("[3]", 2**64 - 1)],
    ),
    "the bits of ignore_index, unsigned": (
        {"target": changed(TARGET, 3, 2**64 - 1, np.uint64), "ignore_index": -1},
        IndexError,
        [no_class("[3]", 2**64 - 1, -1)],
    ),
    "big-endian the bits of ignore_index, unsigned": (
        {"target": changed(TARGET, 3, 2**64 - 1, ">u8"), "ignore_index": -1},
        IndexError,
        [no_class("[3]", 2**64 - 1, -1)],
    ),
    "the bits of ignore_index, signed": (
        {"target": changed(TARGET, 3, -1), "ignore_index": 2**64 - 1},
        IndexError,
        [no_class("[3]", -1, 2**64 - 1)],
    ),
    "2-D": ({"logits": IMAGES, "target": changed(LABELS, (3, 1), 12)}, IndexError, [no_class("[3, 1]", 12)]),
    "2-D, Fortran order": (
        {"logits": IMAGES, "target": changed(LABELS, ([3, 1], [1, 4]), 12).copy(order="F")},
        IndexError,
        [no_class("[1, 4]", 12)],
    ),
    "scalar": ({"logits": LOGITS[0], "target": 12}, IndexError, [no_class("", 12)]),
    # shapes
    "target too short": ({"target": TARGET[:19]}, ValueError, ["target", "(20,)", "(19,)", "(20, 10)"]),
    "target is a column": ({"target": TARGET[:, None]}, ValueError, ["target", "(20,)", "(20, 1)", "axis"]),
    "target is a scalar": ({"target": 3}, ValueError, ["target", "(20,)", "()"]),
    "class axis not where expected": ({"target": TARGET, "axis": 0}, ValueError, ["target", "(10,)", "(20,)"]),
    "probabilities too few": ({"target": PROB[:, :9]}, ValueError, ["target", "(20, 10)", "(20, 9)"]),
    "probabilities transposed": ({"target": PROB.T}, ValueError, ["target", "(20, 10)", "(10, 20)"]),
    "no classes": ({"logits": LOGITS[:, :0], "target": TARGET}, ValueError, ["class", "(20, 0)"]),
    "no classes, probabilities": ({"logits": LOGITS[:, :0], "target": PROB[:, :0]}, ValueError, ["class", "(20, 0)"]),
    "no classes, one row": ({"logits": LOGITS[0, :0], "target": 0}, ValueError, ["class", "(0,)"]),
    "logits are a scalar": ({"logits": np.float32(3), "target": 0}, ValueError, ["logits", "dimension"]),
    "weight too short": ({"weight": np.ones(9)}, ValueError, ["weight", "(10,)", "(9,)"]),
    "weight is a row": ({"weight": np.ones((1, 10))}, ValueError, ["weight", "(10,)", "(1, 10)"]),
    "weight is a scalar": ({"weight": 2.0}, ValueError, ["weight", "(10,)", "()"]),
    "sample_weight too long": ({"sample_weight": np.ones(21)}, ValueError, ["sample_weight", "(20,)", "(21,)"]),
    "sample_weight is a scalar": ({"sample_weight": 2.0}, ValueError, ["sample_weight", "(20,)", "()"]),
    "sample_weight of probabilities": (
        {"target": PROB, "sample_weight": PROB},
        ValueError,
        ["sample_weight", "(20,)", "(20, 10)"],
    ),
    # kinds
    "one-hot": ({"target": ONE_HOT}, TypeError, ["target", "one-hot", "argmax", "astype", "int64"]),
    "one-hot of bool": ({"target": ONE_HOT.astype(bool)}, TypeError, ["target", "bool", "argmax(1)"]),
    "float indices": ({"target": TARGET.astype(float)}, TypeError, ["target", "integer", "float64", "astype"]),
    "bool indices": ({"target": TARGET > 5}, TypeError, ["target", "bool"]),
    "complex probabilities": ({"target": PROB.astype(complex)}, TypeError, ["target", "complex128"]),
    "object indices": ({"target": TARGET.astype(object)}, TypeError, ["target", "object"]),
    "text": ({"target": TARGET.astype(str)}, TypeError, ["target", "<U", "np.unique(labels, return_inverse=True)"]),
    "text objects": (
        {"target": np.array(["cat", "dog"] * 10, object)},
        TypeError,
        ["target", "object", "np.unique(labels, return_inverse=True)"],
    ),
    "bytes": ({"target": [b"cat", b"dog"] * 10}, TypeError, ["target", "|S3", "np.unique"]),
    "variable text": (
        {"target": np.array(["cat", "lion"] * 10, np.dtypes.StringDType())},
        TypeError,
        ["target", "StringDType", "np.unique"],
    ),
    "missing labels": (
        {"target": changed(TARGET.astype(object), 3, None)},
        TypeError,
        ["target", "object", "missing value, None, at [3]", "target.fillna(-100).astype('int64')"],
    ),
    "labels that are NaN objects": (
        {"target": changed(TARGET.astype(object), 3, float("nan")), "ignore_index": -1},
        TypeError,
        ["target", "missing value, nan, at [3]", "fillna(-1)"],
    ),
    "NaN labels": (
        {"target": changed(TARGET.astype(float), 3, np.nan)},
        TypeError,
        ["target", "float64 with NaN at [3]", "np.nan_to_num(target, nan=-100).astype(np.int64)"],
    ),
    "fractions": ({"target": TARGET + 0.5}, TypeError, ["target", "float64", "at [0], which is no class"]),
    "infinite label": (
        {"target": changed(TARGET.astype(float), 3, np.inf)},
        TypeError,
        ["target", "inf at [3], which is no class"],
    ),
    "no target": ({"target": None}, TypeError, ["target", "object"]),
    "masked target": ({"target": masked(TARGET)}, TypeError, ["target", "masked"]),
    "masked probabilities": ({"target": masked(PROB)}, TypeError, ["target", "masked"]),
    "exchanged": (
        {"logits": TARGET, "target": LOGITS},
        TypeError,
        ["logits", "first", "int64", "(20, 10)", "exchange"],
    ),
    "scores of a two-class model": (
        {"logits": LOGITS[:, 0], "target": TARGET % 2},
        TypeError,
        ["target", "(20,)", "two-class", "np.stack([np.zeros_like(logits), logits], axis=1)"],
    ),
    "a column of scores of a two-class model": (
        {"logits": LOGITS[:, :1], "target": TARGET % 2},
        IndexError,
        ["target", "1 classes", "two-class", "np.concatenate([np.zeros_like(logits), logits], axis=1)"],
    ),
    "one row, one-hot": ({"logits": LOGITS[0], "target": ONE_HOT[0]}, TypeError, ["target", "one-hot", "argmax(0)"]),
    "integer logits": ({"logits": LOGITS.astype(int)}, TypeError, ["logits", "float32", "int64"]),
    "list of integers": ({"logits": [[1, 2, 3]], "target": [0]}, TypeError, ["logits", "int64"]),
    "bool logits": ({"logits": LOGITS > 0}, TypeError, ["logits", "bool"]),
    "complex logits": ({"logits": LOGITS.astype(complex)}, TypeError, ["logits", "complex128"]),
    "object logits": (
        {"logits": LOGITS.astype(object)},
        TypeError,
        ["logits", "object", "numpy.asarray(logits, dtype='float32')"],
    ),
    "long double logits": ({"logits": LOGITS.astype(np.longdouble)}, TypeError, ["logits", "float32"]),
    "byte-swapped float32": (
        {"logits": LOGITS.astype(LOGITS.dtype.newbyteorder())},
        TypeError,
        ["logits", "byte order", "logits.astype(logits.dtype.newbyteorder('='))"],
    ),
    "byte-swapped float64": ({"logits": IMAGES.astype(">f8"), "target": LABELS}, TypeError, ["logits", "byte order"]),
    "masked logits": ({"logits": masked(LOGITS)}, TypeError, ["logits", "masked"]),
    "masked weight": ({"weight": masked(np.ones(10))}, TypeError, ["weight", "masked"]),
    "masked sample_weight": ({"sample_weight": masked(ONES)}, TypeError, ["sample_weight", "masked"]),
    "dict of weights": ({"weight": {0: 1.0, 1: 2.0}}, TypeError, ["weight", "a dict", "[weight[k] for k in range("]),
    "balanced weights": ({"weight": "balanced"}, TypeError, ["weight", "<U8", "np.bincount(target.ravel()"]),
    "another word": ({"weight": "heavy"}, TypeError, ["weight", "one number for each class"]),
    "balanced rows": ({"sample_weight": "balanced"}, TypeError, ["sample_weight", "one number for each row"]),
    "complex weight": ({"weight": np.ones(10, complex)}, TypeError, ["weight", "complex128"]),
    "text sample_weight": ({"sample_weight": ["1"] * 20}, TypeError, ["sample_weight", "<U1"]),
    # numbers out of range
    "NaN weight": ({"weight": changed(np.ones(10), 4, np.nan)}, ValueError, ["weight", "finite", "nan at [4]"]),
    "infinite weight": ({"weight": changed(np.ones(10), 4, np.inf)}, ValueError, ["weight", "finite", "inf"]),
    "minus infinite weight": ({"weight": changed(np.ones(10), 4, -np.inf)}, ValueError, ["weight", "finite", "-inf"]),
    "weight beyond float32": ({"weight": changed(np.ones(10), 4, 1e300)}, ValueError, ["weight", "float32", "1e+300"]),
    "weight below float32": ({"weight": changed(np.ones(10), 4, -1e300)}, ValueError, ["weight", "float32", "-1e+300"]),
    "weights that float64 has not": (
        {"weight": np.full(10, np.finfo(np.longdouble).max)},
        ValueError,
        ["weight", "finite", "[0]"],
    ),
    "NaN sample_weight": ({"sample_weight": changed(ONES, 4, np.nan)}, ValueError, ["sample_weight", "nan"]),
    "infinite sample_weight": ({"sample_weight": changed(ONES, 4, np.inf)}, ValueError, ["sample_weight", "inf"]),
    "minus infinite sample_weight": (
        {"sample_weight": changed(ONES, 4, -np.inf, np.float32)},
        ValueError,
        ["sample_weight", "-inf at [4]"],
    ),
    "ignore_index with probabilities": (
        {"target": PROB, "ignore_index": 3},
        ValueError,
        ["ignore_index", "sample_weight", "3"],
    ),
    "ignore_index beyond 64 bits": ({"ignore_index": 2**64}, ValueError, ["ignore_index", str(2**64)]),
    "axis too large": ({"axis": 2}, ValueError, ["axis", "2"]),
    "axis too small": ({"axis": -3}, ValueError, ["axis", "-3"]),
    "fractional axis": ({"axis": 1.0}, TypeError, ["axis", "integer", "1.0"]),
    "bool axis": ({"axis": True}, TypeError, ["axis", "integer", "True"]),
    "fractional ignore_index": ({"ignore_index": 1.5}, TypeError, ["ignore_index", "integer", "1.5"]),
    "no threads": ({"n_threads": 0}, ValueError, ["n_threads", "1", "0"]),
    "negative threads": ({"n_threads": -1}, ValueError, ["n_threads", "-1"]),
    "very negative threads": ({"n_threads": -(2**64)}, ValueError, ["n_threads", str(-(2**64))]),
    "no number of threads at all": ({"n_threads": -(10**5000)}, ValueError, ["n_threads", "a int"]),
    "text for threads": ({"n_threads": "2"}, TypeError, ["n_threads", "'2'"]),
    "fractional threads": ({"n_threads": 2.0}, TypeError, ["n_threads", "integer", "2.0"]),
    "bool threads": ({"n_threads": True}, TypeError, ["n_threads", "integer", "True"]),
}
NUMBERS = {  # option: values out of its range
    "label_smoothing": (-0.1, 1.0000001, np.nan, np.inf, 10**400),
    "logit_scale": (0, -1.0, np.nan, np.inf, 10**400),
    "softcap": (0, -2.0, np.nan, -np.inf, -(10**400)),
    "z_loss": (np.nan, np.inf, -1e-300, 10**400),
}
CASES |= {
    f"{name}={value:.9g}" if abs(value) < 1e300 else f"{name}={value > 0} infinite": (
        {name: value},
        ValueError,
        [name, repr(value)[:60]],
    )
    for name, values in NUMBERS.items()
    for value in values
}
CASES |= {  # in the arithmetic's type, which for these logits is float32
    f"{name}={value}": ({name: value}, ValueError, [name, "float32", repr(value), f"is {rounded} there"])
    for name in ("logit_scale", "softcap")
    for value, rounded in ((1e39, "inf"), (1e-46, "0.0"))
}
CASES["logit_scale / softcap"] = (
    {"logit_scale": 1e20, "softcap": 1e-20},
    ValueError,
    ["logit_scale / softcap", "float32"],
)
CASES |= {f"{name} is a text": ({name: "0.5"}, TypeError, [name, "'0.5'"]) for name in NUMBERS}
CASES |= {
    f"{name}={value!r}": ({name: value}, ValueError, [name, *map(repr, allowed), repr(value)])
    for name, allowed, values in [
        ("reduction", ("none", "mean", "sum"), ("average", "", None, 1)),
        ("on_empty", ("nan", "zero"), ("raise", None, 0)),
    ]
    for value in values
}


@pytest.mark.parametrize(("change", "exception", "parts"), CASES.values(), ids=CASES.keys())
def test_every_function_refuses(change, exception, parts):
    options = {"logits": LOGITS, "target": TARGET, **change}
    logits, target = options.pop("logits"), options.pop("target")
    shape = np.shape(logits)
    out = np.full(shape, 7, IMAGES.dtype if logits is IMAGES else LOGITS.dtype)
    before = [np.array(array).tobytes() for array in (logits, target, out)]
    calls = [
        lambda: fastce.cross_entropy(logits, target, **options),
        lambda: fastce.cross_entropy_stats(logits, target, **options),
        lambda: fastce.cross_entropy_with_grad(logits, target, out=out, **options),
        lambda: fastce.cross_entropy_with_grad(logits, target, out=logits, **options),
        lambda: fastce.CrossEntropyLoss(**options)(logits, target),
    ]
    for call in calls:
        with pytest.raises(exception) as caught:
            call()
        message = str(caught.value)
        assert all(part in message for part in parts), message
        assert [np.array(array).tobytes() for array in (logits, target, out)] == before


NO_ARRAYS = {  # name: (arguments, exception, parts of the message)
    "rows of differing length": ({"logits": [[0.5], [0.5, 1.0]]}, ValueError, ["logits must", "a list", "shape"]),
    "probabilities of differing length": ({"target": [[0.5], [0.5, 1.0]]}, ValueError, ["target must", "a list"]),
    "sparse": ({"logits": "csr_array"}, TypeError, ["logits must be a dense array", "a csr_array", "logits.toarray()"]),
    "sparse target": ({"target": "csr_matrix"}, TypeError, ["target must be a dense array", "target.toarray()"]),
}


@pytest.mark.parametrize(("change", "exception", "parts"), NO_ARRAYS.values(), ids=NO_ARRAYS)
def test_what_is_no_array_is_refused_by_name(change, exception, parts):
    for name, value in change.items():
        if isinstance(value, str):
            change = {name: getattr(pytest.importorskip("scipy.sparse"), value)(LOGITS)}
    options = {"logits": LOGITS, "target": TARGET, **change}
    for function in (fastce.cross_entropy, fastce.cross_entropy_with_grad, fastce.cross_entropy_stats):
        with pytest.raises(exception) as caught:
            function(**options)
        assert all(part in str(caught.value) for part in parts), caught.value


def test_tensors_that_want_a_gradient_are_sent_where_they_get_one():
    torch = pytest.importorskip("torch")
    logits = torch.tensor(LOGITS, requires_grad=True)
    for options in ({}, {"weight": torch.ones(10, requires_grad=True)}):
        given = logits if not options else LOGITS
        with pytest.raises(TypeError, match=r"requires a gradient.*fastce\.torch.*\.detach\(\)"):
            fastce.cross_entropy(given, TARGET, **options)
    assert fastce.cross_entropy(logits.detach(), TARGET) == fastce.cross_entropy(LOGITS, TARGET)
    with pytest.raises(TypeError, match=r"logits must be an array or like one, got a Tensor: .*BFloat16"):
        fastce.cross_entropy(logits.detach().bfloat16(), TARGET)


@pytest.mark.parametrize("n_threads", [1, 2, 8])
def test_the_first_bad_class_is_named_whoever_finds_it(n_threads):
    target = np.zeros(300_000, int)
    target[[123_456, 123_457, 299_999]] = 7, 8, 9
    logits = np.zeros((300_000, 3), np.float32)
    with pytest.raises(IndexError, match=r"target\[123456\] is 7, but there are 3 classes \(0..2\)"):
        fastce.cross_entropy_with_grad(logits, target, out=logits, n_threads=n_threads)
    assert not logits.any()


def test_unknown_options_are_refused():
    for function in (fastce.cross_entropy, fastce.cross_entropy_with_grad, fastce.cross_entropy_stats, fastce.nll_loss):
        with pytest.raises(TypeError, match="smoothing"):
            function(LOGITS, TARGET, smoothing=0.1)
    with pytest.raises(TypeError, match="smoothing"):
        fastce.CrossEntropyLoss(smoothing=0.1)


def test_options_are_keyword_only():
    with pytest.raises(TypeError, match="positional"):
        fastce.cross_entropy(LOGITS, TARGET, 1)


@pytest.mark.parametrize(
    ("options", "exception", "parts"),
    [
        ({"label_smoothing": 2}, ValueError, ["label_smoothing", "2"]),
        ({"reduction": "avg"}, ValueError, ["reduction", "'mean'", "'avg'"]),
        ({"softcap": -1.0}, ValueError, ["softcap", "-1.0"]),
        ({"n_threads": 0}, ValueError, ["n_threads", "0"]),
    ],
)
def test_the_loss_object_refuses_when_it_is_made(options, exception, parts):
    with pytest.raises(exception) as caught:
        fastce.CrossEntropyLoss(**options)
    assert all(part in str(caught.value) for part in parts)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_the_softmax_family_refuses(name):
    function = getattr(fastce, name)
    whole = [(LOGITS.astype(int), {}, TypeError, ["x", "int64"]), (LOGITS > 0, {}, TypeError, ["x", "bool"])]
    for x, options, exception, parts in [
        *(whole if name != "logsumexp" else []),  # which sums them
        (LOGITS.astype(complex), {}, TypeError, ["x", "complex128"]),
        (masked(LOGITS), {}, TypeError, ["x", "masked"]),
        (LOGITS.astype(">f4"), {}, TypeError, ["x", "byte order"]),
        (LOGITS, {"axis": 2}, ValueError, ["axis", "2"]),
        (LOGITS, {"axis": 0.5}, TypeError, ["axis", "0.5"]),
        (LOGITS, {"n_threads": 0}, ValueError, ["n_threads", "0"]),
    ]:
        with pytest.raises(exception) as caught:
            function(x, **options)
        assert all(part in str(caught.value) for part in parts), caught.value


@pytest.mark.parametrize(
    ("change", "exception", "parts"),
    [
        ({"target": changed(TARGET, 17, 12)}, IndexError, [no_class("[17]", 12)]),
        ({"target": ONE_HOT}, TypeError, ["target", "one-hot"]),
        ({"target": TARGET[:3]}, ValueError, ["target", "(20,)", "(3,)", "log_probs of shape"]),
        ({"log_probs": LOGITS[:, :0]}, ValueError, ["log_probs must have at least one class"]),
        ({"weight": np.full(10, np.nan)}, ValueError, ["weight", "nan"]),
        ({"reduction": "avg"}, ValueError, ["reduction", "'avg'"]),
        ({"log_probs": LOGITS.astype(int)}, TypeError, ["int64"]),
    ],
)
def test_nll_loss_refuses(change, exception, parts):
    options = {"log_probs": LOGITS, "target": TARGET, **change}
    with pytest.raises(exception) as caught:
        fastce.nll_loss(**options)
    assert all(part in str(caught.value) for part in parts), caught.value
