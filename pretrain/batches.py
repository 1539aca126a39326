"""Rows to batches: every step's rows are a pure function of how many sequences were seen before.

The training rows, epoch after epoch, form one endless stream (the data is shuffled already; later epochs visit the
shards in a seeded order). A step takes the next ``train_batch_size`` rows, rank r of W the r-th contiguous block of
them. So all ranks make the same number of steps, a resume jumps to its row, and no row is skipped or seen twice.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from common.errors import UserError
from data_prep.shards import Manifest, Rows, SplitReader, concatenate
from pretrain.model import NO_LABEL


@dataclass(frozen=True)
class BatchPlan:
    """The batch arithmetic, derived once."""

    train_batch_size: int
    """Sequences a step over all ranks."""
    micro_batch_size: int
    """Sequences a forward and backward pass on one rank."""
    world_size: int

    def __post_init__(self) -> None:
        if self.train_batch_size % (self.micro_batch_size * self.world_size):
            raise UserError(
                f"train_batch_size {self.train_batch_size} is not divisible by micro_batch_size "
                f"{self.micro_batch_size} x {self.world_size} processes: change one of them"
            )

    @property
    def rank_batch_size(self) -> int:
        """Sequences a step on one rank."""
        return self.train_batch_size // self.world_size

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches a step on one rank."""
        return self.rank_batch_size // self.micro_batch_size

    def __str__(self) -> str:
        return (
            f"{self.train_batch_size} sequences a step = {self.world_size} processes x "
            f"{self.gradient_accumulation_steps} micro-batches x {self.micro_batch_size} sequences"
        )


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step."""

    rows: Rows
    num_predictions: int
    """Predictions of the whole step, over all ranks."""


class TrainingBatches:
    """The stream of training batches of one rank, read ahead by a background thread."""

    def __init__(self, manifest: Manifest, plan: BatchPlan, rank: int, seed: int, sequences_seen: int) -> None:
        self._reader = SplitReader(manifest, "train")
        self._plan = plan
        self._rank = rank
        self._seed = seed
        self._position = sequences_seen
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next = self._thread.submit(self._read_batch, self._position)

    def next_batch(self) -> Batch:
        """The next step's rows of this rank."""
        batch = self._next.result()
        self._position += self._plan.train_batch_size
        self._next = self._thread.submit(self._read_batch, self._position)
        return batch

    def epochs(self, sequences_seen: int) -> float:
        """Passes over all training rows."""
        return sequences_seen / self._reader.num_rows

    def close(self) -> None:
        """Stop the thread and close the files."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._reader.close()

    def _read_batch(self, position: int) -> Batch:
        first = position + self._rank * self._plan.rank_batch_size
        rows = concatenate([self._reader.read(*piece) for piece in self._pieces(first, self._plan.rank_batch_size)])
        # Every rank counts the predictions of the whole step from the shards: cheaper than asking the others.
        whole_step = self._pieces(position, self._plan.train_batch_size)
        return Batch(rows, sum(self._reader.count_predictions(*piece) for piece in whole_step))

    def _pieces(self, position: int, count: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first row, last row + 1) of ``count`` rows of the stream from ``position`` on."""
        while count:
            epoch, row = divmod(position, self._reader.num_rows)
            for shard in self._shard_order(epoch):
                shard_rows = self._reader.shard_rows[shard]
                if row >= shard_rows:
                    row -= shard_rows
                    continue
                stop = min(shard_rows, row + count)
                yield shard, row, stop
                position, count, row = position + stop - row, count - (stop - row), 0
                if not count:
                    return

    def _shard_order(self, epoch: int) -> list[int]:
        shards = len(self._reader.shard_rows)
        if epoch == 0:
            return list(range(shards))
        return np.random.default_rng((self._seed, epoch)).permutation(shards).tolist()


def validation_batches(manifest: Manifest, micro_batch_size: int, rank: int, world_size: int) -> Iterator[Rows]:
    """This rank's contiguous share of the held-out rows, every row on exactly one rank."""
    reader = SplitReader(manifest, "validation")
    start, stop = (reader.num_rows * part // world_size for part in (rank, rank + 1))
    for first in range(start, stop, micro_batch_size):
        yield reader.read_range(first, min(first + micro_batch_size, stop))
    reader.close()


def model_inputs(rows: Rows, size: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """The arguments of ``MaskedLanguageModel.forward`` for up to ``size`` rows.

    Shapes depend on ``size`` alone, so that a compiled step is compiled once: missing rows repeat the first one without
    predictions, and every row has all its ``max_predictions_per_seq`` slots.
    """
    missing = size - len(rows)
    if missing:
        repeated = rows[:1]
        blank = Rows(
            repeated.input_ids, repeated.sequence_length, repeated.masked_lm_positions * 0, repeated.masked_lm_ids * 0
        )
        rows = concatenate([rows] + [blank] * missing)
    positions = rows.masked_lm_positions.astype(np.int64)
    labels = np.where(positions > 0, rows.masked_lm_ids.astype(np.int64), NO_LABEL)
    row_starts = np.arange(size)[:, None] * rows.input_ids.shape[1]
    arrays = (
        rows.input_ids.astype(np.int64),
        rows.sequence_length.astype(np.int64),
        (positions + row_starts).ravel(),
        labels.ravel(),
    )
    return tuple(torch.from_numpy(array).to(device, non_blocking=True) for array in arrays)
