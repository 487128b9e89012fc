"""How long cases take: lower quartiles over rounds, in each of which every case runs once on fresh logits.

So a change of the machine's speed meets all alike, and their ratios hold on a machine that is not quite quiet.
"""

import math
import time
from dataclasses import replace

import numpy as np

import fastce
from fastce import _cpu
from fastce._floor import COPY, IN_PLACE, floors_of
from fastce._reference import numpy_loss_and_grad
from fastce._steps import lower_quartile

from .problems import make_arguments, make_logits

SAMPLE_SECONDS = 1e-3  # shorter ones are lost in the scheduler's noise
ROUNDS = 11

_ROWS_PER_THREAD = 64  # enough to be a thread's share, and a moment's work


def wake_threads(n_threads):
    """Start or wake the threads: they sleep while logits are filled; a real training loop finds them awake."""
    n_rows = n_threads * _ROWS_PER_THREAD
    fastce.cross_entropy(np.zeros((n_rows, 16), np.float32), np.zeros(n_rows, np.int64), n_threads=n_threads)


def make_call(case, logits):
    """Return what is timed, a function of no arguments that works on `logits`, in place where a call can be."""
    name, *which = case.call.split(":")
    if name == "floor":
        kind, way = which or (IN_PLACE, 0)
        out = np.zeros_like(logits) if kind == COPY else None
        ways = floors_of(kind, logits, case.n_threads, out)
        return ways[min(int(way), len(ways) - 1)]
    arguments = make_arguments(case.option, *case.logits_key)
    if case.call == "numpy":
        return lambda: numpy_loss_and_grad(logits, **arguments)
    arguments["n_threads"] = case.n_threads
    if case.call == "loss":
        return lambda: fastce.cross_entropy(logits, **arguments)
    if case.call == "product":
        v = logits.copy(order="K")
        return lambda: fastce.cross_entropy_hvp(logits, v=v, out=logits, **arguments)
    if case.call == "gradient+diagonal":
        hess = np.zeros_like(logits)
        return lambda: fastce.cross_entropy_grad_hess(logits, out=logits, hess_out=hess, **arguments)
    if case.call == "loss+gradient":
        arguments["out"] = logits
    return lambda: fastce.cross_entropy_with_grad(logits, **arguments)


def _sample(case, call, logits, original, number):
    """Return the mean seconds of `number` calls, each on fresh logits."""
    seconds = 0.0
    with _cpu.use_isa(case.isa):
        for _ in range(number):
            np.copyto(logits, original)
            wake_threads(case.n_threads)
            start = time.perf_counter()
            call()
            seconds += time.perf_counter() - start
    return seconds / number


def typical_seconds(cases, rounds=ROUNDS):
    """Return the lower quartile of each case's seconds. Cases that can share arrays do: they are large."""
    cases = list(dict.fromkeys(cases))
    logits = {key: make_logits(*key) for key in {case.logits_key for case in cases}}
    original = {key: x.copy(order="K") for key, x in logits.items()}
    calls = {}
    for case in cases:
        shared = replace(case, isa=_cpu.isa)
        if shared not in calls:
            calls[shared] = make_call(shared, logits[case.logits_key])
        calls[case] = calls[shared]

    def sample(case, number):
        return _sample(case, calls[case], logits[case.logits_key], original[case.logits_key], number)

    # The first sample also warms up.
    numbers = {case: max(1, math.ceil(SAMPLE_SECONDS / sample(case, 1))) for case in cases}
    seconds = {case: [] for case in cases}
    for _ in range(rounds):
        for case in cases:
            seconds[case].append(sample(case, numbers[case]))
    return {case: lower_quartile(times) for case, times in seconds.items()}


def floor_of(case, seconds):
    """Return the seconds of the case's floor, whose ways are among those that were timed."""
    return min(seconds[way] for way in case.floors)


def ratio_to_floor(case):
    """Return the case's time in multiples of the floor."""
    seconds = typical_seconds([*case.floors, case])
    return seconds[case] / floor_of(case, seconds)


def gigabytes_per_second(case):
    """Return the pace in bytes that must move: the logits are read and, but for the loss alone, as many written."""
    shape, dtype, _ = case.logits_key
    passes = {"loss": 1, "product": 3, "gradient+diagonal": 3}.get(case.call, 2)  # over arrays of that size
    return 1e-9 * passes * math.prod(shape) * np.dtype(dtype).itemsize / typical_seconds([case])[case]
