"""A loss for scikit-learn's own models. It inherits from scikit-learn's, because boosting accepts no other object."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn._loss.loss import HalfMultinomialLoss as _SklearnLoss

import fastce
from fastce._labels import as_index


class HalfMultinomialLoss(_SklearnLoss):  # type: ignore[misc]
    """A replacement for ``sklearn._loss.HalfMultinomialLoss``, the loss of scikit-learn's own models.

    Pass it as `loss` to ``HistGradientBoostingClassifier``. It also works in ``LinearModelLoss``.

    Parameters
    ----------
    sample_weight : ignored
        A parameter of scikit-learn.
    n_classes : int, default 3
        The number of classes.
    xp, device : ignored
        Parameters of scikit-learn.

    Raises
    ------
    IndexError, ValueError, TypeError
        From its methods, as from `fastce.cross_entropy_with_grad`; if the number of raw predictions is not that of the
        classes, and if classes are not whole numbers. From `fit_intercept_only`, for two classes and for a class
        without rows: see Notes.

    Notes
    -----
    The methods have scikit-learn's parameters: `y_true`, class indices of any real dtype, shape (n_samples,);
    `raw_prediction`, the logits, shape (n_samples, n_classes), of any memory layout; `sample_weight`, shape
    (n_samples,); `n_threads`; and output arrays, which may differ from `raw_prediction` in dtype. `gradient_out` may be
    `raw_prediction` itself. With p the softmax of a row and y its class, they compute

        loss = -log p_y,  gradient_k = p_k - [k = y],  hessian_k = p_k (1 - p_k),

    each times the row's weight, which may have any sign. Confident rows keep their digits: see
    `fastce.cross_entropy_with_grad`. Results that are too small for the dtype of the output array become 0.

    *Two classes* have one raw prediction in ``HistGradientBoostingClassifier``, so this loss is refused there: keep
    ``loss="log_loss"``. That model makes as many raw predictions as its labels have classes, and starts with
    `fit_intercept_only`, which therefore needs rows of every class.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.sklearn import HalfMultinomialLoss
    >>> loss = HalfMultinomialLoss(n_classes=3)
    >>> value, grad = loss.loss_gradient(np.array([0, 2]), np.array([[2.0, 0.0, 0.0], [0.0, 3.0, 0.0]]))
    >>> print(value.round(4), grad[0].round(4))
    [0.2395 3.0949] [-0.213   0.1065  0.1065]
    """

    def fit_intercept_only(self, y_true: NDArray[Any], sample_weight: ArrayLike | None = None) -> NDArray[Any]:
        """Return the logits of the classes' frequencies, with which scikit-learn's boosting begins."""
        # Nobody but scikit-learn's boosting calls this, which says nothing of its own where its arrays do not fit.
        classes = as_index(y_true, "y_true")
        n_classes = int(classes.max(initial=-1)) + 1
        if self.n_classes == 2:
            raise ValueError(
                "n_classes must be at least 3 in HistGradientBoostingClassifier, which makes one raw prediction for "
                "two classes, got 2: leave its loss='log_loss'"
            )
        if n_classes != self.n_classes:
            hint = "leave loss='log_loss'" if n_classes <= 2 else f"use HalfMultinomialLoss(n_classes={n_classes})"
            raise ValueError(f"n_classes must be 1 more than the last class in y_true, got {self.n_classes}: {hint}")
        with np.errstate(under="ignore"):
            return super().fit_intercept_only(y_true, sample_weight)  # type: ignore[no-any-return]

    def loss(
        self,
        y_true: NDArray[Any],
        raw_prediction: NDArray[Any],
        sample_weight: ArrayLike | None = None,
        loss_out: NDArray[Any] | None = None,
        n_threads: int = 1,
    ) -> NDArray[Any]:
        """Return the losses of the rows."""
        arguments = self._arguments(y_true, raw_prediction, sample_weight, n_threads, loss_out=loss_out)
        return _put(fastce.cross_entropy(raw_prediction, **arguments), loss_out)

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
        arguments = self._arguments(
            y_true, raw_prediction, sample_weight, n_threads, loss_out=loss_out, gradient_out=gradient_out
        )
        loss, grad = fastce.cross_entropy_with_grad(
            raw_prediction, out=_place(gradient_out, raw_prediction), **arguments
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
        arguments = self._arguments(
            y_true, raw_prediction, sample_weight, n_threads, gradient_out=gradient_out, hessian_out=hessian_out
        )
        grad, hess = fastce.cross_entropy_grad_hess(
            raw_prediction,
            out=_place(gradient_out, raw_prediction),
            hess_out=_place(hessian_out, raw_prediction),
            **arguments,
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
        # Both are made before either overwrites the raw predictions, and the one that checks the rows goes first.
        arguments = self._arguments(
            y_true, raw_prediction, sample_weight, n_threads, gradient_out=gradient_out, proba_out=proba_out
        )
        places = [
            None if out is None or np.may_share_memory(out, raw_prediction) else _place(out, raw_prediction)
            for out in (gradient_out, proba_out)
        ]
        _, grad = fastce.cross_entropy_with_grad(raw_prediction, out=places[0], **arguments)
        proba = fastce.softmax(raw_prediction, out=places[1], n_threads=n_threads)
        return _put(grad, gradient_out), _put(proba, proba_out)

    def predict_proba(self, raw_prediction: NDArray[Any]) -> NDArray[Any]:
        """Return the probabilities."""
        return fastce.softmax(raw_prediction)

    def _arguments(
        self,
        y_true: ArrayLike,
        raw_prediction: NDArray[Any],
        sample_weight: ArrayLike | None,
        n_threads: int,
        **places: NDArray[Any] | None,
    ) -> dict[str, Any]:
        """Return the arguments of a loss besides the logits; check what its function does not."""
        shape = raw_prediction.shape
        if len(shape) != 2 or shape[1] != self.n_classes:
            raise ValueError(
                f"raw_prediction must have shape (n_samples, n_classes) with n_classes={self.n_classes}, got {shape}"
            )
        target = as_index(y_true, "y_true")
        is_class = (target >= 0) & (target < self.n_classes)
        if not is_class.all():
            row = int(is_class.argmin())
            raise IndexError(
                f"y_true[{row}] is {target.reshape(-1)[row]}, but there are {self.n_classes} classes "
                f"(0..{self.n_classes - 1})"
            )
        for name, out in places.items():
            wanted = shape[:1] if name == "loss_out" else shape
            if out is not None and out.shape != wanted:
                raise ValueError(f"{name} must have shape {wanted}, got {out.shape}")
            if out is not None and not out.flags.writeable:
                raise ValueError(f"{name} must be writable, got a read-only array")
        return {"target": target, "sample_weight": sample_weight, "reduction": "none", "n_threads": n_threads}


def _place(out: NDArray[Any] | None, raw_prediction: NDArray[Any]) -> NDArray[Any] | None:
    """Return where the kernels may write a result at once."""
    return out if out is not None and out.dtype == raw_prediction.dtype else None


def _put(result: Any, out: NDArray[Any] | None) -> NDArray[Any]:
    """Return the result where the caller wants it."""
    if out is None:
        return result  # type: ignore[no-any-return]
    if out is not result:
        with np.errstate(under="ignore"):  # confident rows, in a place of float32
            out[...] = result
    return out
