"""The trials of a grid in an Optuna storage, which is the only truth about what has run.

One study per task; one Optuna trial per attempt at a cell. Cells are put into the storage as waiting trials, workers
claim them, and a trial's whole result lies in its user attributes. Optuna's grid sampler is not used: it counts a
failed trial as visited.
"""

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

from common.errors import UserError
from common.folders import file_lock
from finetune.trial import Cell

MAX_ATTEMPTS: Final = 2
_INTERRUPTED: Final = "the run was killed"
_LARGEST_INT: Final = 2**31 - 1
_DISTRIBUTIONS: Final = {
    "learning_rate": FloatDistribution(0.0, 1.0),
    "batch_size": IntDistribution(1, _LARGEST_INT),
    "num_epochs": IntDistribution(1, _LARGEST_INT),
    "initialization": CategoricalDistribution(("pretrained", "random")),
    "seed": IntDistribution(0, _LARGEST_INT),
}

optuna.logging.set_verbosity(logging.WARNING)


@dataclass(frozen=True)
class ClaimedTrial:
    """A trial that this worker alone runs."""

    cell: Cell
    number: int
    attempt: int


class TrialStore:
    """The studies of one output folder.

    Args:
        url: storage in SQLAlchemy's form, such as ``sqlite:///G/trials.db``.
        claim_lock: a file on this machine. SQLite cannot compare and set, so that workers take turns to claim;
            PostgreSQL and MySQL lock the trial's row themselves, across machines too.
    """

    def __init__(self, url: str, claim_lock: Path) -> None:
        self._claim_lock = claim_lock
        try:
            self._storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": _connect_arguments(url)})
        except Exception as error:  # whatever SQLAlchemy, the driver or Optuna's schema check raise
            raise UserError(f"the storage {url} cannot be opened: {str(error).splitlines()[0]}") from error

    def task_names(self) -> list[str]:
        """The tasks that have a study."""
        return [study.study_name for study in self._storage.get_all_studies()]

    def open_study(self, task_name: str, fingerprint: dict[str, Any], facts: dict[str, Any]) -> None:
        """Create or reopen a task's study.

        Args:
            task_name: the study's name.
            fingerprint: what all its trials have in common; a study with another one is refused.
            facts: what reports tell about it.

        Raises:
            UserError: the study was made with another fingerprint.
        """
        study = optuna.create_study(
            storage=self._storage, study_name=task_name, direction="maximize", load_if_exists=True
        )
        recorded = study.user_attrs.get("fingerprint", fingerprint)
        different = [name for name in fingerprint if recorded.get(name) != fingerprint[name]]
        if different:
            raise UserError(
                f"the recorded trials of {task_name} were run with another {' and another '.join(different)}:"
                " give another --output_dir, or what they were run with"
            )
        study.set_user_attr("fingerprint", fingerprint)
        study.set_user_attr("facts", facts)

    def facts(self, task_name: str) -> dict[str, Any]:
        """What :meth:`open_study` was told last."""
        return self._study(task_name).user_attrs["facts"]

    def give_back_interrupted(self, task_name: str) -> None:
        """Record trials that a killed run left running as failed; call it only while nobody else can be running."""
        for trial in self._trials(task_name, TrialState.RUNNING):
            self._fail(task_name, trial.number, _INTERRUPTED)

    def enqueue_missing(self, task_name: str, cells: Iterable[Cell]) -> None:
        """Add a waiting trial for each cell that has none waiting, running or finished."""
        states = (TrialState.WAITING, TrialState.RUNNING, TrialState.COMPLETE)
        present = {_cell(task_name, trial) for trial in self._trials(task_name, *states)}
        for cell in cells:
            if cell not in present:
                self._enqueue(cell, attempt=1)

    def _enqueue(self, cell: Cell, attempt: int) -> None:
        parameters = asdict(cell)
        waiting = optuna.trial.create_trial(
            state=TrialState.WAITING,
            params={name: parameters[name] for name in _DISTRIBUTIONS},
            distributions=_DISTRIBUTIONS,
            user_attrs={"attempt": attempt},
        )
        self._study(cell.task_name).add_trial(waiting)

    def claim(self, task_names: Iterable[str], worker: str) -> ClaimedTrial | None:
        """Take the next waiting trial of these tasks for ``worker``; None when there is none left."""
        with file_lock(self._claim_lock):
            for task_name in task_names:
                for trial in self._trials(task_name, TrialState.WAITING):
                    if self._claim(task_name, trial.number, worker):
                        return ClaimedTrial(_cell(task_name, trial), trial.number, trial.user_attrs["attempt"])
        return None

    def _claim(self, task_name: str, number: int, worker: str) -> bool:
        trial_id = self._trial_id(task_name, number)
        try:
            if not self._storage.set_trial_state_values(trial_id, TrialState.RUNNING):
                return False
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        self._storage.set_trial_user_attr(trial_id, "worker", worker)
        return True

    def finish(self, claimed: ClaimedTrial, result: dict[str, Any]) -> None:
        """Record a trial's result, which holds its ``score``."""
        task_name = claimed.cell.task_name
        self._storage.set_trial_user_attr(self._trial_id(task_name, claimed.number), "result", result)
        self._study(task_name).tell(claimed.number, result["score"])

    def fail(self, claimed: ClaimedTrial, cause: str) -> None:
        """Record why a trial has no result, and let it be tried once more unless this was that attempt."""
        self._fail(claimed.cell.task_name, claimed.number, cause)
        if claimed.attempt < MAX_ATTEMPTS:
            self._enqueue(claimed.cell, claimed.attempt + 1)

    def fail_trials_of(self, worker: str, task_names: Iterable[str], cause: str) -> int:
        """:meth:`fail` what a dead worker was running; returns how many trials that were."""
        lost = [
            ClaimedTrial(_cell(task_name, trial), trial.number, trial.user_attrs["attempt"])
            for task_name in task_names
            for trial in self._trials(task_name, TrialState.RUNNING)
            if trial.user_attrs.get("worker") == worker
        ]
        for claimed in lost:
            self.fail(claimed, cause)
        return len(lost)

    def _fail(self, task_name: str, number: int, cause: str) -> None:
        self._storage.set_trial_user_attr(self._trial_id(task_name, number), "failure", cause)
        self._study(task_name).tell(number, state=TrialState.FAIL)

    def num_trials(self, task_names: Iterable[str]) -> tuple[int, int]:
        """How many trials of these tasks are complete, and how many wait or run."""
        counts = [
            [len(self._trials(name, *states)) for name in task_names]
            for states in ((TrialState.COMPLETE,), (TrialState.WAITING, TrialState.RUNNING))
        ]
        return sum(counts[0]), sum(counts[1])

    def results(self, task_name: str) -> dict[Cell, dict[str, Any]]:
        """The result of each finished cell."""
        trials = self._trials(task_name, TrialState.COMPLETE)
        return {_cell(task_name, trial): trial.user_attrs["result"] for trial in trials}

    def failures(self, task_name: str) -> list[tuple[Cell, str]]:
        """Every attempt that failed of itself, with its cause."""
        trials = self._trials(task_name, TrialState.FAIL)
        causes = [(_cell(task_name, trial), trial.user_attrs.get("failure", "unknown")) for trial in trials]
        return [(cell, cause) for cell, cause in causes if cause != _INTERRUPTED]

    def _study(self, task_name: str) -> optuna.Study:
        return optuna.load_study(storage=self._storage, study_name=task_name)

    def _trials(self, task_name: str, *states: TrialState) -> list[FrozenTrial]:
        study_id = self._storage.get_study_id_from_name(task_name)
        return self._storage.get_all_trials(study_id, deepcopy=False, states=states)

    def _trial_id(self, task_name: str, number: int) -> int:
        study_id = self._storage.get_study_id_from_name(task_name)
        return self._storage.get_trial_id_from_study_id_trial_number(study_id, number)


def _cell(task_name: str, trial: FrozenTrial) -> Cell:
    return Cell(task_name=task_name, **trial.params)


def _connect_arguments(url: str) -> dict[str, Any]:
    """SQLite gives up on a busy file after 5 seconds by itself; a machine under load needs more."""
    return {"timeout": 60} if url.startswith("sqlite") else {}
