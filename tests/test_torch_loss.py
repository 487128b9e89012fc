"""The integration: fastce.torch against PyTorch's own loss, and as a good citizen of its autograd."""

import copy
import doctest
import inspect
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest

import fastce
from cases import make_logits, make_target, options_for, row_shape

torch = pytest.importorskip("torch")

import fastce.torch  # noqa: E402 - it cannot be imported without
from fastce import _torch_arrays, _torch_graph, _torch_memory  # noqa: E402

F = torch.nn.functional
ours = fastce.torch.cross_entropy

SHAPES = [(5,), (33, 7), (4, 70, 3), (2, 5, 3, 4)]
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, torch.float64, *HALVES]
REDUCTIONS = ["mean", "sum", "none"]
# What two results may differ by, in units of the arithmetic's eps and of the largest number that they are made of: each
# adds up at most 70 rounded numbers, in its own order, and takes logarithms of size 5 from numbers of that size.
SLACK = 16
# Everything that fastce adds, with what PyTorch has, for 33 rows.
EXTRAS = {"logit_scale": 0.7, "softcap": 5.0, "z_loss": 0.01, "label_smoothing": 0.1}


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Tensors this small only lose by threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(11)


def tensor(x):
    return torch.from_numpy(np.array(x))


def leaf(x, dtype=None):
    """Return a copy with a gradient of its own, in the same memory format."""
    return x.detach().clone().to(dtype or x.dtype).requires_grad_()


def make_problem(rng, shape, dtype=torch.float32, kind="index"):
    logits = tensor(make_logits(rng, shape, np.float32)).to(dtype)
    return logits, tensor(make_target(rng, kind, shape))


def simple(rng, dtype=torch.float32):
    """33 rows of 7 classes, the last of which is skipped."""
    logits, target = make_problem(rng, (33, 7), dtype)
    target[-1] = -100
    return logits.requires_grad_(), target


def assert_close(actual, expected, dtype, size=0.0):
    """Compare with a result of higher precision, made of numbers of the given size if that is larger than its own."""
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    actual, expected = actual.detach().double(), expected.detach().double()
    arithmetic = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps
    if expected.numel():
        size = max(float(size), float(expected.abs().max()))
    # Each number is rounded to the dtype, and multiplied in it: half an eps each time, where numbers are normal.
    kind = torch.finfo(dtype)
    bound = SLACK * arithmetic * size + kind.eps * (expected.abs() + kind.smallest_normal)
    assert ((actual - expected).abs() <= bound).all(), ((actual - expected).abs() / bound).max()


def assert_equals_torch(logits, target, grad_output=None, **options):
    """Hold loss and gradient against those that PyTorch has in float64 for the same numbers."""
    is_prob = target.is_floating_point()
    exact, exact_target = leaf(logits, torch.float64), target.double() if is_prob else target
    exact_options = {name: x.double() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    expected = F.cross_entropy(exact, exact_target, **exact_options)
    x = logits.detach().requires_grad_()  # a view: the strides are the case
    loss = ours(x, target, **options)
    if grad_output is None:
        grad_output = torch.ones_like(loss)
    (grad,) = torch.autograd.grad(loss, x, grad_output)
    (expected_grad,) = torch.autograd.grad(expected, exact, grad_output.double(), retain_graph=True)
    # A gradient is the difference of two numbers that may nearly be equal: a probability and the target's, or the
    # row's factor times either.
    size = grad_output.abs().max() * options.get("weight", torch.ones(1)).max()
    if is_prob:
        size = size * max(1, target.sum(min(1, target.ndim - 1)).max())
    if options.get("reduction") == "mean":
        total = F.cross_entropy(exact, exact_target, **{**exact_options, "reduction": "sum"})
        size = size * (expected / total).detach()
    assert_close(loss, expected, logits.dtype)
    assert_close(grad, expected_grad, logits.dtype, size)
    # In one precision both have the same type; and without a graph the same loss comes out.
    assert F.cross_entropy(logits, target.to(logits.dtype) if is_prob else target).dtype == loss.dtype
    with torch.no_grad():
        alone = ours(x, target, **options)
    assert not alone.requires_grad
    assert torch.equal(alone, loss.detach())
    return grad


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{len(shape)}D")
def test_loss_and_gradient_equal_those_of_torch(shape, kind, dtype, reduction, rng):
    logits, target = make_problem(rng, shape, dtype, kind)
    for smoothing in (0.0, 0.1, 1.0):
        options = {"reduction": reduction, "label_smoothing": smoothing}
        assert_equals_torch(logits, target, **options)
        weight = tensor(options_for(rng, ("weight",), kind, shape)["weight"]).to(dtype)
        if len(shape) == 1:
            weight += 1  # or the mean may be one over nothing, of which there is another test
        assert_equals_torch(logits, target, weight=weight, **options)
    if kind == "index" and len(shape) > 1:
        ignored = int(target.flatten()[0])
        assert_equals_torch(logits, target, reduction=reduction, ignore_index=ignored)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_upstream_gradients(dtype, reduction, rng):
    logits, target = make_problem(rng, (4, 70, 3), dtype)
    shape = row_shape(logits.shape) if reduction == "none" else ()
    for factor in (0.375, -3.0, 0.0):  # of few bits: rounding the upstream gradient is not the question
        assert_equals_torch(logits, target, torch.full(shape, factor, dtype=dtype), reduction=reduction)
    if reduction == "none":
        assert_equals_torch(logits, target, torch.randn(shape).to(dtype), reduction=reduction)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_memory_formats_and_strides(reduction, rng):
    logits, target = make_problem(rng, (2, 5, 3, 4))
    channels_last = logits.contiguous(memory_format=torch.channels_last)
    grad = assert_equals_torch(channels_last, target, reduction=reduction)
    assert grad.is_contiguous(memory_format=torch.channels_last)
    wide = torch.randn(33, 14)
    target = torch.randint(7, (33,))
    for view in (wide[:, ::2], wide[:, :7], torch.randn(7, 33).T, torch.randn(1, 7).expand(33, 7)):
        for dtype in (torch.float32, torch.bfloat16):
            # Conversion keeps strides where it can; expand it again where it cannot.
            strided = view.to(dtype) if dtype != view.dtype else view
            assert_equals_torch(strided, target, reduction=reduction)
    assert_equals_torch(wide[:, ::2], torch.randint(7, (66,))[::2], reduction=reduction)
    assert_equals_torch(wide[:, :7], torch.rand(7, 33).T, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_gradients_are_tensors_like_others(dtype, monkeypatch):
    """Although their memory may have been another's before."""
    monkeypatch.setattr(_torch_memory, "LARGE", 0)
    wide = torch.randn(2, 5, 3, 8).to(dtype)
    for x in (
        wide,
        wide.contiguous(memory_format=torch.channels_last),
        wide[..., ::2],
        wide.transpose(0, 2),
        wide[:1, :, :, :1].expand(3, -1, -1, 2),
        wide[:0],
    ):
        expected, actual = torch.empty_like(x), _torch_memory.empty_like(x)
        assert (actual.shape, actual.stride(), actual.dtype) == (expected.shape, expected.stride(), expected.dtype)
        assert not actual._is_view()
        assert actual.untyped_storage().resizable() and actual.storage_offset() == 0
        target = torch.randint(5, (x.shape[0], *x.shape[2:]))
        leaves = x.detach().requires_grad_(), x.detach().requires_grad_()
        ours(leaves[0], target, reduction="sum").backward()
        monkeypatch.setattr(_torch_memory, "LARGE", 1 << 22)
        ours(leaves[1], target, reduction="sum").backward()
        monkeypatch.setattr(_torch_memory, "LARGE", 0)
        assert torch.equal(leaves[0].grad, leaves[1].grad)


def make_large(n_rows):
    """Return a gradient of so many times 1 MiB."""
    return _torch_memory.empty_like(torch.empty(n_rows, 1 << 18))


@pytest.mark.parametrize(
    "hold",
    [
        lambda x: x,
        lambda x: x[3:],
        lambda x: x.numpy(),
        lambda x: x.untyped_storage(),
        lambda x: torch.utils.dlpack.to_dlpack(x),
        lambda x: x.detach().view(torch.int32),
        lambda x: (x.requires_grad_() * x).grad_fn,
    ],
    ids=["tensor", "view", "array", "storage", "capsule", "alias", "graph"],
)
def test_the_memory_of_a_large_gradient_is_used_again(hold):
    """Once nothing refers to it, in whatever way."""
    fastce.torch.empty_cache()
    first = make_large(8)
    place = first.data_ptr()
    holder = hold(first)
    del first
    second = make_large(8)
    assert second.data_ptr() != place
    del second, holder
    place = make_large(8).data_ptr()
    again = make_large(5)
    assert again.data_ptr() == place and again.shape == (5, 1 << 18)
    assert make_large(8).data_ptr() != place, "lent twice"


def test_memory_that_another_process_may_read_is_not_used_again():
    fastce.torch.empty_cache()
    first = make_large(8).share_memory_()
    place = first.data_ptr()
    del first
    assert make_large(8).data_ptr() != place


def test_memory_is_not_kept_for_ever():
    def kept():
        return [memory.untyped_storage().nbytes() >> 20 for memory in _torch_memory.kept]

    fastce.torch.empty_cache()
    first, held = make_large(8), make_large(8)
    assert kept() == [8], "the last one"
    place = held.data_ptr()
    del first, held
    assert make_large(4).data_ptr() == place, "half as large"
    assert kept() == [8]
    make_large(9)
    assert kept() == [9]
    make_large(4)
    assert kept() == [4], "9 MiB are too much to hold for 4"
    last = make_large(4).zero_()
    fastce.torch.empty_cache()
    assert not kept()
    make_large(4).fill_(1)
    assert not last.any(), "it is still its holder's"


def test_storages_can_be_resized(rng):
    """Those of results, and those of what was given are as they were: FSDP frees memory so until it is needed."""
    for size in ((33, 7), (8, 1 << 18)):
        logits, target = torch.randn(size).requires_grad_(), torch.randint(7, size[:1])
        weight = torch.rand(size[1])
        for reduction in REDUCTIONS:
            logits.grad = None
            loss = ours(logits, target, weight, reduction=reduction)
            loss.sum().backward()
            for x in (logits, target, weight, loss, logits.grad):
                assert x.untyped_storage().resizable()
        grad = logits.grad
        kept = grad.clone()
        size = grad.untyped_storage().nbytes()
        grad.untyped_storage().resize_(0)
        ours(logits.detach().requires_grad_(), target).backward()  # which must not write where there is nothing
        grad.untyped_storage().resize_(size)
        grad.copy_(kept)
        del grad
        logits.grad = None
        ours(logits, target, weight, reduction=reduction).sum().backward()
        assert torch.equal(logits.grad, kept)


def test_steps_of_training_share_one_gradient():
    """Each with the right numbers, those of the step before having been dropped."""
    fastce.torch.empty_cache()
    weight = torch.randn(1000, 16).requires_grad_()
    places = set()
    for _ in range(3):
        x, target = torch.randn(2048, 16), torch.randint(1000, (2048,))
        weight.grad = None
        logits = x @ weight.T
        logits.register_hook(lambda grad: places.add(grad.data_ptr()) or None)
        ours(logits, target).backward()
        expected = weight.detach().clone().requires_grad_()
        F.cross_entropy(x @ expected.T, target).backward()
        torch.testing.assert_close(weight.grad, expected.grad, rtol=1e-4, atol=1e-7)
        del logits
    assert len(places) == 1


def test_tensors_are_not_copied(monkeypatch):
    seen = []
    real = fastce.cross_entropy

    def spy(logits, target, **options):
        seen.append((logits, target, options["weight"]))
        return real(logits, target, **options)

    monkeypatch.setattr(fastce, "cross_entropy", spy)
    for dtype in DTYPES:
        tensors = torch.randn(33, 14).to(dtype)[:, ::2], torch.rand(7, 33).to(dtype).T, torch.rand(7).to(dtype)
        ours(*tensors)
        for array, like in zip(seen.pop(), tensors, strict=True):
            assert array.ctypes.data == like.data_ptr()
            assert array.strides == tuple(stride * like.element_size() for stride in like.stride())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32])
def test_class_indices_of_any_integer_type(dtype, rng):
    logits, target = make_problem(rng, (33, 7))
    assert torch.equal(ours(logits, target.to(dtype)), ours(logits, target))


@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_torch_lacks_is_what_fastce_says(dtype, kind, rng):
    """The same bits: it is the same call."""
    names = ("weight", "sample_weight", "label_smoothing", "logit_scale", "softcap", "z_loss")
    logits, target = make_problem(rng, (4, 70, 3), dtype, kind)
    options = options_for(rng, names, kind, (4, 70, 3))
    tensors = {name: tensor(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}
    for reduction in REDUCTIONS:
        x = leaf(logits)
        array = _torch_arrays.as_array(x)
        loss, grad = fastce.cross_entropy_with_grad(array, target.numpy(), reduction=reduction, **options)
        actual = ours(x, target, reduction=reduction, **tensors)
        actual.sum().backward()
        assert torch.equal(actual, tensor(loss).to(dtype))
        assert np.array_equal(_torch_arrays.as_array(x.grad), grad)
    assert torch.equal(ours(logits, target, n_threads=1, **tensors), ours(logits, target, n_threads=2, **tensors))


def test_the_mean_over_nothing(rng):
    logits, target = simple(rng)
    target[:] = -100
    assert torch.isnan(ours(logits, target))
    loss = ours(logits, target, on_empty="zero")
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    assert ours(torch.empty(0, 7), torch.empty(0, dtype=torch.int64), reduction="none").shape == (0,)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_gradcheck(kind, reduction, rng):
    """PyTorch's central differences, at its own tolerances; it repeats each backward and wants the same bits."""
    for shape in ((5,), (6, 4), (2, 3, 2)):
        logits, target = make_problem(rng, shape, torch.float64, kind)
        options = {name: tensor(x) for name, x in options_for(rng, ("weight", "sample_weight"), kind, shape).items()}
        if len(shape) == 1:  # or the mean may be one over nothing
            options = {name: x + 1 for name, x in options.items()}
        elif kind == "index":
            target.flatten()[-1] = -100
        for chosen in ({}, {**options, **EXTRAS}):
            assert torch.autograd.gradcheck(
                lambda x, target=target, chosen=chosen: ours(x, target, reduction=reduction, **chosen),
                logits.requires_grad_(),
            )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_a_retained_graph_gives_the_same_again(reduction, dtype, rng):
    """Nothing that was handed out changes later, and nothing that comes later is changed by it."""
    logits, target = simple(rng, dtype)
    loss = ours(logits, target, reduction=reduction).sum()

    def grad(factor, **options):
        return torch.autograd.grad(loss, logits, torch.tensor(factor, dtype=loss.dtype), **options)[0]

    first = grad(1.0, retain_graph=True)
    again = grad(1.0, retain_graph=True)
    half = grad(0.5, retain_graph=True)
    zero = grad(0.0, retain_graph=True)
    kept = [x.clone() for x in (first, again, half, zero)]
    assert torch.equal(first, again)
    unit = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # of subnormal numbers, which float16 has here
    torch.testing.assert_close(half, first * 0.5, rtol=0, atol=unit)
    assert not zero.any()
    half.fill_(7)  # a caller may do what it likes with its own
    kept[2] = half.clone()
    last = grad(4.0)
    torch.testing.assert_close(last, first * 4, rtol=0, atol=4 * unit)
    assert all(torch.equal(x, y) for x, y in zip((first, again, half, zero), kept, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        grad(1.0)


def test_without_the_private_hook_graphs_count_as_retained(monkeypatch, rng):
    monkeypatch.setattr(_torch_graph, "_is_graph_retained", lambda: True)
    logits, target = simple(rng)
    (0.5 * ours(logits, target)).backward()
    expected = leaf(logits)
    (0.5 * F.cross_entropy(expected, target)).backward()
    assert_close(logits.grad, expected.grad, torch.float32)


@pytest.mark.parametrize("large", [0, 1 << 22], ids=["numpy", "torch"])
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_one_sweep_and_one_matrix(factor, large, monkeypatch, rng):
    """What the forward sweep made is what a leaf's gradient becomes; the logits are not kept."""
    monkeypatch.setattr(_torch_memory, "LARGE", large)
    made = []
    real = _torch_arrays.loss_and_grad

    def spy(*arguments):
        result = real(*arguments)
        made.append(result[1].data_ptr())
        return result

    monkeypatch.setattr(_torch_arrays, "loss_and_grad", spy)
    logits, target = simple(rng)
    loss = ours(logits, target)
    (saved,) = loss.grad_fn.saved_tensors
    assert [saved.data_ptr()] == made
    del saved
    (loss * factor).backward()
    assert [logits.grad.data_ptr()] == made


def test_without_a_need_for_it_no_gradient_is_made(monkeypatch, rng):
    monkeypatch.setattr(_torch_arrays, "loss_and_grad", None)
    logits, target = simple(rng)
    assert not ours(logits.detach(), target).requires_grad
    with torch.no_grad():
        assert not ours(logits, target).requires_grad
    with torch.inference_mode():
        assert not ours(logits, target).requires_grad


def test_overwritten_logits():
    """Where the gradient is made in forward they are the caller's again; elsewhere PyTorch notices."""
    target = torch.tensor([0, 2])
    logits = torch.randn(2, 3, requires_grad=True)
    x = logits * 1
    loss = ours(x, target)
    expected = F.cross_entropy(logits, target)
    with torch.no_grad():
        x.zero_()
    loss.backward()
    assert_close(logits.grad, torch.autograd.grad(expected, logits)[0], torch.float32)
    x = logits * 1
    loss = ours(x, target, reduction="none").sum()
    with torch.no_grad():
        x.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_skipped_rows_stay_zero_under_infinite_upstream_gradients(rng):
    logits, target = simple(rng)
    loss = ours(logits, target, reduction="none")
    loss.log()[-1:].sum().backward()  # the logarithm of 0: an upstream gradient of 1 / 0
    assert not logits.grad[-1].any()


def test_scaled_losses_keep_small_gradients_of_float16(rng):
    """A step of mixed precision: rounded to 16 bits after the scale, or most of this would be 0."""
    target = torch.randint(50, (64,))
    logits = 14 * F.one_hot(target, 50) + torch.randn(64, 50)
    x = logits.half().requires_grad_()
    exact = leaf(x, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        loss = ours(x, target)
        assert loss.dtype == F.cross_entropy(x, target).dtype == torch.float32
        assert ours(x.bfloat16(), target).dtype == torch.float32
        assert ours(x.double(), target).dtype == F.cross_entropy(x.double(), target).dtype == torch.float64
    (loss * 2.0**16).backward()
    (F.cross_entropy(exact, target) * 2.0**16).backward()
    assert (exact.grad.abs() < torch.finfo(torch.float16).smallest_normal * 2.0**16).any()  # a case worth the name
    assert_close(x.grad, exact.grad, torch.float16)


def test_the_second_derivative_is_refused(rng):
    """At once: a gradient that silently counted as a constant would be worse."""
    logits, target = simple(rng)
    for reduction in REDUCTIONS:
        loss = ours(logits, target, reduction=reduction).sum()
        with pytest.raises(NotImplementedError, match=r"cannot be differentiated again: .* without create_graph=True"):
            torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(NotImplementedError, match="cannot be differentiated again"):
            torch.autograd.grad(loss**2, logits, create_graph=True)


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight", "logit_scale", "softcap", "z_loss"])
def test_gradients_of_anything_else_are_refused(name, rng):
    logits, target = make_problem(rng, (33, 7), torch.float32, "prob")
    size = {"target": (33, 7), "weight": (7,), "sample_weight": (33,)}.get(name, ())
    arguments = {"target": target, name: torch.rand(size).requires_grad_()}
    for x in (logits, leaf(logits)):
        with pytest.raises(NotImplementedError, match=rf"^{name} must not require a gradient"):
            ours(x, **arguments)
    with torch.no_grad():
        assert torch.isfinite(ours(logits, **arguments))


def test_refusals(rng):
    logits, target = simple(rng)
    for bad, message in [
        (logits.detach().numpy(), r"^input must be a torch.Tensor, got ndarray: .* torch.as_tensor\(input\)"),
        (logits.to("meta"), r"^target must be on the device of input, meta, got cpu"),
        (logits.detach().long(), r"^input must be float32, .* got torch.int64: convert it with input.float\(\)"),
        (logits.detach().bool(), r"^input must be float32, .* got torch.bool$"),
        (logits.detach().cfloat(), r"^input must be float32, .* got torch.complex64$"),
        (logits.detach().cfloat().conj(), r"^input must be float32, .* got torch.complex64$"),
        (logits.detach().to(torch.float8_e4m3fn), r"^input must be .* got torch.float8_e4m3fn: .*input.float\(\)"),
    ]:
        with pytest.raises(TypeError, match=message):
            ours(bad, target)
    with pytest.raises(TypeError, match=r"^target must be a torch.Tensor, got NoneType"):
        ours(logits, None)
    with pytest.raises(TypeError, match=r"^weight must be a torch.Tensor, got list: .* torch.as_tensor\(weight\)"):
        ours(logits, target, [1.0] * 7)
    for bad in ({0: 1.0}, "balanced"):
        with pytest.raises(TypeError, match=r"^weight must be a torch.Tensor, got (dict|str): give one factor"):
            ours(logits, target, bad)
    with pytest.raises(TypeError, match=r"^target must be on the device of input, cpu, got meta"):
        ours(logits, target.to("meta"))
    with pytest.raises(TypeError, match=r"^input must be on the CPU or a CUDA device, got a tensor on meta"):
        ours(logits.to("meta"), target.to("meta"))
    with pytest.raises(TypeError, match=r"^input must be float32, .* target is floating: they seem to be swapped"):
        ours(target, logits)
    with pytest.raises(ValueError, match="reduction must be one of"):
        ours(logits, target, reduction="batchmean")
    with pytest.raises(ValueError, match="label_smoothing must be in"):
        ours(logits, target, label_smoothing=1.5)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda y: y.float(), TypeError, r"target .* must hold class indices .* convert it with target.long\(\)"),
        (lambda y: y.bool(), TypeError, r"target must be of an integer dtype"),
        (lambda y: F.one_hot(y, 7), TypeError, r"looks one-hot: .* target.to\(input.dtype\), .* target.argmax\(1\)"),
        (lambda y: y[:, None], ValueError, r"remove its last dimension with target.squeeze\(-1\)"),
        (lambda y: y[:5], ValueError, r"target of class indices must have shape \(33,\) for input of shape \(33, 7\)"),
        (lambda y: torch.rand(33, 6), ValueError, r"target of class probabilities must have the input's shape"),
        (lambda y: y.float().index_fill(0, torch.tensor(1), torch.nan), TypeError, r"^target of shape \(33,\)"),
        (lambda y: y.index_fill(0, torch.tensor(3), 9), IndexError, r"target\[3\] is 9"),
    ],
    ids=["float", "bool", "one-hot", "column", "short", "wide", "nan", "class"],
)
def test_messages_speak_torch(make, error, message, rng):
    """Of methods and functions that tensors have, in the ordinary way and under a transform."""
    logits, target = simple(rng)
    target[-1] = 0
    for call in (ours, torch.func.grad(ours)):
        with pytest.raises(error, match=message) as caught:
            call(logits.detach(), make(target))
        assert not any(word in str(caught.value) for word in ("np.", "astype", "ndarray", "NumPy", "logits", "axis="))


def test_messages_for_two_classes_speak_torch(rng):
    """Scores of a two-class model look like one row of logits."""
    with pytest.raises(TypeError) as caught:
        ours(torch.randn(6), torch.tensor([0, 1, 1, 0, 1, 1]))
    assert not any(word in str(caught.value) for word in ("np.", "astype", "ndarray", "NumPy", "logits", "axis="))


@pytest.mark.parametrize("name", ["input", "target", "weight", "sample_weight"])
def test_tensors_that_are_no_arrays_are_refused(name, rng):
    """With what to do: whatever is sparse, quantized, nested or masked, and whichever argument it is."""
    arguments = {
        "input": torch.randn(6, 4),
        "target": torch.rand(6, 4),
        "weight": torch.rand(4),
        "sample_weight": torch.rand(6),
    }
    x = arguments[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # most of these are prototypes, and say so
        parts = [torch.randn(2, 4), torch.randn(3, 4)]
        for message, value in (
            (r"be a dense tensor, got torch.sparse_coo: convert it with {}.to_dense\(\)", x.to_sparse()),
            (r"be a dense tensor, got torch._mkldnn: .* {}.to_dense\(\)", x.to_mkldnn()),
            (r"not be quantized, .* {}.dequantize\(\)", torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)),
            (r"be one dense tensor, got a nested one: .*to_padded_tensor", torch.nested.nested_tensor(parts)),
            (r"be one dense tensor, got a nested one", torch.nested.nested_tensor(parts, layout=torch.jagged)),
            (r"not be a masked tensor: .* {}.to_tensor\(0\)", torch.masked.masked_tensor(x, x > 0)),
        ):
            with pytest.raises(TypeError, match=f"^{name} must {message.format(name)}"):
                ours(**{**arguments, name: value})


def test_numbers_stored_with_the_sign_reversed(rng):
    """The imaginary part of a conjugate is a view whose numbers stand in memory with the other sign."""
    logits, target = simple(rng)
    target[-1] = 0

    def reversed_sign(x):
        y = torch.complex(torch.zeros_like(x), -x).conj().imag
        assert y.is_neg() and torch.equal(y, x)
        return y

    weight, sample_weight = torch.rand(7), torch.rand(33)
    for kind in (target, torch.rand(33, 7)):
        for reduction in REDUCTIONS:
            leaves = [logits.detach().clone().requires_grad_() for _ in range(2)]
            loss = ours(leaves[0], kind, weight, sample_weight=sample_weight, reduction=reduction)
            other = ours(
                reversed_sign(leaves[1]),
                reversed_sign(kind) if kind.is_floating_point() else kind,
                reversed_sign(weight),
                sample_weight=reversed_sign(sample_weight),
                reduction=reduction,
            )
            factor = torch.rand(loss.shape)
            loss.backward(factor)
            other.backward(reversed_sign(factor))
            assert torch.equal(loss, other)
            assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_derived_classes_and_devices_of_the_context(rng):
    """What `__torch_function__` is for: results of the class of the arguments, as from PyTorch's own."""

    class Derived(torch.Tensor):
        pass

    logits, target = simple(rng)
    loss = ours(logits.detach().as_subclass(Derived), target)
    assert type(loss) is type(F.cross_entropy(logits.detach().as_subclass(Derived), target)) is Derived
    with torch.device("meta"):
        assert ours(logits, target).device.type == "cpu"
        large = torch.randn(8, 1 << 18, device="cpu").requires_grad_()
        ours(large, torch.zeros(8, dtype=torch.int64, device="cpu")).backward()
    assert large.grad.device.type == "cpu"


def test_ignore_index_with_probabilities_is_as_in_torch(rng):
    logits, target = make_problem(rng, (33, 7), torch.float32, "prob")
    assert torch.equal(ours(logits, target, ignore_index=-1), ours(logits, target))
    F.cross_entropy(logits, target, ignore_index=-1)
    with pytest.raises(ValueError, match="ignore_index"):
        ours(logits, target, ignore_index=2)
    with pytest.raises(RuntimeError, match="ignore_index"):
        F.cross_entropy(logits, target, ignore_index=2)


def test_bfloat16_needs_ml_dtypes(monkeypatch, rng):
    logits, target = simple(rng)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    ours(logits, target)
    with pytest.raises(ImportError, match="pip install ml-dtypes"):
        ours(logits.bfloat16(), target)


@pytest.mark.parametrize(
    ("old", "reduction"), [({"size_average": False}, "sum"), ({"reduce": False}, "none"), ({"reduce": True}, "mean")]
)
def test_the_old_keywords(old, reduction, rng):
    logits, target = simple(rng)
    expected = ours(logits, target, reduction=reduction)
    with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
        assert torch.equal(ours(logits, target, **old), expected)
    with pytest.warns(UserWarning, match=f"reduction='{reduction}'"):
        assert fastce.torch.CrossEntropyLoss(**old).reduction == reduction


def signature(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values() if p.kind != p.KEYWORD_ONLY]


def test_signatures_begin_as_those_of_torch():
    assert signature(ours) == signature(F.cross_entropy)
    assert signature(fastce.torch.CrossEntropyLoss) == signature(torch.nn.CrossEntropyLoss)
    assert signature(fastce.torch.CrossEntropyLoss.forward) == signature(torch.nn.CrossEntropyLoss.forward)


def test_the_module(rng):
    logits, target = simple(rng)
    weight = torch.rand(7)
    options = {"ignore_index": 3, "reduction": "sum", **EXTRAS, "on_empty": "zero", "n_threads": 1}
    module = fastce.torch.CrossEntropyLoss(weight, **options)
    target[-1] = 0
    sample_weight = torch.rand(33)
    for more in ({}, {"sample_weight": sample_weight}):
        assert torch.equal(module(logits, target, **more), ours(logits, target, weight, **options, **more))
    assert isinstance(module, torch.nn.CrossEntropyLoss)
    with pytest.raises(ValueError, match="softcap must be"):
        fastce.torch.CrossEntropyLoss(softcap=-1.0)


def test_the_module_s_weight_is_a_buffer():
    weight = torch.rand(7)
    module = fastce.torch.CrossEntropyLoss(weight)
    theirs = torch.nn.CrossEntropyLoss(torch.zeros(7))
    theirs.load_state_dict(module.state_dict())
    assert torch.equal(theirs.weight, weight)
    module.load_state_dict(torch.nn.CrossEntropyLoss(torch.ones(7)).state_dict())
    assert torch.equal(module.weight, torch.ones(7))
    assert module.double().weight.dtype == torch.float64
    assert not list(module.parameters())
    assert fastce.torch.CrossEntropyLoss().state_dict() == torch.nn.CrossEntropyLoss().state_dict()
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(again.weight, module.weight)


def test_the_module_shows_what_differs_from_the_defaults():
    loss = fastce.torch.CrossEntropyLoss
    assert repr(loss()) == repr(torch.nn.CrossEntropyLoss()) == "CrossEntropyLoss()"
    assert repr(loss(torch.ones(3), ignore_index=0, z_loss=1e-4)) == "CrossEntropyLoss(ignore_index=0, z_loss=0.0001)"
    assert repr(loss(reduction="sum", softcap=30.0)) == "CrossEntropyLoss(reduction='sum', softcap=30.0)"


def train(loss, dtype, accumulate):
    """Return the parameters of a small network after twenty steps on the same numbers."""
    torch.manual_seed(7)
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    x, y = torch.randn(64, 8, dtype=dtype), torch.randint(5, (64,))
    for _ in range(20):
        optimizer.zero_grad()
        for part in range(accumulate):
            (loss(model(x[part::accumulate]), y[part::accumulate]) / accumulate).backward()
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_training_gives_the_parameters_that_torch_gives(dtype, accumulate):
    """Twenty steps may magnify a rounding, 1000 times at the most for a network that learns."""
    options = {"label_smoothing": 0.1, "weight": torch.rand(5, dtype=dtype)}
    actual = train(fastce.torch.CrossEntropyLoss(**options), dtype, accumulate)
    expected = train(torch.nn.CrossEntropyLoss(**options), dtype, accumulate)
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1000 * torch.finfo(dtype).eps)


def test_checkpoints_and_offloaded_gradients(rng):
    """What is saved goes through PyTorch's hooks."""
    logits, target = simple(rng)
    expected = torch.autograd.grad(ours(logits, target), logits)[0]
    for reduction, scale in (("mean", 1.0), ("none", 1 / 32)):
        loss = torch.utils.checkpoint.checkpoint(
            lambda x, reduction=reduction: ours(x, target, reduction=reduction).sum(), logits, use_reentrant=False
        )
        torch.testing.assert_close(torch.autograd.grad(loss * scale, logits)[0], expected)
        with torch.autograd.graph.saved_tensors_hooks(lambda x: x.numpy().tolist(), torch.tensor):
            loss = ours(logits, target, reduction="mean")
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


@pytest.mark.parametrize("name", fastce.torch.__all__)
def test_the_example_runs(name):
    function = getattr(fastce.torch, name)
    text = inspect.getdoc(function)
    parameters = inspect.signature(function).parameters
    for section in ("Parameters", "Raises") * bool(parameters) + ("Notes", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    for parameter in parameters:
        assert parameter in text
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(recurse=False).find(function, name, globs={}):
        runner.run(example, out=report.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(report)


def test_the_name_shadows_nothing():
    """Inside, `torch` is PyTorch; and the package does without either."""
    assert fastce.torch.torch is torch
    code = "import fastce, sys; assert 'torch' not in sys.modules and not hasattr(fastce, 'torch')"
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)


def has_gpu():
    try:
        import cupy
    except ImportError:
        return False
    return torch.cuda.is_available() and cupy.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.skipif(not has_gpu(), reason="no CUDA device for both PyTorch and CuPy")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_a_gpu(dtype, reduction, rng):
    """On the default stream and on another, where a result that is not waited for would be wrong."""
    logits, target = make_problem(rng, (64, 5000), dtype)
    weight = torch.rand(5000)
    expected = leaf(logits)
    loss = ours(expected, target, weight, reduction=reduction, **EXTRAS)
    (loss.sum() * 0.5).backward()
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        with torch.cuda.stream(stream):
            x = logits.cuda().requires_grad_()
            actual = ours(x, target.cuda(), weight.cuda(), reduction=reduction, **EXTRAS)
            (actual.sum() * 0.5).backward()
            assert actual.device == x.grad.device == x.device
            assert_close(actual.cpu(), loss, dtype)
            assert_close(x.grad.cpu(), expected.grad, dtype)
    with pytest.raises(TypeError, match="target must be on the device of input, cuda:0, got cpu"):
        ours(x, target)
