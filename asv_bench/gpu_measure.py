"""How time and memory are measured on a GPU.

Design
------
1. Times are the device's, between two events. Every call finds fresh logits, and none of them in the cache. The device
   is held back until it has been told all of the call, so that small problems do not measure Python; whoever waits for
   the device within a call, as Liger does, is timed with that wait. What Python takes is measured by itself.
2. The cache is full of what was written just before, as the logits are in a training step. So whoever leaves what it
   has written in the cache has had to write as much of somebody else's.
3. Peers take turns, so that a change of the device's clock meets all alike. They are other people's code: whatever
   error one has is told, and the others go on.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

import fastce
from fastce._benchmarks.cases import random_numbers
from gpu_peers import N_SETS, copy, fill

N_WARMUPS = 10
FLUSH_BYTES = 256 * 2**20  # several times any cache
HOLD_CYCLES = 1_000_000  # half a millisecond, more than a peer needs to start its kernels
HOLD = """
extern "C" __global__ void hold(long long cycles) {
    const long long start = clock64();
    while (clock64() - start < cycles) {}
}
"""

# In a process of its own: the seconds of the first call of its kind, and of the second.
FIRST_CALL = """
import time, cupy, fastce
x = cupy.linspace(-9, 9, 64 * 32000, dtype="float32").reshape(64, 32000)
y = cupy.arange(64)
for _ in range(2):
    cupy.cuda.Device().synchronize()
    start = time.perf_counter()
    fastce.cross_entropy_with_grad(x, y, out=x)
    cupy.cuda.Device().synchronize()
    print(time.perf_counter() - start)
"""


def is_out_of_memory(error):
    """Tell the errors for it, of which both libraries have one."""
    return type(error).__name__ == "OutOfMemoryError"


def reason_of(error):
    """Return an error in one line."""
    if is_out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:150]}"


def loaded_torch():
    """Return PyTorch if it has been imported and has a GPU."""
    torch = sys.modules.get("torch")
    return torch if torch is not None and torch.cuda.is_available() else None


def free_memory():
    """Give back what both libraries keep for later."""
    import cupy

    gc.collect()
    cupy.get_default_memory_pool().free_all_blocks()
    if torch := loaded_torch():
        torch.cuda.empty_cache()


def bandwidth(most_bytes):
    """Return GB/s of memory by name: read and written by a copy, read, written, read and written in place."""
    import cupy

    nbytes = min(most_bytes, cupy.cuda.Device().mem_info[0] // 3)
    source = fill(random_numbers("float32"), (nbytes // 4,))
    target = cupy.empty_like(source)
    calls = {  # and how often the bytes move
        "copy": (lambda: copy(source, target), 2),
        "read": (source.sum, 1),
        "write": (lambda: target.fill(1.5), 1),
        "in place": (lambda: cupy.multiply(source, np.float32(1), out=source), 2),
    }
    figures = {}
    for name, (call, n_times) in calls.items():
        times = []
        for _ in range(25):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(cupy.cuda.get_elapsed_time(start, stop))
        figures[name] = 1e-6 * n_times * source.nbytes / float(np.median(times[5:]))
    return figures


def start_all(problem, peers):
    """Call each once; return the calls of those who can, and what is known of all so far."""
    import cupy

    calls, figures = {}, {}
    for name, peer in peers.items():
        start = time.perf_counter()
        try:
            call = peer.prepare(problem)
            problem.restore(0)
            loss, grad = call(0)
            figures[name] = {"loss": float(loss), "first_s": time.perf_counter() - start}
            cupy.cuda.Device().synchronize()
            if grad is not None:
                figures[name]["grad_error"] = problem.grad_error(grad, peer.is_sum)
            calls[name] = call
        except Exception as error:
            figures[name] = {"failed": reason_of(error)}
        loss = grad = call = None
        free_memory()
    return calls, figures


def measure(problem, peers, repetitions):
    """Return what is known of each peer by name: its median, p20 and p80 in milliseconds, or why it failed."""
    import cupy

    hold, flush = cupy.RawKernel(HOLD, "hold"), cupy.empty(FLUSH_BYTES // 4, "float32")
    calls, figures = start_all(problem, peers)
    events = {name: [] for name in calls}
    for i in range(-N_WARMUPS, repetitions):
        for name, call in list(calls.items()):
            start, stop = cupy.cuda.Event(), cupy.cuda.Event()
            problem.restore(i % N_SETS)
            hold((1,), (1,), (np.int64(HOLD_CYCLES),))
            flush.fill(i + 0.5)
            start.record()
            try:
                call(i % N_SETS)
            except Exception as error:
                free_memory()
                if i >= 0 or not is_out_of_memory(error):  # else others kept too much, and it may try again
                    figures[name] = {"failed": reason_of(error)}
                    del calls[name]
                continue
            stop.record()
            if i >= 0:
                events[name].append((start, stop))
    cupy.cuda.Device().synchronize()
    for name in calls:
        times = [cupy.cuda.get_elapsed_time(*pair) for pair in events[name]]
        figures[name] |= dict(zip(("p20", "ms", "p80"), np.percentile(times, [20, 50, 80]).tolist(), strict=True))
    return figures


def first_calls(say):
    """Return the seconds of first and second calls in new processes, with an empty cache on disk and a full one."""
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        path = os.pathsep.join([str(Path(fastce.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
        environment = os.environ | {"CUPY_CACHE_DIR": folder, "PYTHONPATH": path.rstrip(os.pathsep)}
        command = [sys.executable, "-c", FIRST_CALL]
        for state in ("empty", "full"):
            child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            figures[state] = [float(word) for word in child.stdout.split()]
            words = ", ".join(f"{1e3 * seconds:.2f} ms" for seconds in figures[state])
            say(f"  first call and second, cache on disk {state}: {words or child.stderr[-500:]}")
    return figures


def host_microseconds(call, n_calls):
    """Return what a call takes until it returns; with its work on the device; and with a wait for that."""
    import cupy

    synchronize = cupy.cuda.Device().synchronize
    for _ in range(20):
        call(0)
    synchronize()
    start = time.perf_counter()
    for _ in range(n_calls):
        call(0)
    returned = time.perf_counter()
    synchronize()
    done = time.perf_counter()
    waits = []
    for _ in range(n_calls):
        before = time.perf_counter()
        call(0)
        synchronize()
        waits.append(time.perf_counter() - before)
    each = 1e6 / n_calls
    return {
        "returned": each * (returned - start),
        "done": each * (done - start),
        "alone": 1e6 * float(np.median(waits)),
    }


def peak_bytes(call):
    """Return the most memory that a call held at a time beyond what there was, its results included."""
    import cupy

    class Peak(cupy.cuda.MemoryHook):
        name = "peak"
        now = most = 0

        def malloc_postprocess(self, **block):
            self.now += block["mem_size"]
            self.most = max(self.most, self.now)

        def free_postprocess(self, **block):
            self.now -= block["mem_size"]

    torch = loaded_torch()
    if torch:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    with Peak() as peak:
        call(0)
        cupy.cuda.Device().synchronize()
    return peak.most + (torch.cuda.max_memory_allocated() - before if torch else 0)
