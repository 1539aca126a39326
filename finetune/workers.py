"""Worker processes: each claims trials, runs them and records them, until none is left."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Final

import torch
from tqdm import tqdm

from finetune.data import load_tokenized
from finetune.model import Encoder
from finetune.study import TrialStore
from finetune.trial import Protocol, run_trial

POLL_SECONDS: Final = 1.0
LOG_SECONDS: Final = 60.0


@dataclass(frozen=True)
class Assignment:
    """What a worker is told when it starts."""

    name: str
    storage_url: str
    claim_lock: Path
    model_folder: Path
    protocol: Protocol
    task_folders: dict[str, Path]
    """The tokenised data of each task, in the order in which the tasks are run."""
    num_threads: int
    device: str
    """``cpu`` or ``cuda:<index>``."""


def run_workers(store: TrialStore, assignments: Sequence[Assignment]) -> None:
    """Run all waiting trials of the assigned tasks, and show how many are done.

    A trial whose worker dies is recorded as failed, and another worker takes the dead one's place.
    """
    task_names = list(assignments[0].task_folders)
    done, left = store.num_trials(task_names)
    if not left:
        return
    running = {_start(assignment): assignment for assignment in assignments[:left]}
    refresh_seconds = 0.5 if sys.stderr.isatty() else LOG_SECONDS
    with tqdm(total=done + left, initial=done, unit="trial", mininterval=refresh_seconds) as progress:
        while running:
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=POLL_SECONDS)
            for process in [process for process in running if not process.is_alive()]:
                assignment = running.pop(process)
                if process.exitcode and _record_death(store, assignment, process.exitcode):
                    running[_start(assignment)] = assignment
            progress.update(store.num_trials(task_names)[0] - progress.n)


def _start(assignment: Assignment) -> BaseProcess:
    process = multiprocessing.get_context("spawn").Process(target=_work, args=(assignment,), daemon=True)
    process.start()
    return process


def _record_death(store: TrialStore, assignment: Assignment, exit_code: int) -> bool:
    """Fail what a dead worker was running; False where it died before it took a trial, so that another would too."""
    cause = f"its worker process ended with exit code {exit_code}" + (" (out of memory?)" if exit_code == -9 else "")
    lost = store.fail_trials_of(assignment.name, assignment.task_folders, cause)
    if not lost:
        tqdm.write(f"{assignment.name} ended with exit code {exit_code} before it took a trial", file=sys.stderr)
    return lost > 0


def _work(assignment: Assignment) -> None:
    """The life of one worker process."""
    _end_with_parent()
    torch.set_num_threads(assignment.num_threads)
    store = TrialStore(assignment.storage_url, assignment.claim_lock)
    encoder = Encoder(assignment.model_folder)
    device = torch.device(assignment.device)
    tasks = {name: load_tokenized(folder) for name, folder in assignment.task_folders.items()}
    while claimed := store.claim(tasks, assignment.name):
        try:
            result = run_trial(claimed.cell, assignment.protocol, encoder, tasks[claimed.cell.task_name], device)
        except Exception as error:  # a trial may fail in any way (memory, numerics); the grid goes on
            store.fail(claimed, f"{type(error).__name__}: {error}")
        else:
            store.finish(claimed, result)


def _end_with_parent() -> None:
    """End this process when its parent ends, even by SIGKILL, so that no orphan goes on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides
    parent = multiprocessing.parent_process()

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
