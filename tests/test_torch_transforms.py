"""fastce.torch under torch.func, in forward mode, compiled, exported and traced: against PyTorch's own loss there.

What PyTorch's loss lacks is composed of its operations, which its transforms then differentiate and batch.
"""

import functools
import itertools
import warnings

import pytest

import fastce
from cases import make_logits, make_target, options_for

torch = pytest.importorskip("torch")

import fastce.torch  # noqa: E402 - it cannot be imported without

F = torch.nn.functional
forward_ad = torch.autograd.forward_ad
ours = fastce.torch.cross_entropy
func = torch.func

# PyTorch's own forward mode, tracers and compilers call what PyTorch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*is deprecated:FutureWarning")

REDUCTIONS = ["mean", "sum", "none"]
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


def theirs(
    x,
    target,
    weight=None,
    ignore_index=-100,
    reduction="mean",
    label_smoothing=0.0,
    *,
    sample_weight=None,
    logit_scale=1.0,
    softcap=None,
    z_loss=0.0,
):
    """Return the loss by PyTorch's operations."""
    x = x * logit_scale
    if softcap is not None:
        x = softcap * torch.tanh(x / softcap)
    axis = min(x.ndim - 1, 1)
    is_index = not target.is_floating_point()
    # PyTorch's own loss selects by a mask, which its vmap cannot batch.
    log_p = torch.log_softmax(x, axis)
    weights = torch.ones(x.shape[axis], dtype=x.dtype) if weight is None else weight
    weighted = log_p * weights.reshape(-1, *[1] * (x.ndim - 1 - axis))
    even = -label_smoothing / x.shape[axis] * weighted.sum(axis)
    kept = (target != ignore_index) if is_index else torch.ones_like(even, dtype=torch.bool)
    if is_index:
        chosen = weighted.gather(axis, torch.where(kept, target, 0).unsqueeze(axis)).squeeze(axis)
    else:
        chosen = (target * weighted).sum(axis)
    rows = kept * (even - (1 - label_smoothing) * chosen)
    rows = rows + kept * (z_loss * torch.logsumexp(x, axis) ** 2)
    factor = torch.ones_like(rows) if sample_weight is None else sample_weight
    rows = factor * rows
    if reduction == "none":
        return rows
    if reduction == "sum":
        return rows.sum()
    if is_index and weight is not None:
        factor = factor * weight[torch.where(kept, target, 0)]
    return rows.sum() / (factor * kept).sum()


def assert_same(actual, expected, tolerance=1e-12):
    """Compare nests of tensors whose numbers are of order one, in float64 unless the tolerance says otherwise."""
    actual, expected = (torch.utils._pytree.tree_leaves(x) for x in (actual, expected))
    assert len(actual) == len(expected) > 0
    for a, b in zip(actual, expected, strict=True):
        assert a.shape == b.shape
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


def make_batch(kind, shape=(4, 6, 5), ignored=True):
    """Return samples of logits in float64, and targets, some of them ignored."""
    x = torch.randn(shape, dtype=torch.float64)
    if kind == "prob":
        return x, torch.rand(shape, dtype=torch.float64)
    target = torch.randint(shape[2], shape[:2] + shape[3:])
    if ignored and target.shape[1] > 1:
        target[0, 1] = target[2, 0] = -100
    return x, target


# Each takes a loss, logits, targets and tangents, those of a batch.
TRANSFORMS = {
    "vmap": lambda f, x, y, v: func.vmap(f)(x, y),
    "vmap of one target": lambda f, x, y, v: func.vmap(f, in_dims=(0, None))(x, y[1]),
    "vmap of one input": lambda f, x, y, v: func.vmap(f, in_dims=(None, 0))(x[1], y),
    "vmap of other axes": lambda f, x, y, v: func.vmap(f, in_dims=(-1, 1))(x.movedim(0, -1), y.movedim(0, 1)),
    "vmap twice": lambda f, x, y, v: func.vmap(func.vmap(f, in_dims=(None, 0)), in_dims=(0, None))(x, y),
    "grad": lambda f, x, y, v: func.grad(lambda x: f(x, y[1]).sum())(x[1]),
    "per sample": lambda f, x, y, v: func.vmap(func.grad(lambda x, y: f(x, y).sum()))(x, y),
    "grad of vmap": lambda f, x, y, v: func.grad(lambda x: (func.vmap(f)(x, y).flatten() ** 2).sum())(x),
    "jvp": lambda f, x, y, v: func.jvp(lambda x: f(x, y[1]), (x[1],), (v[1],)),
    "vmap of jvp": lambda f, x, y, v: func.vmap(lambda x, y, v: func.jvp(lambda x: f(x, y), (x,), (v,)))(x, y, v),
    "jvp of vmap": lambda f, x, y, v: func.jvp(lambda x: func.vmap(f)(x, y), (x,), (v,)),
    "jacrev": lambda f, x, y, v: func.jacrev(lambda x: f(x, y[1]))(x[1]),
    "jacfwd": lambda f, x, y, v: func.jacfwd(lambda x: f(x, y[1]))(x[1]),
    "linearize": lambda f, x, y, v: func.linearize(lambda x: f(x, y[1]), x[1])[1](v[1]),
    "jacobian": lambda f, x, y, v: torch.autograd.functional.jacobian(lambda x: f(x, y[1]), x[1], vectorize=True),
    "forward jacobian": lambda f, x, y, v: torch.autograd.functional.jacobian(
        lambda x: f(x, y[1]), x[1], vectorize=True, strategy="forward-mode"
    ),
    "dual": lambda f, x, y, v: derivative_of_dual(lambda x: f(x, y[1]), x[1], v[1]),
}


def derivative_of_dual(f, x, v):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_give_what_torch_gives(name, kind, reduction):
    transform = TRANSFORMS[name]
    weight = torch.rand(5, dtype=torch.float64) + 0.1
    cases = [{}, {"weight": weight, "label_smoothing": 0.1}, {"weight": -weight}]
    for shape in ((4, 6, 5), (4, 2, 5, 3, 1)):
        x, y = make_batch(kind, shape)
        if kind == "index":
            y[:, -1] = 0  # or a mean may be one over nothing, of which there is another test
        v = torch.randn_like(x)
        for options in cases:
            options["reduction"] = reduction
            assert_same(*(transform(functools.partial(f, **options), x, y, v) for f in (ours, theirs)))
        if kind == "index":
            ignored, options = torch.where(y == -100, 3, y), {"ignore_index": 3, "reduction": reduction}
            assert_same(*(transform(functools.partial(f, **options), x, ignored, v) for f in (ours, theirs)))
        extras = {"weight": weight, **EXTRAS, "reduction": reduction}
        sample_weight = torch.rand(y.shape[1:] if kind == "index" else (*x.shape[1:2], *x.shape[3:]))
        extras["sample_weight"] = sample_weight.double()
        if name not in ("vmap twice", "vmap of other axes") or len(shape) == 3:
            assert_same(*(transform(functools.partial(f, **extras), x, y, v) for f in (ours, theirs)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_each_sample_has_one_row(kind, reduction):
    """Gradients per sample as they are asked for: of single rows, without any axis of rows."""
    x = torch.randn(9, 5, dtype=torch.float64)
    y = torch.randint(5, (9,)) if kind == "index" else torch.rand(9, 5, dtype=torch.float64)
    weight = torch.rand(5, dtype=torch.float64) + 0.1
    for options in ({}, {"weight": weight, "label_smoothing": 0.2}):
        options["reduction"] = reduction
        for transform in (func.vmap, lambda f: func.vmap(func.grad(f)), lambda f: func.vmap(func.grad_and_value(f))):
            assert_same(*(transform(functools.partial(f, **options))(x, y) for f in (ours, theirs)))


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_weights_of_each_sample(kind, reduction):
    x, y = make_batch(kind)
    weight = torch.rand(4, 5, dtype=torch.float64) - 0.3
    sample_weight = torch.rand(4, 6, dtype=torch.float64) - 0.3
    for dims in itertools.product((0, None), repeat=2):
        arguments = [w if dim == 0 else w[1] for w, dim in zip((weight, sample_weight), dims, strict=True)]
        for derive in (lambda f: f, lambda f: func.grad(lambda *a: f(*a).sum())):
            results = []
            for f in (ours, theirs):

                def loss(x, y, w, s, f=f):
                    return f(x, y, w, sample_weight=s, reduction=reduction, label_smoothing=0.1)

                results.append(func.vmap(derive(loss), in_dims=(0, 0, *dims))(x, y, *arguments))
            assert_same(*results, tolerance=1e-10)  # signed weights may nearly cancel


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_gradcheck_of_forward_and_batched_modes(kind, reduction, rng):
    """PyTorch's central differences, at its own tolerances."""
    for shape in ((5,), (6, 4), (2, 3, 2)):
        logits = torch.from_numpy(make_logits(rng, shape, float))
        target = torch.as_tensor(make_target(rng, kind, shape))
        options = {
            name: torch.from_numpy(x) + 0.1
            for name, x in options_for(rng, ("weight", "sample_weight"), kind, shape).items()
            if shape != (5,) or name == "weight"
        }
        for chosen in ({}, {**options, **EXTRAS}):
            assert torch.autograd.gradcheck(
                lambda x, target=target, chosen=chosen: ours(x, target, reduction=reduction, **chosen),
                logits.requires_grad_(),
                check_forward_ad=True,
                check_batched_grad=True,
                check_batched_forward_grad=True,
            )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_forward_mode(requires_grad):
    """The logits need not require a gradient, nor need gradients be enabled."""
    x, y = make_batch("index")
    x, y, v = x[1].requires_grad_(requires_grad), y[1], torch.randn(6, 5, dtype=torch.float64)
    expected = derivative_of_dual(lambda x: F.cross_entropy(x, y), x, v)
    assert_same(derivative_of_dual(lambda x: ours(x, y), x, v), expected)
    with torch.no_grad():
        assert_same(derivative_of_dual(lambda x: ours(x, y), x, v), expected)
    with forward_ad.dual_level():  # within, but of a constant
        assert forward_ad.unpack_dual(ours(x, y)).tangent is None
    # An upstream gradient with a tangent, of which the gradient is a linear function.
    x = x.detach().requires_grad_()
    tangents = []
    for f in (ours, F.cross_entropy):
        loss = f(x, y)
        with forward_ad.dual_level():
            factor = forward_ad.make_dual(torch.ones_like(loss), torch.full_like(loss, 3.0))
            (grad,) = torch.autograd.grad(loss, x, factor)
            tangents.append(forward_ad.unpack_dual(grad).tangent)
    assert_same(*tangents)


def test_means_over_nothing():
    """Of some samples, not of all."""
    x, y = make_batch("index", ignored=False)
    y[1] = -100
    sample_weight = torch.ones(4, 6, dtype=torch.float64)
    sample_weight[3, ::2] = -1  # whose sum is 0
    x[3, 0] = torch.nan  # in a row that counts, but for nothing
    for on_empty, value in (("nan", torch.nan), ("zero", 0.0)):

        def loss(x, y, s, on_empty=on_empty):
            return ours(x, y, sample_weight=s, on_empty=on_empty)

        losses = func.vmap(loss)(x, y, sample_weight)
        torch.testing.assert_close(losses[[1, 3]], torch.full((2,), value, dtype=torch.float64), equal_nan=True)
        for grads in (
            func.vmap(func.grad(loss))(x, y, sample_weight),
            func.grad(lambda x, f=loss: func.vmap(f)(x, y, sample_weight)[[0, 2]].sum())(x),
        ):
            assert not grads[[1, 3]].any()
            for i in (0, 2):
                assert_same(grads[i], func.grad(F.cross_entropy)(x[i], y[i]))


def test_skipped_rows_hold_anything():
    x, y = make_batch("index", ignored=False)
    clean = x.clone()
    y[:, 2] = -100
    x[:, 2] = torch.tensor([torch.nan, torch.inf, 0, 1, 2])
    v = torch.randn_like(x)
    v[:, 2] = torch.inf
    assert_same(func.vmap(ours)(x, y), func.vmap(F.cross_entropy)(clean, y))
    grads = func.vmap(func.grad(ours))(x, y)
    assert not grads[:, 2].any()
    assert_same(grads, func.vmap(func.grad(F.cross_entropy))(clean, y))
    tangent = func.jvp(lambda x: ours(x, y[0]), (x[0],), (v[0],))[1]
    assert_same(tangent, func.jvp(lambda x: F.cross_entropy(x, y[0]), (clean[0],), (v[0].nan_to_num(posinf=0),))[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_small_gradients_of_confident_rows(dtype):
    """Rounded once, after the upstream gradient: half precision would make 0 of them, PyTorch of float32's too."""
    y = torch.randint(50, (8, 3))
    x = (14 * F.one_hot(y, 50) + torch.randn(8, 3, 50)).to(dtype)
    scale = 2.0**16

    def loss(f):
        return lambda x, y: f(x, y) * scale

    # Of numbers that are not subnormal each is rounded once to the dtype, and made in float32 by sums over 50.
    kind = torch.finfo(dtype)
    tolerance = {"rtol": 2 * kind.eps + 1e-5, "atol": kind.smallest_normal}
    exact = func.vmap(func.grad(loss(F.cross_entropy)))(x.double(), y)
    for actual in (
        func.vmap(func.grad(lambda x, y: ours(x, y).float() * scale))(x, y) if dtype != torch.float16 else None,
        torch.stack([func.grad(lambda x, y: half_upstream(x, y, scale))(a, b) for a, b in zip(x, y, strict=True)]),
        func.vmap(func.grad(lambda x, y: half_upstream(x, y, scale)))(x, y),
    ):
        if actual is not None:
            assert actual.dtype == dtype
            torch.testing.assert_close(actual.double(), exact, **tolerance)
    v = torch.randn(8, 3, 50).to(dtype)
    tangent = func.vmap(lambda x, y, v: func.jvp(lambda x: half_upstream(x, y, scale), (x,), (v,))[1])(x, y, v)
    exact = func.vmap(lambda x, y, v: func.jvp(lambda x: loss(F.cross_entropy)(x, y), (x,), (v,))[1])(
        x.double(), y, v.double()
    )
    torch.testing.assert_close(tangent.double(), exact, rtol=0.02, atol=2 * kind.eps * float(exact.abs().max()))


def half_upstream(x, y, scale):
    """Return a scaled loss as a step of mixed precision has it: in float32, under autocast."""
    with torch.autocast("cpu", torch.bfloat16):
        return ours(x, y) * scale


def test_the_second_derivative_is_refused():
    """In whatever modes: a gradient that silently counted as a constant would be worse."""
    x, y = make_batch("index")
    x, y, v = x[1], y[1], torch.randn(6, 5, dtype=torch.float64)

    def both_modes():
        with forward_ad.dual_level():
            leaf = x.clone().requires_grad_()
            loss = ours(forward_ad.make_dual(leaf, v), y)
            torch.autograd.grad(loss, leaf)

    def backward_of_tangent():
        with forward_ad.dual_level():
            leaf = x.clone().requires_grad_()
            forward_ad.unpack_dual(ours(forward_ad.make_dual(leaf, v), y)).tangent.backward()

    for reduction in REDUCTIONS:

        def loss(x, reduction=reduction):
            return ours(x, y, reduction=reduction).sum()

        for call in (
            lambda f=loss: func.hessian(f)(x),
            lambda f=loss: func.grad(lambda x: func.grad(f)(x).sum())(x),
            lambda f=loss: func.jvp(func.grad(f), (x,), (v,)),
            lambda f=loss: func.grad(lambda x: func.jvp(f, (x,), (v,))[1])(x),
            lambda f=loss: func.jvp(lambda x: func.jvp(f, (x,), (v,))[1], (x,), (v,)),
            lambda f=loss: func.vmap(func.hessian(f))(x[None]),
            lambda f=loss: torch.autograd.functional.hessian(f, x),
            both_modes,
            backward_of_tangent,
        ):
            with pytest.raises(NotImplementedError, match=r"cannot be differentiated again: .* or use torch"):
                call()


@pytest.mark.parametrize("name", ["target", "weight", "sample_weight", "logit_scale", "softcap", "z_loss"])
def test_derivatives_of_anything_else_are_refused(name):
    """As gradients and as tangents, of all samples or of each; never a derivative of zeros."""
    sizes = {"target": (6, 5), "weight": (5,), "sample_weight": (6,)}
    x, y = torch.randn(6, 5), torch.rand(6, 5)
    value = torch.rand(sizes.get(name, ()))

    def loss(value, x=x):
        return ours(x, **{"target": y, name: value})

    calls = [
        lambda: func.grad(loss)(value),
        lambda: func.jvp(loss, (value,), (value,)),
        lambda: derivative_of_dual(loss, value, value),
        lambda: func.vmap(func.grad(loss))(value[None]),
        lambda: func.grad(lambda w: func.vmap(lambda x: loss(w, x))(x[None]).sum())(value),
        lambda: func.grad(lambda w: func.vmap(lambda w: loss(w))(w[None]).sum())(value),
        lambda: func.jvp(lambda w: func.vmap(lambda x: loss(w, x))(x[None]).sum(), (value,), (value,)),
        lambda: func.jvp(lambda w: func.grad(lambda x: loss(w, x))(x), (value,), (value,)),
    ]
    if name not in sizes:
        calls.append(lambda: func.vmap(loss)(value[None]))
    for call in calls:
        with pytest.raises(
            (NotImplementedError, TypeError),
            match=rf"^{name} must (not require a gradient|be a number where torch.func)|cannot be differentiated again",
        ):
            call()


def test_what_does_not_fit_is_refused_under_vmap():
    x, y = make_batch("index", ignored=False)
    weight, sample_weight = torch.rand(5), torch.rand(6)
    for call, error, message in (
        (lambda: func.vmap(ours)(x, y + 4), IndexError, r"^target\[\d, \d\] is \d, but there are 5 classes"),
        (lambda: func.vmap(ours)(x, y[:, :2]), ValueError, "^target of class indices must have shape"),
        (lambda: func.vmap(lambda x, y: ours(x, y, weight[:2]))(x, y), ValueError, "^weight must have shape"),
        (
            lambda: func.vmap(lambda x, y: ours(x, y, sample_weight=sample_weight[:2]))(x, y),
            ValueError,
            "^sample_weight must have shape",
        ),
        (lambda: func.vmap(lambda x, y: ours(x, y, reduction="max"))(x, y), ValueError, "^reduction must be one of"),
        (lambda: func.vmap(lambda x, y: ours(x, y, z_loss=-1.0))(x, y), ValueError, "^z_loss must be"),
        (lambda: func.vmap(lambda x, y: ours(x, y, n_threads=0))(x, y), ValueError, "^n_threads must be"),
    ):
        with pytest.raises(error, match=message):
            call()


def test_training_a_network_sample_by_sample():
    """As in the tutorials: a functional call, its gradients for each sample, the same as those of a loop of PyTorch."""
    model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 5)).double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    x, y = torch.randn(12, 8, dtype=torch.float64), torch.randint(5, (12,))

    def loss(parameters, x, y):
        logits = func.functional_call(model, parameters, (x[None],))
        return ours(logits, y[None], label_smoothing=0.1)

    grads = func.vmap(func.grad(loss), in_dims=(None, 0, 0))(parameters, x, y)
    for i in range(12):
        expected = torch.autograd.grad(
            F.cross_entropy(model(x[i : i + 1]), y[i : i + 1], label_smoothing=0.1), list(model.parameters())
        )
        assert_same([grad[i] for grad in grads.values()], expected)


def test_a_batch_is_one_call(monkeypatch):
    """Of thousands of samples none has a call of its own, and nothing of the logits is copied."""
    seen = []
    real = fastce.cross_entropy_with_grad

    def spy(logits, *arguments, **options):
        seen.append(logits.ctypes.data)
        return real(logits, *arguments, **options)

    monkeypatch.setattr(fastce, "cross_entropy_with_grad", spy)
    x, y = make_batch("index")
    func.vmap(func.grad(ours))(x, y)
    assert seen == [x.data_ptr()]


# Compilers, tracers and modes.


def step(f, x, *arguments):
    """Return loss and gradient."""
    x = x.detach().clone().requires_grad_()
    loss = f(x * 2, *arguments)
    loss.backward(torch.full_like(loss, 0.5))
    return loss.detach(), x.grad


@pytest.fixture
def compiler():
    """Return torch.compile, with nothing compiled before."""
    torch._dynamo.reset()
    yield torch.compile
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["index", "prob"])
def test_compiled(kind, backend, compiler):
    """Whole, without a break."""
    x, y = make_batch(kind, (4, 6, 5, 2))
    y = y if kind == "prob" else torch.randint(6, (4, 5, 2))
    weight, sample_weight = torch.rand(6, dtype=torch.float64), torch.rand(4, 5, 2, dtype=torch.float64)
    for reduction in REDUCTIONS:
        options = {"weight": weight, "sample_weight": sample_weight, "reduction": reduction, **EXTRAS}
        results = []
        for f in (ours, theirs):

            def loss(x, f=f, options=options):
                return f(x, y, **options)

            results.append(step(compiler(loss, fullgraph=True, backend=backend) if f is ours else loss, x))
        assert_same(*results)


def test_compiled_for_any_number_of_rows(compiler):
    compiled = compiler(ours, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (3, 4, 7):
        x, y = torch.randn(n, 5, dtype=torch.float64), torch.randint(5, (n,))
        assert_same(step(compiled, x, y), step(F.cross_entropy, x, y))


def test_compiled_modules_and_types(compiler):
    module = fastce.torch.CrossEntropyLoss(torch.rand(5), label_smoothing=0.1)
    other = torch.nn.CrossEntropyLoss(module.weight, label_smoothing=0.1)
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    compiled = compiler(module, fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, x, y), step(other, x, y), 1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        loss, grad = step(compiled, x.to(dtype), y)
        assert loss.dtype == grad.dtype == dtype
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x.to(dtype), y).dtype == torch.float32


def test_compiled_errors(compiler):
    """Of options while compiling, of numbers when called; each with our sentence in it."""
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    compiled = compiler(ours, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"^target\[0\] is 9, but there are 5 classes"):
        compiled(x, y * 0 + 9)
    with pytest.raises(ValueError, match=r"^target of class indices must have shape"):
        compiled(x, y[:4])
    for call, message in (
        (lambda: compiled(x, y, label_smoothing=2.0), "label_smoothing must be in"),
        (lambda: compiled(x, y, torch.rand(5).requires_grad_()), "weight must not require a gradient"),
        (lambda: compiled(x.long(), y), "input must be float32"),
        (lambda: compiled(x, y, z_loss=torch.tensor(0.1)), "z_loss must be a number where torch.func"),
    ):
        with pytest.raises(torch._dynamo.exc.TorchDynamoException, match=message):
            call()


def test_transforms_within_a_compiled_function(compiler):
    """Refused whole, because a compiler would take tangents for zeros; with breaks they run as they are."""
    x, y = make_batch("index")
    v = torch.randn_like(x)
    for name in ("jvp", "per sample", "dual"):
        transform = TRANSFORMS[name]
        expected = transform(F.cross_entropy, x, y, v)
        assert_same(compiler(lambda x, v, t=transform: t(ours, x, y, v), backend="eager")(x, v), expected)
        with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot be compiled within a transform"):
            compiler(lambda x, v, t=transform: t(ours, x, y, v), fullgraph=True, backend="eager")(x, v)
    compiled = compiler(lambda x: ours(x, y[1]), fullgraph=True, backend="eager")
    assert_same(compiled(x[1]), F.cross_entropy(x[1], y[1]))
    with pytest.raises(torch._dynamo.exc.Unsupported, match="cannot be compiled within a transform"):
        derivative_of_dual(compiled, x[1], v[1])  # compiled before, for no tangent


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_backward_within_a_compiled_function(reduction, compiler):
    """Where the compiler has given up on the loss, or was not asked."""
    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    results = []
    for f in (ours, F.cross_entropy):
        leaf = x.clone().requires_grad_()
        loss = f(leaf * 2, y, reduction=reduction).sum()

        def backward(leaf=leaf, loss=loss):
            loss.backward(torch.full_like(loss, 0.5))
            return leaf.grad

        results.append(compiler(backward, backend="eager")())
    assert_same(*results)


def test_exported():
    class Model(torch.nn.Module):
        def __init__(self, loss):
            super().__init__()
            self.layer = torch.nn.Linear(5, 5)
            self.loss = loss

        def forward(self, x, y):
            return self.loss(self.layer(x), y)

    model = Model(fastce.torch.CrossEntropyLoss(label_smoothing=0.1))
    expected = Model(torch.nn.CrossEntropyLoss(label_smoothing=0.1))
    expected.load_state_dict(model.state_dict())
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    rows = torch.export.Dim("rows")
    for strict, shapes in ((False, None), (True, None), (False, {"x": {0: rows}, "y": {0: rows}})):
        program = torch.export.export(model, (x, y), strict=strict, dynamic_shapes=shapes).module()
        n = 6 if shapes is None else 9
        x, y = torch.randn(n, 5), torch.randint(5, (n,))
        loss = program(x, y)
        assert_same(loss, expected(x, y), 1e-6)
        (grad,) = torch.autograd.grad(loss, program.layer.weight)
        assert_same(grad, torch.autograd.grad(expected(x, y), expected.layer.weight)[0], 1e-6)
        x, y = x[:6], y[:6]


def test_traced():
    """Not as constants: what was traced with one batch is right for the next."""
    from torch.fx.experimental.proxy_tensor import make_fx

    x, y = make_batch("index")
    x, y, other = x[1], y[1], torch.randn(6, 5, dtype=torch.float64)
    traced = torch.jit.trace(lambda x, y: ours(x, y), (x, y))
    assert_same(step(traced, other, y), step(F.cross_entropy, other, y))
    assert_same(make_fx(lambda x, y: ours(x, y))(x, y)(other, y), F.cross_entropy(other, y))
    for transform in (func.grad, lambda f: lambda x, y: func.jvp(lambda x: f(x, y), (x,), (x,))):
        traced = make_fx(transform(lambda x, y: ours(x, y)))(x, y)
        assert_same(traced(other, y), transform(F.cross_entropy)(other, y))
    traced = torch.fx.symbolic_trace(lambda x: ours(x, y))
    assert_same(traced(other), F.cross_entropy(other, y))


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_fake_tensors(reduction):
    """They have shapes, types and strides, and no numbers."""
    from torch._subclasses import FakeTensorMode

    real = torch.randn(2, 5, 3, 4).contiguous(memory_format=torch.channels_last).bfloat16()
    with FakeTensorMode() as mode:
        x = mode.from_tensor(real).requires_grad_()
        y = torch.zeros(2, 3, 4, dtype=torch.int64)
        loss, expected = ours(x, y, reduction=reduction), F.cross_entropy(x, y, reduction=reduction)
        assert (loss.shape, loss.dtype) == (expected.shape, expected.dtype)
        loss.sum().backward()
        assert (x.grad.stride(), x.grad.dtype) == (real.stride(), real.dtype)
        with pytest.raises(ValueError, match="label_smoothing must be in"):
            ours(x, y, label_smoothing=7.0)


def test_modes_see_an_operator():
    """As those that count, log or keep what is computed do."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            seen.append(str(function))
            return function(*arguments, **(options or {}))

    x, y = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    expected = step(F.cross_entropy, x, y)
    seen = []
    with Log():
        assert_same(step(ours, x, y), expected)
    assert [name for name in seen if "fastce" in name] == [
        "fastce.cross_entropy.default",
        "fastce.cross_entropy_grad.default",
    ]
    contexts = functools.partial(create_selective_checkpoint_contexts, [torch.ops.fastce.cross_entropy.default])
    kept = functools.partial(checkpoint, ours, use_reentrant=False, context_fn=contexts)
    assert_same(step(kept, x, y), expected)


def test_the_operators_keep_the_rules_for_operators():
    """PyTorch's own check: schemas, fake kernels, autograd, and all of these under the compiler."""
    x, y = torch.randn(6, 5), torch.randint(5, (6,))
    weight, sample_weight = torch.rand(5), torch.rand(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for reduction in REDUCTIONS:
            options = (1, reduction, -100, 0.1, 1.0, None, 0.0, "nan", None)
            for logits in (x, x.clone().requires_grad_(), x.half()):
                torch.library.opcheck(
                    torch.ops.fastce.cross_entropy.default, (logits, y, weight, sample_weight, *options)
                )
            ones = torch.ones(6 if reduction == "none" else ())
            torch.library.opcheck(
                torch.ops.fastce.cross_entropy_grad.default, (ones, x, y, weight, sample_weight, *options)
            )
