"""The runs of a search in an Optuna storage, which is the only truth about what has run.

One Optuna trial is one run for its whole life. It waits, runs, waits again when it is paused at a rung or has been
interrupted, and ends complete (the whole budget), pruned (dropped or diverged) or failed. Only a run whose machine has
died gets a second trial, because Optuna fails the first one. Curves are intermediate values, so that Optuna's own tools
show them; all else lies in user attributes.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import optuna
from optuna.trial import FrozenTrial, TrialState

from common.errors import UserError
from common.storage import HEARTBEAT_SECONDS, STALE_SECONDS, SharedStorage
from pretrain.rungs import Rung, verdict
from pretrain.sampling import distributions, propose
from pretrain.search_config import SearchConfig
from pretrain.search_runs import SearchRun, State

STUDY_NAME: Final = "pretraining search"
_ENDS: Final[Mapping[State, TrialState]] = {
    "finished": TrialState.COMPLETE,
    "dropped": TrialState.PRUNED,
    "diverged": TrialState.PRUNED,
    "failed": TrialState.FAIL,
}
_CHANGES_TOLD: Final = 3
_RECORDED: Final = tuple(
    field.name
    for field in dataclasses.fields(SearchRun)
    if field.name not in ("number", "parameters", "state", "curve", "final_loss", "trial")
)


class SearchStore:
    """The study of one search, which any number of coordinators on any machines share.

    Args:
        url: of the storage, see :class:`common.storage.SharedStorage`.
        config: the search.
        heartbeat_seconds: between two signs of life of a run.
        stale_seconds: after so long without one, a run is given back.

    Raises:
        UserError: the storage can't be opened.
    """

    def __init__(
        self,
        url: str,
        config: SearchConfig,
        heartbeat_seconds: int = HEARTBEAT_SECONDS,
        stale_seconds: int = STALE_SECONDS,
    ) -> None:
        self._shared = SharedStorage(url, _wait_anew, heartbeat_seconds, stale_seconds)
        self._storage = self._shared.trials
        self._config = config
        self._study: optuna.Study | None = None

    @property
    def serves_machines(self) -> bool:
        """Whether coordinators on other machines may use it, too."""
        return self._shared.serves_machines

    @property
    def _study_id(self) -> int:
        return self._storage.get_study_id_from_name(STUDY_NAME)

    # --- the study ---

    def check(self, fingerprint: Mapping[str, Any]) -> None:
        """Refuse a storage that holds anything else than this search, and write nothing.

        Raises:
            UserError: it holds another study, or runs of another budget (data, model, hardware, code ...).
        """
        for study in self._storage.get_all_studies():
            if study.study_name != STUDY_NAME:
                raise UserError(
                    f"the storage holds a study '{study.study_name}' of something else: give this search one of its own"
                )
            if recorded := study.user_attrs.get("fingerprint"):  # else a kill, or another machine, was quicker
                _refuse_another(recorded, fingerprint)

    def open(self, fingerprint: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
        """Create or reopen the study, :meth:`check` once more included; ``facts`` are what reports tell about it."""
        with self._shared.exclusive():
            self.check(fingerprint)
            optuna.create_study(storage=self._storage, study_name=STUDY_NAME, direction="minimize", load_if_exists=True)
            self._study = self._load()
            if (begun := len(self.runs())) > self._config.num_planned:
                raise UserError(f"num_runs {self._config.num_planned} is less than the {begun} that there are")
            self._study.set_user_attr("fingerprint", fingerprint)
            self._study.set_user_attr("facts", {**self.facts(), **facts})

    def reopen(self) -> bool:
        """Look at what is there and write nothing; False where there is no search."""
        names = [study.study_name for study in self._storage.get_all_studies() if "facts" in study.user_attrs]
        if STUDY_NAME in names:
            self._study = self._load()
        return STUDY_NAME in names

    def facts(self) -> dict[str, Any]:
        """What :meth:`open` has been told."""
        return self._study.user_attrs.get("facts", {})

    def _load(self) -> optuna.Study:
        return optuna.load_study(storage=self._storage, study_name=STUDY_NAME)

    # --- runs that wait, and those who take them ---

    def add_missing(self, nobody_runs: bool) -> None:
        """Have every configuration of a grid that is not there wait, and what has failed wait once more.

        Args:
            nobody_runs: whether what is running was left behind by a coordinator that is no more.
        """
        with self._shared.exclusive():
            runs = self.runs()
            for run in runs:
                if run.state == "failed":
                    self._try_again(run)
                elif run.state == "running" and nobody_runs:
                    self.give_back(run)
            if self._config.sampler == "grid":
                known = [dict(run.parameters) for run in runs]
                missing = [parameters for parameters in self._config.grid() if parameters not in known]
                for number, parameters in enumerate(missing, len(runs)):
                    self._add(parameters, {"run": number})

    def _try_again(self, run: SearchRun) -> None:
        failed = self._newest()[run.number]
        _wait_anew(self._study, failed, end=None, because=None, kills=0, errors=0)

    def claim(self, place: str, started: float, may_run: Callable[[SearchRun], bool]) -> SearchRun | None:
        """Take a run that waits and ``may_run``: one with the longest way to go; None when there is none.

        Where a sampler chooses, and every run before the first rung is under way, it chooses another one.
        """
        with self._shared.exclusive():
            runs = self.runs()
            waiting = [run for run in runs if run.state == "waiting" and may_run(run)]
            if len(runs) < self._config.num_planned and not any(run.stretch == 0 for run in waiting):
                waiting = [self._add_proposed(runs)]
            if not waiting:
                return None
            run = min(waiting, key=lambda run: (run.stretch, run.elapsed_seconds, run.number))
            trial_id = self._trial_id(run)
            self._shared.take(trial_id, place=place, started=started)
            return self._run(run.number)

    def _add_proposed(self, runs: Sequence[SearchRun]) -> SearchRun:
        self._add(propose(self._config, runs), {"run": len(runs)})
        return self._run(len(runs))

    def heartbeat(self, run: SearchRun) -> contextlib.AbstractContextManager[None]:
        """Show signs of life of a run meanwhile."""
        return self._shared.heartbeat(self._trial_id(run))

    def give_back_stale(self) -> None:
        """Let runs wait again whose machine has shown no sign of life for too long."""
        with self._shared.exclusive():
            self._shared.give_back_stale(self._study)

    # --- what becomes of a run; each of these is False where it has been given back to others meanwhile ---

    def report(self, run: SearchRun, curve: Sequence[tuple[float, float]], course: Mapping[str, Any]) -> bool:
        """Record how far a run has come.

        Args:
            run: that is running.
            curve: its validation losses by seconds or steps, as :class:`SearchRun` has them.
            course: fields of :class:`SearchRun` like ``elapsed_seconds``.
        """
        trial_id = self._trial_id(run)
        trial = self._storage.get_trial(trial_id)
        attributes = {
            "curve": [list(point) for point in curve],
            "course": {**trial.user_attrs.get("course", {}), **course},
        }
        changed = {name: value for name, value in attributes.items() if trial.user_attrs.get(name) != value}
        try:
            for position, loss in curve:
                if trial.intermediate_values.get(int(position)) != loss:
                    self._storage.set_trial_intermediate_value(trial_id, int(position), loss)
            for name, value in changed.items():
                self._storage.set_trial_user_attr(trial_id, name, value)
        except optuna.exceptions.UpdateFinishedTrialError:
            return False
        return not trial.state.is_finished()

    def pause(self, run: SearchRun, rung: Rung, loss: float) -> bool:
        """A run has come to a rung: it waits there for :meth:`decide`."""
        # In this order: a kill may come after each of them, and what is paused is judged by its loss.
        return self._wait(run, rung_losses={**run.rung_losses, rung.at: loss}, paused=True)

    def give_back(self, run: SearchRun, **counts: int) -> bool:
        """Let a run that was interrupted wait again; ``counts`` are its ``kills`` and ``errors`` in a row."""
        return self._wait(run, **counts)

    def end(self, run: SearchRun, state: State, because: str | None, loss: float | None = None) -> bool:
        """Record how a run has ended, and its final loss where it has finished."""
        attributes = {"end": state, "because": because, "place": None}
        return self._shared.end(self._trial_id(run), _ENDS[state], loss, attributes)

    def _wait(self, run: SearchRun, **attributes: Any) -> bool:
        return self._shared.end(self._trial_id(run), TrialState.WAITING, None, {**attributes, "place": None})

    def decide(self) -> None:
        """Judge the runs that are paused at a rung: who is certain to be among the best goes on, who can't be is
        dropped (Izsak et al. 2021, 4.2)."""
        with self._shared.exclusive():
            runs = self.runs()
            to_come = self._config.num_planned - len(runs)
            for stretch, rung in enumerate(self._config.pauses):
                losses = [(run.rung_losses[rung.at], run.number) for run in runs if rung.at in run.rung_losses]
                num_open = to_come + sum(
                    run.state in ("waiting", "running", "paused") and rung.at not in run.rung_losses for run in runs
                )
                for run in runs:
                    if run.state == "paused" and run.stretch == stretch:
                        self._judge(
                            run, rung, verdict(losses, (run.rung_losses[rung.at], run.number), num_open, rung.share)
                        )

    def _judge(self, run: SearchRun, rung: Rung, found: str | None) -> None:
        if found == "goes on":
            self._wait(run, paused=False, stretch=run.stretch + 1)
        elif found == "dropped":
            loss = run.rung_losses[rung.at]
            self.end(run, "dropped", f"validation loss {loss:.4f} at {rung.at} is not among the {rung.keep}")

    # --- what there is ---

    def runs(self) -> list[SearchRun]:
        """Every run, by its number."""
        return [_search_run(trial) for trial in self._newest().values()]

    def _run(self, number: int) -> SearchRun:
        return _search_run(self._newest()[number])

    def _newest(self) -> dict[int, FrozenTrial]:
        """By run, the trial that counts: the last one."""
        trials = self._storage.get_all_trials(self._study_id, deepcopy=False)
        newest = {trial.user_attrs["run"]: trial for trial in trials}
        return dict(sorted(newest.items()))

    def _trial_id(self, run: SearchRun) -> int:
        return self._storage.get_trial_id_from_study_id_trial_number(self._study_id, run.trial)

    def _add(self, parameters: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        self._study.add_trial(
            optuna.trial.create_trial(
                state=TrialState.WAITING,
                params=dict(parameters),
                distributions=distributions(self._config.space),
                user_attrs=dict(attributes),
            )
        )


def _refuse_another(recorded: Mapping[str, Any], fingerprint: Mapping[str, Any]) -> None:
    different = [name for name in {**recorded, **fingerprint} if recorded.get(name) != fingerprint.get(name)]
    if different:
        changes = [f"{name} was {recorded.get(name)}, is {fingerprint.get(name)}" for name in different[:_CHANGES_TOLD]]
        more = f"; and {len(different) - _CHANGES_TOLD} more" if len(different) > _CHANGES_TOLD else ""
        raise UserError(
            f"a search never mixes budgets, and this one was begun differently ({'; '.join(changes)}{more}): go on with"
            " what it was begun with, or give another --output_dir and storage"
        )


def _wait_anew(study: optuna.Study, trial: FrozenTrial, **attributes: Any) -> None:
    """A trial in the place of one that has failed, which Optuna does where a machine gives no more signs of life."""
    study.add_trial(
        optuna.trial.create_trial(
            state=TrialState.WAITING,
            params=trial.params,
            distributions=trial.distributions,
            user_attrs={**trial.user_attrs, "place": None, **attributes},
            intermediate_values=trial.intermediate_values,
        )
    )


def _search_run(trial: FrozenTrial) -> SearchRun:
    attributes = trial.user_attrs
    told = {**attributes, **attributes.get("course", {})}
    recorded = {name: told[name] for name in _RECORDED if told.get(name) is not None}
    curve = tuple((position, loss) for position, loss in attributes.get("curve", ()))
    own = (attributes["run"], trial.params, _state(trial))
    return SearchRun(*own, curve=curve, final_loss=trial.value, trial=trial.number, **recorded)


def _state(trial: FrozenTrial) -> State:
    if trial.state == TrialState.WAITING:
        return "paused" if trial.user_attrs.get("paused") else "waiting"
    return "running" if trial.state == TrialState.RUNNING else trial.user_attrs.get("end", "failed")
