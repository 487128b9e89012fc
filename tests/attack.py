"""Threads that disturb each other: what a race or a changed input must not do.

    python tests/attack.py inputs --seconds 20     another thread overwrites the inputs of calls that are being made
    python tests/attack.py threads --seconds 20    eight threads make random calls, each on arrays of its own

Whoever changes an input during a call gets a wrong result, or an error. What must not be is access beyond an array: the
arrays lie between pages that nobody may touch, the bytes around them are looked at, and a sanitizer sees the rest.
"""

import argparse
import sys
import threading
import time
import warnings
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))

import fastce
import fuzz
from fastce import _cpu
from fuzz_mistakes import DOCUMENTED
from guard import Operand, Pool

# Every kernel: rows and columns, few classes and blocks of many, with options or without.
_SHAPES = ((4096, 10), (512, 100), (300, 300), (40, 5000), (64, 10, 40), (8, 300, 40))
_OPTIONS = ({}, {"label_smoothing": 0.1, "z_loss": 0.01}, {"softcap": 3.0}, {"weight": True, "sample_weight": True})
_GARBAGE = (-(2**63), -(2**40), -(10**9), -101, -1, 10**9, 2**31, 2**40, 2**63 - 1)


def _place(pool, array, place="end"):
    operand = Operand(pool, array.shape, array.dtype, array.strides, place)
    operand.array[...] = array
    operand.freeze()
    return operand


def _calls(arrays, outs, options):
    """Return calls that write to all of `outs`."""
    logits, target, v = arrays["logits"], arrays["target"], arrays["v"]
    one, two = outs
    return (
        lambda: fastce.cross_entropy(logits, target, **options),
        lambda: fastce.cross_entropy_with_grad(logits, target, out=one, return_stats=True, **options),
        lambda: fastce.cross_entropy_with_grad(logits, target, out=one, n_threads=4, **options),
        lambda: fastce.cross_entropy_stats(logits, target, **options),
        lambda: fastce.cross_entropy_hvp(logits, target, v, out=one, **options),
        lambda: fastce.cross_entropy_grad_hess(logits, target, out=one, hess_out=two, **options),
        lambda: fastce.nll_loss(logits, target),
    )


def _overwrite(arrays, others, has_ended):
    """Overwrite the arrays by one of their others, in turn, until told to end; in between by what is right."""
    k = 0
    while not has_ended.is_set():
        for name, array in arrays.items():
            array[...] = others[name][1 + k % (len(others[name]) - 1)]
            if k % 4 == 0:
                time.sleep(0)  # lets another thread run
            array[...] = others[name][0]
        # Right most of the time, or all calls would end with their checks.
        time.sleep(2e-5 * (k % 8))
        k += 1


def attack_inputs(seconds, seed):
    """Make calls while another thread overwrites their inputs; return how many were made, and how many raised."""
    rng = np.random.default_rng(seed)
    n_made = n_raised = 0
    end = time.monotonic() + seconds
    pool = Pool()
    while n_made == 0 or time.monotonic() < end:
        shape = _SHAPES[rng.integers(len(_SHAPES))]
        dtype = rng.choice([np.float32, np.float64, np.float16])
        rows = (shape[0], *shape[2:])
        target = rng.integers(0, shape[1], rows)
        values = {
            "logits": rng.standard_normal(shape).astype(dtype),
            "target": target,
            "v": rng.standard_normal(shape).astype(dtype),
            "weight": rng.random(shape[1]),
            "sample_weight": rng.random(rows),
        }
        if rng.random() < 0.3:
            values = {name: np.asfortranarray(value) for name, value in values.items()}
        options = dict(_OPTIONS[rng.integers(len(_OPTIONS))])
        for name in ("weight", "sample_weight"):
            if name not in options:
                del values[name]
        inputs = {name: _place(pool, value) for name, value in values.items()}
        options |= {name: inputs[name].array for name in options if name in inputs}
        outs = [Operand(pool, shape, dtype, values["logits"].strides, "start") for _ in range(2)]
        arrays = {name: operand.array for name, operand in inputs.items()}

        others = {name: [value, np.full_like(value, np.nan)] for name, value in values.items() if name != "target"}
        sparse = np.where(rng.random(rows) < 0.01, rng.choice(_GARBAGE, rows), target)
        others["target"] = [target, sparse, np.full(rows, shape[1]), rng.choice(_GARBAGE, rows)]
        attacked = {name: arrays[name] for name in (["target"] if rng.random() < 0.7 else arrays)}
        has_ended = threading.Event()
        attacker = threading.Thread(target=_overwrite, args=(attacked, others, has_ended))
        isa = rng.choice(_cpu.supported_isas)
        attacker.start()
        try:
            with _cpu.use_isa(isa):
                for call in _calls(arrays, [operand.array for operand in outs], options) * 20:
                    n_made += 1
                    try:
                        call()
                    except DOCUMENTED:
                        n_raised += 1
        finally:
            has_ended.set()
            attacker.join()
        for operand in (*outs, *inputs.values()):
            assert operand.take_result()[1], "bytes around an array were written to"
        pool.release()
    return n_made, n_raised


def attack_threads(seconds, seed, n_threads=8):
    """Make random calls in several threads at once; return how many were made."""
    counts, faults = [0] * n_threads, []
    end = time.monotonic() + seconds

    def make_calls(k):
        pool, number = Pool(), 0
        while time.monotonic() < end and not faults:
            try:
                counts[k] += fuzz.run_case(f"{seed} {k}", number, pool, _cpu.isa)
            except Exception as error:
                faults.append(f"thread {k}, case {number}\n{fuzz.describe(error)}")
            number += 1

    threads = [threading.Thread(target=make_calls, args=(k,)) for k in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults, faults[0]
    return sum(counts)


def main():
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("attack", choices=("inputs", "threads"))
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    warnings.simplefilter("error")
    sys.setswitchinterval(1e-5)  # instead of 5 ms, during which nobody else could run
    if arguments.attack == "inputs":
        n_made, n_raised = attack_inputs(arguments.seconds, arguments.seed)
        print(f"{n_made} calls on changing inputs, of which {n_raised} raised")
    else:
        print(f"{attack_threads(arguments.seconds, arguments.seed)} calls in 8 threads")


if __name__ == "__main__":
    main()
