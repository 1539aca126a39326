"""A tuned model's labels with their probabilities, or its scores, for texts or for a file of rows."""

import contextlib
import csv
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TextIO

import numpy as np
from scipy.special import softmax
from tqdm import tqdm

from common.errors import UserError
from common.folders import atomic_path
from common.page import markdown_table
from finetune.examples import Table, file_table, text_of
from finetune.own_task import OWN_FORMATS
from finetune.predictor import Predictor, Sentences

PAIR_MARK: Final = " | "
"""Between a text and its pair on the command line."""
_USUAL_COLUMNS: Final = (("sentence1", "sentence2"), ("text",), ("sentence",))
_SHOWN: Final = 60  # characters of a text in a table

Answer = dict[str, str | float]


def answers(labels: Sequence[str] | None, logits: np.ndarray) -> list[Answer]:
    """What a model says of each row, by column.

    Args:
        labels: the outputs' names; None for a score.
        logits: float32 [rows, outputs].

    Returns:
        ``prediction``: the label or score; for labels also its ``probability``, and ``probability_<label>`` of each.
    """
    if labels is None:
        return [{"prediction": float(score)} for score in logits[:, 0]]
    probabilities = softmax(logits.astype(np.float64), axis=-1)
    names = [f"probability_{label}" for label in labels]
    return [
        {"prediction": labels[best], "probability": row[best], **dict(zip(names, row, strict=True))}
        for best, row in zip(probabilities.argmax(axis=-1), probabilities.tolist(), strict=True)
    ]


def predict_texts(predictor: Predictor, texts: Sequence[str], batch_size: int) -> None:
    """Print a table of what the model says of texts, or of pairs written ``text | its pair``.

    Raises:
        UserError: a text is empty, or the model takes pairs and it is none, or the other way round.
    """
    sentences = _split_pairs(predictor, texts)
    found = answers(predictor.labels, predictor.logits(sentences, batch_size))
    header = [*(["text"] if len(sentences) == 1 else ["text", "pair"]), *found[0]]
    rows = [
        [*map(_shortened, row), *map(_figure, answer.values())]
        for row, answer in zip(zip(*sentences, strict=True), found, strict=True)
    ]
    print(markdown_table(header, rows))


def _split_pairs(predictor: Predictor, texts: Sequence[str]) -> Sentences:
    rows = [text.split(PAIR_MARK) for text in texts]
    wanted = predictor.num_sentences or len(rows[0])
    for text, row in zip(texts, rows, strict=True):
        if len(row) != wanted or wanted > 2:
            form = "pairs of texts, written 'text | its pair'" if wanted > 1 else "one text, without ' | ' in it"
            raise UserError(f"'{_shortened(text)}' does not fit: {predictor.folder} takes {form}")
        for part in row:
            text_of(part, f"'{_shortened(text)}': a text")
    return tuple(list(column) for column in zip(*rows, strict=True))


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[: _SHOWN - 1]}…"


def _figure(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.3f}"


@dataclass(frozen=True)
class _Rows:
    """A file's rows: all its columns, and the texts among them."""

    columns: tuple[str, ...]
    values: list[Sequence[Any]]
    sentences: Sentences


def predict_file(
    predictor: Predictor,
    input_file: Path,
    output_file: Path,
    text_column: str | None = None,
    pair_column: str | None = None,
    batch_size: int = 64,
) -> None:
    """Write the file's columns, and :func:`answers` beside them, to another; tell the rows a second.

    Everything is read and checked before the first prediction; the output appears whole or not at all.

    Args:
        predictor: the model.
        input_file: ``.csv``, ``.tsv`` (no quoting) or ``.jsonl``.
        output_file: one of the same endings; not there yet.
        text_column: default: the columns of the model's own task, else ``text``, ``sentence`` or the only column.
        pair_column: of the second text.
        batch_size: rows computed at a time.

    Raises:
        UserError: a file or column is missing, a cell is no text, the columns don't fit the model, or the output
            can't be written.
    """
    _check_output(input_file, output_file)
    rows = _read(predictor, input_file, text_column, pair_column)
    added = list(answers(predictor.labels, np.zeros((1, len(predictor.labels or "1"))))[0])
    if taken := [name for name in added if name in rows.columns]:
        raise UserError(f"{input_file} has a column '{taken[0]}', which the predictions are to have: rename it")
    if output_file.suffix == ".tsv":
        _require_plain(input_file, rows)
    with _written_to(output_file) as file:
        started = time.monotonic()
        with tqdm(total=len(rows.values), unit="row", disable=not sys.stderr.isatty()) as progress:
            logits = predictor.logits(rows.sentences, batch_size, progress.update)
        seconds = time.monotonic() - started
        found = answers(predictor.labels, logits)
        records = (
            dict(zip(rows.columns, values, strict=True)) | answer
            for values, answer in zip(rows.values, found, strict=True)
        )
        _WRITERS[output_file.suffix](file, [*rows.columns, *added], records)
    print(f"{output_file}: {len(found):,} rows, {len(found) / seconds:,.1f} rows/s on {predictor.device}")


def _check_output(input_file: Path, output_file: Path) -> None:
    wrong = [path for path in (input_file, output_file) if path.suffix not in OWN_FORMATS]
    if wrong:
        raise UserError(f"{wrong[0]} does not end in {', '.join(OWN_FORMATS)}")
    if output_file.exists():
        raise UserError(f"{output_file} exists: remove it, or give another --output_file")


def _read(predictor: Predictor, path: Path, text_column: str | None, pair_column: str | None) -> _Rows:
    task = predictor.record.task if predictor.record else None
    # A file without a header has the task's official columns; whoever names a column has a header.
    table = file_table(path, task.columns_without_header if task and not text_column else None)
    names = _text_columns(predictor, table, text_column, pair_column)
    values, sentences = [], tuple([] for _ in names)
    places = [table.columns.index(name) for name in names]
    for number, row in table.read(table.columns):
        for texts, name, place in zip(sentences, names, places, strict=True):
            where = f"{table.name}, {table.unit} {number}: column '{name}'"
            texts.append(text_of(row[place], where, task.may_lack_text if task else False))
        values.append(row)
    if not values:
        raise UserError(f"{path} has no rows")
    return _Rows(table.columns, values, sentences)


def _text_columns(
    predictor: Predictor, table: Table, text_column: str | None, pair_column: str | None
) -> tuple[str, ...]:
    there = f"{table.name} has the columns {', '.join(table.columns) or '(none)'}"
    names = tuple(name for name in (text_column, pair_column) if name is not None) or _found_columns(predictor, table)
    if pair_column is not None and text_column is None:
        raise UserError("--pair_column needs --text_column, the column of the first text")
    if not names:
        pair = " and --pair_column" if predictor.num_sentences == 2 else ""
        raise UserError(f"{there}: say by --text_column{pair} which of them to read")
    if missing := [name for name in names if name not in table.columns]:
        raise UserError(f"{there}, and no '{missing[0]}'")
    wanted = predictor.num_sentences or len(names)
    if len(names) != wanted:
        what = "pairs: give --text_column and --pair_column" if wanted == 2 else "one text: leave --pair_column out"
        raise UserError(f"{predictor.folder} takes {what}")
    return names


def _found_columns(predictor: Predictor, table: Table) -> tuple[str, ...]:
    """The first of the usual ones that are all there; () where nothing tells which columns hold text."""
    task, wanted = predictor.record.task if predictor.record else None, predictor.num_sentences
    of_task = [task.sentence_columns, task.hub_sentence_columns or ()] if task else []
    usual = [names for names in _USUAL_COLUMNS if wanted in (None, len(names))]
    only = table.columns if len(table.columns) == 1 and wanted != 2 else ()
    return next((names for names in (*of_task, *usual) if names and set(names) <= set(table.columns)), only)


def _require_plain(path: Path, rows: _Rows) -> None:
    """Refuse for a TSV file, which has no quoting, what only quoting could hold."""
    for number, values in enumerate(rows.values, start=1):
        if any(mark in str(value) for value in values for mark in "\t\r\n"):
            raise UserError(
                f"{path}, row {number} holds a tab or line break, and TSV cannot: give an --output_file .csv or .jsonl"
            )


@contextlib.contextmanager
def _written_to(path: Path) -> Iterator[TextIO]:
    """A text file that takes its name when all is written; opened at once, so that what can't be written shows early.

    Raises:
        UserError: it can't be written.
    """
    try:
        with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
            yield file
    except OSError as error:
        raise UserError(f"can't write {path} ({error.strerror}): give another --output_file") from None


def _write_csv(file: TextIO, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    writer = csv.DictWriter(file, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def _write_tsv(file: TextIO, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    file.write("\t".join(columns) + "\n")
    for record in records:
        file.write("\t".join("" if record[name] is None else str(record[name]) for name in columns) + "\n")


def _write_jsonl(file: TextIO, columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> None:
    file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


_WRITERS: Final[Mapping[str, Callable[[TextIO, Sequence[str], Iterable[Mapping[str, Any]]], None]]] = {
    ".csv": _write_csv,
    ".tsv": _write_tsv,
    ".jsonl": _write_jsonl,
}
