"""Time and memory of the GPU benchmark's steps, and what becomes of a step that fails."""

import gc
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from common.errors import UserError

T = TypeVar("T")


def say(line: str) -> None:
    """What goes on, for whoever waits."""
    print(line, file=sys.stderr, flush=True)


class Clock:
    """How much of the time for the whole benchmark is left."""

    def __init__(self, minutes: float) -> None:
        self._deadline = time.monotonic() + 60 * minutes

    def has_room_for(self, seconds: float) -> bool:
        """Whether work of that length ends in time."""
        return time.monotonic() + seconds < self._deadline


def seconds_of(work: Callable[[], Any], device: torch.device) -> float:
    """How long it takes: on a GPU by its own events, from when it is idle to when it is idle again."""
    if device.type != "cuda":
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize(device)
    return start.elapsed_time(end) / 1000


def allocated_bytes(device: torch.device) -> int:
    """Memory in use on the GPU; a CPU has no such count, 0."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def bytes_added_by(work: Callable[[], Any], device: torch.device) -> int:
    """The most that ``work`` holds on the GPU besides what is held already; 0 on a CPU."""
    if device.type != "cuda":
        work()
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def release_memory(device: torch.device) -> None:
    """Give back what nothing refers to any more, compiled code included."""
    torch.compiler.reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


class Attempts:
    """Runs what may fail, so that the rest of the benchmark goes on."""

    def __init__(self) -> None:
        self.outcomes: dict[str, str] = {}
        """Of whatever gave no result: why, in a line."""
        self.failures: list[str] = []
        """Those of them that ought to have worked."""

    def of(self, what: str, work: Callable[[], T]) -> T | None:
        """The result, or None. Too little memory and what is not installed are findings and no failures."""
        try:
            return work()
        except torch.OutOfMemoryError:
            self.outcomes[what] = "out of memory"
        except UserError as error:
            self.outcomes[what] = str(error)
        except Exception as error:  # whatever a library or a driver comes up with
            traceback.print_exc()
            self.outcomes[what] = f"{type(error).__name__}: {error}".splitlines()[0]
            self.failures.append(what)
        return None
