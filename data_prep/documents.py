"""Sources of text. The parent process reads them as blocks of whole records; workers turn blocks into documents.

Reading has to happen in one place and one order, so it does as little as it can: decompress, and cut behind a record.
Decoding, parsing and cleaning are left to :func:`parse_block`, wherever that runs.
"""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data_prep.cleaning import clean_documents
from data_prep.demo_corpus import demo_documents
from data_prep.files import InputStream, find_files, open_stream
from data_prep.tables import dataset_rows, dataset_size, parquet_rows
from data_prep.wikipedia import articles, dump_header, wikiextractor_documents

Counts = Counter[str]

_BLOCK_BYTES = 4_000_000
_LARGEST_RECORD = 16_000_000  # what a worker's memory is made for
_ENDINGS = {
    "text": (".txt",),
    "jsonl": (".jsonl", ".ndjson", ".json"),
    "parquet": (".parquet",),
    "wikipedia_xml": (".xml",),
    "wikiextractor": ("",),
}
_TABLES = ("jsonl", "parquet", "huggingface")
_OPTIONS = {
    "separator": ("text",),
    "field": _TABLES,
    "rows_per_document": ("text", *_TABLES),
    "config": ("huggingface",),
    "split": ("huggingface",),
    "revision": ("huggingface",),
    "megabytes": ("demo",),
    "seed": ("demo",),
}
_LINE_END, _BLANK_LINE = re.compile(rb"\n"), re.compile(rb"\n[ \t\r]*\n")
_PAGE_END, _DOC_END = re.compile(rb"</page>"), re.compile(rb"</doc>")
_BYTE_ORDER_MARKS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16", b"\x00\x00\xfe\xff": "UTF-32"}
_UTF8_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Source:
    """One source of documents."""

    kind: Literal["text", "jsonl", "parquet", "wikipedia_xml", "wikiextractor", "huggingface", "demo"]
    """what it is; all files may be compressed as .gz .bz2 .xz .zst"""
    path: str | None = None
    """a file, a folder or a glob; huggingface: the data set's id or folder"""
    separator: Literal["blank_line", "line"] = "blank_line"
    """text: what stands between documents"""
    field: str = "text"
    """jsonl, parquet, huggingface: name of the field or column that holds the text"""
    rows_per_document: int = 1
    """text by line, jsonl, parquet, huggingface: consecutive rows joined into one document, for sets of single
    sentences without book boundaries (BookCorpus)"""
    config: str | None = None
    """huggingface: configuration of the data set"""
    split: str = "train"
    """huggingface: split of the data set"""
    revision: str | None = None
    """huggingface: commit, branch or tag to pin"""
    megabytes: float = 4.0
    """demo: size of the generated corpus in millions of characters"""
    seed: int = 42
    """demo: seed of the generated corpus"""

    def __post_init__(self) -> None:
        if self.kind != "demo" and not self.path:
            raise ValueError(f"a source of kind '{self.kind}' needs a path")
        if self.rows_per_document < 1:
            raise ValueError("rows_per_document must be at least 1")
        for option in fields(self):
            is_set = getattr(self, option.name) != option.default
            if is_set and self.kind not in _OPTIONS.get(option.name, self.kind):
                raise ValueError(f"'{option.name}' is no option of a source of kind '{self.kind}'")
        if self.kind == "text" and self.rows_per_document > 1 and self.separator != "line":
            raise ValueError("rows_per_document of text needs separator: line")

    def __str__(self) -> str:
        return self.path or self.kind

    @property
    def files(self) -> list[Path]:
        """Its files, in the order in which they are read; none of a data set or the demo."""
        return find_files(self.path or "", _ENDINGS[self.kind]) if self.kind in _ENDINGS else []


@dataclass(frozen=True)
class Block:
    """Consecutive whole records of one source: a work unit, cut by size and so independent of the number of workers."""

    source: Source
    records: bytes | list[str | None]
    bytes_read: int = 0
    """How far reading it went in the source's files; of a data set, its characters."""
    counts: dict[str, int] = field(default_factory=dict)
    """Records that were divided or left out for their size."""

    @property
    def digest(self) -> str:
        """Hexadecimal digest of the records."""
        records = [self.records] if isinstance(self.records, bytes) else map(_encoded, self.records)
        state = hashlib.blake2b(digest_size=8)
        for record in records:
            state.update(len(record).to_bytes(8, "little") + record)
        return state.hexdigest()


def _encoded(text: str | None) -> bytes:
    return (text or "").encode("utf-8", "surrogatepass")


def read_blocks(sources: list[Source]) -> Iterator[Block]:
    """All sources' records in order, about 4 MB at a time, the same at every call.

    Raises:
        UserError: a source does not exist, is damaged, or can't be read.
    """
    for source in sources:
        if source.kind == "wikipedia_xml":
            yield from _dump_blocks(source)
        elif source.kind in ("text", "jsonl", "wikiextractor"):
            yield from _record_blocks(source)
        else:
            yield from _row_blocks(source)


def read_documents(sources: list[Source], min_characters: int = 1) -> Iterator[str]:
    """All clean documents of all sources, in this process."""
    for block in read_blocks(sources):
        yield from parse_block(block, min_characters, Counter())


def first_document(source: Source) -> str:
    """A source's first clean document.

    Raises:
        UserError: it has none, or can't be read.
    """
    counts: Counts = Counter()
    for block in read_blocks([source]):
        for document in parse_block(block, 1, counts):
            return document
    malformed = counts["malformed_records"]
    hint = f": {malformed:,} records have no text in the field '{source.field}', set 'field'" if malformed else ""
    raise UserError(f"source {source} holds no text{hint}")


def total_bytes(sources: list[Source]) -> int | None:
    """What the blocks' ``bytes_read`` will add up to, roughly; None if a data set does not tell."""
    sizes = [_source_bytes(source) for source in sources]
    return None if None in sizes else sum(filter(None, sizes))


def _source_bytes(source: Source) -> int | None:
    if source.kind == "huggingface":
        return dataset_size(source.path or "", source.config, source.split, source.revision)
    if source.kind == "demo":
        return round(source.megabytes * 1e6)
    return sum(file.stat().st_size for file in source.files)


def _record_blocks(source: Source) -> Iterator[Block]:
    """Blocks of text records; small files share a block."""
    end = {"jsonl": _LINE_END, "wikiextractor": _DOC_END}.get(source.kind)
    end = end or (_BLANK_LINE if source.separator == "blank_line" else _LINE_END)
    pieces: list[bytes] = []
    counts: Counts = Counter()
    bytes_read = 0
    for file in source.files:
        with open_stream(file) as stream:
            consumed = 0
            for piece in _pieces(stream, end, source.kind == "text", counts):
                pieces.append(piece)
                bytes_read, consumed = bytes_read + stream.position - consumed, stream.position
                if sum(map(len, pieces)) >= _BLOCK_BYTES // 2:
                    yield Block(source, b"\n\n".join(pieces), bytes_read, dict(counts))
                    pieces, bytes_read = [], 0
                    counts.clear()
    if pieces or counts:
        yield Block(source, b"\n\n".join(pieces), bytes_read, dict(counts))


def _dump_blocks(source: Source) -> Iterator[Block]:
    """Blocks of pages, each a small dump: the header, which knows the namespaces, and whole pages."""
    for file in source.files:
        with open_stream(file) as stream:
            header, consumed = b"", 0
            counts: Counts = Counter()
            for piece in _pieces(stream, _PAGE_END, False, counts):
                if not header:
                    header = dump_header(piece, file)
                    piece = piece[len(header) :]
                bytes_read, consumed = stream.position - consumed, stream.position
                piece = piece.removesuffix(b"\n").removesuffix(b"</mediawiki>")
                yield Block(source, header + piece + b"</mediawiki>", bytes_read, dict(counts))
                counts.clear()


def _pieces(stream: InputStream, end: re.Pattern[bytes], divisible: bool, counts: Counts) -> Iterator[bytes]:
    """A stream cut behind records. A record too large for a worker is divided, or left out, and counted."""
    rest = _without_byte_order_mark(stream.read(_BLOCK_BYTES), stream.path)
    while rest:
        if cut := _last_end(end, rest):
            yield rest[:cut]
            rest = rest[cut:]
        elif len(rest) >= _LARGEST_RECORD and divisible:
            cut = _anywhere(rest)
            yield rest[:cut]
            rest = rest[cut:]
            counts["divided_documents"] += 1
        elif len(rest) >= _LARGEST_RECORD:
            rest = _behind_record(stream, end, rest)
            counts["oversized_records"] += 1
        part = stream.read(_BLOCK_BYTES)
        if not part:
            break
        rest += part
    if rest.strip():
        yield rest


def _without_byte_order_mark(start: bytes, path: Path) -> bytes:
    for mark, encoding in _BYTE_ORDER_MARKS.items():
        if start.startswith(mark):
            raise UserError(f"{path} is {encoding}, not UTF-8: convert it, for example with iconv")
    return start.removeprefix(_UTF8_MARK)


def _last_end(end: re.Pattern[bytes], data: bytes) -> int:
    """Where the last record in ``data`` ends; 0 if none does. Looks at the tail first."""
    for window in (1 << 16, len(data)):
        ends = [match.end() for match in end.finditer(data, max(0, len(data) - window))]
        if ends:
            return ends[-1]
    return 0


def _anywhere(data: bytes) -> int:
    """Where to divide a document without an end: behind its last line or word, or at least not inside a character."""
    if cut := max(data.rfind(b"\n"), 0) or max(data.rfind(b" "), 0):
        return cut + 1
    cut = len(data)
    while cut > len(data) - 4 and (data[cut - 1] & 0xC0) == 0x80:
        cut -= 1
    return cut - 1


def _behind_record(stream: InputStream, end: re.Pattern[bytes], rest: bytes) -> bytes:
    """Skip to the end of the record that ``rest`` begins; what was read beyond it."""
    while not (match := end.search(rest)):
        part = stream.read(_BLOCK_BYTES)
        if not part:
            return b""
        rest = rest[-16:] + part  # an end may lie across the two
    return rest[match.end() :]


def _row_blocks(source: Source) -> Iterator[Block]:
    """Blocks of table rows or generated documents."""
    rows: list[str | None] = []
    characters = bytes_read = 0
    for run, run_bytes in _row_runs(source):
        rows += run
        characters += sum(len(text or "") for text in run)
        bytes_read += run_bytes
        if characters >= _BLOCK_BYTES:
            yield Block(source, rows, bytes_read)
            rows, characters, bytes_read = [], 0, 0
    if rows:
        yield Block(source, rows, bytes_read)


def _row_runs(source: Source) -> Iterator[tuple[list[str | None], int]]:
    """Runs of rows, each with its share of the source's bytes."""
    if source.kind == "parquet":
        for file in source.files:
            yield from parquet_rows(file, source.field)
    elif source.kind == "huggingface":
        rows = dataset_rows(source.path or "", source.config, source.split, source.revision, source.field)
        yield from ((run, sum(len(text or "") for text in run)) for run in rows)
    else:
        yield from (([document], len(document)) for document in demo_documents(source.seed, source.megabytes))


def parse_block(block: Block, min_characters: int, counts: Counts) -> Iterator[str]:
    """The clean documents of a block; ``counts`` is added to, see :func:`clean_documents`.

    Also counted: ``divided_documents`` and ``oversized_records`` (larger than 16 MB: a text document goes on as the
    next one, any other record is left out), ``malformed_records`` (no JSON, or no text in the field).
    """
    counts.update(block.counts)
    return clean_documents(_raw_documents(block, counts), min_characters, counts)


def _raw_documents(block: Block, counts: Counts) -> Iterator[str]:
    source, records = block.source, block.records
    if isinstance(records, list):
        return _joined(_rows_of_bearable_size(records, counts), source.rows_per_document)
    if source.kind == "wikipedia_xml":
        return _articles(source, records, counts)
    if source.kind == "jsonl":
        return _joined(_json_texts(records, source.field, counts), source.rows_per_document)
    text = records.decode("utf-8", "replace")
    if source.kind == "wikiextractor":
        return wikiextractor_documents(text)
    if source.separator == "line":
        return _joined((line for line in text.split("\n") if line.strip()), source.rows_per_document)
    return (document for document in re.split(r"\n[ \t\r]*\n", text) if document.strip())


def _articles(source: Source, dump: bytes, counts: Counts) -> Iterator[str]:
    try:
        yield from articles(dump, counts)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None


def _rows_of_bearable_size(rows: list[str | None], counts: Counts) -> Iterator[str]:
    for row in rows:
        if len(row or "") <= _LARGEST_RECORD:
            yield row or ""
        else:
            counts["oversized_records"] += 1


def _joined(rows: Iterable[str], rows_per_document: int) -> Iterator[str]:
    """Every ``rows_per_document`` rows as one document; the last one of a block may have fewer."""
    if rows_per_document == 1:
        yield from rows
        return
    group: list[str] = []
    for row in rows:
        group.append(row)
        if len(group) == rows_per_document:
            yield "\n".join(group)
            group = []
    if group:
        yield "\n".join(group)


def _json_texts(lines: bytes, name: str, counts: Counts) -> Iterator[str]:
    for line in lines.split(b"\n"):
        if line.strip():
            text = _json_text(line, name)
            if text is None:
                counts["malformed_records"] += 1
            else:
                yield text


def _json_text(line: bytes, name: str) -> str | None:
    try:
        text = json.loads(line.decode("utf-8", "replace"))[name]
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return text if isinstance(text, str) else None
