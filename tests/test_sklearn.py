"""fastce.sklearn against scikit-learn."""
import numpy as np
import pytest
sklearn = pytest.importorskip("sklearn")
from sklearn.utils.estimator_checks import parametrize_with_checks
from fastce.sklearn import LogisticRegression

@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@parametrize_with_checks([LogisticRegression(solver=s) for s in ("lbfgs","newton-cg","sgd")])
def test_estimator_checks(estimator, check):
    check(estimator)
