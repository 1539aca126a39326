"""What a grid is: its tasks, its values, its seeds, and what all trials have in common."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from common.storage import refuse_password
from finetune.model import Initialization
from finetune.tasks import TASKS, OwnTask, Task, own_task
from finetune.trial import Cell, ScoreEpoch

STARTED_FROM_MNLI: Final = ("rte", "mrpc", "stsb")
MNLI: Final = "mnli"


@dataclass(frozen=True)
class Grid:
    """All combinations of these values, for each of these tasks."""

    tasks: list[str]
    """any of: cola sst2 mrpc stsb qqp mnli qnli rte wnli, demo_sentiment demo_entailment demo_similarity, own ones"""
    learning_rate: list[float]
    """peak learning rates"""
    batch_size: list[int]
    """rows per optimizer step"""
    num_epochs: list[int]
    """passes over the training rows"""


@dataclass(frozen=True)
class GridConfig:
    """What to fine-tune, and how."""

    grids: list[Grid]
    """lists of tasks, each with its values of learning_rate, batch_size and num_epochs"""
    seeds: list[int]
    """one trial each per combination; they decide the classifier's first weights, the order of the rows, and dropout"""
    own_tasks: list[OwnTask] = field(default_factory=list)
    """your own data as tasks, which the grids may name"""
    max_seq_length: int = 128
    """tokens per row, [CLS] and [SEP] included; longer rows are cut"""
    max_train_rows: dict[str, int] = field(default_factory=dict)
    """task: use only that many training rows, the first ones; reported as such"""
    weight_decay: float = 0.1
    """AdamW's, not applied to biases and LayerNorms"""
    warmup_proportion: float = 0.06
    """share of the steps in which the learning rate rises; it falls linearly to 0 afterwards"""
    score_epoch: ScoreEpoch = "last"
    """the epoch whose score counts: the last one, or the best one on the development split (which flatters)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """of the matrix products; auto: bf16 on a GPU that has it, fp16 on another GPU, fp32 on a CPU"""
    compile: bool = False
    """compile the model: a minute or more in each worker, which only long grids on a GPU can win back"""
    random_baseline: bool = False
    """run the same grid from random weights too, and report what pretraining gains"""
    mnli_init: bool | Literal["both"] = False
    """start RTE, MRPC and STS-B from the MNLI model; both: run them from either, for two tables"""
    keep_models: bool = True
    """keep the models of each task's best configuration in the output folder, as a submission needs them"""
    trials_per_gpu: int | Literal["auto"] = "auto"
    """trials that share a GPU; auto: as many as its memory holds and its throughput gains by, measured once"""
    num_workers: int | None = None
    """on a machine without GPU, processes that run trials; default: one per core, as far as memory goes"""
    storage: str | None = None
    """URL of an Optuna storage (sqlite or postgresql) of this grid alone, which several machines may share; default: a
    SQLite file in the output folder"""

    def __post_init__(self) -> None:
        _check_axis("seeds", self.seeds, smallest=0, largest=2**31 - 1)
        refuse_password(self.storage)
        self._check_grids()
        if self.mnli_init and MNLI not in self.task_names:
            raise ValueError("mnli_init starts tasks from the MNLI model, but mnli is in no grid: give mnli a grid too")
        if self.mnli_init and not self.keep_models:
            raise ValueError("mnli_init needs MNLI's model, which keep_models: false throws away")
        if not 0 <= self.warmup_proportion <= 1:
            raise ValueError(f"warmup_proportion is {self.warmup_proportion}: it must be between 0 and 1")
        for name, rows in self.max_train_rows.items():
            if name not in self.task_names or rows < 1:
                raise ValueError(f"max_train_rows has '{name}: {rows}': it takes tasks of the grids and 1 or more rows")
        if self.max_seq_length < 8 or not 0 <= self.weight_decay < math.inf:
            raise ValueError("max_seq_length must be 8 or more, weight_decay 0 or more")
        if (self.num_workers or 1) < 1 or (self.trials_per_gpu != "auto" and self.trials_per_gpu < 1):
            raise ValueError("num_workers and trials_per_gpu must be 1 or more")

    def _check_grids(self) -> None:
        if not self.grids:
            raise ValueError("grids is empty: give at least one list of tasks")
        for index, grid in enumerate(self.grids):
            for name, smallest, largest in (
                ("learning_rate", 1e-12, 1),
                ("batch_size", 1, 1_000_000),
                ("num_epochs", 1, 1_000_000),
            ):
                _check_axis(f"grids[{index}].{name}", getattr(grid, name), smallest, largest)
            if not grid.tasks:
                raise ValueError(f"grids[{index}].tasks is empty")
        own_names = [task.task_name for task in self.own_tasks]
        for name in own_names:
            if own_names.count(name) > 1:
                raise ValueError(f"own_tasks has more than one task '{name}': give one another task_name")
        for name in self.task_names:
            if name not in self.tasks:
                raise ValueError(f"there is no task '{name}'; there are: {' '.join([*TASKS, *own_names])}")
            if self.task_names.count(name) > 1:
                raise ValueError(f"task {name} is in the grids more than once")

    @property
    def task_names(self) -> list[str]:
        """In the order of the grids."""
        return [name for grid in self.grids for name in grid.tasks]

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All tasks that the grids may name."""
        return {**TASKS, **{task.task_name: own_task(task) for task in self.own_tasks}}

    def cells(self) -> dict[str, list[Cell]]:
        """All cells of each task; the seeds of a configuration stand together."""
        return {
            task_name: [
                Cell(task_name, *values, initialization, seed)
                for *values, initialization, seed in itertools.product(
                    grid.learning_rate, grid.batch_size, grid.num_epochs, self._initializations(task_name), self.seeds
                )
            ]
            for grid in self.grids
            for task_name in grid.tasks
        }

    def _initializations(self, task_name: str) -> list[Initialization]:
        from_mnli = task_name in STARTED_FROM_MNLI and self.mnli_init
        starts: list[Initialization] = [] if from_mnli is True else ["pretrained"]
        return starts + ["mnli"] * bool(from_mnli) + ["random"] * self.random_baseline


def _check_axis(name: str, values: Sequence[float], smallest: float, largest: float) -> None:
    if not values:
        raise ValueError(f"{name} is empty: give at least one value")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice: {values}")
    wrong = [value for value in values if not smallest <= value <= largest]  # NaN is no value between two others
    if wrong:
        raise ValueError(f"{name} has {wrong[0]}: possible are {smallest:g} to {largest:g}")
