"""The options' cross product against PyTorch in float64: value and gradient, from one dimension to five.

PyTorch has no sample weights, no z-loss, no softcap and no logit scale: those are built from its operations, and its
autograd differentiates them.
"""

import itertools

import numpy as np
import pytest

import fastce
from cases import LAYOUTS, make_logits, make_target, options_for, row_shape
from fastce import _reference
from oracle import Bounds, assert_within

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.every_isa

SHAPES = [
    (5,),
    (33, 7),  # rows of few classes, two groups and one more
    (4, 70, 3),
    (2, 5, 3, 4),
    (2, 3, 2, 1, 4),
]
# Reductions, class weights, smoothing (1 is the uniform target) and ignored rows, as PyTorch has them.
NATIVE = list(itertools.product(("none", "mean", "sum"), (False, True), (0.0, 0.1, 1.0), (False, True)))
# What it lacks, each alone and all together, under every reduction.
BUILT = [
    ("sample_weight",),
    ("logit_scale",),
    ("softcap",),
    ("z_loss",),
    ("sample_weight", "logit_scale", "softcap", "z_loss", "weight", "label_smoothing", "ignore_index"),
]
TORCH_EPS = 1e-14  # PyTorch's own error, relative to the rows' scale


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensor(x):
    return torch.from_numpy(np.array(x))  # a copy: torch takes neither negative strides nor read-only arrays


def torch_cross_entropy(logits, target, *, reduction="mean", logit_scale=1.0, softcap=None, z_loss=0.0, **options):
    """Return the loss as a tensor in float64, and the logits it may be differentiated for."""
    leaf = tensor(logits).double().requires_grad_()
    x = leaf * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    target = tensor(target)
    indices = not target.is_floating_point()
    if not indices:
        target = target.double()
    sample_weight = options.pop("sample_weight", None)
    if "weight" in options:
        options["weight"] = tensor(options["weight"])
    if sample_weight is None and z_loss == 0:
        return torch.nn.functional.cross_entropy(x, target, reduction=reduction, **options), leaf

    a = torch.ones(row_shape(logits.shape), dtype=torch.float64) if sample_weight is None else tensor(sample_weight)
    kept = (target != options.get("ignore_index", -100)).double() if indices else torch.ones_like(a)
    rows = torch.nn.functional.cross_entropy(x, target, reduction="none", **options)
    rows = a * (rows + kept * z_loss * torch.logsumexp(x, 0 if x.ndim == 1 else 1) ** 2)
    if reduction == "none":
        return rows, leaf
    if reduction == "sum":
        return rows.sum(), leaf
    if indices and "weight" in options:
        kept = kept * options["weight"][torch.where(kept > 0, target, 0)]
    return rows.sum() / (a * kept).sum(), leaf


def assert_equals_torch(logits, target, grad_output, **options):
    expected_loss, leaf = torch_cross_entropy(logits, target, **options)
    loss, grad = fastce.cross_entropy_with_grad(logits, target, grad_output=grad_output, **options)
    what = f"{options.keys()} {options.get('reduction')}"
    if np.isnan(loss).any():  # the divisor is 0: PyTorch divides by it, and its gradient is not defined
        assert not torch.isfinite(expected_loss).any(), what
        assert not grad.any(), what
        return
    (expected_loss * tensor(grad_output)).sum().backward()
    bounds = Bounds(
        _reference.cross_entropy(logits, target, **options),
        logits,
        target,
        grad_output=grad_output,
        eps=np.finfo(logits.dtype).eps + TORCH_EPS,
        **options,
    )
    assert_within(loss, expected_loss.detach().numpy(), bounds.loss, f"{what} loss")
    assert_within(grad, leaf.grad.numpy(), bounds.grad, f"{what} grad")


def grad_output_for(rng, reduction, shape):
    return rng.standard_normal(row_shape(shape)) if reduction == "none" else np.float64(0.75)


@pytest.mark.parametrize("layout", ["C", "F", "reversed", "step"])
@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}D")
def test_cross_product_equals_torch(dtype, shape, kind, layout, rng):
    for reduction, weighted, smoothing, ignoring in NATIVE:
        names = ("weight",) * weighted + ("ignore_index",) * ignoring
        options = options_for(rng, names, kind, shape)
        logits = LAYOUTS[layout](make_logits(rng, shape, dtype))
        target = LAYOUTS[layout](make_target(rng, kind, shape))
        grad_output = grad_output_for(rng, reduction, shape)
        assert_equals_torch(logits, target, grad_output, reduction=reduction, label_smoothing=smoothing, **options)


@pytest.mark.parametrize("names", BUILT, ids=lambda names: names[0] if len(names) == 1 else "all")
@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}D")
def test_options_that_torch_lacks_equal_their_composition(dtype, shape, kind, names, rng):
    for layout in ("C", "F", "reversed", "step"):
        for reduction in ("none", "mean", "sum"):
            options = options_for(rng, names, kind, shape)
            logits = LAYOUTS[layout](make_logits(rng, shape, dtype))
            target = LAYOUTS[layout](make_target(rng, kind, shape))
            grad_output = grad_output_for(rng, reduction, shape)
            assert_equals_torch(logits, target, grad_output, reduction=reduction, **options)


def test_nll_loss_equals_torch(dtype, rng):
    for shape in SHAPES:
        for reduction in ("none", "mean", "sum"):
            axis = 0 if len(shape) == 1 else 1
            log_probs = fastce.log_softmax(make_logits(rng, shape, dtype), axis=axis)
            target = make_target(rng, "index", shape)
            options = options_for(rng, ("weight",), "index", shape)
            expected = torch.nn.functional.nll_loss(
                tensor(log_probs).double(), tensor(target), tensor(options["weight"]), reduction=reduction
            )
            actual = fastce.nll_loss(log_probs, target, reduction=reduction, **options)
            np.testing.assert_allclose(actual, expected.numpy(), rtol=8 * np.finfo(dtype).eps)
