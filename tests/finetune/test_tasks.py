from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from common.cli import config_parser, parse, take_config
from common.errors import UserError
from finetune.metrics import CLASS_METRICS, SCORE_METRICS
from finetune.own_task import OwnTask
from finetune.tasks import AX, TASKS, benchmark_title, majority_score, own_task

GLUE = [task for task in TASKS.values() if task.is_glue]
SUBMISSION_ROWS = {  # https://gluebenchmark.com/submit, in the order of its sample
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}
OWN = {
    "task_name": "tickets",
    "sentence_columns": ["subject", "body"],
    "label_column": "queue",
    "labels": ["sales", "support", "spam"],
    "metrics": ["accuracy"],
    "train": "train.csv",
    "dev": "dev.jsonl",
}


def test_the_table_has_glues_nine_tasks_and_its_diagnostic_set():
    names = "cola sst2 mrpc stsb qqp mnli qnli rte wnli".split()
    assert [task.task_name for task in GLUE] == names
    assert AX.is_glue
    assert AX.predicted_by == "mnli"
    assert AX.labels == TASKS["mnli"].labels
    assert AX.task_name not in TASKS


def test_the_test_splits_are_the_eleven_files_of_a_submission():
    splits = [split for task in (*GLUE, AX) for split in task.test_splits]
    assert {split.submission_file: split.rows for split in splits} == SUBMISSION_ROWS


def test_every_split_of_a_glue_task_has_an_official_size():
    assert all(task.official_rows.keys() == set(task.splits) for task in GLUE)
    assert TASKS["mnli"].is_test("test_mismatched")
    assert not TASKS["mnli"].is_test("dev_mismatched")


def test_metrics_fit_what_is_predicted():
    for task in (*TASKS.values(), AX):
        assert set(task.metrics) <= set(CLASS_METRICS if task.labels else SCORE_METRICS)


def test_only_glues_own_tasks_are_called_glue():
    own = own_task(OwnTask(**OWN))
    assert (own.is_glue, own.synthetic) == (False, False)
    assert benchmark_title([own]) == "Own tasks (not GLUE)"
    assert benchmark_title([TASKS["demo_sentiment"]]) == "Synthetic demo benchmark (not GLUE)"
    assert benchmark_title([TASKS["rte"]]) == "GLUE, development set"
    mixed = benchmark_title([TASKS["rte"], TASKS["demo_sentiment"], own])
    assert mixed == "GLUE, development set, and synthetic demo benchmark (not GLUE), and own tasks (not GLUE)"
    assert all(task.synthetic == name.startswith("demo_") for name, task in TASKS.items())


def test_majority_score_is_that_of_the_most_frequent_class():
    wnli = np.array([0] * 40 + [1] * 31)  # as in the official development set
    assert majority_score(wnli, TASKS["wnli"]) == 40 / 71
    mrpc = np.array([1] * 279 + [0] * 129)
    assert majority_score(mrpc, TASKS["mrpc"]) == sklearn_metrics.f1_score(mrpc, np.ones(408))
    assert majority_score(mrpc, TASKS["cola"]) == 0.0
    assert majority_score(np.array([1.0, 2.0], dtype=np.float32), TASKS["stsb"]) is None


@dataclass(frozen=True)
class ConfigWithTasks:
    own_tasks: list[OwnTask]


def parse_own_task(folder: Path, labels: str) -> OwnTask:
    (folder / "own.yaml").write_text(
        "own_tasks: [{task_name: reviews, sentence_columns: [text], label_column: stars,"
        f" labels: {labels}, metrics: [matthews, accuracy], train: train.tsv, dev: dev.tsv}}]"
    )
    arguments = parse(config_parser("test", "", ConfigWithTasks), ["--config", str(folder / "own.yaml")])
    return take_config(arguments, ConfigWithTasks).own_tasks[0]


def test_an_own_task_comes_from_yaml_and_is_a_row_of_the_same_kind(tmp_path: Path):
    task = own_task(parse_own_task(tmp_path, "[1, 2, 3]"))
    assert task.labels == ("1", "2", "3")
    assert (task.num_labels, task.selected_by, task.splits) == (3, "matthews", ("train", "dev"))


def test_labels_that_yaml_takes_for_truth_values_want_quotes(tmp_path: Path):
    assert parse_own_task(tmp_path, "['yes', 'no']").labels == ["yes", "no"]
    with pytest.raises(UserError, match="own task 'reviews': put quotes around labels"):
        parse_own_task(tmp_path, "[yes, no]")


WRONG_OWN_TASKS = {
    "name of a folder": ({"task_name": "../x"}, "small letters"),
    "name taken": ({"task_name": "rte"}, "of this name already"),
    "no texts": ({"sentence_columns": []}, "one or two columns, not 0"),
    "three texts": ({"sentence_columns": ["a", "b", "c"]}, "one or two columns, not 3"),
    "same column": ({"label_column": "body"}, "the same column twice"),
    "unknown metric": ({"metrics": ["bleu"]}, "accuracy f1 matthews"),
    "no metric": ({"metrics": []}, "accuracy f1 matthews"),
    "metric of scores": ({"metrics": ["pearson"]}, "which are for classes"),
    "metric of classes": ({"labels": None}, "which are for scores"),
    "F1 of three": ({"metrics": ["accuracy", "f1"]}, "f1 is of two labels"),
    "one label": ({"labels": ["sales"]}, "two different ones"),
    "same label": ({"labels": ["1", 1]}, "two different ones"),
    "same files": ({"dev": "train.csv"}, "train and dev are the same"),
    "other format": ({"dev": "dev.xlsx"}, "dev.xlsx does not end in .csv, .tsv, .jsonl"),
    "config of nothing": ({"dataset_config": "en"}, "dataset_config needs dataset"),
}


@pytest.mark.parametrize("case", WRONG_OWN_TASKS)
def test_wrong_own_tasks_are_refused_by_name(case: str):
    changes, expected = WRONG_OWN_TASKS[case]
    with pytest.raises(ValueError, match=r"^own task '") as refusal:
        own_task(OwnTask(**{**OWN, **changes}))
    assert expected in str(refusal.value)
