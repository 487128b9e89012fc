"""Benchmarks that nobody runs rot: each is run once here, on the smallest problem."""

import importlib
import inspect
import itertools
import pkgutil
from pathlib import Path

import numpy as np
import pytest

from cases import make_logits, make_target
from fastce import _reference

FOLDER = Path(__file__).parent.parent / "asv_bench"


def test_every_benchmark_runs(monkeypatch):
    if not FOLDER.exists():
        pytest.skip("the tests are here without the benchmarks")
    monkeypatch.syspath_prepend(FOLDER)
    package = importlib.import_module("benchmarks")
    ran = 0
    for info in pkgutil.iter_modules(package.__path__, "benchmarks."):
        for _, benchmark in inspect.getmembers(importlib.import_module(info.name), inspect.isclass):
            timed = [name for name in vars(benchmark) if name.startswith("time_")]
            if not timed:
                continue
            smallest = benchmark.params[0][-1]  # the problems are sorted by what they cost
            for parameters in itertools.product([smallest], *benchmark.params[1:]):
                for name in timed:
                    case = benchmark()
                    case.setup(*parameters)
                    getattr(case, name)(*parameters)
                    ran += 1
    assert ran > 0


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
