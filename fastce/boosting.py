"""Softmax objectives and metrics for XGBoost and LightGBM that add soft labels and options to the built-in ones.

Imports neither library, and works with either, from XGBoost 3.0 and LightGBM 4.6 on, with data on the CPU.

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

__all__ = ["lightgbm_metric", "lightgbm_objective", "xgboost_metric", "xgboost_objective"]

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


def xgboost_objective(
    *, curvature: str = "xgboost", soft_labels: ArrayLike | None = None, **options: Any
) -> "SoftmaxObjective":
    """Return a softmax objective for XGBoost, with options and soft labels that ``multi:softprob`` does not have.

    Parameters
    ----------
    curvature : str, default "xgboost"
        The diagonal used as the second derivative, as for `fastce.cross_entropy_grad_hess`. The default is that of
        ``multi:softprob`` in XGBoost up to 3.2.
    soft_labels : array_like of floats, shape (n_labels, n_classes), optional
        Distributions by label: label i means the target distribution ``soft_labels[i]``, finite and not negative.
        Without soft labels, label i is class i. At most 2**24 rows; not copied.
    **options
        Options of `fastce.cross_entropy` except axis, sample_weight, reduction and on_empty: `weight`,
        `label_smoothing`, `ignore_index`, `logit_scale`, `softcap`, `z_loss`, `n_threads`.

    Returns
    -------
    objective : callable
        For ``xgboost.train(params, dtrain, obj=objective)``, called with margins and a DMatrix; or for
        ``XGBClassifier(objective=objective)``, called with labels, margins and optionally `sample_weight`. The margins
        have shape (n, n_classes), or (n,) or (n, 1) for two classes. Returns gradient and second derivative, with the
        margins' shape, dtype and layout. Can be pickled.

    Raises
    ------
    TypeError
        If an option is unknown, fixed here, or of the wrong type. When called: if labels are not numbers.
    ValueError
        If an option is out of range, `curvature` is unknown, or `soft_labels` is not such a table. When called: if the
        margins have another shape, there are no labels, or a label is not a whole number.
    IndexError
        When called: if a label is not a class, or not a row of `soft_labels`.

    See Also
    --------
    xgboost_metric : The same loss as a metric.
    fastce.cross_entropy : The formula and the options.
    fastce.cross_entropy_grad_hess : The values of `curvature`.

    Notes
    -----
    The objective is the sum of the rows' losses, each times its weight in the DMatrix, if that has weights.

    *Two classes* may have two margins, with ``num_class=2``, or one, as in ``XGBClassifier`` and without ``num_class``:
    that of class 1, where class 0 has the logit 0, so ``1 / (1 + exp(-margin))`` is the probability of class 1.
    Gradient and second derivative are with respect to that margin. The curvatures "xgboost" and "lightgbm" are then
    K p (1 - p) f'^2, half of their values for two margins, so the default is that of ``binary:logistic``. Its
    ``scale_pos_weight=s`` is ``weight=[1, s]`` here.

    *Weights of any sign*, for events that cancel others: gradient and second derivative have the sign of the weight,
    and the lower bound of a curvature applies to the absolute value. A DMatrix refuses negative weights, but a function
    passes them: ``lambda margins, dtrain: objective(dtrain.get_label(), margins, weight)``.

    *One distribution per row*: ``soft_labels`` of shape (n, n_classes) for all rows, of training and validation, and
    ``label=numpy.arange(n)`` or parts of it. A table of shape (n_classes, n_classes) is a model of noisy labels, or a
    smoothing that depends on the class. If there are more labels than classes, XGBoost's own metric refuses them: set
    ``"disable_default_eval_metric": True`` to watch a validation set.

    XGBoost from 3.2 on also stores distributions itself, of shape (n, n_classes), without `soft_labels` and
    ``num_class``: ``DMatrix(X, label=distributions)``, or ``XGBRegressor(objective=objective).fit(X, distributions)``.

    *Parameters.* With ``num_class``, ``"objective": "multi:softprob"`` and ``obj``, gradients come from this objective
    and predictions are probabilities. Without ``"objective"``, and with distributions in the DMatrix, probabilities are
    ``fastce.softmax(booster.predict(data, output_margin=True))``. With one margin set ``"objective":
    "binary:logistic"``. ``XGBClassifier`` sets these parameters itself.

    *Margins* are those of the built-in objective, within 1e-6 on scikit-learn's digits, if `base_score` is given:
    without it XGBoost from 3.1 on starts its own objectives, and no others, from the class frequencies.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.boosting import xgboost_objective
    >>> objective = xgboost_objective(label_smoothing=0.1)
    >>> objective
    xgboost_objective(label_smoothing=0.1)
    >>> grad, hess = objective(np.array([0, 1]), np.zeros((2, 2)))  # as scikit-learn's form is called
    >>> print(grad)
    [[-0.45  0.45]
     [ 0.45 -0.45]]
    >>> print(hess)
    [[0.5 0.5]
     [0.5 0.5]]
    """
    return SoftmaxObjective(xgboost_objective, curvature, soft_labels, options)


def lightgbm_objective(
    num_class: int | None = None,
    *,
    curvature: str = "lightgbm",
    soft_labels: ArrayLike | None = None,
    **options: Any,
) -> "SoftmaxObjective":
    """Return a softmax objective for LightGBM, with options and soft labels that ``multiclass`` does not have.

    Parameters
    ----------
    num_class : int, optional
        The number of classes, as passed to LightGBM; 2 also for one score per row. Scores, class weights and soft
        labels of another number of classes are then refused, the latter two at once.
    curvature : str, default "lightgbm"
        The diagonal used as the second derivative, as for `fastce.cross_entropy_grad_hess`. The default is that of
        ``multiclass`` in LightGBM.
    soft_labels, **options
        As for `xgboost_objective`.

    Returns
    -------
    objective : callable
        For ``lightgbm.train({"objective": objective, "num_class": n_classes}, train_set)``, called with scores and a
        Dataset; or for ``LGBMClassifier(objective=objective)``, called with labels, scores and weights, if any. The
        scores have shape (n, n_classes), or (n,) or (n, 1) for two classes. Returns gradient and second derivative,
        with the scores' shape, dtype and layout. Can be pickled.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `xgboost_objective`.

    See Also
    --------
    lightgbm_metric : The same loss as a metric.
    xgboost_objective : The same for XGBoost; uses of soft labels.

    Notes
    -----
    The objective is the sum of the rows' losses, each times its weight in the Dataset, if that has weights. They may
    have any sign, as for `xgboost_objective`.

    *Two classes* have two scores with ``num_class=2``, or one, as in ``LGBMClassifier`` and without ``num_class``: see
    `xgboost_objective`. The default curvature is then that of ``binary``, whose ``sigmoid=s`` is ``logit_scale=s`` and
    whose ``scale_pos_weight=s`` is ``weight=[1, s]`` here.

    *Predictions* with a custom objective are scores. Probabilities are ``fastce.softmax(booster.predict(X))``, and in
    scikit-learn's interface ``fastce.softmax(classifier.predict(X, raw_score=True))``; with one score per row,
    ``1 / (1 + numpy.exp(-score))`` is the probability of class 1. ``LGBMClassifier`` takes every label for a class, so
    a table with more labels than classes needs ``LGBMRegressor(metric="None")``, with ``num_class=n_classes`` or, for
    two classes, without.

    *Scores* are those of the built-in objective, on scikit-learn's digits to the last bit, with
    ``boost_from_average=False``: otherwise LightGBM starts its own objectives, and no others, from the class
    frequencies. An ``init_score`` does that for any objective, but predictions do not include it.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.boosting import lightgbm_objective
    >>> objective = lightgbm_objective(2, soft_labels=[[1.0, 0.0], [0.25, 0.75]])
    >>> grad, hess = objective(np.array([0, 1]), np.zeros((2, 2), order="F"))  # as scikit-learn's form is called
    >>> print(grad)
    [[-0.5   0.5 ]
     [ 0.25 -0.25]]
    >>> print(hess)
    [[0.5 0.5]
     [0.5 0.5]]
    """
    return SoftmaxObjective(lightgbm_objective, curvature, soft_labels, options, num_class)


def xgboost_metric(
    *, name: str = "cross_entropy", soft_labels: ArrayLike | None = None, **options: Any
) -> "XGBoostMetric":
    """Return a metric for XGBoost: the mean loss that `xgboost_objective` minimises.

    Parameters
    ----------
    name : str, default "cross_entropy"
        Name of the metric in the logs. If it differs from the built-in ``mlogloss``, both can be watched.
    soft_labels, **options
        As for `xgboost_objective`.

    Returns
    -------
    metric : callable
        For ``xgboost.train(..., obj=objective, custom_metric=metric)``, returning (name, value); or for
        ``XGBClassifier(objective=objective, eval_metric=metric)``, returning the value. Can be pickled.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `xgboost_objective`.

    Notes
    -----
    The mean is that of `fastce.cross_entropy`, with the data's weights as sample weights: without options it is
    ``mlogloss``, or ``logloss`` of two classes with one margin. Predictions must be margins, which XGBoost passes if
    the objective is custom as well. Early stopping minimises the metric, unless its name is one that XGBoost maximises.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.boosting import xgboost_metric
    >>> metric = xgboost_metric()
    >>> print(f"{metric(np.array([0, 1]), np.zeros((2, 2))):.6f}")  # as scikit-learn's form is called
    0.693147
    """
    return XGBoostMetric(xgboost_metric, name, soft_labels, options)


def lightgbm_metric(
    num_class: int | None = None,
    *,
    name: str = "cross_entropy",
    soft_labels: ArrayLike | None = None,
    **options: Any,
) -> "LightGBMMetric":
    """Return a metric for LightGBM: the mean loss that `lightgbm_objective` minimises.

    Parameters
    ----------
    num_class : int, optional
        As for `lightgbm_objective`.
    name : str, default "cross_entropy"
        Name of the metric in the logs. If it differs from the built-in ``multi_logloss``, both can be watched.
    soft_labels, **options
        As for `xgboost_objective`.

    Returns
    -------
    metric : callable
        For ``lightgbm.train({"objective": objective, ...}, ..., feval=metric)``, or for
        ``LGBMClassifier(objective=objective).fit(..., eval_metric=metric)``; returns (name, value, False), where False
        means that lower is better. Can be pickled.

    Raises
    ------
    TypeError, ValueError, IndexError
        As `xgboost_objective`.

    Notes
    -----
    The mean is that of `fastce.cross_entropy`, with the data's weights as sample weights: without options it is
    ``multi_logloss``, or ``binary_logloss`` of two classes with one score. Predictions must be raw scores, which
    LightGBM passes if the objective is custom as well.

    Examples
    --------
    >>> import numpy as np
    >>> from fastce.boosting import lightgbm_metric
    >>> name, value, is_higher_better = lightgbm_metric()(np.array([0, 1]), np.zeros((2, 2)))
    >>> print(f"{name} {value:.6f} {is_higher_better}")
    cross_entropy 0.693147 False
    """
    return LightGBMMetric(lightgbm_metric, name, soft_labels, options, num_class)


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

    Parameters
    ----------
    factory : callable
        The public function that makes such an object, for its `repr`.
    own : dict
        What that takes besides soft labels and options.
    soft_labels, options
        As for `xgboost_objective`.
    num_class
        As for `lightgbm_objective`.
    """

    def __init__(
        self,
        factory: Callable[..., Any],
        own: dict[str, Any],
        soft_labels: ArrayLike | None,
        options: dict[str, Any],
        num_class: int | None,
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
        self._num_class = None if num_class is None else _check_num_class(num_class)
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
    """The result of `xgboost_objective` and `lightgbm_objective`."""

    def __init__(
        self,
        factory: Callable[..., Any],
        curvature: str,
        soft_labels: ArrayLike | None,
        options: dict[str, Any],
        num_class: int | None = None,
    ) -> None:
        super().__init__(factory, {"curvature": curvature}, soft_labels, options, num_class)

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
    """The mean loss under a name."""

    def __init__(
        self,
        factory: Callable[..., Any],
        name: str,
        soft_labels: ArrayLike | None,
        options: dict[str, Any],
        num_class: int | None = None,
    ) -> None:
        if not isinstance(name, str):
            raise TypeError(f"name must be a string, got {name!r}")
        self.__name__ = name  # where XGBoost's form for scikit-learn looks for it
        super().__init__(factory, {"name": name}, soft_labels, options, num_class)

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


def _check_num_class(num_class: int) -> int:
    """Return a number of classes."""
    number = operator.index(num_class)
    if number < 2:
        raise ValueError(f"num_class must be at least 2, got {number}")
    return number


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
