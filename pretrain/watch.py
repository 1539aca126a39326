"""What each process is doing, told to the others, so that one that dies or hangs ends the run by name.

Waiting for a process that never answers is silent by nature. So every process says every few seconds, through the store
they met at, what it does and since when. One that has stood still for long looks round: a process that is gone, or that
keeps the others waiting for too long, is named with what it did last, and the run ends with exit code 1.
"""

import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from common.errors import UserError
from common.folders import write_json
from common.process_tree import is_alive, pid_namespace, start_time
from pretrain.processes import Processes
from pretrain.run_record import STATUS_FILE

Phase = Literal["starting", "training", "validation", "saving", "closing", "done"]
_BEAT_SECONDS = 2.0
_LOOK_ROUND_AFTER = 6.0
_LAST_WORDS_SECONDS = 4.0  # for a process that fails to say why
_GO_ON = "run the same command again, which goes on from the last checkpoint"


class LostProcess(UserError):
    """Another process has ended or hangs; the message says which one and what is known of it."""

    def __init__(self, message: str, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass(frozen=True)
class Beat:
    """What a process says of itself."""

    rank: int
    host: str
    namespace: str
    """Where the process has its number: containers on one host have numbers of their own."""
    pid: int
    started: str
    """Of the process, in the system's ticks."""
    beats: int
    """Said so far."""
    phase: str
    step: int
    detail: str
    """What it does there apart from the others, if anything."""

    @property
    def is_gone(self) -> bool:
        """Whether the process has ended, as far as this one can tell."""
        can_be_seen = (self.host, self.namespace) == (socket.gethostname(), pid_namespace())
        return can_be_seen and not (is_alive(self.pid) and start_time(self.pid) == self.started)

    def __str__(self) -> str:
        at = self.detail or self.phase
        return f"rank {self.rank} (process {self.pid} on {self.host}, last heard of in {at} after step {self.step})"


class Watch:
    """One process's watch over itself and the others.

    Args:
        processes: of the run.
        folder: the run's; rank 0 keeps ``status.json`` there.
        limit_seconds: for how long a process may stand still.
    """

    def __init__(self, processes: Processes, folder: Path, limit_seconds: float) -> None:
        self._rank, self._world_size = processes.rank, processes.world_size
        self._folder = folder
        self._limit = limit_seconds
        # Of its own: a client that waits for an answer lets nobody else ask.
        self._store = processes.store.clone() if processes.world_size > 1 else processes.store
        self._started = start_time(os.getpid())
        self._beats = 0
        self._doing: tuple[Phase, int, str, float] = ("starting", 0, "", time.monotonic())
        self._last_seen: dict[int, tuple[int, float]] = {}
        self._status: Phase | None = None
        self._over = threading.Event()

    @contextmanager
    def kept(self) -> Iterator[None]:
        """Keep watch meanwhile, and turn the consequences of another's end into :class:`LostProcess`."""
        self._say()  # so that the others know of it, however soon it ends
        thread = threading.Thread(target=self._keep, name="watch", daemon=True)
        if self._world_size > 1:  # nobody waits for the only one
            thread.start()
        try:
            yield
        except LostProcess:
            raise
        except Exception as error:
            if isinstance(error, RuntimeError) and (lost := self._whom_we_lost()):
                raise lost from None
            self._say_why(error)
            raise
        finally:
            self._over.set()
            if thread.is_alive():
                thread.join()

    def enter(self, phase: Phase, step: int, detail: str = "") -> None:
        """This process now does this; called at every step and at every part of what takes long.

        ``detail`` tells what it does on its own: whoever hangs there keeps the others waiting.
        """
        self._doing = (phase, step, detail, time.monotonic())
        if phase != self._status:
            self._status = phase
            if self._rank == 0:
                self._write_status(phase, step)

    def _write_status(self, phase: Phase, step: int) -> None:
        status = {"phase": phase, "step": step, "pid": os.getpid(), "host": socket.gethostname()}
        since = datetime.now(UTC).isoformat(timespec="milliseconds")
        with suppress(OSError):  # a full disk is told by what matters more
            write_json(self._folder / STATUS_FILE, {**status, "since": since})

    def _keep(self) -> None:
        while not self._over.wait(_BEAT_SECONDS):
            try:
                self._say()
                if line := self._what_is_wrong():
                    self._end(line)
            except (RuntimeError, OSError):  # the store is gone, and with it rank 0
                if self._doing[0] == "done":
                    return
                if self._stands_still_for() > _LOOK_ROUND_AFTER:
                    self._end("rank 0 does not answer: it has ended, or the network is down")

    def _stands_still_for(self) -> float:
        return time.monotonic() - self._doing[-1]

    def _own_beat(self) -> Beat:
        self._beats += 1
        phase, step, detail, _ = self._doing
        own = (self._rank, socket.gethostname(), pid_namespace(), os.getpid(), self._started)
        return Beat(*own, self._beats, phase, step, detail)

    def _say(self) -> None:
        self._store.set(f"beat {self._rank}", json.dumps(asdict(self._own_beat())))

    def _say_why(self, error: Exception) -> None:
        reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        code = error.exit_code if isinstance(error, UserError) else 1
        with suppress(RuntimeError):
            self._store.set(f"failure {self._rank}", f"{code} {' '.join(reason.split())}")

    def _others(self) -> list[Beat]:
        keys = [f"beat {rank}" for rank in range(self._world_size) if rank != self._rank]
        return [Beat(**json.loads(self._store.get(key))) for key in keys if self._store.check([key])]

    def _failures(self) -> dict[int, tuple[str, str]]:
        """By rank: its exit code and its last words."""
        keys = {rank: f"failure {rank}" for rank in range(self._world_size) if rank != self._rank}
        said = {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}
        return {rank: tuple(words.split(" ", 1)) for rank, words in said.items()}

    def _what_is_wrong(self) -> str | None:
        if self._stands_still_for() < _LOOK_ROUND_AFTER:
            return None
        for rank, (_, reason) in self._failures().items():
            return f"rank {rank}: {reason}"
        others = self._others()
        silent = [beat for beat in others if self._is_silent(beat)]
        for beat in others:
            if beat.is_gone:
                return _gone(beat)
        if self._stands_still_for() < self._limit:
            return None
        everyone = [*others, self._own_beat()]
        behind = [beat for beat in everyone if beat.step < max(other.step for other in everyone)]
        suspects = silent or behind or [beat for beat in everyone if beat.detail] or everyone
        named = " and ".join(map(str, suspects))
        return f"for over {self._limit:.0f} s nothing has moved; it waits for {named}: {_GO_ON}"

    def _is_silent(self, beat: Beat) -> bool:
        """Whether a process has said nothing new for a while: it is stopped, or its machine is out of reach."""
        now = time.monotonic()
        beats, since = self._last_seen.get(beat.rank, (-1, now))
        if beats != beat.beats:
            self._last_seen[beat.rank] = (beat.beats, now)
        return beats == beat.beats and now - since > _LOOK_ROUND_AFTER

    def _whom_we_lost(self) -> LostProcess | None:
        """Why something between the processes has failed: one of the others has, and may say so any moment."""
        deadline = time.monotonic() + _LAST_WORDS_SECONDS
        try:
            while time.monotonic() < deadline:
                for rank, (code, reason) in self._failures().items():
                    return LostProcess(f"rank {rank}: {reason}", int(code))
                for beat in self._others():
                    if beat.is_gone:
                        return LostProcess(_gone(beat))
                time.sleep(0.1)
        except (RuntimeError, OSError):
            return LostProcess(f"rank 0 has ended, and with it what the processes met at: {_GO_ON}")
        return None

    def _end(self, line: str) -> None:
        if self._over.is_set():
            return
        self._say_why(LostProcess(line))
        print(f"error: {line}", file=sys.stderr, flush=True)
        os._exit(1)


def _gone(beat: Beat) -> str:
    return f"{beat} has ended, killed or crashed: {_GO_ON}"
