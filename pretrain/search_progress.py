"""How far a search is: what runs where, the hours spent and left, the estimated end and cost."""

import math
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final

from pretrain.rungs import Rung
from pretrain.search_config import SearchConfig
from pretrain.search_results import (
    budget_total,
    device_hours,
    mark,
    parameters_text,
    planned_runs,
    ranked,
    rungs_in_order,
    share_spent,
    verdict_at,
)
from pretrain.search_runs import UNFINISHED, SearchRun

_STATES: Final = ("running", "paused", "waiting", "finished", "dropped", "diverged", "failed")

Table = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class Progress:
    """Where a search is. Hours are of all devices together; None is what can't be told before a run has measured it."""

    planned: str
    """Number and budget of the runs."""
    counts: Mapping[str, int]
    """Runs by state; a configuration that has yet to be proposed waits."""
    running: list[list[str]]
    """What runs: the rows of the table."""
    hours_by_state: Mapping[str, float]
    gpu_hours_left: float | None
    """Expected: a run that may be dropped counts with the chance that it goes on."""
    seconds_left: float | None
    """Until the last run ends, with as many at a time as now."""
    end: float | None
    """When that is, in seconds since the epoch."""
    best: SearchRun | None
    """Of the finished runs."""
    price_per_gpu_hour: float | None

    @property
    def gpu_hours_spent(self) -> float:
        """So far, by all runs, lost work included."""
        return sum(self.hours_by_state.values())

    def line(self) -> str:
        """All of it in one line."""
        counted = [f"{count} {state}" for state in _STATES if (count := self.counts.get(state))]
        best = f"; best loss {self.best.final_loss:.4f} (run {self.best.name})" if self.best else ""
        return f"{self.planned}: {', '.join(counted)}; {self._hours()}{best}"

    def _hours(self) -> str:
        spent, left = self.gpu_hours_spent, self.gpu_hours_left
        text = f"{_amount(spent)} GPU-hours spent{self._cost(spent)}"
        if left is None:
            return f"{text}, nothing is known yet of those left"
        if not left:
            return text
        return (
            f"{text}, about {_amount(left)} left{self._cost(left)}, end in {_duration(self.seconds_left)}"
            f" ({_clock(self.end)})"
        )

    def _cost(self, hours: float) -> str:
        return "" if self.price_per_gpu_hour is None else f" (cost {_amount(self.price_per_gpu_hour * hours)})"

    def tables(self) -> list[Table]:
        """What runs where, where anything does, and the runs by state: header and rows of each."""
        by_state = [
            [state, str(count), _amount(self.hours_by_state.get(state, 0.0)), *self._cost_cell(state)]
            for state in _STATES
            if (count := self.counts.get(state))
        ]
        header = ["runs", "number", "GPU-hours", *(["cost"] if self.price_per_gpu_hour is not None else [])]
        tables = [(header, by_state)]
        if self.running:
            tables.insert(0, (["run", "configuration", "where", "since", "spent", "next rung", "loss"], self.running))
        return tables

    def _cost_cell(self, state: str) -> list[str]:
        if self.price_per_gpu_hour is None:
            return []
        return [_amount(self.price_per_gpu_hour * self.hours_by_state.get(state, 0.0))]


def look(
    config: SearchConfig,
    facts: Mapping[str, Any],
    runs: Sequence[SearchRun],
    now: float,
    price_per_gpu_hour: float | None = None,
) -> Progress:
    """Where a search is.

    Args:
        config: the search.
        facts: ``gpus_per_run``, and ``places``: how many runs this machine has room for at a time.
        runs: all that there are so far.
        now: seconds since the epoch.
        price_per_gpu_hour: of one device, in any currency; without it there is no cost.
    """
    num_devices = facts["gpus_per_run"]
    unborn = [SearchRun(-1, {}, "waiting")] * (config.num_planned - len(runs))  # random and tpe propose as they go
    left = _Expectation(config, runs).seconds_left([*runs, *unborn])
    running = [run for run in runs if run.state == "running"]
    at_a_time = len(running) or facts["places"]
    seconds_left = None if left is None else max(sum(left) / max(1, at_a_time), *left, 0.0)
    hours: Counter[str] = Counter()
    for run in runs:
        hours[run.state] += device_hours(run, num_devices)
    return Progress(
        planned=planned_runs(config),
        counts=Counter(run.state for run in [*runs, *unborn]),
        running=[_row(config, run, now) for run in running],
        hours_by_state=hours,
        gpu_hours_left=None if left is None else num_devices * sum(left) / 3600,
        seconds_left=seconds_left,
        end=None if seconds_left is None else now + seconds_left,
        best=next(iter(ranked(runs)), None),
        price_per_gpu_hour=price_per_gpu_hour,
    )


class _Expectation:
    """What is to be expected of a run, from the rungs and from how the others have done."""

    def __init__(self, config: SearchConfig, runs: Sequence[SearchRun]) -> None:
        self._config = config
        self._seconds_per_run = _seconds_per_run(config, runs)
        self._seconds_per_start = _seconds_per_start(runs)
        self._ends = [share_spent(config, run) for run in runs if run.state in ("finished", "dropped")]
        self._chances = {rung: _chance(config, rung, runs) for rung in config.rungs}

    def seconds_left(self, runs: Sequence[SearchRun]) -> list[float] | None:
        """Of each run, zero where it has ended; None where no run tells how long a step of theirs takes."""
        unfinished = [run for run in runs if run.state in UNFINISHED]
        if unfinished and self._seconds_per_run is None:
            return None
        return [self._of_run(run) if run.state in UNFINISHED else 0.0 for run in runs]

    def _of_run(self, run: SearchRun) -> float:
        share, starts = self._by_others(run) if self._config.hyperband else self._by_rungs(run)
        return share * self._seconds_per_run + starts * self._seconds_per_start

    def _by_rungs(self, run: SearchRun) -> tuple[float, float]:
        """Share of the budget and starts to come: stretch by stretch, each with the chance that the run gets there."""
        position, share, chance = share_spent(self._config, run), 0.0, 1.0
        starts = 1.0 if run.state == "waiting" else 0.0
        for rung in rungs_in_order(self._config):
            if verdict_at(self._config, run, rung) == "kept":
                continue
            place = max(position, mark(self._config, rung))
            share += chance * (place - position)
            position = place
            chance *= self._chances[rung]
            starts += chance if rung.share is not None else 0.0
        return share + chance * (1.0 - position), starts

    def _by_others(self, run: SearchRun) -> tuple[float, float]:
        """The same where there are no rungs to tell: as far as those runs have gone on that came further than this."""
        position = share_spent(self._config, run)
        further = [end - position for end in self._ends if end > position]
        return statistics.fmean(further) if further else 1.0 - position, float(run.state != "running")


def _chance(config: SearchConfig, rung: Rung, runs: Sequence[SearchRun]) -> float:
    """That a run goes on: the share a "top" rung keeps, else what has been seen, and all before anything has."""
    if rung.share is not None:
        return rung.share
    verdicts = [verdict_at(config, run, rung) for run in runs]
    kept, dropped = verdicts.count("kept"), verdicts.count("dropped")
    return kept / (kept + dropped) if kept + dropped else 1.0


def _seconds_per_run(config: SearchConfig, runs: Sequence[SearchRun]) -> float | None:
    """Of a whole budget: by the clock its own length; in steps what the runs so far have taken for theirs."""
    if config.pretrain.budget_seconds:
        return config.pretrain.budget_seconds
    measured = [run for run in runs if run.steps and run.elapsed_seconds]
    if not measured:
        return None
    return budget_total(config) * sum(run.elapsed_seconds for run in measured) / sum(run.steps for run in measured)


def _seconds_per_start(runs: Sequence[SearchRun]) -> float:
    """What a start takes besides the budget: processes, imports, the closing. Work lost to kills is no part of it."""
    ended = [run for run in runs if run.state != "running" and run.starts and run.launch_seconds]
    overhead = sum(run.launch_seconds - run.elapsed_seconds - run.lost_seconds for run in ended)
    return max(0.0, overhead / sum(run.starts for run in ended)) if ended else 0.0


def _row(config: SearchConfig, run: SearchRun, now: float) -> list[str]:
    ahead = [rung for rung in rungs_in_order(config) if verdict_at(config, run, rung) is None]
    return [
        run.name,
        parameters_text(run.parameters),
        run.place or "-",
        "-" if run.started is None else f"{_clock(run.started)}, {_duration(now - run.started)}",
        f"{100 * share_spent(config, run):.0f} %",
        f"{ahead[0].at}: {ahead[0].keep}" if ahead else "-",
        f"{run.curve[-1][1]:.3f}" if run.curve else "-",
    ]


def _amount(value: float) -> str:
    return f"{value:,.1f}" if value >= 10 else f"{value:.3g}"


def _clock(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment):%Y-%m-%d %H:%M}"


def _duration(seconds: float) -> str:
    """For people: ``40 s``, ``12 min``, ``3.2 h``, ``5.1 days``."""
    if seconds < 90:
        return f"{math.ceil(seconds)} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
