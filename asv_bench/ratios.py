"""Print what loss and gradient cost in multiples of the memory floor: python asv_bench/ratios.py.

The floor of a loss is `logits.max()`, of a gradient in place `logits *= 1`, of one in a new array a copy, by NumPy in
as many threads: one call, or one for each thread on equal parts, whichever is faster. Every figure is a lower quartile
over interleaved rounds, see benchmarks/measure.py. Needs a quiet machine and 3 GiB of memory.
"""

import argparse
from dataclasses import replace

from benchmarks.measure import ROUNDS, floor_of, typical_seconds
from benchmarks.problems import Case, takes_dtype
from fastce import _cpu

TABLE = [Case("65536x1000"), Case("4096x32000"), Case("1024x128256"), Case("4096x16000", "float64")]
COLUMNS = {
    "loss": {"call": "loss"},
    "loss+gradient": {},
    "... in a new array": {"call": "new gradient"},
    "... four options": {"option": "four"},
    "... probabilities": {"option": "probabilities"},
}

SECOND = [
    *TABLE[:2],
    Case("65536x100"),
    Case("1000000x10"),
    Case("1000000x10", layout="F"),
    Case("16x21x256x256"),
]
SECOND_COLUMNS = {
    "product": {"call": "product"},
    "... softcap": {"call": "product", "option": "softcap"},
    "gradient+diagonal": {"call": "gradient+diagonal"},
}

MAP = [
    Case("1000000x2"),
    Case("1000000x3"),
    Case("1000000x10"),
    Case("400000x32"),
    Case("65536x100"),
    Case("256x1000"),
    Case("1000000x10", layout="F"),
    Case("16x21x512x512"),
    Case("1x150x512x512"),
    Case("4096x32000", "bfloat16"),
    Case("4096x32000", "float16"),
    Case("32x10"),
    Case("32x10", option="losses"),
    Case("32x10", option="probabilities"),
    Case("32x10", call="product"),
    Case("32x10", call="gradient+diagonal"),
]


def title(case):
    """Return the problem's name."""
    order = " Fortran" if case.layout == "F" else ""
    others = (f", {word}" for word in (case.option, case.call) if word not in ("plain", "loss+gradient"))
    return f"{case.shape.replace('x', ' x ')} {case.dtype}{order}{''.join(others)}"


def print_table(isas, n_threads, rounds, table=TABLE, columns=COLUMNS):
    """Print a line of all columns for each shape and instruction set."""
    for base in table:
        cases = {
            (isa, name): replace(base, isa=isa, n_threads=n_threads, **changes)
            for isa in isas
            for name, changes in columns.items()
        }
        floors = {way for case in cases.values() for way in case.floors}
        seconds = typical_seconds([*sorted(floors, key=str), *cases.values()], rounds)
        in_place = floor_of(replace(base, n_threads=n_threads), seconds)
        print(f"{title(base)}: floor {1e3 * in_place:.2f} ms", flush=True)
        for isa in isas:
            each = ((name, cases[isa, name]) for name in columns)
            line = (f"{name} {seconds[case] / floor_of(case, seconds):.2f}" for name, case in each)
            print(f"  {isa:9s}", ", ".join(line), flush=True)


def print_map(isas, n_threads, rounds):
    """Print loss and gradient for each problem and instruction set, and what more threads than one bring."""
    for base in MAP:
        if not takes_dtype(base.dtype):
            print(f"{title(base)}: not supported")
            continue
        cases = [replace(base, isa=isa, n_threads=n) for isa in isas for n in (1, n_threads)]
        float32 = {case: replace(case, dtype="float32") for case in cases}
        ways = {way for case in cases for way in case.floors}
        seconds = typical_seconds([*sorted(ways, key=str), *cases, *float32.values()], rounds)
        floors = {case: floor_of(case, seconds) for case in cases}
        # What tells most: of 16 bits what they save, of a tiny problem what a call costs.
        if base.dtype != "float32":
            unit, divisor = "times float32", {case: seconds[float32[case]] for case in cases}
        elif base.shape == "32x10":
            unit, divisor = "microseconds per call", dict.fromkeys(cases, 1e-6)
        else:
            unit, divisor = "floors", floors
        print(f"{title(base)}: floor {1e3 * min(floors.values()):.4f} ms; in {unit}", flush=True)
        for one, many in zip(cases[::2], cases[1::2], strict=True):
            line = (f"{n} {seconds[case] / divisor[case]:.2f}" for n, case in ((1, one), (n_threads, many)))
            print(f"  {one.isa:9s} threads", ", ".join(line), end=", ")
            print(f"{n_threads} threads / 1 thread {seconds[many] / seconds[one]:.2f}", flush=True)


def main(arguments=None):
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--isa", nargs="+", default=_cpu.supported_isas, choices=_cpu.supported_isas)
    parser.add_argument("--n-threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--map", action="store_true", help="loss and gradient alone, of more shapes, layouts and types")
    parser.add_argument("--second", action="store_true", help="the second derivatives instead")
    options = parser.parse_args(arguments)
    arguments = options.isa, options.n_threads, options.rounds
    if options.second:
        print_table(*arguments, SECOND, SECOND_COLUMNS)
    else:
        print_map(*arguments) if options.map else print_table(*arguments)


if __name__ == "__main__":
    main()
