"""Fixtures: seeded random numbers, and every instruction set of this build and machine in turn.

A test, or a file, that uses `isa` runs once for each of them. The fixture is module-scoped, so that a set is switched
on once per file and hypothesis may use it.
"""

import zlib

import numpy as np
import pytest

from fastce import _cpu


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
