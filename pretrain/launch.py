"""A run as a command of its own: started by DeepSpeed's launcher at a place of this machine, watched, ended, asked why.

The processes of a start are a session of the system's, by which they are found whoever of them has ended. They know who
has started them (:data:`common.process_tree.COORDINATOR`), and save and leave when that process is gone.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import psutil
import yaml

from common.errors import UserError
from common.folders import errors_of_writing, plain, read_json, write_text
from common.process_tree import COORDINATOR
from pretrain.config import PretrainConfig
from pretrain.places import VISIBLE_DEVICES, Place
from pretrain.run_record import COMPLETE, PAUSE, STATUS_FILE
from pretrain.summary import DIVERGED, read_summary

PROGRAM: Final = Path(__file__).parent.parent / "run_pretraining.py"
_LEAVING_SECONDS: Final = 600.0  # for ranks without a launcher, to save and leave
_DYING_SECONDS: Final = 60.0  # for what has been killed; drivers may hold it for a while
_LOOK_SECONDS: Final = 0.02
_OTHERS_VARIABLES: Final = re.compile(  # of a launcher that has started this process
    r"((LOCAL|GROUP|ROLE)_)?(RANK|WORLD_SIZE)|LOCAL_SIZE|MASTER_(ADDR|PORT)|CROSS_(RANK|SIZE)|TORCHELASTIC_\w+"
)
_LEFT: Final = re.compile(r"^(stopped by \w+) after step", re.MULTILINE)
_KILLED: Final = re.compile(r"exitcode\s*: -9|exits with return code = -9")  # as torchrun and DeepSpeed tell it
_ERROR_LINE: Final = re.compile(
    r"^(?:error: (?P<ours>.+)|(?:\[rank\d+\]: )?(?P<theirs>(?:\w+\.)*\w*(?:Error|Exception): .+))$", re.MULTILINE
)


@dataclass(frozen=True)
class RunFolder:
    """A run of many, and what is kept beside it."""

    folder: Path

    @property
    def run(self) -> Path:
        """What run_pretraining.py writes."""
        return self.folder / "run"

    @property
    def config(self) -> Path:
        """What its newest start was given."""
        return self.folder / "launch.yaml"

    @property
    def output(self) -> Path:
        """What all its starts have printed."""
        return self.folder / "output.txt"

    @property
    def launches(self) -> Path:
        """A line for each start that has ended: ``begun`` and ``ended`` (seconds since the epoch), ``place``,
        ``exit_code``, ``cause``; a kill may cut one short."""
        return self.folder / "launches.jsonl"


@dataclass(frozen=True)
class Outcome:
    """How a run has ended, as its summary has it."""

    stopped_by: str
    because: str | None


class Launch:
    """A start of a run, with all the processes that belong to it; :meth:`start` makes one."""

    def __init__(self, folder: RunFolder, place: Place, process: subprocess.Popen, output_offset: int) -> None:
        self.place = place
        self.output_offset = output_offset
        """Bytes of the output that earlier starts have printed."""
        self.begun = time.time()
        """Seconds since the epoch."""
        self._folder = folder
        self._process = process
        self._without_launcher_since: float | None = None

    @classmethod
    def start(cls, folder: RunFolder, config: PretrainConfig, data_dir: Path, place: Place) -> "Launch":
        """Start, or go on with, the run in ``folder``.

        Raises:
            UserError: the folder can't be written to.
        """
        with errors_of_writing(folder.folder):
            write_text(folder.config, as_yaml(config))
            output = folder.output.open("ab")
        with output, _on_cores(place.cores):
            offset = output.tell()
            process = subprocess.Popen(
                launch_command(place, folder, data_dir),
                env=launch_environment(place),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            return cls(folder, place, process, offset)

    def poll(self) -> int | None:
        """The launcher's exit code once all processes have ended, None before.

        Ranks whose launcher is killed save and leave by themselves: they get the time for it. The code says little,
        since DeepSpeed's command gives 0 when its own launcher is killed; see :func:`read_outcome`.
        """
        if self._process.poll() is None:
            return None
        if self._members():
            self._without_launcher_since = self._without_launcher_since or time.monotonic()
            if time.monotonic() - self._without_launcher_since < _LEAVING_SECONDS:
                return None
            self.kill()
        return self._process.returncode

    def ask_to_leave(self) -> None:
        """Have the run save and leave; at once where it has not begun to train, and so has nothing to save."""
        rank_0 = self._training_rank_0()
        if rank_0 is None:
            self.kill()
        else:  # to it alone, it tells the others: a signal to the launcher would kill them in the midst of saving
            with contextlib.suppress(psutil.NoSuchProcess):
                rank_0.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End all processes at once; none is left.

        Raises:
            UserError: one does not die.
        """
        deadline = time.monotonic() + _DYING_SECONDS
        while members := self._members():
            if time.monotonic() > deadline:
                raise UserError(f"process {members[0].pid} of {self.place.name} was killed and is still there")
            for member in members:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.kill()
            time.sleep(_LOOK_SECONDS)
        self._process.wait()

    def end(self, code: int | None, cause: str) -> None:
        """Add the line on this start, which has ended, to the run's launches."""
        line = {"begun": round(self.begun, 3), "ended": round(time.time(), 3), "place": self.place.name}
        with errors_of_writing(self._folder.folder), self._folder.launches.open("a+b") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read() != b"\n":  # a kill cut the last line short
                    file.write(b"\n")
            file.write(json.dumps({**line, "exit_code": code, "cause": cause}, ensure_ascii=False).encode() + b"\n")

    def _members(self) -> list[psutil.Process]:
        """The processes of this start that live."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
                if os.getsid(process.pid) == self._process.pid and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def _training_rank_0(self) -> psutil.Process | None:
        """None before training; what an earlier start has left in ``status.json`` does not count."""
        file = self._folder.run / STATUS_FILE
        status = read_json(file, "what the run's processes are doing") if file.exists() else {}
        if status.get("phase") == "starting" or status.get("host") != socket.gethostname():
            return None
        return next((member for member in self._members() if member.pid == status["pid"]), None)


@contextlib.contextmanager
def _on_cores(cores: Sequence[int]) -> Iterator[None]:
    """What this thread starts meanwhile runs on these cores alone, and so does all that it starts in turn."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def launch_command(place: Place, folder: RunFolder, data_dir: Path) -> list[str]:
    """What starts, or goes on with, the run in ``folder``."""
    # A hostfile at DeepSpeed's own place would send the run to other machines.
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", os.devnull]
    arguments = ["--config", folder.config, "--data_dir", data_dir, "--output_dir", folder.run]
    program = list(map(str, [PROGRAM, *arguments]))
    if place.gpus:
        return [*launcher, "--include", f"localhost:{','.join(map(str, place.gpus))}", *program]
    # Without GPUs DeepSpeed writes the numbers of its processes into CUDA_VISIBLE_DEVICES: hidden ones would come back.
    python = ["env", f"{VISIBLE_DEVICES}=", sys.executable, "-u"]
    return [*launcher, "--num_gpus", str(place.num_processes), "--no_python", "--no_local_rank", *python, *program]


def launch_environment(place: Place) -> dict[str, str]:
    """This process's own, without what a launcher has told it, and with the word that it is the coordinator."""
    own = {name: value for name, value in os.environ.items() if not _OTHERS_VARIABLES.fullmatch(name)}
    if place.gpus:
        own.pop(VISIBLE_DEVICES, None)  # a place names its GPUs by the system's numbers
    return {**own, COORDINATOR: str(os.getpid())}


def as_yaml(config: PretrainConfig) -> str:
    """As run_pretraining.py reads it."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def read_outcome(folder: RunFolder, config: PretrainConfig) -> Outcome | None:
    """What the run itself says of its end; None where it has still to go on, as after a pause before ``pause_at``.

    Raises:
        UserError: its summary is damaged.
    """
    summary = read_summary(folder.run)
    if summary is None:
        return None
    stopped_by, because = summary["stopped_by"], summary.get("stopped_because")
    is_here = stopped_by == PAUSE and because == f"pause_at {config.pause_at}"
    if is_here or stopped_by in (*COMPLETE, DIVERGED):
        return Outcome(stopped_by, because)
    return None


def cause_of(folder: RunFolder, code: int, offset: int) -> str:
    """Why a start has ended with this exit code, from what it has printed behind ``offset`` bytes."""
    with folder.output.open("rb") as output:
        output.seek(offset)
        printed = output.read().decode(errors="replace")
    left = _LEFT.search(printed)  # as asked, with all saved
    return left[1] if left else last_word(printed, code)


def last_word(output: str, returncode: int) -> str:
    """The reason for a failure, from what a run has printed: its own error line, else Python's."""
    found = list(_ERROR_LINE.finditer(output))
    ours = [match["ours"] for match in found if match["ours"]]
    if ours:
        return ours[0]
    if found:
        return found[0]["theirs"]
    if _KILLED.search(output) or returncode == -signal.SIGKILL:
        return "killed from outside: most often the system, for want of memory"
    return f"ended with code {returncode} and no word"
