"""How long this library's calls take, beside the memory floor."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import fastce
from fastce._benchmarks.cases import CALLS, Array, Case, Logits, make_arguments
from fastce._benchmarks.floor import IN_PLACE, make_floors
from fastce._benchmarks.timing import ROUNDS, Sampler, run_rounds, sample

_ROWS_PER_THREAD = 64  # enough to be a thread's share, and a moment's work


class Result(NamedTuple):
    """Seconds."""

    seconds: float
    floor: float  # with as many threads

    @property
    def multiple(self) -> float:
        """The time in multiples of the floor."""
        return self.seconds / self.floor


def measure(cases: Sequence[Case], rounds: int = ROUNDS) -> dict[Case, Result]:
    """Return the results of cases, timed in turn with each other and their floors. Large arrays are shared."""
    logits: dict[Hashable, Logits] = {}
    calls: dict[Case, Callable[[], object]] = {}
    candidates: dict[Hashable, list[Sampler]] = {}
    for case in cases:
        if case.logits_key not in logits:
            logits[case.logits_key] = Logits(case)
        x = logits[case.logits_key]
        shared = replace(case, isa=None)
        if shared not in calls:
            calls[shared] = make_call(case, x.array, make_operands(case, x.array))
        candidates[case] = [make_sampler(case, calls[shared], x)]
        if _floor_key(case) not in candidates:
            floors = make_floors(CALLS[case.call].floor, x.array, case.n_threads)
            candidates[_floor_key(case)] = [partial(sample, floor, x.restore) for floor in floors]
    seconds = run_rounds(candidates, rounds, cases[0].name)
    return {case: Result(seconds[case], seconds[_floor_key(case)]) for case in cases}


def _floor_key(case: Case) -> Hashable:
    return *case.logits_key, CALLS[case.call].floor, case.n_threads


def make_sampler(case: Case, call: Callable[[], object], logits: Logits, library: Any = fastce) -> Sampler:
    """Return a function that takes a sample of the call: on fresh logits, with the case's instruction set."""

    def before() -> None:
        logits.restore()
        wake_threads(case.n_threads, library)

    def take() -> float:
        with library._cpu.use_isa(case.isa or library._cpu.isa):
            return sample(call, before)

    return take


def wake_threads(n_threads: int, library: Any = fastce) -> None:
    """Start or wake the threads: they sleep while logits are restored; a real training loop finds them awake."""
    if n_threads > 1:
        n_rows = n_threads * _ROWS_PER_THREAD
        library.cross_entropy(np.zeros((n_rows, 16), np.float32), np.zeros(n_rows, np.int64), n_threads=n_threads)


def make_operands(case: Case, logits: Array) -> dict[str, Any]:
    """Return the call's keyword arguments; its outputs are in place where they can be."""
    operands = {**make_arguments(case), "n_threads": case.n_threads}
    if CALLS[case.call].floor == IN_PLACE:
        operands["out"] = logits
    if case.call == "into out":
        operands["out"] = np.zeros_like(logits)
    if case.call == "product":
        operands["v"] = logits.copy(order="K")
    if case.call == "gradient+diagonal":
        operands["hess_out"] = np.zeros_like(logits)
    return operands


def make_call(case: Case, logits: Array, operands: dict[str, Any], library: Any = fastce) -> Callable[[], object]:
    """Return a function of no arguments that makes the call."""
    return partial(getattr(library, CALLS[case.call].function), logits, **operands)
