"""Batches of rows of similar length, gathered from token arrays that lie on the device."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch

from finetune.tokens import TokenizedSplit

BATCHES_PER_WINDOW: Final = 50  # as transformers' length-grouped sampler: large enough to save padding, still random


@dataclass(frozen=True)
class Batch:
    """Rows of similar length, padded to the longest of them, on the device."""

    rows: np.ndarray
    """Their places in the split, [batch]."""
    inputs: dict[str, torch.Tensor]
    """The model's keyword arguments, int64 [batch, longest]; no ``attention_mask`` where nothing is padded."""
    labels: torch.Tensor | None
    """int64 class indices or float32 scores, [batch]; None for a test split."""

    def split(self, num_parts: int) -> "list[Batch]":
        """So many parts of it, or as many as it has rows, one after the other."""
        size = math.ceil(len(self.rows) / num_parts)
        places = [slice(start, start + size) for start in range(0, len(self.rows), size)]
        return [
            Batch(
                self.rows[place],
                {name: tensor[place] for name, tensor in self.inputs.items()},
                None if self.labels is None else self.labels[place],
            )
            for place in places
        ]


class DeviceSplit:
    """A split's tokens on a device: copied there once, so that a batch costs no transfer but its row numbers.

    On a CPU the arrays stay the memory-mapped files that all workers share.
    """

    def __init__(self, split: TokenizedSplit, device: torch.device) -> None:
        self.lengths = split.lengths
        self._pad_token_id = split.pad_token_id
        self._device = device
        self._offsets = torch.from_numpy(split.offsets).to(device)
        self._input_ids = torch.from_numpy(split.input_ids).to(device)
        token_types, labels = split.token_type_ids, split.labels
        self._token_type_ids = None if token_types is None else torch.from_numpy(token_types).to(device)
        self._labels = None if labels is None else torch.from_numpy(labels).to(device)

    def __len__(self) -> int:
        return len(self.lengths)

    def training_batches(self, batch_size: int, seed: list[int]) -> Iterator[Batch]:
        """Every row once, in an order that follows from ``seed``; one batch may be smaller than ``batch_size``.

        Rows are shuffled, sorted by length within windows, and the resulting batches are shuffled.
        """
        random = np.random.default_rng(seed)
        order = random.permutation(len(self))
        batches: list[np.ndarray] = []
        window_size = BATCHES_PER_WINDOW * batch_size
        for start in range(0, len(order), window_size):
            window = order[start : start + window_size]
            batches += _cut(window[np.argsort(self.lengths[window], kind="stable")], batch_size)
        for index in random.permutation(len(batches)):
            yield self._gather(batches[index])

    def evaluation_batches(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, by length."""
        for rows in _cut(np.argsort(self.lengths, kind="stable"), batch_size):
            yield self._gather(rows)

    def longest_batch(self, batch_size: int) -> Batch:
        """The one that takes most memory."""
        return self._gather(np.argsort(self.lengths, kind="stable")[-batch_size:])

    def num_batches(self, batch_size: int) -> int:
        """Batches of one pass."""
        return math.ceil(len(self) / batch_size)

    def _gather(self, rows: np.ndarray) -> Batch:
        lengths = self.lengths[rows]
        longest = int(lengths.max())  # from the host's copy: asking the device would wait for it
        places_of_rows = torch.from_numpy(rows).to(self._device, non_blocking=True)
        starts, ends = self._offsets[places_of_rows, None], self._offsets[places_of_rows + 1, None]
        places = starts + torch.arange(longest, device=self._device)
        is_token = places < ends
        # Places past a row's end are clipped into the array and then overwritten with padding.
        places.clamp_(max=len(self._input_ids) - 1)
        inputs = {"input_ids": torch.where(is_token, self._input_ids[places], self._pad_token_id).long()}
        if self._token_type_ids is not None:
            inputs["token_type_ids"] = torch.where(is_token, self._token_type_ids[places], 0).long()
        if lengths.min() < longest:
            inputs["attention_mask"] = is_token.long()
        labels = None if self._labels is None else self._labels[places_of_rows]
        return Batch(rows, inputs, labels.long() if labels is not None and not labels.is_floating_point() else labels)


def _cut(rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
