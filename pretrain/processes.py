"""The processes of a run: how they find each other, agree, and leave. One process is a run, too."""

import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import torch
import torch.distributed as dist

from common.errors import UserError
from common.folders import write_text
from common.process_tree import start_time

DEFAULT_TIMEOUT = timedelta(minutes=10)
_LOOK_SECONDS = 0.02
_LONGEST_WORD = 4096  # bytes; the longest path that systems know


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    store: dist.Store
    """Where any process leaves a word for the others."""
    cpu_group: dist.ProcessGroup
    """For decisions and sums on the CPU, which never wait for the GPU."""

    @property
    def hardware(self) -> str:
        """What the run computes on, in a few words."""
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            name = f"CPU, {threads} thread{'s' if threads > 1 else ''} each"
        else:
            name = torch.cuda.get_device_name(self.device)
        return f"{self.world_size} x {name}"

    def sum(self, *values: float) -> list[float]:
        """Each value's sum over all ranks."""
        return self._reduce(values, dist.ReduceOp.SUM)

    def minimum(self, *values: float) -> list[float]:
        """Each value's minimum over all ranks."""
        return self._reduce(values, dist.ReduceOp.MIN)

    def maximum(self, *values: float) -> list[float]:
        """Each value's maximum over all ranks."""
        return self._reduce(values, dist.ReduceOp.MAX)

    def share(self, word: str) -> str:
        """Rank 0's word, on all ranks."""
        letters = torch.zeros(_LONGEST_WORD, dtype=torch.uint8)
        encoded = word.encode()
        letters[: len(encoded)] = torch.tensor(list(encoded), dtype=torch.uint8)
        dist.broadcast(letters, src=0, group=self.cpu_group)
        return bytes(letters.tolist()).rstrip(b"\0").decode()

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self.cpu_group)

    def _reduce(self, values: tuple[float, ...], operation: dist.ReduceOp) -> list[float]:
        reduced = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(reduced, operation, group=self.cpu_group)
        return reduced.tolist()


def start_processes(timeout: timedelta = DEFAULT_TIMEOUT) -> Processes:
    """Join the other processes of this run; one process when no launcher (deepspeed, torchrun) has set any up.

    Args:
        timeout: for how long a process waits for the others in whatever they do together.

    Raises:
        UserError: they don't find each other.
    """
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = _own_device()
    try:
        store = _meet(rank, world_size)
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
        group = dist.new_group(backend="gloo", timeout=timeout)
    except RuntimeError as error:  # torch's errors of stores and connections
        reason = str(error).splitlines()[0]
        raise UserError(
            f"process {rank} of {world_size} does not find the others ({reason}): is one of them missing, or "
            "another run on the same --master_port?"
        ) from None
    return Processes(rank, world_size, device, store, group)


def _own_device() -> torch.device:
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank + 1} of this node has no GPU, there are {torch.cuda.device_count()}: start fewer"
            )
        torch.cuda.set_device(local_rank)
        return torch.device("cuda", local_rank)
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))  # a run may have but some of the cores
    return torch.device("cpu")


def _meet(rank: int, world_size: int) -> dist.Store:
    if "RANK" not in os.environ:
        return dist.HashStore()  # nobody to meet
    # DeepSpeed's launcher gives every run on one node the same port: the second run would fail.
    if os.environ.get("CROSS_SIZE") == "1":
        return _meet_at_a_free_port(rank, world_size)
    store, *_ = next(iter(dist.rendezvous("env://", rank, world_size, timeout=DEFAULT_TIMEOUT)))
    return store


def _meet_at_a_free_port(rank: int, world_size: int) -> dist.Store:
    """Rank 0 takes a free port and leaves its number where only processes of the same launcher look."""
    launcher = os.getppid()
    note = Path(tempfile.gettempdir()) / f"budget-bert-{os.getuid()}-{launcher}-{start_time(launcher)}"
    if rank == 0:
        store = dist.TCPStore(
            "127.0.0.1", 0, world_size, is_master=True, wait_for_workers=False, timeout=DEFAULT_TIMEOUT
        )
        write_text(note, str(store.port))
    else:
        port = _read_port(note)
        store = dist.TCPStore("127.0.0.1", port, world_size, is_master=False, timeout=DEFAULT_TIMEOUT)
    store.add("met", 1)
    if rank == 0:
        _wait_until(lambda: store.add("met", 0) == world_size, "not all have come")
        note.unlink()
    return store


def _read_port(note: Path) -> int:
    _wait_until(lambda: note.exists() and note.stat().st_uid == os.getuid(), f"rank 0 has left no port in {note}")
    return int(note.read_text(encoding="utf-8"))


def _wait_until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + DEFAULT_TIMEOUT.total_seconds()
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(complaint)
        time.sleep(_LOOK_SECONDS)


def stop_processes() -> None:
    """Leave the other processes in good order, for a program that goes on."""
    dist.destroy_process_group()


def leave(code: int) -> NoReturn:
    """End this process at once, everything written: Python's own end of a process may abort here.

    Threads of torch's process groups still hold tensors then, and ask an interpreter that is gone (pytorch#179291).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
