"""Results against scikit-learn and SciPy: independent implementations of parts of this library."""

import numpy as np
import pytest

import fastce
from cases import make_logits

pytestmark = pytest.mark.every_isa(by_default=True)


def test_mean_equals_log_loss_of_scikit_learn(dtype, rng):
    metrics = pytest.importorskip("sklearn.metrics")
    logits = make_logits(rng, (200, 7), dtype)
    target = rng.integers(0, 7, 200)
    sample_weight = rng.uniform(0, 2, 200)
    prob = fastce.softmax(np.float64(logits))
    for weights in (None, sample_weight):
        expected = metrics.log_loss(target, prob, sample_weight=weights, labels=np.arange(7))
        actual = fastce.cross_entropy(logits, target, sample_weight=weights)
        np.testing.assert_allclose(actual, expected, rtol=8 * np.finfo(dtype).eps)


def test_gradient_equals_scikit_learns_multinomial_loss(dtype, rng):
    """The one promise of this private class that is used here, loss and gradient per row, has stood for years."""
    module = pytest.importorskip("sklearn._loss.loss")
    peer = module.HalfMultinomialLoss(n_classes=7)
    logits = make_logits(rng, (200, 7), dtype)
    target = rng.integers(0, 7, 200)
    sample_weight = rng.uniform(0.5, 2, 200).astype(dtype)
    expected_loss, expected_grad = peer.loss_gradient(target.astype(dtype), logits, sample_weight)
    loss, grad = fastce.cross_entropy_with_grad(logits, target, sample_weight=sample_weight, reduction="none")
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(loss, expected_loss, rtol=16 * eps, atol=16 * eps)
    np.testing.assert_allclose(grad, expected_grad, rtol=16 * eps, atol=16 * eps)


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
def test_softmax_family_equals_scipy(dtype, name, rng):
    special = pytest.importorskip("scipy.special")
    for shape in [(9,), (30, 10), (4, 700), (3, 20, 4)]:
        for axis in range(len(shape)):
            x = make_logits(rng, shape, dtype)
            x.reshape(-1)[:: x.size // 3 + 1] = -np.inf
            expected = getattr(special, name)(np.float64(x), axis=axis)
            actual = getattr(fastce, name)(x, axis=axis)
            size = 16 * np.finfo(dtype).eps
            np.testing.assert_allclose(actual, expected, rtol=size, atol=0 if name == "softmax" else size)
