"""The budget of a run: how much is spent, what that decides at each step, and one voice that tells every rank.

The position in the budget (``progress`` in [0, 1]) drives the learning rate, validation, checkpoints and the stop. It
is read on rank 0 alone and broadcast, so that all ranks take the same learning rate and leave at the same step.
"""

import re
import time
from collections import deque
from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch
import torch.distributed as dist

_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_STEPS_REMEMBERED = 5


def parse_duration(text: str) -> float:
    """Seconds of a duration like ``90s``, ``30m``, ``24h`` or ``1.5d``.

    Raises:
        ValueError: it is not such a duration, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is not a duration: write a number and a unit, like 90s, 30m, 24h or 3d")
    return float(match[1]) * _UNITS[match[2]]


def share_of_run(interval: str, run_seconds: float | None) -> float:
    """An interval as a share of the run: ``10%``, or a duration when the run's length is known in seconds.

    Raises:
        ValueError: it is neither, or a duration in a run of ``max_steps``.
    """
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", interval.strip())
    if percent:
        if not 0 < float(percent[1]) <= 100:
            raise ValueError(f"interval '{interval}' must be above 0 % and at most 100 %")
        return float(percent[1]) / 100
    if run_seconds is None:
        raise ValueError(f"interval '{interval}' has no meaning in a run of max_steps: give a share of it, like 10%")
    return parse_duration(interval) / run_seconds


class Budget:
    """Wall-clock time or a number of steps; both tell progress alike.

    Args:
        seconds: length of the run by the clock, or None.
        max_steps: length of the run in steps, or None. Exactly one of the two is given.
        schedule_scale: length of the learning rate's schedule over the length of the run; 1 unless a run is only the
            first part of a longer schedule.
        elapsed_before: seconds that earlier parts of the run have spent.
        step_seconds: how long their steps took, until this part has steps of its own to tell by.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        seconds: float | None,
        max_steps: int | None,
        schedule_scale: float = 1.0,
        elapsed_before: float = 0.0,
        step_seconds: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert (seconds is None) != (max_steps is None)
        self.seconds = seconds
        self.max_steps = max_steps
        self._schedule_scale = schedule_scale
        self._elapsed_before = elapsed_before
        self._earlier_step_seconds = step_seconds
        self._clock = clock
        self._started: float | None = None
        self._warmed_up = False
        self._recent_steps: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def start(self) -> None:
        """Start the clock: from here on, everything counts."""
        self._started = self._clock()

    def stop(self) -> None:
        """Stop it: what follows does not count."""
        self._elapsed_before, self._started = self.elapsed(), None

    def elapsed(self) -> float:
        """Seconds spent, earlier parts of the run included."""
        running = 0.0 if self._started is None else self._clock() - self._started
        return self._elapsed_before + running

    @property
    def total(self) -> float:
        """The whole budget, in seconds or steps."""
        return self.seconds or self.max_steps

    @property
    def unit(self) -> str:
        """What the budget counts: ``s`` or ``steps``."""
        return "s" if self.seconds else "steps"

    def spent(self, step: int) -> float:
        """Seconds or steps spent before step number ``step`` (from 0)."""
        return self.elapsed() if self.seconds else step

    def progress(self, step: int) -> float:
        """The share of the run that is spent before step number ``step`` (from 0), in [0, 1]."""
        return min(1.0, self.spent(step) / self.total)

    def schedule_position(self, progress: float) -> float:
        """The share of the learning rate's schedule that is spent at ``progress``."""
        return progress / self._schedule_scale

    def record_step(self, seconds: float) -> None:
        """Tell how long a step took. A start's first one, which compiles and allocates, says nothing of the others."""
        if self._warmed_up:
            self._recent_steps.append(seconds)
        self._warmed_up = True

    @property
    def step_seconds(self) -> float:
        """How long a step takes: the slowest of the recent ones."""
        return max(self._recent_steps, default=self._earlier_step_seconds)

    def has_room_for(self, step: int, extra_seconds: float = 0.0) -> bool:
        """Whether one more step, and ``extra_seconds`` of other work, end within the budget."""
        if self.max_steps is not None:
            return step < self.max_steps
        return self.elapsed() + self.step_seconds + extra_seconds < self.seconds


class Cadence:
    """Marks along the run at which something is due, by share of the run.

    Args:
        interval: share of the run between marks.
        early_interval: share between marks while ``progress`` is below ``early_share``.
        early_share: end of the early part.
    """

    def __init__(self, interval: float, early_interval: float | None = None, early_share: float = 0.0) -> None:
        self._interval = interval
        self._early_interval = early_interval or interval
        self._early_share = early_share if early_interval else 0.0
        self._passed = 0

    def _marks_until(self, progress: float) -> int:
        early = min(progress, self._early_share)
        late = max(0.0, progress - self._early_share)
        # A hair of tolerance: 3 * 0.1 is above 0.3 in floating point.
        return int(early / self._early_interval + 1e-9) + int(late / self._interval + 1e-9)

    def skip_to(self, progress: float) -> None:
        """Take all marks up to ``progress`` as done."""
        self._passed = self._marks_until(progress)

    def is_due(self, progress: float) -> bool:
        """Whether a mark lies between the last :meth:`skip_to` and ``progress``."""
        return self._marks_until(progress) > self._passed


@dataclass(frozen=True)
class Decision:
    """What rank 0 decides at a step boundary."""

    progress: float
    schedule_position: float
    stop: bool
    validate: bool
    save: bool


class Director:
    """Rank 0's decisions, the same on every rank."""

    def __init__(self, budget: Budget, validation: Cadence, checkpoint: Cadence, group: dist.ProcessGroup) -> None:
        self._budget = budget
        self._validation = validation
        self._checkpoint = checkpoint
        self._group = group
        self._slowest = {"validate": 0.0, "save": 0.0}

    def decide(self, step: int) -> Decision:
        """What happens at the boundary before step number ``step`` (from 0); validating and saving follow that step."""
        values = torch.tensor(astuple(self._decide(step)), dtype=torch.float64)
        dist.broadcast(values, src=0, group=self._group)
        progress, position, stop, validate, save = values.tolist()
        for cadence, happens in ((self._validation, validate), (self._checkpoint, save)):
            if happens:
                cadence.skip_to(progress)
        return Decision(progress, position, bool(stop), bool(validate), bool(save))

    def record(self, action: str, seconds: float) -> None:
        """Tell how long a validation or a checkpoint (``validate``, ``save``) took, so that none starts too late."""
        self._slowest[action] = max(self._slowest[action], seconds)

    def _decide(self, step: int) -> Decision:
        progress = self._budget.progress(step)
        validate_seconds, save_seconds = self._slowest["validate"], self._slowest["save"]
        validate = self._validation.is_due(progress) and self._budget.has_room_for(step, validate_seconds)
        validation_seconds = validate_seconds if validate else 0.0
        return Decision(
            progress=progress,
            schedule_position=self._budget.schedule_position(progress),
            stop=not self._budget.has_room_for(step),
            validate=validate,
            save=self._checkpoint.is_due(progress)
            and self._budget.has_room_for(step, validation_seconds + save_seconds),
        )
