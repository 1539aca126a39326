"""A user's own files as a task: columns and labels found as Hugging Face's run_glue finds them."""

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from common.errors import UserError
from finetune.examples import file_table
from finetune.own_task import OWN_FORMATS, OwnTask

OWN_TASK: Final = "own_data"
"""The task's name."""


def find_own_task(
    train_file: Path, validation_file: Path, text_columns: Sequence[str] | None, label_column: str
) -> OwnTask:
    """The task that two files of labelled rows are.

    Labels that are all numbers, some of them with a fraction, are scores (regression). Others are classes, in the order
    of the numbers or else of the alphabet; their metric is the accuracy, that of scores the correlations.

    Args:
        train_file: a .csv, .tsv or .jsonl file; its columns and labels decide.
        validation_file: with the same columns, and no other labels.
        text_columns: one or two; None: ``sentence1`` and ``sentence2``, else ``sentence``, else all but the label's.
        label_column: classes or scores.

    Raises:
        UserError: a file or column is missing, it isn't clear which columns hold text, a row has no label, or all have
            the same.
    """
    for path in (train_file, validation_file):
        if path.suffix not in OWN_FORMATS:
            raise UserError(f"{path} does not end in {', '.join(OWN_FORMATS)}")
    table = file_table(train_file)
    if label_column not in table.columns:
        raise UserError(f"{train_file} has no column '{label_column}' ({_there(table.columns)}): --label_column_name")
    columns = _text_columns(train_file, table.columns, text_columns, label_column)
    labels = _labels(train_file, table.read([label_column]))
    try:
        return OwnTask(
            task_name=OWN_TASK,
            sentence_columns=columns,
            label_column=label_column,
            metrics=["accuracy"] if labels else ["pearson", "spearman"],
            train=str(train_file),
            dev=str(validation_file),
            labels=labels,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _text_columns(path: Path, columns: Sequence[str], given: Sequence[str] | None, label_column: str) -> list[str]:
    if given:
        missing = [name for name in given if name not in columns]
        if missing:
            raise UserError(f"{path} has no column '{missing[0]}' ({_there(columns)}): --text_column_names")
        return list(given)
    for usual in (["sentence1", "sentence2"], ["sentence"]):
        if set(usual) <= set(columns):
            return usual
    others = [name for name in columns if name != label_column]
    if len(others) not in (1, 2):
        raise UserError(f"{path}: which column is the text ({_there(columns)})? Name one or two by --text_column_names")
    return others


def _there(columns: Sequence[str]) -> str:
    return f"it has: {', '.join(columns)}"


def _labels(path: Path, rows: Iterable[tuple[int, Sequence[Any]]]) -> list[str] | None:
    """The classes in order; None where the labels are scores."""
    numbers: dict[str, float | None] = {}
    lines: dict[str, int] = {}
    for line, (label,) in rows:
        if label is None or label == "":
            raise UserError(f"{path}, line {line} has no label: give it one, or take the row out")
        numbers[_name(label)] = _number(label, path.suffix == ".jsonl")
        lines.setdefault(_name(label), line)
    if not numbers:
        raise UserError(f"{path} has no rows")
    if len(numbers) == 1:
        raise UserError(f"{path}: every row has the label '{next(iter(numbers))}': a classifier needs two")
    are_numbers = None not in numbers.values()
    for name, number in numbers.items() if are_numbers else ():
        if not math.isfinite(number):
            raise UserError(f"{path}, line {lines[name]}: '{name}' is no score")
    if are_numbers and not all(name.lstrip("+-").isdecimal() for name in numbers):
        return None
    return sorted(numbers, key=numbers.get if are_numbers else None)


def _name(label: Any) -> str:
    return str(label).lower() if isinstance(label, bool) else str(label)


def _number(label: Any, is_json: bool) -> float | None:
    """What a label counts as; None for a text. In JSON, digits in quotes are a text."""
    if isinstance(label, bool) or (is_json and isinstance(label, str)):
        return None
    try:
        return float(label)
    except (TypeError, ValueError):
        return None
