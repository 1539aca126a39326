"""Keeping the workers of this process at work: start them, take their place when they die, tell how far they are."""

import multiprocessing.connection
import os
import sys
import time
from collections import Counter
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import Final

from common.errors import UserError
from common.process_tree import is_broken, launcher_chain
from common.storage import HEARTBEAT_SECONDS
from finetune.progress import look
from finetune.study import TrialStore
from finetune.workers import CANNOT_WRITE, Assignment, MnliStart, start_worker

MAX_KILLS: Final = 5  # of an attempt's workers: a person kills at random, a system short of memory again and again
_MAX_FRUITLESS_STARTS: Final = 3
_POLL_SECONDS: Final = 1.0
_SECONDS_BETWEEN_LINES: Final = 60.0
_SECONDS_BETWEEN_UPDATES: Final = 3.0  # of the line on a terminal


class Crew:
    """The workers of one process.

    Args:
        store: the trials.
        assignments: one per worker; at least one.
        shows_progress: whether to tell how far the grid is.
    """

    def __init__(self, store: TrialStore, assignments: Sequence[Assignment], shows_progress: bool) -> None:
        self._store, self._assignments, self._shows_progress = store, assignments, shows_progress
        first = assignments[0]
        self._tasks, self._cells = first.tasks, first.cells
        self._mnli = MnliStart(store, first.output_dir, first.cells)
        self._running: dict[BaseProcess, Assignment] = {}
        self._taken: Counter[str] = Counter()  # trials of each worker until its last death
        self._fruitless: Counter[str] = Counter()  # of each worker, starts in a row that ended before it took a trial
        self._next_line, self._next_look_for_stale = 0.0, 0.0

    def run(self) -> None:
        """Until no trial of these tasks waits or runs, here or on another machine.

        Under a launcher this process ends as soon as the launcher does, so that no orphan goes on.

        Raises:
            UserError: a worker can't write to the output folder.
        """
        launchers = launcher_chain()
        while self._is_work_left():
            if is_broken(launchers):
                os._exit(1)
            self._show()
            multiprocessing.connection.wait([process.sentinel for process in self._running], timeout=_POLL_SECONDS)
            for process in [process for process in self._running if not process.is_alive()]:
                self._take_leave_of(process, self._running.pop(process))
        self._show(last=True)

    def _is_work_left(self) -> bool:
        """Start workers for what can be claimed; False when nothing waits that this machine could run, nor runs."""
        was_running = bool(self._store.running(self._cells))  # asked twice: what runs may come to wait meanwhile
        if time.monotonic() >= self._next_look_for_stale:
            self._store.give_back_stale(self._cells)
            self._next_look_for_stale = time.monotonic() + HEARTBEAT_SECONDS
        idle = [
            assignment
            for assignment in self._assignments
            if assignment not in self._running.values() and self._fruitless[assignment.name] < _MAX_FRUITLESS_STARTS
        ]
        for assignment in idle[: self._num_claimable() if idle else 0]:
            self._running[start_worker(assignment)] = assignment
        return was_running or bool(self._running) or bool(self._store.running(self._cells))

    def _num_claimable(self) -> int:
        mnli_is_ready = self._mnli.is_ready()
        waiting = self._store.waiting(self._cells)
        return sum(mnli_is_ready or attempt.cell.initialization != "mnli" for attempt in waiting)

    def _take_leave_of(self, process: BaseProcess, assignment: Assignment) -> None:
        """Say what became of the trial of a worker that has ended."""
        code = process.exitcode
        if code == CANNOT_WRITE:
            for other in self._running:
                other.kill()
            raise UserError(f"can't write to {assignment.output_dir}: mend that; the same command goes on from here")
        lost = self._store.running_of(assignment.name, self._cells)
        for attempt in lost:
            if code < 0 and attempt.kills + 1 < MAX_KILLS:
                self._store.give_back(attempt, kills=1)
            else:
                fate = f"was killed {MAX_KILLS} times (out of memory?)" if code < 0 else f"ended with exit code {code}"
                self._store.fail(attempt, f"its worker process {fate}")
        if code:
            self._count_start(assignment.name, code)

    def _count_start(self, worker: str, code: int) -> None:
        """Note whether a worker that has died had taken a trial: one that never does is given up in the end."""
        taken = self._store.num_taken(worker, self._cells)
        if taken > self._taken[worker]:
            self._fruitless[worker] = 0
        else:
            self._fruitless[worker] += 1
            print(f"{worker} ended with exit code {code} and no trial", file=sys.stderr)
        self._taken[worker] = taken

    def _show(self, last: bool = False) -> None:
        if not self._shows_progress or (time.monotonic() < self._next_line and not last):
            return
        line = look(self._store, self._tasks, self._cells).line()
        if sys.stdout.isatty():
            print(f"\r\033[K{line}", end="\n" if last else "", flush=True)
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_UPDATES
        else:
            print(line, flush=True)
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
