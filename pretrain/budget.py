"""The budget of a run: how much is spent and on what, what is left, and when something is due.

The position in the budget (``progress`` in [0, 1]) drives the learning rate, validation, checkpoints and the stop.
"""

import re
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, get_args

Activity = Literal[
    "starting", "micro_batch_search", "compile", "training", "data_wait", "validation", "checkpoints", "exports"
]
ACTIVITIES = get_args(Activity)
_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_LONGEST = 3650 * _UNITS["d"]
_STEPS_REMEMBERED = 5


def parse_duration(text: str) -> float:
    """Seconds of a duration like ``90s``, ``30m``, ``24h`` or ``1.5d``.

    Raises:
        ValueError: it is not such a duration, or not positive.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smhd])", text.strip())
    if not match or float(match[1]) <= 0:
        raise ValueError(f"'{text}' is not a duration: write a number and a unit, like 90s, 30m, 24h or 3d")
    seconds = float(match[1]) * _UNITS[match[2]]
    if seconds > _LONGEST:
        raise ValueError(f"'{text}' is longer than {_LONGEST / _UNITS['d']:.0f} days")
    return seconds


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
        spent_before: seconds that earlier parts of the run have spent, by activity.
        durations: how long things took them (``starting``, ``first_step``, ``step``), until this part knows better.
        steps_in_flight: steps that are queued on the device while the next one is decided on.
        pause_at: share of the run at which this part of it ends; None for its end.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        seconds: float | None,
        max_steps: int | None,
        schedule_scale: float = 1.0,
        spent_before: dict[str, float] | None = None,
        durations: Mapping[str, float] = MappingProxyType({}),
        steps_in_flight: int = 0,
        pause_at: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        assert (seconds is None) != (max_steps is None)
        self.seconds = seconds
        self.max_steps = max_steps
        self.pauses = pause_at is not None
        """Whether this part of the run ends with a pause."""
        self._end = round((pause_at if self.pauses else 1.0) * self.total, 6)  # 7 % of 100 is 7, not a hair more
        self._schedule_scale = schedule_scale
        self._spent = dict.fromkeys(ACTIVITIES, 0.0) | (spent_before or {})
        self._spent_on_earlier_starts = self._spent["starting"]
        self._durations = dict(durations)
        self._steps_in_flight = steps_in_flight
        self._clock = clock
        self._charged_until: float | None = None
        self._is_over = False
        self._warmed_up = False
        self._recent_steps: deque[float] = deque(maxlen=_STEPS_REMEMBERED)

    def start(self, step: int) -> None:
        """Start the clock before step number ``step``: from here on, everything counts.

        Where what is left is too short for starting and that step, the budget is taken as spent instead.
        """
        self._is_over = not self.has_room_for(step, self._durations.get("starting", 0.0))
        if not self._is_over:
            self._charged_until = self._clock()

    def started(self) -> None:
        """All is ready for the first step."""
        if self._charged_until is not None:
            self.charge("starting")
            self._durations["starting"] = self._spent["starting"] - self._spent_on_earlier_starts

    def stop(self) -> None:
        """Stop it: what follows does not count."""
        if self._charged_until is not None:
            self.charge("training")
        self._charged_until = None

    def charge(self, activity: Activity) -> None:
        """Put down the time since the last call, or since the start, to ``activity``."""
        if self._charged_until is not None:
            now = self._clock()
            self._spent[activity] += now - self._charged_until
            self._charged_until = now

    def spent_seconds(self) -> dict[str, float]:
        """Seconds spent by activity, as far as they have been put down."""
        return dict(self._spent)

    def elapsed(self) -> float:
        """Seconds spent, earlier parts of the run included."""
        running = 0.0 if self._charged_until is None else self._clock() - self._charged_until
        return sum(self._spent.values()) + running

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

    def progress_after(self, step: int) -> float:
        """The share that will be spent when step number ``step``, which is about to be queued, has ended."""
        if self.max_steps is not None:
            return min(1.0, (step + 1) / self.max_steps)
        return min(1.0, (self.elapsed() + self._pending_steps * self.typical_step_seconds) / self.seconds)

    def schedule_position(self, progress: float) -> float:
        """The share of the learning rate's schedule that is spent at ``progress``."""
        return progress / self._schedule_scale

    def record_step(self, seconds: float) -> None:
        """Tell how long a step took. A start's first one, which compiles and allocates, says nothing of the others."""
        if self._warmed_up:
            self._recent_steps.append(seconds)
            self._durations["step"] = self.step_seconds
        else:
            self._durations["first_step"] = seconds
        self._warmed_up = True

    @property
    def is_warmed_up(self) -> bool:
        """Whether this start has made its first step."""
        return self._warmed_up

    @property
    def step_seconds(self) -> float:
        """How long the next step may take: the slowest of the recent ones, and a start's first one as long as that."""
        if not self._warmed_up:
            return max(self._durations.get("first_step", 0.0), self._durations.get("step", 0.0))
        return max(self._recent_steps, default=self._durations.get("step", 0.0))

    @property
    def typical_step_seconds(self) -> float:
        """How long a step usually takes: the median of the recent ones."""
        return statistics.median(self._recent_steps) if self._recent_steps else self.step_seconds

    def durations(self) -> dict[str, float]:
        """How long things take, for a later part of the run."""
        return dict(self._durations)

    @property
    def _pending_steps(self) -> int:
        """Steps that have still to run when the next one is queued, itself included."""
        return self._steps_in_flight + 1

    def has_room_for(self, step: int, extra_seconds: float = 0.0) -> bool:
        """Whether one more step, and ``extra_seconds`` of other work, end within this part of the run."""
        if self._is_over:
            return False
        if self.max_steps is not None:
            return step < self._end
        return self.elapsed() + self._pending_steps * self.step_seconds + extra_seconds < self._end


class Cadence:
    """Marks along the run at which something is due, by share of the run.

    Args:
        interval: share of the run between marks.
        early_interval: share between marks while ``progress`` is below ``early_share``.
        early_share: end of the early part.
        extra: shares of the run at which it is due besides.
    """

    def __init__(
        self,
        interval: float,
        early_interval: float | None = None,
        early_share: float = 0.0,
        extra: Sequence[float] = (),
    ) -> None:
        self._interval = interval
        self._early_interval = early_interval or interval
        self._early_share = early_share if early_interval else 0.0
        self._extra = extra
        self._passed = 0

    def _marks_until(self, progress: float) -> int:
        early = min(progress, self._early_share)
        late = max(0.0, progress - self._early_share)
        # A hair of tolerance: 3 * 0.1 is above 0.3 in floating point.
        regular = int(early / self._early_interval + 1e-9) + int(late / self._interval + 1e-9)
        return regular + sum(mark <= progress + 1e-9 for mark in self._extra)

    def skip_to(self, progress: float) -> None:
        """Take all marks up to ``progress`` as done."""
        self._passed = self._marks_until(progress)

    def is_due(self, progress: float) -> bool:
        """Whether a mark lies between the last :meth:`skip_to` and ``progress``."""
        return self._marks_until(progress) > self._passed
