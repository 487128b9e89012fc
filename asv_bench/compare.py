"""Compare the speed of another build of the package with this one: python asv_bench/compare.py PATH_TO_OTHER_CHECKOUT.

Both are loaded into one process and work on the same arrays in the same rounds, in turn; lower quartiles. `base` is the
other build, `new` the one at hand. Cases that became slower by more than --limit percent are measured again, and listed
if that confirms it; then the exit status is 1. By default all tables are measured, calls of 32 x 10 among them, which
takes long. Needs a quiet machine and 4 GiB of memory.
"""

import contextlib
import importlib.util
import os
import sys
from pathlib import Path

import fastce
from fastce._benchmarks.cases import Logits
from fastce._benchmarks.measure import make_call, make_operands, make_sampler
from fastce._benchmarks.report import Table, note
from fastce._benchmarks.timing import MIN_SAMPLE, run_rounds
from ratios import TABLES, choose, make_parser

PACKAGE = "fastce"
SHORT = 0.2  # s: short calls get so many rounds that each build's samples take as long together


class OtherBuild:
    """The package in another folder. Its modules have the names of this one's, so they are known only within `active`.

    That includes what it imports when it is called, such as the kernels of another instruction set.
    """

    def __init__(self, folder):
        self._modules = {}
        sys.path.insert(0, os.fspath(folder))
        try:
            with self.active():
                found = Path(importlib.util.find_spec(PACKAGE).origin)
                if not found.is_relative_to(folder) or found.samefile(fastce.__file__):
                    raise SystemExit(f"{folder} holds no other {PACKAGE}: found {found}")
                self.package = importlib.import_module(PACKAGE)
        finally:
            sys.path.remove(os.fspath(folder))

    @contextlib.contextmanager
    def active(self):
        """Let imports find this build."""
        own = _remove_modules()
        sys.modules.update(self._modules)
        try:
            yield
        finally:
            self._modules = _remove_modules()
            sys.modules.update(own)


def _remove_modules():
    names = [name for name in sys.modules if name.partition(".")[0] == PACKAGE]
    return {name: sys.modules.pop(name) for name in names}


def compare(case, logits, base, rounds):
    """Return the seconds of base and new, from `rounds` or more."""
    operands = make_operands(case, logits.array)
    take_base, take_new = (
        make_sampler(case, make_call(case, logits.array, operands, package), logits, package)
        for package in (base.package, fastce)
    )

    def take_base_alone():
        with base.active():
            return take_base()

    take_base_alone()  # warms up
    rounds = max(rounds, int(SHORT / max(MIN_SAMPLE, take_new())))
    seconds = run_rounds({"base": [take_base_alone], "new": [take_new]}, rounds, case.name)
    return seconds["base"], seconds["new"]


def main(arguments=None):
    """Measure and print; return the exit status."""
    parser = make_parser(__doc__)
    parser.add_argument("folder", type=Path, help="a checkout, or a folder with the package in it, with built kernels")
    parser.add_argument("--limit", type=float, default=3, metavar="PERCENT", help="that a case may be slower")
    options = parser.parse_args(arguments)
    base = OtherBuild(options.folder.resolve())
    note(f"base: {base.package.__file__}; new: {fastce.__file__}")
    options.tables = options.tables or [*TABLES]
    options.isa = [isa for isa in options.isa if isa in base.package._cpu.supported_isas]
    chosen = choose(options)
    table = Table(["case", "isa", "threads", "base, us", "new, us", "new / base"], [case.name for case in chosen])
    slower = []
    for case, variants in chosen.items():
        logits = Logits(case)
        for variant in variants:
            # What looks slower is measured once more: a disturbance may last longer than most of the rounds.
            for _ in range(2):
                old, new = compare(variant, logits, base, options.rounds)
                cells = variant.isa, str(variant.n_threads), f"{1e6 * old:.2f}", f"{1e6 * new:.2f}", f"{new / old:.3f}"
                table.print(case.name, *cells)
                if new / old <= 1 + options.limit / 100:
                    break
            else:
                slower.append(variant)
    for variant in slower:
        note(f"slower: {variant.name}, {variant.isa}, n_threads={variant.n_threads}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
