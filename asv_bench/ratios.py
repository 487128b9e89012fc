"""Print what loss and gradient cost in multiples of the floor, `logits *= 1` in place: python asv_bench/ratios.py.

Every figure is a median over rounds; in each round everything runs once, on fresh logits, so that a change of the
machine's speed meets all alike. Needs a quiet machine and 3 GiB of memory.
"""

import argparse
import time

import numpy as np

import fastce
from fastce import _cpu

SHAPES = [(65536, 1000, "float32"), (4096, 32000, "float32"), (1024, 128256, "float32"), (4096, 16000, "float64")]


def make_cases(logits, n_threads):
    """Return what is timed: name and call. All work on `logits` in place, but for the plain loss."""
    rng = np.random.default_rng(1)
    n_rows, n_classes = logits.shape
    target = rng.integers(0, n_classes, n_rows)
    prob = rng.random(logits.shape, dtype=logits.dtype)
    options = {
        "weight": (0.5 + rng.random(n_classes)).astype(logits.dtype),
        "sample_weight": 0.5 + rng.random(n_rows),
        "label_smoothing": 0.1,
        "z_loss": 1e-4,
    }

    def grad(target, **options):
        fastce.cross_entropy_with_grad(logits, target, out=logits, n_threads=n_threads, **options)

    return {
        "loss": lambda: fastce.cross_entropy(logits, target, n_threads=n_threads),
        "loss+gradient": lambda: grad(target),
        "... four options": lambda: grad(target, **options),
        "... probabilities": lambda: grad(prob),
    }


def measure(shape, isas, n_threads, rounds):
    """Return the median seconds of the floor and of each case on each instruction set."""
    *size, dtype = shape
    original = np.random.default_rng(0).standard_normal(size, dtype=dtype)
    logits = original.copy()
    one = logits.dtype.type(1)
    cases = make_cases(logits, n_threads)
    seconds = {}
    for _ in range(rounds):
        for isa, name in [("", "floor"), *((isa, name) for isa in isas for name in cases)]:
            np.copyto(logits, original)
            with _cpu.use_isa(isa or _cpu.isa):
                start = time.perf_counter()
                if isa:
                    cases[name]()
                else:
                    np.multiply(logits, one, out=logits)
                seconds.setdefault((isa, name), []).append(time.perf_counter() - start)
    return {key: float(np.median(times)) for key, times in seconds.items()}


def main():
    """Measure and print a line for each shape and instruction set."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--isa", nargs="+", default=_cpu.supported_isas, choices=_cpu.supported_isas)
    parser.add_argument("--n-threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=11)
    arguments = parser.parse_args()
    for shape in SHAPES:
        medians = measure(shape, arguments.isa, arguments.n_threads, arguments.rounds)
        floor = medians.pop(("", "floor"))
        print(f"{shape[0]} x {shape[1]} {shape[2]}: floor {1e3 * floor:.2f} ms", flush=True)
        for isa in arguments.isa:
            line = (f"{name} {medians[isa, name] / floor:.2f}" for name in ("loss", "loss+gradient"))
            more = (f"{name} {medians[isa, name] / floor:.2f}" for name in ("... four options", "... probabilities"))
            print(f"  {isa:9s}", ", ".join([*line, *more]), flush=True)


if __name__ == "__main__":
    main()
