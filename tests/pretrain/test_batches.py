"""Every row is trained on once an epoch, by one rank, at a place that follows from its number alone."""

import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Source
from data_prep.shards import Manifest, SplitReader, read_manifest
from pretrain.batch_plan import BatchPlan
from pretrain.batches import TrainingBatches, shape_of_micro_batches
from pretrain.packing import MicroBatch


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("batches") / "data"
    source = Source("demo", megabytes=0.1)
    build(DataConfig([source], "train", vocab_size=800, max_seq_length=64, dupe_factor=3, rows_per_shard=250), folder)
    return read_manifest(folder)


CPU = torch.device("cpu")


def all_rows(manifest: Manifest, split: str) -> list[bytes]:
    """Every row's tokens, in order."""
    reader = SplitReader(manifest, split)
    rows = reader.read_range(0, reader.num_rows)
    reader.close()
    return [ids[:length].tobytes() for ids, length in zip(rows.input_ids, rows.sequence_length, strict=True)]


def sequences_of(micro_batch: MicroBatch) -> list[bytes]:
    """The same of a packed micro-batch."""
    ids, lengths = micro_batch.input_ids.numpy(), micro_batch.sequence_length.numpy().astype(int)
    stops = lengths.cumsum()
    return [ids[stop - length : stop].tobytes() for stop, length in zip(stops, lengths, strict=True) if length]


def read_steps(manifest: Manifest, world_size: int, steps: int, sequences_seen: int = 0) -> list[list[bytes]]:
    """The sequences of each global batch, which all ranks see together, sorted."""
    plan = BatchPlan(train_batch_size=48, micro_batch_size=8, world_size=world_size)
    shape = shape_of_micro_batches(manifest, plan)
    assert shape.is_packed
    ranks = [TrainingBatches(manifest, plan, shape, rank, CPU, 5, sequences_seen) for rank in range(world_size)]
    batches = []
    for _ in range(steps):
        parts = [micro_batch for rank in ranks for micro_batch in rank.next_batch().micro_batches]
        batches.append(sorted(sequence for part in parts for sequence in sequences_of(part)))
    for rank in ranks:
        rank.close()
    return batches


def test_the_first_epoch_is_the_shards_in_order(manifest) -> None:
    rows = all_rows(manifest, "train")
    for step, batch in enumerate(read_steps(manifest, 1, len(rows) // 48)):
        assert batch == sorted(rows[step * 48 : (step + 1) * 48])


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_sees_the_same_global_batches(manifest, world_size: int) -> None:
    assert read_steps(manifest, 1, 30) == read_steps(manifest, world_size, 30)


def test_every_epoch_has_each_row_once_in_another_order_of_shards(manifest) -> None:
    rows = all_rows(manifest, "train")
    batches = read_steps(manifest, 1, 2 * len(rows) // 48)
    within_first = len(rows) // 48
    assert sorted(row for batch in batches for row in batch)[:10] == sorted(rows * 2)[:10]
    counts = Counter(row for batch in batches for row in batch)
    in_data = Counter(rows)
    assert all(counts[row] <= 2 * number for row, number in in_data.items())
    assert sum(counts.values()) == len(batches) * 48
    assert batches[:within_first] != batches[within_first : 2 * within_first]


def test_a_resume_goes_on_at_the_next_row(manifest) -> None:
    assert read_steps(manifest, 2, 60)[40:] == read_steps(manifest, 2, 20, sequences_seen=40 * 48)


def test_the_work_of_a_step_is_counted_over_all_ranks(manifest) -> None:
    plan = BatchPlan(48, 8, world_size=2)
    shape = shape_of_micro_batches(manifest, plan)
    ranks = [TrainingBatches(manifest, plan, shape, rank, CPU, seed=5, sequences_seen=0) for rank in range(2)]
    batches = [rank.next_batch() for rank in ranks]
    parts = [micro_batch for batch in batches for micro_batch in batch.micro_batches]
    lengths = torch.cat([part.sequence_length for part in parts]).long()
    assert batches[0].workload == batches[1].workload
    work = batches[0].workload
    assert work.sequences == 48
    assert work.tokens == lengths.sum()
    assert work.token_pairs == (lengths**2).sum()
    assert work.predictions == sum(int((part.masked_lm_positions > 0).sum()) for part in parts)
    for rank in ranks:
        rank.close()


def test_waiting_for_data_is_measured(manifest, monkeypatch) -> None:
    plan = BatchPlan(48, 8, world_size=1)
    shape = shape_of_micro_batches(manifest, plan)
    monkeypatch.setattr(SplitReader, "read", lambda *_, real=SplitReader.read: time.sleep(0.2) or real(*_))
    batches = TrainingBatches(manifest, plan, shape, 0, CPU, seed=5, sequences_seen=0)
    batches.next_batch()
    assert batches.wait_seconds > 0.1
    batches.close()


def test_a_batch_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"train_batch_size 100 .* micro_batch_size 8 x 2 processes"):
        BatchPlan(100, 8, 2)
