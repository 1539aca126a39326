import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer, BertTokenizerFast, RobertaTokenizerFast

from common.errors import UserError
from finetune import tokens
from finetune.examples import Examples, read_split
from finetune.tasks import TASKS
from finetune.tokens import TokenizedSplit, load_tokens, tokenize_split

LENGTH = 20


@pytest.fixture(scope="module")
def tokenizer(model_folder: Path):
    return AutoTokenizer.from_pretrained(model_folder)


@pytest.fixture(scope="module")
def examples(glue_dir: Path) -> Examples:
    return read_split(TASKS["stsb"], "train", glue_dir)


@pytest.fixture
def folder(tokenizer, examples: Examples, tmp_path: Path) -> Path:
    return tokenize_split(examples, TASKS["stsb"], tokenizer, "t", LENGTH, tmp_path)


def rows_of(split: TokenizedSplit, flat: np.ndarray) -> list[list[int]]:
    return [row.tolist() for row in np.split(flat, split.offsets[1:-1])]


def test_rows_are_the_tokenizers_own_whatever_the_chunks(
    tokenizer, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(tokens, "_ROWS_AT_ONCE", 7)
    split = load_tokens(tokenize_split(examples, TASKS["stsb"], tokenizer, "t", LENGTH, tmp_path))
    expected = tokenizer(*examples.sentences, truncation="longest_first", max_length=LENGTH)
    assert rows_of(split, split.input_ids) == expected["input_ids"]
    assert rows_of(split, split.token_type_ids) == expected["token_type_ids"]
    lengths = list(map(len, expected["input_ids"]))
    assert max(lengths) == LENGTH, "the data should have rows that are cut"
    assert split.lengths.tolist() == lengths
    assert (len(split), split.num_tokens) == (len(lengths), sum(lengths))
    assert split.labels.tolist() == examples.labels
    assert split.pad_token_id == tokenizer.pad_token_id


def test_arrays_are_mapped_not_copied_and_have_the_promised_types(folder: Path):
    split = load_tokens(folder)
    arrays = (split.input_ids, split.token_type_ids, split.offsets, split.labels)
    assert all(isinstance(array, np.memmap) for array in arrays)
    assert [array.dtype for array in arrays] == [np.int32, np.int32, np.int64, np.float32]


def test_classes_are_int32_and_a_test_split_has_no_labels(tokenizer, tmp_path: Path):
    def labels(labels: list[int] | None) -> np.ndarray | None:
        examples = Examples((["the cat", "a dog"],), labels)
        return load_tokens(tokenize_split(examples, TASKS["sst2"], tokenizer, "t", LENGTH, tmp_path)).labels

    assert labels([0, 1]).dtype == np.int32
    assert labels(None) is None


def test_models_without_token_types_have_none(tmp_path: Path):
    vocabulary = {token: index for index, token in enumerate(["<s>", "<pad>", "</s>", "<unk>", "a", "b"])}
    roberta = RobertaTokenizerFast(vocab=vocabulary, merges=[])
    examples = Examples((["a", "ab"], ["b", "b"]), [0, 1])
    split = load_tokens(tokenize_split(examples, TASKS["rte"], roberta, "t", LENGTH, tmp_path))
    assert split.token_type_ids is None
    assert rows_of(split, split.input_ids) == [[0, 4, 2, 2, 5, 2], [0, 4, 5, 2, 2, 5, 2]]
    assert split.pad_token_id == 1


def test_the_folder_follows_from_rows_tokenizer_and_length(tokenizer, examples: Examples, folder: Path):
    def other(examples: Examples = examples, tokenizer_sha256: str = "t", length: int = LENGTH) -> Path:
        return tokenize_split(examples, TASKS["stsb"], tokenizer, tokenizer_sha256, length, folder.parent)

    assert other() == folder
    relabelled = replace(examples, labels=[0.0] * len(examples))
    folders = {folder, other(relabelled), other(tokenizer_sha256="u"), other(length=LENGTH + 1)}
    assert len(folders) == 4
    assert {path for path in folder.parent.iterdir() if not path.name.startswith(".")} == folders


class NeverCalled:
    pad_token_id = 0

    def __call__(self, *texts, **options):
        raise AssertionError("tokenised again")


def test_what_is_there_is_never_made_again(examples: Examples, folder: Path):
    assert tokenize_split(examples, TASKS["stsb"], NeverCalled(), "t", LENGTH, folder.parent) == folder


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-8])


def change(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1] + b"\xff")


DAMAGES = {
    "array cut": ("input_ids.npy", cut),
    "array changed": ("labels.npy", change),
    "array gone": ("offsets.npy", Path.unlink),
    "summary gone": ("summary.json", Path.unlink),
    "summary cut": ("summary.json", cut),
    "summary of something else": ("summary.json", lambda path: path.write_text('{"files": 3}')),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_folder_is_made_again(case: str, tokenizer, examples: Examples, folder: Path):
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    name, damage = DAMAGES[case]
    damage(folder / name)
    assert tokenize_split(examples, TASKS["stsb"], tokenizer, "t", LENGTH, folder.parent) == folder
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == whole


def test_what_fails_halfway_leaves_nothing(
    tokenizer, examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full_disk(*arguments) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tokens, "write_json", full_disk)
    with pytest.raises(OSError, match="No space left"):
        tokenize_split(examples, TASKS["stsb"], tokenizer, "t", LENGTH, tmp_path)
    assert [path for path in tmp_path.iterdir() if path.is_dir()] == []


class CountingTokenizer:
    """Gives every text two tokens and counts its calls."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.num_calls = 0

    def __call__(self, texts: list[str], **options) -> dict[str, list[list[int]]]:
        self.num_calls += 1
        time.sleep(0.05)  # for the others to come
        return {"input_ids": [[1, 2]] * len(texts)}


def test_of_several_who_ask_at_once_one_tokenises(tmp_path: Path):
    tokenizer, together = CountingTokenizer(), threading.Barrier(4)

    def ask(_: int) -> Path:
        together.wait(timeout=60)
        return tokenize_split(Examples((["a"] * 3,), [0, 1, 0]), TASKS["sst2"], tokenizer, "t", LENGTH, tmp_path)

    with ThreadPoolExecutor(4) as pool:
        folders = set(pool.map(ask, range(4)))
    assert (len(folders), tokenizer.num_calls) == (1, 1)


def test_a_tokenizer_without_padding_is_refused(examples: Examples, tmp_path: Path):
    tokenizer = BertTokenizerFast(vocab={"[UNK]": 0, "[CLS]": 1, "[SEP]": 2}, pad_token=None)
    with pytest.raises(UserError, match="has no padding token"):
        tokenize_split(examples, TASKS["stsb"], tokenizer, "t", LENGTH, tmp_path)
    assert list(tmp_path.iterdir()) == []
