"""The door: names, signatures, types of results, the loss object, the configuration."""

import doctest
import inspect
import os
import pickle
import subprocess
import sys

import numpy as np
import pytest

import fastce
from cases import OPTION_SETS, make_logits, make_target, options_for
from fastce import _cpu

OPTIONS = {  # the table of the documentation, with its defaults
    "axis": None,
    "weight": None,
    "sample_weight": None,
    "ignore_index": -100,
    "label_smoothing": 0.0,
    "reduction": "mean",
    "on_empty": "nan",
    "logit_scale": 1.0,
    "softcap": None,
    "z_loss": 0.0,
    "n_threads": None,
}
GRAD_OPTIONS = {"grad_output": None, "out": None, "return_stats": False}
LINEAR_OPTIONS = {"linear_bias": None, "chunk_rows": None, "return_stats": False}
NLL_OPTIONS = ("weight", "sample_weight", "ignore_index", "reduction", "on_empty", "axis")
SIGNATURES = {
    "cross_entropy": (["logits", "target"], OPTIONS),
    "cross_entropy_stats": (["logits", "target"], OPTIONS),
    "cross_entropy_with_grad": (["logits", "target"], GRAD_OPTIONS | OPTIONS),
    "cross_entropy_hvp": (["logits", "target", "v"], {"grad_output": None, "out": None} | OPTIONS),
    "cross_entropy_grad_hess": (
        ["logits", "target"],
        {"curvature": "exact", "grad_output": None, "out": None, "hess_out": None} | OPTIONS,
    ),
    "linear_cross_entropy": (["features", "linear_weight", "target"], LINEAR_OPTIONS | OPTIONS),
    "linear_cross_entropy_with_grad": (
        ["features", "linear_weight", "target"],
        LINEAR_OPTIONS | {"grad_output": None, "wrt": ("features", "linear_weight", "linear_bias")} | OPTIONS,
    ),
    "nll_loss": (["log_probs", "target"], {name: OPTIONS[name] for name in NLL_OPTIONS}),
    "softmax": (["x"], {"axis": -1, "out": None, "n_threads": None}),
    "log_softmax": (["x"], {"axis": -1, "out": None, "n_threads": None}),
    "logsumexp": (
        ["x"],
        {"axis": -1, "b": None, "keepdims": False, "return_sign": False, "out": None, "n_threads": None},
    ),
}
LOGITS = np.random.default_rng(3).standard_normal((6, 4))
TARGET = np.array([0, 1, 2, 3, 1, -100])


@pytest.mark.parametrize("name", SIGNATURES)
def test_options_are_keyword_only_and_the_same_everywhere(name):
    positional, keywords = SIGNATURES[name]
    parameters = inspect.signature(getattr(fastce, name)).parameters.values()
    assert [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD] == positional
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == keywords
    assert len(parameters) == len(positional) + len(keywords)


def test_public_names():
    assert set(fastce.__all__) == {*SIGNATURES, "CrossEntropyLoss", "CrossEntropyStats", "show_config"}
    public = {name for name in vars(fastce) if not name.startswith("_") and not inspect.ismodule(getattr(fastce, name))}
    assert public - {"version"} == set(fastce.__all__)
    assert fastce.__version__.count(".") >= 2


@pytest.mark.parametrize("name", sorted({*fastce.__all__} - {"CrossEntropyStats"}))
def test_every_public_function_is_documented_with_an_example_that_runs(name):
    function = getattr(fastce, name)
    text = inspect.getdoc(function)
    for section in ("Parameters", "Raises", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    for parameter in inspect.signature(function).parameters:
        assert parameter in text
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder().find(function, name, globs={}):
        runner.run(example, out=report.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(report)


@pytest.mark.parametrize("kind", ["index", "prob"])
def test_types_of_results(dtype, kind):
    logits = LOGITS.astype(dtype)
    target = TARGET if kind == "index" else np.full((6, 4), 0.25)
    for reduction in ("mean", "sum"):
        loss, grad, stats = fastce.cross_entropy_with_grad(logits, target, reduction=reduction, return_stats=True)
        assert type(loss) is dtype
        assert type(fastce.cross_entropy(logits, target, reduction=reduction)) is dtype
        assert type(fastce.nll_loss(logits, target, reduction=reduction)) is dtype
        assert type(grad) is np.ndarray
        assert grad.dtype == dtype
        assert [field.dtype for field in stats] == [dtype, dtype, np.int64, dtype]
        assert [field.shape for field in stats] == [(6,)] * 4
    loss = fastce.cross_entropy(logits, target, reduction="none")
    assert type(loss) is np.ndarray
    assert (loss.dtype, loss.shape) == (dtype, (6,))


def test_results_of_one_row():
    """One-dimensional logits take one index; what is shaped like it has no dimension."""
    logits = LOGITS[0]
    for target in (2, np.int8(2), np.array(2), [0.0, 0.0, 1.0, 0.0]):
        loss, grad, stats = fastce.cross_entropy_with_grad(logits, target, reduction="none", return_stats=True)
        assert np.shape(loss) == ()
        assert grad.shape == (4,)
        assert all(np.shape(field) == () for field in stats)
        assert loss == fastce.cross_entropy(logits[None], np.array([2]))
    assert np.shape(fastce.logsumexp(logits)) == ()


def test_statistics_are_a_named_tuple():
    stats = fastce.cross_entropy_stats(LOGITS, TARGET)
    assert isinstance(stats, fastce.CrossEntropyStats)
    assert stats._fields == ("lse", "log_prob", "argmax", "entropy")
    assert type(fastce.cross_entropy_with_grad(LOGITS, TARGET, return_stats=True)[2]) is fastce.CrossEntropyStats
    assert len(fastce.cross_entropy_with_grad(LOGITS, TARGET)) == 2


@pytest.mark.parametrize("names", OPTION_SETS.values(), ids=OPTION_SETS.keys())
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_the_loss_object_equals_the_functions(kind, names, rng):
    shape = (5, 7, 3)
    logits, target = make_logits(rng, shape, np.float32), make_target(rng, kind, shape)
    options = {**options_for(rng, names, kind, shape), "reduction": "none", "n_threads": 2}
    loss = fastce.CrossEntropyLoss(**options)
    expected_loss, expected = fastce.cross_entropy_with_grad(logits, target, **options)
    np.testing.assert_array_equal(loss(logits, target), fastce.cross_entropy(logits, target, **options))
    value, grad = loss.with_grad(logits, target)
    np.testing.assert_array_equal(value, expected_loss)
    np.testing.assert_array_equal(grad, expected)
    grad_output = np.full((5, 3), 2.0)
    expected = fastce.cross_entropy_with_grad(logits, target, grad_output=grad_output, **options)[1]
    work = logits.copy()
    value, grad = loss.with_grad(work, target, grad_output=grad_output, out=work)
    assert grad is work
    np.testing.assert_array_equal(work, expected)


def test_the_loss_object_shows_what_differs_from_the_defaults():
    loss = fastce.CrossEntropyLoss
    assert repr(loss()) == "CrossEntropyLoss()"
    assert repr(loss(reduction="mean", softcap=None)) == "CrossEntropyLoss()"
    assert repr(loss(softcap=30.0, reduction="sum")) in (
        "CrossEntropyLoss(softcap=30.0, reduction='sum')",
        "CrossEntropyLoss(reduction='sum', softcap=30.0)",
    )
    assert repr(loss(weight=np.array([1.0, 2.0]))) == "CrossEntropyLoss(weight=array([1., 2.]))"


def test_the_loss_object_names_its_options():
    parameters = inspect.signature(fastce.CrossEntropyLoss).parameters.values()
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters)
    assert {p.name: p.default for p in parameters} == OPTIONS | {"reuse_grad": False}
    assert vars(fastce.CrossEntropyLoss()) == OPTIONS


def test_the_loss_object_survives_attributes_that_are_no_options():
    loss = fastce.CrossEntropyLoss(label_smoothing=0.1)
    expected = loss(LOGITS, TARGET)
    loss.name = "mine"
    assert repr(loss) == "CrossEntropyLoss(label_smoothing=0.1)"
    assert loss == fastce.CrossEntropyLoss(label_smoothing=0.1)
    assert loss(LOGITS, TARGET) == loss.with_grad(LOGITS, TARGET)[0] == expected
    loss.label_smoothing = 0.0  # one that is an option
    assert loss(LOGITS, TARGET) == fastce.cross_entropy(LOGITS, TARGET)

    class Named(fastce.CrossEntropyLoss):
        pass

    assert repr(Named(softcap=2.0)) == "Named(softcap=2.0)"


def test_loss_objects_are_equal_if_their_options_are():
    loss = fastce.CrossEntropyLoss
    weight = np.array([1.0, 2.0])
    same = [
        ({}, {"reduction": "mean", "axis": None}),
        ({"weight": weight}, {"weight": weight.copy()}),
        ({"weight": weight}, {"weight": [1, 2]}),
        ({"softcap": 5}, {"softcap": 5.0}),
    ]
    for one, other in same:
        assert loss(**one) == loss(**other)
    different = [
        ({}, {"reduction": "sum"}),
        ({}, {"weight": weight}),
        ({"weight": weight}, {"weight": -weight}),
        ({"weight": weight}, {"weight": np.ones(3)}),
        ({"weight": weight}, {"sample_weight": weight}),
        ({"softcap": 5}, {}),
    ]
    for one, other in different:
        assert loss(**one) != loss(**other)
    assert loss() != "CrossEntropyLoss()"
    with pytest.raises(TypeError, match="unhashable"):
        hash(loss())


def test_the_loss_object_takes_sample_weights_at_the_call(rng):
    weight, other = rng.random(6), rng.random(6)
    v = rng.standard_normal(LOGITS.shape)
    for own in (None, other):
        loss = fastce.CrossEntropyLoss(sample_weight=own, z_loss=0.1)
        for given in (None, weight):
            options = {"sample_weight": own if given is None else given, "z_loss": 0.1}
            results = {
                "cross_entropy": (loss(LOGITS, TARGET, sample_weight=given),),
                "cross_entropy_with_grad": loss.with_grad(LOGITS, TARGET, sample_weight=given),
                "cross_entropy_grad_hess": loss.grad_hess(LOGITS, TARGET, sample_weight=given),
            }
            for name, actual in results.items():
                expected = getattr(fastce, name)(LOGITS, TARGET, **options)
                for one, truth in zip(actual, expected if isinstance(expected, tuple) else (expected,), strict=True):
                    np.testing.assert_array_equal(one, truth)
            product = fastce.cross_entropy_hvp(LOGITS, TARGET, v, **options)
            np.testing.assert_array_equal(loss.hvp(LOGITS, TARGET, v, sample_weight=given), product)
        assert loss.sample_weight is own


def test_the_loss_object_returns_statistics():
    loss = fastce.CrossEntropyLoss(logit_scale=2.0)
    value, grad, stats = loss.with_grad(LOGITS, TARGET, return_stats=True)
    expected = fastce.cross_entropy_with_grad(LOGITS, TARGET, logit_scale=2.0, return_stats=True)
    assert value == expected[0]
    np.testing.assert_array_equal(grad, expected[1])
    assert isinstance(stats, fastce.CrossEntropyStats)
    for one, truth in zip(stats, expected[2], strict=True):
        np.testing.assert_array_equal(one, truth)


class Count:
    """A number of threads that is no int."""

    def __init__(self, value):
        self.value = value

    def __index__(self):
        return self.value


@pytest.mark.parametrize("n_threads", [1, 2**30, 2**31 - 1, 2**31, 2**63, 2**64, 10**400, np.int64(3), Count(2**40)])
@pytest.mark.parametrize("step", [1, -1])
def test_any_number_of_threads_is_an_upper_limit(n_threads, step):
    """By both ways through a call: the reversed logits are not ordinary."""
    logits, target = np.tile(LOGITS, (3000, 1))[::step], np.tile(TARGET, 3000)[::step]
    v = np.ones_like(logits)
    for function, arguments in (
        (fastce.cross_entropy, (logits, target)),
        (fastce.cross_entropy_with_grad, (logits, target)),
        (fastce.cross_entropy_stats, (logits, target)),
        (fastce.cross_entropy_hvp, (logits, target, v)),
        (fastce.cross_entropy_grad_hess, (logits, target)),
        (fastce.softmax, (logits,)),
        (fastce.logsumexp, (logits,)),
        (fastce.linear_cross_entropy, (logits, np.eye(4), target)),
    ):
        expected, actual = function(*arguments, n_threads=1), function(*arguments, n_threads=n_threads)
        pairs = zip(actual, expected, strict=True) if isinstance(actual, tuple) else [(actual, expected)]
        for one, truth in pairs:
            np.testing.assert_array_equal(one, truth)


def test_the_loss_object_pickles():
    loss = fastce.CrossEntropyLoss(weight=np.array([1.0, 2.0, 0.5, 0.0]), label_smoothing=0.1, ignore_index=3)
    again = pickle.loads(pickle.dumps(loss))
    assert again == loss and repr(again) == repr(loss)
    assert again(LOGITS, TARGET % 4) == loss(LOGITS, TARGET % 4)


def run(code, **environment):
    command = [sys.executable, *code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=60, check=False
    )


def test_show_config():
    config = fastce.show_config(mode="dicts")
    assert config["versions"]["numpy"] == np.__version__
    assert config["versions"]["fastce"] == fastce.__version__
    assert config["isa"]["selected"] == _cpu.isa
    assert set(config["isa"]["supported"]) <= set(config["isa"]["compiled"])
    assert isinstance(config["build"]["openmp"], bool)
    assert config["threads"]["effective"] >= 1
    with pytest.raises(ValueError, match="mode must be 'stdout' or 'dicts', got 'json'"):
        fastce.show_config(mode="json")


def test_the_module_shows_the_configuration():
    done = run(["-m", "fastce"])
    assert done.returncode == 0, done.stderr
    for text in (np.__version__, fastce.__version__, "openmp", "threads", *_cpu.supported_isas):
        assert text in done.stdout


@pytest.mark.parametrize(
    ("code", "text"),
    [
        ("sys.modules['torch'] = None; import fastce.torch", "pip install 'fastce[torch]'"),
        ("sys.modules['sklearn'] = None; import fastce.sklearn", "pip install 'fastce[sklearn]'"),
        (
            "sys.modules['cupy'] = None; import fastce; fastce.softmax(Array())",
            "pip install 'fastce[cuda]' for CUDA 13",
        ),
    ],
    ids=["torch", "sklearn", "cuda"],
)
def test_a_package_that_is_missing_is_named_with_its_extra(code, text):
    on_gpu = "class Array: __dlpack_device__ = lambda self: (2, 0)"  # as DLPack has it
    done = run(["-c", f"import sys\n{on_gpu}\n{code}"])
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ModuleNotFoundError: ") and text in last, done.stderr


@pytest.mark.parametrize("name", _cpu.supported_isas)
def test_an_instruction_set_can_be_forced(name):
    done = run(["-c", "import fastce; print(fastce._cpu.isa)"], FASTCE_ISA=name)
    assert done.stdout.strip() == name, done.stderr
    assert name in run(["-m", "fastce"], FASTCE_ISA=name).stdout


@pytest.mark.parametrize("name", ["sse9", "AVX2", ""])
def test_an_unknown_instruction_set_fails_at_import(name):
    """Never a silent fallback; the message lists what there is."""
    done = run(["-c", "import fastce"], FASTCE_ISA=name)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: FASTCE_ISA must be one of")
    assert repr(name) in last
    assert all(isa in last for isa in _cpu.supported_isas)


def test_instruction_sets_switch_and_return():
    before = _cpu.isa
    for name in _cpu.supported_isas:
        with _cpu.use_isa(name):
            assert _cpu.isa == name
        assert _cpu.isa == before


def test_openmp_limits_the_threads():
    code = ["-c", "import fastce; print(fastce.show_config(mode='dicts')['threads']['effective'])"]
    if not fastce.show_config(mode="dicts")["build"]["openmp"]:
        pytest.skip("built without OpenMP")
    assert run(code, OMP_NUM_THREADS="1").stdout.strip() == "1"
    assert run(code, OMP_NUM_THREADS="3").stdout.strip() == "3"
