import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from finetune.metrics import METRIC_TITLES, METRICS, compute

PREDICTED = np.array([1, 1, 0, 0, 1, 0, 1, 1])
LABELS = np.array([1, 0, 0, 1, 1, 0, 1, 0])


def test_class_metrics_equal_scikit_learns_and_the_textbook():
    scores = compute(("accuracy", "f1", "matthews"), PREDICTED, LABELS)
    assert scores["accuracy"] == sklearn_metrics.accuracy_score(LABELS, PREDICTED) == 5 / 8
    assert scores["f1"] == pytest.approx(2 * 3 / (2 * 3 + 2 + 1))
    true_positive, false_positive, false_negative, true_negative = 3, 2, 1, 2
    expected = (true_positive * true_negative - false_positive * false_negative) / np.sqrt(5 * 4 * 4 * 3)
    assert scores["matthews"] == pytest.approx(expected)


def test_correlations_equal_numpys_on_values_and_on_ranks():
    random = np.random.default_rng(0)
    predicted, labels = random.normal(size=50), random.normal(size=50)
    scores = compute(("pearson", "spearman"), predicted, labels)
    assert scores["pearson"] == pytest.approx(np.corrcoef(predicted, labels)[0, 1])
    ranks = [values.argsort().argsort() for values in (predicted, labels)]
    assert scores["spearman"] == pytest.approx(np.corrcoef(*ranks)[0, 1])


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
@pytest.mark.filterwarnings("error")
def test_constant_predictions_correlate_zero(name: str):
    assert compute((name,), np.ones_like(LABELS), LABELS) == {name: 0.0}


def test_every_metric_has_a_title():
    assert METRICS.keys() == METRIC_TITLES.keys()
