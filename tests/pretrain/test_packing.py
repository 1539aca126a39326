"""Packing computes what padding would, on every sequence once, and leaves next to nothing empty."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from data_prep.shards import Rows
from pretrain.architecture import ModelConfig, resolve
from pretrain.batch_plan import BatchPlan, MicroBatchShape, deal, plan_shape
from pretrain.model import MaskedLanguageModel
from pretrain.packing import MicroBatch, pack

CPU = torch.device("cpu")
LENGTH, PREDICTIONS = 128, 20


def text_like_rows(count: int, seed: int = 0) -> Rows:
    """Rows whose lengths are spread as sentence-ended sequences of Wikipedia are: most of them nearly full."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(LENGTH - generator.gamma(1.1, 28.0, count).astype(int), 5, LENGTH)
    inside = np.arange(LENGTH) < lengths[:, None]
    predictions = np.clip(np.round(0.15 * lengths), 1, PREDICTIONS).astype(int)
    order = 1 + np.argsort(np.where(inside[:, 1:], generator.random((count, LENGTH - 1)), 2), axis=1)[:, :PREDICTIONS]
    used = np.arange(PREDICTIONS) < predictions[:, None]
    positions = np.where(used, np.sort(np.where(used, order, LENGTH), axis=1), 0).astype(np.uint8)
    return Rows(
        input_ids=np.where(inside, generator.integers(5, 500, inside.shape), 0).astype(np.uint16),
        sequence_length=lengths.astype(np.uint16),
        masked_lm_positions=positions,
        masked_lm_ids=np.where(positions > 0, generator.integers(5, 500, positions.shape), 0).astype(np.uint16),
    )


def shape_for(rows: Rows, train_batch_size: int, micro_batch_size: int) -> MicroBatchShape:
    return plan_shape(rows.sizes, BatchPlan(train_batch_size, micro_batch_size, 1), LENGTH, PREDICTIONS)


def sequences_of(micro_batch: MicroBatch) -> list[tuple]:
    """Each sequence's tokens, and what is predicted where in it, read back from a packed micro-batch."""
    lengths = micro_batch.sequence_length.numpy().astype(int)
    ids = micro_batch.input_ids.numpy()
    targets = dict(zip(micro_batch.masked_lm_positions.tolist(), micro_batch.masked_lm_ids.tolist(), strict=True))
    start, found = 0, []
    for length in lengths[lengths > 0]:
        predicted = tuple((p - start, targets[p]) for p in range(start + 1, start + length) if p in targets)
        found.append((tuple(ids[start : start + length].tolist()), predicted))
        start += length
    return found


def sequences_of_rows(rows: Rows) -> list[tuple]:
    found = []
    for index, length in enumerate(rows.sizes.tokens):
        used = rows.masked_lm_positions[index] > 0
        pairs = zip(
            rows.masked_lm_positions[index][used].tolist(), rows.masked_lm_ids[index][used].tolist(), strict=True
        )
        found.append((tuple(rows.input_ids[index, :length].tolist()), tuple(pairs)))
    return found


@pytest.mark.parametrize("count", [512, 511, 100, 33, 1])
def test_every_sequence_lies_in_one_micro_batch_with_its_predictions(count: int) -> None:
    rows = text_like_rows(count)
    shape = shape_for(text_like_rows(4096, seed=1), 512, 32)
    assert shape.is_packed
    packed = [sequence for micro_batch in pack(rows, shape) for sequence in sequences_of(micro_batch)]
    assert sorted(packed) == sorted(sequences_of_rows(rows))


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_micro_batches_of_one_process(world_size: int) -> None:
    rows, shape = text_like_rows(384), shape_for(text_like_rows(4096, seed=1), 384, 32)
    alone = [micro_batch.input_ids for micro_batch in pack(rows, shape)]
    shares = [list(pack(rows, shape, rank, world_size)) for rank in range(world_size)]
    for number, expected in enumerate(alone):
        assert torch.equal(shares[number % world_size][number // world_size].input_ids, expected)
    assert sum(map(len, shares)) == len(alone)


@pytest.mark.parametrize(("train_batch_size", "micro_batch_size"), [(512, 32), (512, 64), (4096, 128)])
def test_at_most_three_percent_of_what_is_computed_is_padding(train_batch_size: int, micro_batch_size: int) -> None:
    planned, trained = text_like_rows(65_536, seed=1), text_like_rows(65_536, seed=2)
    shape = shape_for(planned, train_batch_size, micro_batch_size)
    computed = 0
    for first in range(0, 65_536, train_batch_size):
        rows = trained[first : first + train_batch_size]
        computed += shape.slots * sum(1 for _ in pack(rows, shape))
    assert 1 - trained.sizes.tokens.sum() / computed <= 0.03
    assert 1 - trained.sizes.tokens.mean() / LENGTH > 0.15, "there would be nothing to gain"


def test_all_micro_batches_of_a_run_have_one_shape() -> None:
    shape = shape_for(text_like_rows(4096, seed=1), 256, 32)
    shapes = set()
    for seed, count in enumerate([256, 256, 250, 31, 1]):
        for micro_batch in pack(text_like_rows(count, seed), shape):
            tensors = [value for value in vars(micro_batch).values() if isinstance(value, torch.Tensor)]
            shapes.add(tuple((tuple(tensor.shape), tensor.dtype) for tensor in tensors))
    assert len(shapes) == 1


def test_a_step_of_unusually_long_sequences_makes_more_micro_batches() -> None:
    rows = text_like_rows(256)
    shape = shape_for(rows, 256, 32)
    full = replace(rows, sequence_length=np.full_like(rows.sequence_length, LENGTH))
    micro_batches = list(pack(full, shape))
    assert len(micro_batches) > 8
    assert sum(int((micro_batch.sequence_length.long() > 0).sum()) for micro_batch in micro_batches) == 256
    assert all(int(micro_batch.sequence_length.long().sum()) < shape.slots for micro_batch in micro_batches)


def test_sequences_that_fill_their_rows_are_not_packed() -> None:
    rows = text_like_rows(512)
    shape = shape_for(replace(rows, sequence_length=np.full_like(rows.sequence_length, LENGTH)), 256, 32)
    assert not shape.is_packed
    assert shape.slots == 32 * LENGTH


@pytest.mark.parametrize(("sequences", "groups"), [(512, 16), (10, 3), (7, 7), (1, 1)])
def test_dealing_gives_every_group_as_many(sequences: int, groups: int) -> None:
    counts = np.bincount(deal(sequences, groups), minlength=groups)
    assert counts.max() - counts.min() <= 1


def model(layer_norm: str) -> MaskedLanguageModel:
    torch.manual_seed(0)
    config = ModelConfig(preset="bert-tiny", hidden_size=32, num_attention_heads=4, layer_norm=layer_norm)
    return MaskedLanguageModel(resolve(config, vocab_size=500, max_seq_length=LENGTH, pad_token_id=0)).double().eval()


def loss_and_gradients(model: MaskedLanguageModel, rows: Rows, shape: MicroBatchShape):
    model.zero_grad()
    loss = sum(model(*micro_batch.model_inputs(CPU)) for micro_batch in pack(rows, shape))
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
@pytest.mark.parametrize("count", [61, 64])
def test_packed_loss_and_gradients_equal_the_padded_ones(layer_norm: str, count: int) -> None:
    rows, net = text_like_rows(count), model(layer_norm)
    packed = shape_for(text_like_rows(4096, seed=1), 64, 16)
    padded = MicroBatchShape(count, LENGTH, count * LENGTH, count * PREDICTIONS)
    assert packed.is_packed
    loss, gradients = loss_and_gradients(net, rows, packed)
    expected_loss, expected = loss_and_gradients(net, rows, padded)
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-12, msg=name)


def test_no_sequence_sees_its_neighbours() -> None:
    rows, net = text_like_rows(8), model("pre_ln")
    shape = MicroBatchShape(8, LENGTH, 8 * LENGTH - 16, 8 * PREDICTIONS)
    (micro_batch,) = pack(rows, shape)
    ids, lengths, _, _, length = micro_batch.model_inputs(CPU)
    first = int(lengths[0])
    with torch.no_grad():
        before = net.encode(ids, lengths, length)
        changed = ids.clone()
        changed[first:] = 7
        after = net.encode(changed, lengths, length)
    torch.testing.assert_close(before[:first], after[:first], rtol=0, atol=0)
    assert not torch.equal(before[first:], after[first:])


def test_attention_dropout_acts_inside_packed_sequences() -> None:
    config = ModelConfig(preset="bert-tiny", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.5)
    net = MaskedLanguageModel(resolve(config, 500, LENGTH, 0)).train()
    (micro_batch,) = pack(text_like_rows(4), MicroBatchShape(4, LENGTH, 4 * LENGTH - 16, 4 * PREDICTIONS))
    inputs = micro_batch.model_inputs(CPU)
    assert net(*inputs).item() != net(*inputs).item()
    assert net.eval()(*inputs).item() == net(*inputs).item()


@pytest.mark.parametrize(("train_batch_size", "micro_batch_size"), [(512, 32), (96, 8), (24, 24), (7, 1)])
def test_the_planned_room_is_what_real_micro_batches_need(train_batch_size: int, micro_batch_size: int) -> None:
    rows = text_like_rows(train_batch_size)
    shape = shape_for(rows, train_batch_size, micro_batch_size)
    packed = list(pack(rows, shape))
    assert len(packed) == train_batch_size // micro_batch_size
    fullest = max(int(micro_batch.sequence_length.long().sum()) for micro_batch in packed)
    assert shape.room - 16 <= fullest <= shape.room or shape.slots in (LENGTH, micro_batch_size * LENGTH)
