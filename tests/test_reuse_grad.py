"""A loss that overwrites the gradient that it returned last: when it does, when it must not, and what it holds."""

import copy
import gc
import pickle
import threading
import weakref

import ml_dtypes
import numpy as np
import pytest

import fake_cupy
import fastce
import fastce.cuda
from cases import LAYOUTS, make_logits, make_target
from device import to_device
from fastce import _reference
from oracle import assert_equal, assert_matches_reference

SHAPE = (20, 7)


@pytest.fixture
def loss():
    return fastce.CrossEntropyLoss(reuse_grad=True)


def make_problem(rng, shape=SHAPE, dtype=np.float32):
    return make_logits(rng, shape, dtype), make_target(rng, "index", shape)


def grad_of(loss, logits, target, **options):
    return loss.with_grad(logits, target, **options)[1]


@pytest.mark.parametrize("kind", ["index", "prob"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16])
def test_the_next_gradient_overwrites_the_last(loss, dtype, layout, kind, rng):
    for shape in (SHAPE, (2, 5, 3, 4), (9,), (0, 4)):
        results = []
        for _ in range(3):
            logits = LAYOUTS[layout](make_logits(rng, shape, dtype))
            before = logits.copy()
            target = make_target(rng, kind, shape)
            assert_matches_reference(loss.with_grad, logits, target, f"{shape}")
            assert_equal(logits, before)
            results.append(grad_of(loss, logits, target))
        assert results[0] is results[1] is results[2]
        assert results[0].strides == np.empty_like(logits).strides


def test_every_call_of_a_loop_computes_its_own_gradient(rng):
    """With all that a call may bring, in turn."""
    loss = fastce.CrossEntropyLoss(reuse_grad=True, label_smoothing=0.1, reduction="sum")
    first = None
    for grad_output in (None, 2.0, -0.5):
        for sample_weight in (None, rng.random(SHAPE[0])):
            logits, target = make_problem(rng)
            value, grad, stats = loss.with_grad(
                logits, target, grad_output=grad_output, sample_weight=sample_weight, return_stats=True
            )
            options = {"label_smoothing": 0.1, "reduction": "sum", "sample_weight": sample_weight}
            expected = _reference.cross_entropy(logits, target, grad_output=grad_output or 1.0, **options)
            np.testing.assert_allclose(value, expected.loss, rtol=1e-5)
            np.testing.assert_allclose(grad, expected.grad, atol=1e-5)
            np.testing.assert_allclose(stats.lse, expected.stats.lse, rtol=1e-5)
            first = grad if first is None else first
            assert grad is first


def test_without_the_option_gradients_are_new(rng):
    logits, target = make_problem(rng)
    plain = fastce.CrossEntropyLoss()
    assert plain.reuse_grad is False
    one, other = grad_of(plain, logits, target), grad_of(plain, logits, target)
    assert not np.shares_memory(one, other)


CHANGES = {
    "shape": lambda x: x[:13].copy(),
    "number of dimensions": lambda x: x[..., None],
    "dtype": lambda x: x.astype(np.float64),
    "memory order": np.asfortranarray,
    "gaps": lambda x: np.repeat(x, 2, axis=1)[:, ::2],
    "a list": lambda x: x.tolist(),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_other_logits_have_another_gradient(loss, change, rng):
    logits, _ = make_problem(rng)
    target = np.arange(len(logits)) % logits.shape[1]
    kept = grad_of(loss, logits, target)
    before = kept.copy()
    others = change(logits)
    rows = target[: len(others)].reshape(-1, *np.shape(others)[2:])
    grad = grad_of(loss, others, rows)
    assert not np.shares_memory(grad, kept)
    assert_equal(kept, before)
    assert grad.strides == np.empty_like(others).strides or isinstance(others, list)
    np.testing.assert_allclose(grad, _reference.cross_entropy(np.asarray(others), rows).grad, atol=1e-6)
    assert (grad_of(loss, others, rows) is grad) is not isinstance(others, list)


def test_types_of_one_size_are_told_apart(loss, rng):
    for dtype in (np.float16, ml_dtypes.bfloat16, np.float16):
        assert_matches_reference(loss.with_grad, *make_problem(rng, dtype=dtype))


def test_a_last_batch_of_another_size_comes_in_between(loss, rng):
    """Only the last gradient is kept."""
    logits, target = make_problem(rng)
    first = weakref.ref(grad_of(loss, logits, target))
    gc.collect()
    assert first() is not None
    grad_of(loss, logits[:3], target[:3])
    gc.collect()
    assert first() is None


def test_out_is_written_to_if_it_is_given(loss, rng):
    logits, target = make_problem(rng)
    kept = grad_of(loss, logits, target)
    before = kept.copy()
    others, target = make_problem(rng)
    expected = _reference.cross_entropy(others, target).grad
    for out in (np.empty_like(others), others):
        assert grad_of(loss, others, target, out=out) is out
        np.testing.assert_allclose(out, expected, atol=1e-6)
        assert_equal(kept, before)
    assert grad_of(loss, logits, target) is kept


def test_no_argument_is_overwritten(loss, rng):
    """The last gradient may come back as anything."""
    shape = (8, 8)
    logits, target = make_problem(rng, shape)
    none = fastce.CrossEntropyLoss(reuse_grad=True, reduction="none")
    for name, part in {
        "logits": lambda grad: grad,
        "logits in another order": lambda grad: grad.T,
        "target": lambda grad: np.abs(grad, out=grad),
        "sample_weight": lambda grad: grad[:, 3],
        "weight": lambda grad: grad[3],
        "grad_output": lambda grad: grad[::-1, 0],
    }.items():
        used = part(grad_of(none, logits, target))
        before = used.copy()
        arguments = {"logits": logits, "target": target} | {name.partition(" ")[0]: used}
        none.weight = arguments.pop("weight", None)
        value, grad = none.with_grad(**arguments)
        assert_equal(used, before, err_msg=name)
        assert not np.shares_memory(grad, used)
        expected = _reference.cross_entropy(**arguments, weight=none.weight, reduction="none")
        np.testing.assert_allclose(value, expected.loss, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(grad, expected.grad, atol=1e-6)
        none.weight = None


def test_what_its_user_changed_is_left_alone(loss, rng):
    logits, target = make_problem(rng)
    frozen = grad_of(loss, logits, target)
    frozen.flags.writeable = False
    grad = grad_of(loss, logits, target)
    assert not np.shares_memory(grad, frozen)
    grad.resize((7, 20), refcheck=False)
    again = grad_of(loss, logits, target)
    assert again.shape == SHAPE and not np.shares_memory(again, grad)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ({"target": np.full(SHAPE[0], 7)}, IndexError),
        ({"target": np.zeros(3, int)}, ValueError),
        ({"logits": np.zeros(SHAPE, np.complex64)}, TypeError),
        ({"logits": np.ma.zeros(SHAPE, np.float32)}, TypeError),
        ({"logits": None}, TypeError),
        ({"grad_output": np.ones(3)}, ValueError),
        ({"out": np.empty(3)}, ValueError),
        ({"sample_weight": [np.nan] * SHAPE[0]}, ValueError),
    ],
)
def test_a_call_that_raises_leaves_the_last_gradient_as_it_was(loss, wrong, error, rng):
    logits, target = make_problem(rng)
    kept = grad_of(loss, logits, target)
    before = kept.copy()
    messages = []
    for one in (loss, fastce.CrossEntropyLoss()):
        with pytest.raises(error) as caught:
            one.with_grad(**{"logits": logits, "target": target} | wrong)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert_equal(kept, before)
    assert grad_of(loss, logits, target) is kept


def test_each_thread_has_a_gradient_of_its_own(loss, rng):
    problems = [make_problem(rng, (300, 40)) for _ in range(4)]
    expected = [_reference.cross_entropy(*problem).grad for problem in problems]
    grads = [None] * 4
    together = threading.Barrier(4)
    failures = []

    def work(k):
        for _ in range(50):
            grad = grad_of(loss, *problems[k])
            together.wait(60)  # the others have computed theirs, too
            if grads[k] is None:
                grads[k] = grad
            if grad is not grads[k] or not np.allclose(grad, expected[k], atol=1e-6):
                failures.append(k)

    threads = [threading.Thread(target=work, args=[k]) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len({id(grad) for grad in grads}) == 4


def test_the_memory_of_a_thread_goes_with_it_and_that_of_all_with_the_option(loss, rng):
    problem = make_problem(rng)
    kept = []
    thread = threading.Thread(target=lambda: kept.append(weakref.ref(grad_of(loss, *problem))))
    thread.start()
    thread.join()
    kept.append(weakref.ref(grad_of(loss, *problem)))
    gc.collect()
    assert kept[0]() is None and kept[1]() is not None
    loss.reuse_grad = False
    gc.collect()
    assert kept[1]() is None
    assert grad_of(loss, *problem) is not grad_of(loss, *problem)
    loss.reuse_grad = True
    assert grad_of(loss, *problem) is grad_of(loss, *problem)


def test_it_is_an_option_like_the_others(loss, rng):
    plain = fastce.CrossEntropyLoss()
    assert repr(loss) == "CrossEntropyLoss(reuse_grad=True)" and repr(plain) == "CrossEntropyLoss()"
    other = fastce.CrossEntropyLoss(reuse_grad=True)
    grad_of(other, *make_problem(rng))
    assert loss == other and loss != plain
    plain.reuse_grad = True
    assert loss == plain and plain.reuse_grad is True


@pytest.mark.parametrize("make", [copy.copy, copy.deepcopy, lambda loss: pickle.loads(pickle.dumps(loss))])
def test_copies_have_gradients_of_their_own(loss, make, rng):
    problem = make_problem(rng)
    loss.softcap, loss.name = 5.0, "mine"
    kept = grad_of(loss, *problem)
    before = kept.copy()
    again = make(loss)
    assert again == loss and again.reuse_grad is True and again.name == "mine"
    grad = grad_of(again, problem[0] + 1, problem[1])
    assert not np.shares_memory(grad, kept)
    assert_equal(kept, before)
    assert grad_of(again, *problem) is grad and grad_of(loss, *problem) is kept
    assert len(pickle.dumps(loss)) < kept.nbytes


def test_on_a_gpu(xp, loss, rng):
    (logits, target), (others, _) = make_problem(rng), make_problem(rng)
    x, y = to_device(xp, logits), to_device(xp, target)
    grad = grad_of(loss, x, y)
    assert isinstance(grad, xp.ndarray)
    assert grad_of(loss, to_device(xp, others), y) is grad
    np.testing.assert_allclose(grad.get(), _reference.cross_entropy(others, target).grad, atol=1e-6)

    before = grad.get()
    np.testing.assert_allclose(grad_of(loss, grad, y).get(), _reference.cross_entropy(before, target).grad, atol=1e-6)
    assert_equal(grad.get(), before)  # as an argument it is not overwritten

    kept = grad_of(loss, x, y)
    out = xp.empty_like(x)
    assert grad_of(loss, x, y, out=out) is out
    assert grad_of(loss, x.T.copy().T, y) is not kept
    kept = grad_of(loss, x, y)
    before = kept.get()
    with fastce.cuda.synchronous_checks(), pytest.raises(IndexError):
        loss.with_grad(x, y + 7)
    assert_equal(kept.get(), before)
    assert grad_of(loss, x, y) is kept
    assert not isinstance(grad_of(loss, logits, target), xp.ndarray)


def test_each_of_several_gpus_has_its_own(xp, loss, rng, monkeypatch):
    if xp is not fake_cupy:
        pytest.skip("the stand-in has as many devices as it is told")
    logits, target = make_problem(rng)
    x, y = xp.asarray(logits), xp.asarray(target)
    first = grad_of(loss, x, y)
    monkeypatch.setattr(fake_cupy.ndarray, "device", property(lambda array: fake_cupy.Device(int(array is not first))))
    assert grad_of(loss, x, y) is not first
