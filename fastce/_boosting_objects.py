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
4. Objects do not change once made, so they are their own copies: LightGBM copies its parameters before each training,
   scikit-learn whatever it clones, and soft labels may be large.
5. Weights of rows may be negative, for events that cancel others: a row of weight -a is what undoes that row of weight
   a, in gradient and curvature. The least values that some curvatures have are of the absolute value therefore.
"""

import inspect
import operator
from collections.abc import Callable
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

import fastce
from fastce._boosting_rows import Array, Rows, check_soft_labels, read_rows

_FLOOR = 1e-16  # the least curvature of XGBoost's own objectives
_FIXED = ("axis", "on_empty", "reduction", "sample_weight")  # options that are not the caller's here
_OPTIONS = tuple(
    name
    for name, parameter in inspect.signature(fastce.cross_entropy).parameters.items()
    if parameter.kind is parameter.KEYWORD_ONLY and name not in _FIXED
)


class _Softmax:
    """The common part of objectives and metrics: options and soft labels, checked and shown.

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
        self._soft_labels = None if soft_labels is None else check_soft_labels(soft_labels)
        self._options = options
        if num_class is not None and not hasattr(num_class, "__index__"):
            raise TypeError(f"num_class must be None or an integer, got {num_class!r}")
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

    def _read(self, preds: Any, data: Any, sample_weight: Any) -> Rows:
        return read_rows(preds, data, sample_weight, num_class=self._num_class, soft_labels=self._soft_labels)


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


def _split_signs(sample_weight: Any) -> tuple[Any, NDArray[np.bool_] | None]:
    """Return the absolute values of weights and which are negative; or the argument and None if none are."""
    weight = np.asarray(sample_weight)
    if weight.dtype.kind not in "iuf" or not (weight < 0).any():
        return sample_weight, None
    return np.abs(weight.astype(np.float64)), weight < 0
