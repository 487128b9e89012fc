"""Fixtures: seeded random numbers, and every instruction set of this build and machine in turn.

A test, or a file, that uses `isa` runs once for each of them. The fixture is module-scoped, so that a set is switched
on once per file and hypothesis may use it.
"""

import zlib

import numpy as np
import pytest

from cases import EDGE_ROWS, make_logits, make_target
from fastce import _cpu


def pytest_addoption(parser):
    group = parser.getgroup("fastce")
    group.addoption("--fuzz-calls", type=int, default=10_000, help="how many random calls to make (default: 10000)")
    group.addoption("--fuzz-seed", type=int, default=0, help="which random calls to make (default: 0)")


@pytest.fixture
def rng(request):
    """Random numbers of the test's own: the same whenever it runs, alone or not."""
    return np.random.default_rng(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(params=_cpu.supported_isas, scope="module")
def isa(request):
    with _cpu.use_isa(request.param):
        yield request.param


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
