"""The grid from start to report: check everything, tokenise, enqueue the trials, run them, render what was recorded."""

import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch

from common.cli import config_parser, parse, take_config
from common.errors import UserError
from common.folders import CONFIG_FILE, claim_folder, only_writer, read_json, write_json
from common.page import markdown_table
from finetune.data import data_sha256, read_task, tokenize_task
from finetune.model import check_model, find_model, load_tokenizer, model_fingerprint
from finetune.report import PRETRAINING_FILE, score_tables, write_report
from finetune.results import Results, collect_results
from finetune.study import TrialStore
from finetune.tasks import TASKS
from finetune.trial import Cell, Protocol
from finetune.workers import Assignment, run_workers

RESULTS_FILE: Final = "results.json"
STORAGE_FILE: Final = "trials.db"
CLAIM_LOCK_FILE: Final = ".claim.lock"
_MISSING_SHOWN: Final = 3


@dataclass(frozen=True)
class Grid:
    """All combinations of these values, for each of these tasks."""

    tasks: list[str]
    """any of: cola sst2 mrpc stsb qqp mnli qnli rte wnli, and demo_sentiment demo_entailment demo_similarity"""
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
    max_seq_length: int = 128
    """tokens per row, [CLS] and [SEP] included; longer rows are cut"""
    weight_decay: float = 0.1
    """AdamW's, not applied to biases and LayerNorms"""
    warmup_proportion: float = 0.06
    """share of the steps in which the learning rate rises; it falls linearly to 0 afterwards"""
    random_baseline: bool = False
    """run the same grid from random weights too, and report what pretraining gains"""
    mnli_init: bool = False
    """start RTE, MRPC and STS-B from the MNLI model: not available yet, only false is accepted"""
    num_workers: int | None = None
    """processes that run trials; default: one per GPU, or where there is none one per CPU core"""
    storage: str | None = None
    """URL of an Optuna storage that serves this output folder alone; default: SQLite in the output folder"""

    def __post_init__(self) -> None:
        if self.mnli_init:
            raise ValueError("mnli_init: true is not available yet: leave it out")
        _check_axis("seeds", self.seeds, smallest=0, largest=2**31 - 1)
        if self.storage and re.search(r"://[^/@]*:[^/@]*@", self.storage):
            raise ValueError(
                "storage holds a password, which would be written into the output folder: leave it out of the URL and "
                "give it to the database's driver (~/.pgpass or PGPASSWORD, for PostgreSQL)"
            )
        if not self.grids:
            raise ValueError("grids is empty: give at least one list of tasks")
        for index, grid in enumerate(self.grids):
            for name, smallest, largest in (
                ("learning_rate", 1e-12, 1),
                ("batch_size", 1, 2**31),
                ("num_epochs", 1, 2**31),
            ):
                _check_axis(f"grids[{index}].{name}", getattr(grid, name), smallest, largest)
            if not grid.tasks:
                raise ValueError(f"grids[{index}].tasks is empty")
        names = [name for grid in self.grids for name in grid.tasks]
        for name in names:
            if name not in TASKS:
                raise ValueError(f"there is no task '{name}'; there are: {' '.join(TASKS)}")
            if names.count(name) > 1:
                raise ValueError(f"task {name} is in the grids more than once")
        if not 0 <= self.warmup_proportion <= 1:
            raise ValueError(f"warmup_proportion is {self.warmup_proportion}: it must be between 0 and 1")
        if self.max_seq_length < 8 or self.weight_decay < 0 or (self.num_workers or 1) < 1:
            raise ValueError("max_seq_length must be 8 or more, weight_decay 0 or more, num_workers 1 or more")

    def cells(self) -> dict[str, list[Cell]]:
        """All cells of each task, in the order in which they run."""
        initializations = ("pretrained", "random") if self.random_baseline else ("pretrained",)
        return {
            task_name: [
                Cell(task_name, *values, initialization, seed)
                for *values, initialization, seed in itertools.product(
                    grid.learning_rate, grid.batch_size, grid.num_epochs, initializations, self.seeds
                )
            ]
            for grid in self.grids
            for task_name in grid.tasks
        }


def _check_axis(name: str, values: Sequence[float], smallest: float, largest: float) -> None:
    if not values:
        raise ValueError(f"{name} is empty: give at least one value")
    if len(set(values)) < len(values):
        raise ValueError(f"{name} has a value twice: {values}")
    if min(values) < smallest or max(values) > largest:
        raise ValueError(f"{name} has {min(values)} to {max(values)}: possible are {smallest:g} to {largest:g}")


def run_grid(config: GridConfig, model: str, output_dir: Path, glue_dir: Path | None, tasks: Sequence[str]) -> None:
    """Run every trial of the grid that has no result yet, and write and print the report.

    Args:
        config: the grid.
        model: a Hugging Face folder or hub id.
        output_dir: where trials and report go; a rerun with the same configuration continues there.
        glue_dir: folder of the official TSV files, one folder per task; None reads from the Hugging Face hub.
        tasks: restricts the run to these tasks of the grid; empty for all of them.

    Raises:
        UserError: bad input, before any work; or, when all is recorded, trials without a result.
    """
    cells = _select(config.cells(), tasks)
    model_folder = find_model(model)
    tokenizer = load_tokenizer(model_folder)
    check_model(model_folder, tokenizer, config.max_seq_length)
    data = {name: read_task(TASKS[name], glue_dir) for name in cells}
    if config.storage:
        _open_store(config, output_dir)  # what can't be opened is told before anything is written
    claim_folder(output_dir, config, may_change=("num_workers",))
    with only_writer(output_dir):
        protocol = Protocol(config.max_seq_length, config.weight_decay, config.warmup_proportion)
        model_checksums = model_fingerprint(model_folder)
        data_checksums = {name: data_sha256(task_data) for name, task_data in data.items()}
        store = _open_store(config, output_dir)
        for name, task_cells in cells.items():
            fingerprint = {**model_checksums, "task data": data_checksums[name], **asdict(protocol)}
            rows = {split: len(examples.labels) for split, examples in data[name].items()}
            store.open_study(name, fingerprint, {"model": _model_name(model_folder, model), "rows": rows})
            if config.storage is None:  # in SQLite in this folder nobody but this run can be running trials
                store.give_back_interrupted(name)
            store.enqueue_missing(name, task_cells)
        _copy_pretraining_record(model_folder, output_dir)
        task_folders = {name: output_dir / "cache" / f"{name}-{data_checksums[name][:16]}" for name in cells}
        for name, task_data in data.items():
            tokenize_task(task_data, tokenizer, config.max_seq_length, task_folders[name])
        run_workers(store, _assignments(config, output_dir, model_folder, protocol, task_folders))
        results = render(config, output_dir)
    _refuse_missing(results, list(cells))


def _select(cells: dict[str, list[Cell]], tasks: Sequence[str]) -> dict[str, list[Cell]]:
    for name in tasks:
        if name not in cells:
            raise UserError(f"--tasks names '{name}', which is not in the grid; the grid has: {' '.join(cells)}")
    return {name: task_cells for name, task_cells in cells.items() if not tasks or name in tasks}


def _open_store(config: GridConfig, output_dir: Path) -> TrialStore:
    return TrialStore(_storage_url(config, output_dir), output_dir / CLAIM_LOCK_FILE)


def _storage_url(config: GridConfig, output_dir: Path) -> str:
    return config.storage or f"sqlite:///{(output_dir / STORAGE_FILE).resolve()}"


def _model_name(folder: Path, model: str) -> str:
    """``R/hf`` for a folder, the id for a hub model."""
    return "/".join(folder.resolve().parts[-2:]) if Path(model).is_dir() else model


def _copy_pretraining_record(model_folder: Path, output_dir: Path) -> None:
    record = model_folder / PRETRAINING_FILE
    if record.exists():
        write_json(output_dir / PRETRAINING_FILE, read_json(record, "the model's own record; delete it to do without"))


def _assignments(
    config: GridConfig, output_dir: Path, model_folder: Path, protocol: Protocol, task_folders: dict[str, Path]
) -> list[Assignment]:
    """One per worker: GPUs go round, CPU cores are shared out."""
    num_gpus, num_cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    num_workers = config.num_workers or num_gpus or num_cores
    return [
        Assignment(
            name=f"worker {index}",
            storage_url=_storage_url(config, output_dir),
            claim_lock=output_dir / CLAIM_LOCK_FILE,
            model_folder=model_folder,
            protocol=protocol,
            task_folders=task_folders,
            num_threads=max(1, num_cores // num_workers),
            device=f"cuda:{index % num_gpus}" if num_gpus else "cpu",
        )
        for index in range(num_workers)
    ]


def render(config: GridConfig, output_dir: Path) -> Results:
    """Write ``results.json`` and the report from the recorded trials, and print the scores.

    Raises:
        UserError: no trial has been recorded.
    """
    results = collect_results(_open_store(config, output_dir), config.cells())
    write_json(output_dir / RESULTS_FILE, results)
    write_report(output_dir, results)
    for title, table in score_tables(results):
        print(f"{title}\n\n{markdown_table(*table)}\n")
    print(f"{output_dir / RESULTS_FILE}\n{output_dir / 'report.html'}")
    return results


def render_recorded(output_dir: Path) -> None:
    """:func:`render` a folder with the configuration recorded in it.

    Raises:
        UserError: the folder is not the output of a grid.
    """
    if not (output_dir / CONFIG_FILE).exists():
        raise UserError(f"{output_dir} is not the output of run_glue_grid.py: it has no {CONFIG_FILE}")
    parser = config_parser("run_glue_grid.py", "", GridConfig)
    config = take_config(parse(parser, ["--config", str(output_dir / CONFIG_FILE)]), GridConfig)
    render(config, output_dir)


def _refuse_missing(results: Results, task_names: Sequence[str]) -> None:
    missing = [{**entry} for entry in results["missing"] if entry["task_name"] in task_names]
    if not missing:
        return
    causes = [(entry.pop("cause"), Cell(**entry)) for entry in missing[:_MISSING_SHOWN]]
    shown = "; ".join(f"{cell}: {cause}" for cause, cell in causes)
    more = f"; and {len(missing) - _MISSING_SHOWN} more" if len(missing) > _MISSING_SHOWN else ""
    raise UserError(
        f"no median without every trial, and {len(missing)} have no result: {shown}{more}."
        " The same command tries them again"
    )
