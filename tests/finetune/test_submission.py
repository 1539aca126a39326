"""The checker against zips written by hand, and the writer against the checker and the csv module."""

import csv
import io
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from finetune.submission import SUBMITTED, check_submission, write_submission
from finetune.tasks import Task

# As the GLUE server's instructions and its sample submission have it.
OFFICIAL_ROWS = {
    "CoLA.tsv": 1063,
    "SST-2.tsv": 1821,
    "MRPC.tsv": 1725,
    "STS-B.tsv": 1379,
    "QQP.tsv": 390965,
    "MNLI-m.tsv": 9796,
    "MNLI-mm.tsv": 9847,
    "QNLI.tsv": 5463,
    "RTE.tsv": 3000,
    "WNLI.tsv": 146,
    "AX.tsv": 1104,
}
BINARY, ENTAILMENT = ("0", "1"), ("entailment", "neutral", "contradiction")
LABELS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("CoLA.tsv", "SST-2.tsv", "MRPC.tsv", "QQP.tsv", "WNLI.tsv"), BINARY),
    **dict.fromkeys(("MNLI-m.tsv", "MNLI-mm.tsv", "AX.tsv"), ENTAILMENT),
    **dict.fromkeys(("QNLI.tsv", "RTE.tsv"), ("entailment", "not_entailment")),
    "STS-B.tsv": ("0.000", "2.345", "5.000"),
}


def with_rows(num_rows: int) -> tuple[Task, ...]:
    """The submitted tasks with test sets of this length."""
    return tuple(
        replace(task, test_splits=tuple(replace(split, rows=num_rows) for split in task.test_splits))
        for task in SUBMITTED
    )


THREE_ROWS = with_rows(3)


def good_files() -> dict[str, str]:
    """Three rows in each file, every label among them."""
    return {
        name: "index\tprediction\n" + "".join(f"{row}\t{labels[row % len(labels)]}\n" for row in range(3))
        for name, labels in LABELS.items()
    }


def write_zip(path: Path, files: dict[str, str | bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def test_the_submission_has_the_servers_files_and_row_counts_in_its_order() -> None:
    assert {split.submission_file: split.rows for task in SUBMITTED for split in task.test_splits} == OFFICIAL_ROWS


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_good_zip_by_another_hand_passes(tmp_path: Path, compression: int) -> None:
    check_submission(write_zip(tmp_path / "s.zip", good_files(), compression), THREE_ROWS)


BAD_FILES = {
    "a missing file": ("RTE.tsv", None, "RTE.tsv missing"),
    "no header": ("RTE.tsv", "0\tentailment\n1\tentailment\n2\tentailment\n", r"RTE.tsv, line 1: '0\tentailment'"),
    "another header": ("CoLA.tsv", "Id\tLabel\n0\t0\n1\t1\n2\t0\n", r"CoLA.tsv, line 1: 'Id\tLabel' instead of"),
    "commas": ("CoLA.tsv", "index,prediction\n0,0\n1,1\n2,0\n", "CoLA.tsv, line 1: 'index,prediction' instead of"),
    "a byte order mark": ("CoLA.tsv", "\ufeffindex\tprediction\n0\t0\n1\t1\n2\t0\n", "CoLA.tsv, line 1"),
    "Windows line ends": ("CoLA.tsv", "index\tprediction\r\n0\t0\r\n1\t1\r\n2\t0\r\n", "CoLA.tsv, line 1"),
    "indices from 1": ("CoLA.tsv", "index\tprediction\n1\t0\n2\t1\n3\t0\n", "line 2: index '1' instead of 0"),
    "indices out of order": ("CoLA.tsv", "index\tprediction\n0\t0\n2\t1\n1\t0\n", "line 3: index '2' instead of 1"),
    "too few rows": ("CoLA.tsv", "index\tprediction\n0\t0\n1\t1\n", "CoLA.tsv has 2 rows instead of 3"),
    "too many rows": ("CoLA.tsv", "index\tprediction\n0\t0\n1\t1\n2\t0\n3\t0\n", "CoLA.tsv has 4 rows instead of 3"),
    "an empty line": ("CoLA.tsv", "index\tprediction\n0\t0\n\n1\t1\n2\t0\n", "line 3: index '' instead of 1"),
    "an empty file": ("CoLA.tsv", "", "CoLA.tsv, line 1: ''"),
    "another class": ("WNLI.tsv", "index\tprediction\n0\t0\n1\t2\n2\t0\n", "WNLI.tsv, line 3: '2' is not one of 0, 1"),
    "class indices": ("RTE.tsv", "index\tprediction\n0\t0\n1\t1\n2\t0\n", "line 2: '0' is not one of entailment, not_"),
    "MNLI's labels in RTE": ("RTE.tsv", "index\tprediction\n0\tentailment\n1\tneutral\n2\tentailment\n", "line 3"),
    "capital letters": (
        "AX.tsv",
        "index\tprediction\n0\tneutral\n1\tNeutral\n2\tneutral\n",
        "AX.tsv, line 3: 'Neutral'",
    ),
    "a third column": ("CoLA.tsv", "index\tprediction\n0\t0\t0.9\n1\t1\n2\t0\n", r"line 2: '0\t0.9' is not one of"),
    "no prediction": ("CoLA.tsv", "index\tprediction\n0\t0\n1\n2\t0\n", "line 3: '' is not one of 0, 1"),
    "two decimals": (
        "STS-B.tsv",
        "index\tprediction\n0\t1.000\n1\t3.14\n2\t0.000\n",
        "STS-B.tsv, line 3: '3.14' is not",
    ),
    "a score above 5": ("STS-B.tsv", "index\tprediction\n0\t5.001\n1\t3.140\n2\t0.000\n", "STS-B.tsv, line 2: '5.001'"),
    "a score below 0": ("STS-B.tsv", "index\tprediction\n0\t-0.100\n1\t3.140\n2\t0.000\n", "line 2: '-0.100'"),
    "no number": ("STS-B.tsv", "index\tprediction\n0\tnan\n1\t3.140\n2\t0.000\n", "line 2: 'nan' is not a number"),
    "decimal commas": ("STS-B.tsv", "index\tprediction\n0\t1,000\n1\t3.140\n2\t0.000\n", "line 2: '1,000'"),
    "not UTF-8": ("CoLA.tsv", b"index\tprediction\n0\t\xe9\n1\t1\n2\t0\n", "CoLA.tsv does not unpack to text"),
    "a bomb": ("CoLA.tsv", "index\tprediction\n" + 10_000_000 * "0", "CoLA.tsv unpacks to 10,000,017 bytes, more"),
    "a file in a folder": ("submission/CoLA.tsv", "", "'submission/CoLA.tsv' does not belong"),
    "a folder": ("glue/", "", "'glue/' does not belong"),
    "a way out": ("../../CoLA.tsv", "", "'../../CoLA.tsv' does not belong"),
    "an absolute path": ("/etc/passwd", "", "'/etc/passwd' does not belong"),
    "a Mac's extra file": ("__MACOSX/._CoLA.tsv", "", "does not belong"),
    "another file": ("README.md", "", "'README.md' does not belong"),
}


@pytest.mark.parametrize("what", BAD_FILES)
def test_a_zip_is_refused_for(tmp_path: Path, what: str) -> None:
    name, content, message = BAD_FILES[what]
    files = {**good_files(), name: content}
    path = write_zip(tmp_path / "s.zip", {name: content for name, content in files.items() if content is not None})
    with pytest.raises(UserError) as error:
        check_submission(path, THREE_ROWS)
    assert str(path) in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_line_counts_the_wrong_rows_and_names_problems_of_several_files(tmp_path: Path) -> None:
    files = {**good_files(), "CoLA.tsv": "index\tprediction\n0\tx\n1\tx\n2\tx\n", "extra": ""}
    del files["RTE.tsv"], files["AX.tsv"]
    files["WNLI.tsv"] = files["QQP.tsv"] = ""
    with pytest.raises(UserError) as error:
        check_submission(write_zip(tmp_path / "s.zip", files), THREE_ROWS)
    message = str(error.value)
    assert "RTE.tsv, AX.tsv missing; 'extra' does not belong" in message
    assert "CoLA.tsv, line 2: 'x' is not one of 0, 1 (and 2 more rows are wrong)" in message
    assert message.endswith("; and 4 more")  # no header and no rows, twice


def encrypted(content: bytes) -> bytes:
    """Set the first entry's flag, in its own header and in the directory."""
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(signature) + flags
        content = content[:place] + bytes([content[place] | 1]) + content[place + 1 :]
    return content


def with_a_wrong_byte(content: bytes) -> bytes:
    place = content.index(b"0\t0\n")  # of a file that is stored
    return content[:place] + b"1" + content[place + 1 :]


def shrunk_in_the_directory(content: bytes) -> bytes:
    """The first entry claims to unpack to 9 bytes."""
    place = content.index(b"PK\x01\x02") + 24
    return content[:place] + bytes([9, 0, 0, 0]) + content[place + 4 :]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (encrypted, "CoLA.tsv is encrypted"),
        (with_a_wrong_byte, "CoLA.tsv does not unpack"),
        (shrunk_in_the_directory, "CoLA.tsv"),
        (lambda content: content[:-30], "not a zip, or damaged"),
        (lambda content: b"index\tprediction\n", "not a zip, or damaged"),
        (lambda content: b"", "not a zip, or damaged"),
        (lambda content: content + bytes(100_000), "more than its rows can take"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = write_zip(tmp_path / "s.zip", good_files(), zipfile.ZIP_STORED)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=message):
        check_submission(path, THREE_ROWS)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "s.zip", good_files())
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("CoLA.tsv", good_files()["CoLA.tsv"])
    with pytest.raises(UserError, match=r"CoLA\.tsv is in it 2 times"):
        check_submission(path, THREE_ROWS)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        check_submission(tmp_path / "s.zip")
    with pytest.raises(UserError, match="directory"):
        check_submission(tmp_path)


def test_a_submission_of_official_size_is_written_as_given_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    predictions = {
        name: [LABELS[name][row % len(LABELS[name])] for row in range(rows)] for name, rows in OFFICIAL_ROWS.items()
    }
    write_submission(tmp_path / "a.zip", predictions)
    check_submission(tmp_path / "a.zip")
    write_submission(tmp_path / "b.zip", predictions)
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.namelist() == list(OFFICIAL_ROWS)
        for name in ("CoLA.tsv", "STS-B.tsv", "AX.tsv"):
            rows = list(csv.DictReader(io.TextIOWrapper(archive.open(name), "utf-8", newline=""), delimiter="\t"))
            assert [row["prediction"] for row in rows] == predictions[name]
            assert [int(row["index"]) for row in rows] == list(range(OFFICIAL_ROWS[name]))


def test_wrong_predictions_leave_the_earlier_zip_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "s.zip"
    predictions = {name: [labels[0]] * 3 for name, labels in LABELS.items()}
    write_submission(path, predictions, THREE_ROWS)
    earlier = path.read_bytes()
    with pytest.raises(UserError, match=r"STS-B\.tsv, line 2: 'nan'"):
        write_submission(path, {**predictions, "STS-B.tsv": ["nan", "1.000", "2.000"]}, THREE_ROWS)
    assert path.read_bytes() == earlier
    assert list(tmp_path.iterdir()) == [path]
