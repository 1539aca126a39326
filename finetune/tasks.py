"""The tasks, one row of data each: nine of GLUE, and three of the project's own synthetic demo benchmark.

File layouts and row counts are those of https://gluebenchmark.com; the metric that selects a configuration is the one
that "How to Train BERT with an Academic Budget" reports.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

HUB_DATASET: Final = "nyu-mll/glue"


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
    """Rows of the training split and of each evaluation split; empty for a synthetic task."""
    evaluation_splits: tuple[str, ...] = ("dev",)
    """The score is of the first one. A split's file is ``<split>.tsv``."""
    columns_without_header: tuple[str, ...] | None = None
    """The columns of files that have no header line."""
    skip_broken_rows: bool = False
    """Questions with line breaks in them break rows of the official file; the official counts leave them out."""
    hub_config: str | None = None
    """Configuration of the hub's GLUE data set; None for a synthetic task."""
    hub_sentence_columns: tuple[str, ...] | None = None
    """Where they differ from ``sentence_columns``."""

    @property
    def selected_by(self) -> str:
        """The metric that selects a configuration and that tables show."""
        return self.metrics[0]

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that a trial needs, the training split first."""
        return ("train", *self.evaluation_splits)

    @property
    def synthetic(self) -> bool:
        """Whether this is a task of the synthetic demo benchmark, which is not GLUE."""
        return self.hub_config is None

    @property
    def num_labels(self) -> int:
        """Outputs of the classifier: one per class, one for a score."""
        return len(self.labels) if self.labels else 1


_BINARY: Final = ("0", "1")
_ENTAILMENT: Final = ("entailment", "not_entailment")
_ALL_TASKS: Final = (
    Task(
        task_name="cola",
        title="CoLA",
        folder="CoLA",
        sentence_columns=("sentence",),
        label_column="label",
        labels=_BINARY,
        metrics=("matthews", "accuracy"),
        official_rows={"train": 8551, "dev": 1043},
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
        metrics=("accuracy",),
        official_rows={"train": 67349, "dev": 872},
        hub_config="sst2",
    ),
    Task(
        task_name="mrpc",
        title="MRPC",
        folder="MRPC",
        sentence_columns=("#1 String", "#2 String"),
        label_column="Quality",
        labels=_BINARY,
        metrics=("f1", "accuracy"),
        official_rows={"train": 3668, "dev": 408},
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
        hub_config="stsb",
    ),
    Task(
        task_name="qqp",
        title="QQP",
        folder="QQP",
        sentence_columns=("question1", "question2"),
        label_column="is_duplicate",
        labels=_BINARY,
        metrics=("f1", "accuracy"),
        official_rows={"train": 363846, "dev": 40430},
        skip_broken_rows=True,
        hub_config="qqp",
    ),
    Task(
        task_name="mnli",
        title="MNLI-m",
        folder="MNLI",
        sentence_columns=("sentence1", "sentence2"),
        label_column="gold_label",
        labels=("entailment", "neutral", "contradiction"),
        metrics=("accuracy",),
        official_rows={"train": 392702, "dev_matched": 9815, "dev_mismatched": 9832},
        evaluation_splits=("dev_matched", "dev_mismatched"),
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
        hub_config="rte",
    ),
    Task(
        task_name="wnli",
        title="WNLI",
        folder="WNLI",
        sentence_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=_BINARY,
        metrics=("accuracy",),
        official_rows={"train": 635, "dev": 71},
        hub_config="wnli",
    ),
    Task(
        task_name="demo_sentiment",
        title="demo sentiment",
        folder="demo-sentiment",
        sentence_columns=("sentence",),
        label_column="label",
        labels=_BINARY,
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


def benchmark_title(task_names: Iterable[str]) -> str:
    """What a table over these tasks must be called; a synthetic task is never called GLUE."""
    synthetic = {TASKS[name].synthetic for name in task_names}
    if synthetic == {True}:
        return "Synthetic demo benchmark (not GLUE)"
    if synthetic == {False}:
        return "GLUE, development set"
    return "GLUE, development set, and the synthetic demo benchmark (not GLUE)"
