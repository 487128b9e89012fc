"""One kernel of each family under ThreadSanitizer, with a thread of the host for each of the device's.

The runtime has to be in the process from the start, so each run is a program of its own. A barrier taken out of the
source is reported, or the test could not fail.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import fake_cupy
from device import copy_sources
from fastce._cuda import _program

# The family, the shape of the logits on the small device of device.py; as few threads as the family's barriers need.
FAMILIES = {
    "TILE": (10, 9),
    "TILE of rows with gaps": (11, 9),
    "WARP": (3, 100),
    "BLOCK": (2, 2003),
    "BLOCK of 2": (1, 5003),
    "STREAM": (1, 40009),
    "COLUMN": (2, 50, 3),
}

PROGRAM = """
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, {tests!r})
import fake_cupy
from device import device, to_device
import fastce
from fastce._cuda import _program

_program.DIRECTORY = Path({sources!r})
fake_cupy.compiler_flags += ["-DFC_HOST_THREADS", "-fsanitize=thread", "-g"]
rng = np.random.default_rng(0)
with device("host") as xp:
    for family, shape in {families!r}.items():
        x = to_device(xp, rng.standard_normal(shape).astype(np.float32), "padded" if "gaps" in family else "C")
        y = xp.asarray(rng.integers(shape[1], size=(shape[0], *shape[2:])))
        loss, grad, stats = fastce.cross_entropy_with_grad(x, y, out=x, return_stats=True)
        print(family, float(loss), file=sys.stderr, flush=True)
"""


def tsan_runtime():
    """Return the path of ThreadSanitizer's library, or None."""
    if not fake_cupy.compiler():
        return None
    done = subprocess.run(
        [*fake_cupy.compiler(), "-print-file-name=libtsan.so"], capture_output=True, text=True, check=False
    )
    path = Path(done.stdout.strip())
    return path if path.is_absolute() and path.exists() else None


RUNTIME = tsan_runtime()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(RUNTIME is None, reason="no ThreadSanitizer")]


def run(families, sources):
    """Return what a program that solves a problem of each family says, and its exit status."""
    code = PROGRAM.format(tests=str(Path(__file__).parent), sources=str(sources), families=families)
    command = [sys.executable, "-c", code]
    if shutil.which("setarch"):
        command = ["setarch", "-R", *command]  # the sanitizer cannot do with all of some kernels' random addresses
    env = {
        **os.environ,
        "LD_PRELOAD": str(RUNTIME),
        "TSAN_OPTIONS": "exitcode=66 report_thread_leaks=0",
        "OPENBLAS_NUM_THREADS": "1",  # NumPy's own threads are no matter
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)
    if "FATAL: ThreadSanitizer" in done.stderr:
        pytest.skip(done.stderr.splitlines()[0])
    return done.stderr, done.returncode


def test_no_family_has_a_race():
    said, status = run(FAMILIES, _program.DIRECTORY)
    assert "WARNING: ThreadSanitizer" not in said, said[:4000]
    assert status == 0, said[-2000:]
    assert re.findall(r"^(.+) \d+\.\d+$", said, re.MULTILINE) == list(FAMILIES)


@pytest.mark.parametrize(
    ("file", "barrier", "family"),
    [
        ("team.cuh", "        sync_block();\n", "BLOCK"),
        ("team.cuh", "        sync_cluster();\n", "BLOCK of 2"),
        ("team.cuh", " sync_warp();\n", "WARP"),
        ("kernels.cu", "    }\n    sync_block();\n    if ((int)thread_rank() < n) {\n", "TILE"),
        ("kernels.cu", "start + rank);\n    sync_block();\n", "TILE of rows with gaps"),
    ],
)
def test_a_missing_barrier_is_reported(file, barrier, family, tmp_path):
    sources = copy_sources(tmp_path)
    text = (sources / file).read_text()
    assert text.count(barrier) == 1
    (sources / file).write_text(text.replace(barrier, re.sub(r"sync_\w+\(\);", ";", barrier)))
    said, _ = run({family: FAMILIES[family]}, sources)
    assert "WARNING: ThreadSanitizer: data race" in said
