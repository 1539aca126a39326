"""One voice: what happens at each step boundary, decided on rank 0's clock and the same on every rank.

A single small reduction on the CPU carries it all, so that all ranks take the same learning rate and leave together:
rank 0's decision, and from each rank whether it has been asked to leave. On a GPU the boundary is one step ahead of
the device, which still computes the step before (:class:`pretrain.engine.PretrainEngine`) and never waits for it.
"""

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from pretrain.budget import Budget, Cadence
from pretrain.interruptions import INTERRUPTIONS
from pretrain.run_record import PAUSE

_ACTIONS = ("validate", "save", "export")
_REMEMBERED = 3
_NEVER_DONE = 0.05  # of the budget: what nobody knows the duration of is taken to last that long


@dataclass(frozen=True)
class Decision:
    """What happens at a step boundary: the run ends there, or makes one more step and what follows it."""

    stopped_by: str | None
    """Why the run ends here: ``time_budget``, ``max_steps``, ``pause`` or one of ``INTERRUPTIONS``; None where it goes
    on."""
    progress: float
    """Share of the budget that is spent when the step has ended."""
    schedule_position: float
    """Share of the learning rate's schedule, likewise."""
    validate: bool
    save: bool
    export: int
    """Which of the marks for exports has come, counted from 1; 0 for none."""


class Director:
    """Takes the decisions.

    Args:
        budget: rank 0's decides.
        validation: when to validate.
        saving: when to save.
        export_marks: shares of the budget at which models are exported and which are still to come, by number.
        pending: what asks this process to leave, see :class:`pretrain.interruptions.Interruptions`.
        agree: the maximum over all ranks of each value, see :meth:`pretrain.processes.Processes.maximum`.
        rank: of this process.
        durations: how long validations, checkpoints and exports took before (``validate``, ``save``, ``export``).
    """

    def __init__(
        self,
        budget: Budget,
        validation: Cadence,
        saving: Cadence,
        export_marks: dict[int, float],
        pending: Callable[[], str | None],
        agree: Callable[..., list[float]],
        rank: int,
        durations: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self._budget = budget
        self._cadences = {"validate": validation, "save": saving}
        self._export_marks = export_marks
        self._pending = pending
        self._agree = agree
        self._rank = rank
        self._durations = {
            action: deque([durations[action]] if action in durations else (), maxlen=_REMEMBERED) for action in _ACTIONS
        }

    def decide(self, step: int) -> Decision:
        """What happens at the boundary before step number ``step`` (from 0); validating and saving follow that step.

        All ranks call it, each once a step.
        """
        own = self._decide(step) if self._rank == 0 else (0.0,) * 6
        reason, ends, progress, position, validate, save, export = self._agree(self._own_interruption(), *own)
        stopped_by = PAUSE if self._budget.pauses else "time_budget" if self._budget.max_steps is None else "max_steps"
        if reason and (self._budget.pauses or not ends):  # before a pause there is still a validation to make
            stopped_by = INTERRUPTIONS[int(reason) - 1]
        for action, happens in (("validate", validate), ("save", save)):
            if happens:
                self._cadences[action].skip_to(progress)
        self._export_marks.pop(int(export), None)
        return Decision(
            stopped_by=stopped_by if ends or reason else None,
            progress=progress,
            schedule_position=position,
            validate=bool(validate),
            save=bool(save),
            export=int(export),
        )

    def interrupted(self) -> bool:
        """Whether any rank has been asked to leave; all ranks call it, in the midst of what takes long."""
        return self._agree(self._own_interruption()) != [0.0]

    def record(self, action: str, seconds: float) -> None:
        """Tell how long a validation, a checkpoint or an export (``validate``, ``save``, ``export``) took, so that none
        starts too late."""
        self._durations[action].append(seconds)

    def durations(self) -> dict[str, float]:
        """How long they take, for a later part of the run: the longest of the recent ones."""
        return {action: max(recent) for action, recent in self._durations.items() if recent}

    def _own_interruption(self) -> int:
        pending = self._pending()
        return INTERRUPTIONS.index(pending) + 1 if pending else 0

    def _decide(self, step: int) -> tuple[float, ...]:
        """(ends, progress, position, validate, save, export), on rank 0."""
        budget = self._budget
        progress = budget.progress_after(step)
        extra = 0.0
        actions = dict.fromkeys(_ACTIONS, 0)
        for action, number in self._due(progress):
            needed = extra + max(self._durations[action], default=_NEVER_DONE * (budget.seconds or 0.0))
            # One more step must fit behind it, so that the last one's learning rate is near zero.
            if budget.has_room_for(step, needed + budget.step_seconds):
                actions[action], extra = number, needed
        ends = not budget.has_room_for(step)
        return (float(ends), progress, budget.schedule_position(progress), *map(float, actions.values()))

    def _due(self, progress: float) -> list[tuple[str, int]]:
        if progress >= 1.0:  # the closing follows, which saves, validates and exports
            return []
        due = [(action, 1) for action, cadence in self._cadences.items() if cadence.is_due(progress)]
        marks = [number for number, mark in self._export_marks.items() if mark <= progress]
        return due + [("export", number) for number in marks[:1]]
