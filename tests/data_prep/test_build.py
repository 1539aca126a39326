"""The data folder holds every copy of every sequence exactly once, and comes out the same however it was made."""

import gzip
import json
import os
import shutil
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import h5py
import numpy as np
import pytest
import tokenizers

from common.errors import UserError
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.demo_corpus import demo_documents
from data_prep.documents import Source
from data_prep.inspect import inspect_folder, summary, verify
from data_prep.shards import SplitReader, read_manifest
from data_prep.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "corpus.txt.gz"
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.write("\n\n".join(demo_documents(seed=3, megabytes=0.3)))
    return path


@pytest.fixture(scope="module")
def config(text_file) -> DataConfig:
    return DataConfig(
        sources=[Source("text", str(text_file))],
        tokenizer="train",
        vocab_size=1000,
        max_seq_length=64,
        dupe_factor=4,
        max_predictions_per_seq=10,
        validation_fraction=0.02,
        rows_per_shard=1500,
        num_workers=2,
    )


@pytest.fixture(scope="module")
def folder(config, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("data") / "built"
    build(config, folder)
    return folder


def originals(folder: Path, split: str) -> list[bytes]:
    """Every row of a split with its masks undone."""
    reader = SplitReader(read_manifest(folder), split)
    rows = reader.read_range(0, reader.num_rows)
    restored = rows.input_ids.copy()
    used = rows.masked_lm_positions > 0
    restored[np.nonzero(used)[0], rows.masked_lm_positions[used]] = rows.masked_lm_ids[used]
    reader.close()
    return [row.tobytes() for row in restored]


def shard_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.h5"))}


def test_every_sequence_appears_exactly_once_a_copy(folder, config) -> None:
    manifest = read_manifest(folder).content
    counts = Counter(originals(folder, "train"))
    # Distinct sequences may have equal text, so a count is a multiple of the copies.
    assert all(count % config.dupe_factor == 0 for count in counts.values())
    training = manifest["num_sequences"] - manifest["num_validation_sequences"]
    assert counts.total() == training * config.dupe_factor
    assert len(originals(folder, "validation")) == manifest["num_validation_sequences"] > 0


def test_copies_of_a_sequence_are_spread_over_all_shards(folder) -> None:
    rows = originals(folder, "train")
    where: dict[bytes, list[int]] = {}
    for index, row in enumerate(rows):
        where.setdefault(row, []).append(index)
    distances = [abs(a - b) for places in where.values() for a, b in pairwise(places)]
    # Four copies anywhere: neighbours lie a fifth of the data apart on average.
    assert abs(np.mean(distances) / len(rows) - 0.2) < 0.03


def test_held_out_documents_are_not_trained_on(folder) -> None:
    tokenizer_rows = set(originals(folder, "train"))
    held_out = [row for row in originals(folder, "validation") if len(row.rstrip(b"\0")) > 40]
    assert held_out
    assert not tokenizer_rows.intersection(held_out)


def test_shards_have_the_documented_format(folder) -> None:
    manifest = read_manifest(folder)
    rows = manifest.of_split("train")[0].rows
    with h5py.File(folder / manifest.of_split("train")[0].file) as file:
        described = {name: (str(data.dtype), data.shape, data.chunks) for name, data in file.items()}
    assert described == {
        "input_ids": ("uint16", (rows, 64), None),
        "sequence_length": ("uint16", (rows,), None),
        "masked_lm_positions": ("uint8", (rows, 10), None),
        "masked_lm_ids": ("uint16", (rows, 10), None),
    }


def test_shards_of_a_split_are_as_large_as_each_other(folder) -> None:
    rows = [shard.rows for shard in read_manifest(folder).of_split("train")]
    assert len(rows) > 2
    assert max(rows) <= 1500
    assert max(rows) - min(rows) <= 1


@pytest.mark.parametrize("num_workers", [1, 4])
def test_any_number_of_workers_makes_the_same_bytes(num_workers, folder, config, tmp_path) -> None:
    build(replace(config, num_workers=num_workers), tmp_path / "other")
    assert shard_bytes(tmp_path / "other") == shard_bytes(folder)
    first, second = (json.loads((place / "manifest.json").read_text()) for place in (folder, tmp_path / "other"))
    assert first == second


def test_a_second_build_touches_no_shard(folder, config) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    build(config, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")} == before


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a flipped bit": (flip_a_bit, "train-00001.h5 is damaged"),
    "a missing shard": (Path.unlink, "train-00001.h5 is missing"),
    "a truncated shard": (lambda path: os.truncate(path, 1000), "train-00001.h5 is damaged"),
    "another's shard": (lambda path: shutil.copy(path.with_name("train-00000.h5"), path), "train-00001.h5 is damaged"),
    "a shard too many": (
        lambda path: shutil.copy(path, path.with_name("extra.h5")),
        "extra.h5 is not of this data set",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_verify_names_the_damage_and_a_rebuild_makes_just_that_again(damage, folder, config, tmp_path) -> None:
    copy = tmp_path / "data"
    shutil.copytree(folder, copy)
    verify(read_manifest(copy))
    kept = {path.name: path.stat().st_ino for path in copy.glob("*.h5") if path.name != "train-00001.h5"}
    change, words = DAMAGES[damage]
    change(copy / "train-00001.h5")
    with pytest.raises(UserError, match=words):
        verify(read_manifest(copy))
    build(config, copy)
    (copy / "extra.h5").unlink(missing_ok=True)
    verify(read_manifest(copy))
    assert shard_bytes(copy) == shard_bytes(folder)
    assert {path.name: path.stat().st_ino for path in copy.glob("*.h5") if path.name in kept} == kept


def test_a_whole_folder_needs_its_sources_no_more(folder, config, text_file, tmp_path) -> None:
    own_text = tmp_path / "text.txt.gz"
    shutil.copy(text_file, own_text)
    config = replace(config, sources=[Source("text", str(own_text))])
    build(config, tmp_path / "data")
    own_text.unlink()
    build(config, tmp_path / "data")
    with gzip.open(own_text, "wt") as file:
        file.write("another text")
    with pytest.raises(UserError, match=rf"made of other sources \({own_text} has changed\)"):
        build(config, tmp_path / "data")


def test_duplicates_and_short_documents_are_left_out_and_counted(tmp_path) -> None:
    documents = [f"Document number {number} is about herons. They wait." for number in range(50)]
    (tmp_path / "a.txt").write_text("\n\n".join([*documents, "short", *documents[:20], "\0"]), encoding="utf-8")
    source = Source("text", str(tmp_path / "a.txt"))
    config = DataConfig([source], "train", vocab_size=200, deduplicate=True, min_document_characters=10)
    manifest = build(config, tmp_path / "data")
    assert manifest["num_documents"] == 50
    assert manifest["cleaning"] == {
        "short_documents": 1,
        "control_characters": 1,
        "empty_documents": 1,
        "duplicate_documents": 20,
    }
    shown = summary(read_manifest(tmp_path / "data"))
    assert "duplicate documents" in shown


def test_validation_is_masked_alike_whatever_the_copies_probabilities(folder, config, tmp_path) -> None:
    several = replace(config, masked_lm_prob=[0.1, 0.2, 0.3, 0.4], max_predictions_per_seq=10)
    build(several, tmp_path / "several")
    names = [path.name for path in folder.glob("validation-*.h5")]
    assert {name: data for name, data in shard_bytes(tmp_path / "several").items() if name in names} == {
        name: data for name, data in shard_bytes(folder).items() if name in names
    }
    assert shard_bytes(tmp_path / "several") != shard_bytes(folder)


def test_whole_words_of_the_tokenizer_are_masked_together(config, tmp_path) -> None:
    config = replace(config, whole_word_masking=True, max_predictions_per_seq=20)
    build(config, tmp_path / "words")
    manifest = read_manifest(tmp_path / "words")
    tokenizer = load_tokenizer(str(manifest.tokenizer_folder))
    tokens = np.array(tokenizer.convert_ids_to_tokens(range(len(tokenizer))))
    reader = SplitReader(manifest, "train")
    rows = reader.read_range(0, reader.num_rows)
    reader.close()
    original = rows.input_ids.copy()
    masked = np.zeros(original.shape, dtype=bool)
    row, slot = np.nonzero(rows.masked_lm_positions)
    position = rows.masked_lm_positions[row, slot]
    original[row, position], masked[row, position] = rows.masked_lm_ids[row, slot], True
    goes_on = np.char.startswith(tokens[original[:, 1:]], "##")
    assert goes_on.sum() > 1000
    assert (masked[:, 1:] == masked[:, :-1])[goes_on].all()


def test_inspect_shows_each_mask_with_its_original(folder) -> None:
    shown = inspect_folder(folder, num_rows=2)
    reader = SplitReader(read_manifest(folder), "train")
    predictions = sum(int((reader.read_range(row, row + 1).masked_lm_positions > 0).sum()) for row in range(2))
    reader.close()
    assert shown.count("=>") == predictions


def test_a_rebuild_makes_a_damaged_tokenizer_again(folder, config, tmp_path) -> None:
    shutil.copytree(folder, tmp_path / "data")
    (tmp_path / "data" / "tokenizer" / "tokenizer.json").write_text("{}")
    build(config, tmp_path / "data")
    assert shard_bytes(tmp_path / "data") == shard_bytes(folder)
    verify(read_manifest(tmp_path / "data"))


def test_a_tokenizer_without_a_template_gets_berts(tmp_path) -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "heron", "bird"]
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, "[UNK]"))
    bare.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    bare.save(str(tmp_path / "bare.json"))
    encoded = load_tokenizer(str(tmp_path / "bare.json"))("heron", "bird")
    assert encoded["input_ids"] == [2, 5, 3, 6, 3]
    assert encoded["token_type_ids"] == [0, 0, 0, 1, 1]
