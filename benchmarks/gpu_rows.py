"""What the GPU benchmark trains on: random rows, never zeros, full ones and ones as long as Wikipedia's."""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch

from data_prep.shards import Manifest, Rows, RowSizes, SplitReader, position_type, token_type
from pretrain.batch_plan import BatchPlan, MicroBatchShape, plan_shape, sample_size
from pretrain.batches import Batch, Workload
from pretrain.packing import MicroBatch, pack

_SHORTEST = 5
_SHORT_SEQ_PROB = 0.1
_MEAN_GAP = 28 / 128  # of the places, which a sequence of whole sentences leaves empty
_MASKED_LM_PROB = 0.15


@dataclass(frozen=True)
class RowSource:
    """Where rows come from, and their limits."""

    vocab_size: int
    max_seq_length: int
    max_predictions_per_seq: int
    manifest: Manifest | None = None
    """Of the data folder that realistic lengths come from; None: drawn as they are in English Wikipedia."""

    def full_rows(self, count: int, generator: np.random.Generator) -> Rows:
        """Rows without padding, with all the predictions that a row has room for."""
        tokens, predictions = np.full(count, self.max_seq_length), np.full(count, self.max_predictions_per_seq)
        return self._rows(RowSizes(tokens, predictions), generator)

    def realistic_rows(self, count: int, generator: np.random.Generator) -> Rows:
        """Rows as long as text makes them, 15 % of the tokens masked."""
        return self._rows(self._realistic_sizes(count, generator), generator)

    def _realistic_sizes(self, count: int, generator: np.random.Generator) -> RowSizes:
        tokens = self._drawn_lengths(count, generator) if self.manifest is None else self._read_lengths(count)
        predictions = np.rint(_MASKED_LM_PROB * (tokens - 2)).clip(1, self.max_predictions_per_seq)
        return RowSizes(tokens, predictions.astype(np.int64))

    def _drawn_lengths(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Nine tenths leave a gap that is exponentially distributed, a tenth aim at any length.

        At 128 that is a mean of 97, a standard deviation of 29 and 3 % full rows, as English Wikipedia has.
        """
        gap = generator.exponential(_MEAN_GAP * self.max_seq_length, count).astype(np.int64)
        short = generator.random(count) < _SHORT_SEQ_PROB
        any_length = generator.integers(_SHORTEST, self.max_seq_length + 1, count)
        return np.where(short, any_length, self.max_seq_length - gap).clip(min=_SHORTEST)

    def _read_lengths(self, count: int) -> np.ndarray:
        """Of the first rows, over and over where there are fewer."""
        reader = SplitReader(self.manifest, "train")
        lengths = reader.read_sizes(0, 0, min(count, reader.shard_rows[0])).tokens
        reader.close()
        return np.resize(lengths, count)

    def _rows(self, sizes: RowSizes, generator: np.random.Generator) -> Rows:
        token, position = token_type(self.vocab_size), position_type(self.max_seq_length)
        column, slot = np.arange(self.max_seq_length), np.arange(self.max_predictions_per_seq)
        ids, labels = (
            generator.integers(1, self.vocab_size, (len(sizes.tokens), width)) for width in (len(column), len(slot))
        )
        positions = 1 + slot * ((sizes.tokens - 2) // len(slot)).clip(min=1)[:, None]  # evenly spread after [CLS]
        used = slot < sizes.predictions[:, None]
        return Rows(
            input_ids=np.where(column < sizes.tokens[:, None], ids, 0).astype(token),
            sequence_length=sizes.tokens.astype(np.uint16),
            masked_lm_positions=np.where(used, positions, 0).astype(position),
            masked_lm_ids=np.where(used, labels, 0).astype(token),
        )

    def padded_shape(self, sequences: int) -> MicroBatchShape:
        """A row for each sequence, and room for all the predictions that could be."""
        slots, predictions = sequences * self.max_seq_length, sequences * self.max_predictions_per_seq
        return MicroBatchShape(sequences, self.max_seq_length, slots, predictions)

    def packed_shape(self, plan: BatchPlan) -> MicroBatchShape:
        """As a run would choose it from a sample of realistic rows."""
        sizes = self._realistic_sizes(sample_size(plan), np.random.default_rng(0))
        return plan_shape(sizes, plan, self.max_seq_length, self.max_predictions_per_seq)


def to_batch(rows: Rows, shape: MicroBatchShape, device: torch.device) -> Batch:
    """One step's batch, as a run's background thread makes it."""
    return Batch(list(_micro_batches(rows, shape, device)), Workload.of(rows.sizes))


def _micro_batches(rows: Rows, shape: MicroBatchShape, device: torch.device) -> Iterator[MicroBatch]:
    for micro_batch in pack(rows, shape):
        yield micro_batch.pin_memory() if device.type == "cuda" else micro_batch


def with_dense_head(batch: Batch) -> Batch:
    """The same tokens, with logits computed at every position."""
    return replace(batch, micro_batches=[with_all_positions(micro_batch) for micro_batch in batch.micro_batches])


def with_all_positions(micro_batch: MicroBatch) -> MicroBatch:
    """The same of one micro-batch."""
    labels = micro_batch.input_ids.flatten()
    positions = torch.arange(len(labels), dtype=torch.int32)
    return replace(micro_batch, masked_lm_positions=positions, masked_lm_ids=labels)
