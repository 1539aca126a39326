"""Kills of a run, one after another: when, whom, and what came of it, all seen from outside."""

import sys
import time
from dataclasses import dataclass, field
from typing import Any

import psutil

from benchmarks.kill_checks import Position, allowance, check_end, last_step, newest_checkpoint, position_of_newest
from benchmarks.launches import LaunchedRun, is_alive, wait_until
from common.errors import UserError

PHASES = ("training", "validation", "saving", "closing")
TARGETS = ("all", "deepspeed", "rank 1", "launch.py", "rank 0")
CHECKPOINT_SHARE, VALIDATION_SHARE = 0.1, 0.15  # of the budget
# A kill comes at random within so many seconds of a phase; one that is over by then is waited for again.
DELAYS = {"training": 3.0, "validation": 0.4, "saving": 0.4, "closing": 0.8}
START_SECONDS = 180.0  # within which a start has to make its first step
LEAVE_SECONDS = 60.0  # within which the rest of the processes has to leave
LAST_SECONDS = 3.0  # before its end, in which a run may complete although it was hit
HEAD = "kill|run|target|phase|step|resumed from|s lost|s until all gone|started again|outcome".split("|")


@dataclass(frozen=True)
class Wish:
    """A kill to come."""

    phase: str
    target: str
    passed_over: int
    """Occasions that go by before it."""
    place: float
    """Where in the phase, from 0 to 1."""
    at_once: bool
    """Whether the command is started again before the others have left."""


@dataclass
class Kill:
    """A kill that has been, and what came of it."""

    number: int
    run: int
    target: str
    phase: str
    step: int
    resumed_from: int | None = None
    lost_seconds: float | None = None
    gone_seconds: float | None = None
    started_again: str = "after"
    left_as: str | None = None
    outcome: str = ""
    wrong: list[str] = field(default_factory=list)


def as_cells(kill: Kill) -> list[str]:
    """A row of the table."""
    outcome = f"{kill.outcome} ({kill.left_as})" if kill.left_as and kill.outcome == "went on" else kill.outcome
    values = [kill.number, kill.run, kill.target, kill.phase, kill.step, kill.resumed_from, kill.lost_seconds]
    values += [kill.gone_seconds, kill.started_again, "; ".join(["FAILED", *kill.wrong]) if kill.wrong else outcome]
    return ["" if value is None else str(value) for value in values]


def as_row(kill: Kill) -> str:
    """The same for whoever waits."""
    return " | ".join(as_cells(kill))


class StartFailed(Exception):
    """A start that did not come to its first step."""


class Start:
    """One start of the command, from outside.

    Args:
        run: what is started.
        rank_0_before: process number of the previous start's rank 0, whose status may still be there.
    """

    def __init__(self, run: LaunchedRun, rank_0_before: int | None) -> None:
        self._run = run
        self._rank_0_before = rank_0_before
        self._starts_before = len(self._start_events())
        self._launcher = run.start()
        self._reading: tuple[float, float] | None = None

    def await_event(self) -> dict[str, Any] | None:
        """The line that tells where it goes on from; None when it ended because the run is complete already."""
        wait_until(lambda: len(self._start_events()) > self._starts_before or not self.is_running, START_SECONDS)
        events = self._start_events()
        if len(events) > self._starts_before:
            self._reading = self._run.clock_reading()
            return events[self._starts_before]
        if not self.is_running and self._run.is_complete:
            return None
        raise StartFailed(f"the start came to nothing: {self._run.last_words()}")

    def await_first_step(self, step: int) -> None:
        """Wait for a step beyond ``step``, or for the closing where no other is left."""
        wait_until(lambda: self._is_beyond(step) or not self.is_running, START_SECONDS)
        if not self._is_beyond(step):
            raise StartFailed(f"no step beyond {step}: {self._run.last_words()}")
        self.processes = self._run.processes()

    def phase(self) -> str:
        """What it is doing, by its own word."""
        status = self._run.status()
        return status["phase"] if status and status["pid"] != self._rank_0_before else "starting"

    def await_moment(self, wish: Wish) -> bool:
        """Wait for the moment of a kill, False if the run ends before there is one."""
        passed_over, place = wish.passed_over, wish.place
        while wait_until(lambda: self.phase() == wish.phase or not self.is_running, START_SECONDS) and self.is_running:
            if not passed_over:
                time.sleep(place * DELAYS[wish.phase])
                if self.phase() == wish.phase:
                    return True
                place /= 2
            passed_over = max(0, passed_over - 1)
            wait_until(lambda: self.phase() != wish.phase or not self.is_running, START_SECONDS)
        return False

    @property
    def is_running(self) -> bool:
        """Whether the launcher's process is there."""
        return self._launcher.poll() is None

    def clock_drift(self) -> float:
        """Seconds by which the run's clock and the system's have parted since the start went on."""
        assert self._reading
        (written_then, elapsed_then), (written, elapsed) = self._reading, self._run.clock_reading()
        return (elapsed - elapsed_then) - (written - written_then)

    def await_end(self) -> None:
        """Wait until it leaves by itself."""
        if not wait_until(lambda: not self.is_running, START_SECONDS):
            raise StartFailed("the run does not end")

    def _start_events(self) -> list[dict[str, Any]]:
        return [event for event in self._run.events() if event["event"] == "start"]

    def _is_beyond(self, step: int) -> bool:
        return last_step(self._run.events()).step > step or self.phase() in ("closing", "done") or self._run.is_complete


@dataclass(frozen=True)
class Moment:
    """Of a kill: how things stood."""

    time: float
    """The system's, in seconds."""
    elapsed_seconds: float
    """By the run's clock."""
    checkpoint: Position
    """That `latest` pointed at."""
    step: Position
    """The last one done."""
    allowance: float
    """Seconds that may be lost beyond the checkpoint interval."""


class Attack:
    """One run, killed again and again.

    Args:
        number: of the run.
        run: the victim.
        budget_seconds: of the run.
        kills: where what happens is noted, kills of earlier runs included.
    """

    def __init__(self, number: int, run: LaunchedRun, budget_seconds: float, kills: list[Kill]) -> None:
        self._number = number
        self._run = run
        self._budget_seconds = budget_seconds
        self._kills = kills
        self.clock_drifts: list[float] = []
        """Of each start that was killed before the closing, in seconds."""

    def carry_out(self, wishes: list[Wish]) -> tuple[list[Wish], dict[str, Any], list[str]]:
        """Kill, and let the run complete: wishes that were not met, figures of the run, what is wrong at its end."""
        unmet = list(wishes)
        try:
            start = Start(self._run, None)
            event = start.await_event()
            while event:
                start.await_first_step(event["step"])
                if not unmet or not start.await_moment(unmet[0]):
                    break
                start, event = self._kill(start, unmet.pop(0))
            start.await_end()
            return unmet, *check_end(self._run, self._budget_seconds)
        except StartFailed as failure:
            return unmet, {}, [str(failure)]
        finally:
            kill_all(list(self._run.processes().values()))

    def _kill(self, start: Start, wish: Wish) -> tuple[Start, dict[str, Any] | None]:
        """One kill and the start after it, with its event: None where the run is complete."""
        run, processes = self._run, start.processes
        victims = list(processes.values()) if wish.target == "all" else [processes[wish.target]]
        checkpoint, phase, killed_at = position_of_newest(run), start.phase(), time.time()
        kill_all(victims)
        moment = self._moment(killed_at, phase, checkpoint)
        if phase != "closing":
            self.clock_drifts.append(start.clock_drift())
        kill = Kill(len(self._kills) + 1, self._number, wish.target, phase, moment.step.step)
        self._kills.append(kill)
        rank_0 = processes["rank 0"].pid
        again = Start(run, rank_0) if wish.at_once else None
        kill.started_again = "at once" if again else "after"
        self._await_leaving(kill, list(processes.values()), moment)
        kill.left_as = run.summary().get("stopped_by")
        try:
            found = newest_checkpoint(run)
            again = again or Start(run, rank_0)
            event = again.await_event()
            self._judge(kill, moment, found, event)
        except (UserError, StartFailed) as error:
            kill.wrong.append(str(error))
            raise StartFailed(f"after kill {kill.number}: {error}") from None
        finally:
            print(as_row(kill), file=sys.stderr, flush=True)
        return again, event

    def _moment(self, killed_at: float, phase: str, checkpoint: Position) -> Moment:
        (written, elapsed), events = self._run.clock_reading(), self._run.events()
        ticking = 0.0 if phase == "closing" else max(0.0, killed_at - written)
        return Moment(killed_at, elapsed + ticking, checkpoint, last_step(events), allowance(events))

    def _await_leaving(self, kill: Kill, processes: list[psutil.Process], moment: Moment) -> None:
        alive = lambda: [process for process in processes if is_alive(process)]  # noqa: E731
        if not wait_until(lambda: not alive(), LEAVE_SECONDS):
            kill.wrong.append(f"{len(alive())} processes did not leave within {LEAVE_SECONDS:.0f} s")
            kill_all(alive())
        kill.gone_seconds = round(time.time() - moment.time, 1)

    def _judge(self, kill: Kill, moment: Moment, found: Position, event: dict[str, Any] | None) -> None:
        """Where the run goes on from, and what that lost.

        Args:
            kill: is told what is wrong.
            moment: of the kill.
            found: the newest checkpoint when all processes were gone.
            event: the next start's.
        """
        if event is None:
            kill.outcome, kill.lost_seconds = "had completed", 0.0
            left_over = self._budget_seconds - moment.elapsed_seconds
            if kill.phase != "closing" and left_over > LAST_SECONDS:
                kill.wrong.append(f"trained on for {left_over:.1f} s after the kill")
            return
        kill.outcome, kill.resumed_from = "went on", event["step"]
        kill.lost_seconds = round(max(0.0, moment.elapsed_seconds - event["elapsed_seconds"]), 2)
        if event["step"] != found.step or found.step < moment.checkpoint.step:
            steps = f"{moment.checkpoint.step} at the kill, {found.step} afterwards"
            kill.wrong.append(f"the newest checkpoint was of step {steps}, the run goes on from {event['step']}")
        lost = moment.step.elapsed_seconds - event["elapsed_seconds"]
        if lost > (allowed := CHECKPOINT_SHARE * self._budget_seconds + moment.allowance):
            kill.wrong.append(f"{lost:.2f} s of training lost, {allowed:.2f} s allowed")


def kill_all(processes: list[psutil.Process]) -> None:
    """SIGKILL to each that still is there."""
    for process in processes:
        try:
            process.kill()
        except psutil.NoSuchProcess:
            continue
