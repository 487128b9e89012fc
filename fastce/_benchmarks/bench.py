"""The benchmark: loss and gradient by this library and by whichever peers are installed, beside the memory floor.

Design
------
1. The floor is `logits *= 1`, in place: one read and one write of the logits, the least that a gradient can cost (see
   `floor`). Multiples of it can be compared between machines; times cannot.
2. A peer that does not agree with this library is not timed.
3. Without a number of threads, fastce has its default, and the peers as many as that may use: what a user gets.
4. Training steps, with matrix products between the losses, have a table of their own (see `steps`), in milliseconds.
"""

import datetime
import importlib
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

import fastce
from fastce._benchmarks.cases import CASES, QUICK_CASES, Case, Logits, make_arguments
from fastce._benchmarks.floor import IN_PLACE, make_floors
from fastce._benchmarks.machine import available_memory, describe_machine
from fastce._benchmarks.peers import PEERS, Array, Call, Peer, disagreement, tolerance
from fastce._benchmarks.report import Table, format_number, note, show_progress
from fastce._benchmarks.steps import STEPS, Step, make_step, run_steps
from fastce._benchmarks.timing import run_rounds, sample

FLOOR = "floor"
FASTCE = "fastce"  # what this library's names begin with
ONE_THREAD = "fastce, one thread"
# The peers in steps: other packages' losses make no second array of logits, or a graph.
IN_STEPS = ("NumPy", "scikit-learn", "PyTorch")
COMPILED = "torch.compile"

# Logits below which nothing gets more than one thread: it would slow some packages down.
SMALL = 16384

SAMPLE = 1e-2  # s: longer than elsewhere, since each one follows a pause

ALL: list[Case | Step] = [*CASES, *STEPS]
QUICK: list[Case | Step] = [*QUICK_CASES, *STEPS[::3]]


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
            from fastce._benchmarks.plot import save_plot
        except ImportError as error:
            print(f"--plot needs matplotlib (pip install 'fastce[bench]'): {error}", file=sys.stderr)
            return 1
    n_most = n_threads or fastce.show_config(mode="dicts")["threads"]["effective"]
    peers = find_installed(compiled)
    report: dict[str, Any] = {**describe(peers), "n_threads": n_most, "rounds": rounds, "cases": {}, "steps": {}}
    if cases:
        table = Table(["case", "floor, ms", *peers, "speedup"], [case.name for case in (*CASES, *QUICK_CASES)])
    for case in cases:
        if not case.is_supported():
            note(f"{case.name}: skipped, it needs the package ml_dtypes")
        elif case.n_bytes * 3 > available_memory():
            note(f"{case.name}: skipped, for it {tell_memory(case.n_bytes * 3)}")
        else:
            result = measure(case, peers, n_threads, n_most if case.size >= SMALL else 1, rounds)
            report["cases"][case.name] = result
            seconds = result["seconds"]
            multiples = [seconds[name] / seconds[FLOOR] if name in seconds else None for name in peers]
            table.print(case.name, *map(format_number, [1e3 * seconds[FLOOR], *multiples, speedup(seconds)]))
    if steps:
        names = [FASTCE, *(name for name in IN_STEPS if name in peers), ONE_THREAD]
        print()
        table = Table(["step, ms", *names, "speedup"], [step.name for step in STEPS])
    for step in steps:
        losses = {name: (name, n_threads if name == FASTCE else n_most) for name in names} | {ONE_THREAD: (FASTCE, 1)}
        seconds = run_steps({name: make_step(step, *loss) for name, loss in losses.items()}, rounds)
        report["steps"][step.name] = seconds
        table.print(step.name, *(format_number(1e3 * seconds[name]) for name in names), format_number(speedup(seconds)))
    if json_path is not None:
        json_path.write_text(json.dumps(report, indent=1) + "\n")
    if plot_path is not None:
        save_plot(report, plot_path)
    return 0


def speedup(seconds: dict[str, float]) -> float | None:
    """Return how many times as fast as the fastest peer fastce is."""
    others = [value for name, value in seconds.items() if name != FLOOR and not name.startswith(FASTCE)]
    return min(others) / seconds[FASTCE] if others else None


def find_installed(compiled: bool) -> dict[str, Peer]:
    """Return the peers whose packages can be imported."""
    installed = {}
    for name, peer in PEERS.items():
        if name == COMPILED and not compiled:
            continue
        show_progress(f"importing {name}")
        try:
            for package in peer.packages:
                importlib.import_module(package)
        except Exception as error:  # whatever a broken installation raises
            note(f"{name}: left out: {error}")
        else:
            installed[name] = peer
    return installed


def measure(case: Case, peers: dict[str, Peer], n_threads: int | None, n_most: int, rounds: int) -> dict[str, Any]:
    """Return the seconds of the floor and of all peers that agree, and why the others were dropped."""
    show_progress(f"{case.name}: drawing logits")
    logits = Logits(case)
    calls, dropped = prepare(case, peers, n_threads, n_most, logits)
    ways: dict[str, list[Callable[[], object]]] = {FLOOR: make_floors(IN_PLACE, logits.array, n_most)}
    ways |= {name: [call] for name, call in calls.items()}
    take = partial(sample, before=logits.restore, at_least=SAMPLE, after_pause=True)
    seconds = run_rounds({name: [partial(take, call) for call in ways[name]] for name in ways}, rounds, case.name)
    return {
        "shape": case.shape,
        "dtype": case.dtype,
        "order": case.layout,
        "n_threads": n_most,
        "seconds": seconds,
        "dropped": dropped,
    }


def prepare(
    case: Case, peers: dict[str, Peer], n_threads: int | None, n_most: int, logits: Logits
) -> tuple[dict[str, Call], dict[str, str]]:
    """Return the calls of the peers that agree with the first, and why the others were dropped."""
    target: Array = make_arguments(case)["target"]
    calls: dict[str, Call] = {}
    dropped: dict[str, str] = {}
    expected: tuple[Any, Any] | None = None
    for name, peer in peers.items():
        show_progress(f"{case.name}: checking {name}")
        logits.restore()
        try:
            n_bytes = case.n_bytes * (peer.n_matrices + 1)  # 1: to compare
            if n_bytes > available_memory():
                raise MemoryError(tell_memory(n_bytes))
            call = peer.prepare(logits.array, target, n_threads if name.startswith(FASTCE) else n_most)
            loss, grad = (np.asarray(part) for part in call())
            if expected is None:
                expected = loss, grad.copy(order="K")
            errors = disagreement((loss, grad), expected, target.size)
            if not all(error <= tolerance(case.dtype) for error in errors):  # NaN is not
                raise ArithmeticError(f"differs by {errors[0]:.1e} in the loss, {errors[1]:.1e} in the gradient")
        except Exception as error:  # whatever may go wrong in other packages
            if expected is None:
                raise
            dropped[name] = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
            note(f"{case.name}: {name} dropped: {dropped[name]}")
        else:
            calls[name] = call
    return calls, dropped


def tell_memory(n_bytes: int) -> str:
    """Return a sentence about memory that is not there."""
    return f"needs {n_bytes / 2**30:.1f} GiB, of which {available_memory() / 2**30:.1f} are available"


def describe(peers: dict[str, Peer]) -> dict[str, Any]:
    """Return what the figures depend on."""
    packages = {package for peer in peers.values() for package in peer.packages}
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": {package: sys.modules[package].__version__ for package in sorted(packages)},
        FASTCE: fastce.show_config(mode="dicts"),
    }
