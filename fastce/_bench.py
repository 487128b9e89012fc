"""The benchmark: loss and gradient by this library and by whatever else is installed, in multiples of the floor.

Design
------
1. The floor is `logits *= 1` by NumPy, in place, in one call or in one for each thread, whichever is faster: one read
   and one write of the logits, the least that a gradient can cost (see `_floor`). Multiples of it can be compared
   between machines; times cannot.
2. In every round everybody computes once, on the same logits, freshly restored, and takes another place in the order:
   a machine's speed changes during a benchmark by more than some contenders differ.
3. Only the call is timed, by itself, for restoring short problems takes as long as solving them. The clock's own share,
   less than 0.1 us, is in every figure.
4. Nobody is timed who does not agree with this library.
5. Without a number of threads, fastce has its default, and the others as many as that may use: what a user gets.
6. Training steps, with matrix products between the losses, have a table of their own (see `_steps`), in milliseconds.
"""

import datetime
import importlib
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import fastce
from fastce._contenders import CONTENDERS, TOLERANCE, TOLERANCES_16_BIT, Array, Call, Contender, disagreement
from fastce._floor import IN_PLACE, floors_of
from fastce._machine import available_memory, describe_machine
from fastce._progress import show_progress
from fastce._steps import STEPS, Step, lower_quartile, make_step, run_in_turn

FLOOR = "floor"
PER_THREAD = "floor, one call per thread"
FASTCE = "fastce"  # what the contenders of this library begin with
ONE_THREAD = "fastce, one thread"
# Who takes part in steps, besides fastce with one thread: others' losses make no second array of logits, or a graph.
IN_STEPS = ("fastce", "NumPy", "scikit-learn", "PyTorch")
COMPILED = "torch.compile"

MIN_SAMPLE = 1e-2  # s: the calls of a sample together take longer
# s, a pause before each sample: waiting threads of BLAS keep a processor busy for a tenth of a second.
PAUSE = 0.15
# Numbers below which nobody gets more than one thread: some packages would be slowed down by as many as they are given.
SMALL = 16384
LONG = 0.02  # s: waking threads, some 50 us, does not count in a call that takes longer
TURN = 0.3  # s: what each has in a round of training steps


class Case(NamedTuple):
    """Logits to be had."""

    shape: tuple[int, ...]
    dtype: str = "float32"
    order: str = "C"

    @property
    def name(self) -> str:
        """How the command line calls it."""
        extras = [self.dtype] * (self.dtype != "float32") + ["fortran"] * (self.order == "F")
        return "-".join(["x".join(map(str, self.shape)), *extras])

    @property
    def size(self) -> int:
        """How many numbers the logits are."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """How much memory they take."""
        return self.size * (2 if self.is_16_bit else np.dtype(self.dtype).itemsize)

    @property
    def is_16_bit(self) -> bool:
        """Whether they are; NumPy itself may not know the type."""
        return self.dtype in TOLERANCES_16_BIT


def by_name(*cases: Case) -> dict[str, Case]:
    """Return the cases by their names."""
    return {case.name: case for case in cases}


CASES = by_name(
    Case((65536, 1000)),  # image classes
    Case((4096, 32000)),  # a vocabulary
    Case((1024, 128256)),  # a large one: a row is half a megabyte
    Case((65536, 100)),
    Case((400_000, 32)),
    Case((1_000_000, 10)),  # few classes: what a row costs shows
    Case((1_000_000, 3)),
    Case((1_000_000, 2)),
    Case((256, 1000)),  # in cache
    Case((32, 10)),  # what a call costs
    Case((1_000_000, 10), order="F"),
    Case((16, 21, 512, 512)),  # the pixels of images
    Case((1, 150, 512, 512)),
    Case((4096, 32000), "float64"),
    Case((4096, 32000), "bfloat16"),
    Case((4096, 32000), "float16"),
)
QUICK_CASES = by_name(
    Case((64, 1000)),
    Case((256, 1000)),
    Case((300, 10)),
    Case((300, 10), order="F"),
    Case((2, 5, 8, 8)),
    Case((64, 100), "float64"),
    Case((64, 100), "bfloat16"),
    Case((64, 100), "float16"),
)
ALL: list[Case | Step] = [*CASES.values(), *STEPS]
QUICK: list[Case | Step] = [*QUICK_CASES.values(), *STEPS[::3]]


def run(
    cases: Sequence[Case],
    steps: Sequence[Step],
    rounds: int,
    n_threads: int | None,
    compiled: bool,
    json_path: Path | None,
    plot_path: Path | None,
) -> int:
    """Measure all cases, print a table row for each, write the files and return the exit status."""
    if plot_path is not None:
        try:
            from fastce._bench_plot import save_plot
        except ImportError as error:
            print(f"--plot needs matplotlib (pip install 'fastce[bench]'): {error}", file=sys.stderr)
            return 1
    n_most = n_threads or fastce.show_config(mode="dicts")["threads"]["effective"]
    contenders = find_installed(compiled)
    results: dict[str, Any] = {}
    report = {**describe(contenders), "n_threads": n_most, "rounds": rounds, "cases": results, "steps": {}}
    head = ["case", "floor, ms", *contenders, "speedup"]
    widths = [max(len(name) for name in [*CASES, *QUICK_CASES]), *map(len, head[1:])]
    if cases:
        print_head(head, widths)
    for case in cases:
        if case.dtype == "bfloat16" and not has_bfloat16():
            note(f"{case.name}: skipped, it needs the package ml_dtypes")
            continue
        if case.n_bytes * 3 > available_memory():
            note(f"{case.name}: skipped, for it {tell_memory(case.n_bytes * 3)}")
            continue
        result = measure(case, contenders, n_threads, n_most if case.size >= SMALL else 1, rounds)
        results[case.name] = result
        print_row([case.name, *format_result(result["seconds"], contenders)], widths)
    if steps:
        report["steps"] = run_steps(steps, contenders, n_threads, n_most, rounds)
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if plot_path is not None:
        save_plot(report, plot_path)
    return 0


def run_steps(
    steps: Sequence[Step], contenders: dict[str, Contender], n_threads: int | None, n_most: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Measure training steps and print a table row for each; return the lower quartiles of the seconds."""
    names = [name for name in IN_STEPS if name in contenders]
    head = ["step, ms", *names, ONE_THREAD, "speedup"]
    widths = [max(len(step.name) for step in STEPS), *map(len, head[1:])]
    print()
    print_head(head, widths)
    report = {}
    for step in steps:
        show_progress(step.name)
        losses = {name: (contenders[name], n_threads if name == FASTCE else n_most) for name in names}
        losses[ONE_THREAD] = contenders[FASTCE], 1
        runs = {name: make_step(step, contender.prepare, n) for name, (contender, n) in losses.items()}
        seconds = run_in_turn(runs, rounds, TURN, PAUSE)
        report[step.name] = seconds
        others = [value for name, value in seconds.items() if not name.startswith(FASTCE)]
        cells = [format_number(1e3 * seconds[name]) for name in head[1:-1]]
        print_row([step.name, *cells, format_number(min(others) / seconds[FASTCE] if others else None)], widths)
    return report


def find_installed(compiled: bool) -> dict[str, Contender]:
    """Return the contenders whose packages can be imported."""
    installed = {}
    for name, contender in CONTENDERS.items():
        if name == COMPILED and not compiled:
            continue
        show_progress(f"importing {name}")
        try:
            for package in contender.packages:
                importlib.import_module(package)
        except Exception as error:  # whatever a broken installation raises
            note(f"{name}: left out: {error}")
        else:
            installed[name] = contender
    return installed


def has_bfloat16() -> bool:
    """Make the type known to NumPy, if that is possible."""
    try:
        importlib.import_module("ml_dtypes")
    except ImportError:
        return False
    return True


def measure(
    case: Case, contenders: dict[str, Contender], n_threads: int | None, n_most: int, rounds: int
) -> dict[str, Any]:
    """Return the seconds of the floor and of everybody who agrees, lower quartiles, and why the others were dropped."""
    show_progress(f"{case.name}: drawing logits")
    rng = np.random.default_rng(0)
    dtype: Any = case.dtype
    order: Any = case.order
    drawn_as: Any = "float32" if case.is_16_bit else dtype
    original = np.asarray(rng.standard_normal(case.shape, drawn_as), dtype, order=order)
    target = rng.integers(case.shape[1], size=case.shape[:1] + case.shape[2:])
    logits = np.empty_like(original)

    def restore() -> None:
        np.copyto(logits, original)

    agreeing, dropped = prepare(case, contenders, n_threads, n_most, logits, target, restore)
    floors = dict(zip((FLOOR, PER_THREAD), floors_of(IN_PLACE, logits, n_most), strict=False))
    calls: dict[str, Callable[[], object]] = {**floors, **agreeing}
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for i in range(rounds):
        turn = i % len(names)
        for name in names[turn:] + names[:turn]:
            show_progress(f"{case.name}: round {i + 1}/{rounds}, {name}")
            seconds[name].append(take_sample(calls[name], restore))
    show_progress("")
    quartiles = {name: lower_quartile(times) for name, times in seconds.items()}
    quartiles[FLOOR] = min(quartiles[FLOOR], quartiles.pop(PER_THREAD, math.inf))
    return {**case._asdict(), "n_threads": n_most, "seconds": quartiles, "dropped": dropped}


def prepare(
    case: Case,
    contenders: dict[str, Contender],
    n_threads: int | None,
    n_most: int,
    logits: Array,
    target: Array,
    restore: Callable[[], None],
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls of those who agree with the first, and why the others were dropped."""
    calls: dict[str, Call] = {}
    dropped: dict[str, str] = {}
    expected: tuple[Any, Any] | None = None
    for name, contender in contenders.items():
        show_progress(f"{case.name}: checking {name}")
        restore()
        try:
            n_bytes = case.n_bytes * (contender.n_matrices + 1)  # 1: to compare
            if n_bytes > available_memory():
                raise MemoryError(tell_memory(n_bytes))
            call = contender.prepare(logits, target, n_threads if name.startswith(FASTCE) else n_most)
            loss, grad = (np.asarray(part) for part in call())
            if expected is None:
                expected = loss, grad.copy(order="K")
            errors = disagreement((loss, grad), expected, target.size)
            tolerance = TOLERANCES_16_BIT.get(case.dtype, TOLERANCE)
            if not all(error <= tolerance for error in errors):  # NaN is not
                raise ArithmeticError(f"differs by {errors[0]:.1e} in the loss, {errors[1]:.1e} in the gradient")
        except Exception as error:  # whatever may go wrong in other packages
            if expected is None:
                raise
            dropped[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            note(f"{case.name}: {name} dropped: {dropped[name]}")
        else:
            calls[name] = call
    return calls, dropped


def take_sample(call: Callable[[], object], restore: Callable[[], None]) -> float:
    """Return the mean seconds of some calls, or of a single long one."""
    time.sleep(PAUSE)
    seconds = time_call(call, restore)
    if seconds > LONG:
        return seconds
    # That one woke the threads, which a training loop finds awake.
    total, n_calls = 0.0, 0
    while total < MIN_SAMPLE:
        total += time_call(call, restore)
        n_calls += 1
    return total / n_calls


def time_call(call: Callable[[], object], restore: Callable[[], None]) -> float:
    """Return the seconds of one call on fresh logits."""
    restore()
    start = time.perf_counter()
    result = call()
    stop = time.perf_counter()
    del result  # not before the clock was read: freeing takes time
    return stop - start


def format_result(all_seconds: dict[str, float], contenders: dict[str, Contender]) -> list[str]:
    """Return the cells of a row: the floor in ms, multiples of it, and fastce's speed in those of the fastest other."""
    floor = all_seconds[FLOOR]
    multiples = [all_seconds[name] / floor if name in all_seconds else None for name in contenders]
    others = [seconds for name, seconds in all_seconds.items() if name != FLOOR and not name.startswith(FASTCE)]
    return [format_number(x) for x in (floor * 1e3, *multiples, min(others) / all_seconds[FASTCE] if others else None)]


def format_number(x: float | None) -> str:
    """Return three digits, or more before the point."""
    if x is None:
        return "-"
    return f"{x:.3g}" if x < 1000 else f"{x:.0f}"


def print_head(head: Sequence[str], widths: Sequence[int]) -> None:
    """Print the first rows of a Markdown table."""
    print_row(head, widths)
    print_row(["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])], widths)


def print_row(cells: Sequence[str], widths: Sequence[int]) -> None:
    """Print a row of a Markdown table, numbers to the right."""
    show_progress("")
    padded = [cell.rjust(width) for cell, width in zip(cells, widths, strict=True)]
    print("|", " | ".join([cells[0].ljust(widths[0]), *padded[1:]]), "|", flush=True)


def note(text: str) -> None:
    """Tell what is not in the table."""
    show_progress("")
    print(text, file=sys.stderr, flush=True)


def tell_memory(n_bytes: int) -> str:
    """Return a sentence about memory that is not there."""
    return f"needs {n_bytes / 2**30:.1f} GiB, of which {available_memory() / 2**30:.1f} are available"


def describe(contenders: dict[str, Contender]) -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = {package for contender in contenders.values() for package in contender.packages}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": {package: sys.modules[package].__version__ for package in sorted(packages)},
        FASTCE: fastce.show_config(mode="dicts"),
    }
