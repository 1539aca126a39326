"""Pass 2, tokens to shards: each shard is a slice of one permutation over all (copy, sequence) pairs.

Gather, mask, write: shards are independent of each other, and any part of one can be made alone. A shard counts as
made once its digest is noted in the work folder; one without is made again, with the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.folders import is_undamaged, write_text
from data_prep.corpus import Corpus, forget_pages, load_corpus
from data_prep.masking import MaskingRule, Vocabulary, mask_rows
from data_prep.sequences import SPECIAL_TOKENS_PER_SEQUENCE
from data_prep.shards import Rows, Shard, Split, position_type, write_shard
from data_prep.shuffle import Permutation

_ROWS_AT_ONCE = 2048  # about what a processor's cache holds
_READS_AT_ONCE = 256  # each maps 64 kB or more of the token file into the process's memory


@dataclass(frozen=True)
class ShardTask:
    """One shard to make: rows [start, stop) of the split's order."""

    file: str
    split: Split
    start: int
    stop: int
    sha256: str | None = None
    """What has to come out, if it was made before."""


@dataclass(frozen=True)
class RowRule:
    """How sequences become rows."""

    max_seq_length: int
    dupe_factor: int
    training: MaskingRule
    validation: MaskingRule
    vocabulary: Vocabulary
    seed: int


def plan_shards(corpus: Corpus, dupe_factor: int, rows_per_shard: int) -> list[ShardTask]:
    """All shards of both splits, those of a split as large as each other and none above ``rows_per_shard``."""
    training = (corpus.num_sequences - corpus.num_validation_sequences) * dupe_factor
    tasks: list[ShardTask] = []
    splits: tuple[tuple[Split, int], ...] = (("train", training), ("validation", corpus.num_validation_sequences))
    for split, num_rows in splits:
        shards = -(-num_rows // rows_per_shard)
        for number in range(shards):
            start, stop = num_rows * number // shards, num_rows * (number + 1) // shards
            tasks.append(ShardTask(f"{split}-{number:05d}.h5", split, start, stop))
    return tasks


def make_shard(task: ShardTask, output_dir: Path, work: Path, rule: RowRule) -> Shard:
    """Make one shard, unless an earlier run did."""
    path, note = output_dir / task.file, _note(work, task.file)
    digest = note.read_text(encoding="utf-8") if note.exists() else ""
    if not is_undamaged(path, digest):
        digest = write_shard(path, _shard_rows(task, work, rule), task.stop - task.start, task.sha256)
        note_shard(work, task.file, digest)
    return Shard(task.file, task.split, task.stop - task.start, digest)


def note_shard(work: Path, file: str, digest: str) -> None:
    """Remember that a shard is made, and its SHA-256."""
    write_text(_note(work, file), digest)


def _note(work: Path, file: str) -> Path:
    return work / f"{file}.sha256"


def _shard_rows(task: ShardTask, work: Path, rule: RowRule) -> Iterator[Rows]:
    """Gather and mask the shard's rows, a chunk at a time."""
    corpus = load_corpus(work)
    for start in range(task.start, task.stop, _ROWS_AT_ONCE):
        order = np.arange(start, min(start + _ROWS_AT_ONCE, task.stop))
        yield make_rows(corpus, task.split, order, rule)


def make_rows(corpus: Corpus, split: Split, order: np.ndarray, rule: RowRule) -> Rows:
    """The rows that stand at places ``order`` (int64, [rows]) of the split's shuffled order."""
    num_validation = corpus.num_validation_sequences
    first = 0 if split == "train" else corpus.num_sequences - num_validation
    sequences, copies = (num_validation, 1) if first else (corpus.num_sequences - num_validation, rule.dupe_factor)
    copy_index, sequence = np.divmod(Permutation(sequences * copies, rule.seed)(order), sequences)
    sequence += first
    start = corpus.starts[sequence]
    length = corpus.starts[sequence + 1] - start
    forget_pages(corpus.starts)
    input_ids = _gather(corpus.tokens, start, length, rule)
    masking = rule.training if split == "train" else rule.validation
    masked, positions, labels = mask_rows(input_ids, sequence, copy_index, rule.vocabulary, masking)
    return Rows(
        input_ids=masked,
        sequence_length=(length + SPECIAL_TOKENS_PER_SEQUENCE).astype(np.uint16),
        masked_lm_positions=positions.astype(position_type(rule.max_seq_length)),
        masked_lm_ids=labels.astype(corpus.tokens.dtype),
    )


def _gather(tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, rule: RowRule) -> np.ndarray:
    """Rows ``[CLS] tokens [SEP] [PAD]...``, shape [len(starts), max_seq_length]."""
    room = rule.max_seq_length - SPECIAL_TOKENS_PER_SEQUENCE
    rows = np.empty((len(starts), rule.max_seq_length), dtype=tokens.dtype)
    runs = np.lib.stride_tricks.sliding_window_view(tokens, room)
    for first in range(0, len(starts), _READS_AT_ONCE):
        part = slice(first, first + _READS_AT_ONCE)
        rows[part, 1:-1] = runs[starts[part]]
        forget_pages(tokens)
    rows[np.arange(rule.max_seq_length) > lengths[:, None]] = rule.vocabulary.pad_id
    rows[:, 0] = rule.vocabulary.cls_id
    rows[np.arange(len(starts)), lengths + 1] = rule.vocabulary.sep_id
    return rows
