"""Where work units run: worker processes on this machine, or a Dask cluster.

A work unit is a function of one item. It returns a small value, and leaves each of its files whole under its final name
or not at all. So it may be stopped at any point and run again, in another process or on another machine.
"""

import hashlib
import importlib.metadata
import multiprocessing
import multiprocessing.connection
import os
import platform
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, CancelledError, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from common.errors import UserError

if TYPE_CHECKING:
    import distributed

_UNITS_PER_WORKER = 2  # one that runs, and one that waits for its end
_ASK_AGAIN_SECONDS = 5.0  # how many workers there are
_CONNECT_SECONDS = 10
_NO_WORKER_SECONDS = 120
_DECIDE_THE_BYTES = ("h5py", "numpy", "sentencex", "tokenizers")
_PROJECT = Path(__file__).resolve().parent.parent
_HOW_TO_START = f"start scheduler and workers anew, in the command's Python environment, with PYTHONPATH={_PROJECT}"


@dataclass(frozen=True)
class WorkPool:
    """An executor, and how many units it runs at once."""

    executor: Executor
    num_workers: Callable[[], int]
    """At least 1. Asked again and again, because a cluster's workers come and go."""

    def run_all(self, function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
        """The results of ``function`` over ``items``, in order.

        At most two items a worker are taken and unfinished, so that the parent never holds the whole corpus. A slow
        unit keeps no worker idle: what is finished behind it waits as a result, which is small. An error in a unit
        comes through as it was raised, as soon as it is seen.
        """
        items = iter(items)
        in_order: deque[Future] = deque()
        unfinished: set[Future] = set()
        while True:
            room = max(0, _UNITS_PER_WORKER * self.num_workers() - len(unfinished))
            started = [self.executor.submit(function, item) for item in islice(items, room)]
            in_order.extend(started)
            unfinished.update(started)
            if not unfinished:
                return
            done, unfinished = wait(unfinished, _ASK_AGAIN_SECONDS, FIRST_COMPLETED)
            for future in done:
                future.result()  # an error is told now, not when its turn comes
            while in_order and in_order[0].done():
                yield in_order.popleft().result()


def open_pool(
    kind: Literal["processes", "dask"], num_workers: int, scheduler: str | None
) -> AbstractContextManager[WorkPool]:
    """Workers for the time of a ``with`` block; what is unfinished at its end, as after an error, is given up at once.

    Args:
        kind: ``processes`` on this machine, or a ``dask`` cluster that is up.
        num_workers: processes to start; a cluster has the workers that it has.
        scheduler: address of the cluster's scheduler, as ``tcp://10.0.0.1:8786``.

    Raises:
        UserError: here or in the block: the cluster can't be reached or can't run this project, it was lost on the way,
            or a worker died.
    """
    if kind == "processes":
        return _processes(num_workers)
    if not scheduler or not re.fullmatch(r".+:\d+", scheduler):
        raise UserError(f"--executor dask needs --scheduler HOST:PORT, as 'dask scheduler' tells it; got {scheduler}")
    return _dask(scheduler)


@contextmanager
def _processes(num_workers: int) -> Iterator[WorkPool]:
    # 'spawn': a forked copy of a process with tokenizer threads may hang.
    context = multiprocessing.get_context("spawn")
    lifeline, held_here = context.Pipe(duplex=False)
    executor = ProcessPoolExecutor(num_workers, context, _start_worker, (lifeline,))
    try:
        with lifeline, executor, held_here:
            yield WorkPool(executor, lambda: num_workers)
    except BrokenProcessPool:
        raise UserError(
            "a worker process died, most likely out of memory: run the same command again, which continues;"
            " fewer --num_workers need less memory"
        ) from None


def _start_worker(lifeline: multiprocessing.connection.Connection) -> None:
    """End this process as soon as the parent lets go of the lifeline: at the pool's end, or by any death of its own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which decides

    def watch() -> None:
        multiprocessing.connection.wait([lifeline])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def _dask(scheduler: str) -> Iterator[WorkPool]:
    try:
        import dask
        import distributed
    except ImportError:
        raise UserError("--executor dask needs the extra 'cluster': pip install -e '.[cluster]'") from None
    # A unit is several megabytes of text, and Dask would warn of each.
    with dask.config.set({"distributed.admin.large-graph-warning-threshold": "1 TiB"}):
        try:
            client = distributed.Client(scheduler, timeout=_CONNECT_SECONDS, set_as_default=False)
        except (OSError, ValueError) as error:
            raise UserError(f"no Dask scheduler answers at {scheduler} ({error}): start it, or correct this") from None
        try:
            with client:
                _num_threads(client, scheduler)
                _check_environments(client, scheduler)
                executor = _CheckedExecutor(client.get_executor(pure=False))
                yield WorkPool(executor, lambda: _num_threads(client, scheduler))
        except CancelledError:
            raise UserError(_lost(scheduler)) from None
        except distributed.scheduler.KilledWorker as error:
            raise UserError(
                "several Dask workers died in one work unit, most likely out of memory, the last of them"
                f" {error.last_worker.address}: give them more memory, and run the same command again, which continues"
            ) from None


def _num_threads(client: "distributed.Client", scheduler: str) -> int:
    """Units that the cluster runs at once; while it has no worker, wait for one.

    Raises:
        UserError: none came in time, or the scheduler is gone.
    """
    try:
        if not client.nthreads():
            client.wait_for_workers(1, timeout=_NO_WORKER_SECONDS)
        return max(1, sum(client.nthreads().values()))
    except TimeoutError:
        raise UserError(
            f"the Dask cluster at {scheduler} has had no worker for {_NO_WORKER_SECONDS} seconds:"
            " start some, and run the same command again, which continues"
        ) from None
    except OSError:
        raise UserError(_lost(scheduler)) from None


def _lost(scheduler: str) -> str:
    return f"lost the Dask scheduler at {scheduler}: start it again, and run the same command again, which continues"


def _check_environments(client: "distributed.Client", scheduler: str) -> None:
    """Refuse a cluster that can't run this project; the scheduler has to as well, because it takes units apart."""
    try:
        client.run_on_scheduler(_require_environment, _environment())
        client.run(_require_environment, _environment())
    except UserError:
        raise
    except Exception as error:  # an import that fails there arrives without its type
        raise UserError(f"the Dask cluster at {scheduler} can't run this project ({error}): {_HOW_TO_START}") from None


class _CheckedExecutor(Executor):
    """Runs nothing on a worker that would make other bytes, be it one that joined a minute ago."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def submit(self, function: Callable, /, item: Any) -> Future:
        return self._executor.submit(_run_checked, _environment(), function, item)


def _run_checked(environment: dict[str, str], function: Callable[[Any], Any], item: Any) -> Any:
    _require_environment(environment)
    return function(item)


def _require_environment(expected: dict[str, str]) -> None:
    """Runs on the cluster."""
    for name, here in _environment().items():
        if here != expected[name]:
            raise UserError(
                f"Dask on {platform.node()} has {name} {here}, this command has {expected[name]}: {_HOW_TO_START}"
            )


@cache  # so that a process which began with older code is found out
def _environment() -> dict[str, str]:
    """The versions of what decides on a unit's bytes: the libraries, and a checksum of this project's own files."""
    versions = {name: importlib.metadata.version(name) for name in _DECIDE_THE_BYTES}
    files = sorted(path for package in ("common", "data_prep") for path in (_PROJECT / package).glob("*.py"))
    return versions | {"project files": hashlib.sha256(b"".join(map(Path.read_bytes, files))).hexdigest()[:12]}
