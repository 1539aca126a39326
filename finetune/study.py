"""The trials of a grid in an Optuna storage, which is the only truth about what has run.

One study per task; one Optuna trial per attempt at a cell. Cells are put into the storage as waiting trials, workers
claim them, and a trial's whole result lies in its user attributes. Optuna's grid sampler is not used: it counts a
failed trial as visited.
"""

import contextlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from common.errors import UserError
from common.storage import HEARTBEAT_SECONDS, STALE_SECONDS, SharedStorage
from finetune.optimizers import Optimizer
from finetune.trial import Cell

MAX_ATTEMPTS: Final = 2
_LARGEST_INT: Final = 2**31 - 1
_DISTRIBUTIONS: Final = {
    "learning_rate": FloatDistribution(0.0, 1.0),
    "batch_size": IntDistribution(1, _LARGEST_INT),
    "num_epochs": IntDistribution(1, _LARGEST_INT),
    "initialization": CategoricalDistribution(("pretrained", "random", "mnli")),
    "seed": IntDistribution(0, _LARGEST_INT),
    "precision": CategoricalDistribution(("fp32", "bf16", "fp16")),
}  # and the optimizer, whose arguments are no values of one distribution, in an attribute


@dataclass(frozen=True)
class Attempt:
    """An attempt at a cell, which one worker alone runs."""

    cell: Cell
    number: int
    attempt: int
    priority: float
    kills: int = 0
    """How often its worker alone was killed while it ran."""
    worker: str | None = None
    started: datetime | None = None
    """When it was claimed, by the clock of the machine that claimed it."""
    share: float = 0.0
    """Of its optimizer steps, done as last told."""


class TrialStore:
    """The studies of one grid, which any number of processes and machines may share.

    Args:
        url: storage in SQLAlchemy's form: ``sqlite:///G/trials.db``, or ``postgresql://...`` for several machines.
        heartbeat_seconds: between two signs of life of a running trial.
        stale_seconds: after so long without one, the trial counts as interrupted.

    Raises:
        UserError: the storage can't be opened, or is of another kind.
    """

    def __init__(
        self, url: str, heartbeat_seconds: int = HEARTBEAT_SECONDS, stale_seconds: int = STALE_SECONDS
    ) -> None:
        self._shared = SharedStorage(
            url,
            lambda study, trial: _wait_again(study, _attempt(study.study_name, trial)),
            heartbeat_seconds,
            stale_seconds,
        )
        self._storage = self._shared.trials

    # --- studies ---

    def task_names(self) -> list[str]:
        """The tasks whose study has been opened."""
        return [study.study_name for study in self._storage.get_all_studies() if "facts" in study.user_attrs]

    def check_studies(self, fingerprints: Mapping[str, Mapping[str, Any]]) -> None:
        """Refuse a storage that holds anything else, and write nothing.

        Args:
            fingerprints: for each task that may have a study here, what its trials must have in common.

        Raises:
            UserError: recorded trials were made with another fingerprint, or are of no task of these.
        """
        for study in self._storage.get_all_studies():
            name, recorded = study.study_name, study.user_attrs.get("fingerprint")
            if name not in fingerprints or (recorded is None and self._trials(name)):
                raise UserError(f"the storage holds a study '{name}' of something else: give this grid one of its own")
            expected = fingerprints[name]
            different = [key for key in expected if recorded is not None and recorded.get(key) != expected[key]]
            if different:
                raise UserError(
                    f"the recorded trials of {name} were run with another {' and another '.join(different)}:"
                    " give another --output_dir and storage, or what they were run with"
                )

    def open_study(self, task_name: str, fingerprint: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Create or reopen a task's study.

        Args:
            task_name: the study's name.
            fingerprint: what all its trials have in common, checked before.
            facts: what reports tell about it.
        """
        study = optuna.create_study(
            storage=self._storage, study_name=task_name, direction="maximize", load_if_exists=True
        )
        study.set_user_attr("fingerprint", fingerprint)
        study.set_user_attr("facts", facts)

    def facts(self, task_name: str) -> dict[str, Any]:
        """What :meth:`open_study` was told last."""
        return self._study(task_name).user_attrs["facts"]

    # --- trials that wait, and those who take them ---

    def enqueue_missing(self, task_name: str, priorities: Mapping[Cell, float]) -> None:
        """Add a waiting trial for each cell that has none waiting, running or finished.

        Args:
            task_name: whose cells these are.
            priorities: of each cell; the highest is claimed first.
        """
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        with self._shared.exclusive():
            present = {_cell(task_name, trial) for trial in self._trials(task_name, *states)}
            for cell, priority in priorities.items():
                if cell not in present:
                    self._study(task_name).add_trial(_waiting_trial(cell, priority, attempt=1))

    def claim(
        self, task_names: Iterable[str], worker: str, may_run: Callable[[Cell], bool] = lambda cell: True
    ) -> Attempt | None:
        """Take the waiting trial of highest priority of these tasks that ``may_run``; None when there is none."""
        with self._shared.exclusive():
            waiting = [attempt for attempt in self.waiting(task_names) if may_run(attempt.cell)]
            if not waiting:
                return None
            attempt = max(waiting, key=lambda attempt: attempt.priority)  # the first, so the grid's order, among equals
            trial_id = self._trial_id(attempt.cell.task_name, attempt.number)
            self._shared.take(trial_id, worker=worker)
            return attempt

    def heartbeat(self, attempt: Attempt) -> contextlib.AbstractContextManager[None]:
        """Show signs of life of a trial meanwhile."""
        return self._shared.heartbeat(self._trial_id(attempt.cell.task_name, attempt.number))

    def tell_share(self, attempt: Attempt, share: float) -> None:
        """Note what share of a running trial's steps is done, for those who look on."""
        trial_id = self._trial_id(attempt.cell.task_name, attempt.number)
        # Given back to others meanwhile, or a storage that is busy for once: no reason for a trial to fail.
        with contextlib.suppress(optuna.exceptions.OptunaError):
            self._storage.set_trial_user_attr(trial_id, "share", share)

    def finish(self, attempt: Attempt, result: Mapping[str, Any]) -> bool:
        """Record a trial's result, which holds its ``score``; False if it had been given back to others meanwhile."""
        return self._end(attempt, TrialState.COMPLETE, result["score"], result=result)

    def fail(self, attempt: Attempt, cause: str) -> None:
        """Record why a trial has no result, and let it be tried once more unless this was that attempt."""
        with self._shared.exclusive():
            if self._end(attempt, TrialState.FAIL, failure=cause) and attempt.attempt < MAX_ATTEMPTS:
                self._study(attempt.cell.task_name).add_trial(
                    _waiting_trial(attempt.cell, attempt.priority, attempt.attempt + 1)
                )

    def running_of(self, worker: str, task_names: Iterable[str]) -> list[Attempt]:
        """What a worker has claimed and not ended: one trial, or none."""
        return [attempt for attempt in self.running(task_names) if attempt.worker == worker]

    def num_taken(self, worker: str, task_names: Iterable[str]) -> int:
        """How many trials a worker has claimed so far."""
        trials = [trial for task_name in task_names for trial in self._trials(task_name)]
        return sum(trial.user_attrs.get("worker") == worker for trial in trials)

    def give_back(self, attempt: Attempt, kills: int = 0) -> None:
        """Let an interrupted trial wait again, which is no fault of its own, with so many kills more on its account."""
        with self._shared.exclusive():
            if self._end(attempt, TrialState.FAIL):
                _wait_again(self._study(attempt.cell.task_name), attempt, kills)

    def give_back_stale(self, task_names: Iterable[str]) -> None:
        """:meth:`give_back` running trials that have shown no sign of life for too long."""
        with self._shared.exclusive():
            for task_name in task_names:
                self._shared.give_back_stale(self._study(task_name))

    def _end(self, attempt: Attempt, state: TrialState, value: float | None = None, **attributes: Any) -> bool:
        """False if the trial had ended before, as one does that was given back."""
        trial_id = self._trial_id(attempt.cell.task_name, attempt.number)
        return self._shared.end(trial_id, state, value, attributes)

    # --- what there is ---

    def waiting(self, task_names: Iterable[str]) -> list[Attempt]:
        """The trials that nobody has claimed."""
        return self._in_state(task_names, TrialState.WAITING)

    def running(self, task_names: Iterable[str]) -> list[Attempt]:
        """The trials that are being run."""
        return self._in_state(task_names, TrialState.RUNNING)

    def _in_state(self, task_names: Iterable[str], state: TrialState) -> list[Attempt]:
        return [_attempt(name, trial) for name in task_names for trial in self._trials(name, state)]

    def results(self, task_name: str) -> dict[Cell, dict[str, Any]]:
        """The result of each finished cell."""
        trials = self._trials(task_name, TrialState.COMPLETE)
        return {_cell(task_name, trial): trial.user_attrs["result"] for trial in trials}

    def scores(self, task_name: str) -> dict[Cell, float]:
        """The score of each finished cell."""
        return {_cell(task_name, trial): trial.value for trial in self._trials(task_name, TrialState.COMPLETE)}

    def failures(self, task_name: str) -> list[tuple[Cell, str]]:
        """Every attempt that failed of itself, with its cause; an interrupted one has none."""
        trials = self._trials(task_name, TrialState.FAIL)
        causes = [(_cell(task_name, trial), trial.user_attrs.get("failure")) for trial in trials]
        return [(cell, cause) for cell, cause in causes if cause is not None]

    def _study_id(self, task_name: str) -> int:
        return self._storage.get_study_id_from_name(task_name)

    def _study(self, task_name: str) -> optuna.Study:
        return optuna.load_study(storage=self._storage, study_name=task_name)

    def _trials(self, task_name: str, *states: TrialState) -> list[FrozenTrial]:
        """Those in one of these states; all where none is named."""
        return self._storage.get_all_trials(self._study_id(task_name), deepcopy=False, states=states or None)

    def _trial_id(self, task_name: str, number: int) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id(task_name), number)


def _cell(task_name: str, trial: FrozenTrial) -> Cell:
    return Cell(task_name=task_name, **trial.params, optimizer=Optimizer(**trial.user_attrs["optimizer"]))


def _attempt(task_name: str, trial: FrozenTrial) -> Attempt:
    attributes = trial.user_attrs
    return Attempt(
        _cell(task_name, trial),
        trial.number,
        attributes["attempt"],
        attributes["priority"],
        attributes["kills"],
        attributes.get("worker"),
        trial.datetime_start,
        attributes.get("share", 0.0),
    )


def _wait_again(study: optuna.Study, interrupted: Attempt, kills: int = 0) -> None:
    """Put the same attempt into the storage once more."""
    cell, priority, attempt = interrupted.cell, interrupted.priority, interrupted.attempt
    study.add_trial(_waiting_trial(cell, priority, attempt, interrupted.kills + kills))


def _waiting_trial(cell: Cell, priority: float, attempt: int, kills: int = 0) -> FrozenTrial:
    return optuna.trial.create_trial(
        state=TrialState.WAITING,
        params={name: getattr(cell, name) for name in _DISTRIBUTIONS},
        distributions=_DISTRIBUTIONS,
        user_attrs={"optimizer": asdict(cell.optimizer), "priority": priority, "attempt": attempt, "kills": kills},
    )
