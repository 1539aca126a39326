from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from finetune.batches import Batch, DeviceSplit
from finetune.examples import Examples, read_split
from finetune.tasks import TASKS
from finetune.tokens import load_tokens, tokenize_split


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def examples(glue_dir: Path) -> Examples:
    return read_split(TASKS["stsb"], "train", glue_dir)


@pytest.fixture(scope="module")
def split(tokenizer, examples: Examples, tmp_path_factory: pytest.TempPathFactory) -> DeviceSplit:
    folder = tokenize_split(examples, TASKS["stsb"], tokenizer, "t", 20, tmp_path_factory.mktemp("cache"))
    return DeviceSplit(load_tokens(folder), torch.device("cpu"))


def test_batches_equal_the_tokenizers_own_truncation_and_padding(split: DeviceSplit, tokenizer, examples: Examples):
    for batch in split.training_batches(7, seed=[1, 1]):
        texts = [[texts[row] for row in batch.rows] for texts in examples.sentences]
        expected = tokenizer(*texts, truncation="longest_first", max_length=20, padding=True, return_tensors="pt")
        inputs = {"attention_mask": torch.ones_like(batch.inputs["input_ids"]), **batch.inputs}
        assert inputs.keys() == expected.keys()
        assert all((inputs[name] == expected[name]).all() for name in expected)
        assert ("attention_mask" in batch.inputs) == (not expected["attention_mask"].all())
        assert batch.labels.tolist() == [examples.labels[row] for row in batch.rows]


def test_an_epoch_has_every_row_once_in_an_order_that_follows_from_the_seed(split: DeviceSplit):
    def order(*seed: int) -> list[int]:
        batches = list(split.training_batches(5, seed=list(seed)))
        assert len(batches) == split.num_batches(5)
        return np.concatenate([batch.rows for batch in batches]).tolist()

    assert sorted(order(1, 1)) == list(range(48))
    assert order(1, 1) == order(1, 1)
    assert order(1, 1) != order(1, 2) != order(2, 1)


def test_rows_of_similar_length_share_a_batch(split: DeviceSplit):
    def padding(batches: Iterable[Batch]) -> int:
        return sum(batch.inputs["input_ids"].numel() - int(split.lengths[batch.rows].sum()) for batch in batches)

    shuffled = np.random.default_rng(0).permutation(len(split)).reshape(-1, 8)
    unsorted = sum(int((split.lengths[rows].max() - split.lengths[rows]).sum()) for rows in shuffled)
    assert padding(split.training_batches(8, seed=[1])) < unsorted / 2
    assert padding(split.evaluation_batches(8)) < unsorted / 2
