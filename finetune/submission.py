"""What the GLUE server takes: one TSV file per test set, flat in one zip; written here, and proved row by row."""

import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from common.errors import UserError
from common.folders import atomic_path
from finetune.tasks import AX, TASKS, Task, TestSplit

HEADER: Final = "index\tprediction"
SUBMITTED: Final = tuple(task for task in (*TASKS.values(), AX) if task.test_splits)

_SCORE: Final = re.compile(r"[0-4]\.[0-9]{3}|5\.000")
_MAX_ROW_BYTES: Final = 32  # the longest row, of an index of six digits and "not_entailment", takes 22
_MAX_ENTRY_BYTES: Final = 1024  # what the zip says of a file takes about 120
_FIRST_DAY_OF_ZIP: Final = (1980, 1, 1, 0, 0, 0)
_PROBLEMS_SHOWN: Final = 3


def write_submission(path: Path, predictions: Mapping[str, Sequence[str]], tasks: Sequence[Task] = SUBMITTED) -> None:
    """Write the zip, whole and proved or not at all; the same predictions give the same bytes.

    Args:
        path: the zip; one that is there is replaced.
        predictions: of each file (such as ``CoLA.tsv``) what stands in its rows, in the order of the test set.
        tasks: whose test sets the zip must hold.

    Raises:
        UserError: the predictions are not what the server takes, see :func:`check_submission`.
    """
    with atomic_path(path) as temporary:
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, values in predictions.items():
                entry = zipfile.ZipInfo(name, _FIRST_DAY_OF_ZIP)
                entry.compress_type = zipfile.ZIP_DEFLATED
                entry.external_attr = (stat.S_IFREG | 0o644) << 16  # else it unpacks as a file nobody may read
                rows = "".join(f"{index}\t{value}\n" for index, value in enumerate(values))
                archive.writestr(entry, f"{HEADER}\n{rows}")
        check_submission(temporary, tasks)


def check_submission(path: Path, tasks: Sequence[Task] = SUBMITTED) -> None:
    """Prove that ``path`` is what the GLUE server takes: the files and nothing else, and each row of each of them.

    Nothing is unpacked to the disk, and a file that claims to be larger than its rows can be is not read.

    Args:
        path: any file.
        tasks: whose test sets the zip must hold.

    Raises:
        UserError: it is not; the line names the first problems by file and line.
    """
    problems = list(
        _problems(path, {split.submission_file: (task, split) for task in tasks for split in task.test_splits})
    )
    if problems:
        more = f"; and {len(problems) - _PROBLEMS_SHOWN} more" if len(problems) > _PROBLEMS_SHOWN else ""
        raise UserError(f"{path} is no GLUE submission: {'; '.join(problems[:_PROBLEMS_SHOWN])}{more}")


def _problems(path: Path, files: Mapping[str, tuple[Task, TestSplit]]) -> Iterator[str]:
    largest = sum(_max_bytes(split) + _MAX_ENTRY_BYTES for _, split in files.values())
    try:
        if path.stat().st_size > largest:
            yield f"it has {path.stat().st_size:,} bytes, more than its rows can take"
            return
        with zipfile.ZipFile(path) as archive:
            yield from _problems_of_names([entry.orig_filename for entry in archive.infolist()], files)
            for entry in archive.infolist():
                if entry.orig_filename in files:
                    yield from _problems_of_file(archive, entry, *files[entry.orig_filename])
    except OSError as error:
        yield f"it cannot be read ({error.strerror})"
    except zipfile.BadZipFile as error:
        yield f"it is not a zip, or damaged ({error})"


def _max_bytes(split: TestSplit) -> int:
    return (split.rows + 1) * _MAX_ROW_BYTES


def _problems_of_names(names: Sequence[str], files: Mapping[str, tuple[Task, TestSplit]]) -> Iterator[str]:
    missing = [name for name in files if name not in names]
    if missing:
        yield f"{', '.join(missing)} missing"
    for name in dict.fromkeys(names):
        if name not in files:
            yield f"{_short(name)} does not belong in it (its files lie in no folder, and there are no others)"
        elif names.count(name) > 1:
            yield f"{name} is in it {names.count(name)} times"


def _problems_of_file(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, task: Task, split: TestSplit) -> Iterator[str]:
    name = split.submission_file
    if entry.flag_bits & 1:
        yield f"{name} is encrypted"
        return
    if entry.file_size > _max_bytes(split):
        yield f"{name} unpacks to {entry.file_size:,} bytes, more than {split.rows:,} rows can take"
        return
    try:
        text = archive.read(entry).decode("utf-8")
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        yield f"{name} does not unpack to text ({error})"
        return
    header, *rows = text.removesuffix("\n").split("\n")
    if header != HEADER:
        yield f"{name}, line 1: {_short(header)} instead of {HEADER!r}"
    yield from _problems_of_rows(name, rows, task)
    if len(rows) != split.rows:
        yield f"{name} has {len(rows):,} rows instead of {split.rows:,}"


def _problems_of_rows(name: str, rows: Sequence[str], task: Task) -> Iterator[str]:
    """The first row that is wrong, and how many others are."""
    is_prediction: Callable[[str], object] = frozenset(task.labels).__contains__ if task.labels else _SCORE.fullmatch
    wrong = []
    for number, row in enumerate(rows):
        index, _, prediction = row.partition("\t")
        if index != str(number) or not is_prediction(prediction):
            wrong.append(number)
    if not wrong:
        return
    index, _, prediction = rows[wrong[0]].partition("\t")
    if index != str(wrong[0]):
        reason = f"index {_short(index)} instead of {wrong[0]}"
    else:
        allowed = (
            f"one of {', '.join(task.labels)}" if task.labels else "a number from 0.000 to 5.000 with three decimals"
        )
        reason = f"{_short(prediction)} is not {allowed}"
    more = f" (and {len(wrong) - 1:,} more rows are wrong)" if len(wrong) > 1 else ""
    yield f"{name}, line {wrong[0] + 2}: {reason}{more}"


def _short(text: str) -> str:
    return repr(text if len(text) <= 40 else f"{text[:40]}...")
