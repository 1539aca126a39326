"""Sequences to micro-batches of one static shape, with next to no padding."""

from collections.abc import Iterator
from dataclasses import dataclass, fields

import numpy as np
import torch

from data_prep.shards import Rows
from pretrain.batch_plan import MicroBatchShape, deal
from pretrain.model import NO_LABEL


@dataclass(frozen=True)
class MicroBatch:
    """The tensors of a forward pass, as small as they go over the wire: the types are those of the shards."""

    input_ids: torch.Tensor
    """Packed [slots], padded [sequences, length]."""
    sequence_length: torch.Tensor
    """[sequences]; 0 for one that is not there."""
    masked_lm_positions: torch.Tensor
    """int32, [predictions], along the flattened ``input_ids``; 0 = unused ([CLS] is never masked)."""
    masked_lm_ids: torch.Tensor
    """[predictions]."""
    max_seq_length: int

    def pin_memory(self) -> "MicroBatch":
        """The same in page-locked memory, from which copies to a GPU need no waiting."""
        tensors = {field.name: getattr(self, field.name) for field in fields(self)}
        return MicroBatch(**{name: t.pin_memory() if isinstance(t, torch.Tensor) else t for name, t in tensors.items()})

    def model_inputs(self, device: torch.device) -> tuple[torch.Tensor | int, ...]:
        """The arguments of ``MaskedLanguageModel.forward``, sent as they are and widened on the device."""
        ids, lengths, positions, labels = (
            tensor.to(device, non_blocking=True).long()
            for tensor in (self.input_ids, self.sequence_length, self.masked_lm_positions, self.masked_lm_ids)
        )
        return ids, lengths, positions, labels.where(positions > 0, NO_LABEL), self.max_seq_length


def pack(rows: Rows, shape: MicroBatchShape, rank: int = 0, world_size: int = 1) -> Iterator[MicroBatch]:
    """Deal rows out to as few micro-batches as they fit in, longest first, and lay every ``world_size``-th of these
    out, beginning with number ``rank``."""
    tokens, predictions = rows.sizes.tokens, rows.sizes.predictions
    order = np.argsort(-tokens, kind="stable")
    groups = -(-len(rows) // shape.sequences)
    while True:
        group = deal(len(rows), groups)
        fullest = [np.bincount(group, values[order]).max() for values in (tokens, predictions)]
        if fullest[0] <= shape.room and fullest[1] <= shape.predictions:
            break
        groups += 1
    for number in range(rank, groups, world_size):
        yield _lay_out(rows[order[group == number]], shape)


def _lay_out(rows: Rows, shape: MicroBatchShape) -> MicroBatch:
    lengths = rows.sizes.tokens
    if shape.is_packed:
        input_ids = np.zeros(shape.slots, dtype=rows.input_ids.dtype)
        inside = np.arange(shape.max_seq_length) < lengths[:, None]
        input_ids[: lengths.sum()] = rows.input_ids[inside]
        starts = lengths.cumsum() - lengths
    else:
        input_ids = np.zeros((shape.sequences, shape.max_seq_length), dtype=rows.input_ids.dtype)
        input_ids[: len(rows)] = rows.input_ids
        starts = np.arange(len(rows)) * shape.max_seq_length
    used = rows.masked_lm_positions > 0
    positions = (rows.masked_lm_positions + starts[:, None])[used].astype(np.int32)
    return MicroBatch(
        input_ids=torch.from_numpy(input_ids),
        sequence_length=_filled_up(rows.sequence_length, shape.sequences),
        masked_lm_positions=_filled_up(positions, shape.predictions),
        masked_lm_ids=_filled_up(rows.masked_lm_ids[used], shape.predictions),
        max_seq_length=shape.max_seq_length,
    )


def _filled_up(values: np.ndarray, size: int) -> torch.Tensor:
    filled = np.zeros(size, dtype=values.dtype)
    filled[: len(values)] = values
    return torch.from_numpy(filled)
