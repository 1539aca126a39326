"""The arithmetic of a plan: how a budget is spent when it is known how long each part of a run takes."""

import math
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace

from pretrain.budget import Cadence
from pretrain.config import PretrainConfig
from pretrain.data_sample import DataSample

_HALVINGS = 50  # of the run's length, to find where a mark lies
_TOLERANCE = 1e-9  # of a step: floating point


@dataclass(frozen=True)
class Durations:
    """How long the parts of a run take, in seconds."""

    launch: float
    """From the command to the clock's start; not counted against the budget."""
    starting: float
    """From the clock's start to the first step, without the micro-batch search."""
    micro_batch_search: float
    first_step: float
    """Compilation included."""
    step: float
    """Any other: waiting for data and logging included."""
    first_validation: float
    """The first one may compile, too."""
    validation: float
    checkpoint: float
    export: float
    """A model folder from a checkpoint, the checkpoint not counted."""
    closing: float
    """The closing checkpoint, validation and export; not counted against the budget."""

    @property
    def until_steady(self) -> float:
        """What a run takes once, before all further steps."""
        return self.starting + self.micro_batch_search + self.first_step


@dataclass(frozen=True)
class Estimate:
    """What has been measured, or computed, of a model and a batch on a machine."""

    durations: Durations
    micro_batch_size: int
    memory_bytes: float
    """The most that a device holds."""
    checkpoint_bytes: float
    model_bytes: float
    """Of an exported model's folder."""
    log_line_bytes: float
    """Of metrics.jsonl and TensorBoard's file together."""
    timed_steps: int | None = None
    """Behind the step's duration; None where it was computed."""

    def without_search(self) -> "Estimate":
        """Of a run that is given the micro-batch."""
        return replace(self, durations=replace(self.durations, micro_batch_search=0.0))


@dataclass(frozen=True)
class Course:
    """What happens within the budget, the closing excluded."""

    steps: int
    validations: int
    checkpoints: int
    """Those that exports are made from included."""
    exports: int
    elapsed_seconds: float


@dataclass(frozen=True)
class Forecast:
    """What the budget should buy with one model and one batch."""

    course: Course
    durations: Durations
    micro_batch_size: int
    sequences: int
    epochs: float
    """Passes over the training rows, which hold every masked copy of the text."""
    text_passes: float | None
    """Passes over the text itself: ``epochs`` times its copies; None where the data folder does not tell these."""
    tokens: float
    """Real ones."""
    tokens_per_parameter: float
    padding_share: float
    """Of the positions that are computed."""
    memory_bytes: float
    """The most that a device holds."""
    disk_bytes: float
    """Of the finished run's folder."""
    peak_disk_bytes: float
    """While a checkpoint is written beside those that are kept."""
    wall_seconds: float
    """From the command to its end."""
    cost: float | None
    """Of the GPUs for that time."""
    timed_steps: int | None


def predict(
    config: PretrainConfig,
    estimate: Estimate,
    sample: DataSample,
    parameters: int,
    padding_share: float,
    num_gpus: int,
    price_per_gpu_hour: float | None,
) -> Forecast:
    """Spend the budget of ``config`` at the durations of ``estimate``."""
    durations = estimate.durations
    course = run_out(config.budget_seconds, durations, *map(marks_of, config.cadences()), config.export_at)
    sequences = course.steps * config.train_batch_size
    epochs, tokens = sequences / sample.train_rows, sequences * sample.tokens_per_sequence
    # The closing one is the newest; the best stays, too, and is usually the one before it.
    kept = min(max(config.checkpoints_kept, 2), course.checkpoints + 1)
    lines = course.steps / config.log_interval + 2 * (course.validations + course.checkpoints)
    besides = (1 + course.exports) * estimate.model_bytes + lines * estimate.log_line_bytes
    wall_seconds = durations.launch + course.elapsed_seconds + durations.closing
    return Forecast(
        course=course,
        durations=durations,
        micro_batch_size=estimate.micro_batch_size,
        sequences=sequences,
        epochs=epochs,
        text_passes=epochs * sample.dupe_factor if sample.dupe_factor else None,
        tokens=tokens,
        tokens_per_parameter=tokens / parameters,
        padding_share=padding_share,
        memory_bytes=estimate.memory_bytes,
        disk_bytes=kept * estimate.checkpoint_bytes + besides,
        peak_disk_bytes=(kept + 1) * estimate.checkpoint_bytes + besides,
        wall_seconds=wall_seconds,
        cost=None if price_per_gpu_hour is None else wall_seconds / 3600 * num_gpus * price_per_gpu_hour,
        timed_steps=estimate.timed_steps,
    )


@dataclass
class _Action:
    """Something that is due at marks along the run."""

    marks: deque[float]
    """Shares of the run that are still to come."""
    seconds: float
    first_seconds: float
    count: int = 0

    def is_due(self, progress: float) -> bool:
        return bool(self.marks) and self.marks[0] <= progress

    @property
    def known_seconds(self) -> float:
        """How long the run thinks that it takes: as long as it has taken."""
        return (self.first_seconds if self.count == 1 else self.seconds) if self.count else 0.0

    def act(self, progress: float) -> float:
        """Do it; how long it takes."""
        while self.is_due(progress):
            self.marks.popleft()
        self.count += 1
        return self.first_seconds if self.count == 1 else self.seconds


def run_out(
    budget_seconds: float,
    durations: Durations,
    validation_marks: Iterable[float],
    checkpoint_marks: Iterable[float],
    export_marks: Iterable[float],
) -> Course:
    """Spend ``budget_seconds`` by the rules of a run: nothing starts that would pass the deadline, and what is due when
    a step ends follows that step. Marks are shares of the run, see :func:`marks_of`."""
    export_seconds = durations.checkpoint + durations.export
    actions = [
        _Action(deque(validation_marks), durations.validation, durations.first_validation),
        _Action(deque(checkpoint_marks), durations.checkpoint, durations.checkpoint),
        _Action(deque(sorted(export_marks)), export_seconds, export_seconds),
    ]
    elapsed, steps, step = durations.starting + durations.micro_batch_search, 0, durations.step
    while elapsed + step < budget_seconds:
        progress = (elapsed + step) / budget_seconds
        due = [action for action in actions if action.is_due(progress)]
        if steps and not due:
            ahead = min((action.marks[0] for action in actions if action.marks), default=1.0) * budget_seconds
            idle = max(1, math.ceil((ahead - elapsed) / step - _TOLERANCE) - 1)
            elapsed, steps = elapsed + idle * step, steps + idle
            continue
        room = budget_seconds - elapsed - step
        elapsed, steps = elapsed + (step if steps else durations.first_step), steps + 1
        for action in due:
            if action.known_seconds < room:
                room -= action.known_seconds
                elapsed += action.act(progress)
            else:
                action.marks.clear()  # there will not be room later, either
    validations, checkpoints, exports = (action.count for action in actions)
    return Course(steps, validations, checkpoints + exports, exports, elapsed)


def marks_of(cadence: Cadence) -> list[float]:
    """The shares of the run, below 1, at which something is due; uses the cadence up."""
    marks = [0.0]
    while marks[-1] < 1.0:
        low, high = marks[-1], 1.0
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            low, high = (low, middle) if cadence.is_due(middle) else (middle, high)
        cadence.skip_to(high)
        marks.append(high)
    return marks[1:-1]
