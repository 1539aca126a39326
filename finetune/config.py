"""What a grid is: its tasks, its values, its seeds, and what all trials have in common."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

from common.storage import refuse_password
from finetune.inference import Precision
from finetune.model import Initialization
from finetune.optimizers import Optimizer
from finetune.own_task import OwnTask
from finetune.tasks import MNLI_SETS, TASKS, Task, own_task
from finetune.trial import MAX_GRADIENT_NORM, Cell, Schedule, ScoreEpoch

STARTED_FROM_MNLI: Final = ("rte", "mrpc", "stsb")
MNLI: Final = "mnli"
_STEP_OPTIONS: Final = ("gradient_accumulation_steps", "max_steps", "eval_steps", "save_steps", "logging_steps")


@dataclass(frozen=True)
class Grid:
    """All combinations of these values, for each of these tasks."""

    tasks: list[str]
    """any of: cola sst2 mrpc stsb qqp mnli mnli_matched mnli_mismatched qnli rte wnli, demo_sentiment demo_entailment
    demo_similarity, own ones"""
    learning_rate: list[float]
    """peak learning rates"""
    batch_size: list[int]
    """rows per optimizer step"""
    num_epochs: list[int]
    """passes over the training rows"""
    optimizer: Optimizer = field(default_factory=Optimizer)
    """its name and arguments; a task may be in several lists with an optimizer each, which are compared"""


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
    max_eval_rows: dict[str, int] = field(default_factory=dict)
    """task: evaluate on only that many rows of each of its splits, the first ones; reported as such"""
    weight_decay: float = 0.1
    """not applied to biases and LayerNorms"""
    warmup_proportion: float = 0.06
    """share of the steps in which the learning rate rises"""
    warmup_steps: int | None = None
    """steps in which the learning rate rises, instead of warmup_proportion"""
    lr_schedule: Schedule = "linear"
    """the learning rate after it has risen: linear and cosine fall to 0"""
    max_gradient_norm: float = MAX_GRADIENT_NORM
    """larger gradients are scaled down to this norm; 0: never"""
    gradient_accumulation_steps: int = 1
    """parts in which a batch passes through the model, to save memory; batch_size stays the rows of a step"""
    max_steps: int | None = None
    """optimizer steps after which training ends, if its epochs don't end it before"""
    eval_steps: int | None = None
    """optimizer steps between two evaluations, beside the one after each epoch"""
    save_steps: int | None = None
    """optimizer steps between two checkpoints of a trial, beside the one after each epoch, from which it goes on if it
    is interrupted; default: no checkpoints, an interrupted trial starts again"""
    logging_steps: int | None = None
    """optimizer steps between two points of a trial's training loss in TensorBoard; default: no TensorBoard files"""
    score_epoch: ScoreEpoch = "last"
    """the epoch whose score counts: the last one, or the best one on the development split (which flatters)"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] | list[Precision] = "auto"
    """of the matrix products; auto: bf16 on a GPU that has it, fp16 on another GPU, fp32 on a CPU; several, such as
    [fp32, bf16], are compared"""
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
        if isinstance(self.precision, list):
            _check_values("precision", self.precision)
        self._check_grids()
        if self.mnli_init and MNLI not in self.task_names:
            raise ValueError("mnli_init starts tasks from the MNLI model, but mnli is in no grid: give mnli a grid too")
        if self.mnli_init and not self.keep_models:
            raise ValueError("mnli_init needs MNLI's model, which keep_models: false throws away")
        if not 0 <= self.warmup_proportion <= 1:
            raise ValueError(f"warmup_proportion is {self.warmup_proportion}: it must be between 0 and 1")
        for option in ("max_train_rows", "max_eval_rows"):
            for name, rows in getattr(self, option).items():
                if name not in self.task_names or rows < 1:
                    raise ValueError(f"{option} has '{name}: {rows}': it takes tasks of the grids and 1 or more rows")
        if self.max_seq_length < 8:
            raise ValueError(f"max_seq_length is {self.max_seq_length}: it must be 8 or more")
        for option in ("weight_decay", "max_gradient_norm"):
            if not 0 <= getattr(self, option) < math.inf:
                raise ValueError(f"{option} is {getattr(self, option)}: it must be 0 or more, and finite")
        for option in ("num_workers", "trials_per_gpu", *_STEP_OPTIONS):
            if getattr(self, option) not in (None, "auto") and getattr(self, option) < 1:
                raise ValueError(f"{option} is {getattr(self, option)}: it must be 1 or more")
        if (self.warmup_steps or 0) < 0:
            raise ValueError(f"warmup_steps is {self.warmup_steps}: it must be 0 or more")

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
                raise ValueError(f"there is no task '{name}'; there are: {' '.join(self.tasks)}")
        places = Counter((name, grid.optimizer.title) for grid in self.grids for name in grid.tasks)
        for (name, optimizer), count in places.items():
            if count > 1:
                raise ValueError(f"task {name} is in the grids more than once with {optimizer}")

    @property
    def task_names(self) -> list[str]:
        """In the order of the grids."""
        return list(dict.fromkeys(name for grid in self.grids for name in grid.tasks))

    @property
    def tasks(self) -> Mapping[str, Task]:
        """All tasks that the grids may name."""
        return {**TASKS, **MNLI_SETS, **{task.task_name: own_task(task) for task in self.own_tasks}}

    def cells(self, precisions: Sequence[Precision]) -> dict[str, list[Cell]]:
        """All cells of each task, in these precisions; the seeds of a configuration stand together."""
        cells: dict[str, list[Cell]] = {name: [] for name in self.task_names}
        for grid, precision in itertools.product(self.grids, precisions):
            for name in grid.tasks:
                cells[name] += [
                    Cell(name, *values, initialization, seed, precision, grid.optimizer)
                    for *values, initialization, seed in itertools.product(
                        grid.learning_rate, grid.batch_size, grid.num_epochs, self._initializations(name), self.seeds
                    )
                ]
        return cells

    def _initializations(self, task_name: str) -> list[Initialization]:
        from_mnli = task_name in STARTED_FROM_MNLI and self.mnli_init
        starts: list[Initialization] = [] if from_mnli is True else ["pretrained"]
        return starts + ["mnli"] * bool(from_mnli) + ["random"] * self.random_baseline


def _check_values(name: str, values: Sequence) -> None:
    if not values:
        raise ValueError(f"{name} is empty: give at least one value")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice: {values}")


def _check_axis(name: str, values: Sequence[float], smallest: float, largest: float) -> None:
    _check_values(name, values)
    wrong = [value for value in values if not smallest <= value <= largest]  # NaN is no value between two others
    if wrong:
        raise ValueError(f"{name} has {wrong[0]}: possible are {smallest:g} to {largest:g}")
