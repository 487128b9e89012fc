"""What is refused as `out` and as `grad_output`, before the first byte is written."""

import numpy as np
import pytest

import fastce

SHAPE = (20, 10)


@pytest.fixture
def memory(rng):
    """One piece of memory, from which overlapping arrays can be cut."""
    return rng.random(1000, np.float32)


def logits_in(memory):
    return memory[100:300].reshape(SHAPE)


# name: (memory -> out, parts of the message)
OUT = {
    "another shape": (lambda _: np.empty((10, 20), np.float32), ["(20, 10)", "(10, 20)"]),
    "too few dimensions": (lambda _: np.empty(200, np.float32), ["(20, 10)", "(200,)"]),
    "another type": (lambda _: np.empty(SHAPE), ["float32", "f8"]),
    "another byte order": (lambda _: np.empty(SHAPE, ">f4"), ["float32", ">f4"]),
    "read-only": (lambda _: read_only(np.empty(SHAPE, np.float32)), ["read-only"]),
    "read-only logits": (lambda memory: read_only(logits_in(memory)[:]), ["read-only"]),
    "one row for all": (lambda memory: writable_broadcast(memory), ["strides"]),
    "rows that overlap": (lambda memory: strided(memory, (4, 4)), ["strides"]),
    "numbers that overlap": (lambda memory: strided(memory, (20, 2)), ["strides"]),
    "rows that meet here and there": (lambda memory: strided(memory, (12, 20)), ["strides"]),
    "shifted by one number": (lambda memory: memory[101:301].reshape(SHAPE), ["overlap", "logits"]),
    "shifted by one row": (lambda memory: memory[90:290].reshape(SHAPE), ["overlap", "logits"]),
    "the logits backwards": (lambda memory: logits_in(memory)[::-1], ["overlap", "logits"]),
    "the logits in Fortran order": (lambda memory: memory[100:300].reshape(SHAPE, order="F"), ["overlap", "logits"]),
    "the logits, interleaved": (lambda memory: memory[100:500:2].reshape(SHAPE), ["overlap", "logits"]),
}


def read_only(array):
    array.flags.writeable = False
    return array


def writable_broadcast(memory):
    return strided(memory, (0, 4))


def strided(memory, strides):
    return np.lib.stride_tricks.as_strided(memory[500:], SHAPE, strides, writeable=True)


@pytest.mark.parametrize("strides", [(12, 240), (8, 12)], ids=["one after the other", "between each other"])
def test_out_may_have_odd_strides_if_its_numbers_are_apart(memory, strides):
    shape = SHAPE if strides[1] > 200 else (3, 2)
    logits = memory[: np.prod(shape)].reshape(shape).copy()
    out = np.lib.stride_tricks.as_strided(memory[100:], shape, strides, writeable=True)
    assert fastce.softmax(logits, out=out) is out
    terms = np.exp(logits.astype(np.float64))
    np.testing.assert_allclose(out, terms / terms.sum(1, keepdims=True), rtol=1e-6)


@pytest.mark.parametrize(("make_out", "parts"), OUT.values(), ids=OUT.keys())
def test_out_is_refused(memory, make_out, parts):
    before = memory.tobytes()
    logits = logits_in(memory)
    out = make_out(memory)
    out_before = out.tobytes()
    calls = [
        lambda: fastce.cross_entropy_with_grad(logits, np.zeros(20, int), out=out),
        lambda: fastce.CrossEntropyLoss().with_grad(logits, np.zeros(20, int), out=out),
        lambda: fastce.softmax(logits, out=out),
        lambda: fastce.log_softmax(logits, out=out),
    ]
    for number, call in enumerate(calls):
        with pytest.raises(ValueError, match="out must") as caught:
            call()
        wanted = [part.replace("logits", "x") if number > 1 else part for part in parts]
        assert all(part in str(caught.value) for part in wanted), caught.value
        assert memory.tobytes() == before
        assert out.tobytes() == out_before


@pytest.mark.parametrize("out", [[[0.0] * 10] * 20, "logits", np.ma.zeros(SHAPE, np.float32), 3.0], ids=type)
def test_out_must_be_an_array(memory, out):
    with pytest.raises(TypeError, match="out must be a NumPy array"):
        fastce.cross_entropy_with_grad(logits_in(memory), np.zeros(20, int), out=out)


OTHERS = {
    "target": lambda memory: {"target": memory[200:400].reshape(SHAPE)},
    "weight": lambda memory: {"weight": memory[299:309]},
    "sample_weight": lambda memory: {"sample_weight": memory[100:140:2]},
    "grad_output": lambda memory: {"grad_output": memory[81:101], "reduction": "none"},
}


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("in_place", [True, False])
def test_out_may_not_overlap_another_input(memory, name, in_place):
    before = memory.tobytes()
    out = logits_in(memory)
    logits = out if in_place else np.zeros(SHAPE, np.float32)
    arguments = {"target": np.zeros(20, int), **OTHERS[name](memory)}
    with pytest.raises(ValueError, match=f"out must .* overlap with {name}$"):
        fastce.cross_entropy_with_grad(logits, out=out, **arguments)
    assert memory.tobytes() == before
    assert not logits.any() or in_place


def test_out_may_not_overlap_an_index_target(memory):
    """Of another type, but the same bytes."""
    out = logits_in(memory)
    target = memory[100:140].view(np.int64)
    target[:] = 0
    before = memory.tobytes()
    with pytest.raises(ValueError, match="overlap with target"):
        fastce.cross_entropy_with_grad(out, target, out=out)
    assert memory.tobytes() == before


def test_neighbours_in_one_array_do_not_overlap(memory):
    """Interleaved and adjacent arrays share no element, whatever the span of their addresses."""
    base = memory[:400].reshape(20, 20)
    logits, out = base[:, ::2], base[:, 1::2]
    target = np.arange(20) % 10
    expected = fastce.cross_entropy_with_grad(logits.copy(), target)[1]
    kept = logits.copy()
    grad = fastce.cross_entropy_with_grad(logits, target, out=out)[1]
    assert grad is out
    np.testing.assert_array_equal(out, expected)
    np.testing.assert_array_equal(logits, kept)


@pytest.mark.parametrize(
    ("grad_output", "reduction", "exception", "parts"),
    [
        (np.ones(20), "mean", ValueError, ["()", "(20,)", "mean"]),
        (np.ones(1), "sum", ValueError, ["()", "(1,)", "sum"]),
        (2.0, "none", ValueError, ["(20,)", "()", "none"]),
        (np.ones(19), "none", ValueError, ["(20,)", "(19,)"]),
        (np.ones(SHAPE), "none", ValueError, ["(20,)", "(20, 10)"]),
        (1j, "mean", TypeError, ["complex128"]),
        ("1", "mean", TypeError, ["<U1"]),
        (np.ma.ones(20), "none", TypeError, ["masked"]),
    ],
)
def test_grad_output_is_refused(memory, grad_output, reduction, exception, parts):
    logits = logits_in(memory)
    before = memory.tobytes()
    with pytest.raises(exception, match="grad_output") as caught:
        fastce.cross_entropy_with_grad(
            logits, np.zeros(20, int), out=logits, grad_output=grad_output, reduction=reduction
        )
    assert all(part in str(caught.value) for part in parts), caught.value
    assert memory.tobytes() == before
