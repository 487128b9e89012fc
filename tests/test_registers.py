"""A call leaves the processor's vector registers as plain code wants them.

While their upper halves are in use, each SSE instruction of the thread is slower: whatever runs between calls, trees of
XGBoost for example, took 1.4 times as long. Processors tell which parts are in use (XGETBV with 1).
"""

import ctypes
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest

import fastce

PROGRAM = """
unsigned in_use(void) { unsigned a, d; __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(1)); return a; }
void clear(void) { __asm__ volatile("vzeroupper" : : : "memory"); }
"""
UPPER_HALVES = 4
CPUINFO = Path("/proc/cpuinfo")

pytestmark = [
    pytest.mark.every_isa(by_default=True),
    pytest.mark.skipif(platform.machine() != "x86_64", reason="x86-64's registers"),
    pytest.mark.skipif(not CPUINFO.exists() or "xgetbv1" not in CPUINFO.read_text(), reason="cannot tell"),
    pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler"),
]


@pytest.fixture(scope="module")
def registers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("registers")
    (folder / "registers.c").write_text(PROGRAM)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", "registers.so", "registers.c"], cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "registers.so"))


CALLS = {
    "loss": lambda x, y: fastce.cross_entropy(x, y),
    "options": lambda x, y: fastce.cross_entropy_with_grad(x, y, label_smoothing=0.1, weight=np.ones(x.shape[1])),
    "probabilities": lambda x, y: fastce.cross_entropy_with_grad(x, np.abs(x), return_stats=True),
    "product": lambda x, y: fastce.cross_entropy_hvp(x, y, x, softcap=2.0),
    "diagonal": lambda x, y: fastce.cross_entropy_grad_hess(x, y),
    "softmax": lambda x, y: fastce.softmax(x),
    "logsumexp": lambda x, y: fastce.logsumexp(x),
    "nll": lambda x, y: fastce.nll_loss(x, y),
}


def test_registers_are_seen(registers):
    registers.clear()
    assert not registers.in_use() & UPPER_HALVES


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("n_classes", [2, 10, 100, 300, 3000])
def test_upper_halves_are_free_after_a_call(registers, call, n_classes, dtype, order, rng):
    logits = np.asarray(rng.standard_normal((70, n_classes)), dtype, order=order)
    target = rng.integers(0, n_classes, 70)
    registers.clear()
    call(logits, target)
    assert not registers.in_use() & UPPER_HALVES
