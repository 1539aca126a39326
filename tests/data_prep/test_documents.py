"""Every kind of source gives the documents that are in it, whatever it is wrapped in, and nothing breaks the reader."""

import bz2
import errno
import gzip
import json
import lzma
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from common.errors import UserError
from data_prep.documents import Source, first_document, parse_block, read_blocks, read_documents
from data_prep.documents import total_bytes as total
from data_prep.files import zstd
from data_prep.sources import describe

TEXTS = ["First document.\nIts second line.", "Zweites Dokument: Grüße!", "文書。三つ目。", "رابع"]
COMPRESS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd.compress,
}


def documents(*sources: Source) -> list[str]:
    return list(read_documents(list(sources)))


def parsed(source: Source, min_characters: int = 1) -> tuple[list[str], Counter[str]]:
    """The documents, and what was counted on the way."""
    counts: Counter[str] = Counter()
    return [text for block in read_blocks([source]) for text in parse_block(block, min_characters, counts)], counts


@pytest.mark.parametrize("compression", COMPRESS)
def test_text_comes_out_of_every_compression(compression, tmp_path) -> None:
    path = tmp_path / f"a.txt{compression}"
    path.write_bytes(COMPRESS[compression]("\n\n".join(TEXTS).encode()))
    assert documents(Source("text", str(path))) == TEXTS
    assert documents(Source("text", str(tmp_path))) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_json_lines_come_out_of_every_compression(compression, tmp_path) -> None:
    lines = "".join(json.dumps({"id": number, "body": text}) + "\n" for number, text in enumerate(TEXTS))
    (tmp_path / f"a.jsonl{compression}").write_bytes(COMPRESS[compression](lines.encode()))
    assert documents(Source("jsonl", str(tmp_path), field="body")) == TEXTS


@pytest.mark.parametrize("compression", COMPRESS)
def test_parquet_comes_out_of_every_compression(compression, tmp_path) -> None:
    plain = tmp_path / "plain"
    datasets.Dataset.from_dict({"body": [*TEXTS, None], "id": list(range(5))}).to_parquet(plain)
    (tmp_path / f"a.parquet{compression}").write_bytes(COMPRESS[compression](plain.read_bytes()))
    assert documents(Source("parquet", str(tmp_path), field="body")) == TEXTS


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"no such format" + data])
@pytest.mark.parametrize("name", ["a.txt.gz", "a.txt.bz2", "a.txt.xz", "a.txt.zst", "a.parquet"])
def test_a_damaged_file_is_named_in_one_line(name, damage, tmp_path) -> None:
    path = tmp_path / name
    data = COMPRESS.get(path.suffix, bytes)(os.urandom(20_000))
    path.write_bytes(damage(data))
    with pytest.raises(UserError, match=f"can't read .*{name}") as error:
        documents(Source("parquet" if name.endswith("parquet") else "text", str(path)))
    assert "\n" not in str(error.value)


def test_sources_of_all_kinds_mix_in_the_order_given(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"body": "three"}'))
    (tmp_path / "wiki_00").write_text('<doc id="1" url="u" title="Four">\nFour\n\nfive\n</doc>')
    datasets.Dataset.from_dict({"text": ["six"]}).to_parquet(tmp_path / "c.parquet")
    datasets.Dataset.from_dict({"text": ["seven"]}).save_to_disk(tmp_path / "d")
    sources = [
        Source("parquet", str(tmp_path / "c.parquet")),
        Source("text", str(tmp_path / "a.txt")),
        Source("wikiextractor", str(tmp_path / "wiki_00")),
        Source("huggingface", str(tmp_path / "d")),
        Source("jsonl", str(tmp_path / "b.jsonl.gz"), field="body"),
    ]
    assert documents(*sources) == ["six", "one", "two", "Four\nfive", "seven", "three"]


def test_one_document_a_line(tmp_path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n  \nthree", encoding="utf-8")
    assert documents(Source("text", str(tmp_path), separator="line")) == ["one", "two", "three"]


def test_files_are_read_in_the_order_of_their_names_at_any_depth(tmp_path) -> None:
    for name in ("b/2.txt", "a/9.txt", "c.txt", "b/10.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert documents(Source("text", str(tmp_path))) == ["a/9.txt", "b/10.txt", "b/2.txt", "c.txt"]
    assert documents(Source("text", f"{tmp_path}/b/*.txt")) == ["b/10.txt", "b/2.txt"]
    assert documents(Source("text", f"{tmp_path}/**/*.txt")) == ["a/9.txt", "b/10.txt", "b/2.txt", "c.txt"]


@pytest.mark.parametrize("kind", ["text", "jsonl"])
@pytest.mark.parametrize("block_bytes", [20, 50, 333, 4_000_000])
def test_where_blocks_are_cut_changes_no_document(kind, block_bytes, tmp_path, monkeypatch) -> None:
    texts = [f"document {number}\n" + "word " * (number % 30) + "Grüße" for number in range(60)]
    lines = {"text": "\n\n".join(texts), "jsonl": "\n".join(json.dumps({"text": text}) for text in texts)}
    (tmp_path / f"a.{'txt' if kind == 'text' else kind}").write_text(lines[kind], encoding="utf-8")
    monkeypatch.setattr("data_prep.documents._BLOCK_BYTES", block_bytes)
    assert documents(Source(kind, str(tmp_path))) == texts


def test_rows_of_single_sentences_are_joined(tmp_path) -> None:
    sentences = [f"sentence {number}" for number in range(7)]
    expected = ["\n".join(sentences[:3]), "\n".join(sentences[3:6]), sentences[6]]
    (tmp_path / "a.txt").write_text("\n".join(sentences))
    assert documents(Source("text", str(tmp_path), separator="line", rows_per_document=3)) == expected
    (tmp_path / "set").mkdir()
    datasets.Dataset.from_dict({"text": sentences}).to_parquet(tmp_path / "set" / "train.parquet")
    for kind in ("huggingface", "parquet"):
        assert documents(Source(kind, str(tmp_path / "set"), rows_per_document=3)) == expected


def test_data_sets_saved_to_disk_are_read_with_their_splits(tmp_path) -> None:
    train, test = (datasets.Dataset.from_dict({"text": texts}) for texts in (TEXTS, ["test"]))
    datasets.DatasetDict({"train": train, "test": test}).save_to_disk(tmp_path / "both")
    train.save_to_disk(tmp_path / "one")
    assert documents(Source("huggingface", str(tmp_path / "both"))) == TEXTS
    assert documents(Source("huggingface", str(tmp_path / "both"), split="test")) == ["test"]
    assert documents(Source("huggingface", str(tmp_path / "one"))) == TEXTS
    for wrong, words in (
        (Source("huggingface", str(tmp_path / "both"), split="dev"), "dev"),
        (Source("huggingface", str(tmp_path / "one"), field="body"), "no column 'body'"),
    ):
        with pytest.raises(UserError, match=words):
            documents(wrong)


def test_a_column_that_holds_no_text_is_named(tmp_path) -> None:
    datasets.Dataset.from_dict({"text": [1, 2], "body": ["a", "b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(UserError, match="holds int64, not text"):
        documents(Source("parquet", str(tmp_path)))
    with pytest.raises(UserError, match="no column 'txt', it has text, body"):
        documents(Source("parquet", str(tmp_path), field="txt"))


def test_broken_json_lines_are_counted_and_left_out(tmp_path) -> None:
    lines = ['{"text": "good"}', "{", '{"text": 3}', '{"other": "x"}', '["text"]', '"text"', "[" * 100_000, "", "null"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts, counts = parsed(Source("jsonl", str(tmp_path)))
    assert texts == ["good"]
    assert counts == {"malformed_records": 7}
    with pytest.raises(UserError, match="8 records have no text in the field 'body', set 'field'"):
        first_document(Source("jsonl", str(tmp_path), field="body"))


def test_what_is_not_text_is_taken_out_and_counted(tmp_path) -> None:
    latin = "Gr\u00fc\u00dfe aus Z\u00fcrich".encode("latin-1")
    (tmp_path / "a.txt").write_bytes(
        b"\xef\xbb\xbfmarked\n\nnul\x00 and bell\x07\n\n" + latin + b"\n\n \t \n\n\x00\n\nfine\r\nlines\rhere\n\nx"
    )
    texts, counts = parsed(Source("text", str(tmp_path)), min_characters=2)
    assert texts == ["marked", "nul and bell", "Gre aus Zrich", "fine\nlines\nhere"]
    assert counts == {"control_characters": 3, "invalid_characters": 3, "empty_documents": 1, "short_documents": 1}


def test_halves_of_surrogate_pairs_are_taken_out(tmp_path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d pair"}\n{"text": "\\ud83d\\ude00"}')
    texts, counts = parsed(Source("jsonl", str(tmp_path)))
    assert texts == ["half  pair", "\N{GRINNING FACE}"]
    assert counts == {"invalid_characters": 1}


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32-be"])
def test_other_unicode_encodings_are_told(encoding, tmp_path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffText".encode(encoding) if "be" in encoding else "Text".encode(encoding))
    with pytest.raises(UserError, match=r"UTF-.*not UTF-8: convert it"):
        documents(Source("text", str(tmp_path)))


@pytest.mark.parametrize("unit", ["a", "é", "word ", "line\n"])
def test_a_huge_document_is_divided_without_losing_a_character(unit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.documents._BLOCK_BYTES", 1000)
    monkeypatch.setattr("data_prep.documents._LARGEST_RECORD", 4000)
    text = unit * (20_001 // len(unit))
    (tmp_path / "a.txt").write_text(text + "\n\nnext", encoding="utf-8")
    texts, counts = parsed(Source("text", str(tmp_path)))
    assert "".join("".join(texts).split()) == "".join(text.split()) + "next"
    assert counts["divided_documents"] >= 3
    assert not counts["invalid_characters"]
    assert max(map(len, texts)) <= 5000


def test_a_huge_json_line_is_left_out_and_counted(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.documents._BLOCK_BYTES", 1000)
    monkeypatch.setattr("data_prep.documents._LARGEST_RECORD", 4000)
    lines = [json.dumps({"text": text}) for text in ("before", "x" * 20_001, "behind", "y" * 9000)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    texts, counts = parsed(Source("jsonl", str(tmp_path)))
    assert texts == ["before", "behind"]
    assert counts == {"oversized_records": 2}


def test_loops_of_links_end(tmp_path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "one.txt").write_text("one")
    for name, target in (("a/up", tmp_path), ("again", tmp_path), ("self.txt", tmp_path / "self.txt")):
        (tmp_path / name).symlink_to(target)
    assert documents(Source("text", str(tmp_path))) == ["one"]
    assert documents(Source("text", f"{tmp_path}/**/*.txt")) == ["one"]
    with pytest.raises(UserError, match=r"self\.txt"):
        documents(Source("text", str(tmp_path / "self.txt")))


def test_an_unreadable_file_or_folder_is_named_and_not_passed_over(tmp_path, monkeypatch) -> None:
    for name in ("a.txt", "locked/b.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text")
    open_file, list_folder = Path.open, os.scandir

    def refuse_file(path, *options, **more):  # permissions don't keep the superuser out, as whom tests may run
        if path.name == "a.txt":
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return open_file(path, *options, **more)

    def refuse_folder(path):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return list_folder(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse_file)
        with pytest.raises(UserError, match=r"can't read .*a\.txt: Permission denied"):
            documents(Source("text", str(tmp_path)))
    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refuse_folder)
        with pytest.raises(UserError, match=r"can't look for files .*locked"):
            documents(Source("text", str(tmp_path)))


def test_a_source_that_vanishes_half_way_is_named(tmp_path) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("word " * 1_000_000)
    blocks = read_blocks([Source("text", str(tmp_path))])
    next(blocks)
    (tmp_path / "b.txt").unlink()
    with pytest.raises(UserError, match=r"can't read .*b\.txt"):
        list(blocks)


def test_a_changed_file_is_described_differently(tmp_path) -> None:
    path = tmp_path / "a.txt"
    source = [Source("text", str(path))]
    path.write_text("one two three")
    before = describe(source)
    os.utime(path, (0, 0))
    assert describe(source) == before  # a copy is the same text
    path.write_text("one 2wo three")
    assert describe(source) != before


@pytest.mark.parametrize("kind", ["text", "jsonl", "parquet", "demo"])
def test_blocks_add_up_to_the_sources_bytes(kind, tmp_path) -> None:
    source = Source("demo", megabytes=0.1) if kind == "demo" else Source(kind, str(tmp_path))
    for number in range(3):
        (tmp_path / f"{number}.txt").write_text("word " * 1000)
        (tmp_path / f"{number}.jsonl").write_text('{"text": "word"}\n' * 1000)
        datasets.Dataset.from_dict({"text": TEXTS * 1000}).to_parquet(tmp_path / f"{number}.parquet")
    read = sum(block.bytes_read for block in read_blocks([source]))
    assert read == pytest.approx(total([source]), rel=0.05)


def test_the_wikipedia_preset_reads_the_columns_that_the_data_set_has(tmp_path) -> None:
    rows = {"id": ["1"], "url": ["https://a"], "title": ["A"], "text": ["A\n\nFirst paragraph.\n\nSecond one."]}
    datasets.Dataset.from_dict(rows).to_parquet(tmp_path / "train-00000-of-00041.parquet")
    assert documents(Source("huggingface", str(tmp_path))) == ["A\nFirst paragraph.\nSecond one."]


@pytest.mark.parametrize(
    ("kind", "option"),
    [
        ("text", {"field": "body"}),
        ("jsonl", {"separator": "line"}),
        ("parquet", {"split": "test"}),
        ("demo", {"config": "en"}),
    ],
)
def test_an_option_of_another_kind_is_refused(kind, option) -> None:
    with pytest.raises(ValueError, match=f"'{next(iter(option))}' is no option of a source of kind '{kind}'"):
        Source(kind, "somewhere", **option)


def test_a_source_that_is_not_there(tmp_path) -> None:
    for path in (tmp_path / "none.txt", tmp_path / "*.txt", Path("/nowhere/at/all")):
        with pytest.raises(UserError, match="matches no file"):
            documents(Source("text", str(path)))
