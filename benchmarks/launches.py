"""Runs as a user starts them, watched from outside: launched by ``deepspeed``, found by their folder."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import psutil

REPOSITORY = Path(__file__).parent.parent
COMPLETE = ("time_budget", "max_steps", "early_stop")
POLL_SECONDS = 0.005
_LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class LaunchedRun:
    """A run folder and the command that starts it, the same each time."""

    folder: Path
    command: list[str]

    @property
    def log(self) -> Path:
        """What all its starts have printed."""
        return self.folder.with_suffix(".log")

    def start(self) -> subprocess.Popen:
        """Start the command, in a session of its own."""
        environment = {name: value for name, value in os.environ.items() if name not in _LAUNCHER_VARIABLES}
        with self.log.open("a") as log:
            return subprocess.Popen(
                self.command,
                cwd=REPOSITORY,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def events(self) -> list[dict[str, Any]]:
        """All lines of metrics.jsonl as they are, taken back or not; one that a kill cut short is passed over."""
        try:
            lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
        except FileNotFoundError:
            return []
        return [event for line in lines if (event := _json_or_none(line))]

    def clock_reading(self) -> tuple[float, float]:
        """The system's time when the last line of metrics.jsonl was written, and the elapsed seconds that it tells."""
        file = self.folder / "metrics.jsonl"
        while True:
            written = file.stat().st_mtime
            elapsed = self.events()[-1]["elapsed_seconds"]
            if file.stat().st_mtime == written:
                return written, elapsed

    def status(self) -> dict[str, Any]:
        """What rank 0 is doing: ``status.json``, empty before there is one."""
        return self._read("status.json")

    def summary(self) -> dict[str, Any]:
        """How the run ended, empty while it has not."""
        return self._read("summary.json")

    @property
    def is_complete(self) -> bool:
        """Whether it has come to its end."""
        return self.summary().get("stopped_by") in COMPLETE

    def processes(self) -> dict[str, psutil.Process]:
        """All that have the folder in their command line, by role: ``deepspeed``, ``launch.py``, ``rank 0`` ..."""
        found = {}
        for process in psutil.process_iter():
            try:
                if str(self.folder) in process.cmdline():
                    found[_role(process)] = process
            except psutil.Error:
                continue  # it has just ended
        return found

    def last_words(self) -> str:
        """The last line of the log that tells something."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        errors = [line for line in lines if "rror" in line]
        return (errors or lines or ["nothing was printed"])[-1].strip()[:200]

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return _json_or_none((self.folder / name).read_text(encoding="utf-8")) or {}
        except FileNotFoundError:
            return {}


def launched_run(folder: Path, config: Path, data: Path, *overrides: str) -> LaunchedRun:
    """Two processes under the ``deepspeed`` launcher, at a port that is free now."""
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", "--master_port", str(_free_port())]
    folders = ["--config", str(config), "--data_dir", str(data), "--output_dir", str(folder)]
    return LaunchedRun(folder, [*launcher, "run_pretraining.py", *folders, *overrides])


def is_alive(process: psutil.Process) -> bool:
    """Whether it still runs; one that has ended and that nobody has asked about is dead."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it has come true within that time."""
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    return met


def step_seconds(events: list[dict[str, Any]]) -> list[float]:
    """How long the steps took that follow directly on another one; needs a line of the log for each."""
    return [
        after["elapsed_seconds"] - before["elapsed_seconds"]
        for before, after in pairwise(events)
        if before["event"] == after["event"] == "train" and after["step"] == before["step"] + 1
    ]


def _role(process: psutil.Process) -> str:
    if any("deepspeed.launcher.launch" in part for part in process.cmdline()):
        return "launch.py"
    rank = process.environ().get("RANK")
    return "deepspeed" if rank is None else f"rank {rank}"


def _json_or_none(text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
