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
    own_objective = "multi:softprob"
    raw = {"output_margin": True}  # noqa: RUF012

    def __init__(self):
        self.package = pytest.importorskip("xgboost")

    def data(self, images, labels, weight=None):
        return self.package.DMatrix(images, label=labels, weight=weight)

    def train(self, data, objective=None, n_classes=N_CLASSES, rounds=ROUNDS, **options):
        params = self.params | ({"num_class": n_classes, "objective": self.own_objective} if n_classes else {})
        return self.package.train(params, data, rounds, obj=objective, **options)

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
    own_objective = "multiclass"
    raw = {"raw_score": True}  # noqa: RUF012

    def __init__(self):
        self.package = pytest.importorskip("lightgbm")

    def data(self, images, labels, weight=None):
        return self.package.Dataset(images, labels, weight=weight, free_raw_data=False)

    def train(self, data, objective=None, n_classes=N_CLASSES, rounds=ROUNDS, **options):
        params = self.params | {"objective": objective or self.own_objective, "num_class": n_classes}
        return self.package.train(params, data, rounds, **options)

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
    with pytest.raises(ValueError, match=re.escape(f"must have shape (n, n_classes), got ({len(y)},): for two")):
        library.classifier(library.objective()).fit(X, y)


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
        ({"weight": [1.0, -1.0]}, ValueError, "weight must be finite and not negative, got -1.0"),
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
    with pytest.raises(ValueError, match=re.escape("weight must have shape (3,), got (2,)")):
        factory(3, weight=[1.0, 2.0])
    with pytest.raises(ValueError, match=re.escape("target of class probabilities must have the logits' shape")):
        factory(3, soft_labels=np.eye(2))
    with pytest.raises(ValueError, match="num_class must be at least 2, got 1"):
        factory(1)
    with pytest.raises(TypeError):
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
        ([0, 1.5, 2], {}, ValueError, "labels must be whole numbers, got 1.5"),
        ([0, 1, np.nan], {}, ValueError, "labels must be whole numbers, got nan"),
        ([0, -1, 0], {"soft_labels": np.eye(2, 4)}, IndexError, "label[1] is -1, but soft_labels has 2 rows"),
        ([0, 1, 2], {"soft_labels": np.eye(2, 4)}, IndexError, "label[2] is 2, but soft_labels has 2 rows"),
        ([0, 1, 1], {"soft_labels": np.eye(2, 5)}, ValueError, "the logits' shape (3, 4), got (3, 5)"),
        ([0, 1], {}, ValueError, "must have shape (3,)"),
    ]:
        with pytest.raises(error, match=re.escape(message)):
            factory(**options)(x, Data(np.array(labels, np.float32), None))
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
