"""What a tuned model's folder says of how it was made: the task, the trial, its scores, and where it came from."""

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from common.errors import UserError
from common.folders import atomic_path, read_json, write_json
from finetune.own_task import OwnTask
from finetune.tasks import Task, find_task, own_task

RECORD_FILE: Final = "finetuning.json"
PRETRAINING_FILE: Final = "pretraining.json"
_MADE_FOLDER: Final = "made"


@dataclass(frozen=True)
class ModelRecord:
    """How a tuned model was made."""

    base_model: str
    """Its name in reports, such as ``R/hf`` or a hub id."""
    base_model_path: str
    """Where it was then; of this machine alone, so never published."""
    task_name: str
    own_task: Mapping[str, Any] | None
    """The fields of the user's :class:`~finetune.tasks.OwnTask`; None for the tasks that the program knows."""
    max_seq_length: int
    rows: Mapping[str, int]
    """Of each split, as they were used."""
    cell: Mapping[str, Any]
    """The trial's hyperparameters, start, precision, optimizer and seed."""
    protocol: Mapping[str, Any]
    score: float
    """A fraction, of ``metric`` on the first evaluation split."""
    metric: str
    metrics: Mapping[str, Mapping[str, float]]
    """Of each evaluation split, at the epoch that scores."""
    epochs: list[Mapping[str, Any]]
    """As the trial's result has them."""
    seconds: float
    device: str
    versions: Mapping[str, str]

    @property
    def task(self) -> Task:
        """The task that the model was tuned for."""
        return own_task(OwnTask(**self.own_task)) if self.own_task else find_task(self.task_name)


def write_record(folder: Path, record: ModelRecord) -> None:
    """Write ``finetuning.json``."""
    write_json(folder / RECORD_FILE, asdict(record))


def copy_pretraining(source: Path, folder: Path) -> None:
    """Copy the record of pretraining from the model that ``folder``'s comes from, where it has one."""
    if (source / PRETRAINING_FILE).is_file():
        shutil.copyfile(source / PRETRAINING_FILE, folder / PRETRAINING_FILE)


@contextlib.contextmanager
def placed_model(folder: Path) -> Iterator[Path]:
    """A folder to make a model in, whose files then lie at the top of ``folder``; what a kill leaves is made again."""
    made = folder / _MADE_FOLDER
    with atomic_path(made) as temporary:
        temporary.mkdir()
        yield temporary
    place_model(made, folder)
    shutil.rmtree(made)


def place_model(source: Path, folder: Path) -> None:
    """Copy a model's files, each whole or not at all; the configuration, without which nothing loads it, comes last."""
    for path in sorted(source.iterdir(), key=lambda path: path.name == "config.json"):
        with atomic_path(folder / path.name) as temporary:
            shutil.copyfile(path, temporary)


def read_record(folder: Path) -> ModelRecord:
    """How the model in this folder was made.

    Raises:
        UserError: there is no such record, or it is damaged.
    """
    if not (folder / RECORD_FILE).is_file():
        raise UserError(
            f"{folder} has no {RECORD_FILE}: give a model that 'python -m finetune train' or a grid has made"
        )
    record = read_json(folder / RECORD_FILE, "the record of fine-tuning")
    try:
        return ModelRecord(**record)
    except TypeError:
        raise UserError(f"{folder / RECORD_FILE} is not a record of fine-tuning: make the model again") from None
