"""How far a grid is: trials done and left, the time left, the best score of each task so far."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from finetune.config import MNLI
from finetune.selection import by_configuration, by_group
from finetune.study import Attempt, TrialStore
from finetune.tasks import Task
from finetune.trial import Cell

_SHARES_SHOWN: Final = 4
_BACKWARD: Final = 2  # a backward pass costs about two forward passes


def trial_cost(cell: Cell, num_tokens: Mapping[str, int]) -> float:
    """What a trial computes, in tokens that pass forward once; ``num_tokens`` are those of each split of its task."""
    evaluated = sum(count for split, count in num_tokens.items() if split != "train")
    return float(cell.num_epochs * ((1 + _BACKWARD) * num_tokens["train"] + evaluated))


def priorities(cells: Mapping[str, Sequence[Cell]], num_tokens: Mapping[str, Mapping[str, int]]) -> dict[Cell, float]:
    """The longest trials first, so that none runs on alone at the end; MNLI's before all when others wait for it."""
    mnli_is_awaited = any(cell.initialization == "mnli" for task_cells in cells.values() for cell in task_cells)
    return {
        cell: trial_cost(cell, num_tokens[name]) * (1e6 if mnli_is_awaited and name == MNLI else 1)
        for name, task_cells in cells.items()
        for cell in task_cells
    }


@dataclass(frozen=True)
class TaskProgress:
    """Where one task is."""

    title: str
    num_trials: int
    num_done: int
    running: list[Attempt]
    num_failures: int
    best: float | None
    """The highest median of a configuration all of whose seeds are done; a fraction."""


@dataclass(frozen=True)
class Progress:
    """Where a grid is."""

    tasks: dict[str, TaskProgress]
    seconds_left: float | None
    """Until the last trial ends, with as many at a time as now; None before any has come to its steps."""

    @property
    def num_done(self) -> int:
        """Trials with a result."""
        return sum(task.num_done for task in self.tasks.values())

    @property
    def num_trials(self) -> int:
        """Trials of the grid."""
        return sum(task.num_trials for task in self.tasks.values())

    @property
    def running(self) -> list[Attempt]:
        """The trials that are being run."""
        return [attempt for task in self.tasks.values() for attempt in task.running]

    def line(self) -> str:
        """All of it in one line."""
        left = "" if self.seconds_left is None else f", {duration(self.seconds_left)} left"
        best = [f"{task.title} {100 * task.best:.1f}" for task in self.tasks.values() if task.best is not None]
        best_so_far = f"; best medians so far: {', '.join(best)}" if best else ""
        shares = ", ".join(f"{attempt.share:.0%}" for attempt in self.running[:_SHARES_SHOWN] if attempt.share)
        running = f"{len(self.running)} running" + (f" ({shares})" if shares else "")
        return f"{self.num_done} of {self.num_trials} trials done, {running}{left}{best_so_far}"

    def table(self) -> tuple[list[str], list[list[str]]]:
        """One row per task: header and rows."""
        header = ["task", "trials", "done", "running", "failed attempts", "best median"]
        return header, [
            [
                task.title,
                str(task.num_trials),
                str(task.num_done),
                str(len(task.running)),
                str(task.num_failures),
                "" if task.best is None else f"{100 * task.best:.1f}",
            ]
            for task in self.tasks.values()
        ]


def look(store: TrialStore, tasks: Mapping[str, Task], cells: Mapping[str, Sequence[Cell]]) -> Progress:
    """Where the studies of ``cells`` are."""
    done = {name: store.results(name) for name in cells}
    running = {name: store.running([name]) for name in cells}
    task_progress = {
        name: TaskProgress(
            title=tasks[name].title,
            num_trials=len(task_cells),
            num_done=sum(cell in done[name] for cell in task_cells),
            running=running[name],
            num_failures=len(store.failures(name)),
            best=_best_median(task_cells, store.scores(name)),
        )
        for name, task_cells in cells.items()
    }
    num_tokens = {name: store.facts(name)["num_tokens"] for name in cells}
    return Progress(task_progress, _seconds_left(cells, num_tokens, done, running))


def _best_median(cells: Sequence[Cell], scores: Mapping[Cell, float]) -> float | None:
    """Of the starts that the table is about."""
    medians = [
        statistics.median(scores[cell] for cell in group)
        for (start, _), cells_of_group in by_group(cells).items()
        if start != "random"
        for group in by_configuration(cells_of_group).values()
        if all(cell in scores for cell in group)
    ]
    return max(medians, default=None)


def _seconds_left(
    cells: Mapping[str, Sequence[Cell]],
    num_tokens: Mapping[str, Mapping[str, int]],
    done: Mapping[str, Mapping[Cell, Mapping]],
    running: Mapping[str, Sequence[Attempt]],
) -> float | None:
    """From the cost of what is left and what each unit of cost has taken, of the same task and variant if it can be."""
    spent: Counter[tuple[str, str]] = Counter()
    paid: Counter[tuple[str, str]] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    attempts = {attempt.cell: attempt for task_attempts in running.values() for attempt in task_attempts}
    for name, task_cells in cells.items():
        for cell in task_cells:
            kind, cost = (name, cell.variant), trial_cost(cell, num_tokens[name])
            share = 1.0 if cell in done[name] else attempts[cell].share if cell in attempts else 0.0
            paid[kind] += cost * share
            left[kind] += cost * (1 - share)
            if share:
                spent[kind] += done[name][cell]["seconds"] if cell in done[name] else _elapsed_seconds(attempts[cell])
    if not paid.total():
        return None
    overall = spent.total() / paid.total()
    seconds = sum(cost * (spent[kind] / paid[kind] if paid[kind] else overall) for kind, cost in left.items())
    return seconds / max(1, len(attempts))


def _elapsed_seconds(attempt: Attempt) -> float:
    return (datetime.now() - attempt.started).total_seconds() if attempt.started else 0.0


def duration(seconds: float) -> str:
    """For people: ``40 s``, ``12 min``, ``3.2 h``."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
