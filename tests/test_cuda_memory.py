"""No kernel touches what is not its operands', whatever these hold and whoever changes them meanwhile.

Operands lie at pages that nobody may touch: an access beyond ends the process. What remains of their last page, and
shared memory, is left to AddressSanitizer and to patterns that are looked at afterwards.
"""

import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import fake_cupy
import fastce
import fastce.cuda
from cases import OPTION_SETS, make_logits, make_target, options_for, slow_except
from device import LAYOUTS, copy_sources, device, solve_on, to_device
from fastce import _reference
from fastce._cuda import _program
from oracle import assert_matches_reference
from test_cuda import FEW, SHAPES

pytestmark = pytest.mark.skipif(
    not (sys.platform == "linux" and fake_cupy.compiler()), reason="the emulator needs g++ and Linux"
)

INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]


@pytest.fixture(scope="module")
def xp():
    with device("host") as module:
        yield module


@pytest.fixture(params=["before", "behind"])
def guard(request, monkeypatch):
    """New arrays lie at the end of what may be touched; in the end nothing around them may have changed."""
    monkeypatch.setattr(fake_cupy, "damages", [])
    monkeypatch.setattr(fake_cupy.settings, "guard", request.param)
    yield request.param
    assert not fake_cupy.damages


@pytest.mark.parametrize("kind", slow_except(["index"], ["index", "prob"]))
@pytest.mark.parametrize(
    "dtype", slow_except([np.float32], [np.float32, ml_dtypes.bfloat16]), ids=lambda t: np.dtype(t).name
)
@pytest.mark.parametrize("family", slow_except(FEW, SHAPES))
def test_operands_are_not_left(xp, guard, family, dtype, kind, rng):
    logits = make_logits(rng, SHAPES[family], dtype)
    target = make_target(rng, kind, logits.shape)
    target = target if kind == "index" else target.astype(np.float32)
    options = options_for(rng, OPTION_SETS["all"], kind, logits.shape)
    assert_matches_reference(solve_on(xp), logits, target, family, **options)
    out = to_device(xp, logits)
    fastce.softmax(out, axis=1, out=out)


@pytest.mark.parametrize("out_layout", LAYOUTS)
@pytest.mark.parametrize("layout", slow_except(["padded"], LAYOUTS))
def test_no_layout_leaves_its_operands(xp, guard, layout, out_layout, rng):
    """The gradient may lie otherwise than the logits; what lies between its numbers is left alone."""
    for shape in [(5, 7), (3, 170), (2, 3, 9)]:
        logits, target = make_logits(rng, shape, np.float32), make_target(rng, "index", shape)
        expected = _reference.cross_entropy(logits, target)
        x, out = to_device(xp, logits, layout), to_device(xp, np.zeros_like(logits), out_layout)
        _, grad = fastce.cross_entropy_with_grad(x, to_device(xp, target, layout), out=out)
        assert np.allclose(grad.get(), expected.grad, rtol=1e-4, atol=1e-7), (layout, out_layout, shape)
        assert np.array_equal(x.get(), logits)


def bad_classes(dtype, n_classes):
    """Return classes that do not exist, as near to the existing ones and as far from them as the type allows."""
    info = np.iinfo(dtype)
    wanted = [
        -1,
        n_classes,
        n_classes + 1,
        -n_classes,
        2 * n_classes,
        2**31,
        2**32,
        2**32 + 1,
        2**63,
        info.min,
        info.max,
    ]
    return sorted({k for k in wanted if info.min <= k <= info.max and not 0 <= k < n_classes})


@pytest.mark.parametrize("dtype", slow_except(["int64", "uint8"], INTEGERS))
@pytest.mark.parametrize("family", slow_except(["TILE", "BLOCK of 2"], FEW))
def test_no_class_leads_outside(xp, guard, family, dtype, rng):
    """Each bad class has the loss NaN and the gradient 0; the others, and the mean of these, are what they would be."""
    shape = SHAPES[family]
    logits = make_logits(rng, shape, np.float32)
    weight = rng.uniform(0.5, 2, shape[1])
    target = make_target(rng, "index", shape) % min(shape[1], np.iinfo(dtype).max + 1)
    target = target.astype(dtype)
    ignored = target[-1].flat[-1].item()
    options = {"ignore_index": ignored, "label_smoothing": 0.1}
    at = (0,) * target.ndim
    good = np.ones(target.shape, bool)
    good[at] = False
    for bad in bad_classes(dtype, shape[1]):
        target[at] = bad
        without = np.where(good, target, ignored).astype(np.int64)
        expected = _reference.cross_entropy(logits, without, weight=weight, **options)
        x, y = to_device(xp, logits), xp.asarray(target)
        loss, grad, stats = fastce.cross_entropy_with_grad(
            x, y, weight=xp.asarray(weight), out=x, return_stats=True, **options
        )
        assert np.isnan(float(loss))
        assert np.allclose(grad.get(), expected.grad, rtol=1e-4, atol=1e-7)
        assert np.array_equal(stats.argmax.get()[good], expected.stats.argmax[good])
        assert stats.argmax.get()[at] == -1
        message = re.escape(f"is {bad}, but there are {shape[1]} classes")
        with pytest.raises(IndexError, match=message):
            fastce.cuda.check_errors()
        # The same value as `ignore_index` is no error.
        loss = fastce.cross_entropy(to_device(xp, logits), y, ignore_index=bad, reduction="none").get()
        assert loss[at] == 0 and np.isfinite(loss).all()
        fastce.cuda.check_errors()


@pytest.mark.parametrize("softcap", slow_except([None], [None, 4.0]))
@pytest.mark.parametrize("kind", slow_except(["index"], ["index", "prob"]))
@pytest.mark.parametrize("family", FEW)
def test_rows_without_a_maximum_have_no_class(xp, guard, family, kind, softcap, rng):
    """All NaN, all -inf, one +inf, NaN at the ends: with indices, probabilities, and a softcap."""
    shape = SHAPES[family]
    for value in (np.nan, -np.inf, np.inf):
        logits = make_logits(rng, shape, np.float32)
        target = make_target(rng, kind, shape).astype(int if kind == "index" else np.float32)
        logits[0] = value
        logits[1, -1] = np.nan
        x = to_device(xp, logits)
        _, _, stats = fastce.cross_entropy_with_grad(x, xp.asarray(target), out=x, return_stats=True, softcap=softcap)
        argmax = stats.argmax.get()
        # A softcap makes infinities finite, and all classes alike.
        first = 0 if softcap and not np.isnan(value) else -1
        assert (argmax[0] == first).all() and (argmax[1] == -1).all()
        assert (argmax[2:] >= 0).all() and (argmax < shape[1]).all()


@pytest.mark.parametrize("kind", slow_except(["int64"], ["int64", "uint8"]))
@pytest.mark.parametrize("family", FEW)
def test_a_target_that_changes_meanwhile_leads_nowhere(xp, guard, family, kind, rng):
    """Another thread writes classes that exist and others, between any two reads of the kernels."""
    shape = SHAPES[family]
    logits = make_logits(rng, shape, np.float32)
    weight = xp.asarray(rng.uniform(0.5, 2, shape[1]))
    y = xp.zeros((shape[0], *shape[2:]), kind)
    classes = [0, min(shape[1], 255) - 1, 255] if kind == "uint8" else [0, shape[1] - 1, -1, 10**9, 2**62, -100]
    stop = threading.Event()

    def attack():
        view = y._array
        while not stop.is_set():
            for k in classes:
                view[...] = k

    attacker = threading.Thread(target=attack)
    attacker.start()
    try:
        for wait in (False, True) * 4:
            x = to_device(xp, logits)
            try:
                if wait:
                    with fastce.cuda.synchronous_checks():
                        fastce.cross_entropy_with_grad(x, y, weight=weight, out=x, return_stats=True)
                else:
                    fastce.cross_entropy_with_grad(x, y, weight=weight, out=x, return_stats=True)
                fastce.cuda.check_errors()
            except IndexError:
                pass
    finally:
        stop.set()
        attacker.join()


# The sweep in a process of its own, whose memory AddressSanitizer and UndefinedBehaviorSanitizer watch.
PROGRAM = """
import sys, threading
from pathlib import Path

import ml_dtypes
import numpy as np

sys.path.insert(0, {tests!r})
import fake_cupy
import fastce, fastce.cuda
from cases import OPTION_SETS, make_target, options_for
from device import LAYOUTS, device, to_device
from fastce._cuda import _program

_program.DIRECTORY = Path({sources!r})
fake_cupy.compiler_flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g"]
fake_cupy.settings.guard = {guard!r}
rng = np.random.default_rng(0)
with device("host") as xp:
    for family, shape in {families!r}.items():
        for kind, dtype in [("index", np.float32), ("prob", ml_dtypes.bfloat16)]:
            target = make_target(rng, kind, shape)
            options = options_for(rng, OPTION_SETS["all"], kind, shape)
            if kind == "index":
                target.flat[0] = 10**9
                options["sample_weight"].flat[0] = 1
            options = {{name: to_device(xp, value) for name, value in options.items()}}
            for layout in ("C", "padded") if family != "COLUMN" else ("C", "reversed"):
                logits = (3 * rng.standard_normal(shape)).astype(dtype)
                logits[-1] = np.nan
                x = to_device(xp, logits, layout)
                y = to_device(xp, target if kind == "index" else target.astype(np.float32), layout)
                fastce.cross_entropy_with_grad(x, y, out=x, return_stats=True, **options)
                try:
                    fastce.cuda.check_errors()
                except IndexError:
                    pass
        print("done", family, file=sys.stderr, flush=True)
del x, y, options
print(*fake_cupy.damages, file=sys.stderr)
"""
SWEPT = {name: SHAPES[name] for name in ("TILE", "WARP of 16", "WARP", "BLOCK", "BLOCK of 2", "STREAM", "COLUMN")}


def asan_runtime():
    """Return the path of AddressSanitizer's library, or None."""
    if not fake_cupy.compiler():
        return None
    done = subprocess.run(
        [*fake_cupy.compiler(), "-print-file-name=libasan.so"], capture_output=True, text=True, check=False
    )
    path = Path(done.stdout.strip())
    return path if path.is_absolute() and path.exists() else None


def sweep(families, sources, sanitized=True, guard=None):
    """Return what the sweep says, and its exit status."""
    code = PROGRAM.format(tests=str(Path(__file__).parent), sources=str(sources), families=families, guard=guard)
    env = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    if sanitized:
        # Python keeps what it has to the end, and NumPy's allocations are not the kernels'.
        env |= {
            "LD_PRELOAD": str(asan_runtime()),
            "ASAN_OPTIONS": "detect_leaks=0",
            "UBSAN_OPTIONS": "print_stacktrace=1",
        }
    else:
        code = code.replace("fake_cupy.compiler_flags +=", "_ =")
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=env, timeout=600
    )
    return done.stderr, done.returncode


needs_asan = pytest.mark.skipif(asan_runtime() is None, reason="no AddressSanitizer")


@pytest.mark.slow
@needs_asan
def test_no_family_leaves_its_memory_under_the_sanitizers():
    said, status = sweep(SWEPT, _program.DIRECTORY)
    assert "Sanitizer" not in said and "runtime error" not in said, said[:4000]
    assert status == 0, said[-2000:]
    assert re.findall("done (.+)", said) == list(SWEPT)


# What a kernel would do wrong, and who sees it.
FAULTS = [
    # A class behind the last.
    ("task.cuh", "y >= task.n_classes", "y > 2000000000", "COLUMN", True),
    # The last granule of a row as a whole one: reads and writes beyond an operand.
    ("span.cuh", "first_class(g) >= 0 && first_class(g) + V <= n_classes", "first_class(g) >= 0", "WARP", True),
    # A slice that begins too late in shared memory.
    ("kernels.cu", "(RowTeam::BYTES + 15) / 16 * 16", "(RowTeam::BYTES + 31) / 16 * 16", "BLOCK", True),
    # The same without a sanitizer: a page that nobody may touch, and a pattern.
    ("span.cuh", "first_class(g) >= 0 && first_class(g) + V <= n_classes", "first_class(g) >= 0", "WARP", False),
]


@pytest.mark.slow
@pytest.mark.parametrize("fault", range(len(FAULTS)))
def test_a_fault_is_seen(fault, tmp_path):
    file, right, wrong, family, sanitized = FAULTS[fault]
    if sanitized and asan_runtime() is None:
        pytest.skip("no AddressSanitizer")
    sources = copy_sources(tmp_path)
    text = (sources / file).read_text()
    assert text.count(right) == 1
    (sources / file).write_text(text.replace(right, wrong))
    if sanitized:
        said, status = sweep({family: SHAPES[family]}, sources)
        assert "ERROR: AddressSanitizer" in said and status != 0
    else:
        assert sweep({family: SHAPES[family]}, sources, sanitized, "behind")[1] < 0  # ended by a signal
        assert "written outside" in sweep({family: SHAPES[family]}, sources, sanitized, "before")[0]
