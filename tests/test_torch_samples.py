"""PyTorch's own samples for its losses, as its tests draw them: ours against PyTorch's in float64.

They are in PyTorch's testing package, which needs another, expecttest.
"""

import random
import warnings

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest")

import fastce.torch  # noqa: E402 - it cannot be imported without

F = torch.nn.functional

# Of what a result is made, in units of the arithmetic's eps: products of ten features, a softmax of ten classes, and
# sums over as many rows, each in another order and of numbers as large as the parts that the scale below adds up.
SLACK = 64
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)
    random.seed(11)


def operators_of(name):
    """Return PyTorch's descriptions of an operator and its variants."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the testing package's own, when it is imported first
        invocations = pytest.importorskip("torch.testing._internal.common_methods_invocations")
    operators = [op for op in invocations.op_db if op.name == f"nn.functional.{name}"]
    if not operators:
        pytest.skip(f"this PyTorch has no samples of {name}")
    return operators


def samples_of(name, dtype):
    """Return all samples of an operator, those of its variants too."""
    operators = operators_of(name)
    return [
        ((sample.input, *sample.args), dict(sample.kwargs))  # which are changed while the next are drawn
        for op in operators
        for sample in op.sample_inputs("cpu", dtype, requires_grad=False)
    ]


def in_float64(x):
    return x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def derive(function, arguments, options, leaves):
    """Return the loss and the gradients of what is named, for upstream gradients that all dtypes hold exactly."""
    arguments, options = list(arguments), dict(options)
    found = []
    for leaf in leaves:
        place = (arguments, leaf) if isinstance(leaf, int) else (options, leaf)
        if isinstance(leaf, int) or options.get(leaf) is not None:
            place[0][place[1]] = place[0][place[1]].detach().clone().requires_grad_()
            found.append(place[0][place[1]])
    loss = function(*arguments, **options)
    factor = (torch.arange(loss.numel(), dtype=torch.float64) % 5 + 2).reshape(loss.shape) / 4
    return loss, torch.autograd.grad(loss, found, factor.to(loss.dtype))


def assert_close(actual, expected, dtype, scale):
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    kind = torch.finfo(dtype)
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    # One rounding to the dtype, and one of the product with the upstream gradient.
    bound = SLACK * arithmetic * scale + 2 * kind.eps * expected.abs() + kind.smallest_normal
    assert ((actual.double() - expected).abs() <= bound).all(), ((actual.double() - expected).abs() / bound).max()


def compare(ours, theirs, arguments, options, leaves):
    dtype = arguments[0].dtype
    loss, grads = derive(ours, arguments, options, leaves)
    exact = [in_float64(x) for x in arguments], {name: in_float64(x) for name, x in options.items()}
    expected, expected_grads = derive(theirs, *exact, leaves)
    # What cancels in a mean: the rows' losses have the signs of their weights, and so has their sum.
    rows, _ = derive(theirs, exact[0], {**exact[1], "reduction": "none"}, leaves)
    total, _ = derive(theirs, exact[0], {**exact[1], "reduction": "sum"}, leaves)
    factor = float((expected / total).abs()) if options.get("reduction", "mean") == "mean" else 1.0
    assert_close(loss, expected, dtype, float(rows.abs().sum()) * factor)
    largest = max(float(x.abs().max()) for x in (exact[0][0], *expected_grads) if x.numel())
    weight = options.get("weight")
    parts = (1.0 if weight is None else float(weight.abs().max())) * factor * rows.numel()
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert_close(grad, wanted, dtype, largest + parts * largest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cross_entropy(dtype):
    samples = samples_of("cross_entropy", dtype)
    negative = 0
    for arguments, options in samples:
        if (weight := options.get("weight")) is not None:
            negative += bool((weight < 0).any())
        compare(fastce.torch.cross_entropy, F.cross_entropy, arguments, options, [0])
    assert len(samples) >= 20 and negative >= 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_cross_entropy(dtype):
    samples = samples_of("linear_cross_entropy", dtype)
    seen = set()
    for arguments, options in samples:
        reference = {name: x for name, x in options.items() if name != "options"}

        def theirs(*arguments, options=None, **others):
            return F.linear_cross_entropy(*arguments, **others)

        compare(fastce.torch.linear_cross_entropy, theirs, arguments, options, [0, 1, "linear_bias"])
        seen |= {(arguments[0].ndim, arguments[1].ndim), *reference}
    assert len(samples) > 100
    assert seen >= {(1, 2), (2, 2), "weight", "linear_bias", "ignore_index", "reduction"}


def test_what_torch_refuses():
    """But for a single row of a K-dimensional loss, which means something here."""
    for error in operators_of("linear_cross_entropy")[0].error_inputs("cpu"):
        sample = error.sample_input
        if sample.input.ndim == 1 and sample.args[0].ndim > 2:
            continue
        with pytest.raises((ValueError, TypeError)):
            fastce.torch.linear_cross_entropy(sample.input, *sample.args, **sample.kwargs)
