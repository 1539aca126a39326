"""Rows to batches: every step's rows are a pure function of how many sequences were seen before.

The training rows, epoch after epoch, form one endless stream (the data is shuffled already; later epochs visit the
shards in a seeded order). A step takes the next ``train_batch_size`` rows. Every rank reads them all, which costs less
than a step's thousandth part, deals them out to micro-batches as every other does, and keeps its share of these. So all
ranks make the same number of steps and have about as much to do, a resume jumps to its row, and no row is skipped or
seen twice.
"""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple, dataclass

import numpy as np
import torch

from common.errors import UserError
from data_prep.shards import Manifest, RowSizes, SplitReader, concatenate
from pretrain.batch_plan import BatchPlan, MicroBatchShape, plan_shape, sample_size
from pretrain.packing import MicroBatch, pack


@dataclass(frozen=True)
class Workload:
    """What a step computes over all ranks, counted in what the text has of it: padding is no work."""

    sequences: int
    tokens: int
    token_pairs: int
    """That attention relates: the sum of squared lengths."""
    predictions: int

    @staticmethod
    def of(sizes: RowSizes) -> "Workload":
        """The work of rows of these sizes."""
        tokens, predictions = sizes.tokens, sizes.predictions
        return Workload(len(tokens), int(tokens.sum()), int((tokens**2).sum()), int(predictions.sum()))

    @staticmethod
    def sum(parts: "list[Workload]") -> "Workload":
        """All of them together."""
        return Workload(*(sum(values) for values in zip(*map(astuple, parts), strict=True)))


@dataclass(frozen=True)
class Batch:
    """One rank's part of a step."""

    micro_batches: list[MicroBatch]
    workload: Workload
    """Of the whole step, over all ranks."""


class TrainingBatches:
    """The stream of training batches of one rank, read and packed ahead by a background thread.

    Args:
        manifest: the data folder.
        plan: how a global batch is divided.
        shape: of every micro-batch.
        rank: of this process.
        device: where the batches will be used.
        seed: of the order of later epochs.
        sequences_seen: where in the stream to begin.
    """

    def __init__(
        self,
        manifest: Manifest,
        plan: BatchPlan,
        shape: MicroBatchShape,
        rank: int,
        device: torch.device,
        seed: int,
        sequences_seen: int,
    ) -> None:
        self._reader = SplitReader(manifest, "train")
        self._vocab_size = manifest.vocab_size
        self._plan = plan
        self._shape = shape
        self._rank = rank
        self._seed = seed
        self._position = sequences_seen
        self._on_gpu = device.type == "cuda"
        # A thread has a current GPU of its own, which page-locked memory belongs to.
        initializer = (lambda: torch.cuda.set_device(device)) if self._on_gpu else None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches", initializer=initializer)
        self._next = self._thread.submit(self._read_batch, self._position)
        self.wait_seconds = 0.0
        """For how long :meth:`next_batch` has kept its caller waiting, all calls together."""

    def next_batch(self) -> Batch:
        """This rank's part of the next step."""
        started = time.perf_counter()
        batch = self._next.result()
        self.wait_seconds += time.perf_counter() - started
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
        rows = concatenate([self._reader.read(*piece) for piece in self._pieces(position)])
        largest = max(int(rows.input_ids.max()), int(rows.masked_lm_ids.max()))
        if largest >= self._vocab_size:
            raise UserError(f"the shards hold token {largest}, the manifest's vocabulary has {self._vocab_size} tokens")
        own = list(pack(rows, self._shape, self._rank, self._plan.world_size))
        if self._on_gpu:
            own = [micro_batch.pin_memory() for micro_batch in own]
        return Batch(own, Workload.of(rows.sizes))

    def _pieces(self, position: int) -> Iterator[tuple[int, int, int]]:
        """(shard, first row, last row + 1) of a step's rows, which begin at ``position`` of the stream."""
        count = self._plan.train_batch_size
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


def shape_of_micro_batches(manifest: Manifest, plan: BatchPlan) -> MicroBatchShape:
    """The shape that suits the training rows, the same on every rank and at every start."""
    reader = SplitReader(manifest, "train")
    sizes = reader.read_sizes(0, 0, min(sample_size(plan), reader.shard_rows[0]))
    reader.close()
    return plan_shape(sizes, plan, manifest.max_seq_length, manifest.max_predictions_per_seq)
