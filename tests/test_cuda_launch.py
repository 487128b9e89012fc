"""How a problem becomes launches: geometry, the task's fields, and how errors are told. No kernel runs."""

import gc
import weakref

import numpy as np
import pytest

import fake_cupy
import fastce
from device import device
from fastce._cuda import _errors
from fastce._cuda._geometry import TOTAL_BLOCKS, Limits, choose_geometry, total_geometry
from fastce._cuda._program import Variant, source_of
from fastce._cuda._task import TASK, merge_axes

HOPPER = Limits(shared_per_block=232448, shared_per_sm=233472, has_clusters=True)
TURING = Limits(shared_per_block=65536, shared_per_sm=65536, has_clusters=False)
ROW_MAJOR = {"is_row_major": True, "is_dense": True, "is_aligned": True}


@pytest.mark.parametrize(
    ("n_classes", "itemsize", "cluster", "per_sm"),
    [  # a slice of up to 72 KiB lets three blocks share a multiprocessor
        (16384, 4, 1, 3),
        (32000, 4, 2, 3),
        (50257, 4, 4, 3),
        (128256, 4, 8, 3),
        (256000, 4, 8, 1),
        (32000, 2, 1, 3),
        (128256, 2, 4, 3),
        (256000, 2, 8, 3),
    ],
)
def test_long_rows_are_split_until_three_blocks_fit(n_classes, itemsize, cluster, per_sm):
    geometry = choose_geometry(8192, n_classes, itemsize, HOPPER, **ROW_MAJOR)
    assert (geometry.family, geometry.cluster, geometry.per_sm) == ("BLOCK", cluster, per_sm)
    assert geometry.grid == 8192 * cluster
    assert cluster * geometry.shared_bytes >= n_classes * itemsize


@pytest.mark.parametrize(
    ("n_classes", "how", "family"),
    [
        (10, {}, "TILE"),
        (32, {}, "WARP"),  # all rows would begin in the same bank
        (10, {"is_dense": False}, "TILE"),
        (1024, {}, "WARP"),
        (1024, {"is_aligned": False}, "BLOCK"),  # 257 pieces of 16 bytes
        (20000, {}, "STREAM"),  # on a device with 64 KiB of shared memory and no clusters
        (10, {"is_row_major": False}, "COLUMN"),
    ],
)
def test_each_family_has_its_rows(n_classes, how, family):
    assert choose_geometry(100, n_classes, 4, TURING, **{**ROW_MAJOR, **how}).family == family


def test_sums_over_rows_do_not_depend_on_the_device():
    assert [total_geometry(n).grid for n in (1, 256, 257, 10**9)] == [1, 1, 2, TOTAL_BLOCKS]


def test_axes_merge_where_all_operands_let_them():
    assert merge_axes((), [()]) == ([1], [[0]])
    assert merge_axes((1, 1), [(8, 4)]) == ([1], [[0]])
    assert merge_axes((2, 3, 4), [(48, 16, 4)]) == ([24], [[4]])
    assert merge_axes((2, 3, 4), [(48, 16, 4), (480, 32, 8)]) == ([2, 12], [[48, 4], [480, 8]])
    assert merge_axes((2, 3), [(4, 8)]) == ([2, 3], [[4, 8]])
    assert merge_axes((5, 3), [(0, 0)]) == ([15], [[0]])


def test_the_source_says_what_it_is_for():
    text = source_of(
        Variant("bfloat16", "float64", out="grad", has_softcap=True), choose_geometry(1, 9, 2, HOPPER, **ROW_MAJOR)
    )
    for macro in ("FC_T bfloat_t", "FC_PROB double", "FC_TARGET 2", "FC_OUT 1", "FC_CAP 1", "FC_FAMILY TILE"):
        assert f"#define {macro}\n" in text
    assert f"#define FC_TASK_BYTES {TASK.itemsize}\n" in text


class Words:
    """Error words in the host's memory."""

    def __init__(self):
        self.words = np.full(_errors.N_WORDS, _errors.NONE)
        self.address = self.words.ctypes.data
        self.makers = {}
        self.n_calls = 0


@pytest.fixture
def words(monkeypatch):
    words = Words()
    monkeypatch.setattr(_errors, "_words", words)
    return words


def begin_calls(first, stop):
    """Return what the kernels of some calls store for row 0, by the calls' numbers."""
    tags = {}
    for call in range(first, stop):
        address, tags[call] = _errors.word_for(lambda row, call=call: IndexError(f"call {call} row {row}"))
        assert address == _errors._words.address + 8 * (call % _errors.N_WORDS)
    return tags


def test_errors_are_told_in_the_order_of_their_calls(words):
    n = _errors.N_WORDS
    tags = begin_calls(0, n + 5)  # the first words are in use again
    _errors.raise_pending()
    words.words[3], words.words[10] = tags[n + 3] + 7, tags[10] + 1
    with pytest.raises(IndexError, match="call 10 row 1"):
        _errors.raise_pending()
    with pytest.raises(IndexError, match=f"call {n + 3} row 7"):
        _errors.raise_pending()
    _errors.raise_pending()


def test_an_error_that_comes_late_is_never_told_as_another_calls(words):
    """The word may be that of a later call by then, whose target may have fewer rows."""
    n = _errors.N_WORDS
    tags = begin_calls(0, n + 5)
    words.words[3] = tags[3] + 2**39
    with pytest.raises(IndexError, match=f"row {2**39} of a call more than {n} calls ago"):
        _errors.raise_pending()
    _errors.raise_pending()
    assert len(words.makers) == n


def test_call_numbers_begin_again(words):
    words.n_calls = _errors.CALL_NUMBERS - 2
    tags = begin_calls(_errors.CALL_NUMBERS - 2, _errors.CALL_NUMBERS)
    assert max(tags.values()) + 2**_errors.ROW_BITS < _errors.NONE
    address, tag = _errors.word_for(IndexError)
    assert (address, tag) == (words.address, 0)


@pytest.mark.skipif(not fake_cupy.compiler(), reason="no C++ compiler")
def test_rows_of_several_lengths_take_turns():
    """A kernel that two numbers of classes share may use as much shared memory as the larger one needs."""
    with device("host") as xp:
        xp.settings.attributes = dict.fromkeys(xp.settings.attributes, 232448)
        for n_classes in (16000, 13000, 16000):
            fastce.softmax(xp.zeros((1, n_classes), "float32"))
        assert {launch["shared_mem"] > 48 * 1024 for launch in fake_cupy.launches[-3:]} == {True}
        assert len({launch["code"] for launch in fake_cupy.launches[-3:]}) == 1


@pytest.mark.skipif(not fake_cupy.compiler(), reason="no C++ compiler")
def test_an_error_that_may_come_late_keeps_no_logits():
    """An error's text needs the targets alone, and a step's logits may take half of the memory."""
    with device("host") as xp:
        logits = xp.zeros((4, 3), "float32")
        memory = logits._array
        while isinstance(memory, np.ndarray):
            memory = memory.base
        memory = weakref.ref(memory)
        fastce.cross_entropy_with_grad(logits, xp.zeros(4, "int64"))
        assert memory() is not None
        del logits
        gc.collect()
        assert memory() is None
