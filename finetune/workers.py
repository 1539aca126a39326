"""Worker processes: each claims trials, runs them and records them, until none is left for it."""

import gc
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Final, NoReturn

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from finetune.batches import DeviceSplit
from finetune.config import MNLI
from finetune.kept_models import KeptModels, trial_folder
from finetune.losses import TrialFailure
from finetune.model import Encoder, load_tokenizer
from finetune.model_record import ModelRecord
from finetune.selection import Group, by_group
from finetune.study import Attempt, TrialStore
from finetune.tasks import Task
from finetune.tokens import load_tokens
from finetune.trial import Cell, Protocol, run_trial
from finetune.trial_files import TrialFiles

DEVICE_BROKEN: Final = 3  # exit code of a worker whose GPU context is lost: another process can go on
CANNOT_WRITE: Final = 4
_LOOK_SECONDS: Final = 2.0
_TELL_SECONDS: Final = 3.0
_RECORDED_PACKAGES: Final = ("torch", "transformers", "tokenizers", "numpy")


@dataclass(frozen=True)
class Assignment:
    """What a worker is told when it starts."""

    name: str
    """No other worker of the storage, on any machine, has it."""
    storage_url: str
    output_dir: Path
    model_folder: Path
    model_name: str
    """As reports tell it."""
    protocol: Protocol
    keep_models: bool
    save_steps: int | None
    logging_steps: int | None
    tasks: Mapping[str, Task]
    cells: Mapping[str, list[Cell]]
    """Of each task that this start of the grid runs."""
    split_folders: Mapping[str, Mapping[str, Path]]
    """The token arrays of each split of each task."""
    num_threads: int
    device: str
    """``cpu`` or ``cuda:<index>``."""


def start_worker(assignment: Assignment) -> BaseProcess:
    """Start a worker process; it ends with this process, even when that is killed."""
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(assignment,), daemon=True)
    process.start()
    return process


def _work(assignment: Assignment) -> None:
    """The life of one worker process."""
    end_with_parent()
    torch.set_num_threads(assignment.num_threads)
    Worker(assignment).run()


class Worker:
    """Runs trials one after the other; weights and data are read once, not for each trial."""

    def __init__(self, assignment: Assignment) -> None:
        self._assignment = assignment
        self._store = TrialStore(assignment.storage_url)
        self._device = torch.device(assignment.device)
        self._encoder = Encoder(assignment.model_folder)
        self._tokenizer = load_tokenizer(assignment.model_folder)
        self._mnli = MnliStart(self._store, assignment.output_dir, assignment.cells)
        self._data: dict[str, dict[str, DeviceSplit]] = {}
        self._versions = {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES}

    def run(self) -> None:
        """Until no trial is left for this worker, nor any that waits for MNLI's model."""
        while True:
            more_to_come = self._mnli.is_awaited()  # asked first: if it ends between the two questions, we ask again
            mnli_is_ready = self._mnli.is_ready()
            attempt = self._store.claim(
                self._assignment.cells,
                self._assignment.name,
                lambda cell, ready=mnli_is_ready: ready or cell.initialization != "mnli",
            )
            if attempt is not None:
                with self._store.heartbeat(attempt):
                    self._run(attempt)
            elif more_to_come:
                time.sleep(_LOOK_SECONDS)
            else:
                return

    def _run(self, attempt: Attempt) -> None:
        cell = attempt.cell
        task, protocol = self._assignment.tasks[cell.task_name], self._assignment.protocol
        files = self._files_of(cell)
        try:
            encoder = self._mnli.encoder() if cell.initialization == "mnli" else self._encoder
            data = self._data_of(cell.task_name)
            tell = self._teller(attempt)
            result, classifier = run_trial(task, cell, protocol, encoder, data, self._device, files, tell)
        except (TrialFailure, torch.OutOfMemoryError, MemoryError) as error:
            failure, device_is_broken = _one_line(error), False
        except OSError as error:
            _leave(CANNOT_WRITE, f"{cell} can't write: {error}")
        except Exception as error:  # a trial may fail in any way; the grid goes on
            # No later trial could use this process's GPU context.
            failure, device_is_broken = _one_line(error), self._device.type == "cuda"
        else:
            self._record(attempt, result, classifier)
            files.end()
            return
        # Outside of the handlers, where the error held on to the trial's memory.
        self._free_memory()
        self._store.fail(attempt, failure)
        if device_is_broken:
            _leave(DEVICE_BROKEN, f"{cell}: {failure}")

    def _record(self, attempt: Attempt, result: dict[str, Any], classifier: PreTrainedModel) -> None:
        """Save the model, record the trial, and only then let go of models that are no longer among the best."""
        cell = attempt.cell
        facts = {"attempt": attempt.attempt, "worker": self._assignment.name, "versions": self._versions}
        result = {**result, **facts, "finished_at": datetime.now(UTC).isoformat(timespec="seconds")}
        if not self._assignment.keep_models or cell.initialization == "random":
            self._store.finish(attempt, result)
            return
        group = by_group(self._assignment.cells[cell.task_name])[Group.of(cell)]
        models = KeptModels(self._assignment.output_dir, group)
        try:
            with models.locked():
                scores = self._store.scores(cell.task_name)
                models.keep(
                    cell, {**scores, cell: result["score"]}, classifier, self._tokenizer, self._record_of(cell, result)
                )
                self._store.finish(attempt, result)
                models.prune(self._store.scores(cell.task_name))
        except (OSError, SafetensorError) as error:  # the latter of a full disk
            _leave(CANNOT_WRITE, f"the model of {cell} can't be kept: {error}")

    def _teller(self, attempt: Attempt) -> Callable[[float], None]:
        """Tells those who look on how far the trial is, now and then."""
        next_time = time.monotonic() + _TELL_SECONDS

        def tell(share: float) -> None:
            nonlocal next_time
            if time.monotonic() >= next_time:
                self._store.tell_share(attempt, share)
                next_time = time.monotonic() + _TELL_SECONDS

        return tell

    def _files_of(self, cell: Cell) -> TrialFiles:
        assignment = self._assignment
        folder = trial_folder(assignment.output_dir, cell)
        return TrialFiles(folder, assignment.save_steps, assignment.logging_steps)

    def _record_of(self, cell: Cell, result: dict[str, Any]) -> ModelRecord:
        assignment, task = self._assignment, self._assignment.tasks[cell.task_name]
        data = self._data_of(cell.task_name)
        return ModelRecord(
            base_model=assignment.model_name,
            base_model_path=str(assignment.model_folder.resolve()),
            task_name=task.task_name,
            own_task=asdict(task.own) if task.own else None,
            max_seq_length=assignment.protocol.max_seq_length,
            rows={split: len(data[split]) for split in task.splits},
            cell=asdict(cell),
            protocol=asdict(assignment.protocol),
            score=result["score"],
            metric=task.selected_by,
            metrics=result["epochs"][result["score_epoch_index"]]["metrics"],
            epochs=result["epochs"],
            seconds=result["seconds"],
            device=result["device"],
            versions=self._versions,
        )

    def _data_of(self, task_name: str) -> dict[str, DeviceSplit]:
        if task_name not in self._data:
            folders = self._assignment.split_folders[task_name]
            splits = {split: DeviceSplit(load_tokens(folder), self._device) for split, folder in folders.items()}
            self._data[task_name] = splits
        return self._data[task_name]

    def _free_memory(self) -> None:
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()


class MnliStart:
    """Where trials that start from MNLI's tuned model find it, once MNLI's own trials are all finished."""

    def __init__(self, store: TrialStore, output_dir: Path, cells: Mapping[str, list[Cell]]) -> None:
        self._store = store
        self._task_names = [
            name for name, task_cells in cells.items() if any(cell.initialization == "mnli" for cell in task_cells)
        ]
        groups = by_group(cells[MNLI]) if self._task_names else {}
        pretrained = [group for (start, _), group in groups.items() if start == "pretrained"]
        self._models = KeptModels(output_dir, pretrained[0] if pretrained else [])
        self._encoder: Encoder | None = None

    def folder(self) -> Path | None:
        """The median seed's model of MNLI's best configuration; None while it isn't known or isn't here."""
        folder = self._models.median_model(self._store.scores(MNLI))
        return folder if folder is not None and folder.is_dir() else None

    def encoder(self) -> Encoder:
        """Its weights, read once."""
        if self._encoder is None:
            self._encoder = Encoder(self.folder())
        return self._encoder

    def is_ready(self) -> bool:
        """Whether trials can start from it, here and now."""
        return bool(self._task_names) and (self._encoder is not None or self.folder() is not None)

    def is_awaited(self) -> bool:
        """Whether trials wait for trials of MNLI that wait or run themselves."""
        if not any(attempt.cell.initialization == "mnli" for attempt in self._store.waiting(self._task_names)):
            return False
        return bool(self._store.waiting([MNLI]) or self._store.running([MNLI]))


def _one_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return str(error) if isinstance(error, TrialFailure) else f"{type(error).__name__}: {text[0] if text else ''}"


def _leave(code: int, message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr, flush=True)
    os._exit(code)


def end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL, so that no orphan goes on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
