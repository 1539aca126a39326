"""A machine that nobody has: a coordinator's runs train without processes, and time passes only while it waits."""

import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy

from common.folders import write_json, write_text
from pretrain import coordinator
from pretrain.checkpoint import Setting, TrainState, latest_checkpoint, read_state
from pretrain.config import PretrainConfig
from pretrain.coordinator import Coordinator
from pretrain.early_stop import EarlyStop
from pretrain.launch import RunFolder
from pretrain.places import Place
from pretrain.search_config import SearchConfig
from pretrain.study import SearchStore
from pretrain.summary import write_summary

RUN_SECONDS = 16
"""Of every run; a step takes a second."""
INTERVAL = 2
"""Seconds between two validations, each with a checkpoint."""


def final_loss(config: PretrainConfig) -> float:
    """What a run comes to: the seed decides, and the lowest is the best."""
    return 2.0 + 0.1 * config.seed


def loss_after(config: PretrainConfig, step: int) -> float:
    """The validation loss on the way there."""
    return final_loss(config) + 5.0 * (RUN_SECONDS - step) / RUN_SECONDS


@dataclass(frozen=True)
class Fate:
    """How a start ends before its time."""

    after: int
    """seconds of its work"""
    code: int
    says: str = ""
    diverged: bool = False


KILLED = -9
NO_ROOM = "error: can't write to /data (No space left on device): mend that"


class Machine:
    """Stands in for :class:`pretrain.launch.Launch`, and for the clock of the coordinator.

    Args:
        fates: by run, of its starts in order; None for one that nothing happens to.
    """

    def __init__(self, fates: dict[int, Sequence[Fate | None]] | None = None) -> None:
        self.now = 0.0
        self.launches: list[MadeLaunch] = []
        self.at: dict[float, Callable[[], Any]] = {}  # what happens when
        self.always: list[Callable[[], Any]] = []
        self._fates = defaultdict(list, {number: list(fates) for number, fates in (fates or {}).items()})

    def start(self, folder: RunFolder, config: PretrainConfig, data_dir: Path, place: Place) -> "MadeLaunch":
        assert place not in [launch.place for launch in self.living()], "two runs at one place"
        fates = self._fates[int(folder.folder.name)]
        checkpoint = latest_checkpoint(folder.run)
        step = read_state(checkpoint).step if checkpoint else 0
        launch = MadeLaunch(self, folder, config, place, step, fates.pop(0) if fates else None)
        self.launches.append(launch)
        return launch

    def living(self) -> list["MadeLaunch"]:
        return [launch for launch in self.launches if launch.code is None]

    def of(self, number: int) -> list["MadeLaunch"]:
        """The starts of a run."""
        return [launch for launch in self.launches if launch.number == number]

    def sleep(self, seconds: float) -> None:
        """What passes while the coordinator waits."""
        for happen in self.always:
            happen()
        self.now += seconds
        for launch in self.living():
            launch.work()
        for moment in [moment for moment in self.at if moment <= self.now]:
            self.at.pop(moment)()


@dataclass
class MadeLaunch:
    """A start of a run, which trains a step a second."""

    machine: Machine
    folder: RunFolder
    config: PretrainConfig
    place: Place
    first_step: int
    fate: Fate | None
    code: int | None = None
    asked: bool = False
    output_offset: int = 0
    begun: float = field(init=False)
    step: int = field(init=False)

    def __post_init__(self) -> None:
        self.begun, self.step = self.machine.now, self.first_step
        self.number = int(self.folder.folder.name)
        self._stop = EarlyStop(self.config.stop_rules, None, {})
        self._log("start")
        if self.folder.output.exists():
            self.output_offset = self.folder.output.stat().st_size

    # --- as the coordinator sees it ---

    def poll(self) -> int | None:
        return self.code

    def ask_to_leave(self) -> None:
        self.asked = True

    def end(self, code: int, cause: str) -> None:
        assert self.code == code
        self.cause = cause

    # --- what it does ---

    def work(self) -> None:
        """Come as far as the clock has."""
        while self.code is None and self.step < self.first_step + int(self.machine.now - self.begun):
            self.step += 1
            self._log("train", loss=loss_after(self.config, self.step))
            self._after_step()
        if self.code is None and self.asked:
            self.leave("SIGTERM")

    def leave(self, because: str) -> None:
        """Save and end before its time."""
        self._save()
        self._end(because, None, 75, f"stopped by {because} after step {self.step}\n")

    def _after_step(self) -> None:
        if self.fate and self.step == self.first_step + self.fate.after:
            if self.fate.diverged:
                self._end("diverged", self.fate.says, self.fate.code)
            else:
                self._print(self.fate.says)
                self.code = self.fate.code
        elif self.step % INTERVAL == 0:
            self._validate()

    def _validate(self) -> None:
        loss, progress = loss_after(self.config, self.step), self.step / RUN_SECONDS
        self._log("validation", loss=loss)
        self._save()
        if broken := self._stop.check("validation_loss", loss, progress):
            self._end("early_stop", broken, 0, loss=loss)
        elif progress == 1:
            self._end("max_steps", None, 0, loss=final_loss(self.config))
        elif progress == self.config.pause_share and self.step > self.first_step:
            self._end("pause", f"pause_at {self.config.pause_at}", 75, loss=loss)

    def _save(self) -> None:
        checkpoint = self.folder.run / "checkpoints" / f"step-{self.step:06d}"
        spent = {"training": float(self.step)}
        state = TrainState(self.step, 4 * self.step, 0, spent, 4, {}, None, {}, None, Setting("", {}, "adamw", 0, 1))
        write_json(checkpoint / "state.json", asdict(state))
        write_text(checkpoint.parent / "latest", checkpoint.name)

    def _end(self, by: str, because: str | None, code: int, says: str = "", loss: float | None = None) -> None:
        told = {"steps": self.step, "sequences": 4 * self.step, "elapsed_seconds": float(self.step)}
        ended = {"stopped_by": by, "stopped_because": because, "validation_loss": loss}
        write_summary(self.folder.run, {**told, **ended}, {})
        self._print(says)
        self.code = code

    def _log(self, event: str, **values: float) -> None:
        self.folder.run.mkdir(parents=True, exist_ok=True)
        with (self.folder.run / "metrics.jsonl").open("a") as file:
            entry = {"event": event, "step": self.step, "elapsed_seconds": float(self.step), **values}
            file.write(json.dumps(entry) + "\n")

    def _print(self, text: str) -> None:
        with self.folder.output.open("a") as file:
            file.write(text)


class Asked:
    """Stands in for :class:`pretrain.interruptions.Interruptions`."""

    reason: str | None = None

    def pending(self) -> str | None:
        return self.reason


@dataclass
class MadeSearch:
    """A search in a folder, on a machine that nobody has."""

    config: SearchConfig
    folder: Path
    machine: Machine
    num_places: int = 2
    heartbeat_seconds: int = 15
    asked: Asked = field(default_factory=Asked)
    store: SearchStore = field(init=False)

    def __post_init__(self) -> None:
        self.store = self.open()

    @property
    def runs_dir(self) -> Path:
        return self.folder / "runs"

    def open(self) -> SearchStore:
        """The storage, as another process has it."""
        store = SearchStore(f"sqlite:///{self.folder / 'trials.db'}", self.config)
        engine = store._storage.engine
        sqlalchemy.event.listen(engine, "connect", lambda link, _: link.execute("PRAGMA synchronous = OFF"))
        store._storage.remove_session()
        engine.dispose()  # from now on it waits for no disk
        store.check({})
        store.open({}, {})
        return store

    def run(self, monkeypatch: pytest.MonkeyPatch) -> str | None:
        """The same command, once more."""
        clock = SimpleNamespace(
            sleep=self.machine.sleep, monotonic=lambda: self.machine.now, time=lambda: self.machine.now
        )
        monkeypatch.setattr(coordinator, "time", clock)
        monkeypatch.setattr(coordinator, "Launch", self.machine)
        self.store.add_missing(nobody_runs=True)
        places = [Place(f"here, core {core}", 1, (), (core,)) for core in range(self.num_places)]
        shown = lambda: None  # noqa: E731
        arguments = (self.config, self.store, self.folder, self.runs_dir, places, self.asked, shown)
        return Coordinator(*arguments).run()

    def states(self) -> list[str]:
        return [run.state for run in self.store.runs()]
