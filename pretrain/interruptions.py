"""What ends a run before its budget does: signals, the end of a Slurm allocation, a launcher that has died.

Each process only takes note; all agree at the next step boundary, save and leave (:mod:`pretrain.director`).
"""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from types import FrameType
from typing import Final

from common.process_tree import is_broken, launcher_chain

SLURM_END, LAUNCHER_DIED = "slurm_end", "launcher_died"
_SIGNALS = (signal.SIGUSR1, signal.SIGINT, signal.SIGHUP, signal.SIGTERM)
INTERRUPTIONS: Final = (LAUNCHER_DIED, SLURM_END, *(number.name for number in _SIGNALS))
"""From the least to the most telling: where several come together, the last one is the reason."""


class Interruptions:
    """Whether this process has been asked to leave.

    Args:
        margin_seconds: how long before the end of a Slurm allocation to leave.
    """

    def __init__(self, margin_seconds: float) -> None:
        self._launchers = launcher_chain()
        end = os.environ.get("SLURM_JOB_END_TIME", "")
        self._leave_at = float(end) - margin_seconds if end.isdigit() else None
        self._signal: str | None = None

    @contextlib.contextmanager
    def noted(self) -> Iterator[None]:
        """Take note of signals instead of dying of them; a second Ctrl-C ends the process as usual."""
        # A signal that nohup or the like had switched off stays so.
        watched = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self._note) for number in watched}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, _: FrameType | None) -> None:
        self._signal = signal.Signals(number).name
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def pending(self) -> str | None:
        """The name of what asks this process to leave, one of :data:`INTERRUPTIONS`."""
        if self._signal:
            return self._signal
        if self._leave_at is not None and time.time() >= self._leave_at:
            return SLURM_END
        return LAUNCHER_DIED if is_broken(self._launchers) else None
