"""``micro_batch_size: auto``: the fastest size that fits, found by trying."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from common.errors import UserError
from data_prep.shards import Manifest, SplitReader
from pretrain.batch_plan import BatchPlan
from pretrain.batches import shape_of_micro_batches
from pretrain.model import MaskedLanguageModel
from pretrain.packing import MicroBatch, pack
from pretrain.processes import Processes

_FIRST_TRIED = 8
_SPACING = 1.5  # between sizes worth trying
_TIMED_PASSES = 3
_WORTH_GROWING = 1.02  # below this gain in sequences a second, a larger size only costs memory
_MEMORY_HEADROOM = 0.05  # of a GPU's memory, which fragments and which other libraries use, too
_SEARCH_SHARE = 0.02  # of the budget
_SEARCH_SECONDS = 120.0  # at most


class MicroBatchTrials:
    """Forward and backward passes on real rows, at one size after the other.

    They run the plain operations: quick to start at any size, as fast or slow among themselves as the compiled ones,
    and never with less memory.

    Args:
        model: in training mode, without gradients.
        manifest: the data folder.
        train_batch_size: sequences a step over all processes.
        world_size: number of processes.
        autocast_dtype: of matrix products, None for float32.
    """

    def __init__(
        self,
        model: MaskedLanguageModel,
        manifest: Manifest,
        train_batch_size: int,
        world_size: int,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self._model = model
        self._manifest = manifest
        self._train_batch_size = train_batch_size
        self._world_size = world_size
        self._autocast_dtype = autocast_dtype
        self._device = model.head.bias.device

    def speeds(self, seconds_allowed: float) -> dict[int, float]:
        """Sequences a second by size, at growing sizes that divide the batch.

        Ends where memory does, where a larger size no longer pays, or when the next one would take longer than allowed.
        Where not even the first size fits, the largest smaller one that does.
        """
        reserved = self._reserve_memory()
        started = time.perf_counter()
        speeds: dict[int, float] = {}
        sizes = self.sizes()
        first = min((size for size in sizes if size >= _FIRST_TRIED), default=sizes[-1])
        for size in sizes[sizes.index(first) :]:
            seconds = self.seconds_of_a_pass(size)
            if seconds is None:
                break
            previous = max(speeds.values(), default=0.0)
            speeds[size] = size / seconds
            spent = time.perf_counter() - started
            next_one = 2 * (1 + _TIMED_PASSES) * seconds
            if speeds[size] < _WORTH_GROWING * previous or spent + next_one > seconds_allowed:
                break
        if not speeds and (fits := self.largest_that_fits(first, has_optimizer_state=True)):
            speeds[fits] = fits / self.seconds_of_a_pass(fits)
        del reserved
        return speeds

    def largest_that_fits(self, below: int, has_optimizer_state: bool) -> int | None:
        """The largest size under ``below`` that a pass has memory for; None where not even one sequence fits.

        ``has_optimizer_state`` tells whether what the optimizer holds is in memory by now.
        """
        reserved = [] if has_optimizer_state else self._reserve_memory()
        smaller = [size for size in reversed(self.sizes()) if size < below]
        fitting = next((size for size in smaller if self.seconds_of_a_pass(size) is not None), None)
        del reserved
        return fitting

    def sizes(self) -> list[int]:
        """Sizes that divide a rank's batch, from one sequence to all of it, some way apart."""
        rank_batch_size = self._train_batch_size // self._world_size
        sizes = [1]
        for size in range(2, rank_batch_size + 1):
            if rank_batch_size % size == 0 and (size >= _SPACING * sizes[-1] or size == rank_batch_size):
                sizes.append(size)
        return sizes

    def seconds_of_a_pass(self, size: int) -> float | None:
        """The fastest of a few, since whatever else the machine does only ever adds time; None where memory ends."""
        micro_batch = self._first_micro_batch(size)
        try:
            return min(self._time_passes(micro_batch))
        except torch.OutOfMemoryError:
            return None
        finally:
            self._model.zero_grad(set_to_none=True)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _first_micro_batch(self, size: int) -> MicroBatch:
        plan = BatchPlan(self._train_batch_size, size, self._world_size)
        shape = shape_of_micro_batches(self._manifest, plan)
        reader = SplitReader(self._manifest, "train")
        rows = reader.read_range(0, min(size, reader.num_rows))
        reader.close()
        return next(pack(rows, shape))

    def _time_passes(self, micro_batch: MicroBatch) -> Iterator[float]:
        for number in range(1 + _TIMED_PASSES):
            started = time.perf_counter()
            with torch.autocast(self._device.type, self._autocast_dtype, enabled=self._autocast_dtype is not None):
                loss = self._model(*micro_batch.model_inputs(self._device))
            loss.backward()
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            if number:  # the first one loads kernels and allocates
                yield time.perf_counter() - started

    def _reserve_memory(self) -> list[torch.Tensor]:
        """What training will hold besides: two moments, a buffer for gradients on their way, and some headroom."""
        copies = 2 + (self._world_size > 1)
        reserved = [torch.empty_like(parameter) for parameter in self._model.parameters() for _ in range(copies)]
        if self._device.type == "cuda":
            total = torch.cuda.get_device_properties(self._device).total_memory
            reserved.append(torch.empty(int(_MEMORY_HEADROOM * total), dtype=torch.uint8, device=self._device))
        return reserved


@dataclass(frozen=True)
class MicroBatchChoice:
    """What the search has come to."""

    size: int
    """The fastest that fits on all ranks."""
    speeds: dict[int, float]
    """Sequences a second on the slowest process, by size."""

    def __str__(self) -> str:
        listed = ", ".join(f"{size}: {speed}" for size, speed in self.speeds.items())
        return f"sequences a second on a process by size: {listed}"


def choose_micro_batch_size(
    trials: MicroBatchTrials, processes: Processes, budget_seconds: float | None
) -> MicroBatchChoice:
    """The fastest size that fits on all ranks; every rank calls it.

    Raises:
        UserError: not even one sequence fits.
    """
    allowed = min(_SEARCH_SECONDS, _SEARCH_SHARE * budget_seconds) if budget_seconds else float("inf")
    sizes, own = trials.sizes(), trials.speeds(allowed)
    largest, *speeds = processes.minimum(max(own, default=0), *(own.get(size, 0.0) for size in sizes))
    if not largest:
        raise UserError("out of memory with micro-batches of one sequence: take a smaller model or max_seq_length")
    tried = {size: round(speed, 1) for size, speed in zip(sizes, speeds, strict=True) if speed}
    # Ranks of unequal memory may have tried no size in common: what fits the smallest fits all.
    return MicroBatchChoice(max(tried, key=tried.__getitem__, default=int(largest)), tried)
