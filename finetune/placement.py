"""How many trials run at a time, and on what: one process per core, or as many per GPU as it gains by."""

import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any, Final

import psutil
import torch

from common.folders import read_json, write_json
from finetune.batches import DeviceSplit
from finetune.model import Encoder
from finetune.ranks import Ranks
from finetune.tasks import Task
from finetune.tokens import load_tokens
from finetune.trial import Cell, Protocol, Training

_PLACEMENT_FILE: Final = "placement.json"
_TRIED: Final = (1, 2, 3, 4, 6, 8, 12, 16)
_WORTH_IT: Final = 1.05  # the throughput that more trials must bring, over what the best number so far has
_USABLE_MEMORY: Final = 0.9
_PROBE_SECONDS: Final = 6.0
_PROCESS_BYTES: Final = 700e6  # Python with torch and transformers
_BYTES_PER_PARAMETER: Final = 12  # weights, gradients, and the weights to start from


@dataclass(frozen=True)
class Measurement:
    """What a number of trials at a time on one GPU brought."""

    rows_per_second: float
    """Of all together."""
    memory_share: float
    """Of the GPU's, used by all together."""


@dataclass(frozen=True)
class Probe:
    """A stretch of training like the grid's dearest, in order to measure."""

    model_folder: Path
    protocol: Protocol
    task: Task
    cell: Cell
    train_folder: Path
    device: str

    @property
    def key(self) -> str:
        """What a measurement was of."""
        name = torch.cuda.get_device_name(self.device) if self.device != "cpu" else "cpu"
        return f"{name}, {self.task.task_name}, batch {self.cell.batch_size}, {self.cell.variant}"


def choose_number(measure: Callable[[int], Measurement | None]) -> int:
    """The number of trials at a time with the highest throughput, tried in rising order.

    Args:
        measure: tries a number; None if it failed, as for want of memory.
    """
    best, best_rate, memory_of_one = 1, 0.0, 0.0
    for number in _TRIED:
        if number * memory_of_one > _USABLE_MEMORY:
            break
        measurement = measure(number)
        if measurement is None or measurement.rows_per_second < _WORTH_IT * best_rate:
            break
        best, best_rate = number, measurement.rows_per_second
        memory_of_one = measurement.memory_share / number
    return best


def trials_per_gpu(probe: Probe, output_dir: Path) -> int:
    """:func:`choose_number` for this GPU, measured once per output folder."""
    file = output_dir / _PLACEMENT_FILE
    known = read_json(file, "measured trials per GPU; delete it to measure again") if file.exists() else {}
    if probe.key not in known:
        print(f"measuring how many trials at a time suit {probe.key} ...", flush=True)
        measured: dict[int, Measurement] = {}

        def measure(number: int) -> Measurement | None:
            result = run_probes(probe, number)
            if result is not None:
                measured[number] = result
                print(f"{number} at a time: {result.rows_per_second:,.0f} rows/s, memory {result.memory_share:.0%}")
            return result

        chosen = choose_number(measure)
        rows_per_second = {str(number): result.rows_per_second for number, result in measured.items()}
        known = {**known, probe.key: {"trials_per_gpu": chosen, "rows_per_second": rows_per_second}}
        write_json(file, known)
    return known[probe.key]["trials_per_gpu"]


def run_probes(probe: Probe, number: int) -> Measurement | None:
    """Train so many at a time for a few seconds; None if one of them fails."""
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(number), context.SimpleQueue()
    processes = [context.Process(target=_probe, args=(probe, barrier, answers), daemon=True) for _ in range(number)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        return None
    rates, shares = zip(*(answers.get() for _ in processes), strict=True)
    return Measurement(sum(rates), max(shares))


def _probe(probe: Probe, barrier: Barrier, answers: Any) -> None:
    """Train from the moment when all are ready, the longest rows first, so that memory is at its most."""
    device = torch.device(probe.device)
    try:
        data = DeviceSplit(load_tokens(probe.train_folder), device)
        classifier = Encoder(probe.model_folder).new_classifier(probe.task, "random", device)
        training = Training(classifier, probe.cell, probe.protocol, data, device)
        training.step(data.longest_batch(probe.cell.batch_size))
        barrier.wait(timeout=300)
        started, num_rows = time.monotonic(), 0
        while time.monotonic() - started < _PROBE_SECONDS:
            for batch in data.training_batches(probe.cell.batch_size, seed=[0]):
                training.step(batch).item()
                num_rows += len(batch.rows)
                if time.monotonic() - started >= _PROBE_SECONDS:
                    break
        rate = num_rows / (time.monotonic() - started)
        barrier.wait(timeout=300)  # so that the memory of all is seen
        answers.put((rate, _memory_share(device)))
        barrier.wait(timeout=300)
    except Exception as error:  # want of memory, mostly: the answer is that so many don't fit
        barrier.abort()
        print(f"so many at a time don't fit: {str(error).splitlines()[0] if str(error) else error!r}", file=sys.stderr)
        os._exit(1)


def _memory_share(device: torch.device) -> float:
    if device.type != "cuda":
        return 0.0
    free, total = torch.cuda.mem_get_info(device)
    return 1 - free / total


def cpu_workers(num_parameters: int, cells: Sequence[Cell], ranks: Ranks) -> int:
    """One per core, as far as there are trials and the memory that is free goes; at least one."""
    cores = len(os.sched_getaffinity(0)) // ranks.local_world_size
    state_bytes = max(cell.optimizer.state_bytes(num_parameters) for cell in cells)
    needed = _PROCESS_BYTES + _BYTES_PER_PARAMETER * num_parameters + state_bytes
    fitting = psutil.virtual_memory().available / ranks.local_world_size / needed
    return max(1, min(cores, len(cells), int(fitting)))


def threads_per_worker(num_workers: int, output_dir: Path, ranks: Ranks) -> int:
    """The cores shared out; what the folder's first start has found stays, because scores depend on it a little."""
    file = output_dir / _PLACEMENT_FILE
    known = read_json(file, "how trials were placed; delete it to decide again") if file.exists() else {}
    if "threads_per_worker" not in known:
        cores = len(os.sched_getaffinity(0)) // ranks.local_world_size
        known["threads_per_worker"] = max(1, cores // num_workers)
        write_json(file, known)
    return known["threads_per_worker"]


def devices(trials_per_gpu: int, num_workers: int, ranks: Ranks) -> list[str]:
    """The device of each worker of this process: its own GPU's, or all GPUs' in turn, or the CPU."""
    if not torch.cuda.is_available():
        return ["cpu"] * num_workers
    gpus = [ranks.local_rank] if ranks.launched else range(torch.cuda.device_count())
    return [f"cuda:{gpu}" for _ in range(trials_per_gpu) for gpu in gpus]
