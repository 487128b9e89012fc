"""Benchmarks that nobody runs rot: each is run once here, on tiny problems."""

import importlib
import inspect
import os
import pkgutil
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import fastce
from cases import make_logits, make_target
from fastce import _reference
from fastce._benchmarks import cases, measure, steps, timing
from fastce._benchmarks.cases import Case

FOLDER = Path(__file__).parent.parent / "asv_bench"
KINDS = ("time_", "timeraw_", "peakmem_", "mem_", "track_")  # asv's prefixes
SCRIPTS = ("boosting", "compare", "gradients", "linear", "logistic", "ratios", "steps", "training")


def shrink(shape):
    """Return a tiny shape."""
    return tuple(min(n, 12) for n in shape)


@pytest.fixture
def scripts(monkeypatch):
    """The folder of the benchmarks is where modules are imported from; all that it holds is forgotten afterwards."""
    if not FOLDER.exists():
        pytest.skip("the tests are here without the benchmarks")
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(timing, "PAUSE", 0)
    monkeypatch.setattr(timing, "MIN_SAMPLE", 0)
    monkeypatch.setattr(steps, "TURN", 0)
    for name in ("TABLE", "MAP", "SECOND"):
        small = dict.fromkeys(replace(case, shape=shrink(case.shape)) for case in getattr(cases, name))
        monkeypatch.setattr(cases, name, [*small])
    yield
    for name in [name for name in sys.modules if name.partition(".")[0] in ("benchmarks", *SCRIPTS)]:
        del sys.modules[name]


def copy_without_harness(folder):
    """Copy the package, as an older version would be."""
    ignored = shutil.ignore_patterns("_benchmarks", "*.c", "__pycache__")
    shutil.copytree(Path(fastce.__file__).parent, folder / "fastce", ignore=ignored)


def run_python(arguments, **options):
    """Return the process when it has ended."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, **options)


@pytest.fixture
def benchmarks(scripts, monkeypatch):
    """The modules that asv looks into, by name, with tiny shapes."""
    package = importlib.import_module("benchmarks")
    names = [info.name for info in pkgutil.walk_packages(package.__path__, "benchmarks.")]
    modules = {name.partition(".")[2]: importlib.import_module(name) for name in names}
    monkeypatch.setattr(modules["axes"], "BASE", Case((12, 12), n_threads=2))
    monkeypatch.setattr(modules["axes"], "parse_shape", lambda name: shrink(cases.parse_shape(name)))
    return modules


def find_benchmarks(modules):
    """Return (class, method names) of what asv would find."""
    found = []
    for module in modules.values():
        for name, value in inspect.getmembers(module):
            assert not (name.startswith(KINDS) and callable(value)), f"asv takes {name} for a benchmark"
            if inspect.isclass(value) and not name.startswith("_"):
                members = inspect.getmembers(value, inspect.isfunction)
                if methods := [method for method, _ in members if method.startswith(KINDS)]:
                    found.append((value, methods))
    return found


def test_every_benchmark_runs(benchmarks):
    found = find_benchmarks(benchmarks)
    assert found
    isa = fastce._cpu.isa
    for cls, methods in found:
        ran = 0
        for value in cls.params:
            for method in methods:
                benchmark = cls()
                try:
                    benchmark.setup(value)
                    result = getattr(benchmark, method)(value)
                    assert not method.startswith("track_") or not result < 0, (cls, method, value, result)
                    ran += 1
                except NotImplementedError:  # what asv shows as n/a
                    assert not benchmark.case.is_supported()
                finally:
                    benchmark.teardown(value)
        assert ran > 0, cls
    assert fastce._cpu.isa == isa


def test_older_versions_are_measured_by_this_checkouts_harness(tmp_path):
    """Here by a copy of this version, without the harness."""
    if not FOLDER.exists():
        pytest.skip("the tests are here without the benchmarks")
    copy_without_harness(tmp_path)
    code = "import benchmarks.axes, fastce; print(fastce.__file__, fastce._benchmarks.__file__)"
    expected = [tmp_path / "fastce" / "__init__.py", FOLDER.parent / "fastce" / "_benchmarks" / "__init__.py"]
    if not expected[1].exists():
        pytest.skip("the benchmarks are here without the package")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(FOLDER)])}
    done = run_python(["-c", code], cwd=tmp_path, env=environment)
    assert done.stdout.split() == list(map(str, expected)), done.stderr


def test_timed_calls_meet_fresh_logits_and_the_instruction_set_asked_for(monkeypatch):
    monkeypatch.setattr(timing, "MIN_SAMPLE", 0)
    case = Case((12, 12), isa=fastce._cpu.supported_isas[0], n_threads=2)
    expected = cases.make_logits(case)
    seen = []

    def spoil(name, logits):
        def call():
            seen.append((name, np.array_equal(logits, expected), fastce._cpu.isa))
            logits[...] = np.nan

        return call

    monkeypatch.setattr(measure, "make_call", lambda case, logits, operands: spoil("call", logits))
    monkeypatch.setattr(
        measure, "make_floors", lambda kind, logits, n: [spoil("floor", logits), spoil("floor", logits)]
    )
    (result,) = measure.measure([case], rounds=3).values()
    assert result.floor > 0 and result.seconds > 0 and result.multiple == result.seconds / result.floor
    selected = fastce._cpu.isa
    expected_calls = [("call", True, case.isa), ("floor", True, selected), ("floor", True, selected)]
    for number in range(3):  # in every round another one is the first
        assert seen[3 * number :][:3] == expected_calls[number:] + expected_calls[:number]


def test_the_lower_quartile_of_the_fastest_way_counts():
    samples = {"a": [[9, 1, 2, 3, 4, 5, 6, 7], [8] * 8], "b": [[5] * 8]}
    ways = {name: [iter(way).__next__ for way in several] for name, several in samples.items()}
    assert timing.run_rounds(ways, rounds=8) == {"a": 3, "b": 5}


def test_samples_are_means_of_calls_after_what_comes_before(monkeypatch):
    now, log = 0.0, []

    def call():
        nonlocal now
        now += 2
        log.append("call")

    def before():
        nonlocal now
        now += 100
        log.append("before")

    monkeypatch.setattr(timing.time, "perf_counter", lambda: now)
    assert timing.sample(call, before, at_least=5) == 2
    assert log == ["before", "call"] * 3


WAKE = """
import os
from fastce._benchmarks.measure import wake_threads

before = len(os.listdir("/proc/self/task"))
wake_threads(3)
print(1 + len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads")
def test_threads_are_awake_when_time_is_taken():
    if not fastce.show_config(mode="dicts")["build"]["openmp"]:
        pytest.skip("built without OpenMP")
    done = run_python(["-c", WAKE], env=os.environ | {"OMP_NUM_THREADS": "3"})  # there need not be three processors
    assert done.stdout.strip() == "3", done.stderr


def test_the_error_in_ulp_sees_a_unit_of_the_last_place(benchmarks, monkeypatch, dtype):
    accuracy = benchmarks["accuracy"]
    case = Case((12, 12), np.dtype(dtype).name)
    if np.isnan(accuracy.worst_ulp(case)):
        pytest.skip("long double is no longer than double here")
    assert accuracy.worst_ulp(case) < 12
    exact = fastce.cross_entropy_with_grad

    def off(logits, target, **options):
        loss, grad = exact(logits, target, **options)
        return loss + 100 * np.spacing(loss), grad

    monkeypatch.setattr(fastce, "cross_entropy_with_grad", off)
    assert 88 < accuracy.worst_ulp(case) < 112


@pytest.mark.parametrize("layout", ["C", "F", "strided"])
def test_layouts_are_what_their_names_say(layout):
    logits = cases.make_logits(Case((5, 4, 3), layout=layout))
    flags = {"C": logits.flags.c_contiguous, "F": logits.flags.f_contiguous, "strided": not logits.flags.forc}
    assert logits.shape == (5, 4, 3) and flags[layout]


def test_ulps_are_measured_on_few_rows_of_all_classes(benchmarks):
    accuracy = benchmarks["accuracy"]
    for shape in [(65536, 1000), (1, 150, 512, 512), (16, 21, 512, 512)]:
        small = accuracy.shrink(shape)
        assert small[1] == shape[1] and accuracy.SIZE_LIMIT // 4 < np.prod(small) <= accuracy.SIZE_LIMIT
    assert accuracy.shrink((7, 3)) == (7, 3)
    assert accuracy.shrink((1024, 1 << 20)) == (1, 1 << 20)


@pytest.mark.parametrize("option", ["--table", "--map", "--second"])
def test_the_tables_of_ratios_are_printed(scripts, capsys, option):
    ratios = importlib.import_module("ratios")
    isa = fastce._cpu.supported_isas[0]
    ratios.main(["--isa", isa, "--rounds", "1", "--n-threads", "1", "3", option])
    output = capsys.readouterr()
    head, _, *rows = map(split_row, output.out.splitlines())
    assert head == ["case", "isa", "threads", "floor, us", "time, us", "floors", "float32"]
    chosen = [case for case in ratios.TABLES[option][0] if case.is_supported()]
    assert len(chosen) + output.err.count("not supported") == len(ratios.TABLES[option][0]) > 0
    assert [row[:3] for row in rows] == [[case.name, isa, n] for case in chosen for n in "13"]
    # Two places are printed. One round on a machine with other work may be hundreds of times as long as another.
    for *_, floor, seconds, floors, float32 in rows:
        assert float(floors) == pytest.approx(float(seconds) / float(floor), rel=0.1, abs=0.01)
        assert float32 == "-" or float(float32) >= 0
    assert all((row[-1] != "-") == ("float16" in row[0]) for row in rows)


OTHER_BUILD = """
import sys

import numpy as np

import fastce
from compare import OtherBuild

base = OtherBuild(sys.argv[1])
x, y = np.zeros((3, 4), np.float32), np.arange(3)
for isa in fastce._cpu.supported_isas:
    with base.active(), base.package._cpu.use_isa(isa):
        assert base.package._cpu.kernels.__file__.startswith(sys.argv[1])
        base.package.cross_entropy(x, y)
    with fastce._cpu.use_isa(isa):
        assert not fastce._cpu.kernels.__file__.startswith(sys.argv[1])
        fastce.cross_entropy(x, y)
assert base.package is not fastce and sys.modules["fastce"] is fastce
print("apart")
"""

COMPARE = """
import sys

import compare

compare.SHORT = 0
sys.exit(compare.main(sys.argv[1:]))
"""


def test_two_builds_are_compared_in_one_process(scripts, tmp_path):
    """The other one is a copy without the harness."""
    copy_without_harness(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(Path(fastce.__file__).parent.parent)}
    done = run_python(["-c", OTHER_BUILD, tmp_path], cwd=FOLDER, env=environment)
    assert done.stdout == "apart\n", done.stderr

    arguments = [tmp_path, "--cases", "32x10", "32x10-product", "--n-threads", "1", "--rounds", "1"]
    for limit, status, n_times in ((1e9, 0, 1), (-100, 1, 2)):  # nothing is slower, or everything: measured again
        done = run_python(["-c", COMPARE, *arguments, "--limit", str(limit)], cwd=FOLDER, env=environment)
        assert done.returncode == status, done.stderr
        head, _, *rows = map(split_row, done.stdout.splitlines())
        assert head == ["case", "isa", "threads", "base, us", "new, us", "new / base"]
        variants = [(name, isa) for name in ("32x10", "32x10-product") for isa in fastce._cpu.supported_isas]
        assert [row[:3] for row in rows] == [[*variant, "1"] for variant in variants for _ in range(n_times)]
        # Printed to three places: on a busy machine the ratio of two calls may be 0.02.
        assert all(float(row[5]) == pytest.approx(float(row[4]) / float(row[3]), rel=0.02, abs=0.001) for row in rows)
        assert done.stderr.count("slower: ") == (len(variants) if status else 0)

    for folder in (tmp_path / "nothing", environment["PYTHONPATH"]):
        done = run_python(["compare.py", folder], cwd=FOLDER, env=environment)
        assert done.returncode == 1 and "holds no other fastce" in done.stderr


@pytest.mark.parametrize("busy", [False, True])
def test_steps_with_products_and_rounds_are_printed(scripts, capsys, busy):
    pytest.importorskip("sklearn")
    program = importlib.import_module("steps")
    missing = [name for name in program.LIBRARIES if importlib.util.find_spec(name) is None]
    skipped = ["predictions", "boosting"] if busy else ["boosting"] * bool(missing)
    arguments = ["--runs", "2", "--rounds", "1", "--turn", "0", "--boosting", "200", "3", "3", "1", "--skip", *skipped]
    program.main([*arguments, *["--busy"] * busy])
    head, *lines, worst = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"threads: \d+; waiting: .+", head)
    rows = [line for line in lines if line.startswith("  ")]
    titles = [row.partition(":")[0].strip() for row in rows]
    n = len(rows) // 2
    assert titles[:n] == titles[n:]
    assert n == 4 + 4 * ("predictions" not in skipped) + 2 * ("boosting" not in skipped)
    assert titles[:4] == [step.name for step in program.STEPS]
    assert busy or titles[4] == "predict_proba-1x64x10"
    time = r"[A-Za-z -]+ \d+\.\d{3}"
    assert all(re.fullmatch(rf"  [^:]+: {time}(, {time})+ ms; ratio \d+\.\d\d", row) for row in rows)
    assert worst.startswith("worst ratios: step-64x256x1000 ")


def test_the_cost_of_a_linear_layer_is_printed(scripts, capsys):
    linear = importlib.import_module("linear")
    linear.main(["--shape", "300", "8", "2000", "--mib", "1", "64", "--rounds", "1", "--bias"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "300 x 8 x 2000, 1 rounds, with bias"
    pattern = r"  {} MiB: \d+\.\d+ s, products \d+\.\d+ s, ratio \d+\.\d+(, peak -?\d+ MiB)?{}"
    assert re.fullmatch(pattern.format(1, ""), rows[0]) and re.fullmatch(pattern.format(64, r" \(default\)"), rows[1])


def test_the_cost_of_new_gradients_is_printed(scripts, capsys):
    gradients = importlib.import_module("gradients")
    gradients.main(["--shapes", "12x30", "5x7", "--rounds", "1", "--n-threads", "1"])
    head, _, *rows = map(split_row, capsys.readouterr().out.splitlines())
    assert head == ["logits", "new array", "out=grad", "reuse_grad", "out=logits"]
    assert [row[0] for row in rows] == ["12x30", "5x7"]
    assert all(re.fullmatch(r"\d+\.\d\d", cell) for row in rows for cell in row[1:])


def test_the_ways_to_new_gradients_agree(scripts):
    gradients = importlib.import_module("gradients")
    logits, target = make_logits(np.random.default_rng(0), (12, 30), np.float32), np.arange(12)
    expected = _reference.cross_entropy(logits, target)
    grads = {}
    for name, call in gradients.make_calls(logits, target, 2).items():  # the last one overwrites the logits
        loss, grads[name] = call()
        np.testing.assert_allclose(loss, expected.loss, rtol=1e-6)
        np.testing.assert_allclose(grads[name], expected.grad, atol=1e-7)
    assert grads["out=logits"] is logits


def test_steps_of_training_are_printed(scripts, capsys):
    pytest.importorskip("torch")
    training = importlib.import_module("training")
    training.main(["--logits", "60", "30", "--linear", "30", "8", "20", "--rounds", "1"])
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(" ")]
    assert len(rows) >= 4
    pattern = r"  [a-z. ]+: \d+\.\d+ ms, ratio \d+\.\d+, largest difference \d\.\de[+-]\d+"
    assert all(re.fullmatch(pattern, row) for row in rows)
    assert all(float(row.rpartition(" ")[2]) < 1e-5 for row in rows)


def test_rounds_of_boosting_are_printed(scripts, capsys):
    versions = [pytest.importorskip(name).__version__ for name in ("xgboost", "lightgbm")]
    pytest.importorskip("sklearn")
    importlib.import_module("boosting").main(["--shape", "300", "5", "4", "--rounds", "2", "--n-threads", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "digits: 1797 x 64, 10 classes, 2 rounds" and lines[7] == "made up: 300 x 5, 4 classes, 2 rounds"
    time = r" +\d+\.\d+ ms a round, ratio \d+\.\d+"
    others = r", objective \d+\.\d+ ms, margins differ by \d\.\de[-+]\d\d"
    for first in (1, 8):
        for start, version in zip((first, first + 3), versions, strict=True):
            for line, who in zip(lines[start:], ("built-in", "fastce", "NumPy"), strict=False):
                tail = "" if who == "built-in" else others
                assert re.fullmatch(rf"  \w+ {re.escape(version)}, {who}:{time}{tail}", line)


def compile_program(compiler, source, program):
    """Compile a C program with OpenMP; return the process when it has ended."""
    options = ["-O3", "-Wall", "-Wextra", "-Werror", "-fopenmp", "-x", "c", "-", "-x", "none", "-o", program, "-lm"]
    return subprocess.run([*compiler, *options], input=source, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("compiler", [os.environ.get("CC", "cc"), "clang"])
def test_the_floors_of_a_machine_are_printed(scripts, tmp_path, compiler):
    """On arrays that are in a cache: what is measured says nothing, but the tables agree with themselves."""
    compiler, program = shlex.split(compiler), tmp_path / "floor"
    if shutil.which(compiler[0]) is None:
        pytest.skip("needs a C compiler")
    if compile_program(compiler, "#include <omp.h>\nint main(void) { return 0; }", program).returncode:
        pytest.skip("the compiler has no OpenMP")
    done = compile_program(compiler, (FOLDER / "floor.c").read_text(), program)
    assert done.returncode == 0, done.stderr
    assert subprocess.run([program, "0"], capture_output=True, timeout=60, check=False).returncode == 2

    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}  # there need not be three processors
    done = subprocess.run([program, "3", "1"], env=environment, capture_output=True, text=True, timeout=60, check=True)
    of_floors, _, of_overlaps = done.stdout.partition("\n\nns for a line of 64 bytes, with its exponentials\n")
    machine, rounds, _, _, head, _, *floors = of_floors.splitlines()
    assert re.fullmatch(r"\d+ processors; caches of \d+, \d+ and \d+ KiB; two arrays of 1 MiB in DRAM", machine)
    match = re.fullmatch(r"vectors of (16|32|64) bytes; exponentials within (\S+) of .*; .* of \d+ rounds", rounds)
    # The term that is missing is 0.35**7 / 5040, and to round 10 * log2(e) costs up to 3.3e-7.
    assert 0 < float(match[2]) < 1e-6
    assert split_row(head) == ["threads", "place", "reading", "x *= 1", "copy", "non-temporal copy"]
    rows = [split_row(line) for line in floors]
    assert [row[:2] for row in rows] == [[n, place] for n in "123" for place in ("L1", "L2", "L3", "DRAM")]
    times = {}  # those that the other table repeats
    for n, place, *cells in rows:
        assert place == "L3" or cells[2] != "not available"
        for cell, n_moved in zip(cells, (1, 2, 2, 2), strict=True):
            if cell != "not available":
                ns, rate = map(float, re.fullmatch(r"(\S+) \( *(\S+)\)", cell).groups())
                assert ns > 0 and rate == pytest.approx(n_moved * 64 / ns, rel=0.02, abs=0.1)
        if place == "DRAM":
            times[n] = [cell.partition(" ")[0] for cell in cells[:2]]

    head, _, *overlaps = of_overlaps.splitlines()
    assert split_row(head) == ["threads", "while", "memory", "arithmetic", "both", "floors", "overlap"]
    for n, what, *cells in map(split_row, overlaps):
        assert cells[0] == times[n][what.startswith("x *= 1")]
        memory, arithmetic, both, multiple, overlap = map(float, cells)
        assert multiple == pytest.approx(both / memory, rel=0.02, abs=0.01)
        assert overlap == pytest.approx((memory + arithmetic - both) / min(memory, arithmetic), rel=0.02, abs=0.03)
    assert len(overlaps) == 3 * 16


def split_row(line):
    """Return the cells of a row of a table."""
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (100, 10), (20, 1000)])
def test_the_baseline_computes_what_it_is_compared_with(dtype, shape, rng):
    logits, target = make_logits(rng, shape, dtype), make_target(rng, "index", shape)
    kept = logits.copy()
    loss, grad = _reference.numpy_loss_and_grad(logits, target)
    expected = _reference.cross_entropy(logits, target)
    eps = np.finfo(dtype).eps
    assert grad.dtype == dtype
    np.testing.assert_allclose(loss, expected.loss, rtol=0, atol=16 * eps * (1 + expected.loss))
    np.testing.assert_allclose(grad, expected.grad, rtol=0, atol=16 * eps / shape[0])
    np.testing.assert_array_equal(logits, kept)
