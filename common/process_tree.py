"""Processes as the system sees them: which are alive, and who has started whom."""

import os
from pathlib import Path

COORDINATOR = "BUDGET_BERT_COORDINATOR"
"""Environment variable of a run: the process that has launched it as one of many, and without which it ends."""
_PARENT, _START_TIME = 1, 19  # fields of /proc/PID/stat behind the name, proc(5)


def _stat(pid: int) -> list[str]:
    """Empty where the process is gone, or where the system tells nothing of it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return []


def start_time(pid: int) -> str:
    """When a process began, in the system's ticks: with its number it names one process for ever."""
    fields = _stat(pid)
    return fields[_START_TIME] if fields else ""


def parent(pid: int) -> int | None:
    """Who is responsible for a process: who has started it, or another once that one has ended."""
    fields = _stat(pid)
    return int(fields[_PARENT]) if fields else None


def pid_namespace() -> str:
    """The numbering of processes that this one belongs to; empty where the system does not tell."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def is_alive(pid: int) -> bool:
    """Whether a process is there and has not ended."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX"


def launcher_chain() -> list[tuple[int, int | None]]:
    """Who has launched this process, as (process, its parent): the whole chain that has to live for the run to go on.

    DeepSpeed's command starts a launcher on each node, and that one the ranks; on one node a kill of the command leaves
    both running. torchrun starts the ranks itself. Without a launcher the chain is empty: a shell may well end before
    what it has started. A coordinator, which names itself in :data:`COORDINATOR`, is the chain's far end.
    """
    if coordinator := os.environ.get(COORDINATOR):
        return _chain_up_to(int(coordinator))
    if "CROSS_SIZE" in os.environ:  # DeepSpeed's launcher
        return [(os.getpid(), os.getppid()), (os.getppid(), parent(os.getppid()))]
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return [(os.getpid(), os.getppid())]
    return []


def _chain_up_to(ancestor: int) -> list[tuple[int, int | None]]:
    """Broken from the start where one between has ended by now: processes then have another parent."""
    chain, pid = [], os.getpid()
    while pid != ancestor:
        above = parent(pid)
        if not above:  # nobody is above the system's first process
            return [(os.getpid(), ancestor)]
        chain.append((pid, above))
        pid = above
    return chain


def is_broken(chain: list[tuple[int, int | None]]) -> bool:
    """Whether a link of :func:`launcher_chain` has gone since; where the system tells nothing, none has."""
    return any(parent(pid) not in (before, None) for pid, before in chain)
