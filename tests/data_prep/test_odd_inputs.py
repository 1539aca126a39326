"""Inputs at their worst, through the whole build: every one of them is handled and counted."""

from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
import tokenizers
from transformers import BertTokenizer

from common.errors import UserError
from data_prep.build import build
from data_prep.config import DataConfig
from data_prep.documents import Counts, Source, parse_block, read_blocks
from data_prep.inspect import verify
from data_prep.sentences import sentence_splitter
from data_prep.shards import read_manifest

WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] . a b word document number 0 1 2 3 4 5 6 7 8 9 ##0 ##1 ##2 这 是 句 子 。 هذا مستند"
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    path.write_text("\n".join(WORDS.split()), encoding="utf-8")
    return str(path)


def build_text(data: bytes, tokenizer: str, folder: Path, **options) -> dict:
    (folder / "text.txt").write_bytes(data + b"\n\nword document number 1.\n\nword document number 2.")
    config = DataConfig([Source("text", str(folder / "text.txt"))], tokenizer, dupe_factor=1, **options)
    manifest = build(config, folder / "data")
    verify(read_manifest(folder / "data"))
    return manifest


def test_a_document_of_a_million_words(tokenizer, tmp_path) -> None:
    manifest = build_text(b"word " * 1_000_000, tokenizer, tmp_path)
    assert (manifest["num_documents"], manifest["cleaning"]) == (3, {})
    assert manifest["num_tokens"] == 1_000_000 + 2 * 5


@pytest.mark.parametrize("splitter", ["sentencex", "newline", "none"])
def test_text_without_any_sentence_end(splitter, tokenizer, tmp_path) -> None:
    manifest = build_text(b"word number " * 5000, tokenizer, tmp_path, sentence_splitter=splitter)
    assert manifest["num_tokens"] == 10_000 + 2 * 5


def test_only_whitespace(tokenizer, tmp_path) -> None:
    (tmp_path / "text.txt").write_bytes(b" \n\t\n" * 500_000)
    with pytest.raises(UserError, match="holds no text"):
        build(DataConfig([Source("text", str(tmp_path / "text.txt"))], tokenizer), tmp_path / "data")
    assert not (tmp_path / "data").exists()


def test_a_million_nul_bytes(tokenizer, tmp_path) -> None:
    manifest = build_text(b"word\0\0 " + b"\0" * 999_998, tokenizer, tmp_path)
    assert manifest["cleaning"] == {"control_characters": 1_000_000}


def test_mixed_encodings(tokenizer, tmp_path) -> None:
    data = b"\n\n".join(
        f"document {number} für a".encode("latin-1" if number % 2 else "utf-8") for number in range(100)
    )
    manifest = build_text(data, tokenizer, tmp_path)
    assert manifest["num_documents"] == 102
    assert manifest["cleaning"] == {"invalid_characters": 50}


@pytest.mark.parametrize(("text", "tokens"), [("这是句子。", 5), ("هذا مستند. ", 3)])
def test_text_without_spaces_and_from_right_to_left(text, tokens, tokenizer, tmp_path) -> None:
    manifest = build_text((text * 20_000).encode(), tokenizer, tmp_path, language="zh")
    assert manifest["num_tokens"] == tokens * 20_000 + 2 * 5


@pytest.mark.timeout(60)
@pytest.mark.parametrize("unit", ["你好这是一个句子。", "好", "«a. ", "(", '"', "a. ", "x"])
def test_the_time_to_split_sentences_does_not_grow_with_the_square(unit) -> None:
    text = unit * (1_000_000 // len(unit))
    sentences = sentence_splitter("sentencex", "en")(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_line_of_200_megabytes(tokenizer, tmp_path) -> None:
    manifest = build_text(b"word number a b. " * (200_000_000 // 17), tokenizer, tmp_path)
    assert manifest["cleaning"]["divided_documents"] >= 12
    assert manifest["num_tokens"] == 5 * (200_000_000 // 17) + 2 * 5


def test_parquet_that_holds_no_utf_8_or_repeats_itself(tokenizer, tmp_path) -> None:
    texts = [b"document 1", b"document \xff 2", None, b"document 3"]
    column = pa.Array.from_buffers(pa.string(), 4, pa.array(texts, pa.binary()).buffers())
    pyarrow.parquet.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    repeated = pa.array(["document 4", "document 5", "document 4"]).dictionary_encode()
    pyarrow.parquet.write_table(pa.table({"text": repeated}), tmp_path / "b.parquet")
    config = DataConfig([Source("parquet", str(tmp_path))], tokenizer, dupe_factor=1)
    manifest = build(config, tmp_path / "data")
    assert manifest["num_documents"] == 6
    assert manifest["cleaning"] == {"invalid_characters": 1, "empty_documents": 1}


def test_rows_too_large_for_a_worker_are_left_out(tokenizer, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.documents._LARGEST_RECORD", 1000)
    datasets.Dataset.from_dict({"text": ["a", "word " * 1000, "b"]}).to_parquet(tmp_path / "a.parquet")
    counts = Counts()
    blocks = read_blocks([Source("parquet", str(tmp_path))])
    assert [text for block in blocks for text in parse_block(block, 1, counts)] == ["a", "b"]
    assert counts == {"oversized_records": 1}


@pytest.mark.parametrize("ids", [[0, 1, 2, 3, 4, 40, 70_000], [0, 1, 2, 3, 4, 5, 9]])
def test_a_vocabulary_with_gaps_in_its_ids(ids, tmp_path) -> None:
    words = dict(zip(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "word", "a"], ids, strict=True))
    BertTokenizer(vocab=words).backend_tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text("\n\n".join("word a " * number for number in range(1, 40)))
    config = DataConfig([Source("text", str(tmp_path / "text.txt"))], str(tmp_path / "tokenizer.json"))
    manifest = build(config, tmp_path / "data")
    assert manifest["vocab_size"] == ids[-1] + 1
    assert tokenizers.Tokenizer.from_file(str(tmp_path / "data/tokenizer/tokenizer.json")).get_vocab() == words


def test_a_damaged_unit_is_made_anew(tokenizer, tmp_path) -> None:
    manifest = build_text(b"word number a b.", tokenizer, tmp_path)
    out = tmp_path / "data"
    expected = {path.name: path.read_bytes() for path in out.glob("*.h5")}
    # As a power cut leaves it: a build under way whose unit has lost its bytes.
    source = Source("text", str(tmp_path / "text.txt"))
    (out / "manifest.json").unlink()
    (out / "work").mkdir()
    digest = next(iter(read_blocks([source]))).digest
    (out / "work" / f"unit-00000000-{digest}.npz").write_bytes(b"")
    config = DataConfig([source], tokenizer, dupe_factor=1)
    with pytest.raises(UserError, match="was damaged and is removed: run the same command again"):
        build(config, out)
    assert build(config, out) == manifest
    assert {path.name: path.read_bytes() for path in out.glob("*.h5")} == expected
