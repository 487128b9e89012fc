"""How many threads a call gets by default: what was learnt from those before, and how the runtime waits."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import fastce
from fastce import _cpu

pytestmark = pytest.mark.skipif(not fastce.show_config(mode="dicts")["build"]["openmp"], reason="built without OpenMP")

SHORT, LONG = 20_000, 600_000  # numbers; the latter are worth waking threads


def run(code, **environment):
    """Run code in a process of its own, with only these variables of OpenMP's; return what it prints as JSON."""
    ours = {
        name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_", "FASTCE_"))
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**ours, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def call(n_numbers, n_threads=None):
    logits = np.zeros((n_numbers // 10, 10), np.float32)
    fastce.cross_entropy(logits, np.zeros(n_numbers // 10, np.int64), n_threads=n_threads)


def test_a_short_call_is_shared_only_right_after_another():
    wants_team = _cpu.kernels.wants_team
    time.sleep(1e-3)
    assert not wants_team(0, SHORT)
    assert wants_team(2, SHORT)  # whoever asks for it gets it
    shared = 0
    for _ in range(100):  # in some of which other processes may take the time
        call(SHORT, n_threads=1)
        shared += wants_team(0, SHORT)
    assert shared > 0
    for n_threads in (0, 2):
        assert not wants_team(n_threads, 1000)
    assert not wants_team(1, 10**9)


LOSING = """
import json, time
import numpy as np
import fastce
from fastce import _cpu

wants_team = _cpu.kernels.wants_team
logits, target = np.zeros((60_000, 10), np.float32), np.zeros(60_000, np.int64)
seen = []
for _ in range(20):
    seen.append(wants_team(0, logits.size))
    fastce.cross_entropy(logits, target)
longer = wants_team(0, 10**10)
deadline = time.monotonic() + 60
while not wants_team(0, logits.size) and time.monotonic() < deadline:
    time.sleep(0.01)
print(json.dumps([seen, longer, wants_team(0, logits.size)]))
"""


def test_threads_that_cost_more_than_they_save_are_left_alone_for_a_while():
    """Sixty-four for each processor, because OMP_NUM_THREADS says so: they cannot but be late."""
    n_threads = 64 * (os.cpu_count() or 1)
    if n_threads > 2048:
        pytest.skip("would take too many threads")
    seen, longer, later = run(LOSING, OMP_NUM_THREADS=str(n_threads))
    assert seen[0]  # nothing is known yet
    assert not seen[-1]  # two losses, and then one thread
    assert longer  # for what takes seconds a delay of milliseconds is nothing
    assert later  # tried again


WAITING = """
import json, os
before = dict(os.environ)
{first}
import fastce
import numpy as np
fastce.cross_entropy(np.zeros((1000, 1000), np.float32), np.zeros(1000, int))
print(json.dumps([dict(os.environ) == before, fastce.show_config(mode="dicts")["threads"]["waiting"]]))
"""


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, "briefly: {name}={brief} while the runtime was loaded"),
        ({"OMP_WAIT_POLICY": "passive"}, "OMP_WAIT_POLICY=passive, set before the import"),
        ({"GOMP_SPINCOUNT": "77", "KMP_BLOCKTIME": "7"}, "{name}={own}, set before the import"),
        # LLVM's runtime says nothing of GNU's variable, and the other way round.
        ({"KMP_LIBRARY": "throughput"}, "briefly or KMP_LIBRARY"),
        ({"KMP_INIT_AT_FORK": "FALSE"}, "briefly: {name}={brief} while the runtime was loaded"),
    ],
)
def test_how_threads_wait_is_the_users_choice_and_leaves_no_trace_in_the_environment(environment, expected):
    is_llvm = _cpu._runtime.is_llvm(_cpu._narrowest.__file__)
    name, brief, own = ("KMP_BLOCKTIME", "1", "7") if is_llvm else ("GOMP_SPINCOUNT", "2000", "77")
    unchanged, waiting = run(WAITING.format(first=""), **environment)
    assert unchanged
    if expected == "briefly or KMP_LIBRARY":
        expected = (
            "KMP_LIBRARY=throughput, set before the import"
            if is_llvm
            else "briefly: {name}={brief} while the runtime was loaded"
        )
    assert waiting == expected.format(name=name, brief=brief, own=own)


def test_a_runtime_that_was_loaded_before_waits_as_it_does():
    library = _gnu_runtime()
    first = f"import ctypes; ctypes.CDLL({library!r})"
    unchanged, waiting = run(WAITING.format(first=first))
    assert unchanged
    assert waiting == "as set when libgomp.so.1 was loaded, before fastce"


SPINNING = """
import json, resource, time
{first}
import numpy as np
import fastce

logits, target = np.zeros((1000, 1000), np.float32), np.zeros(1000, int)
spent = []
for _ in range(11):
    fastce.cross_entropy(logits, target, n_threads=2)
    before = time.process_time()
    time.sleep(0.02)
    spent.append(time.process_time() - before)
print(json.dumps(sorted(spent)[5]))
"""


def test_waiting_threads_leave_the_processors_soon():
    """After a call they spin for at most a tenth of a millisecond or so, instead of several milliseconds."""
    if _cpu.effective_n_threads()[0] < 2 and len(getattr(os, "sched_getaffinity", lambda _: [0, 0])(0)) < 2:
        pytest.skip("with one processor GNU's runtime has its threads sleep at once")
    _gnu_runtime()
    spent = run(SPINNING.format(first=""), OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1")
    longer = run(SPINNING.format(first=""), OMP_NUM_THREADS="2", OPENBLAS_NUM_THREADS="1", GOMP_SPINCOUNT="1000000")
    assert spent < 1e-3 < longer


def _gnu_runtime():
    if _cpu._runtime.is_llvm(_cpu._narrowest.__file__):
        pytest.skip("built for LLVM's runtime")
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("only Linux lists what a process has loaded")
    paths = {
        line.split()[-1]
        for line in maps.read_text().splitlines()
        if line.endswith("/libgomp.so.1") or "/libgomp.so.1." in line
    }
    if not paths:
        pytest.skip("the runtime is one of the wheel's own")
    return "libgomp.so.1"


PLACES = """
import json, os, time
import numpy as np
import fastce

logits, target = np.zeros((1000, 1000), np.float32), np.zeros(1000, int)
for _ in range(30):
    time.sleep(1e-3)
    fastce.cross_entropy(logits, target, n_threads=3)
threads = [int(name) for name in os.listdir("/proc/self/task")]
print(json.dumps([os.getpid(), {thread: sorted(os.sched_getaffinity(thread)) for thread in threads}]))
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="Linux alone has it")
@pytest.mark.parametrize("bound", [False, True])
def test_threads_that_make_room_for_the_caller_stay_where_the_process_may_be(bound):
    processors = sorted(os.sched_getaffinity(0))
    before = f"import os; os.sched_setaffinity(0, {processors[:1]})\n" if bound else ""
    caller, places = run(before + PLACES, OMP_NUM_THREADS="3", OPENBLAS_NUM_THREADS="1")
    allowed = set(processors[:1] if bound else processors)
    assert set(places.pop(str(caller))) == allowed  # the caller's own are not touched
    assert len(places) >= 2
    assert all(place and set(place) <= allowed for place in places.values())
    if bound:
        assert all(set(place) == allowed for place in places.values())
