"""Benchmarks that nobody runs rot: each is run once here, on tiny problems."""

import importlib
import inspect
import os
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import fastce
from cases import make_logits, make_target
from fastce import _reference

FOLDER = Path(__file__).parent.parent / "asv_bench"
KINDS = ("time_", "timeraw_", "peakmem_", "mem_", "track_")  # asv's prefixes


@pytest.fixture
def benchmarks(monkeypatch):
    """The package's modules by name, every shape of theirs shrunk; forgotten afterwards."""
    if not FOLDER.exists():
        pytest.skip("the tests are here without the benchmarks")
    monkeypatch.syspath_prepend(FOLDER)
    package = importlib.import_module("benchmarks")
    names = [info.name for info in pkgutil.walk_packages(package.__path__, "benchmarks.")]
    modules = {name.partition(".")[2]: importlib.import_module(name) for name in names}
    parse_shape = modules["problems"].parse_shape
    tiny = lambda name: tuple(min(n, 12) for n in parse_shape(name))  # noqa: E731
    monkeypatch.setattr(modules["problems"], "parse_shape", tiny)
    monkeypatch.setattr(modules["measure"], "SAMPLE_SECONDS", 0)
    for name in ("STEP_TURN", "STEP_PAUSE"):
        monkeypatch.setattr(modules["axes"], name, 0)
    yield modules
    ours = ("benchmarks", "boosting", "linear", "logistic", "ratios", "steps", "training")
    for name in [name for name in sys.modules if name.partition(".")[0] in ours]:
        del sys.modules[name]


def find_benchmarks(modules):
    """Return (class, method names) of what asv would find."""
    found = []
    for module in modules.values():
        for name, cls in inspect.getmembers(module, inspect.isclass):
            methods = [method for method, _ in inspect.getmembers(cls, inspect.isfunction) if method.startswith(KINDS)]
            if methods and not name.startswith("_"):
                found.append((cls, methods))
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


def test_timed_calls_meet_fresh_logits_and_the_instruction_set_asked_for(benchmarks, monkeypatch):
    measure, problems = benchmarks["measure"], benchmarks["problems"]
    case = problems.Case(isa=fastce._cpu.supported_isas[0])
    expected = problems.make_logits(*case.logits_key)
    seen = []

    def make_call(_, logits):
        def call():
            seen.append(np.array_equal(logits, expected) and fastce._cpu.isa)
            logits[...] = np.nan

        return call

    monkeypatch.setattr(measure, "make_call", make_call)
    seconds = measure.typical_seconds([*case.floors, case], rounds=3)
    assert list(seconds) == [*case.floors, case]
    assert seen == [*(way.isa for way in case.floors), case.isa] * 4  # three rounds after the one that warms up


WAKE = """
import os
from benchmarks.measure import wake_threads

before = len(os.listdir("/proc/self/task"))
wake_threads(3)
print(1 + len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="only Linux lists a process's threads")
def test_threads_are_awake_when_time_is_taken(benchmarks):
    if not fastce.show_config(mode="dicts")["build"]["openmp"]:
        pytest.skip("built without OpenMP")
    command = [sys.executable, "-c", WAKE]
    environment = os.environ | {"OMP_NUM_THREADS": "3"}  # there need not be three processors
    done = subprocess.run(command, cwd=FOLDER, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout.strip() == "3", done.stderr


def test_the_error_in_ulp_sees_a_unit_of_the_last_place(benchmarks, monkeypatch, dtype):
    accuracy, problems = benchmarks["accuracy"], benchmarks["problems"]
    case = problems.Case(dtype=np.dtype(dtype).name)
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
def test_layouts_are_what_their_names_say(benchmarks, layout):
    logits = benchmarks["problems"].make_logits((5, 4, 3), "float32", layout)
    flags = {"C": logits.flags.c_contiguous, "F": logits.flags.f_contiguous, "strided": not logits.flags.forc}
    assert logits.shape == (5, 4, 3) and flags[layout]


def test_ulps_are_measured_on_few_rows_of_all_classes(benchmarks):
    accuracy = benchmarks["accuracy"]
    for shape in [(65536, 1000), (1, 150, 512, 512), (16, 21, 512, 512)]:
        small = accuracy.shrink(shape)
        assert small[1] == shape[1] and accuracy.SIZE_LIMIT // 4 < np.prod(small) <= accuracy.SIZE_LIMIT
    assert accuracy.shrink((7, 3)) == (7, 3)
    assert accuracy.shrink((1024, 1 << 20)) == (1, 1 << 20)


def test_the_tables_of_ratios_are_printed(benchmarks, capsys):
    ratios = importlib.import_module("ratios")
    number = r"\d+\.\d\d"
    isa = fastce._cpu.supported_isas[0]
    ratios.main(["--isa", isa, "--rounds", "1"])
    heads, rows = split_output(capsys)
    assert [re.sub(number, "*", head) for head in heads] == [
        "65536 x 1000 float32: floor * ms",
        "4096 x 32000 float32: floor * ms",
        "1024 x 128256 float32: floor * ms",
        "4096 x 16000 float64: floor * ms",
    ]
    columns = r", ".join(rf"{re.escape(name)} {number}" for name in ratios.COLUMNS)
    assert all(re.fullmatch(rf"  {isa:9s} {columns}", row) for row in rows)

    ratios.main(["--isa", isa, "--rounds", "1", "--map", "--n-threads", "3"])
    heads, rows = split_output(capsys)
    assert len(heads) == len(ratios.MAP) and heads[-1].endswith("ms; in microseconds per call")
    columns = rf"threads 1 {number}, 3 {number}, 3 threads / 1 thread {number}"
    assert all(re.fullmatch(rf"  {isa:9s} {columns}", row) for row in rows)


@pytest.mark.parametrize("busy", [False, True])
def test_steps_with_products_and_rounds_are_printed(benchmarks, capsys, monkeypatch, busy):
    pytest.importorskip("sklearn")
    steps = importlib.import_module("steps")
    monkeypatch.setattr(steps, "PAUSE", 0)
    arguments = ["--runs", "2", "--rounds", "1", "--turn", "0", "--boosting", "200", "3", "3", "1"]
    missing = [name for name in steps.LIBRARIES if importlib.util.find_spec(name) is None]
    steps.main([*arguments, *["--busy"] * busy, *["--skip", "boosting"] * bool(missing)])
    head, *lines, worst = capsys.readouterr().out.splitlines()
    assert re.fullmatch(r"threads: \d+; waiting: .+", head)
    rows = [line for line in lines if line.startswith("  ")]
    titles = [row.partition(":")[0].strip() for row in rows]
    n = len(rows) // 2
    assert titles[:n] == titles[n:] and n == 8 + 2 * (not missing)
    assert titles[:5] == [*(step.name for step in steps.STEPS), "predict_proba-1x64x10"]
    time = r"[A-Za-z -]+ \d+\.\d{3}"
    assert all(re.fullmatch(rf"  [^:]+: {time}(, {time})+ ms; ratio \d+\.\d\d", row) for row in rows)
    assert worst.startswith("worst ratios: step-64x256x1000 ")


def test_the_cost_of_a_linear_layer_is_printed(benchmarks, capsys):
    linear = importlib.import_module("linear")
    linear.main(["--shape", "300", "8", "2000", "--mib", "1", "64", "--rounds", "1", "--bias"])
    head, *rows = capsys.readouterr().out.splitlines()
    assert head == "300 x 8 x 2000, 1 rounds, with bias"
    pattern = r"  {} MiB: \d+\.\d+ s, products \d+\.\d+ s, ratio \d+\.\d+(, peak -?\d+ MiB)?{}"
    assert re.fullmatch(pattern.format(1, ""), rows[0]) and re.fullmatch(pattern.format(64, r" \(default\)"), rows[1])


def test_steps_of_training_are_printed(benchmarks, capsys):
    pytest.importorskip("torch")
    training = importlib.import_module("training")
    training.main(["--logits", "60", "30", "--linear", "30", "8", "20", "--rounds", "1"])
    _, *lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(" ")]
    assert len(rows) >= 4
    number = r"\d+\.\d+"
    pattern = rf"  [a-z. ]+: {number} ms \({number} to {number}\), ratio {number}, largest difference \d\.\de[+-]\d+"
    assert all(re.fullmatch(pattern, row) for row in rows)
    assert all(float(row.rpartition(" ")[2]) < 1e-5 for row in rows)


def test_rounds_of_boosting_are_printed(benchmarks, capsys):
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


def split_output(capsys):
    """Return the lines that name a problem, and the others: one per instruction set."""
    lines = capsys.readouterr().out.splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    rows = [line for line in lines if line.startswith(" ")]
    assert len(rows) == sum(not head.endswith("not supported") for head in heads) > 0
    return heads, rows


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
