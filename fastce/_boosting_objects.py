"""What XGBoost and LightGBM call: objectives and metrics of the softmax, with options and soft labels.

Design
------
1. One object serves a library's native form, called with predictions and data, and scikit-learn's, called with labels
   and predictions: native data tells its labels by `get_label`, as arrays of labels do not. The third parameter must be
   called `sample_weight`, by which XGBoost's scikit-learn form looks for it, and there must be no fourth: LightGBM's
   counts them, and passes weights by position if there are three.
2. Neither library weighs what a custom objective returns, in either form, so the objective does.
3. Both take gradients in the layout of their predictions, rows after rows in XGBoost and classes after classes in
   LightGBM, which is the layout that gradients get from `fastce.cross_entropy_grad_hess`: nothing is transposed.
4. Soft labels are a table of what labels mean, not an array that runs parallel to a data set. Both libraries call a
   metric with one data set after another, take rows out for cross-validation, and, LightGBM, copy parameters: labels
   follow their rows through all that, whereas guesses by identity or number of rows go wrong.
5. Objects do not change once made, so they are their own copies: LightGBM copies its parameters before each training,
   scikit-learn whatever it clones, and soft labels may be large.
6. One margin m per row is the difference of two classes' logits: the loss is that of the logits (0, m), the gradient by
   m is that of the second logit, and the second derivative by m the second entry of the Hessian's diagonal. The
   libraries multiply p (1 - p) for logits that move together, by 2 and C / (C - 1); one margin moves alone, so there
   the factor is 1, as in their own objectives for two classes. Two margins move apart as far as one moves.
7. Weights of rows may be negative, for events that cancel others: a row of weight -a is what undoes that row of weight
   a, in gradient and curvature. The least values that some curvatures have are of the absolute value therefore.
"""

import contextlib
import inspect
import operator
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

import fastce
from fastce._labels import as_index

Array = NDArray[Any]

_FLOOR = 1e-16  # the least curvature of XGBoost's own objectives
_FIXED = ("axis", "on_empty", "reduction", "sample_weight")  # options that are not the caller's here
_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(fastce.cross_entropy).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _FIXED
)
_ONE_MARGIN = ", one margin, which is that of two classes"
_MAX_LABELS = 2**24  # both libraries keep labels in float32, where 2**24 + 1 is 2**24


class _Rows(NamedTuple):
    """The rows of a call: predictions as passed, the logits that they mean, target and weights."""

    margins: Array
    logits: Array
    target: Array
    sample_weight: Any

    @property
    def has_one_margin(self) -> bool:
        """Return True if the logits are those of two classes with one margin."""
        return self.logits is not self.margins

    @contextlib.contextmanager
    def explaining(self) -> Iterator[None]:
        """Explain, in the message about an invalid class, that there are two classes."""
        try:
            yield
        except IndexError as error:
            if not self.has_one_margin:
                raise
            raise IndexError(f"{error}{_ONE_MARGIN}: for more, set the library's num_class") from None


def _as_logits(margins: Array) -> Array:
    """Return the logits: the margins themselves, or for one margin those of two classes, (0, margin)."""
    if margins.ndim not in (1, 2):
        raise ValueError(
            f"predictions must have shape (n, n_classes), or (n,) or (n, 1) for two classes, got {margins.shape}"
        )
    if margins.ndim == 2 and margins.shape[1] != 1:
        return margins
    logits: Array = np.zeros((2, len(margins)), margins.dtype).T  # a class after the other: results are dense
    logits[:, 1] = margins.reshape(-1)
    return logits


def _split_signs(sample_weight: Any) -> tuple[Any, NDArray[np.bool_] | None]:
    """Return the absolute values of weights and which are negative; or the argument and None if none are."""
    weight = np.asarray(sample_weight)
    if weight.dtype.kind not in "iuf" or not (weight < 0).any():
        return sample_weight, None
    return np.abs(weight.astype(np.float64)), weight < 0


class _Softmax:
    """The common part of objectives and metrics: options, soft labels and the interpretation of a call.

    `factory` is the public function that makes such an object, and `own` what that takes besides `soft_labels`,
    `options` and `num_class`.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        own: dict[str, Any],
        soft_labels: ArrayLike | None,
        options: dict[str, Any],
        num_class: int | None = None,
    ) -> None:
        for name in sorted(options):
            if name in _FIXED:
                raise TypeError(f"options must not be {', '.join(_FIXED)}, for they are fixed here, got {name}")
            if name not in _OPTIONS:
                raise TypeError(f"options must be those of cross_entropy, got {name}: use {', '.join(_OPTIONS)}")
        fastce.CrossEntropyLoss(**options)  # checks what it can without data
        self._factory = factory
        self._own = own
        self._soft_labels = None if soft_labels is None else _check_soft_labels(soft_labels)
        self._options = options
        self._num_class = None if num_class is None else operator.index(num_class)
        if self._num_class is not None and self._num_class < 2:
            raise ValueError(f"num_class must be at least 2, got {self._num_class}")
        weight = options.get("weight")
        if self._num_class is not None:
            n_classes = self._num_class
        elif self._soft_labels is not None:
            n_classes = self._soft_labels.shape[1]
        else:
            n_classes = 2 if weight is None else np.size(weight)
        self(np.zeros(0), np.zeros((0, n_classes)))  # without rows: checks all that the options say

    def __call__(self, preds: Any, data: Any, sample_weight: Any = None) -> Any:
        raise NotImplementedError

    def __repr__(self) -> str:
        """Show the call that makes such an object."""
        defaults = self._factory.__kwdefaults__ or {}
        shown = [] if self._num_class is None else [str(self._num_class)]
        shown += [f"{name}={value!r}" for name, value in self._own.items() if value != defaults[name]]
        if self._soft_labels is not None:
            n_labels, n_classes = self._soft_labels.shape
            shown.append(f"soft_labels=<{n_labels} x {n_classes}, {self._soft_labels.dtype.name}>")
        shown += [f"{name}={value!r}" for name, value in self._options.items()]
        return f"{self._factory.__name__}({', '.join(shown)})"

    def __deepcopy__(self, memo: object) -> Self:
        return self

    def _read(self, preds: Any, data: Any, sample_weight: Any) -> "_Rows":
        """Return the rows of a call in either interface."""
        if hasattr(data, "get_label"):
            labels, sample_weight = data.get_label(), data.get_weight()
        else:
            labels, preds = preds, data
        margins = np.asarray(preds)
        logits = _as_logits(margins)
        if self._num_class not in (None, logits.shape[1]):
            raise ValueError(
                f"predictions must be of num_class={self._num_class} classes, got shape {margins.shape}"
                f"{_ONE_MARGIN if logits is not margins else ''}"
            )
        if labels is None or (np.size(labels) == 0 and len(logits)):
            raise ValueError("data must have labels, got none: set its label")  # None in LightGBM, else empty
        if sample_weight is not None and np.size(sample_weight) == 0:
            sample_weight = None  # so XGBoost says that there are none
        return _Rows(margins, logits, self._as_target(np.asarray(labels)), sample_weight)

    def _as_target(self, labels: Array) -> Array:
        """Return class indices or probabilities."""
        table = self._soft_labels
        if labels.ndim == 2 and labels.shape[1] == 1:
            labels = labels[:, 0]
        if labels.ndim == 2:
            if table is not None:
                raise ValueError(
                    f"labels must be one number per row where soft_labels say what they mean, got shape {labels.shape}"
                )
            return labels
        index = as_index(labels, "labels", ": distributions are rows of soft_labels, and a label is a row's number")
        if table is None:
            return index
        if index.size and not (index.min() >= 0 and index.max() < len(table)):
            bad = int(((index < 0) | (index >= len(table))).argmax())
            raise IndexError(f"label[{bad}] is {index[bad]}, but soft_labels has {len(table)} rows")
        target: Array = table[index]
        return target


class SoftmaxObjective(_Softmax):
    """The result of `xgboost_objective` and `lightgbm_objective`; `own` is the curvature."""

    def __call__(self, preds: Any, data: Any, sample_weight: ArrayLike | None = None) -> tuple[Array, Array]:
        """Return gradient and second derivative, from (predictions, data) or (labels, predictions, weights)."""
        rows = self._read(preds, data, sample_weight)
        weight, is_negative = _split_signs(rows.sample_weight)
        with rows.explaining():
            grad, hess = fastce.cross_entropy_grad_hess(
                rows.logits,
                rows.target,
                sample_weight=weight,
                reduction="sum",
                out=rows.logits if rows.has_one_margin else None,  # which are ours
                **self._own,
                **self._options,
            )
        if rows.has_one_margin:
            grad, hess = grad[:, 1].reshape(rows.margins.shape), hess[:, 1].reshape(rows.margins.shape)
            with np.errstate(under="ignore"):
                if self._own["curvature"] in ("xgboost", "lightgbm"):
                    hess *= 0.5  # the reciprocal of either's factor for two classes
                if self._own["curvature"] == "xgboost":
                    np.maximum(hess, _FLOOR, out=hess, where=hess > 0)  # 0 are skipped rows
        if is_negative is not None:
            for result in (grad, hess):
                np.negative(result, out=result, where=is_negative.reshape((-1,) + (1,) * (result.ndim - 1)))
        return grad, hess


class _Metric(_Softmax):
    """The mean loss; `own` is its name."""

    def __init__(self, factory: Callable[..., Any], own: dict[str, Any], *others: Any) -> None:
        if not isinstance(own["name"], str):
            raise TypeError(f"name must be a string, got {own['name']!r}")
        self.__name__ = own["name"]  # where XGBoost's form for scikit-learn looks for it
        super().__init__(factory, own, *others)

    def _mean(self, preds: Any, data: Any, sample_weight: ArrayLike | None) -> float:
        rows = self._read(preds, data, sample_weight)
        with rows.explaining():
            return float(
                fastce.cross_entropy(rows.logits, rows.target, sample_weight=rows.sample_weight, **self._options)
            )


class XGBoostMetric(_Metric):
    """The result of `xgboost_metric`."""

    def __call__(self, preds: Any, data: Any, sample_weight: ArrayLike | None = None) -> float | tuple[str, float]:
        """Return (name, value) from (predictions, data), or the value from (labels, predictions, weights)."""
        value = self._mean(preds, data, sample_weight)
        return (self.__name__, value) if hasattr(data, "get_label") else value


class LightGBMMetric(_Metric):
    """The result of `lightgbm_metric`."""

    def __call__(self, preds: Any, data: Any, sample_weight: ArrayLike | None = None) -> tuple[str, float, bool]:
        """Return (name, value, False) from (predictions, data) or (labels, predictions, weights)."""
        return self.__name__, self._mean(preds, data, sample_weight), False


def _check_soft_labels(soft_labels: ArrayLike) -> Array:
    """Return the table; that the options go with it is checked later."""
    table = np.asarray(soft_labels)
    if table.ndim != 2:
        raise ValueError(f"soft_labels must have shape (n_labels, n_classes), got {table.shape}")
    if table.dtype.kind != "f":
        raise TypeError(f"soft_labels must be floats, got {table.dtype.name}")
    if len(table) > _MAX_LABELS:
        raise ValueError(
            f"soft_labels must have at most {_MAX_LABELS} rows, as labels are float32 numbers, got {len(table)}"
        )
    if table.size and not (table.min() >= 0 and table.max() < np.inf):
        bad = table[~((table >= 0) & (table < np.inf))][0]
        raise ValueError(f"soft_labels must be finite and not negative, got {bad}")
    return table
