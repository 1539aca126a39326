"""The grid from start to report: check everything, tokenise, enqueue the trials, run them, render what was recorded."""

import contextlib
import os
import socket
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Final

import torch

from common.errors import UserError
from common.folders import check_folder, claim_folder, errors_of_writing, only_writer, read_json, write_json
from common.storage import sqlite_file
from finetune.config import MNLI, GridConfig
from finetune.crew import Crew
from finetune.examples import data_sha256, read_task, require_files
from finetune.inference import Precision
from finetune.kept_models import KeptModels, trial_folder
from finetune.model import Encoder, check_model, find_model, load_tokenizer, model_fingerprint
from finetune.model_record import PRETRAINING_FILE
from finetune.optimizers import check_memory
from finetune.placement import Probe, cpu_workers, devices, threads_per_worker, trials_per_gpu
from finetune.progress import priorities
from finetune.ranks import Ranks, this_rank
from finetune.recorded import refuse_missing, render, storage_url
from finetune.selection import by_group
from finetune.study import TrialStore
from finetune.tokens import load_tokens, tokenize_split
from finetune.trial import Cell, Protocol
from finetune.trial_files import TrialFiles
from finetune.workers import Assignment

CACHE_FOLDER: Final = "cache"
_SPLITS_FILE: Final = "splits.json"
_MAY_CHANGE: Final = ("num_workers", "trials_per_gpu", "save_steps", "logging_steps")

Cells = Mapping[str, Sequence[Cell]]


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
    cells = _select(config, tasks)
    protocol = _protocol(config)
    ranks = this_rank()
    if not ranks.coordinates:
        ranks.after_rank_0()
        _run_trials(config, cells, protocol, model, output_dir, ranks)
        return
    preparation = _Preparation(config, cells, protocol, model, output_dir, glue_dir)
    with preparation.checked():
        ranks.after_rank_0(preparation.prepare)
        _run_trials(config, cells, protocol, model, output_dir, ranks)
        _remove_leftovers(config, cells, output_dir)
        refuse_missing(render(config, output_dir), list(cells))


def _run_trials(
    config: GridConfig, cells: dict[str, list[Cell]], protocol: Protocol, model: str, output_dir: Path, ranks: Ranks
) -> None:
    assignments = _assignments(config, cells, protocol, model, output_dir, ranks)
    store = TrialStore(storage_url(config, output_dir))
    Crew(store, assignments, shows_progress=ranks.coordinates).run()


def _remove_leftovers(config: GridConfig, cells: Cells, output_dir: Path) -> None:
    """What workers that were killed have left: checkpoints of finished trials, models not of the best configuration."""
    store = TrialStore(storage_url(config, output_dir))
    for name, task_cells in cells.items():
        for cell in store.scores(name):
            TrialFiles(trial_folder(output_dir, cell), None, None).end()
        for (start, _), cells_of_group in by_group(task_cells).items():
            if start != "random" and config.keep_models:
                models = KeptModels(output_dir, cells_of_group)
                with models.locked():
                    models.prune(store.scores(name))


def _select(config: GridConfig, tasks: Sequence[str]) -> dict[str, list[Cell]]:
    cells = config.cells(_precisions(config))
    for name in tasks:
        if name not in cells:
            raise UserError(f"--tasks names '{name}', which is not in the grid; the grid has: {' '.join(cells)}")
    selected = {name: task_cells for name, task_cells in cells.items() if not tasks or name in tasks}
    for name, task_cells in selected.items():
        if MNLI not in selected and any(cell.initialization == "mnli" for cell in task_cells):
            raise UserError(f"--tasks names {name}, which starts from MNLI's model, but not mnli: name it, too")
    return selected


def _protocol(config: GridConfig) -> Protocol:
    return Protocol(**{field.name: getattr(config, field.name) for field in fields(Protocol)})


def _precisions(config: GridConfig) -> list[Precision]:
    named = [config.precision] if isinstance(config.precision, str) else config.precision
    precisions = [auto_precision() if precision == "auto" else precision for precision in named]
    if "fp16" in precisions and not torch.cuda.is_available():
        raise UserError("precision fp16 needs a GPU, and there is none: use bf16 or fp32")
    return precisions


def auto_precision() -> Precision:
    """bf16 on a GPU that has it, fp16 on another GPU, fp32 on a CPU."""
    if not torch.cuda.is_available():
        return "fp32"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


class _Preparation:
    """All that is done once before the trials, by one process."""

    def __init__(
        self,
        config: GridConfig,
        cells: dict[str, list[Cell]],
        protocol: Protocol,
        model: str,
        output_dir: Path,
        glue_dir: Path | None,
    ) -> None:
        self._config, self._cells, self._protocol, self._output_dir = config, cells, protocol, output_dir
        self._model_folder = find_model(model)
        self._model_name = _model_name(self._model_folder, model)
        self._tokenizer = load_tokenizer(self._model_folder)
        check_model(self._model_folder, self._tokenizer, config.max_seq_length)
        self._check_memory()
        require_files([(config.tasks[name], split) for name in cells for split in config.tasks[name].splits], glue_dir)
        self._data = {name: read_task(config.tasks[name], glue_dir) for name in cells}
        self._all_rows = {
            name: {split: len(examples) for split, examples in splits.items()} for name, splits in self._data.items()
        }
        for name, splits in self._data.items():
            for split, examples in splits.items():
                limits = config.max_train_rows if split == "train" else config.max_eval_rows
                splits[split] = examples.first(limits.get(name))
        self._checksums = model_fingerprint(self._model_folder)

    def _check_memory(self) -> None:
        """Refuse optimizers whose state fits nowhere, before any work."""
        on_gpu = torch.cuda.is_available()
        device = torch.device("cuda" if on_gpu else "cpu")
        wanted = self._config.trials_per_gpu if on_gpu else self._config.num_workers
        num_at_a_time = wanted if isinstance(wanted, int) else 1
        num_parameters = Encoder(self._model_folder).num_parameters
        for optimizer in {cell.optimizer for task_cells in self._cells.values() for cell in task_cells}:
            check_memory(optimizer, num_parameters, device, num_at_a_time)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """Hold the output folder, once it is clear that this grid belongs there; nothing is written otherwise."""
        check_folder(self._output_dir, self._config, _MAY_CHANGE)
        file = sqlite_file(storage_url(self._config, self._output_dir))
        if file is None or file.exists():
            fingerprints = {
                name: self._fingerprint(name) if name in self._cells else self._common_fingerprint
                for name in self._config.task_names
            }
            TrialStore(storage_url(self._config, self._output_dir)).check_studies(fingerprints)
        with errors_of_writing(self._output_dir):
            self._output_dir.mkdir(parents=True, exist_ok=True)
            with only_writer(self._output_dir):
                claim_folder(self._output_dir, self._config, _MAY_CHANGE)
                yield

    def prepare(self) -> None:
        """Tokenise, open the studies, and put every cell without a result into the storage."""
        folders = {name: self._tokenize(name) for name in self._cells}
        num_tokens = {
            name: {split: load_tokens(folder).num_tokens for split, folder in splits.items()}
            for name, splits in folders.items()
        }
        store = TrialStore(storage_url(self._config, self._output_dir))
        priority = priorities(self._cells, num_tokens)
        for name, task_cells in self._cells.items():
            store.open_study(name, self._fingerprint(name), self._facts(name, num_tokens[name]))
            if self._config.storage is None:  # in SQLite in this folder nobody but this run can be running trials
                for attempt in store.running([name]):
                    store.give_back(attempt)
            store.enqueue_missing(name, {cell: priority[cell] for cell in task_cells})
        record = self._model_folder / PRETRAINING_FILE
        if record.exists():
            pretraining = read_json(record, "the model's own record; delete it to do without")
            write_json(self._output_dir / PRETRAINING_FILE, pretraining)
        names = {name: {split: folder.name for split, folder in splits.items()} for name, splits in folders.items()}
        write_json(self._output_dir / CACHE_FOLDER / _SPLITS_FILE, names)

    def _tokenize(self, task_name: str) -> dict[str, Path]:
        return {
            split: tokenize_split(
                examples,
                self._config.tasks[task_name],
                self._tokenizer,
                self._checksums["tokenizer"],
                self._config.max_seq_length,
                self._output_dir / CACHE_FOLDER,
            )
            for split, examples in self._data[task_name].items()
        }

    @property
    def _common_fingerprint(self) -> dict[str, Any]:
        """What all trials have in common."""
        precisions = {"precision": _precisions(self._config)}
        return {**self._checksums, **asdict(self._protocol), **precisions, "list of seeds": self._config.seeds}

    def _fingerprint(self, task_name: str) -> dict[str, Any]:
        """What all trials of a task have in common."""
        cells = self._cells[task_name]
        configurations = sorted({(cell.initialization, cell.optimizer.title, *cell.configuration) for cell in cells})
        return {
            **self._common_fingerprint,
            "task data": data_sha256(self._data[task_name]),
            "grid": [list(configuration) for configuration in configurations],
        }

    def _facts(self, task_name: str, num_tokens: Mapping[str, int]) -> dict[str, Any]:
        """What reports tell about a task."""
        return {
            "model": self._model_name,
            "model_sha256": self._checksums["model weights"],
            "protocol": asdict(self._protocol),
            "precisions": _precisions(self._config),
            "rows": {split: len(examples) for split, examples in self._data[task_name].items()},
            "limited_rows": {
                split: self._all_rows[task_name][split]
                for split, examples in self._data[task_name].items()
                if len(examples) < self._all_rows[task_name][split]
            },
            "num_tokens": num_tokens,
        }


def _model_name(folder: Path, model: str) -> str:
    """``R/hf`` for a folder, the id for a hub model."""
    return "/".join(folder.resolve().parts[-2:]) if Path(model).is_dir() else model


def _assignments(
    config: GridConfig,
    cells: dict[str, list[Cell]],
    protocol: Protocol,
    model: str,
    output_dir: Path,
    ranks: Ranks,
) -> list[Assignment]:
    """One for each worker of this process."""
    model_folder = find_model(model)
    cache = output_dir / CACHE_FOLDER
    names = read_json(cache / _SPLITS_FILE, "what was prepared for the trials")
    folders = {name: {split: cache / folder for split, folder in names[name].items()} for name in cells}
    tasks = {name: config.tasks[name] for name in cells}
    per_gpu, on_cpu = 1, 1
    if not torch.cuda.is_available():
        all_cells = [cell for task_cells in cells.values() for cell in task_cells]
        on_cpu = config.num_workers or cpu_workers(Encoder(model_folder).num_parameters, all_cells, ranks)
    elif config.trials_per_gpu != "auto":
        per_gpu = config.trials_per_gpu
    else:
        cell = _largest_batch(cells, folders)
        train_folder, device = folders[cell.task_name]["train"], f"cuda:{ranks.local_rank}"
        per_gpu = trials_per_gpu(
            Probe(model_folder, protocol, tasks[cell.task_name], cell, train_folder, device), output_dir
        )
    places = devices(per_gpu, on_cpu, ranks)
    num_threads = threads_per_worker(len(places), output_dir, ranks)
    return [
        Assignment(
            name=f"{socket.gethostname()} {os.getpid()} worker {index}",
            storage_url=storage_url(config, output_dir),
            output_dir=output_dir,
            model_folder=model_folder,
            model_name=_model_name(model_folder, model),
            protocol=protocol,
            keep_models=config.keep_models,
            save_steps=config.save_steps,
            logging_steps=config.logging_steps,
            tasks=tasks,
            cells=cells,
            split_folders=folders,
            num_threads=num_threads,
            device=device,
        )
        for index, device in enumerate(places)
    ]


def _largest_batch(cells: Cells, folders: Mapping[str, Mapping[str, Path]]) -> Cell:
    """A cell that can take most memory, by its optimizer and then by its batches; of equals one with most tokens."""
    trains = {name: load_tokens(splits["train"]) for name, splits in folders.items()}

    def size(cell: Cell) -> tuple[int, int, int]:
        train = trains[cell.task_name]
        return cell.optimizer.state_bytes(1), cell.batch_size * int(train.lengths.max()), train.num_tokens

    return max((cell for task_cells in cells.values() for cell in task_cells), key=size)
