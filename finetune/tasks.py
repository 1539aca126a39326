"""The tasks, one row of data each: nine of GLUE, its diagnostic set AX, and three of the project's own demo benchmark.

File layouts and row counts are those of https://gluebenchmark.com; the metric that selects a configuration is the one
that "How to Train BERT with an Academic Budget" reports. A user's own task is a row of the same kind.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from common.errors import UserError
from finetune.metrics import compute
from finetune.own_task import OwnTask

HUB_DATASET: Final = "nyu-mll/glue"


@dataclass(frozen=True)
class TestSplit:
    """A split without labels, whose predictions the GLUE server scores."""

    __test__ = False  # not a test of pytest's

    name: str
    """Its file is ``<name>.tsv``."""
    submission_file: str
    """What the server calls the file of its predictions."""
    rows: int
    """The official number."""


@dataclass(frozen=True)
class Task:
    """What one task's files look like, and how it is scored."""

    task_name: str
    """The name in configurations and results."""
    title: str
    """The name in tables."""
    folder: str
    """The folder of its official TSV files."""
    sentence_columns: tuple[str, ...]
    """One or two columns of text."""
    label_column: str
    labels: tuple[str, ...] | None
    """Label names in the order of their class indices; None where the label is a score (regression)."""
    metrics: tuple[str, ...]
    """The first one selects a configuration."""
    official_rows: Mapping[str, int]
    """Rows of the training split and of each evaluation split; empty for a task that is not GLUE's."""
    evaluation_splits: tuple[str, ...] = ("dev",)
    """The score is of the first one. A split's file is ``<split>.tsv``."""
    test_splits: tuple[TestSplit, ...] = ()
    columns_without_header: tuple[str, ...] | None = None
    """The columns of training and evaluation files that have no header line."""
    skip_broken_rows: bool = False
    """Questions with line breaks in them break rows of the official file; the official counts leave them out."""
    may_lack_text: bool = False
    """Whether a text may be empty, as it is in official rows."""
    score_range: tuple[float, float] | None = None
    """The smallest and the largest score there is, where scores are bounded."""
    other_files: tuple[str, ...] = ()
    """Where else in the GLUE folder its only file may lie: nobody agreed on the diagnostic set's place."""
    label_titles: tuple[str, ...] | None = None
    """What saved models call their outputs, where the files' labels are mere numbers: the hub's names of them."""
    hub_config: str | None = None
    """Configuration of the hub's GLUE data set; None for a task that is not GLUE's."""
    hub_sentence_columns: tuple[str, ...] | None = None
    """Where they differ from ``sentence_columns``."""
    predicted_by: str | None = None
    """The task whose model predicts this one, which has no training rows of its own."""
    own: OwnTask | None = None
    """A user's own task as it was given."""

    @property
    def selected_by(self) -> str:
        """The metric that selects a configuration and that tables show."""
        return self.metrics[0]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that a trial needs, the training split first."""
        return ("train", *self.evaluation_splits)

    @property
    def is_glue(self) -> bool:
        """Whether this is a task of GLUE."""
        return self.hub_config is not None

    @property
    def synthetic(self) -> bool:
        """Whether this is a task of the synthetic demo benchmark, which is not GLUE."""
        return not self.is_glue and self.own is None

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier: one per class, one for a score."""
        return len(self.labels) if self.labels else 1

    @property
    def output_names(self) -> tuple[str, ...]:
        """What a saved model calls its outputs."""
        return self.label_titles or self.labels or ("score",)

    def is_test(self, split: str) -> bool:
        """Whether the split has no labels."""
        return any(split == test.name for test in self.test_splits)


_BINARY: Final = ("0", "1")
_ENTAILMENT: Final = ("entailment", "not_entailment")
_INFERENCE: Final = ("entailment", "neutral", "contradiction")
_ALL_TASKS: Final = (
    Task(
        task_name="cola",
        title="CoLA",
        folder="CoLA",
        sentence_columns=("sentence",),
        label_column="label",
        labels=_BINARY,
        label_titles=("unacceptable", "acceptable"),
        metrics=("matthews", "accuracy"),
        official_rows={"train": 8551, "dev": 1043},
        test_splits=(TestSplit("test", "CoLA.tsv", 1063),),
        columns_without_header=("source", "label", "mark", "sentence"),
        hub_config="cola",
    ),
    Task(
        task_name="sst2",
        title="SST-2",
        folder="SST-2",
        sentence_columns=("sentence",),
        label_column="label",
        labels=_BINARY,
        label_titles=("negative", "positive"),
        metrics=("accuracy",),
        official_rows={"train": 67349, "dev": 872},
        test_splits=(TestSplit("test", "SST-2.tsv", 1821),),
        hub_config="sst2",
    ),
    Task(
        task_name="mrpc",
        title="MRPC",
        folder="MRPC",
        sentence_columns=("#1 String", "#2 String"),
        label_column="Quality",
        labels=_BINARY,
        label_titles=("not_equivalent", "equivalent"),
        metrics=("f1", "accuracy"),
        official_rows={"train": 3668, "dev": 408},
        test_splits=(TestSplit("test", "MRPC.tsv", 1725),),
        hub_config="mrpc",
        hub_sentence_columns=("sentence1", "sentence2"),
    ),
    Task(
        task_name="stsb",
        title="STS-B",
        folder="STS-B",
        sentence_columns=("sentence1", "sentence2"),
        label_column="score",
        labels=None,
        metrics=("spearman", "pearson"),
        official_rows={"train": 5749, "dev": 1500},
        test_splits=(TestSplit("test", "STS-B.tsv", 1379),),
        score_range=(0.0, 5.0),
        hub_config="stsb",
    ),
    Task(
        task_name="qqp",
        title="QQP",
        folder="QQP",
        sentence_columns=("question1", "question2"),
        label_column="is_duplicate",
        labels=_BINARY,
        label_titles=("not_duplicate", "duplicate"),
        metrics=("f1", "accuracy"),
        official_rows={"train": 363846, "dev": 40430},
        test_splits=(TestSplit("test", "QQP.tsv", 390965),),
        skip_broken_rows=True,
        may_lack_text=True,  # two training rows have no second question
        hub_config="qqp",
    ),
    Task(
        task_name="mnli",
        title="MNLI-m",
        folder="MNLI",
        sentence_columns=("sentence1", "sentence2"),
        label_column="gold_label",
        labels=_INFERENCE,
        metrics=("accuracy",),
        official_rows={"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832},
        evaluation_splits=("dev_matched", "dev_mismatched"),
        may_lack_text=True,  # written by many people: nothing promises a hypothesis in every row
        test_splits=(
            TestSplit("test_matched", "MNLI-m.tsv", 9796),
            TestSplit("test_mismatched", "MNLI-mm.tsv", 9847),
        ),
        hub_config="mnli",
        hub_sentence_columns=("premise", "hypothesis"),
    ),
    Task(
        task_name="qnli",
        title="QNLI",
        folder="QNLI",
        sentence_columns=("question", "sentence"),
        label_column="label",
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        official_rows={"train": 104743, "dev": 5463},
        test_splits=(TestSplit("test", "QNLI.tsv", 5463),),
        hub_config="qnli",
    ),
    Task(
        task_name="rte",
        title="RTE",
        folder="RTE",
        sentence_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        official_rows={"train": 2490, "dev": 277},
        test_splits=(TestSplit("test", "RTE.tsv", 3000),),
        hub_config="rte",
    ),
    Task(
        task_name="wnli",
        title="WNLI",
        folder="WNLI",
        sentence_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=_BINARY,
        label_titles=("not_entailment", "entailment"),
        metrics=("accuracy",),
        official_rows={"train": 635, "dev": 71},
        test_splits=(TestSplit("test", "WNLI.tsv", 146),),
        hub_config="wnli",
    ),
    Task(
        task_name="demo_sentiment",
        title="demo sentiment",
        folder="demo-sentiment",
        sentence_columns=("sentence",),
        label_column="label",
        labels=_BINARY,
        label_titles=("negative", "positive"),
        metrics=("accuracy",),
        official_rows={},
    ),
    Task(
        task_name="demo_entailment",
        title="demo entailment",
        folder="demo-entailment",
        sentence_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=_ENTAILMENT,
        metrics=("accuracy",),
        official_rows={},
    ),
    Task(
        task_name="demo_similarity",
        title="demo similarity",
        folder="demo-similarity",
        sentence_columns=("sentence1", "sentence2"),
        label_column="score",
        labels=None,
        metrics=("spearman", "pearson"),
        official_rows={},
    ),
)
TASKS: Final[Mapping[str, Task]] = {task.task_name: task for task in _ALL_TASKS}
"""The tasks that a grid can train."""


def _mnli_scored_on(split: str, number: int) -> Task:
    mnli = TASKS["mnli"]
    return replace(
        mnli,
        task_name=f"mnli_{split}",
        title=f"MNLI {split}",
        official_rows={name: mnli.official_rows[name] for name in ("train", f"dev_{split}")},
        evaluation_splits=(f"dev_{split}",),
        test_splits=(mnli.test_splits[number],),
    )


MNLI_SETS: Final[Mapping[str, Task]] = {
    task.task_name: task for task in (_mnli_scored_on("matched", 0), _mnli_scored_on("mismatched", 1))
}
"""MNLI scored on one of its two sets alone, under run_glue's names."""

AX: Final = Task(
    task_name="ax",
    title="AX",
    folder="AX",
    sentence_columns=("sentence1", "sentence2"),
    label_column="label",
    labels=_INFERENCE,
    metrics=("matthews",),
    official_rows={},
    evaluation_splits=(),
    test_splits=(TestSplit("diagnostic", "AX.tsv", 1104),),
    other_files=("diagnostic/diagnostic.tsv", "AX/AX.tsv", "AX.tsv"),
    hub_config="ax",
    hub_sentence_columns=("premise", "hypothesis"),
    predicted_by="mnli",
)


def find_task(task_name: str) -> Task:
    """The task of this name, of those that the program knows.

    Raises:
        UserError: there is none.
    """
    known = {**TASKS, **MNLI_SETS}
    if task_name not in known:
        raise UserError(f"there is no task '{task_name}'; there are: {' '.join(known)}")
    return known[task_name]


def benchmark_title(tasks: Iterable[Task]) -> str:
    """What a table over these tasks must be called; only GLUE's own tasks are called GLUE."""
    tasks = list(tasks)
    parts = {
        "GLUE, development set": any(task.is_glue for task in tasks),
        "synthetic demo benchmark (not GLUE)": any(task.synthetic for task in tasks),
        "own tasks (not GLUE)": any(task.own for task in tasks),
    }
    title = ", and ".join(part for part, is_there in parts.items() if is_there)
    return title[:1].upper() + title[1:]


def majority_score(labels: np.ndarray, task: Task) -> float | None:
    """What always predicting the most frequent class scores by the task's metric; None for a regression task.

    Args:
        labels: class indices of the split that is scored, shape [rows].
    """
    if task.labels is None:
        return None
    most_frequent = np.bincount(labels).argmax()
    return compute((task.selected_by,), np.full_like(labels, most_frequent), labels)[task.selected_by]


def own_task(own: OwnTask) -> Task:
    """The user's task as a row of the table.

    Raises:
        ValueError: its name is another task's.
    """
    if own.task_name in {**TASKS, **MNLI_SETS, AX.task_name: AX}:
        raise ValueError(f"own task '{own.task_name}': there is a task of this name already")
    return Task(
        task_name=own.task_name,
        title=own.task_name,
        folder=own.task_name,
        sentence_columns=tuple(own.sentence_columns),
        label_column=own.label_column,
        labels=None if own.labels is None else tuple(map(str, own.labels)),
        metrics=tuple(own.metrics),
        official_rows={},
        own=own,
    )
