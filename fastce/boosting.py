"""Softmax objectives and metrics for XGBoost and LightGBM that add soft labels and options to the built-in ones.

Imports neither library, and works with either, from XGBoost 3.0 and LightGBM 4.6 on, with data on the CPU.
"""

from typing import Any

from numpy.typing import ArrayLike

from fastce._boosting_objects import LightGBMMetric, SoftmaxObjective, XGBoostMetric

__all__ = ["lightgbm_metric", "lightgbm_objective", "xgboost_metric", "xgboost_objective"]


def xgboost_objective(
    *, curvature: str = "xgboost", soft_labels: ArrayLike | None = None, **options: Any
) -> SoftmaxObjective:
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
    return SoftmaxObjective(xgboost_objective, {"curvature": curvature}, soft_labels, options)


def lightgbm_objective(
    num_class: int | None = None,
    *,
    curvature: str = "lightgbm",
    soft_labels: ArrayLike | None = None,
    **options: Any,
) -> SoftmaxObjective:
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
    return SoftmaxObjective(lightgbm_objective, {"curvature": curvature}, soft_labels, options, num_class)


def xgboost_metric(
    *, name: str = "cross_entropy", soft_labels: ArrayLike | None = None, **options: Any
) -> XGBoostMetric:
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
    return XGBoostMetric(xgboost_metric, {"name": name}, soft_labels, options)


def lightgbm_metric(
    num_class: int | None = None,
    *,
    name: str = "cross_entropy",
    soft_labels: ArrayLike | None = None,
    **options: Any,
) -> LightGBMMetric:
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
    return LightGBMMetric(lightgbm_metric, {"name": name}, soft_labels, options, num_class)
