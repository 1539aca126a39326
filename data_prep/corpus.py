"""Pass 1, text to tokens: every document is tokenised once into one flat token file with a table of its sequences.

The work unit is a run of consecutive documents, cut by size and so independent of the number of workers. Every unit is
a file with its final name or none, so that a pass that was killed goes on where it was.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from common.errors import UserError
from common.folders import atomic_path
from data_prep.hashing import hash_keys
from data_prep.sequences import SequenceRule, tokenize_documents

_UNIT_CHARACTERS = 4_000_000
_FEWEST_HELD_OUT = 8
_HOLD_OUT_DRAW = 41  # name of the draw, see hash_keys
_TOKENS_FILE, _SEQUENCES_FILE = "tokens.npy", "sequences.npz"


@dataclass(frozen=True)
class Corpus:
    """The tokenised corpus; the tokens stay on disk."""

    tokens: np.ndarray
    """Token ids of all sequences without [CLS] and [SEP], one after the other; memory-mapped, [num_tokens]."""
    start: np.ndarray
    """Where each sequence begins in ``tokens``; int64, [num_sequences]."""
    length: np.ndarray
    """Tokens of each sequence; int64, [num_sequences]."""
    held_out: np.ndarray
    """Whether a sequence belongs to a held-out document; bool, [num_sequences]."""
    num_documents: int


def tokenize_corpus(
    documents: Iterable[str],
    tokenizer_file: Path,
    rule: SequenceRule,
    validation_fraction: float,
    work: Path,
    executor: Executor,
    window: int,
) -> Corpus:
    """Tokenise ``documents`` into ``work``, or take what an earlier call left there.

    Args:
        documents: the texts, in an order that is the same at every call.
        tokenizer_file: a ``tokenizer.json``.
        rule: how documents become sequences.
        validation_fraction: share of the documents to hold out.
        work: folder for the token files.
        executor: runs the work units.
        window: units under way at once, which bounds the parent's memory.

    Raises:
        UserError: there are fewer than two documents.
    """
    if not (work / _SEQUENCES_FILE).exists():
        make = partial(_tokenize_unit, work=work, tokenizer_file=tokenizer_file, rule=rule)
        for _ in run_all(executor, make, _units(documents), window):
            pass
        _merge_units(work, validation_fraction, rule.seed)
    return load_corpus(work)


def load_corpus(work: Path) -> Corpus:
    """Open a finished pass 1."""
    with np.load(work / _SEQUENCES_FILE, allow_pickle=False) as table:
        start, length, held_out = table["start"], table["length"], table["held_out"]
        num_documents = int(table["num_documents"])
    return Corpus(np.load(work / _TOKENS_FILE, mmap_mode="r"), start, length, held_out, num_documents)


def _units(documents: Iterable[str]) -> Iterator[tuple[int, int, list[str]]]:
    """Work units: (number, number of the first document, documents), about equally many characters each."""
    unit: list[str] = []
    characters = number = first = 0
    for document in documents:
        unit.append(document)
        characters += len(document)
        if characters >= _UNIT_CHARACTERS:
            yield number, first, unit
            number, first, unit, characters = number + 1, first + len(unit), [], 0
    if unit:
        yield number, first, unit


def _tokenize_unit(unit: tuple[int, int, list[str]], work: Path, tokenizer_file: Path, rule: SequenceRule) -> None:
    number, first_document, documents = unit
    path = work / f"unit-{number:06d}.npz"
    if path.exists():
        return
    result = tokenize_documents(documents, first_document, _load_fast_tokenizer(tokenizer_file), rule)
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **asdict(result))


@cache  # once a worker process
def _load_fast_tokenizer(path: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(path))


def run_all(executor: Executor, function: Callable, items: Iterable, window: int) -> Iterator[Any]:
    """Map in order over an executor with a bounded queue, so that the parent never holds the whole corpus."""
    pending: deque = deque()
    for item in items:
        pending.append(executor.submit(function, item))
        if len(pending) > window:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _merge_units(work: Path, validation_fraction: float, seed: int) -> None:
    """Join the units into one flat token file and the table of sequences."""
    units = [np.load(path, allow_pickle=False) for path in sorted(work.glob("unit-*.npz"))]
    sequence_length = np.concatenate([unit["sequence_lengths"] for unit in units])
    sequences_per_document = np.concatenate([unit["sequences_per_document"] for unit in units])
    held_out_document = _held_out(len(sequences_per_document), validation_fraction, seed)
    with atomic_path(work / _TOKENS_FILE) as temporary:
        shape, dtype = (int(sequence_length.sum()),), units[0]["tokens"].dtype
        tokens = np.lib.format.open_memmap(temporary, mode="w+", dtype=dtype, shape=shape)
        end = 0
        for unit in units:
            start, end = end, end + len(unit["tokens"])
            tokens[start:end] = unit["tokens"]
        tokens.flush()
    with atomic_path(work / _SEQUENCES_FILE) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            start=np.cumsum(sequence_length) - sequence_length,
            length=sequence_length,
            held_out=np.repeat(held_out_document, sequences_per_document),
            num_documents=len(sequences_per_document),
        )
    for path in work.glob("unit-*.npz"):
        path.unlink()


def _held_out(num_documents: int, fraction: float, seed: int) -> np.ndarray:
    """bool, shape [num_documents]: exactly the share asked for, but at least a few documents and never more than half.

    Raises:
        UserError: a single document, which can't be both trained on and held out.
    """
    if num_documents < 2:
        raise UserError("the sources hold a single document: one is trained on, another held out, so give at least two")
    number = min(max(_FEWEST_HELD_OUT, round(fraction * num_documents)), num_documents // 2)
    hashes = hash_keys(seed, _HOLD_OUT_DRAW, np.arange(num_documents))
    held_out = np.zeros(num_documents, dtype=bool)
    held_out[np.argsort(hashes)[:number]] = True
    return held_out
