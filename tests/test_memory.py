"""Working in place takes little memory: less than 1 MiB + 32 bytes per row + 16 bytes per class, whatever the options.

Measured in a process of its own, twice: what NumPy reports to tracemalloc, and the growth of the process's peak memory,
which sees every allocation (Linux only). `python tests/test_memory.py` prints the numbers.
"""

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fastce

SHAPES = [  # at least 12 MB each, so that a copy of the logits would be seen
    (50_000, 100),
    (1_500_000, 2),
    (4_000, 1_000),
    (16, 200_000),  # two hundred KiB of class weights
    (20, 100, 40, 40),
]
OPTIONS = {
    "plain": {},
    "none": {"reduction": "none"},
    "sum, grad_output": {"reduction": "sum", "grad_output": 0.5},
    "label_smoothing": {"label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "weight": {"weight": True},
    "sample_weight": {"sample_weight": True},
    "ignore_index": {"ignore_index": 1},
    "stats": {"return_stats": True},
    "int32": {"target_type": np.int32},
    "uint64": {"target_type": np.uint64},
    "strided target": {"target_step": 2},
    "prob float32": {"prob": np.float32},
    "prob float64": {"prob": np.float64},
    "prob float16": {"prob": np.float16},
    "logits float16": {"dtype": np.float16},
    "logits bfloat16, softcap": {"dtype": ml_dtypes.bfloat16, "softcap": 5.0},
    "all": {
        "weight": True,
        "sample_weight": True,
        "ignore_index": 1,
        "label_smoothing": 0.1,
        "softcap": 5.0,
        "logit_scale": 1.5,
        "z_loss": 0.1,
        "return_stats": True,
        "reduction": "none",
        "grad_output": True,
        "target_type": np.int32,
    },
}
ORDERS = ["C", "F"]
PROC = Path("/proc/self")


def limit(shape):
    return 2**20 + 32 * np.prod(shape) // shape[1] + 16 * shape[1]


def peak_rss(call):
    """Return by how many bytes the process's memory grew at most during the call; None where that cannot be known."""
    try:
        (PROC / "clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def status(name):
    lines = (PROC / "status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def peak_traced(call):
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    call()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak - before


def make_call(shape, order, dtype=np.float32, prob=None, target_type=np.int64, target_step=1, **options):
    """Return an in-place call; all its inputs are in memory already."""
    rng = np.random.default_rng(0)
    logits = np.asarray(rng.random(shape, np.float32).astype(dtype), order=order)
    rows = shape[:1] + shape[2:]
    if prob:
        target = np.asarray(rng.random(shape, np.float32).astype(prob), order=order)
    else:
        target = rng.integers(0, shape[1], (*rows[:-1], rows[-1] * target_step)).astype(target_type)[..., ::target_step]
    if options.get("weight"):
        options["weight"] = rng.random(shape[1])
    if options.get("sample_weight"):
        options["sample_weight"] = rng.random(rows)
    if options.get("grad_output") is True:
        options["grad_output"] = rng.random(rows)
    return lambda: fastce.cross_entropy_with_grad(logits, target, out=logits, **options)


def measure(shapes):
    """Return [what, tracemalloc's peak, the process's peak, the limit] for every case; first a copy, for comparison."""
    make_call((20_000, 100), "C")()  # starts the threads, whose stacks are not part of a call
    logits = np.ones((5_000, 1_000), np.float32)
    rss = peak_rss(lambda: logits * 2)
    results = [["a copy", peak_traced(lambda: logits * 2), rss, int(limit(logits.shape))]]
    for shape in shapes:
        for order in ORDERS:
            for name, options in OPTIONS.items():
                call = make_call(shape, order, **options)
                rss = peak_rss(call)
                results.append([f"{shape} {order} {name}", peak_traced(call), rss, int(limit(shape))])
    return results


@pytest.fixture(
    scope="module",
    params=[pytest.param(SHAPES[::3], id="few"), pytest.param(SHAPES, id="all", marks=pytest.mark.slow)],
)
def measured(request):
    results = measure_in_a_new_process(request.param)
    assert len(results) == 1 + len(request.param) * len(ORDERS) * len(OPTIONS)
    return results


def measure_in_a_new_process(shapes):
    # Every allocation above 64 KiB is a mapping of its own, which shows when made and is gone when freed.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0"}
    command = [sys.executable, __file__, "--json", json.dumps(shapes)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
    return json.loads(done.stdout)


def test_in_place_allocates_little(measured):
    assert not [row for row in measured[1:] if row[1] >= row[3]]


def test_in_place_leaves_the_process_as_large_as_it_was(measured):
    if measured[0][2] is None:
        pytest.skip("this system does not tell the peak of a process's memory")
    assert not [row for row in measured[1:] if row[2] >= row[3]]


def test_the_measure_sees_a_copy(measured):
    _, traced, rss, allowed = measured[0]
    assert traced > allowed
    assert rss is None or rss > allowed


def main():
    if "--json" in sys.argv:
        print(json.dumps(measure(json.loads(sys.argv[-1]))))
        return
    print(f"{'tracemalloc':>12} {'process':>12} {'limit':>12}   bytes at most")
    for what, traced, rss, allowed in measure_in_a_new_process(SHAPES):
        print(f"{traced:12} {rss if rss is not None else '-':>12} {allowed:12}   {what}")


if __name__ == "__main__":
    main()
