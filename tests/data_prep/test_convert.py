"""Rows go to the layout of NVIDIA's and 24hBERT's trainers and come back the same; what doesn't fit is refused."""

import os
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
import tokenizers

from common.errors import UserError
from data_prep import __main__ as commands
from data_prep import shards
from data_prep.convert import convert, index
from data_prep.inspect import inspect_folder, verify
from data_prep.shards import Rows, SplitReader, read_manifest

SPLITS = ("train", "validation")
THEIR_NAMES = "input_ids input_mask segment_ids masked_lm_positions masked_lm_ids next_sentence_labels".split()
LENGTH, PREDICTIONS, VOCAB_SIZE = 24, 4, 50
PAD, UNK, CLS, SEP, MASK = range(5)


@pytest.fixture(scope="module")
def converted(data_dir, tmp_path_factory) -> Path:
    """The shared data folder in their layout; nothing else is done to it."""
    folder = tmp_path_factory.mktemp("converted") / "shards"
    convert(data_dir, folder)
    return folder


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory) -> str:
    """A vocab.txt of ``VOCAB_SIZE`` tokens."""
    return write_vocabulary(tmp_path_factory.mktemp("vocabulary") / "vocab.txt", VOCAB_SIZE)


def write_vocabulary(path: Path, size: int) -> str:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"token{number}" for number in range(5, size))]
    path.write_text("\n".join(tokens) + "\n")
    return str(path)


def all_rows(folder: Path, split: str) -> Rows:
    reader = SplitReader(read_manifest(folder), split)
    rows = reader.read_range(0, reader.num_rows)
    reader.close()
    return rows


def assert_equal(rows: Rows, expected: Rows) -> None:
    for name in shards.FIELDS:
        array, other = getattr(rows, name), getattr(expected, name)
        assert array.dtype == other.dtype
        np.testing.assert_array_equal(array, other)


def nvidia_arrays(rows: int, seed: int, pairs: bool = False, length: int = LENGTH, vocab_size: int = VOCAB_SIZE):
    """Rows as NVIDIA's script makes them, row by row."""
    random = np.random.default_rng(seed)
    arrays = {name: np.zeros((rows, length), dtype=np.int32) for name in ("input_ids", "input_mask", "segment_ids")}
    arrays |= {name: np.zeros((rows, PREDICTIONS), dtype=np.int32) for name in ("masked_lm_positions", "masked_lm_ids")}
    arrays["next_sentence_labels"] = random.integers(0, 2, rows, dtype=np.int32)
    for row in range(rows):
        tokens = [CLS, *random.integers(5, vocab_size, random.integers(6, length - 2)), SEP]
        if pairs:
            middle = len(tokens) // 2
            tokens[middle] = SEP
            arrays["segment_ids"][row, middle + 1 : len(tokens)] = 1
        ordinary = [place for place, token in enumerate(tokens) if token > MASK]
        for slot, place in enumerate(sorted(random.choice(ordinary, random.integers(1, PREDICTIONS + 1), False))):
            arrays["masked_lm_positions"][row, slot] = place
            arrays["masked_lm_ids"][row, slot] = tokens[place]
            tokens[place] = MASK
        arrays["input_ids"][row, : len(tokens)] = tokens
        arrays["input_mask"][row, : len(tokens)] = 1
    return arrays


def write_nvidia(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """As their scripts write: int8 where the values are 0 and 1, chunks of h5py's choice."""
    path.parent.mkdir(exist_ok=True)
    with h5py.File(path, "w") as file:
        for name, array in arrays.items():
            small = name in ("input_mask", "segment_ids", "next_sentence_labels")
            file.create_dataset(name, data=array, dtype="i1" if small else "i4", compression="gzip")


def nvidia_folder(folder: Path, **options) -> Path:
    write_nvidia(folder / "wikicorpus_en_training_0.hdf5", nvidia_arrays(30, 1, **options))
    write_nvidia(folder / "wikicorpus_en_training_1.hdf5", nvidia_arrays(20, 2, **options))
    write_nvidia(folder / "wikicorpus_en_test_0.hdf5", nvidia_arrays(10, 3, **options))
    return folder


@pytest.mark.parametrize("split", SPLITS)
def test_rows_come_back_bit_for_bit(split, data_dir, converted, tmp_path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "indexed"))
    index(folder, str(folder / "vocab.txt"))
    assert_equal(all_rows(folder, split), all_rows(data_dir, split))
    verify(read_manifest(folder))


def test_an_indexed_folder_tells_what_the_built_one_told(data_dir, converted, tmp_path) -> None:
    folder = Path(shutil.copytree(converted, tmp_path / "indexed"))
    manifest, expected = index(folder, str(data_dir / "tokenizer")), read_manifest(data_dir)
    for name in ("vocab_size", "max_seq_length", "max_predictions_per_seq", "pad_token_id", "tokenizer_sha256"):
        assert getattr(manifest, name) == getattr(expected, name)
    assert [(shard.split, shard.rows) for shard in manifest.shards] == [
        (shard.split, shard.rows) for shard in expected.shards
    ]
    lengths = np.concatenate([all_rows(data_dir, split).sequence_length for split in SPLITS]).astype(int)
    assert manifest.content["num_tokens"] == (lengths - 2).sum()
    assert manifest.content["padding_share"] == pytest.approx(1 - lengths.mean() / expected.max_seq_length, abs=1e-4)


@pytest.mark.parametrize(("word", "split"), [("train", "train"), ("training", "train"), ("test", "validation")])
def test_their_trainers_find_the_files_by_name(word, split, data_dir, converted) -> None:
    """24hBERT's take every file with 'train' or 'test' in its name, NVIDIA's every one with 'training'."""
    found = sorted(path for path in converted.iterdir() if word in path.name)
    rows = []
    for path in found:
        with h5py.File(path) as file:
            rows.append(len(file["input_ids"]))
    assert rows == [shard.rows for shard in read_manifest(data_dir).of_split(split)]


def test_files_hold_the_types_their_scripts_write(converted) -> None:
    types = dict.fromkeys(("input_ids", "masked_lm_positions", "masked_lm_ids"), np.int32)
    types |= dict.fromkeys(("input_mask", "segment_ids", "next_sentence_labels"), np.int8)
    with h5py.File(converted / "training_shard_00000.hdf5") as file:
        assert {name: dataset.dtype for name, dataset in file.items()} == types
        assert {dataset.compression for dataset in file.values()} == {"gzip"}


@pytest.mark.parametrize("split", SPLITS)
def test_labels_read_their_way_are_ours(split, data_dir, converted) -> None:
    expected = all_rows(data_dir, split)
    first = 0
    for path in sorted(converted.glob("training_*" if split == "train" else "test_*")):
        with h5py.File(path) as file:
            ids, mask, segments, places, originals, next_sentence = (
                np.asarray(file[name][:]).astype(np.int64) for name in THEIR_NAMES
            )
        for row in range(len(ids)):
            unused = np.flatnonzero(places[row] == 0)
            number = unused[0] if len(unused) else places.shape[1]  # they stop at the first unused slot
            labels = np.full(ids.shape[1], -1)
            labels[places[row, :number]] = originals[row, :number]
            ours = expected[first + row : first + row + 1]
            predicted = {
                int(place): int(token)
                for place, token in zip(ours.masked_lm_positions[0], ours.masked_lm_ids[0], strict=True)
                if place
            }
            assert {int(place): int(labels[place]) for place in np.flatnonzero(labels != -1)} == predicted
            assert ids[row].tolist() == ours.input_ids[0].tolist()
            assert mask[row].tolist() == [int(place < ours.sequence_length[0]) for place in range(ids.shape[1])]
        assert not segments.any()
        assert not next_sentence.any()
        first += len(ids)
    assert first == len(expected)


@pytest.mark.parametrize(("length", "vocab_size"), [(LENGTH, VOCAB_SIZE), (300, 70_000)])
def test_a_row_has_the_size_that_is_told(length, vocab_size, tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data", length=length, vocab_size=vocab_size)
    index(folder, write_vocabulary(tmp_path / "vocab.txt", vocab_size))
    rows = all_rows(folder, "train")
    told = shards.bytes_per_row(length, PREDICTIONS, vocab_size)
    assert sum(getattr(rows, name).nbytes for name in shards.FIELDS) == len(rows) * told


def test_a_second_run_of_convert_makes_only_what_is_missing(data_dir, tmp_path) -> None:
    folder = tmp_path / "shards"
    convert(data_dir, folder)
    before = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.hdf5")}
    (folder / "training_shard_00001.hdf5").unlink()
    killed = folder / f".training_shard_00001.hdf5.{'0' * 32}.tmp"
    killed.write_bytes(b"half a shard")
    convert(data_dir, folder)
    after = {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.glob("*.hdf5")}
    assert {name for name in before if before[name][0] != after[name][0]} == {"training_shard_00001.hdf5"}
    assert {name: content for name, (_, content) in before.items()} == {
        name: content for name, (_, content) in after.items()
    }
    assert not killed.exists()


def test_shards_of_different_data_are_not_mixed(data_dir, converted, vocabulary, tmp_path) -> None:
    other = nvidia_folder(tmp_path / "other")
    index(other, vocabulary)
    folder = Path(shutil.copytree(converted, tmp_path / "shards"))
    with pytest.raises(UserError, match="another configuration"):
        convert(other, folder)
    with pytest.raises(UserError, match="another command"):
        convert(data_dir, data_dir)


def test_a_vocabulary_lies_beside_the_shards_if_it_is_wordpiece(data_dir, converted, vocabulary, tmp_path) -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(data_dir / "tokenizer" / "tokenizer.json"))
    tokens = (converted / "vocab.txt").read_text(encoding="utf-8").split("\n")[:-1]
    assert tokens == [tokenizer.id_to_token(number) for number in range(tokenizer.get_vocab_size())]
    words = {token: number for number, token in enumerate(Path(vocabulary).read_text().split())}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]")).save(str(tmp_path / "words.json"))
    index(nvidia_folder(tmp_path / "data"), str(tmp_path / "words.json"))
    convert(tmp_path / "data", tmp_path / "shards")
    assert not (tmp_path / "shards" / "vocab.txt").exists()


def test_shards_of_nvidia_are_read_as_they_are(vocabulary, tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data")
    manifest = index(folder, vocabulary)
    parts = [nvidia_arrays(30, 1), nvidia_arrays(20, 2)]
    expected = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    rows = all_rows(folder, "train")
    np.testing.assert_array_equal(rows.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(rows.sequence_length, (expected["input_ids"] != PAD).sum(axis=1))
    np.testing.assert_array_equal(rows.masked_lm_positions, expected["masked_lm_positions"])
    np.testing.assert_array_equal(rows.masked_lm_ids, expected["masked_lm_ids"])
    assert len(all_rows(folder, "validation")) == 10
    assert (manifest.vocab_size, manifest.max_seq_length) == (VOCAB_SIZE, LENGTH)
    assert "50 (1 masked copies)" in inspect_folder(folder, 2)
    verify(manifest)


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train_shard_7.hdf5", "train"),
        ("latest_train.h5", "train"),
        ("books_wiki_en_corpus_test_3.hdf5", "validation"),
        ("pretraining-valid.h5", "validation"),
        ("DEV.hdf5", "validation"),
    ],
)
def test_a_shard_is_of_the_split_that_its_name_tells(name, split, vocabulary, tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data")
    write_nvidia(folder / name, nvidia_arrays(5, 4))
    assert name in [shard.file for shard in index(folder, vocabulary).of_split(split)]


def test_rows_have_the_types_of_a_built_folder(tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data", length=300, vocab_size=70_000)
    index(folder, write_vocabulary(tmp_path / "vocab.txt", 70_000))
    rows = all_rows(folder, "train")
    assert rows.input_ids.dtype == rows.masked_lm_ids.dtype == np.uint32
    assert rows.sequence_length.dtype == rows.masked_lm_positions.dtype == np.uint16
    assert rows.input_ids.max() >= 2**16
    np.testing.assert_array_equal(rows.input_ids[:30], nvidia_arrays(30, 1, length=300, vocab_size=70_000)["input_ids"])


@pytest.mark.parametrize("block_rows", [7, 30, 1000])
def test_any_range_of_rows_can_be_read(block_rows, vocabulary, tmp_path, monkeypatch) -> None:
    folder = nvidia_folder(tmp_path / "data")
    index(folder, vocabulary)
    monkeypatch.setattr(shards, "_NVIDIA_BLOCK_ROWS", block_rows)
    expected = nvidia_arrays(30, 1)
    reader = SplitReader(read_manifest(folder), "train")
    for start in range(30):
        for stop in range(start + 1, 31):
            np.testing.assert_array_equal(reader.read(0, start, stop).input_ids, expected["input_ids"][start:stop])
            number = np.count_nonzero(expected["masked_lm_positions"][start:stop])
            assert reader.read_sizes(0, start, stop).predictions.sum() == number
    reader.close()


def test_pairs_are_read_as_one_text_and_said_to_be(vocabulary, tmp_path, capsys) -> None:
    folder = nvidia_folder(tmp_path / "data", pairs=True)
    commands.COMMANDS["index"]([str(folder), "--tokenizer", vocabulary])
    assert "60 rows are pairs of texts" in capsys.readouterr().out
    ids = np.concatenate([all_rows(folder, split).input_ids for split in SPLITS])
    assert read_manifest(folder).content["num_tokens"] == np.count_nonzero(~np.isin(ids, [PAD, CLS, SEP]))
    rows, expected = all_rows(folder, "validation"), nvidia_arrays(10, 3, pairs=True)
    np.testing.assert_array_equal(rows.input_ids, expected["input_ids"])
    np.testing.assert_array_equal(rows.sequence_length, expected["input_mask"].sum(axis=1))


def test_the_same_folder_is_indexed_the_same_twice(vocabulary, tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data")
    first = index(folder, vocabulary)
    content = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").unlink()  # as if it had been killed before the end
    assert index(folder, str(folder / "tokenizer")) == first
    assert (folder / "manifest.json").read_bytes() == content


def changed(name: str, place, value):
    """Damage: one value of a shard's dataset is another one."""

    def change(folder: Path) -> None:
        with h5py.File(folder / "wikicorpus_en_training_1.hdf5", "r+") as file:
            file[name][place] = value

    return change


def replaced(name: str, arrays):
    return lambda folder: write_nvidia(folder / name, arrays())


def without_some_rows(folder: Path) -> None:
    arrays = nvidia_arrays(20, 2)
    write_nvidia(folder / "wikicorpus_en_training_1.hdf5", arrays | {"segment_ids": arrays["segment_ids"][:19]})


def cut_in_half(folder: Path) -> None:
    path = folder / "wikicorpus_en_training_1.hdf5"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def with_a_flipped_byte(folder: Path) -> None:
    path = folder / "wikicorpus_en_training_1.hdf5"
    with h5py.File(path) as file:
        place = file["input_ids"].id.get_chunk_info(0).byte_offset
    content = bytearray(path.read_bytes())
    content[place] ^= 0xFF  # the first byte of a compressed chunk
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (shutil.rmtree, ["does not exist"]),
        (lambda folder: [path.unlink() for path in folder.iterdir()], ["no shards"]),
        (lambda folder: [path.unlink() for path in folder.glob("*training*")], ["no shards to train on"]),
        (lambda folder: (folder / "wikicorpus_en_test_0.hdf5").unlink(), ["no validation shard", "rename one"]),
        (replaced("part_0.hdf5", lambda: nvidia_arrays(5, 4)), ["part_0.hdf5", "training or validation"]),
        (replaced("train_2.h5", lambda: nvidia_arrays(5, 4, length=32)), ["train_2.h5", "of 32 and 4"]),
        (lambda folder: (folder / "train_2.hdf5").write_text("text"), ["train_2.hdf5", "not an HDF5 file"]),
        (cut_in_half, ["training_1.hdf5", "not an HDF5 file, or damaged"]),
        (with_a_flipped_byte, ["training_1.hdf5", "damaged"]),
        (without_some_rows, ["training_1.hdf5", "don't fit together", "segment_ids [19, 24]"]),
        (changed("input_ids", (3, 2), VOCAB_SIZE), ["training_1.hdf5", "beyond the tokenizer's 50 tokens"]),
        (changed("masked_lm_ids", (3, 0), 2**16 + 7), ["training_1.hdf5", "beyond the tokenizer's 50 tokens"]),
        (changed("input_ids", (3, 2), -1), ["training_1.hdf5", "beyond the tokenizer's 50 tokens"]),
        (changed("input_ids", (3, 0), 7), ["training_1.hdf5", "[CLS]"]),
        (changed("input_mask", (3, 1), 0), ["training_1.hdf5", "input_mask"]),
        (changed("input_mask", (3, 0), 2), ["training_1.hdf5", "input_mask"]),
        (changed("masked_lm_positions", (3, 0), LENGTH), ["training_1.hdf5", "masked_lm_positions"]),
    ],
)
def test_shards_that_cannot_be_trained_on_are_refused(damage, words, vocabulary, tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data")
    damage(folder)
    with pytest.raises(UserError) as error:
        index(folder, vocabulary)
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)
    assert not (folder / "manifest.json").exists()


def test_a_folder_of_ours_is_not_indexed(data_dir) -> None:
    before = (data_dir / "manifest.json").read_bytes()
    with pytest.raises(UserError, match="not a shard in NVIDIA's"):
        index(data_dir, str(data_dir / "tokenizer"))
    assert (data_dir / "manifest.json").read_bytes() == before


def test_what_lies_in_the_folder_is_not_written_over(data_dir, vocabulary, tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data")
    mine = folder / "tokenizer"
    mine.mkdir()
    shutil.copy(vocabulary, mine / "vocab.txt")
    with pytest.raises(UserError, match="move what is there"):
        index(folder, vocabulary)
    shutil.copy(data_dir / "tokenizer" / "tokenizer.json", mine)
    with pytest.raises(UserError, match="another tokenizer"):
        index(folder, vocabulary)
    assert sorted(os.listdir(mine)) == ["tokenizer.json", "vocab.txt"]
    shutil.rmtree(mine)
    (folder / "manifest.json").write_text('{"mine": true}')
    with pytest.raises(UserError, match=r"manifest\.json .* delete it"):
        index(folder, vocabulary)
    assert (folder / "manifest.json").read_text() == '{"mine": true}'


def test_a_folder_that_cannot_be_written_to(vocabulary, tmp_path, monkeypatch) -> None:
    folder = nvidia_folder(tmp_path / "data")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="link the shards into a folder of yours"):
        index(folder, vocabulary)


def test_an_indexed_folder_whose_shards_changed(vocabulary, tmp_path) -> None:
    folder = nvidia_folder(tmp_path / "data")
    index(folder, vocabulary)
    write_nvidia(folder / "wikicorpus_en_training_1.hdf5", nvidia_arrays(21, 2))
    with pytest.raises(UserError, match="put back what was indexed"):
        SplitReader(read_manifest(folder), "train")
    with pytest.raises(UserError, match="tells of other shards"):
        index(folder, vocabulary)
