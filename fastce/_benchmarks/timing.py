"""How everything is timed: in rounds, by lower quartiles.

Design
------
1. A machine's speed changes during a measurement by more than some candidates differ. So each candidate is timed once
   in every round, and every round starts with another one.
2. What disturbs a machine only ever adds to a time. So the time counts that a quarter of the rounds kept within.
3. Only the call is timed, by itself, for restoring the logits of a short call takes as long as the call. The clock's
   own share, less than 0.1 us, is in every figure.
"""

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Generic, TypeVar

from fastce._benchmarks.report import show_progress

Sampler = Callable[[], float]
Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

ROUNDS = 11
MIN_SAMPLE = 1e-3  # s: the calls of a sample take longer together, or the scheduler's noise hides them
PAUSE = 0.15  # s: waiting threads of BLAS keep a core busy for 0.1 s, so other packages are timed after a pause
LONG = 0.02  # s: waking threads, some 50 us, does not count in a call that takes longer


def clock(call: Callable[[], Value]) -> tuple[float, Value]:
    """Return the seconds of one call, and its result, so that freeing it is not timed."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def sample(
    call: Callable[[], object],
    before: Callable[[], object] = lambda: None,
    at_least: float | None = None,
    after_pause: bool = False,
) -> float:
    """Return the mean seconds of as many calls as take `at_least`, or `MIN_SAMPLE`, together, each after `before`.

    After a pause the first call only wakes threads, unless it is so long that this does not count.
    """

    def take() -> float:
        before()
        return clock(call)[0]

    if after_pause:
        time.sleep(PAUSE)
        seconds = take()
        if seconds > LONG:
            return seconds
    total, n_calls = take(), 1
    while total < (MIN_SAMPLE if at_least is None else at_least):
        total += take()
        n_calls += 1
    return total / n_calls


class Rounds(Generic[Key]):
    """The samples of each candidate."""

    def __init__(self) -> None:
        self.seconds: dict[Key, list[float]] = defaultdict(list)
        self.n = 0

    def run(self, samplers: Mapping[Key, Sampler], title: str = "") -> None:
        """Take a sample of each; `title` is for the progress line."""
        keys = list(samplers)
        first = self.n % len(keys)
        self.n += 1
        for key in keys[first:] + keys[:first]:
            if title:
                show_progress(f"{title}: round {self.n}, {key}")
            self.seconds[key].append(samplers[key]())

    def lower_quartiles(self) -> dict[Key, float]:
        """Return the seconds that a quarter of the rounds kept within."""
        return {key: lower_quartile(seconds) for key, seconds in self.seconds.items()}


def lower_quartile(seconds: Sequence[float]) -> float:
    """Return the time that a quarter of them kept within."""
    return sorted(seconds)[len(seconds) // 4]


def run_rounds(candidates: Mapping[Key, Sequence[Sampler]], rounds: int = ROUNDS, title: str = "") -> dict[Key, float]:
    """Return the seconds of each candidate: of the fastest, where it has several ways to do the same."""
    done: Rounds[tuple[Key, int]] = Rounds()
    ways = {(key, i): way for key, samplers in candidates.items() for i, way in enumerate(samplers)}
    for _ in range(rounds):
        done.run(ways, title)
    show_progress("")
    seconds = done.lower_quartiles()
    return {key: min(seconds[key, i] for i in range(len(samplers))) for key, samplers in candidates.items()}


def run_calls(calls: Mapping[Key, Callable[[], Any]], rounds: int = ROUNDS, **options: Any) -> dict[Key, float]:
    """Return the seconds of each call, sampled with such options."""
    return run_rounds({key: [partial(sample, call, **options)] for key, call in calls.items()}, rounds)
