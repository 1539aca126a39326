"""The operations that a step is said to need are those that the model's matrix products make."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_prep.shards import RowSizes
from pretrain.architecture import ModelConfig, resolve
from pretrain.batches import Workload
from pretrain.flops import matrix_product_rate, model_flops
from pretrain.model import MaskedLanguageModel


def full_rows(count: int, length: int = 128, predictions: int = 20) -> Workload:
    return Workload.of(RowSizes(np.full(count, length), np.full(count, predictions)))


@pytest.mark.parametrize(("preset", "gigaflops"), [("bert-large", 240.6), ("bert-base", 69.9)])
def test_a_full_sequence_costs_what_the_papers_arithmetic_says(preset: str, gigaflops: float) -> None:
    architecture = resolve(ModelConfig(preset=preset), 30_522, 128, 0)
    assert model_flops(architecture, full_rows(1)) / 1e9 == pytest.approx(gigaflops, abs=0.05)
    assert model_flops(architecture, full_rows(64)) == pytest.approx(64 * model_flops(architecture, full_rows(1)))


@pytest.mark.parametrize("layer_norm", ["pre_ln", "post_ln"])
def test_the_count_equals_pytorchs_own_of_the_forward_and_backward_pass(layer_norm: str) -> None:
    config = ModelConfig(preset="bert-mini", layer_norm=layer_norm)
    architecture = resolve(config, vocab_size=640, max_seq_length=64, pad_token_id=0)
    model = MaskedLanguageModel(architecture)
    ids = torch.randint(1, 640, (4, 64))
    positions, labels = torch.arange(40), torch.randint(1, 640, (40,))
    with FlopCounterMode(display=False) as counter, torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        model(ids, torch.full((4,), 64), positions, labels).backward()
    expected = model_flops(architecture, full_rows(4, length=64, predictions=10))
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.01)


def test_short_sequences_count_for_their_tokens_alone() -> None:
    sizes = RowSizes(np.array([10, 30]), np.array([2, 5]))
    work = Workload.of(sizes)
    assert (work.sequences, work.tokens, work.token_pairs, work.predictions) == (2, 40, 1000, 7)
    assert Workload.sum([work, work]) == Workload(4, 80, 2000, 14)


def test_the_hardwares_rate_is_measured() -> None:
    assert 1e8 < matrix_product_rate(torch.device("cpu"), torch.float32) < 1e14
