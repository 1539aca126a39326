"""One machine's part of a search: launch runs at its places, watch them, record what becomes of them.

It holds nothing that the storage and the runs' folders don't hold. A coordinator that is killed takes its runs with it,
which save and leave; the next one goes on.
"""

import contextlib
import shutil
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from common.errors import UserError
from common.folders import errors_of_writing, writer_of
from pretrain.checkpoint import latest_checkpoint, read_state
from pretrain.config import PretrainConfig
from pretrain.interruptions import SLURM_END, Interruptions
from pretrain.launch import Launch, Outcome, RunFolder, cause_of, read_outcome
from pretrain.places import Place
from pretrain.run_record import PAUSE, SUMMARY_FILE, lost_seconds, read_metrics
from pretrain.sampling import is_pruned
from pretrain.search_config import SearchConfig
from pretrain.search_runs import UNFINISHED, SearchRun
from pretrain.study import SearchStore
from pretrain.summary import DIVERGED, read_summary

CHECKPOINTS_FOLDER: Final = "checkpoints"
MAX_FAILURES: Final = 3  # of runs, while none comes to its end or to a rung: then it is no fault of theirs
_MOST: Final = {  # in a row, without coming any further: a person kills at random, a system short of memory for ever
    "kills": 10,
    "errors": 2,
}
_POLL_SECONDS: Final = 0.2
_LOOK_SECONDS: Final = 3.0
_ORPHANS_SECONDS: Final = 600.0
_CANNOT_WRITE: Final = "can't write to"


@dataclass(frozen=True)
class _Start:
    """A start of a run that this coordinator watches over."""

    run: SearchRun
    """As it was claimed."""
    config: PretrainConfig
    folder: RunFolder
    launch: Launch
    signs_of_life: contextlib.ExitStack


class Coordinator:
    """Runs what waits, until the search is over.

    Args:
        config: the search.
        store: its runs.
        data_dir: of all runs.
        runs_dir: where their folders are; machines that share it can go on with each other's runs.
        places: of this machine.
        interruptions: what asks this process to leave.
        show: called every few seconds.
    """

    def __init__(
        self,
        config: SearchConfig,
        store: SearchStore,
        data_dir: Path,
        runs_dir: Path,
        places: Sequence[Place],
        interruptions: Interruptions,
        show: Callable[[], None],
    ) -> None:
        self._config, self._store, self._data_dir, self._runs_dir = config, store, data_dir, runs_dir
        self._places, self._interruptions, self._show = places, interruptions, show
        self._starts: dict[Place, _Start] = {}
        self._elsewhere: set[int] = set()
        self._judged: dict[int, int] = {}  # by run, how many points of its curve Hyperband has seen
        self._dropped: dict[int, str] = {}  # runs that have been asked to leave for good, and why
        self._leaving: str | None = None
        self._error: str | None = None
        self._failures = 0
        self._next_look = 0.0

    def run(self) -> str | None:
        """Until no run waits, runs or is paused, here or on another machine.

        Returns:
            what has asked this process to leave; None where the search is over.

        Raises:
            UserError: runs can't be written, or fail one after the other; those that were running have saved.
        """
        self._wait_for_orphans()
        try:
            while self._goes_on():
                time.sleep(_POLL_SECONDS)
        except BaseException:
            self._ask_all_to_leave()
            raise
        if self._error:
            raise UserError(self._error)
        return self._leaving

    def _goes_on(self) -> bool:
        something_ended = self._settle_ended()
        if not self._leaving and (reason := self._interruptions.pending()):
            self._leave(reason)
        if not something_ended and time.monotonic() < self._next_look:
            return True
        self._look()
        if self._leaving:
            return bool(self._starts)
        self._fill_places()
        return bool(self._starts) or any(run.state in UNFINISHED for run in self._store.runs())

    def _look(self) -> None:
        """Record how far runs have come, judge those that are paused, and tell it."""
        for start in self._starts.values():
            self._report(start)
        self._store.give_back_stale()
        self._store.decide()
        self._remove_checkpoints()
        self._show()
        self._next_look = time.monotonic() + _LOOK_SECONDS

    def _leave(self, reason: str) -> None:
        self._leaving = reason
        self._ask_all_to_leave()

    def _ask_all_to_leave(self) -> None:
        for start in self._starts.values():
            start.launch.ask_to_leave()

    def _fail(self, error: str) -> None:
        """Leave, because what is wrong concerns all runs."""
        self._error = self._error or error
        self._leave("an error")

    def _wait_for_orphans(self) -> None:
        """Runs that a killed coordinator has left behind save and leave; until then their places are not free."""
        deadline, told = time.monotonic() + _ORPHANS_SECONDS, False
        while writers := [writer for folder in self._runs_dir.glob("*/run") if (writer := own_writer(folder))]:
            if time.monotonic() > deadline:
                raise UserError(
                    f"{writers[0]} is still at work in {self._runs_dir}: end it, and run the same command again"
                )
            if not told:
                print("runs of a command that was killed are still leaving: waiting for them", flush=True)
                told = True
            if self._interruptions.pending():
                return
            time.sleep(_POLL_SECONDS)

    # --- starting runs ---

    def _fill_places(self) -> None:
        for place in self._places:
            while place not in self._starts:
                run = self._store.claim(place.name, time.time(), self._may_run)
                if run is None:
                    return
                self._start(run, place)

    def _folder(self, run: SearchRun) -> RunFolder:
        return RunFolder(self._runs_dir / run.name)

    def _may_run(self, run: SearchRun) -> bool:
        """Whether this machine can go on with it, in its folder, where nobody else must be at work any more."""
        folder = self._folder(run).run
        if folder.exists():
            return writer_of(folder) is None
        is_elsewhere = self._store.serves_machines and run.elapsed_seconds > 0
        if is_elsewhere and run.number not in self._elsewhere:
            self._elsewhere.add(run.number)
            print(f"run {run.name} waits for a machine that has its folder: it is not in {self._runs_dir}", flush=True)
        return not is_elsewhere

    def _start(self, run: SearchRun, place: Place) -> None:
        """Launch it, unless its folder shows that it has come to its end, or its pause, already."""
        folder, config = self._folder(run), self._run_config(run)
        if outcome := read_outcome(folder, config):
            self._store.report(run, *course_of(folder, self._in_steps, saved=True))
            self._record(run, folder, outcome)
            return
        with errors_of_writing(folder.folder):
            folder.folder.mkdir(parents=True, exist_ok=True)
            (folder.run / SUMMARY_FILE).unlink(missing_ok=True)  # of an earlier start; it would pass for this one's
        signs_of_life = contextlib.ExitStack()
        signs_of_life.enter_context(self._store.heartbeat(run))
        launch = Launch.start(folder, config, self._data_dir, place)
        self._store.report(run, run.curve, {"starts": run.starts + 1})
        self._starts[place] = _Start(run, config, folder, launch, signs_of_life)
        self._judged[run.number] = len(run.curve)

    def _run_config(self, run: SearchRun) -> PretrainConfig:
        """Up to the next rung at which all pause, or to the end."""
        pauses = self._config.pauses
        pause_at = pauses[run.stretch].at if run.stretch < len(pauses) else None
        return replace(self._config.run_config(run.parameters), pause_at=pause_at)

    # --- watching and ending them ---

    def _report(self, start: _Start) -> None:
        """Tell the storage how far a run has come; it leaves if it is not ours any more, or if Hyperband drops it."""
        run, (curve, course) = start.run, course_of(start.folder, self._in_steps)
        if not self._store.report(run, curve, course):
            start.launch.ask_to_leave()  # this machine gave no sign of life for long: another has taken it over
        elif self._config.hyperband and run.number not in self._dropped:
            self._ask_hyperband(start, curve)

    def _ask_hyperband(self, start: _Start, curve: Sequence[tuple[float, float]]) -> None:
        """Every new point is judged, and once: at the first one behind a rung, against all that is known then."""
        judged = self._judged[start.run.number]
        self._judged[start.run.number] = max(judged, len(curve))
        for number in range(judged + 1, len(curve) + 1):
            if reason := is_pruned(self._config, self._store.runs(), replace(start.run, curve=tuple(curve[:number]))):
                self._dropped[start.run.number] = reason
                start.launch.ask_to_leave()
                return

    @property
    def _in_steps(self) -> bool:
        return self._config.pretrain.max_steps is not None

    def _settle_ended(self) -> bool:
        """Whether a start has ended."""
        ended = [
            (place, start, code) for place, start in self._starts.items() if (code := start.launch.poll()) is not None
        ]
        for place, start, code in ended:
            del self._starts[place]
            with start.signs_of_life:
                self._settle(start, code)
        return bool(ended)

    def _settle(self, start: _Start, code: int) -> None:
        outcome = read_outcome(start.folder, start.config)
        cause = f"{outcome.stopped_by}" if outcome else cause_of(start.folder, code, start.launch.output_offset)
        start.launch.end(code, cause)
        run = start.run
        seconds = run.launch_seconds + time.time() - start.launch.begun
        curve, course = course_of(start.folder, self._in_steps, saved=True)
        if not self._store.report(run, curve, {**course, "launch_seconds": seconds}):
            return
        if self._config.hyperband and not outcome and run.number not in self._dropped:
            self._ask_hyperband(start, curve)
        if outcome:
            self._failures = 0
            self._record(run, start.folder, outcome)
        elif run.number in self._dropped:
            self._store.end(run, "dropped", self._dropped.pop(run.number))
        else:
            self._take_back(
                run, start.folder, code, cause, came_further=course["elapsed_seconds"] > run.elapsed_seconds
            )

    def _record(self, run: SearchRun, folder: RunFolder, outcome: Outcome) -> None:
        """A run has come to its end, or to a rung."""
        loss = read_summary(folder.run).get("validation_loss")
        if outcome.stopped_by == PAUSE:
            self._store.pause(run, self._config.pauses[run.stretch], loss)
        elif outcome.stopped_by == DIVERGED:
            self._store.end(run, "diverged", outcome.because)
        elif outcome.because:  # a rule of its own
            self._store.end(run, "dropped", outcome.because)
        else:
            self._store.end(run, "finished", None, loss)

    def _take_back(self, run: SearchRun, folder: RunFolder, code: int, cause: str, came_further: bool) -> None:
        """A start has ended before its time: the run waits again, or has failed."""
        summary = read_summary(folder.run)
        if summary:  # it was asked to leave, and has saved
            self._store.give_back(run)
            if summary["stopped_by"] == SLURM_END:
                self._leave(SLURM_END)
        elif self._leaving:
            self._store.give_back(run)
        elif cause.startswith(_CANNOT_WRITE):
            self._store.give_back(run)
            self._fail(f"run {run.name}: {cause}")
        else:
            self._count(run, "kills" if _is_kill(code, cause) else "errors", cause, came_further)

    def _count(self, run: SearchRun, what: str, cause: str, came_further: bool) -> None:
        counts = {"kills": 0, "errors": 0} if came_further else {"kills": run.kills, "errors": run.errors}
        counts[what] += 1
        if counts[what] < _MOST[what]:
            self._store.give_back(run, **counts)
            return
        self._store.end(run, "failed", cause)
        self._failures += 1
        print(f"run {run.name} has failed: {cause}", file=sys.stderr, flush=True)
        if self._failures == MAX_FAILURES:
            self._fail(f"{MAX_FAILURES} runs in a row have failed, the last one ({run.name}) with: {cause}")

    def _remove_checkpoints(self) -> None:
        """Of runs that have been dropped: they are what fills disks, and nothing goes on from them."""
        if self._config.keep_dropped_checkpoints:
            return
        for run in self._store.runs():
            folder = self._folder(run).run / CHECKPOINTS_FOLDER
            if run.state == "dropped" and folder.exists():
                shutil.rmtree(folder, ignore_errors=True)


def course_of(
    folder: RunFolder, in_steps: bool, saved: bool = False
) -> tuple[list[tuple[float, float]], dict[str, Any]]:
    """The validation losses of a run, by seconds or by steps, and how far it has come.

    Args:
        folder: of the run.
        in_steps: whether the budget counts steps.
        saved: tell how far it has come on disk, where the next start goes on.
    """
    events = read_metrics(folder.run)
    position = "step" if in_steps else "elapsed_seconds"
    curve = {event[position]: event["loss"] for event in events if event["event"] == "validation"}
    summary, checkpoint = read_summary(folder.run), latest_checkpoint(folder.run)
    course: dict[str, Any] = {
        "elapsed_seconds": 0.0,
        "steps": 0,
        "sequences": 0,
        "lost_seconds": lost_seconds(folder.run),
    }
    if summary:
        names = (*course, "closing_seconds")
        course |= {name: summary[name] for name in names if summary.get(name) is not None}
    elif saved and checkpoint:
        state = read_state(checkpoint)
        course |= {"elapsed_seconds": state.elapsed_seconds, "steps": state.step, "sequences": state.sequences_seen}
    elif events and not saved:
        course |= {"elapsed_seconds": events[-1]["elapsed_seconds"], "steps": events[-1]["step"]}
    return list(curve.items()), course


def _is_kill(code: int, cause: str) -> bool:
    """Whether someone, or the system, has ended the processes; else the run has ended with an error of its own."""
    return code < 0 or "killed" in cause or cause.endswith("no word")


def own_writer(folder: Path) -> str | None:
    """The process of this machine that is at work in a folder."""
    writer = writer_of(folder)
    return writer if writer and writer.endswith(f" on {socket.gethostname()}") else None
