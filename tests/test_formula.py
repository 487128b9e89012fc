"""The formulas of a row, compiled alone, against mpmath: random and extreme sums, in both types."""

import ctypes
import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import mpmath
import numpy as np
import pytest

import fastce

HEADER = Path(fastce.__file__).parent / "_shared" / "formula.h"
COMPILER = shlex.split(os.environ.get("CC", "cc"))
TYPES = {"float": (ctypes.c_float, np.float32), "double": (ctypes.c_double, np.float64)}

if not HEADER.exists() or shutil.which(COMPILER[0]) is None:
    pytest.skip("needs a C compiler and formula.h", allow_module_level=True)

mp = mpmath.mp.clone()
mp.dps = 60


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The header as a library: its functions are what it exports."""
    path = tmp_path_factory.mktemp("formula") / "formula.so"
    warnings = ["-std=c11", "-pedantic", "-Wall", "-Wextra", "-Werror", "-Wno-missing-prototypes"]
    command = [*COMPILER, *warnings, "-O2", "-shared", "-fPIC", "-DFC_INLINE=", "-x", "c", HEADER, "-o", path]
    subprocess.run(command, check=True)
    return ctypes.CDLL(path)


@pytest.fixture(params=TYPES)
def call(request, library):
    """Call a function of one type by its name, with numbers of that type."""
    number, dtype = TYPES[request.param]

    def find(name):
        return getattr(library, f"fastce_{name}_{request.param}")

    def call(name, *arguments):
        function = find(name)
        function.argtypes = [number] * len(arguments)
        function.restype = number
        return dtype(function(*arguments))

    call.dtype, call.find = dtype, find
    return call


def unit_of(dtype):
    """Return half a unit in the last place of 1."""
    return float(np.finfo(dtype).eps) / 2


def exact(*values):
    return [mp.mpf(float(value)) for value in values]


def assert_close(got, expected, terms, roundings):
    """Check a result against its exact value: so many roundings, relative to the sum of its terms' sizes."""
    bound = roundings * unit_of(type(got)) * sum(map(abs, terms)) + mp.mpf(
        float(np.finfo(type(got)).smallest_subnormal)
    )
    assert abs(mp.mpf(float(got)) - expected) <= bound, (got, expected)


class Row:
    """Logits, targets and weights as numbers of a type, and their sums, exact but for rounding once."""

    def __init__(self, rng, dtype, n_classes, spread, eps):
        self.dtype = dtype
        x = np.sort(rng.normal(0, spread, n_classes).astype(dtype))[::-1]
        self.d = [mp.mpf(float(value)) - mp.mpf(float(x[0])) for value in x]
        self.w = exact(*rng.uniform(0.5, 2, n_classes).astype(dtype))
        self.t = exact(*rng.dirichlet(np.full(n_classes, 0.3)).astype(dtype))
        self.eps = mp.mpf(float(dtype(eps)))
        self.e = [mp.exp(d) for d in self.d]
        self.s = mp.fsum(self.e)
        self.lse = mp.mpf(float(x[0])) + mp.log(self.s)
        self.z = mp.mpf("0.25")
        n = len(self.d)
        self.q = [w * ((1 - self.eps) * t + self.eps / n) for w, t in zip(self.w, self.t, strict=True)]
        self.dloss_dlse = mp.fsum(self.q) + 2 * self.z * self.lse

    def rounded(self, value):
        """Return a number of the row's type."""
        return self.dtype(float(value))


CASES = list(itertools.product([1, 2, 10, 1000], [0.01, 3.0, 30.0], [0.0, 0.1, 1.0]))


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def row(request, rng, call):
    return Row(rng, call.dtype, *request.param)


def test_loss(call, row):
    """sum q (log s - d) + z lse^2."""
    n = len(row.d)
    sums = [mp.fsum(w * t for w, t in zip(row.w, row.t, strict=True)), mp.fsum(row.w)]
    d_sums = [
        mp.fsum(w * t * d for w, t, d in zip(row.w, row.t, row.d, strict=True)),
        mp.fsum(w * d for w, d in zip(row.w, row.d, strict=True)),
    ]
    shares = [row.rounded(1 - row.eps), row.rounded(row.eps / n)]
    sum_q, sum_qd = (call("smooth", shares[0], row.rounded(a), shares[1], row.rounded(b)) for a, b in (sums, d_sums))
    log_s = row.rounded(mp.log(row.s))
    z_term = call("z_loss_term", row.rounded(row.z), row.rounded(row.lse))
    loss = call("row_loss", sum_q, sum_qd, log_s)
    expected = mp.fsum(q * (mp.log(row.s) - d) for q, d in zip(row.q, row.d, strict=True))
    assert_close(loss, expected, [expected], 6)  # all terms have the same sign
    assert_close(z_term, row.z * row.lse**2, [row.z * row.lse**2], 5)
    z_slope = call("z_loss_slope", row.rounded(row.z), row.rounded(row.lse))
    assert_close(z_slope, 2 * row.z * row.lse, [2 * row.z * row.lse], 3)
    assert call("z_loss_term", 0.0, np.inf) == call("z_loss_slope", 0.0, np.inf) == 0


def test_statistics(call, row):
    log_s = mp.log(row.s)
    sum_t = mp.fsum(row.t)
    sum_td = mp.fsum(t * d for t, d in zip(row.t, row.d, strict=True))
    expected = sum_td - sum_t * log_s
    got = call("row_log_prob", *map(row.rounded, (sum_t, sum_td, log_s)))
    assert_close(got, expected, [expected], 5)
    sum_ed = mp.fsum(e * d for e, d in zip(row.e, row.d, strict=True))
    expected = log_s - sum_ed / row.s
    got = call("row_entropy", *map(row.rounded, (sum_ed, 1 / row.s, log_s)))
    assert_close(got, expected, [expected], 6)
    row_max = row.lse - log_s
    assert_close(call("row_lse", *map(row.rounded, (row_max, log_s))), row.lse, [row_max, log_s], 2)


def test_gradient(call, row):
    """The two forms at every class: one is right to the sizes of its terms, the other keeps p and 1 - p apart."""
    upstream = mp.mpf("0.75")
    n = len(row.d)
    alpha = call("grad_alpha", *map(row.rounded, (upstream, row.dloss_dlse, 1 / row.s)))
    beta = call("grad_beta", *map(row.rounded, (upstream, row.eps / n)))
    gamma = call("grad_gamma", *map(row.rounded, (upstream, 1 - row.eps)))
    for e, w, t, q in list(zip(row.e, row.w, row.t, row.q, strict=True))[:20]:
        p, others = e / row.s, row.s - e
        expected = p * row.dloss_dlse - q
        got = mp.mpf(float(alpha)) * e + mp.mpf(float(beta)) * w + mp.mpf(float(gamma)) * w * t
        assert_close(row.dtype(float(got)), upstream * expected, [p * row.dloss_dlse, q], 6)
        less_q = row.dloss_dlse - q
        got = call("grad_of_class", *map(row.rounded, (p, others / row.s, q, less_q)))
        assert_close(got, expected, [p * less_q, others / row.s * q], 4)
    for e in row.e[:20]:
        got = call("grad_of_only_class", *map(row.rounded, ((row.s - e) / row.s, 2)))
        assert_close(got, -2 * (row.s - e) / row.s, [2 * (row.s - e) / row.s], 3)


@pytest.mark.parametrize("d", [0.0, -1e-3, -1.0, -20.0, -80.0])
def test_the_term_that_a_sum_leaves_out(call, d):
    """From the sum without the largest term to that without another, and back; nothing cancels."""
    e = mp.exp(mp.mpf(d))
    for others in map(mp.mpf, (0, 1e-30, 1e-10, 0.5, 1e6)):  # all terms but the largest, which is 1, and e
        rest = others + (e if d else 0)
        excl_e = others + (1 if d else 0)
        rounded = [call.dtype(float(value)) for value in (rest, 1, e)]
        assert_close(call("sumexp_excl", *rounded), excl_e, [excl_e, abs(1 - e)], 3)
        got = call("sumexp_excl", call.dtype(float(excl_e)), *rounded[:0:-1])
        assert_close(got, rest, [excl_e, abs(1 - e)], 3)
    if d == 0:
        confident = call.dtype(1e-30)
        assert call("sumexp_excl", confident, call.dtype(1), call.dtype(1)) == confident


def test_sums_move_to_another_maximum(call, rng):
    for shift in (0.0, -0.5, -30.0):
        a = rng.uniform(0, 2, 7).astype(call.dtype)
        d = -rng.exponential(3, 7).astype(call.dtype)
        a_, d_, shift_ = exact(*a), exact(*d), mp.mpf(float(call.dtype(shift)))
        sum_a, sum_ad = mp.fsum(a_), mp.fsum(x * y for x, y in zip(a_, d_, strict=True))
        got = call("shift_sum", *(call.dtype(float(value)) for value in (sum_ad, sum_a, shift_)))
        expected = sum_ad + sum_a * shift_
        assert_close(got, expected, [expected], 4)
        e_ = [mp.exp(value) for value in d_]
        sum_ed, factor = mp.fsum(x * y for x, y in zip(e_, d_, strict=True)), mp.exp(shift_)
        expected = factor * (sum_ed + mp.fsum(e_) * shift_)
        got = call("shift_exp_sum", *(call.dtype(float(value)) for value in (sum_ed, mp.fsum(e_), shift_, factor)))
        assert_close(got, expected, [expected], 6)


def test_nothing_of_infinity_is_nothing(call):
    assert call("times", 0.0, -np.inf) == call("shift_sum", 0.0, 0.0, -np.inf) == 0
    assert call("shift_exp_sum", 1.0, 1.0, -np.inf, 0.0) == 0
    assert call("times", 2.0, -np.inf) == -np.inf
    assert np.isnan(call("times", 1.0, np.nan))


def test_what_is_not_finite_is_nan(call):
    largest = np.finfo(call.dtype).max
    assert call("nan_unless_finite", largest) == call("nan_unless_finite", -largest) == 0
    assert all(np.isnan(call("nan_unless_finite", value)) for value in (np.inf, -np.inf, np.nan))


def test_softcap_slope(call):
    """1 - tanh^2 to a few roundings, from 1 down to where it underflows."""
    for u in (0.0, 1e-9, 1e-3, 0.5, 3.0, 20.0, 43.0):
        e = call.dtype(float(mp.exp(-2 * mp.mpf(u))))
        expected = 4 * mp.mpf(float(e)) / (1 + mp.mpf(float(e))) ** 2
        assert_close(call("softcap_slope", e), expected, [expected], 5)
        assert abs(expected - mp.sech(mp.mpf(u)) ** 2) <= 2 * unit_of(call.dtype) * expected


def test_where_tanh_is_the_identity(call):
    least = mp.mpf(float(call("softcap_identity")))
    assert least - mp.tanh(least) <= unit_of(call.dtype) * least
    assert 1 - mp.sech(least) ** 2 <= unit_of(call.dtype)


@pytest.mark.parametrize("softcap", [0.0, 1e-30, 0.5, 30.0, 1e30, 3e38])
@pytest.mark.parametrize("logit_scale", [1e-38, 1e-3, 1.0, 1e6])
def test_softcap_scales(call, logit_scale, softcap):
    """scale * f(x) is the capped logit for every x of the type: f(x) = tanh(cap_factor * x), or x."""
    limits = np.finfo(call.dtype)
    function = call.find("softcap_scales")
    function.argtypes = [ctypes.c_double] * 4 + [ctypes.POINTER(ctypes.c_double)] * 2
    function.restype = None
    scale, factor = ctypes.c_double(), ctypes.c_double()
    function(logit_scale, softcap, limits.tiny, limits.max, ctypes.byref(scale), ctypes.byref(factor))
    assert float(call.dtype(factor.value)) == factor.value
    for x in 2.0 ** np.linspace(limits.minexp, limits.maxexp - 1, 40, dtype=np.int64):
        scaled = mp.mpf(logit_scale) * mp.mpf(float(x))
        expected = mp.mpf(softcap) * mp.tanh(scaled / mp.mpf(softcap)) if softcap else scaled
        f = mp.tanh(mp.mpf(factor.value) * mp.mpf(float(x))) if factor.value else mp.mpf(float(x))
        assert abs(mp.mpf(scale.value) * f - expected) <= 8 * unit_of(call.dtype) * expected
