"""Pass 1, text to tokens: every document is tokenised once into one flat token file with a table of its sequences.

The work unit is a block of records. Every unit becomes a file with its final name, or none, so that a pass that was
killed goes on where it was; the name holds the digest of the records, so that a source that changed meanwhile is
noticed. Joining the units decides what is held out and what is a duplicate, and keeps both in files: the memory that
it takes does not grow with the corpus, except for the numbers of the held-out documents.
"""

import contextlib
import hashlib
import json
import mmap
import os
import threading
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import tokenizers

from common.errors import UserError
from common.folders import atomic_path, read_json, sha256_of_file, write_json
from data_prep.documents import Block, parse_block
from data_prep.encoding import SentenceEncoder
from data_prep.executors import WorkPool
from data_prep.hashing import hash_keys
from data_prep.sentences import SentenceSplitter, sentence_splitter
from data_prep.sequences import SequenceRule, tokenize_documents

_FEWEST_HELD_OUT = 8
_HOLD_OUT_DRAW = 41  # name of the draw, see hash_keys
_DOCUMENTS_AT_ONCE = 1 << 20
_CORPUS_FILE, _TOKENS_FILE, _STARTS_FILE = "corpus.json", "tokens.npy", "starts.npy"
_CHANGED = "changed since this build began: put it back, or give another --output_dir"
# What becomes of a document; repeated ones are trained on as often as they come.
_TRAIN, _REPEATED, _HELD_OUT, _DUPLICATE = range(4)
_DOCUMENT = np.dtype([("key", np.uint64, 2), ("sequences", np.int64), ("tokens", np.int64), ("fate", np.uint8)])


@dataclass(frozen=True)
class TextRule:
    """How records become sequences."""

    sequences: SequenceRule
    sentence_splitter: SentenceSplitter
    language: str
    min_document_characters: int


@dataclass(frozen=True)
class Corpus:
    """The tokenised corpus; its arrays stay on disk. Sequences to train on come first, then those held out."""

    tokens: np.ndarray
    """Token ids of all sequences without [CLS] and [SEP], one after the other, and zeros for the room of one more
    sequence behind them; memory-mapped."""
    starts: np.ndarray
    """Where each sequence begins in ``tokens``, and where the last one ends; memory-mapped int64,
    [num_sequences + 1]."""
    num_documents: int
    """Documents that are kept."""
    num_validation_documents: int
    num_sequences: int
    num_validation_sequences: int
    num_tokens: int
    counts: dict[str, int]
    """What cleaning mended and left out, by name."""


def tokenize_corpus(
    blocks: Iterable[Block],
    tokenizer_file: Path,
    rule: TextRule,
    validation_fraction: float,
    deduplicate: bool,
    work: Path,
    pool: WorkPool,
) -> Corpus:
    """Tokenise ``blocks`` into ``work``, or take what an earlier call left there.

    Args:
        blocks: what the sources hold, in an order that is the same at every call.
        tokenizer_file: a ``tokenizer.json`` that the workers can read.
        rule: how records become sequences.
        validation_fraction: share of the documents to hold out.
        deduplicate: leave out documents whose text came before.
        work: folder for the token files.
        pool: runs the work units.

    Raises:
        UserError: a source changed since an earlier call, or there are fewer than two different documents.
    """
    if not (work / _CORPUS_FILE).exists():
        work.mkdir(parents=True, exist_ok=True)
        tokenizer = (tokenizer_file, sha256_of_file(tokenizer_file))
        for _ in pool.run_all(partial(_tokenize_unit, tokenizer=tokenizer, rule=rule), _missing_units(blocks, work)):
            pass
        _join_units(work, validation_fraction, deduplicate, rule.sequences)
    return load_corpus(work)


def load_corpus(work: Path) -> Corpus:
    """Open a finished pass 1."""
    facts = read_json(work / _CORPUS_FILE, "run the same command again")
    tokens, starts = (np.load(work / name, mmap_mode="r") for name in (_TOKENS_FILE, _STARTS_FILE))
    return Corpus(tokens, starts, **facts)


def forget_pages(array: np.ndarray) -> None:
    """Give back the memory that reading a memory-mapped array took; the system's page cache keeps the file."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def _missing_units(blocks: Iterable[Block], work: Path) -> Iterator[tuple[Block, Path]]:
    """The blocks whose unit files are still to be made, with the files' names."""
    made = {path.name.split("-")[1]: path.name for path in work.glob("unit-*.npz")}
    for number, block in enumerate(blocks):
        name = f"unit-{number:08d}-{block.digest}.npz"
        there = made.pop(f"{number:08d}", None)
        if there is None:
            yield block, work / name
        elif there != name:
            raise UserError(f"source {block.source} {_CHANGED}")
    if made:
        raise UserError(f"the last source {_CHANGED}")


def _tokenize_unit(unit: tuple[Block, Path], tokenizer: tuple[Path, str], rule: TextRule) -> None:
    block, path = unit
    encoder = _encoder(*tokenizer, threading.get_ident())
    counts: Counter[str] = Counter()
    documents = list(parse_block(block, rule.min_document_characters, counts))
    keys = document_keys(documents)
    splitter = sentence_splitter(rule.sentence_splitter, rule.language)
    result = tokenize_documents(documents, keys[:, 0], splitter, encoder, rule.sequences)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, keys=keys, counts=json.dumps(counts), **asdict(result))


def document_keys(documents: list[str]) -> np.ndarray:
    """128 bits that tell a document's text apart from any other; uint64, shape [num_documents, 2]."""
    digests = b"".join(hashlib.blake2b(document.encode(), digest_size=16).digest() for document in documents)
    return np.frombuffer(digests, dtype="<u8").reshape(-1, 2)


@cache  # one for each thread of a worker, because the words it keeps are not shared
def _encoder(tokenizer_file: Path, sha256: str, thread: int) -> SentenceEncoder:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the workers are the parallelism
    return SentenceEncoder(tokenizers.Tokenizer.from_file(str(tokenizer_file)))


def _join_units(work: Path, validation_fraction: float, deduplicate: bool, rule: SequenceRule) -> None:
    """Make the token file and the table of sequences out of the units."""
    units = sorted(work.glob("unit-*.npz"))
    documents, counts = _document_table(units, work / "documents.npy")
    decide_fates(documents, validation_fraction, deduplicate, rule.seed)
    facts = _facts(documents, counts)
    _write_arrays(units, documents, facts, work, rule.max_tokens)
    write_json(work / _CORPUS_FILE, facts)
    for path in [*units, work / "documents.npy"]:
        path.unlink()


def _document_table(units: list[Path], path: Path) -> tuple[np.ndarray, dict[str, int]]:
    """All documents, one after the other, in a file of its own; and what was counted in all units."""
    counts: Counter[str] = Counter()
    with path.open("wb") as file:
        for unit in units:
            with _open_unit(unit) as arrays:
                counts.update(json.loads(str(arrays["counts"])))
                _unit_documents(arrays).tofile(file)
    if not path.stat().st_size:
        raise UserError(f"the sources hold no document (left out: {dict(counts) or 'nothing'})")
    return np.memmap(path, dtype=_DOCUMENT, mode="r+"), dict(counts)


@contextlib.contextmanager
def _open_unit(path: Path) -> Iterator[Any]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            yield arrays
    except (EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error):
        path.unlink()
        raise UserError(f"{path} was damaged and is removed: run the same command again, which makes it anew") from None


def _unit_documents(arrays: Any) -> np.ndarray:
    ends = np.cumsum(arrays["sequences_per_document"])
    tokens_before = np.append(0, np.cumsum(arrays["sequence_lengths"]))
    documents = np.zeros(len(ends), dtype=_DOCUMENT)
    documents["key"] = arrays["keys"]
    documents["sequences"] = arrays["sequences_per_document"]
    documents["tokens"] = tokens_before[ends] - tokens_before[ends - arrays["sequences_per_document"]]
    return documents


def decide_fates(documents: np.ndarray, fraction: float, deduplicate: bool, seed: int) -> None:
    """Mark which documents are duplicates (left out) and which are held out for validation.

    Exactly the share asked for is held out, but at least a few documents and never more than half: those with the
    smallest hashes of their text. A text that the corpus keeps twice is never held out, so that nothing of what the
    model is validated on was trained on.

    Raises:
        UserError: there are fewer than two different documents.
    """
    _mark_repeated(documents, deduplicate)
    kept = sum(int((part["fate"] != _DUPLICATE).sum()) for part in _parts(documents))
    candidates = sum(len(_hold_out_hashes(part, seed)) for part in _parts(documents))
    if candidates < 2:
        raise UserError(
            f"the sources hold {kept:,} documents, {candidates} of them unlike all others: validation needs one and "
            "training another, so give at least two different documents, or set deduplicate if all come twice"
        )
    number = min(max(_FEWEST_HELD_OUT, round(fraction * kept)), candidates // 2)
    smallest = np.zeros(0, dtype=np.uint64)
    for part in _parts(documents):
        smallest = np.sort(np.concatenate([smallest, _hold_out_hashes(part, seed)]))[:number]
    for part in _parts(documents):
        candidate = np.flatnonzero(_may_be_held_out(part))
        part["fate"][candidate[_hold_out_hashes(part, seed) <= smallest[-1]]] = _HELD_OUT


def _mark_repeated(documents: np.ndarray, deduplicate: bool) -> None:
    """Compare the documents' keys, as many at a time as memory is planned for."""
    buckets = 1 + len(documents) // _DOCUMENTS_AT_ONCE
    for bucket in range(buckets):
        members = [
            start + np.flatnonzero(part["key"][:, 1] % np.uint64(buckets) == bucket)
            for start, part in zip(range(0, len(documents), _DOCUMENTS_AT_ONCE), _parts(documents), strict=True)
        ]
        index = np.concatenate(members)
        index = index[np.lexsort(documents["key"][index].T)]  # stable: of equal ones the first comes first
        keys = documents["key"][index]
        equals_next = (keys[1:] == keys[:-1]).all(axis=1)
        later, earlier = index[1:][equals_next], index[:-1][equals_next]
        documents["fate"][later] = _DUPLICATE if deduplicate else _REPEATED
        if not deduplicate:
            documents["fate"][earlier] = _REPEATED


def _parts(documents: np.ndarray) -> Iterator[np.ndarray]:
    return (documents[start : start + _DOCUMENTS_AT_ONCE] for start in range(0, len(documents), _DOCUMENTS_AT_ONCE))


def _may_be_held_out(documents: np.ndarray) -> np.ndarray:
    return (documents["fate"] != _DUPLICATE) & (documents["fate"] != _REPEATED) & (documents["sequences"] > 0)


def _hold_out_hashes(documents: np.ndarray, seed: int) -> np.ndarray:
    """Of those documents that may be held out; uint64."""
    return hash_keys(seed, _HOLD_OUT_DRAW, documents["key"][_may_be_held_out(documents), 0])


def _facts(documents: np.ndarray, counts: dict[str, int]) -> dict[str, Any]:
    """The numbers of a :class:`Corpus`."""
    total: Counter[str] = Counter()
    for part in _parts(documents):
        kept, held_out = part["fate"] != _DUPLICATE, part["fate"] == _HELD_OUT
        total["num_documents"] += int(kept.sum())
        total["num_validation_documents"] += int(held_out.sum())
        total["num_sequences"] += int(part["sequences"][kept].sum())
        total["num_validation_sequences"] += int(part["sequences"][held_out].sum())
        total["num_tokens"] += int(part["tokens"][kept].sum())
    duplicates = len(documents) - total["num_documents"]
    return {**total, "counts": {**counts, **({"duplicate_documents": duplicates} if duplicates else {})}}


def _write_arrays(units: list[Path], documents: np.ndarray, facts: dict[str, Any], work: Path, max_tokens: int) -> None:
    """Sort every unit's sequences into the part to train on and the part held out."""
    validation_tokens = sum(int(part["tokens"][part["fate"] == _HELD_OUT].sum()) for part in _parts(documents))
    training_tokens = facts["num_tokens"] - validation_tokens
    training_sequences = facts["num_sequences"] - facts["num_validation_sequences"]
    with _open_unit(units[0]) as first:
        dtype = first["tokens"].dtype
    with (
        _array_file(work / _TOKENS_FILE, facts["num_tokens"] + max_tokens, training_tokens, dtype) as token_files,
        _array_file(work / _STARTS_FILE, facts["num_sequences"] + 1, training_sequences, np.int64) as start_files,
    ):
        next_start = [0, training_tokens]
        document = 0
        for unit in units:
            with _open_unit(unit) as arrays:
                lengths, per_document = arrays["sequence_lengths"], arrays["sequences_per_document"]
                fate = np.repeat(documents["fate"][document : document + len(per_document)], per_document)
                document += len(per_document)
                held_out, left_out = fate == _HELD_OUT, fate == _DUPLICATE
                for part, chosen in enumerate((~held_out & ~left_out, held_out)):
                    arrays["tokens"][np.repeat(chosen, lengths)].tofile(token_files[part])
                    starts = next_start[part] + np.append(0, np.cumsum(lengths[chosen]))
                    starts[:-1].tofile(start_files[part])
                    next_start[part] = int(starts[-1])
        np.array([facts["num_tokens"]]).tofile(start_files[1])


@contextlib.contextmanager
def _array_file(path: Path, size: int, second_part: int, dtype: Any) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """A ``.npy`` file of ``size`` zeros, open twice: at its first element, and at element ``second_part``."""
    dtype = np.dtype(dtype)
    with atomic_path(path) as temporary:
        with temporary.open("wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (size,)}
            np.lib.format.write_array_header_1_0(file, header)
            data = file.tell()
            file.truncate(data + size * dtype.itemsize)
        with temporary.open("r+b") as first, temporary.open("r+b") as second:
            first.seek(data)
            second.seek(data + second_part * dtype.itemsize)
            yield first, second
