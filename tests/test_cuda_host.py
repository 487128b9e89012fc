"""The emulator that runs CUDA kernels on the host: it must compute what a GPU would, and see what a GPU would not."""

import re
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

import fake_cupy as cp

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (sys.platform == "linux" and cp.compiler()), reason="the emulator needs g++ and Linux"),
]

TASK = np.dtype([("x", "u8"), ("y", "u8"), ("n", "i8")])

SUM = """
#include "host.hpp"
#define FC_NAME block_sum
struct Task { const float* x; float* y; int64 n; };

FC_KERNEL(512, 1) block_sum(Task task) {
    float sum = 0, *sums = reinterpret_cast<float*>(shared_memory());
    for (int64 i = block_rank() * task.n + thread_rank(); i < (block_rank() + 1) * task.n; i += 512) sum += task.x[i];
    for (int mask = 16; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread_rank() % 32 == 0) sums[thread_rank() / 32] = sum;
    sync_block();  // the sums are written
    sum = sums[thread_rank() % 16];
    for (int mask = 8; mask; mask /= 2) sum += shuffle_xor(sum, mask);
    if (thread_rank() == 0) task.y[block_rank()] = sum;
}
"""

EXCHANGE = """
#include "host.hpp"
#define FC_NAME exchange
#define FC_CLUSTER 4
struct Task { const double* x; double* y; int64 n; };

FC_CLUSTER_KERNEL(FC_CLUSTER, 32, 1) exchange(Task task) {
    double* found = reinterpret_cast<double*>(shared_memory());
    sync_cluster();  // all blocks have begun
    if (thread_rank() < FC_CLUSTER) store_remote(found + cluster_rank(), task.x[block_rank()], thread_rank());
    sync_cluster();  // all have stored
    if (thread_rank() < FC_CLUSTER) task.y[block_rank() * FC_CLUSTER + thread_rank()] = found[thread_rank()];
}
"""

# Kernels of two warps that a body completes.
FRAME = """
#include "host.hpp"
#define FC_NAME kernel
struct Task { float* x; float* y; int64 n; };

FC_KERNEL(64, 1) kernel(Task task) {
    float* shared = reinterpret_cast<float*>(shared_memory());
    unsigned rank = thread_rank();
    (void)shared, (void)rank;
    BODY
}
"""


@pytest.fixture(params=["forwards", "backwards", "ucontext"])
def engine(request, monkeypatch):
    """The order of the fibers, and the portable way to switch between them."""
    flags = [] if request.param == "forwards" else [f"-DFC_HOST_{request.param.upper()}"]
    monkeypatch.setattr(cp, "compiler_flags", flags)


@pytest.fixture(autouse=True)
def _forget_launches(monkeypatch):
    monkeypatch.setattr(cp, "launches", [])


def launch(code, grid, block, x, y, n=0, shared_mem=0):
    name = re.search(r"FC_NAME (\w+)", code)[1]
    task = np.array([(x.data.ptr, y.data.ptr, n)], TASK)
    cp.RawModule(code=code).get_function(name)((grid,), (block,), (task,), shared_mem=shared_mem)


def run_body(body, n=0, shared_mem=256):
    x, y = cp.asarray(np.arange(64, dtype=np.float32)), cp.empty(64, np.float32)
    launch(FRAME.replace("BODY", body), 1, 64, x, y, n, shared_mem)
    return y.get()


def test_block_sum(rng, engine):
    x = rng.integers(-1000, 1000, (5, 1234)).astype(np.float32)
    y = cp.empty(5, np.float32)
    launch(SUM, 5, 512, cp.asarray(x), y, 1234, shared_mem=64)
    np.testing.assert_array_equal(y.get(), x.sum(1))
    (record,) = cp.launches
    assert (record["name"], record["grid"], record["block"]) == ("block_sum", (5, 1, 1), (512, 1, 1))


def test_cluster_exchange(rng, engine):
    x = rng.standard_normal(12)
    y = cp.empty((12, 4))
    launch(EXCHANGE, 12, 32, cp.asarray(x), y, shared_mem=32)
    np.testing.assert_array_equal(y.get(), np.repeat(x.reshape(3, 4), 4, 0))


def test_copies(engine):
    """What is copied is there after the wait and no sooner, even if the source has changed since."""
    body = """
        if (rank < 16) copy_16(shared + 4 * rank, task.x + 4 * rank);
        if (task.n) wait_for_copies();
        sync_block();
        task.y[rank] = shared[63 - rank];
    """
    np.testing.assert_array_equal(run_body(body, 1), np.arange(64)[::-1])
    assert np.isnan(run_body(body, 0)).all()


def test_shared_memory_is_fresh(engine):
    body = "task.y[rank] = shared[rank]; shared[rank] = 1;"
    assert np.isnan(run_body(body)).all()
    assert np.isnan(run_body(body)).all()


def test_atomics(engine):
    body = """
        int64* word = reinterpret_cast<int64*>(task.x);
        unsigned* counter = reinterpret_cast<unsigned*>(task.x + 2);
        if (rank == 0) *word = 1000, *counter = 0;
        sync_block();
        lower_word(word, 7 + rank);
        unsigned before = count_up(counter, 9);
        fence();
        sync_block();
        task.y[rank] = rank == 0 ? *word : rank == 1 ? *counter : before;
    """
    lowest, count, *before = run_body(body).tolist()
    assert lowest == 7
    assert count == 64 % 10
    assert max(before) == 9


# Two warps: what they do, and what is to be said of it.
ERRORS = [
    ("if (rank == 5) return; sync_block();", "thread 5 of block 0 has returned while thread 0 .* at sync_block"),
    ("if (rank < 32) return; sync_block();", "thread 0 of block 0 has returned while thread 32 .* at sync_block"),
    ("if (rank < 9) return; shuffle_xor(1.0f, 1);", "has returned while .* waits at shuffle_xor"),
    ("if (rank % 2) sync_block(); else shuffle_xor(1, 1);", "divergent barrier: .* shuffle_xor .* sync_block"),
    ("if (rank < 32) sync_block(); else sync_cluster();", "divergent barrier: .* sync_block .* sync_cluster"),
    ("rank % 2 ? shuffle_xor(1, 1) : shuffle_xor(2, 1);", "divergent barrier: .* shuffle_xor .* shuffle_xor"),
    ("shuffle_xor(1, 32);", "a mask that no warp has"),
    ("copy_16(shared + 1, task.x);", "thread 0: copy_16 of an unaligned address"),
    ("copy_16(shared + 64, task.x);", "copy_16 to outside of shared memory"),
    ("store_remote(shared, 1.0f, 1);", "a block that the cluster has not"),
    ("store_remote(shared + 64, 1.0f, 0);", "store_remote outside of shared memory"),
]


@pytest.mark.parametrize("case", range(len(ERRORS)))
def test_errors(case):
    # All in one kernel, which takes less time to compile.
    cases = "\n".join(f"case {i}: {{ {body} }} break;" for i, (body, _) in enumerate(ERRORS))
    body = f"switch (task.n) {{ {cases} }} sync_block(); task.y[rank] = rank;"
    with pytest.raises(RuntimeError, match=ERRORS[case][1]):
        run_body(body, case)
    np.testing.assert_array_equal(run_body(body, -1), np.arange(64))  # the fibers can run another kernel


def test_early_store_to_another_block():
    code = EXCHANGE.replace("sync_cluster();  // all blocks have begun", "")
    with pytest.raises(RuntimeError, match="a block that may not have begun"):
        launch(code, 4, 32, cp.zeros(4), cp.zeros(16), shared_mem=32)


@pytest.mark.parametrize(
    ("code", "grid", "block", "shared_mem", "message"),
    [
        (SUM, 0, 512, 64, "no blocks"),
        (SUM, 1, 500, 64, "500 threads are no block of whole warps"),
        (SUM, 1, 1024, 64, "1024 threads, declared for 512"),
        (SUM, 1, 512, 50000, "not opted in"),
        (EXCHANGE, 6, 32, 32, "6 blocks are no whole clusters of 4"),
        (EXCHANGE.replace("CLUSTER 4", "CLUSTER 32"), 32, 32, 32, "32 blocks are no cluster"),
        (EXCHANGE.replace("(FC_CLUSTER, 32", "(2, 32"), 4, 32, 32, "clusters of 4, declared for 2"),
    ],
)
def test_wrong_launches(code, grid, block, shared_mem, message):
    with pytest.raises(RuntimeError, match=message):
        launch(code, grid, block, cp.zeros(64), cp.zeros(64), 0, shared_mem)


def test_wrong_tasks():
    kernel = cp.RawModule(code=SUM).get_function("block_sum")
    with pytest.raises(RuntimeError, match="the task has 8 bytes, the kernel's has 24"):
        kernel((1,), (512,), (np.int64(0),))


CONVERT = """
#include "host.hpp"
#define FC_NAME convert
struct Task { HALF* x; float* y; int64 n; };

FC_KERNEL(32, 1) convert(Task task) {
    for (int64 i = thread_rank(); i < task.n; i += 32) NARROW;
}
"""


@pytest.mark.parametrize(("half", "dtype"), [("half_t", np.float16), ("bfloat_t", ml_dtypes.bfloat16)])
def test_halves(rng, half, dtype):
    code = CONVERT.replace("HALF", half)
    x = np.arange(65536).astype(np.uint16).view(dtype)
    y = cp.empty(65536, np.float32)
    launch(code.replace("NARROW", "task.y[i] = widen(task.x[i])"), 1, 32, cp.asarray(x), y, 65536)
    nan = np.isnan(y.get())
    with np.errstate(invalid="ignore"):  # signaling NaNs
        expected = x.astype(np.float32)
    np.testing.assert_array_equal(nan, np.isnan(expected))
    np.testing.assert_array_equal(y.get().view(np.uint32)[~nan], expected.view(np.uint32)[~nan])

    # Also what lies between two neighbours, halfway and next to it, and any bits at all.
    exact = y.get()[~nan]
    steps = exact.view(np.uint32)[:, None] + rng.integers(0, 1 << 16, 8, dtype=np.uint32)
    ties = exact.view(np.uint32)[:, None] + np.array([4095, 4096, 4097, 32767, 32768, 32769], np.uint32)
    between = (exact[:-1].astype(float) + exact[1:].astype(float)) / 2
    with np.errstate(all="ignore"):
        between = between.astype(np.float32)
        near = [exact, steps, ties, between, np.nextafter(between, np.float32(0)), np.nextafter(between, np.inf)]
        wide = np.concatenate([a.view(np.uint32).ravel() for a in near] + [rng.integers(0, 2**32, 10**6, np.uint32)])
        expected = wide.view(np.float32).astype(dtype)
    z = cp.empty(len(wide), dtype)
    code = code.replace("NARROW", "narrow(task.y[i], task.x[i])")
    launch(code, 1, 32, z, cp.asarray(wide.view(np.float32)), len(wide))
    nan = np.isnan(expected)
    assert (z.get().view(np.uint16)[nan] == 0x7FFF).all()
    np.testing.assert_array_equal(z.get().view(np.uint16)[~nan], expected.view(np.uint16)[~nan])


def test_other_functions():
    body = "task.y[rank] = rank ? fmaxf(expf(logf(2.0f)), tanhf(log1pf(-infinity(0.0f)))) : float(infinity(0.0));"
    assert run_body(body)[[0, 1]].tolist() == [np.inf, 2]


@pytest.mark.parametrize("flags", [[], ["-DFC_HOST_FLUSH"]], ids=["kept", "flushed"])
def test_small_numbers(monkeypatch, flags):
    monkeypatch.setattr(cp, "compiler_flags", flags)
    half = np.finfo(np.float32).tiny / 2  # of the least normal number
    of_operands = run_body("task.y[rank] = task.x[rank] * 5.877471754111438e-39f;")
    of_results = run_body("task.y[rank] = task.x[rank] * 1.1754943508222875e-38f / 2;")
    expected = np.arange(64, dtype=np.float32) * half
    assert np.array_equal(of_operands, 0 * expected if flags else expected)
    assert np.array_equal(of_results, np.where(expected < 2 * half, 0, expected) if flags else expected)
    assert expected[1] > 0  # outside of the kernels all is as ever


# A program around a kernel, with 512 threads and 3 blocks of 1024 ones to read.
MAIN = """
FC_HOST_ENTRY(FC_NAME)
int main() {
    static float x[3 * 1024], y[1024];
    Task task = {x, y, 1024};
    char message[512];
    for (float& element : x) element = 1;
    int failed = fc_host_run(&task, 3, THREADS, 1, SHARED, message, sizeof message);
    puts(message);
    return failed || y[0] != 1024 || y[2] != 1024;
}
"""
SUM_PROGRAM = SUM + MAIN.replace("THREADS", "512").replace("SHARED", "64")
BODY_PROGRAM = FRAME + MAIN.replace("THREADS", "64").replace("SHARED", "256")


@pytest.fixture(scope="module")
def sanitized(tmp_path_factory):
    """Run a program under a sanitizer."""
    folder = tmp_path_factory.mktemp("programs")

    def run(text, sanitizer, *flags):
        try:
            program = cp.compile_host(text, folder / "program", [f"-fsanitize={sanitizer}", "-g", *flags], suffix="")
        except RuntimeError as error:
            if "cannot find" in str(error):
                pytest.skip(f"no {sanitizer} sanitizer")
            raise
        return subprocess.run([program], capture_output=True, text=True, timeout=300, check=False)

    return run


@pytest.fixture
def run_threads(sanitized):
    """Run a program under ThreadSanitizer, each CUDA thread in a thread."""
    if sanitized("#include <thread>\nint main() { std::thread([] {}).join(); }", "thread").returncode:
        pytest.skip("ThreadSanitizer does not run here")
    return lambda text: sanitized(text, "thread", "-DFC_HOST_THREADS")


def test_threads_are_clean(run_threads):
    done = run_threads(SUM_PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr


def test_threads_see_a_race(run_threads):
    assert "data race" in run_threads(SUM_PROGRAM.replace("sync_block();", "")).stderr


@pytest.mark.parametrize(("barrier", "races"), [("sync_block()", False), ("shuffle_xor(1, 1)", True)])
def test_shuffles_order_no_memory(run_threads, barrier, races):
    done = run_threads(
        BODY_PROGRAM.replace("BODY", f"shared[rank] = 1024; {barrier}; task.y[rank] = shared[rank ^ 1];")
    )
    assert ("data race" in done.stderr) == races, done.stderr


def test_threads_see_an_early_exit(run_threads):
    done = run_threads(SUM_PROGRAM.replace("sync_block();", "if (thread_rank() >= 480) return; sync_block();"))
    assert "threads have returned while others waited at sync_block" in done.stdout


@pytest.mark.parametrize("flags", [[], ["-DFC_HOST_UCONTEXT"]], ids=["swap", "ucontext"])
def test_overruns_of_shared_memory(sanitized, flags):
    done = sanitized("int main() {}", "address")
    if done.returncode:
        pytest.skip("AddressSanitizer does not run here")
    done = sanitized(SUM_PROGRAM, "address,undefined", *flags)
    assert done.returncode == 0 and "error" not in done.stderr, done.stdout + done.stderr
    done = sanitized(
        SUM_PROGRAM.replace("sums[thread_rank() / 32] =", "sums[thread_rank() / 32 + 1] ="), "address", *flags
    )
    assert "heap-buffer-overflow" in done.stderr
