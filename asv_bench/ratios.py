"""Print what calls cost in multiples of the memory floor: python asv_bench/ratios.py.

The floor of a loss is `logits.max()`, of a gradient in place `logits *= 1`, of one in another array or in a new one the
faster of `np.copyto` and `np.multiply` by 1, by NumPy in as many threads: one call, or one for each thread on equal
parts, whichever is faster. 16-bit logits are also compared with float32. Every figure is a lower quartile over
interleaved rounds. Needs a quiet machine and 4 GiB of memory.
"""

import argparse
from dataclasses import replace

from fastce import _cpu
from fastce._benchmarks.cases import MAP, SECOND, TABLE
from fastce._benchmarks.measure import measure
from fastce._benchmarks.report import Table, note
from fastce._benchmarks.timing import ROUNDS

TABLES = {
    "--table": (TABLE, "loss and gradient, with options, in and out of place"),
    "--map": (MAP, "loss and gradient of many shapes, layouts and types, and tiny calls"),
    "--second": (SECOND, "second derivatives"),
}


def make_parser(description):
    """Return a parser of the options that say what is measured."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("--isa", nargs="+", default=_cpu.supported_isas, choices=_cpu.supported_isas)
    parser.add_argument("--n-threads", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    for option, (_, what) in TABLES.items():
        parser.add_argument(option, dest="tables", action="append_const", const=option, help=what)
    parser.add_argument("--cases", nargs="+", metavar="NAME", help="only those of these names, as the tables show them")
    return parser


def choose(options):
    """Return the cases that the options ask for, each with its variants: instruction sets and numbers of threads."""
    cases = [case for option in options.tables or ["--table"] for case in TABLES[option][0]]
    if options.cases:
        every = {case.name: case for table, _ in TABLES.values() for case in table}
        if unknown := [name for name in options.cases if name not in every]:
            raise SystemExit(f"no such case: {', '.join(unknown)}; there are {', '.join(every)}")
        cases = [every[name] for name in options.cases]
    chosen = {}
    for case in cases:
        if case.is_supported():
            chosen[case] = [replace(case, isa=isa, n_threads=n) for isa in options.isa for n in options.n_threads]
        else:
            note(f"{case.name}: not supported")
    return chosen


def main(arguments=None):
    """Measure and print."""
    options = make_parser(__doc__).parse_args(arguments)
    chosen = choose(options)
    head = ["case", "isa", "threads", "floor, us", "time, us", "floors", "float32"]
    table = Table(head, [case.name for case in chosen])
    for case, variants in chosen.items():
        in_float32 = {
            variant: replace(variant, dtype="float32") for variant in variants if case.dtype in ("float16", "bfloat16")
        }
        results = measure([*variants, *in_float32.values()], options.rounds)
        for variant in variants:
            seconds, floor = results[variant]
            other = f"{seconds / results[in_float32[variant]].seconds:.2f}" if in_float32 else "-"
            figures = f"{1e6 * floor:.2f}", f"{1e6 * seconds:.2f}", f"{seconds / floor:.2f}", other
            table.print(case.name, variant.isa, str(variant.n_threads), *figures)


if __name__ == "__main__":
    main()
