"""Fixtures, and how tests run.

A test marked `slow` is left out unless pytest is told `-m slow` (those alone) or `-m ""` (all); .ci/run runs both.

A test marked `every_isa` runs with the widest instruction set of this build and machine, and in the slow tier with each
of the others; marked `every_isa(by_default=True)`, with each of them at once. What the definition says of a problem is
computed once for all of them.

The other modules here that are no tests:

cases         inputs: sizes, layouts, options, targets; `slow_except` for parameters of the slow tier
definition    fastce/_reference.py, computed once for each problem
oracle        comparison of results with the definition, and the tolerances
guard         arrays that end at pages which nobody may touch
device        the same calls on a GPU, or on what stands in for one: fake_cupy, which runs kernels by cuda_host/
nvrtc         CUDA's compiler without a GPU
fuzz*         random calls, and attack: calls while other threads change their inputs
"""

import copy
import ctypes
import functools
import sys
import zlib

import numpy as np
import pytest

import definition
from cases import EDGE_ROWS, make_logits, make_target
from device import PLACES, device
from fastce import _cpu


def pytest_addoption(parser):
    group = parser.getgroup("fastce")
    group.addoption("--fuzz-calls", type=int, default=10_000, help="how many random calls to make (default: 10000)")
    group.addoption("--fuzz-seed", type=int, default=0, help="which random calls to make (default: 0)")


def pytest_configure():
    definition.install()
    _keep_freed_memory()


def _keep_freed_memory():
    """Have glibc keep what is freed for the next array: with new pages each time some tests take five times as long."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        for parameter in (-1, -3):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
            mallopt(parameter, 2**30)


def pytest_generate_tests(metafunc):
    marker = metafunc.definition.get_closest_marker("every_isa")
    if marker is not None and not marker.kwargs.get("by_default"):
        *others, widest = _cpu.supported_isas
        tiers = [pytest.param([widest], id="widest")]
        if others:
            tiers.append(pytest.param(others, id="others", marks=pytest.mark.slow))
        metafunc.parametrize("_isas", tiers, indirect=True)


def pytest_itemcollected(item):
    if item.get_closest_marker("every_isa") is None:
        return
    hypothesis = getattr(item.obj, "hypothesis", None)
    if hypothesis is None:
        item.obj = _for_each_isa(item.obj)
    elif not hasattr(hypothesis.inner_test, "__wrapped__"):  # the cases of a test share the function
        hypothesis.inner_test = _for_each_isa(hypothesis.inner_test)


_isas_of_test = []


@pytest.fixture(autouse=True)
def _isas(request):
    """The instruction sets of a test that is marked `every_isa`."""
    _isas_of_test[:] = getattr(request, "param", _cpu.supported_isas)


def _for_each_isa(test):
    """Return a test that runs once with each instruction set, on copies of its arguments."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        for name in _isas_of_test:
            with _cpu.use_isa(name):
                try:
                    test(*map(_fresh, args), **{key: _fresh(value) for key, value in kwargs.items()})
                except Exception as error:
                    error.add_note(f"instruction set: {name}")
                    raise

    return run


def _fresh(value):
    """Copy what a test may change: arrays, random generators, and containers of them."""
    return copy.deepcopy(value) if isinstance(value, np.ndarray | np.random.Generator | tuple | dict) else value


@pytest.fixture(autouse=True)
def _forget_the_definition():
    definition.forget()


@pytest.fixture
def rng(request):
    """Random numbers of the test's own: the same whenever it runs, alone or not."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=PLACES, scope="module")
def xp(request):
    """CuPy, or what stands in for it."""
    with device(request.param) as module:
        yield module


@pytest.fixture(params=[np.float32, np.float64], ids=["float32", "float64"])
def dtype(request):
    return request.param


@pytest.fixture(params=["C", "F"])
def order(request):
    """Which kernel family."""
    return request.param


@pytest.fixture(
    params=[2, 10, 70, 5000],  # less than a vector, than a tile; a tile and a remainder; several blocks
    ids=lambda n: f"C{n}",
)
def n_classes(request):
    return request.param


@pytest.fixture
def problem(rng, dtype, n_classes, order):
    """Logits and class indices to plant an edge case in."""
    shape = (EDGE_ROWS, n_classes)
    return make_logits(rng, shape, dtype).copy(order=order), make_target(rng, "index", shape)
