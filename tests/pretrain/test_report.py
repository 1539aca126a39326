"""The report on runs, from run folders made by hand, against figures worked out here."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from common import cli
from pretrain import __main__ as commands
from pretrain.plots import PUBLISHED, losses_figure, spent_figure, throughput_figure
from pretrain.report import write_report
from pretrain.runs import read_run, read_runs

ARCHITECTURE = {
    "layer_norm": "pre_ln",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 2,
    "intermediate_size": 512,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
    "max_position_embeddings": 64,
    "layer_norm_eps": 1e-12,
    "initializer_range": 0.02,
    "vocab_size": 800,
    "pad_token_id": 0,
    "type_vocab_size": 2,
}
SPENT = {
    "starting": 100.0,
    "micro_batch_search": 0.0,
    "compile": 200.0,
    "training": 3000.0,
    "data_wait": 36.0,
    "validation": 180.0,
    "checkpoints": 72.0,
    "exports": 12.0,
}
SUMMARY = {
    "steps": 10,
    "sequences": 320,
    "epochs": 0.25,
    "elapsed_seconds": 3600.0,
    "time_budget_seconds": 3600.0,
    "max_steps": None,
    "validation_loss": 2.0,
    "validation_accuracy": 0.625,
    "hardware": "4 x NVIDIA H200",
    "world_size": 4,
    "train_batch_size": 32,
    "micro_batch_size": 8,
    "manifest_sha256": "a" * 64,
    "closing_seconds": 90.0,
    "lost_seconds": 810.0,
    "skipped_steps": 0,
    "stopped_by": "time_budget",
    "stopped_because": None,
    "spent_seconds": SPENT,
}


def events(seconds: float = 3600.0, steps: int = 10, speed: float = 100.0) -> list[dict[str, Any]]:
    """A start, a line for each step, and a validation after every fifth."""
    result: list[dict[str, Any]] = [{"event": "start", "step": 0, "elapsed_seconds": 0.0}]
    for step in range(1, steps + 1):
        at = {"step": step, "elapsed_seconds": seconds * step / steps}
        measured = {"loss": 9.0 - step / 2, "sequences_per_second": speed + step, "flop_utilisation": 0.3 + step / 100}
        result.append({"event": "train", **at, **measured, "learning_rate": 1e-3, "epoch": step / 40})
        if step % 5 == 0:
            result.append({"event": "validation", **at, "loss": 9.1 - step / 2, "accuracy": step / 100})
    return result


def make_run(folder: Path, summary: dict[str, Any] | None = SUMMARY, **shape: Any) -> Path:
    """A run's folder; ``summary`` None is a run without an end, whose checkpoint is of half its way."""
    folder.mkdir(parents=True)
    lines = events(**shape)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in lines))
    config = {"time_budget": "1h", "max_steps": None, "train_batch_size": 32, "optimizer": {"learning_rate": 1e-3}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    checkpoint = folder / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    setting = {"manifest_sha256": "a" * 64, "architecture": ARCHITECTURE, "world_size": 4}
    (checkpoint / "state.json").write_text(json.dumps({"step": 5, "setting": setting}))
    (checkpoint / "pretraining.json").write_text(json.dumps({"hardware": "4 x NVIDIA H200", "steps": 5}))
    if summary is not None:
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def report(runs: list[Path], folder: Path, price: float | None = None) -> tuple[str, str]:
    write_report(runs, folder, price)
    return (folder / "report.md").read_text(), (folder / "report.html").read_text()


def cells(markdown: str, run: str, column: str) -> str:
    """The cell of a run under a column's title, in whichever table has it."""
    for table in re.findall(r"(?:^\|.*\n)+", markdown, flags=re.MULTILINE):
        header, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
        if column in header and header[0] == "run":
            return next(row[header.index(column)] for row in rows if row[0] == run)
    raise AssertionError(f"no column {column}")


EXPECTED_CELLS = {
    "validation loss": "2.0000",
    "perplexity": "7.39",  # e^2
    "accuracy": "62.5 %",
    "steps": "10",
    "sequences": "320",
    "epochs": "0.25",
    "time": "60.0 min",
    "stopped by": "time_budget",
    "model": "bert-tiny, pre-LN",
    "parameters": "0.5 M",
    "hardware": "4 x NVIDIA H200",
    "budget": "1h",
    "train batch": "32",
    "peak learning rate": "0.001",
    "sequences a second": "105.5",  # the median of 101, ..., 110
    "utilisation": "35.5 %",  # of 31 % ... 40 %
    "GPU-hours": "5.00",  # 4 x (3600 + 90 + 810) / 3600
    "cost": "12.50",
    "training": "50.0 min",
    "data wait": "36.0 s",
    "closing": "90.0 s",
    "lost": "13.5 min",
}


def test_the_tables_tell_what_the_folder_tells(tmp_path: Path) -> None:
    markdown, page = report([make_run(tmp_path / "run")], tmp_path / "report", price=2.5)
    assert {column: cells(markdown, "run", column) for column in EXPECTED_CELLS} == EXPECTED_CELLS
    for value in EXPECTED_CELLS.values():
        assert f"<td>{value}</td>" in page
    assert "can't be compared with these" in markdown
    assert "Warning" not in markdown


def test_the_page_holds_its_images_and_refers_to_nothing_outside(tmp_path: Path) -> None:
    _, page = report([make_run(tmp_path / "run")], tmp_path / "report")
    references = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", page)
    assert len(references) == 3
    assert all(reference.startswith("data:image/png;base64,") for reference in references)
    images = {path.name for path in (tmp_path / "report").glob("*.png")}
    assert images == {"losses.png", "throughput.png", "time.png"}


def test_without_a_price_there_are_hours_and_no_cost(tmp_path: Path) -> None:
    markdown, _ = report([make_run(tmp_path / "run")], tmp_path / "report")
    assert cells(markdown, "run", "GPU-hours") == "5.00"
    assert "cost |" not in markdown


def test_a_run_without_summary_is_told_from_its_record_and_newest_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", summary=None)
    lines = events()
    resumed = {"event": "start", "step": 5, "elapsed_seconds": 1800.0}
    again = {**lines[7], "skipped_steps": 1}  # step 6
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(event) + "\n" for event in (resumed, again))
    (run / "status.json").write_text(json.dumps({"phase": "training", "step": 6, "since": "2026-01-01T10:00:00"}))
    told = read_run(run, "run")
    assert (told.steps, told.sequences, told.epochs) == (6, (6 + 1) * 32, 6 / 40)
    assert (told.elapsed_seconds, told.lost_seconds) == (2160.0, 3600.0 - 1800.0)
    assert told.device_hours == pytest.approx(4 * (2160 + 1800) / 3600)
    markdown, _ = report([run], tmp_path / "report")
    assert "run has no summary" in markdown
    assert "training, since 2026-01-01T10:00:00" in markdown
    assert cells(markdown, "run", "validation loss") == "6.6000 (step 5)"
    assert cells(markdown, "run", "stopped by") == "no end yet"
    assert not (tmp_path / "report" / "time.png").exists()


def test_a_run_that_was_stopped_is_told_to_go_on(tmp_path: Path) -> None:
    stopped = {**SUMMARY, "stopped_by": "SIGTERM", "stopped_because": "told to stop.", "validation_loss": None}
    markdown, _ = report([make_run(tmp_path / "run", stopped)], tmp_path / "report")
    assert "run: told to stop." in markdown
    assert "(SIGTERM); the same command goes on with it" in markdown
    assert cells(markdown, "run", "validation loss") == "4.1000 (step 10)"


def test_a_run_before_its_first_validation_and_checkpoint(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", summary=None, steps=3)
    for file in (run / "checkpoints" / "step-00000005").iterdir():
        file.unlink()
    markdown, _ = report([run], tmp_path / "report", price=1.0)
    unknown = ("validation loss", "perplexity", "accuracy", "model", "parameters", "hardware", "GPU-hours", "cost")
    assert {cells(markdown, "run", column) for column in unknown} == {"-"}


def test_losses_of_different_held_out_text_are_warned_of(tmp_path: Path) -> None:
    other = make_run(tmp_path / "other", {**SUMMARY, "manifest_sha256": "b" * 64})
    runs = [make_run(tmp_path / "one"), make_run(tmp_path / "two"), other]
    assert "different held-out text" not in report(runs[:2], tmp_path / "same")[0]
    markdown, page = report(runs, tmp_path / "different")
    for text in (markdown, page):
        assert "different held-out text" in text
        assert "one, two (manifest aaaaaaaa); other (manifest bbbbbbbb)" in text


def test_runs_of_one_name_are_told_apart_and_a_folder_given_twice_is_read_once(tmp_path: Path) -> None:
    first, second = make_run(tmp_path / "a" / "run"), make_run(tmp_path / "b" / "run")
    assert [run.name for run in read_runs([first, second, first])] == ["a/run", "b/run"]


def test_published_losses_are_always_listed_and_drawn_only_where_the_time_axis_reaches_them(tmp_path: Path) -> None:
    short = make_run(tmp_path / "short")
    day = {**SUMMARY, "elapsed_seconds": 86399.0, "time_budget_seconds": 86400.0}
    long = make_run(tmp_path / "long", day, seconds=86399.0)
    for run, drawn in ((short, False), (long, True)):
        markdown, _ = report([run], tmp_path / "reports" / run.name)
        assert "| 24hBERT | 1.717 | 4,096 | 0.002 | 6 % | 1 d |" in markdown
        assert "not comparable" in markdown
        figure = losses_figure(read_runs([run]))
        texts = [text.get_text() for text in figure.axes[0].texts]
        assert ("published:" in texts) == drawn
        assert all((f"{row.loss:.3f} {row.name}" in texts) == drawn for row in PUBLISHED)


@pytest.mark.parametrize(
    ("seconds", "unit"), [(100.0, "seconds"), (3600.0, "minutes"), (7100.0, "minutes"), (7300.0, "hours")]
)
def test_the_time_axis_has_a_unit_that_fits(seconds: float, unit: str, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", {**SUMMARY, "elapsed_seconds": seconds}, seconds=seconds)
    figure = losses_figure(read_runs([run]))
    assert figure.axes[-1].get_xlabel() == f"wall-clock time ({unit})"
    in_seconds = {"seconds": 1, "minutes": 60, "hours": 3600}[unit]
    assert figure.axes[0].lines[0].get_xdata()[-1] * in_seconds == pytest.approx(seconds)


def test_every_run_has_a_line_of_its_own_look_under_its_own_name(tmp_path: Path) -> None:
    names = ["_hidden", "a$b$", *(f"run {number}" for number in range(14))]
    runs = read_runs([make_run(tmp_path / name) for name in names])
    for figure in (losses_figure(runs), throughput_figure(runs)):
        lines = [line for line in figure.axes[0].lines if len(line.get_xdata()) in (2, 10)][: len(runs)]
        looks = {(line.get_color(), line.get_linestyle()) for line in lines}
        assert len(looks) == len(runs)
        shown = [text.get_text().replace("\\", "").strip("\u200b") for text in figure.legends[0].get_texts()]
        assert [name for name in shown if "budget" not in name] == names


def test_the_bar_of_a_run_is_its_time(tmp_path: Path) -> None:
    bars = spent_figure(read_runs([make_run(tmp_path / "run")])).axes[0].patches
    shares = sorted(bar.get_width() for bar in bars if bar.get_width())
    assert shares == pytest.approx(sorted(100 * seconds / 3600 for seconds in SPENT.values() if seconds))
    assert math.isclose(sum(shares), 100)


def test_an_earlier_report_is_replaced_and_nothing_else(tmp_path: Path, capsys) -> None:
    run, folder = make_run(tmp_path / "run"), tmp_path / "report"
    assert report([run], folder) == report([run], folder)
    (folder / "results.json").write_text("{}")
    fails_with(capsys, [str(run), "--output_dir", str(folder)], "results.json", "another --output_dir")


def fails_with(capsys, arguments: list[str], *expected: str) -> None:
    """Run ``python -m pretrain report`` in this process; expect exit code 2 and one line with these words."""
    with pytest.raises(SystemExit) as exit_info:
        cli.run(lambda: commands.COMMANDS["report"](arguments))
    error = capsys.readouterr().err.strip()
    assert exit_info.value.code == 2
    assert error.startswith("error: ")
    assert "\n" not in error
    for words in expected:
        assert words in error


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("metrics.jsonl", None, "is not the folder of a pretraining run: it has no metrics.jsonl"),
        ("metrics.jsonl", "", "has no metrics yet"),
        ("metrics.jsonl", '{"event": "start", "step": 0, "elapsed_seconds": 0}\n[]\n7\n{"eve', "has no metrics yet"),
        ("metrics.jsonl", '{"event": "train", "step": 1, "elapsed_seconds": 1}\n', "metrics.jsonl is damaged"),
        ("config.yaml", None, "it has no config.yaml"),
        ("config.yaml", "a: [", "config.yaml is damaged"),
        ("config.yaml", "[]", "config.yaml is damaged"),
        ("summary.json", "{", "summary.json is damaged"),
        ("summary.json", "[]", "summary.json is damaged"),
        ("summary.json", '{"steps": "many"}', "summary.json is damaged"),
        ("checkpoints/step-00000005/state.json", "{}", "state.json is damaged"),
    ],
)
def test_a_damaged_run_is_one_line(file: str, content: str | None, words: str, tmp_path: Path, capsys) -> None:
    run = make_run(tmp_path / "run")
    (run / file).unlink() if content is None else (run / file).write_text(content)
    fails_with(capsys, [str(run), "--output_dir", str(tmp_path / "report")], str(run), words)
    assert not (tmp_path / "report").exists()


def test_what_is_no_run_no_price_and_no_output_folder_is_one_line(tmp_path: Path, capsys) -> None:
    run, output = str(make_run(tmp_path / "run")), ["--output_dir", str(tmp_path / "report")]
    fails_with(capsys, [str(tmp_path / "nowhere"), *output], "nowhere does not exist")
    fails_with(capsys, [f"{run}/config.yaml", *output], "is not a folder")
    fails_with(capsys, [run, "--output_dir", f"{run}/config.yaml"], "is a file: give another --output_dir")
    for price in ("-1", "inf", "nan", "much"):
        fails_with(capsys, [run, *output, f"--price_per_gpu_hour={price}"], "price_per_gpu_hour")
    assert not (tmp_path / "report").exists()


def test_reading_a_run_starts_neither_pytorch_nor_deepspeed(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    program = (
        "import sys; from pretrain import __main__ as commands\n"
        f"commands.COMMANDS['report']([{str(run)!r}, '--output_dir', {str(tmp_path / 'report')!r}])\n"
        "assert not {'torch', 'deepspeed', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
    assert (tmp_path / "report" / "report.html").exists()
