"""A task of the user's own, as a configuration gives it."""

import re
from dataclasses import dataclass
from pathlib import PurePath
from typing import Final

from finetune.metrics import CLASS_METRICS, SCORE_METRICS

OWN_FORMATS: Final = (".csv", ".tsv", ".jsonl")


@dataclass(frozen=True)
class OwnTask:
    """A task of the user's own: rows of one or two texts, each with a label or a score."""

    task_name: str
    """its name in the grid's list of tasks: small letters, digits and _"""
    sentence_columns: list[str]
    """the one or two columns of text"""
    label_column: str
    """the column of labels or scores"""
    metrics: list[str]
    """of classes: accuracy f1 matthews; of scores: pearson spearman; the first one selects a configuration"""
    train: str
    """training rows: a .csv, .tsv (no quoting) or .jsonl file; with a dataset, a split of it"""
    dev: str
    """evaluation rows: a file as for train; with a dataset, a split of it"""
    labels: list[str | int | bool] | None = None
    """the labels, in the order of the classifier's outputs; default: the label is a score (regression)"""
    dataset: str | None = None
    """a data set on the Hugging Face hub, or a folder of data files"""
    dataset_config: str | None = None
    """the data set's configuration"""

    def __post_init__(self) -> None:
        for problem in (self._problem_of_columns(), self._problem_of_labels(), self._problem_of_place()):
            if problem:
                raise ValueError(f"own task '{self.task_name}': {problem}")

    def _problem_of_columns(self) -> str | None:
        if not re.fullmatch(r"[a-z0-9_]+", self.task_name):
            return "a task_name has small letters, digits and _ only"
        if len(self.sentence_columns) not in (1, 2):
            return f"sentence_columns names one or two columns, not {len(self.sentence_columns)}"
        if len({*self.sentence_columns, self.label_column}) <= len(self.sentence_columns):
            return "sentence_columns and label_column name the same column twice"
        return None

    def _problem_of_labels(self) -> str | None:
        known = SCORE_METRICS if self.labels is None else CLASS_METRICS
        if not self.metrics or any(name not in known for name in self.metrics):
            of_what = "scores (no labels are given)" if self.labels is None else "classes"
            return f"metrics must be of {' '.join(known)}, which are for {of_what}"
        if self.labels is None:
            return None
        if any(isinstance(label, bool) for label in self.labels):
            return "put quotes around labels like yes, no, true and false, which YAML takes for truth values"
        if len(self.labels) < 2 or len(set(map(str, self.labels))) < len(self.labels):
            return "labels must be at least two different ones"
        if "f1" in self.metrics and len(self.labels) != 2:
            return "f1 is of two labels, the second one counting: take accuracy or matthews"
        return None

    def _problem_of_place(self) -> str | None:
        if self.train == self.dev:
            return "train and dev are the same"
        if self.dataset is not None:
            return None
        if self.dataset_config is not None:
            return "dataset_config needs dataset"
        wrong = [path for path in (self.train, self.dev) if PurePath(path).suffix not in OWN_FORMATS]
        return f"{wrong[0]} does not end in {', '.join(OWN_FORMATS)}, and there is no dataset" if wrong else None
