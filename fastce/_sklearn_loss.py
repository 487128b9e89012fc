"""The loss of scikit-learn's own models: its class is the base here, for its boosting takes no other object."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn._loss.loss import HalfMultinomialLoss as _SklearnLoss

import fastce


class HalfMultinomialLoss(_SklearnLoss):  # type: ignore[misc]
    """The loss under scikit-learn's own models, in the place of ``sklearn._loss.HalfMultinomialLoss``.

    It may be given as `loss` to ``HistGradientBoostingClassifier``, and does in ``LinearModelLoss`` what it replaces.

    Parameters
    ----------
    sample_weight : ignored
        scikit-learn's.
    n_classes : int, default 3
        The number of classes.
    xp, device : ignored
        scikit-learn's.

    Raises
    ------
    IndexError, ValueError, TypeError
        From its methods, as from `fastce.cross_entropy_with_grad`.

    Notes
    -----
    The methods have scikit-learn's parameters: `y_true`, class indices of any real dtype, shape (n_samples,);
    `raw_prediction`, the logits, shape (n_samples, n_classes), of any memory layout; `sample_weight`, shape
    (n_samples,); `n_threads`; and places for the results, which may be of another dtype than `raw_prediction`, and
    `gradient_out` may be `raw_prediction` itself. With p the softmax of a row and y its class, they make

        loss = -log p_y,  gradient_k = p_k - [k = y],  hessian_k = p_k (1 - p_k),

    each times the row's weight. Confident rows keep their digits: see `fastce.cross_entropy_with_grad`.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.sklearn import HalfMultinomialLoss
    >>> loss = HalfMultinomialLoss(n_classes=3)
    >>> value, grad = loss.loss_gradient(np.array([0, 2]), np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    >>> print(value.round(4), grad[0].round(4))
    [0.2395 3.0949] [-0.213   0.1065  0.1065]
    """

    def loss(
        self,
        y_true: NDArray[Any],
        raw_prediction: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        loss_out: NDArray[Any] | None = None,
        n_threads: int = 1,
    ) -> NDArray[Any]:
        """Return the losses of the rows."""
        loss = fastce.cross_entropy(raw_prediction, **_options(y_true, sample_weight, n_threads))
        return _put(loss, loss_out)

    def loss_gradient(
        self,
        y_true: NDArray[Any],
        raw_prediction: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        loss_out: NDArray[Any] | None = None,
        gradient_out: NDArray[Any] | None = None,
        n_threads: int = 1,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the losses of the rows and the gradient, by one sweep."""
        loss, grad = fastce.cross_entropy_with_grad(
            raw_prediction,
            out=_place(gradient_out, raw_prediction),
            **_options(y_true, sample_weight, n_threads),
        )
        return _put(loss, loss_out), _put(grad, gradient_out)

    def gradient(
        self,
        y_true: NDArray[Any],
        raw_prediction: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        gradient_out: NDArray[Any] | None = None,
        n_threads: int = 1,
    ) -> NDArray[Any]:
        """Return the gradient."""
        return self.loss_gradient(y_true, raw_prediction, sample_weight, None, gradient_out, n_threads)[1]

    def gradient_hessian(
        self,
        y_true: NDArray[Any],
        raw_prediction: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        gradient_out: NDArray[Any] | None = None,
        hessian_out: NDArray[Any] | None = None,
        n_threads: int = 1,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the gradient and the diagonal of the Hessian."""
        grad, hess = fastce.cross_entropy_grad_hess(
            raw_prediction,
            out=_place(gradient_out, raw_prediction),
            hess_out=_place(hessian_out, raw_prediction),
            **_options(y_true, sample_weight, n_threads),
        )
        return _put(grad, gradient_out), _put(hess, hessian_out)

    def gradient_proba(
        self,
        y_true: NDArray[Any],
        raw_prediction: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        gradient_out: NDArray[Any] | None = None,
        proba_out: NDArray[Any] | None = None,
        n_threads: int = 1,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Return the gradient and the probabilities."""
        place = None if proba_out is raw_prediction else _place(proba_out, raw_prediction)
        proba = fastce.softmax(raw_prediction, out=place, n_threads=n_threads)
        grad = self.gradient(y_true, raw_prediction, sample_weight, gradient_out, n_threads)
        return grad, _put(proba, proba_out)

    def predict_proba(self, raw_prediction: NDArray[Any]) -> NDArray[Any]:
        """Return the probabilities."""
        return fastce.softmax(raw_prediction)


def _options(y_true: NDArray[Any], sample_weight: ArrayLike | None, n_threads: int) -> dict[str, Any]:
    return {
        "target": np.asarray(y_true).astype(np.int64, copy=False),
        "sample_weight": sample_weight,
        "reduction": "none",
        "n_threads": n_threads,
    }


def _place(out: NDArray[Any] | None, raw_prediction: NDArray[Any]) -> NDArray[Any] | None:
    """Return where the kernels may write a result at once."""
    return out if out is not None and out.dtype == raw_prediction.dtype else None


def _put(result: Any, out: NDArray[Any] | None) -> NDArray[Any]:
    """Return the result where the caller wants it."""
    if out is None:
        return result  # type: ignore[no-any-return]
    if out is not result:
        out[...] = result
    return out
