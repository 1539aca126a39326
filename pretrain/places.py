"""Where runs can go on this machine, several side by side: disjoint GPUs, or disjoint CPU cores where it has no GPU."""

import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

from common.errors import UserError
from common.folders import processor_name

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Place:
    """What one run gets of this machine; nothing of it belongs to another place."""

    name: str
    """For people: ``node3, GPUs 0-7`` or ``node3, core 0``."""
    num_processes: int
    """One a GPU, if there are any."""
    gpus: tuple[int, ...]
    """By the system's own numbers, which no CUDA_VISIBLE_DEVICES changes; none on a CPU."""
    cores: tuple[int, ...]
    """That all its processes share; none where GPUs make the place."""


def find_places(gpus_per_run: int | None, needed: int) -> list[Place]:
    """Places on this machine, all alike.

    Args:
        gpus_per_run: processes of a run, each with a GPU, or with at least one core where there is none; None for all
            GPUs, or one process.
        needed: the most places that there is a use for. Cores are shared out among so many, so for a comparison of runs
            it must not change on the way.

    Raises:
        UserError: the machine has less than one run takes.
    """
    if gpus := _visible_gpus():
        return _gpu_places(gpus, gpus_per_run or len(gpus))[:needed]
    return _core_places(sorted(os.sched_getaffinity(0)), gpus_per_run or 1, needed)


def hardware_of(place: Place) -> str:
    """What a run computes on there, like ``8 x NVIDIA H200`` or ``2 processes on 4 cores of AMD EPYC 7763``: the same
    for all places of a machine, whatever else runs on it."""
    if place.gpus:
        visible = _visible_gpus()
        names = sorted({torch.cuda.get_device_name(visible.index(gpu)) for gpu in place.gpus})
        return f"{len(place.gpus)} x {' and '.join(names)}"
    return f"{_count(place.num_processes, 'process')} on {_count(len(place.cores), 'core')} of {processor_name()}"


def _visible_gpus() -> list[int]:
    """The GPUs that this process may use, by the system's numbers."""
    count = torch.cuda.device_count()  # of CUDA_VISIBLE_DEVICES, the first so many: what follows a wrong one is ignored
    names = os.environ.get(VISIBLE_DEVICES)
    if names is None or not count:
        return list(range(count))
    visible = [name.strip() for name in names.split(",")][:count]
    if any(not name.isdecimal() for name in visible):
        raise UserError(
            f"{VISIBLE_DEVICES}={names}: DeepSpeed's launcher takes GPUs by number only: give it numbers, like 0,1"
        )
    return [int(name) for name in visible]


def _gpu_places(gpus: Sequence[int], gpus_per_run: int) -> list[Place]:
    if gpus_per_run > len(gpus):
        raise UserError(
            f"gpus_per_run {gpus_per_run}: {_here()} has {_count(len(gpus), 'GPU')} ({_numbers(gpus)}): "
            f"give --gpus_per_run {len(gpus)} or less, or a machine with more"
        )
    num_places, num_idle = divmod(len(gpus), gpus_per_run)
    if num_idle:
        idle = _named("GPU", gpus[-num_idle:])
        print(f"{idle} of {_here()} stay idle: a run takes {gpus_per_run} of {len(gpus)}", file=sys.stderr)
    shares = [tuple(gpus[number * gpus_per_run :][:gpus_per_run]) for number in range(num_places)]
    return [Place(f"{_here()}, {_named('GPU', share)}", gpus_per_run, share, ()) for share in shares]


def _core_places(cores: Sequence[int], num_processes: int, needed: int) -> list[Place]:
    if num_processes > len(cores):
        raise UserError(
            f"gpus_per_run {num_processes}: {_here()} has no GPU, and {_count(len(cores), 'core')} for as many "
            f"processes at most: give --gpus_per_run {len(cores)} or less, or a machine with GPUs"
        )
    num_places = max(1, min(needed, len(cores) // num_processes))
    num_cores = len(cores) // num_places
    shares = [tuple(cores[number * num_cores :][:num_cores]) for number in range(num_places)]
    return [Place(f"{_here()}, {_named('core', share)}", num_processes, (), share) for share in shares]


def _here() -> str:
    return socket.gethostname()


def _count(number: int, noun: str) -> str:
    plural = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{number} {noun if number == 1 else plural}"


def _named(noun: str, numbers: Sequence[int]) -> str:
    return f"{noun if len(numbers) == 1 else noun + 's'} {_numbers(numbers)}"


def _numbers(numbers: Sequence[int]) -> str:
    """Like ``0-3,6``."""
    runs = [
        [number for _, number in group] for _, group in groupby(enumerate(numbers), lambda entry: entry[1] - entry[0])
    ]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
