"""A task's rows, read and checked: from official TSV files, from the hub, or from a user's own files.

Whatever the source, a row ends as texts and a class index or score, so that the same rows have the same checksum.
"""

import csv
import hashlib
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np

from common.errors import UserError
from finetune.own_task import OWN_FORMATS
from finetune.tasks import HUB_DATASET, Task

_ROWS_AT_ONCE: Final = 1000
_UNLABELLED: Final = ("", "-1", "-1.0")  # what stands for a label in files and data sets that have none


@dataclass(frozen=True)
class Examples:
    """The rows of one split as read: texts and, in the same order, labels."""

    sentences: tuple[list[str], ...]
    """One list per sentence column."""
    labels: list[int] | list[float] | None
    """Class indices, or scores as float32 holds them; None for a test split."""

    def __len__(self) -> int:
        return len(self.sentences[0])

    def first(self, num_rows: int | None) -> "Examples":
        """The first rows, so many; all of them for None."""
        labels = None if self.labels is None else self.labels[:num_rows]
        return Examples(tuple(column[:num_rows] for column in self.sentences), labels)

    @cached_property
    def sha256(self) -> str:
        """A checksum of all texts and labels, whatever they were read from."""
        digest = hashlib.sha256()
        for column in (*self.sentences, self.labels or []):
            for start in range(0, len(column), _ROWS_AT_ONCE):
                digest.update(json.dumps(column[start : start + _ROWS_AT_ONCE]).encode())
            digest.update(b"\n")
        return digest.hexdigest()


def data_sha256(task_data: Mapping[str, Examples]) -> str:
    """A checksum of a task's splits, the same for the same rows from files and from the hub."""
    checksums = {split: examples.sha256 for split, examples in task_data.items()}
    return hashlib.sha256(json.dumps(checksums).encode()).hexdigest()


def read_task(task: Task, glue_dir: Path | None) -> dict[str, Examples]:
    """Read and check every split that a trial of ``task`` needs: training and evaluation splits.

    Args:
        task: what to read.
        glue_dir: folder that holds the task's folder of official TSV files; None reads GLUE from the Hugging Face hub.
            A user's own task does not look at it.

    Raises:
        UserError: a file, column, text or label is missing or wrong, the hub cannot be reached, or the training split
            and an evaluation split are the same rows, or one is part of the other.
    """
    require_files([(task, split) for split in task.splits], glue_dir)
    data = {split: read_split(task, split, glue_dir) for split in task.splits}
    rows = {split: set(zip(*examples.sentences, strict=True)) for split, examples in data.items()}
    for split in task.evaluation_splits:
        if rows[split] <= rows["train"] or rows["train"] <= rows[split]:
            whole, part = ("train", split) if rows[split] <= rows["train"] else (split, "train")
            raise UserError(
                f"{task.title}: all rows of {part} are in {whole} too: a score on {split} would mean nothing"
            )
    return data


def read_split(task: Task, split: str, glue_dir: Path | None) -> Examples:
    """Read and check one split; a test split comes without labels, whatever its source says.

    Raises:
        UserError: as :func:`read_task`.
    """
    require_files([(task, split)], glue_dir)
    columns, path = task.sentence_columns, split_path(task, split, glue_dir)
    if path is not None:
        # In a test file every row counts, because predictions are matched by place.
        skip_broken = task.skip_broken_rows and not task.is_test(split)
        table = file_table(path, task.columns_without_header, skip_broken)
    elif task.own:
        table = _dataset_table(task, task.own.dataset, task.own.dataset_config, _own_place(task, split))
    else:
        table = _dataset_table(task, HUB_DATASET, task.hub_config, _hub_split(split))
        columns = task.hub_sentence_columns or columns
    label_column = task.label_column if path or task.own else "label"
    return _examples(task, table, columns, None if task.is_test(split) else label_column)


def read_texts(task: Task, path: Path) -> Examples:
    """The texts of a user's own file in the task's columns; labels, if it has any, are not looked at.

    Raises:
        UserError: the file, a column or a text is missing.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist: give a {', '.join(OWN_FORMATS)} file")
    return _examples(task, file_table(path), task.sentence_columns, None)


def require_files(wanted: Iterable[tuple[Task, str]], glue_dir: Path | None) -> None:
    """Check that the files of these (task, split) pairs are there, before any is read.

    Raises:
        UserError: names all that are missing.
    """
    missing: dict[Path, Task] = {}
    for task, split in wanted:
        if task.synthetic and glue_dir is None:
            raise UserError(f"{task.task_name} is synthetic and not on the hub: give --glue_dir the folder made for it")
        path = split_path(task, split, glue_dir)
        if path is not None and not path.is_file():
            missing[path] = task
    if missing:
        names = ", ".join(dict.fromkeys(task.task_name for task in missing.values()))
        hint = "give --glue_dir a folder that has them" if any(not task.own for task in missing.values()) else ""
        raise UserError(
            f"{', '.join(map(str, missing))} {'does' if len(missing) == 1 else 'do'} not exist: needed for {names};"
            f" {hint or 'put train and dev of own_tasks right'}"
        )


def split_path(task: Task, split: str, glue_dir: Path | None) -> Path | None:
    """The file that holds the split, there or not; None where the rows come from a data set."""
    if task.own:
        return None if task.own.dataset else Path(_own_place(task, split))
    if glue_dir is None:
        return None
    official = glue_dir / task.folder / f"{split}.tsv"
    others = (glue_dir / name for name in task.other_files)
    return next((path for path in (official, *others) if path.is_file()), official)


def _own_place(task: Task, split: str) -> str:
    return {"train": task.own.train, "dev": task.own.dev}[split]


def _hub_split(split: str) -> str:
    return "test" if split == "diagnostic" else split.replace("dev", "validation")


@dataclass(frozen=True)
class Table:
    """Rows with named columns, wherever they are; they can be read once."""

    name: str
    """Of the file or data set, as errors tell it."""
    unit: str
    """What its rows are numbered as."""
    columns: tuple[str, ...]
    read: Callable[[Sequence[str]], Iterator[tuple[int, Sequence[Any]]]]
    """Column names -> each row's number, from 1, and its values in these columns; None for a missing one."""


def file_table(path: Path, columns_without_header: tuple[str, ...] | None = None, skip_broken: bool = False) -> Table:
    """The rows of a ``.csv``, ``.tsv`` (no quoting) or ``.jsonl`` file.

    Args:
        path: a file in UTF-8; what ends in neither ``.csv`` nor ``.jsonl`` is read as TSV.
        columns_without_header: the columns of a TSV file whose first line doesn't name the last of these.
        skip_broken: leave out lines with fewer or more columns than there are.

    Raises:
        UserError: the file can't be read, or, later, when its rows are, is not in its format.
    """
    if path.suffix == ".jsonl":
        return _json_table(path)
    if path.suffix == ".csv":
        return _text_table(path, _csv_rows(path), None, skip_broken)
    return _text_table(path, _tsv_rows(path), columns_without_header, skip_broken)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends; "\\n" alone ends one, as texts hold other characters that Python counts."""
    number = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{path}, line {number} is not UTF-8: convert the file first") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def _tsv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """As GLUE's files are: a row a line, and quotes are ordinary characters."""
    for number, line in _lines(path):
        if text := line.removesuffix("\n").removesuffix("\r"):
            yield number, text.split("\t")


def _csv_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(sys.maxsize)  # texts may be long
    reader = csv.reader((line for _, line in _lines(path)), strict=True)
    number = 1
    try:
        for cells in reader:
            if cells:
                yield number, cells
            number = reader.line_num + 1  # of the row's first line: quoted texts may have several
    except csv.Error as error:
        raise UserError(f"{path}, line {number} is not CSV ({error})") from None


def _text_table(
    path: Path, rows: Iterator[tuple[int, list[str]]], columns_without_header: tuple[str, ...] | None, skip_broken: bool
) -> Table:
    header_number, header = next(rows, (1, []))
    columns = tuple(header)
    if columns_without_header and columns_without_header[-1] not in header:  # else it has a header, as a test file
        rows, columns = itertools.chain([(header_number, header)] if header else [], rows), columns_without_header

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, list[str]]]:
        places = [columns.index(name) for name in wanted]
        for number, cells in rows:
            if len(cells) == len(columns):
                yield number, [cells[place] for place in places]
            elif not skip_broken:
                raise UserError(f"{path}, line {number} has {len(cells)} columns instead of {len(columns)}")

    return Table(str(path), "line", columns, read)


def _json_table(path: Path) -> Table:
    records = ((number, _json_record(path, number, line)) for number, line in _lines(path) if line.strip())
    first = next(records, None)

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, list[Any]]]:
        for number, record in itertools.chain([first] if first else [], records):
            yield number, [record.get(name) for name in wanted]

    return Table(str(path), "line", tuple(first[1]) if first else (), read)


def _json_record(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
        json.dumps(record, ensure_ascii=False).encode()  # half of a surrogate pair is JSON, but no text
    except (json.JSONDecodeError, UnicodeEncodeError):
        record = None
    if not isinstance(record, dict):
        raise UserError(f"{path}, line {number} is not a JSON object: JSON Lines has one in each line")
    return record


def _dataset_table(task: Task, dataset: str, config: str | None, split: str) -> Table:
    import datasets  # slow to import, and only needed where rows come from a data set

    name = f"{dataset} ({config})" if config else dataset
    try:
        rows = datasets.load_dataset(dataset, config, split=split)
    except Exception as error:  # whatever `datasets`, the hub's client and its transport raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        hint = "put dataset, dataset_config, train and dev of own_tasks right" if task.own else "give --glue_dir"
        raise UserError(f"{name} cannot be loaded ({reason}): {hint}") from None

    def read(wanted: Sequence[str]) -> Iterator[tuple[int, Sequence[Any]]]:
        decoders = [_decoder(rows.features[column], task) for column in wanted]
        numbers = itertools.count(1)
        for batch in rows.select_columns(list(wanted)).iter(batch_size=_ROWS_AT_ONCE):
            columns = [map(decode, batch[column]) for decode, column in zip(decoders, wanted, strict=True)]
            yield from zip(numbers, zip(*columns, strict=True), strict=False)

    return Table(f"{name}, split {split}", "row", tuple(rows.column_names), read)


def _decoder(feature: Any, task: Task) -> Callable[[Any], Any]:
    """Class numbers become names, where the task's labels are names; -1, which has none, stays."""
    names = getattr(feature, "names", None)
    if not names or not set(task.labels or ()) <= set(names):
        return lambda value: value
    return lambda value: names[value] if value is not None and value >= 0 else value


def _examples(task: Task, table: Table, sentence_columns: Sequence[str], label_column: str | None) -> Examples:
    wanted = [*sentence_columns, *([] if label_column is None else [label_column])]
    _check_columns(task, table, wanted, label_column)
    sentences: tuple[list[str], ...] = tuple([] for _ in sentence_columns)
    labels: list = []
    read_label = _score if task.labels is None else _class_index
    for number, values in table.read(wanted):
        where = f"{table.name}, {table.unit} {number}"
        for texts, column, value in zip(sentences, sentence_columns, values, strict=False):
            texts.append(text_of(value, f"{where}: column '{column}'", task.may_lack_text))
        if label_column is not None:
            labels.append(read_label(task, values[-1], where))
    if not sentences[0]:
        raise UserError(f"{table.name} has no rows")
    if task.labels is None and set(labels) == {-1.0}:
        raise UserError(f"{table.name}: every score is -1, as in a test set without labels: give the development set")
    return Examples(sentences, None if label_column is None else labels)


def _check_columns(task: Task, table: Table, wanted: Sequence[str], label_column: str | None) -> None:
    missing = [name for name in wanted if name not in table.columns]
    if missing:
        there = ", ".join(table.columns)
        hint = "; is this a test set, without labels?" if missing == [label_column] else ""
        raise UserError(f"{table.name} has no column '{missing[0]}' (it has: {there}), which {task.title} needs{hint}")


def text_of(value: Any, where: str, may_lack_text: bool = False) -> str:
    """A cell as text; ``where`` is the place that an error names.

    Raises:
        UserError: it holds something else, or nothing where it may not.
    """
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where} holds {value!r}, which is not text")
    if may_lack_text:
        return value or ""
    if not value or value.isspace():
        raise UserError(f"{where} is empty: fill it, or take the row out")
    return value


def _class_index(task: Task, value: Any, where: str) -> int:
    label = _label_name(value)
    if label in task.labels:
        return task.labels.index(label)
    hint = ": is this a test set, without labels?" if label in _UNLABELLED else ""
    raise UserError(f"{where}: label '{label}' is not one of {task.title}'s ({', '.join(task.labels)}){hint}")


def _label_name(value: Any) -> str:
    """A label as its task names it, whether the source holds text, a whole number, or true and false."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def _score(task: Task, value: Any, where: str) -> float:
    try:
        score = float(np.float32(value))  # as the hub keeps it
    except (TypeError, ValueError):
        score = math.nan
    if not math.isfinite(score):
        raise UserError(f"{where}: '{'' if value is None else value}' is not a score")
    smallest, largest = task.score_range or (-math.inf, math.inf)
    if not smallest <= score <= largest:
        hint = ": is this a test set, without scores?" if score == -1 else ""
        raise UserError(f"{where}: score {value} is not between {smallest:g} and {largest:g}{hint}")
    return score
