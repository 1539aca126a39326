"""``micro_batch_size: auto``: the fastest size that fits, found by trying."""

import time
from collections.abc import Iterator

import torch

from data_prep.shards import Manifest, SplitReader
from pretrain.batch_plan import BatchPlan
from pretrain.batches import shape_of_micro_batches
from pretrain.model import MaskedLanguageModel
from pretrain.packing import MicroBatch, pack

_SMALLEST = 8
_TIMED_PASSES = 3
_WORTH_DOUBLING = 1.02  # below this gain in sequences a second, a larger size only costs memory
_MEMORY_HEADROOM = 0.05  # of a GPU's memory, which fragments and which other libraries use, too


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
        """
        reserved = self._reserve_memory()
        started = time.perf_counter()
        speeds: dict[int, float] = {}
        for size in self.sizes():
            seconds = self.seconds_of_a_pass(size)
            if seconds is None:
                break
            previous = max(speeds.values(), default=0.0)
            speeds[size] = size / seconds
            spent = time.perf_counter() - started
            next_one = 2 * (1 + _TIMED_PASSES) * seconds
            if speeds[size] < _WORTH_DOUBLING * previous or spent + next_one > seconds_allowed:
                break
        del reserved
        return speeds

    def sizes(self) -> list[int]:
        """Powers of two that divide a rank's batch; the whole of it where none does."""
        rank_batch_size = self._train_batch_size // self._world_size
        powers = [2**exponent for exponent in range(rank_batch_size.bit_length())]
        sizes = [size for size in powers if size >= min(_SMALLEST, rank_batch_size) and rank_batch_size % size == 0]
        return sizes or [rank_batch_size]

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


def largest_that_fits(trials: MicroBatchTrials, below: int) -> int | None:
    """The largest size under ``below`` that a pass has memory for; None where not even the smallest fits."""
    with torch.compiler.set_stance("force_eager"):  # the model may be compiled by now, for another size
        for size in reversed(trials.sizes()):
            if size < below and trials.seconds_of_a_pass(size) is not None:
                return size
    return None
