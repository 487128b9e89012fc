"""Random calls of the public functions, held against the definition: a seeded fuzzer.

    python tests/fuzz.py --calls 1000000 --jobs 2      as many calls as wanted
    python tests/fuzz.py --seed 3 --case 4711          one case once more, with a description

Design
------
1. A *case* is one problem and the calls that are made of it; it is a function of (seed, number). It is not one of the
   time, of the cases before it or of the number of processes, so that a line that names it reproduces it.
2. Every result is held against the definition in float64. The same call is then made once more in another way: with
   other threads, into an `out` that is full of something, in place, for some of its rows. All must have the same bits.
3. Operands and `out` lie between pages that nobody may touch, and the bytes around and between their elements are
   looked at afterwards. Inputs must be as they were, and so must `out` be when a call raises.
4. Only documented exceptions may come, for calls that are wrong on purpose, and no warnings, whatever `np.errstate` is.
5. Cases run in processes of their own: one that crashes is named by the process that waits for it, and the others go
   on.
"""

import argparse
import contextlib
import faulthandler
import itertools
import mmap
import os
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))  # also for those who import this by its path

from fastce import _cpu
from fuzz_calls import Calls
from fuzz_families import FAMILIES
from fuzz_mistakes import anything, mistakes
from fuzz_problems import Dice, Memory
from guard import Pool

ALL_FAMILIES = (*FAMILIES, mistakes, mistakes, anything)
MOST_FAULTS = 10  # after which a process gives up
MOST_CRASHES = 5
PROGRAM = Path(__file__)
_COUNTERS = np.dtype([("case", np.int64), ("cases", np.int64), ("calls", np.int64), ("faults", np.int64)])


def run_case(seed, number, pool, isa=None):
    """Run one case and return how many calls it made; raise what is wrong with it."""
    dice = Dice(seed, number)
    memory = Memory(dice, pool)
    chosen = dice.choice(_cpu.supported_isas)
    run = dice.choice(ALL_FAMILIES)
    calls = Calls(dice, memory)
    try:
        with _cpu.use_isa(chosen) if isa is None else contextlib.nullcontext():
            run(calls)
    except Exception as error:
        error.add_note(f"{isa or chosen}: {calls.describe()}")
        raise
    finally:
        pool.release()
    return calls.n_made


def command(seed, number):
    """Return the command that repeats a case."""
    return f"python tests/fuzz.py --seed {seed} --case {number}"


def describe(error):
    """Return what is wrong with a case, where that was found and in which call, in two lines."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(last.filename).name}:{last.lineno}"
    return f"  {type(error).__name__}: {' '.join(str(error).split())}\n  at {place} {' '.join(error.__notes__)}"


def work(seed, numbers, most_calls, counters=None, isa=None):
    """Run cases until so many calls have been made; print those that fail. Return calls and faults."""
    pool = Pool()
    n_calls = n_faults = 0
    for number in numbers:
        if n_calls >= most_calls or n_faults >= MOST_FAULTS:
            break
        if counters is not None:
            counters["case"] = number
        try:
            n_calls += run_case(seed, number, pool, isa)
        except Exception as error:
            n_faults += 1
            print(f"FAULT {command(seed, number)}\n{describe(error)}", flush=True)
        if counters is not None:
            counters["cases"] += 1
            counters["calls"] = n_calls
            counters["faults"] = n_faults
    return n_calls, n_faults


def _worker(arguments):
    """Be one of the processes that run cases, and leave what was done in a file."""
    faulthandler.enable()
    warnings.simplefilter("error")
    with Path(arguments.counters).open("r+b") as file:
        counters = np.frombuffer(mmap.mmap(file.fileno(), _COUNTERS.itemsize), _COUNTERS)
        numbers = itertools.count(arguments.case, arguments.step)
        work(arguments.seed, numbers, arguments.calls, counters[0], arguments.isa)


class _Job:
    """A process that runs every n-th case, and the next one after a crash."""

    def __init__(self, arguments, folder, k):
        self.arguments, self.k = arguments, k
        self.path = Path(folder, f"counters-{k}")
        self.first = arguments.first + k
        self.left = -(-arguments.calls // arguments.jobs)
        self.n_calls = self.n_cases = self.n_faults = self.n_crashes = 0
        self.start()

    def start(self):
        self.path.write_bytes(bytes(_COUNTERS.itemsize))
        arguments = self.arguments
        command = [sys.executable, PROGRAM, "--seed", arguments.seed, "--case", self.first, "--calls", self.left]
        command += ["--step", arguments.jobs, "--counters", self.path]
        if arguments.isa:
            command += ["--isa", arguments.isa]
        self.process = subprocess.Popen(list(map(str, command)))

    def has_ended(self):
        """Return True if there is nothing more to wait for; start again behind a case that ended the process."""
        status = self.process.poll()
        if status is None:
            return False
        done = np.frombuffer(self.path.read_bytes(), _COUNTERS)[0]
        self.n_calls += int(done["calls"])
        self.n_cases += int(done["cases"])
        self.n_faults += int(done["faults"])
        self.left -= int(done["calls"])
        if status == 0:
            return True
        self.n_faults += 1
        self.n_crashes += 1
        number = int(done["case"])
        print(f"FAULT {command(self.arguments.seed, number)}\n  the process ended with status {status}", flush=True)
        self.first = number + self.arguments.jobs
        if self.left <= 0 or self.n_crashes >= MOST_CRASHES:
            return True
        self.start()
        return False


def main():
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--calls", type=int, default=10_000, help="how many calls to make (default: 10000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="how many processes")
    parser.add_argument("--first", type=int, default=0, help="the first case")
    parser.add_argument("--case", type=int, help="run this case alone")
    parser.add_argument("--isa", choices=_cpu.supported_isas, help="the only instruction set; else all in turn")
    parser.add_argument("--step", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--counters", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    # As many threads as cases ask for, however few processors there are; then they must not wait by spinning.
    os.environ.setdefault("OMP_NUM_THREADS", "4")
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if arguments.counters:
        return _worker(arguments)
    if arguments.case is not None:
        warnings.simplefilter("error")
        n_calls = run_case(arguments.seed, arguments.case, Pool(), arguments.isa)
        print(f"{n_calls} calls, no fault")
        return 0
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        jobs = [_Job(arguments, folder, k) for k in range(arguments.jobs)]
        waiting = list(jobs)
        while waiting:
            time.sleep(0.05)
            waiting = [job for job in waiting if not job.has_ended()]
    seconds = time.monotonic() - began
    n_calls, n_cases, n_faults = (
        sum(getattr(job, name) for job in jobs) for name in ("n_calls", "n_cases", "n_faults")
    )
    speed = f"{n_calls / seconds:.0f} calls/s"
    print(f"seed {arguments.seed}: {n_calls} calls in {n_cases} cases, {n_faults} faults; {speed}")
    return 1 if n_faults else 0


if __name__ == "__main__":
    sys.exit(main())
