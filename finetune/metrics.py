"""GLUE's metrics. All scores are fractions as scikit-learn gives them; tables print them times 100."""

from collections.abc import Iterable
from typing import Final

import numpy as np
from scipy import stats
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef


def accuracy(predictions: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows predicted right, in [0, 1]."""
    return float(accuracy_score(labels, predictions))


def f1(predictions: np.ndarray, labels: np.ndarray) -> float:
    """F1 of class 1 (paraphrase, duplicate), in [0, 1]; 0 where class 1 is neither predicted nor there."""
    return float(f1_score(labels, predictions, zero_division=0.0))


def matthews(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Matthews correlation, in [-1, 1]; 0 for constant predictions."""
    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Linear correlation, in [-1, 1]; 0 for constant predictions, where it is undefined."""
    return _correlation(stats.pearsonr, predictions, labels)


def spearman(predictions: np.ndarray, labels: np.ndarray) -> float:
    """Rank correlation, in [-1, 1]; 0 for constant predictions, where it is undefined."""
    return _correlation(stats.spearmanr, predictions, labels)


def _correlation(function, predictions: np.ndarray, labels: np.ndarray) -> float:
    if np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    return float(function(predictions, labels).statistic)


CLASS_METRICS: Final = {"accuracy": accuracy, "f1": f1, "matthews": matthews}
SCORE_METRICS: Final = {"pearson": pearson, "spearman": spearman}
METRICS: Final = {**CLASS_METRICS, **SCORE_METRICS}
METRIC_TITLES: Final = {
    "accuracy": "accuracy",
    "f1": "F1",
    "matthews": "Matthews",
    "pearson": "Pearson",
    "spearman": "Spearman",
}


def compute(names: Iterable[str], predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The metrics called ``names``.

    Args:
        names: keys of :data:`METRICS`.
        predictions: class indices or predicted scores, shape [rows].
        labels: class indices or scores, shape [rows].
    """
    return {name: METRICS[name](predictions, labels) for name in names}
