"""Threads change nothing: not the bits, not when several Python threads call at once, not after a fork."""

import itertools
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import fastce
from cases import OPTION_SETS, make_logits, make_target, options_for, row_shape

N_THREADS = (
    1,  # serial
    2,
    3,  # parts of unequal size
    8,  # more than some machines have
    None,  # the library's choice
)
SHAPES = [  # each large enough to be shared out, none a multiple of 3 or 8 rows
    (30_001, 10),
    (2_501, 100),
    (307, 3_001),
    (7, 40_000),  # fewer rows than threads
    (50, 20, 17, 19),
    (100_000, 1),
]
KINDS = ["index", "prob"]


@pytest.fixture
def eight_threads():
    """Let OpenMP start up to eight threads, however few cores there are: else no more than these are obeyed."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    with threadpoolctl.threadpool_limits(8, user_api="openmp"):
        yield


def assert_same(results, what):
    """Compare with the first: every array and number, bit for bit."""
    first = results[0]
    for n_threads, result in zip(N_THREADS[1:], results[1:], strict=True):
        for one, other in zip(first, result, strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), f"{what}, {n_threads} threads"


@pytest.mark.every_isa
@pytest.mark.usefixtures("eight_threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_threads_does_not_change_the_bits(shape, kind, rng):
    for dtype, order in ((np.float32, "C"), (np.float64, "F")):
        logits = make_logits(rng, shape, dtype).copy(order=order)
        target = make_target(rng, kind, shape)
        for names in ("plain", "all"):
            options = options_for(rng, OPTION_SETS[names], kind, shape)
            for reduction in ("none", "mean", "sum"):
                grad_output = rng.random(row_shape(shape)) if reduction == "none" else 0.3
                results = []
                for n_threads in N_THREADS:
                    keywords = {"reduction": reduction, "n_threads": n_threads, **options}
                    loss, grad = fastce.cross_entropy_with_grad(logits, target, grad_output=grad_output, **keywords)
                    in_place = logits.copy(order="K")
                    in_place_loss, _ = fastce.cross_entropy_with_grad(
                        in_place, target, out=in_place, grad_output=grad_output, **keywords
                    )
                    assert np.asarray(in_place_loss).tobytes() == np.asarray(loss).tobytes()
                    assert np.array_equal(in_place, grad)
                    results.append((loss, grad))
                assert_same(results, f"{np.dtype(dtype)} {names} {reduction}")


@pytest.mark.every_isa
@pytest.mark.usefixtures("eight_threads")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_number_of_threads_does_not_change_the_other_functions(shape, rng):
    logits = make_logits(rng, shape, np.float32)
    target = make_target(rng, "index", shape)
    axis = 1
    results = [
        (
            fastce.cross_entropy(logits, target, n_threads=n_threads),
            *fastce.cross_entropy_stats(logits, target, n_threads=n_threads),
            fastce.softmax(logits, axis=axis, n_threads=n_threads),
            fastce.log_softmax(logits, axis=axis, n_threads=n_threads),
            fastce.logsumexp(logits, axis=axis, n_threads=n_threads),
        )
        for n_threads in N_THREADS
    ]
    assert_same(results, str(shape))


@pytest.mark.parametrize("n_threads", [1, 2, None])
def test_many_python_threads_may_call_at_once(n_threads, rng):
    problems = []
    for shape in [(3_000, 10), (300, 1_000), (40, 20, 30)] * 4:
        kind = KINDS[len(problems) % 2]
        logits, target = make_logits(rng, shape, np.float32), make_target(rng, kind, shape)
        problems.append((logits, target, options_for(rng, OPTION_SETS["all"], kind, shape)))

    def solve(problem):
        logits, target, options = problem
        logits = logits.copy()
        loss, grad = fastce.cross_entropy_with_grad(logits, target, out=logits, n_threads=n_threads, **options)
        return loss, grad.tobytes()

    expected = [solve(problem) for problem in problems]
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(solve, problems * 10))
    assert results == expected * 10


def test_other_python_threads_run_meanwhile(rng):
    """The GIL is released: a thread that only looks at the clock looks at it in the middle of a long call."""
    logits = make_logits(rng, (2_000, 4_000), np.float64)
    target = make_target(rng, "index", logits.shape)
    stamps, done = [], threading.Event()

    def watch():
        while not done.is_set():
            stamps.append(time.perf_counter())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    fastce.cross_entropy_with_grad(logits, target, softcap=5.0, label_smoothing=0.1, n_threads=1)
    stop = time.perf_counter()
    done.set()
    watcher.join()
    middle = [stamp for stamp in stamps if start + 0.2 * (stop - start) < stamp < stop - 0.2 * (stop - start)]
    assert middle, f"nobody else ran in {stop - start:.3f} s"


FORK = """
import os, sys, threading
import numpy as np
import fastce

logits = np.random.default_rng(0).standard_normal((5000, 100), np.float32)
target = np.arange(5000) % 100
solve = lambda: fastce.cross_entropy_with_grad(logits, target, n_threads=4)[1].tobytes()
if sys.argv[1] == "thread":  # the team belongs to another thread than the one that forks
    first = []
    worker = threading.Thread(target=lambda: first.append(solve()))
    worker.start()
    worker.join()
    expected = first[0]
else:
    expected = solve()
for generation in range(3):
    child = os.fork()
    if child == 0:
        grandchild = os.fork()
        if grandchild == 0:
            os._exit(0 if solve() == expected else 3)
        same = solve() == expected
        status = os.waitpid(grandchild, 0)[1]
        os._exit(0 if same and status == 0 else 4)
    assert os.waitpid(child, 0)[1] == 0
    assert solve() == expected
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("caller", ["main", "thread"])
def test_a_forked_process_computes_in_parallel_again(caller):
    """Parent, child and grandchild; a lost team of threads shows as a hang, which the time limit ends.

    The variable is what scikit-learn leaves behind for every process started after it was imported.
    """
    command = [sys.executable, "-c", FORK, caller]
    environment = os.environ | {"KMP_INIT_AT_FORK": "FALSE", "OMP_NUM_THREADS": "4"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr


def test_a_limit_from_threadpoolctl_is_obeyed(rng):
    """And changes no bits. Its limits are the calling thread's own."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    logits, target = make_logits(rng, SHAPES[1], np.float32), make_target(rng, "index", SHAPES[1])
    expected = fastce.cross_entropy_with_grad(logits, target)
    with threadpoolctl.threadpool_limits(1):
        loss, grad = fastce.cross_entropy_with_grad(logits, target)
        assert fastce.show_config(mode="dicts")["threads"]["effective"] == 1
    assert loss == expected[0]
    assert np.array_equal(grad, expected[1])


COUNT = """
import os
import numpy as np
import fastce

def count(n_threads, n_rows):
    logits = np.zeros((n_rows, 130), np.float32)
    before = len(os.listdir("/proc/self/task"))
    fastce.cross_entropy(logits, np.zeros(n_rows, int), n_threads=n_threads)
    return 1 + len(os.listdir("/proc/self/task")) - before
"""
# Each in a process that has not used threads yet.
COUNT_EACH = """
for case in {cases}:
    if os.fork() == 0:
        print(count(*case), flush=True)
        os._exit(0)
    os.wait()
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads")
def test_so_many_threads_run():
    """At most as many as asked for, and as can help: a processor each, or OMP_NUM_THREADS. None follows that."""
    if not fastce.show_config(mode="dicts")["build"]["openmp"]:
        pytest.skip("built without OpenMP")
    cases = list(itertools.product([*N_THREADS, 2**30, 2**31, 2**70], [120, 10_000]))
    done = run_python(COUNT + COUNT_EACH.format(cases=cases), OMP_NUM_THREADS="4")
    most = max(4, len(os.sched_getaffinity(0)))
    expected = [min(n, most, n_rows) if n else (4 if n_rows == 10_000 else 1) for n, n_rows in cases]
    assert list(map(int, done.stdout.split())) == expected, done.stderr


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


LIMIT = {
    # The room for the stacks of all threads is missing, or for the last few.
    "memory": """
import resource
import fastce
with open("/proc/self/statm") as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
stack = 2**23 if stack == resource.RLIM_INFINITY else stack
resource.setrlimit(resource.RLIMIT_AS, (used + 2**26 + 3 * stack, resource.RLIM_INFINITY))
""",
}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads")
@pytest.mark.parametrize("limit", LIMIT)
def test_threads_that_cannot_be_started_are_not_missed(limit):
    """GNU's OpenMP ends the process if it cannot start a thread."""
    if not fastce.show_config(mode="dicts")["build"]["openmp"]:
        pytest.skip("built without OpenMP")
    if "libomp" in Path("/proc/self/maps").read_text():
        pytest.skip("LLVM's OpenMP has stacks of a size of its own, for which nothing is known beforehand")
    code = LIMIT[limit] + COUNT + "print(count(None, 10_000))"
    done = run_python(code, OMP_NUM_THREADS="64", OPENBLAS_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert 1 <= int(done.stdout) < 64
