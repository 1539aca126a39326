"""The data folder holds every copy of every sequence exactly once, and comes out the same however it was made."""

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import datasets
import h5py
import numpy as np
import pytest
import tokenizers

from common.errors import UserError
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.demo_corpus import demo_documents
from data_prep.documents import Source, read_documents
from data_prep.inspect import inspect_folder, verify
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
    with h5py.File(folder / manifest.of_split("train")[0].file) as file:
        described = {name: (str(data.dtype), data.shape, data.chunks) for name, data in file.items()}
    assert described == {
        "input_ids": ("uint16", (1500, 64), None),
        "sequence_length": ("uint16", (1500,), None),
        "masked_lm_positions": ("uint8", (1500, 10), None),
        "masked_lm_ids": ("uint16", (1500, 10), None),
    }


def test_one_worker_and_two_make_the_same_bytes(folder, config, tmp_path) -> None:
    build(replace(config, num_workers=1), tmp_path / "one")
    assert shard_bytes(tmp_path / "one") == shard_bytes(folder)
    first, second = (json.loads((place / "manifest.json").read_text()) for place in (folder, tmp_path / "one"))
    assert first == second


def test_a_killed_build_goes_on_to_the_same_bytes(folder, text_file, tmp_path) -> None:
    out = tmp_path / "killed"
    command = [
        sys.executable,
        "-m",
        "data_prep",
        "build",
        "--config",
        str(folder / "config.yaml"),
        "--output_dir",
        str(out),
    ]
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("train-*.h5")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    subprocess.run(command, check=True, capture_output=True)
    assert shard_bytes(out) == shard_bytes(folder)
    assert not (out / "work").exists()


def test_a_second_build_touches_no_shard(folder, config) -> None:
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")}
    build(config, folder)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.h5")} == before


def test_verify_names_a_shard_with_one_flipped_bit(config, tmp_path) -> None:
    build(config, tmp_path / "data")
    manifest = read_manifest(tmp_path / "data")
    verify(manifest)
    shard = tmp_path / "data" / "train-00001.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(UserError, match=r"train-00001\.h5 is damaged"):
        verify(manifest)


def test_inspect_shows_each_mask_with_its_original(folder) -> None:
    shown = inspect_folder(folder, num_rows=2)
    reader = SplitReader(read_manifest(folder), "train")
    predictions = sum(int((reader.read_range(row, row + 1).masked_lm_positions > 0).sum()) for row in range(2))
    reader.close()
    assert shown.count("=>") == predictions


def test_documents_of_a_hub_data_set_are_rows_joined(tmp_path) -> None:
    sentences = [f"sentence {number}" for number in range(7)]
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": sentences}).to_parquet(tmp_path / "set" / "train.parquet")
    documents = list(read_documents([Source("huggingface", str(tmp_path / "set"), rows_per_document=3)]))
    assert documents == ["\n".join(sentences[:3]), "\n".join(sentences[3:6]), sentences[6]]


def test_text_documents_end_at_blank_lines(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n\n \nthree\n", encoding="utf-8")
    (tmp_path / "b.txt").write_text("\nfour", encoding="utf-8")
    assert list(read_documents([Source("text", str(tmp_path))])) == ["one\ntwo", "three", "four"]


def test_a_rebuild_makes_damaged_shards_and_tokenizers_again(folder, config, tmp_path) -> None:
    build(config, tmp_path / "data")
    damaged, missing = tmp_path / "data" / "train-00000.h5", tmp_path / "data" / "train-00001.h5"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"x")
    missing.unlink()
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
