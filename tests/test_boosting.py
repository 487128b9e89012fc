"""`fastce.boosting` in XGBoost and LightGBM themselves: their own objectives, formulas, scikit-learn."""

import copy
import doctest
import inspect
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from fastce import boosting, softmax

datasets = pytest.importorskip("sklearn.datasets")
metrics = pytest.importorskip("sklearn.metrics")

N_CLASSES = 10
N_TRAIN = 600
ROUNDS = 6
FACTORIES = [getattr(boosting, name) for name in boosting.__all__]
OBJECTIVES = [boosting.xgboost_objective, boosting.lightgbm_objective]

# Margins of up to 4 are sums of 6 leaf values, each a quotient of sums of float32 numbers: a few hundred of their units
# of 1.2e-7, and room for other processors' sums. One split that differs moves some margin by a hundredth and more.
SAME = 1e-4


class XGBoost:
    """What the tests ask of a library; `margins` are raw predictions for all images."""

    objective, metric = staticmethod(boosting.xgboost_objective), staticmethod(boosting.xgboost_metric)
    params = {  # noqa: RUF012
        "max_depth": 3,
        "learning_rate": 0.5,
        "n_jobs": 1,  # CI has other work for the rest
        "base_score": 0.5,
        "disable_default_eval_metric": True,  # which has no use for labels that are no classes
    }
    small_leaves = {}  # noqa: RUF012
    own_objective, two_class_objective = "multi:softprob", "binary:logistic"
    raw = {"output_margin": True}  # noqa: RUF012

    def __init__(self):
        self.package = pytest.importorskip("xgboost")

    def data(self, images, labels, weight=None):
        return self.package.DMatrix(images, label=labels, weight=weight)

    def train(self, data, objective=None, n_classes=N_CLASSES, rounds=ROUNDS, **options):
        params = self.params | ({"num_class": n_classes, "objective": self.own_objective} if n_classes else {})
        return self.package.train(params, data, rounds, obj=objective, **options)

    def train_one_margin(self, data, objective=None, **params):
        params = self.params | {"objective": self.two_class_objective} | params
        return self.package.train(params, data, ROUNDS, obj=objective)

    def watch(self, train, valid, objective, metric, patience):
        """Return the booster and what was logged of the validation set."""
        log = {}
        booster = self.train(
            train,
            objective,
            rounds=100,
            evals=[(valid, "valid")],
            custom_metric=metric,
            early_stopping_rounds=patience,
            evals_result=log,
            verbose_eval=False,
        )
        return booster, log["valid"]

    def margins(self, booster, images):
        return booster.predict(self.package.DMatrix(images), **self.raw)

    def classifier(self, objective):
        return self.package.XGBClassifier(objective=objective, n_estimators=ROUNDS, **self.params)

    def fit(self, classifier, images, y, weight, valid, metric):
        classifier.set_params(eval_metric=metric)
        classifier.fit(images, y, sample_weight=weight, eval_set=[valid], verbose=False)
        return classifier.evals_result()["validation_0"]


class LightGBM:
    """The same of the other one."""

    objective, metric = staticmethod(boosting.lightgbm_objective), staticmethod(boosting.lightgbm_metric)
    params = {  # noqa: RUF012
        "num_leaves": 8,
        "learning_rate": 0.5,
        "n_jobs": 1,
        "verbose": -1,
        "boost_from_average": False,
        "metric": "None",
    }
    small_leaves = {"min_data_in_leaf": 0, "min_data_in_bin": 1}  # noqa: RUF012
    own_objective, two_class_objective = "multiclass", "binary"
    raw = {"raw_score": True}  # noqa: RUF012

    def __init__(self):
        self.package = pytest.importorskip("lightgbm")

    def data(self, images, labels, weight=None):
        return self.package.Dataset(images, labels, weight=weight, free_raw_data=False)

    def train(self, data, objective=None, n_classes=N_CLASSES, rounds=ROUNDS, **options):
        params = self.params | {"objective": objective or self.own_objective, "num_class": n_classes}
        return self.package.train(params, data, rounds, **options)

    def train_one_margin(self, data, objective=None, **params):
        params = self.params | {"objective": objective or self.two_class_objective} | params
        return self.package.train(params, data, ROUNDS)

    def watch(self, train, valid, objective, metric, patience):
        log = {}
        callbacks = [self.package.early_stopping(patience, verbose=False), self.package.record_evaluation(log)]
        booster = self.train(
            train, objective, rounds=100, valid_sets=[valid], valid_names=["valid"], feval=metric, callbacks=callbacks
        )
        return booster, log["valid"]

    def margins(self, booster, images):
        return booster.predict(images, **self.raw)

    def classifier(self, objective):
        return self.package.LGBMClassifier(objective=objective, n_estimators=ROUNDS, **self.params)

    def fit(self, classifier, images, y, weight, valid, metric):
        classifier.fit(images, y, sample_weight=weight, eval_X=valid[0], eval_y=valid[1], eval_metric=metric)
        return classifier.evals_result_["valid_0"]


@pytest.fixture(params=[XGBoost, LightGBM])
def library(request):
    return request.param()


@pytest.fixture(scope="module")
def digits():
    X, y = datasets.load_digits(return_X_y=True)
    return X[:900, ::2], y[:900]


@pytest.fixture
def weight(digits, rng):
    return rng.uniform(0.2, 3, len(digits[1])).astype(np.float32)


@pytest.mark.parametrize("weighted", [False, True])
def test_models_are_those_of_the_built_in_objectives(library, digits, weight, weighted):
    X, y = digits
    data = library.data(X, y, weight if weighted else None)
    own = library.margins(library.train(data), X)
    ours = library.margins(library.train(data, library.objective()), X)
    assert np.abs(own).max() > 1
    np.testing.assert_allclose(ours, own, rtol=0, atol=SAME)


class Data:
    """What the two libraries' data sets have in common."""

    def __init__(self, labels, weight):
        self.get_label, self.get_weight = lambda: labels, lambda: weight


def formulas(x, q, weight, row_weight, curvature):
    """Return gradient and second derivative of sum_i a_i sum_c w_c q_ic (-log p_ic), in float64."""
    e = np.exp(np.float64(x) - np.max(x, axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    q = weight * q
    A = q.sum(axis=1, keepdims=True)
    a = row_weight[:, None]
    bound = A * p * (1 - p)
    n_classes = x.shape[1]
    hess = {"xgboost": 2 * bound, "lightgbm": n_classes / (n_classes - 1) * bound, "exact": bound}[curvature]
    return a * (A * p - q), a * hess


@pytest.mark.parametrize("curvature", [None, "exact"])
@pytest.mark.parametrize(
    ("factory", "dtype", "order"), [(OBJECTIVES[0], np.float32, "C"), (OBJECTIVES[1], np.float64, "F")]
)
def test_gradient_and_curvature_are_the_formulas(rng, factory, dtype, order, curvature):
    n, n_classes, e = 50, 7, 0.2
    x = (2 * rng.standard_normal((n, n_classes))).astype(dtype, order=order)
    y = rng.integers(0, n_classes, n)
    row_weight = rng.uniform(0.1, 3, n).astype(np.float32)
    weight = rng.uniform(0.5, 2, n_classes)
    table = rng.random((12, n_classes))
    rows = rng.integers(0, len(table), n)
    ones, eye = np.ones(n_classes), np.eye(n_classes)
    chosen = {} if curvature is None else {"curvature": curvature}
    name = curvature or ("xgboost" if order == "C" else "lightgbm")
    for labels, q, options in [
        (y, eye[y], {}),
        (y, eye[y], {"weight": weight}),
        (y, (1 - e) * eye[y] + e / n_classes, {"label_smoothing": e}),
        (y, (1 - e) * eye[y] + e / n_classes, {"label_smoothing": e, "weight": weight}),
        (rows, table[rows], {"soft_labels": table}),
        (rows, (1 - e) * table[rows] + e / n_classes, {"soft_labels": table, "label_smoothing": e, "weight": weight}),
    ]:
        objective = factory(**chosen, **options)
        labels = labels.astype(np.float32)  # as both libraries keep them
        for factor, given in [(np.ones(n), None), (np.ones(n), np.empty(0)), (row_weight, row_weight)]:
            expected = formulas(x, q, options.get("weight", ones), factor, name)
            for results in (objective(x, Data(labels, given)), objective(labels, x, given)):
                for result, value in zip(results, expected, strict=True):
                    assert (result.dtype, result.shape, result.strides) == (x.dtype, x.shape, x.strides)
                    # Numbers of up to 10 in float32 arithmetic, of which a gradient may be a small difference.
                    np.testing.assert_allclose(result, value, rtol=1e-5, atol=1e-5)


def test_one_hot_soft_labels_are_labels(library, digits, weight):
    X, y = digits
    expected = library.margins(library.train(library.data(X, y, weight), library.objective()), X)
    tables = {"a row for each class": (np.eye(N_CLASSES), y)}
    tables["a row for each image"] = np.eye(N_CLASSES)[y], np.arange(len(y))
    for what, (table, labels) in tables.items():
        booster = library.train(library.data(X, labels, weight), library.objective(soft_labels=table))
        np.testing.assert_allclose(library.margins(booster, X), expected, rtol=0, atol=SAME, err_msg=what)


def test_class_weights_and_smoothing_reach_the_models(library, digits, weight):
    X, y = digits
    class_weight = np.linspace(0.3, 3, N_CLASSES)
    by_class = library.train(library.data(X, y, weight), library.objective(weight=class_weight))
    by_row = library.train(library.data(X, y, weight * class_weight[y]), library.objective())
    np.testing.assert_allclose(library.margins(by_class, X), library.margins(by_row, X), rtol=0, atol=SAME)
    smooth = library.train(library.data(X, y), library.objective(label_smoothing=0.1))
    table = 0.9 * np.eye(N_CLASSES) + 0.1 / N_CLASSES
    by_table = library.train(library.data(X, y), library.objective(soft_labels=table))
    np.testing.assert_allclose(library.margins(smooth, X), library.margins(by_table, X), rtol=0, atol=SAME)


def test_xgboost_holds_distributions_itself(digits, weight):
    library = XGBoost()
    X, y = digits
    expected = library.train(library.data(X, y, weight), library.objective())
    booster = library.train(library.data(X, np.eye(N_CLASSES)[y], weight), library.objective(), n_classes=None)
    np.testing.assert_allclose(library.margins(booster, X), library.margins(expected, X), rtol=0, atol=SAME)
    regressor = library.package.XGBRegressor(objective=library.objective(), n_estimators=ROUNDS, **library.params)
    regressor.fit(X, np.eye(N_CLASSES)[y], sample_weight=weight)
    np.testing.assert_allclose(regressor.predict(X), library.margins(expected, X), rtol=0, atol=SAME)
    metric = library.metric()
    margins = library.margins(booster, X)
    _, value = metric(margins, library.data(X, np.eye(N_CLASSES)[y], weight))
    assert value == pytest.approx(metric(margins, library.data(X, y, weight))[1], rel=1e-5)
    with pytest.raises(ValueError, match="labels must be one number per row where soft_labels say"):
        library.metric(soft_labels=np.eye(N_CLASSES))(margins, library.data(X, np.eye(N_CLASSES)[y]))


@pytest.mark.parametrize("soft", [False, True])
def test_metrics_follow_the_validation_set_and_stop_early(library, digits, weight, soft):
    X, y = digits
    options = {"soft_labels": np.eye(N_CLASSES)[y]} if soft else {}
    labels = np.arange(len(y)) if soft else y
    train = library.data(X[:N_TRAIN], labels[:N_TRAIN], weight[:N_TRAIN])
    held_out = X[N_TRAIN:], labels[N_TRAIN:], weight[N_TRAIN:]
    valid = library.data(*held_out) if isinstance(library, XGBoost) else train.create_valid(*held_out[:2], held_out[2])
    booster, log = library.watch(
        train, valid, library.objective(**options), library.metric(name="loss", **options), patience=2
    )
    losses = np.array(log["loss"])
    best = booster.best_iteration if isinstance(library, XGBoost) else booster.best_iteration - 1
    assert best == losses.argmin() and len(losses) == best + 3 < 100
    if isinstance(library, XGBoost):
        predicted = booster.predict(valid, iteration_range=(0, best + 1), **library.raw)
    else:
        predicted = library.margins(booster, held_out[0])
    expected = metrics.log_loss(y[N_TRAIN:], softmax(predicted.astype(np.float64)), sample_weight=weight[N_TRAIN:])
    assert losses[best] == pytest.approx(expected, rel=1e-5)


def test_metrics_have_the_options(digits, rng):
    _, y = digits
    x = rng.standard_normal((len(y), N_CLASSES))
    weight = rng.uniform(0.5, 2, N_CLASSES)
    logs = -np.log(softmax(x))
    row_weight = rng.uniform(0.5, 2, len(y))
    both = row_weight * weight[y]
    expected = np.sum(both * logs[np.arange(len(y)), y]) / both.sum()
    for factory in (boosting.xgboost_metric, boosting.lightgbm_metric):
        metric = factory(weight=weight)
        assert metric(x, Data(y, row_weight))[:2] == ("cross_entropy", pytest.approx(expected, rel=1e-12))
        for_sklearn = metric(y, x, sample_weight=row_weight)
        value = for_sklearn if factory is boosting.xgboost_metric else for_sklearn[1]
        assert value == pytest.approx(expected, rel=1e-12)
        value = factory(label_smoothing=0.3)(x, Data(y, np.empty(0)))[1]
        smooth = 0.7 * logs[np.arange(len(y)), y].mean() + 0.3 * logs.mean()
        assert value == pytest.approx(smooth, rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_classifiers_of_scikit_learn_are_the_same_models(library, digits, weight, weighted):
    X, y = digits
    row_weight = weight if weighted else None
    objective = library.objective(label_smoothing=0.1)
    expected = library.margins(library.train(library.data(X, y, row_weight), objective), X)
    classifier = library.classifier(objective)
    log = library.fit(classifier, X, y, row_weight, (X[:N_TRAIN], y[:N_TRAIN]), library.metric(name="loss"))
    margins = classifier.predict(X, **library.raw)
    np.testing.assert_allclose(margins, expected, rtol=0, atol=SAME)
    assert len(log["loss"]) == ROUNDS
    assert log["loss"][-1] == pytest.approx(metrics.log_loss(y[:N_TRAIN], softmax(margins[:N_TRAIN])), rel=1e-5)
    if isinstance(library, XGBoost):
        np.testing.assert_allclose(classifier.predict_proba(X), softmax(margins), rtol=0, atol=1e-6)
    again = pickle.loads(pickle.dumps(classifier))
    np.testing.assert_array_equal(again.predict(X, **library.raw), margins)


def test_lightgbm_regressors_take_soft_labels(digits):
    library = LightGBM()
    X, y = digits
    table = np.eye(N_CLASSES)[y]
    params = {"n_estimators": ROUNDS, "num_class": N_CLASSES} | library.params
    regressor = library.package.LGBMRegressor(objective=library.objective(soft_labels=table), **params)
    regressor.fit(X, np.arange(len(y)))
    expected = library.margins(library.train(library.data(X, y), library.objective()), X)
    np.testing.assert_allclose(regressor.predict(X), expected, rtol=0, atol=SAME)


def test_soft_labels_follow_their_rows_through_cross_validation(library, digits):
    X, y = digits
    results = []
    for labels, options in [(y, {}), (np.arange(len(y)), {"soft_labels": np.eye(N_CLASSES)[y]})]:
        objective, metric = library.objective(**options), library.metric(**options)
        data = library.data(X, labels)
        if isinstance(library, XGBoost):
            params = library.params | {"num_class": N_CLASSES}
            log = library.package.cv(params, data, 2, nfold=2, obj=objective, custom_metric=metric, as_pandas=False)
            results.append(log["test-cross_entropy-mean"])
        else:
            params = library.params | {"num_class": N_CLASSES, "objective": objective}
            log = library.package.cv(params, data, 2, nfold=2, feval=metric, stratified=False)
            results.append(log["valid cross_entropy-mean"])
    assert results[0][-1] < results[0][0] < np.log(N_CLASSES) - 0.1
    # Splits that are as good as each other may send some of the 450 held-out images elsewhere. Labels that stay behind
    # when their images move cost more than knowing nothing does, log(10).
    np.testing.assert_allclose(*results, rtol=0, atol=0.02)


def test_two_classes_have_two_margins(library, digits):
    X, y = digits
    y = y % 2
    margins = library.margins(library.train(library.data(X, y), library.objective(), n_classes=2), X)
    assert margins.shape == (len(y), 2)
    assert np.mean(margins.argmax(axis=1) == y) > 0.9


@pytest.mark.parametrize("weighted", [False, True])
def test_or_one_margin_as_the_built_in_objectives(library, digits, weight, weighted):
    X, y = digits
    y = y % 2
    row_weight = weight if weighted else None
    data = library.data(X, y, row_weight)
    own = library.margins(library.train_one_margin(data), X)
    assert own.shape == (len(y),)
    assert np.abs(own).max() > 1
    np.testing.assert_allclose(
        library.margins(library.train_one_margin(data, library.objective()), X), own, rtol=0, atol=SAME
    )
    classifier = library.classifier(library.objective())
    held_out = X[N_TRAIN:], y[N_TRAIN:]
    log = library.fit(classifier, X, y, row_weight, held_out, library.metric(name="loss"))
    margins = classifier.predict(X, **library.raw)
    np.testing.assert_allclose(margins, own, rtol=0, atol=SAME)
    p = 1 / (1 + np.exp(-margins.astype(np.float64)))
    assert log["loss"][-1] == pytest.approx(metrics.log_loss(held_out[1], p[N_TRAIN:]), rel=1e-5)
    if isinstance(library, XGBoost):
        np.testing.assert_allclose(classifier.predict_proba(X), np.transpose([1 - p, p]), rtol=0, atol=1e-6)
        np.testing.assert_array_equal(classifier.predict(X), p > 0.5)


def test_options_of_one_margin_are_those_of_the_built_in_objectives(library, digits, weight):
    X, y = digits
    y = (y == 3).astype(int)
    data = library.data(X, y, weight)
    pairs = [({"scale_pos_weight": 4.0}, {"weight": [1.0, 4.0]})]
    if isinstance(library, LightGBM):
        pairs.append(({"sigmoid": 0.5}, {"logit_scale": 0.5}))
    for params, options in pairs:
        own = library.margins(library.train_one_margin(data, **params), X)
        ours = library.margins(library.train_one_margin(data, library.objective(**options)), X)
        np.testing.assert_allclose(ours, own, rtol=0, atol=SAME)


def test_soft_labels_of_one_margin(library, digits):
    """Rows of two classes, in parts, are rows of either class by weight."""
    X, y = digits
    part = np.where(y % 2, 0.9, 0.25)
    tables = np.array([[0.75, 0.25], [0.1, 0.9]]), np.transpose([1 - part, part])
    doubled = library.data(np.vstack([X, X]), np.repeat([0, 1], len(y)), np.hstack([1 - part, part]))
    # As many rows and twice as many as count for LightGBM, where leaves must have some.
    expected = library.margins(library.train_one_margin(doubled, **library.small_leaves), X)
    for table, labels in zip(tables, (y % 2, np.arange(len(y))), strict=True):
        booster = library.train_one_margin(
            library.data(X, labels), library.objective(soft_labels=table), **library.small_leaves
        )
        np.testing.assert_allclose(library.margins(booster, X), expected, rtol=0, atol=SAME)


ONE_MARGIN_TABLE = np.array([[1.0, 0.0], [0.3, 0.7], [0.0, 2.0], [0.2, 0.1]])
ONE_MARGIN_OPTIONS = [
    {},
    {"weight": [0.5, 3.0]},
    {"label_smoothing": 0.2, "weight": [2.0, 1.0]},
    {"z_loss": 0.3},
    {"logit_scale": 1.7, "softcap": 2.5},
    {"soft_labels": ONE_MARGIN_TABLE},
    {
        "soft_labels": ONE_MARGIN_TABLE,
        "label_smoothing": 0.1,
        "weight": [2.0, 1.0],
        "z_loss": 0.1,
        "logit_scale": 0.6,
        "softcap": 3.0,
    },
]


def derivatives(margin, label, factor, curvature, options):
    """Return the first derivative by the margin and what stands for the second, by 40 digits and differences."""
    mpmath = pytest.importorskip("mpmath")
    options = {"weight": [1, 1], "label_smoothing": 0, "z_loss": 0, "logit_scale": 1, "softcap": None} | options
    table = options.get("soft_labels", np.eye(2))
    with mpmath.workdps(40):
        e = mpmath.mpf(options["label_smoothing"])
        q = [
            mpmath.mpf(w) * ((1 - e) * mpmath.mpf(t) + e / 2)
            for w, t in zip(options["weight"], table[label], strict=True)
        ]

        def logit(m):
            x, cap = mpmath.mpf(options["logit_scale"]) * m, options["softcap"]
            return x if cap is None else cap * mpmath.tanh(x / cap)

        def loss(x):
            lse = mpmath.log1p(mpmath.exp(x))
            return q[0] * lse + q[1] * (lse - x) + options["z_loss"] * lse**2

        x, slope = logit(mpmath.mpf(margin)), mpmath.diff(logit, margin)
        p = 1 / (1 + mpmath.exp(-x))
        grad = mpmath.diff(loss, x) * slope
        bound = slope**2 * (q[0] + q[1] + 2 * options["z_loss"] * mpmath.log1p(mpmath.exp(x))) * p * (1 - p)
        hess = {
            "exact": lambda: mpmath.diff(lambda m: loss(logit(m)), margin, 2),
            "gauss_newton": lambda: mpmath.diff(loss, x, 2) * slope**2,
            "xgboost": lambda: bound,
            "lightgbm": lambda: bound,
            "absolute": lambda: abs(grad),
        }[curvature]()
        if curvature in ("xgboost", "absolute"):
            hess = max(abs(factor) * hess, mpmath.mpf("1e-16")) / abs(factor)
        return float(factor * grad), float(factor * hess)


@pytest.mark.parametrize("curvature", ["exact", "gauss_newton", "xgboost", "lightgbm", "absolute"])
@pytest.mark.parametrize("options", ONE_MARGIN_OPTIONS, ids=str)
def test_derivatives_by_one_margin(rng, options, curvature):
    margins = np.hstack([3 * rng.standard_normal(10), [0.0, -60.0, 60.0]])
    labels = rng.integers(0, len(options.get("soft_labels", np.eye(2))), len(margins))
    labels[-2:] = 1, 0  # sure and wrong: derivatives that do not vanish
    factors = rng.uniform(0.5, 2, len(margins)) * rng.choice([-1, 1], len(margins))
    expected = [derivatives(*row, curvature, options) for row in zip(margins, labels, factors, strict=True)]
    for factory in OBJECTIVES:
        objective = factory(curvature=curvature, **options)
        for dtype, rtol in ((np.float64, 1e-11), (np.float32, 1e-5)):
            for shape in ((-1,), (-1, 1)):
                x = margins.astype(dtype).reshape(shape)
                kept = x.copy()
                for results in (objective(x, Data(np.float32(labels), factors)), objective(labels, x, factors)):
                    for result, column in zip(results, zip(*expected, strict=True), strict=True):
                        assert (result.dtype, result.shape, result.strides) == (x.dtype, x.shape, x.strides)
                        # The softcap's slope at 60, and what it multiplies, keep few digits: 1 - tanh^2 of 24 or more.
                        np.testing.assert_allclose(result.ravel(), column, rtol=rtol, atol=rtol)
                np.testing.assert_array_equal(x, kept)


@pytest.mark.parametrize("factory", FACTORIES)
def test_metrics_and_ignored_rows_of_one_margin(factory, rng):
    x, labels = rng.standard_normal(9), rng.integers(0, 2, 9)
    labels[3] = 7
    made, kept = factory(ignore_index=7, label_smoothing=0.2, weight=[1.0, 3.0]), labels != 7
    results = made(x, Data(labels, None)), made(x[kept, None], Data(labels[kept, None], None))
    if factory in OBJECTIVES:
        for whole, part in zip(*results, strict=True):
            assert whole[3] == 0
            np.testing.assert_array_equal(whole[kept], part[:, 0])
        return
    assert results[0] == results[1]
    logs = np.logaddexp(0, np.transpose([x, -x]))[kept]
    y, w = labels[kept], np.array([1.0, 3.0])
    losses = 0.8 * w[y] * logs[np.arange(8), y] + 0.1 * logs @ w
    assert results[0][1] == pytest.approx(losses.sum() / w[y].sum(), rel=1e-12)


@pytest.mark.parametrize("n_classes", [None, 1, 5])
@pytest.mark.parametrize("curvature", ["exact", "gauss_newton", "xgboost", "lightgbm", "absolute"])
def test_a_negative_weight_undoes_a_positive_one(rng, n_classes, curvature):
    """In the curvature too, whatever its least value, which sure rows have."""
    shape = (12,) if n_classes is None else (12, n_classes)
    x = rng.standard_normal(shape) * np.geomspace(1, 1e4, 12).reshape((-1,) + (1,) * (len(shape) - 1))
    labels = rng.integers(0, n_classes or 2, 12) if n_classes != 1 else rng.integers(0, 2, 12)
    weight = rng.integers(1, 4, 12)
    objective = boosting.xgboost_objective(curvature=curvature, label_smoothing=0.1, z_loss=0.1)
    sign = rng.choice([-1, 0, 1], 12)
    for dtype in (np.float64, np.float32, np.int8):
        plus = objective(labels, x, weight.astype(dtype))
        signed = objective(labels, x, (sign * weight).astype(dtype))
        for one, other in zip(plus, signed, strict=True):
            np.testing.assert_array_equal(other, one * sign.reshape((-1,) + (1,) * (len(shape) - 1)))


@pytest.mark.parametrize("two_classes", [False, True])
def test_lightgbm_takes_signed_weights_as_its_own_objectives_do(digits, rng, two_classes):
    library = LightGBM()
    X, y = digits
    signed = np.where(rng.random(len(y)) < 0.2, -0.5, 1.5).astype(np.float32)
    data = library.data(X, y % 2 if two_classes else y, signed)
    train = library.train_one_margin if two_classes else library.train
    own = library.margins(train(data), X)
    assert np.abs(own).max() > 1
    np.testing.assert_allclose(library.margins(train(data, library.objective()), X), own, rtol=0, atol=SAME)


@pytest.mark.parametrize("two_classes", [False, True])
def test_xgboost_takes_signed_weights_from_a_function(digits, rng, two_classes):
    """Rows that cancel each other change nothing, where their features are those of others."""
    library = XGBoost()
    X, y = digits
    y = y % 2 if two_classes else y
    train = library.train_one_margin if two_classes else library.train
    expected = library.margins(train(library.data(X, y), library.objective()), X)
    again, wrong = X[:200], (y[:200] + 1) % (2 if two_classes else N_CLASSES)
    data = library.data(np.vstack([X, again, again]), np.hstack([y, wrong, wrong]))
    weight = np.repeat([1.0, 2.5, -2.5], [len(y), 200, 200])
    objective = library.objective()
    booster = train(data, lambda margins, data: objective(data.get_label(), margins, weight))
    np.testing.assert_allclose(library.margins(booster, X), expected, rtol=0, atol=SAME)


def test_metrics_divide_by_the_signed_sum(rng):
    x, labels, weight = rng.standard_normal((20, 3)), rng.integers(0, 3, 20), rng.uniform(-0.5, 2, 20)
    logs = -np.log(softmax(x))[np.arange(20), labels]
    for factory in (boosting.xgboost_metric, boosting.lightgbm_metric):
        assert factory()(x, Data(labels, weight))[1] == pytest.approx(weight @ logs / weight.sum(), rel=1e-12)


@pytest.mark.parametrize("factory", FACTORIES)
def test_nothing_raises_where_numpy_is_told_to_raise(factory):
    far = np.array([1e-300, 1, -100, 1e3, 1e4, -6e4])
    labels, weight = np.float32([0, 1, 0, 1, 0, 1]), np.array([1, 1e-320, 1e-300, 3e-200, 0, 2])
    for x in (far, np.outer(far, [1, -0.5, 0])):
        tiny = np.full((2, 2 if x.ndim == 1 else 3), 1e-310)
        for dtype in (np.float64, np.float32, np.float16):
            for sample_weight in (None, weight, weight * [1, 1, -1, -1, 1, 1]):
                for options in ({}, {"soft_labels": tiny}, {"label_smoothing": 1e-310}):
                    made, margins = factory(**options), x.astype(dtype)
                    with np.errstate(all="raise"):
                        made(margins, Data(labels, sample_weight))
    with np.errstate(all="raise"), pytest.raises(ValueError, match="labels must be whole numbers, got inf"):
        factory()(np.zeros(2), Data(np.float32([0, np.inf]), None))


@pytest.mark.parametrize("factory", FACTORIES)
def test_objects_can_be_pickled_and_are_their_own_copies(factory, rng):
    made = factory(label_smoothing=0.1, soft_labels=rng.random((20, 4)))
    x, labels = rng.standard_normal((9, 4)), rng.integers(0, 20, 9)
    again = pickle.loads(pickle.dumps(made))
    assert repr(again) == repr(made)
    np.testing.assert_equal(again(labels, x), made(labels, x))
    assert copy.deepcopy([made])[0] is made


@pytest.mark.parametrize("factory", FACTORIES)
def test_representations_say_how_objects_were_made(factory):
    name = factory.__name__
    assert repr(factory()) == f"{name}()"
    own = "curvature='exact'" if factory in OBJECTIVES else "name='loss'"
    text = f"{name}({own}, weight=[1.0, 2.0], z_loss=0.1)"
    assert repr(eval(text, vars(boosting))) == text
    assert repr(factory(soft_labels=np.eye(3, dtype=np.float32))) == f"{name}(soft_labels=<3 x 3, float32>)"


@pytest.mark.parametrize("factory", FACTORIES)
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing must be in [0, 1], got 1.5"),
        ({"weight": [1.0, np.nan]}, ValueError, "weight must be finite"),
        ({"reduction": "mean"}, TypeError, "reduction, sample_weight, for they are fixed here, got reduction"),
        ({"smoothing": 0.1}, TypeError, "options must be those of cross_entropy, got smoothing"),
        ({"grad_output": 2.0}, TypeError, "options must be those of cross_entropy, got grad_output"),
        ({"soft_labels": [0.5, 0.5]}, ValueError, "soft_labels must have shape (n_labels, n_classes), got (2,)"),
        ({"soft_labels": [[1, 0]]}, TypeError, "soft_labels must be floats, got int64"),
        ({"soft_labels": [[0.5, -0.5]]}, ValueError, "soft_labels must be finite and not negative, got -0.5"),
        ({"soft_labels": [[0.5, np.nan]]}, ValueError, "soft_labels must be finite and not negative, got nan"),
        ({"soft_labels": np.empty((2**24 + 1, 0))}, ValueError, "at most 16777216 rows"),
        ({"soft_labels": [[0.5, 0.5]], "ignore_index": 3}, ValueError, "ignore_index must be left alone"),
        ({"soft_labels": [[0.5, 0.5]], "weight": [1.0]}, ValueError, "weight must have shape (2,), got (1,)"),
    ],
    ids=str,
)
def test_options_are_checked_when_objects_are_made(factory, options, error, message):
    with pytest.raises(error, match=re.escape(message)):
        factory(**options)


@pytest.mark.parametrize("factory", [boosting.lightgbm_objective, boosting.lightgbm_metric])
def test_the_number_of_classes_is_checked(factory):
    made = factory(3, label_smoothing=0.1)
    assert repr(made) == f"{factory.__name__}(3, label_smoothing=0.1)"
    made(np.zeros(2), np.zeros((2, 3)))
    with pytest.raises(ValueError, match=re.escape("predictions must be of num_class=3 classes, got shape (2, 4)")):
        made(np.zeros(2), np.zeros((2, 4)))
    message = "predictions must be of num_class=3 classes, got shape (2,), one margin, which is that of two classes"
    with pytest.raises(ValueError, match=re.escape(message)):
        made(np.zeros(2), np.zeros(2))
    factory(2)(np.zeros(2), np.zeros(2))
    with pytest.raises(ValueError, match=re.escape("weight must have shape (3,), got (2,)")):
        factory(3, weight=[1.0, 2.0])
    with pytest.raises(ValueError, match=re.escape("target of class probabilities must have the logits' shape")):
        factory(3, soft_labels=np.eye(2))
    with pytest.raises(ValueError, match="num_class must be at least 2, got 1"):
        factory(1)
    with pytest.raises(TypeError, match="num_class must be None or an integer, got 'multiclass'"):
        factory("multiclass")


@pytest.mark.parametrize("factory", OBJECTIVES)
def test_unknown_curvatures_are_refused(factory):
    with pytest.raises(ValueError, match="curvature must be one of"):
        factory(curvature="approximate")


@pytest.mark.parametrize("factory", FACTORIES)
def test_labels_are_checked_when_objects_are_called(factory):
    x = np.zeros((3, 4))
    for labels, options, error, message in [
        ([0, 1, 4], {}, IndexError, "target[2] is 4, but there are 4 classes"),
        ([0, 1.5, 2], {}, ValueError, "labels must be whole numbers, got 1.5: distributions are rows of soft_labels"),
        ([0, 1, np.nan], {}, ValueError, "labels must be whole numbers, got nan"),
        ([0, -1, 0], {"soft_labels": np.eye(2, 4)}, IndexError, "label[1] is -1, but soft_labels has 2 rows"),
        ([0, 1, 2], {"soft_labels": np.eye(2, 4)}, IndexError, "label[2] is 2, but soft_labels has 2 rows"),
        ([0, 1, 1], {"soft_labels": np.eye(2, 5)}, ValueError, "the logits' shape (3, 4), got (3, 5)"),
        ([0, 1], {}, ValueError, "must have shape (3,)"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            factory(**options)(x, Data(np.array(labels, np.float32), None))
    for labels in (np.array(["a", "b", "a"]), np.array(["a", "b", "a"], object), np.array([0, None, 1])):
        with pytest.raises(TypeError, match=re.escape("labels = np.unique(labels, return_inverse=True)")):
            factory()(x, Data(labels, None))
    for labels in (None, np.empty(0, np.float32)):
        with pytest.raises(ValueError, match="data must have labels, got none"):
            factory()(x, Data(labels, None))
    with pytest.raises(IndexError, match=re.escape("one margin, which is that of two classes: for more, set the lib")):
        factory()(np.zeros(3), Data(np.float32([0, 1, 2]), None))
    with pytest.raises(ValueError, match=re.escape("or (n,) or (n, 1) for two classes, got (3, 4, 1)")):
        factory()(x[:, :, None], Data(np.zeros(3), None))
    with pytest.raises(TypeError, match="name must be a string, got 3"):
        boosting.xgboost_metric(name=3)


@pytest.mark.parametrize("factory", FACTORIES)
def test_every_function_is_documented_with_an_example_that_runs(factory):
    text = inspect.getdoc(factory)
    for section in ("Parameters", "Returns", "Raises", "Examples"):
        assert f"\n{section}\n{'-' * len(section)}\n" in text
    report = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    for example in doctest.DocTestFinder(recurse=False).find(factory, factory.__name__, globs={}):
        runner.run(example, out=report.append)
    assert runner.tries > 0
    assert runner.failures == 0, "".join(report)


def test_neither_library_is_imported():
    code = "import sys, fastce.boosting; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    modules = set(done.stdout.split())
    assert "fastce.boosting" in modules
    assert not modules & {"xgboost", "lightgbm", "sklearn", "scipy"}
