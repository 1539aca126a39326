"""Every row is trained on once an epoch, by one rank, at a place that follows from its number alone."""

from pathlib import Path

import numpy as np
import pytest
import torch

from common.errors import UserError
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Source
from data_prep.shards import Manifest, SplitReader, read_manifest
from pretrain.batches import BatchPlan, TrainingBatches, model_inputs, validation_batches
from pretrain.model import NO_LABEL


@pytest.fixture(scope="module")
def manifest(tmp_path_factory) -> Manifest:
    folder: Path = tmp_path_factory.mktemp("batches") / "data"
    source = Source("demo", megabytes=0.1)
    build(DataConfig([source], "train", vocab_size=800, max_seq_length=64, dupe_factor=3, rows_per_shard=250), folder)
    return read_manifest(folder)


def all_rows(manifest: Manifest, split: str) -> np.ndarray:
    reader = SplitReader(manifest, split)
    rows = reader.read_range(0, reader.num_rows).input_ids
    reader.close()
    return rows


def read_steps(manifest: Manifest, world_size: int, steps: int, sequences_seen: int = 0) -> list[np.ndarray]:
    """The global batches that all ranks together see."""
    plan = BatchPlan(train_batch_size=48, micro_batch_size=8, world_size=world_size)
    ranks = [TrainingBatches(manifest, plan, rank, seed=5, sequences_seen=sequences_seen) for rank in range(world_size)]
    batches = [np.concatenate([rank.next_batch().rows.input_ids for rank in ranks]) for _ in range(steps)]
    for rank in ranks:
        rank.close()
    return batches


def test_the_first_epoch_is_the_shards_in_order(manifest) -> None:
    rows = all_rows(manifest, "train")
    steps = len(rows) // 48
    np.testing.assert_array_equal(np.concatenate(read_steps(manifest, 1, steps)), rows[: steps * 48])


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_sees_the_same_global_batches(manifest, world_size: int) -> None:
    alone, together = read_steps(manifest, 1, 30), read_steps(manifest, world_size, 30)
    for first, second in zip(alone, together, strict=True):
        np.testing.assert_array_equal(first, second)


def test_every_epoch_has_each_row_once_in_another_order_of_shards(manifest) -> None:
    rows = all_rows(manifest, "train")
    stream = np.concatenate(read_steps(manifest, 1, 3 * len(rows) // 48 + 1))
    first, second = stream[: len(rows)], stream[len(rows) : 2 * len(rows)]
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))
    assert not np.array_equal(first, second)


def test_a_resume_goes_on_at_the_next_row(manifest) -> None:
    whole = read_steps(manifest, 2, 60)
    resumed = read_steps(manifest, 2, 20, sequences_seen=40 * 48)
    for first, second in zip(whole[40:], resumed, strict=True):
        np.testing.assert_array_equal(first, second)


def test_predictions_are_counted_over_all_ranks(manifest) -> None:
    plan = BatchPlan(48, 8, world_size=2)
    ranks = [TrainingBatches(manifest, plan, rank, seed=5, sequences_seen=0) for rank in range(2)]
    batches = [rank.next_batch() for rank in ranks]
    own = sum(int((batch.rows.masked_lm_positions > 0).sum()) for batch in batches)
    assert [batch.num_predictions for batch in batches] == [own, own]
    for rank in ranks:
        rank.close()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_reads_every_held_out_row_once(manifest, world_size: int) -> None:
    seen = [rows.input_ids for rank in range(world_size) for rows in validation_batches(manifest, 4, rank, world_size)]
    np.testing.assert_array_equal(np.concatenate(seen), all_rows(manifest, "validation"))


def test_inputs_have_one_shape_and_blank_rows_predict_nothing(manifest) -> None:
    reader = SplitReader(manifest, "train")
    full = model_inputs(reader.read_range(0, 8), 8, torch.device("cpu"))
    part = model_inputs(reader.read_range(0, 3), 8, torch.device("cpu"))
    reader.close()
    assert [tensor.shape for tensor in full] == [tensor.shape for tensor in part]
    slots = 3 * manifest.max_predictions_per_seq
    torch.testing.assert_close(part[3][:slots], full[3][:slots])
    assert (part[3][slots:] == NO_LABEL).all()


def test_a_batch_that_does_not_divide_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"train_batch_size 100 .* micro_batch_size 8 x 2 processes"):
        BatchPlan(100, 8, 2)
