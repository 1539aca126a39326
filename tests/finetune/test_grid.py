import json
import os
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import pipeline

import finetune.__main__ as finetune_commands
from common.cli import config_parser, parse, run, take_config
from common.folders import only_writer
from finetune.config import GridConfig
from finetune.kept_models import trial_folder
from finetune.results import cell_of
from finetune.trial_files import TrialFiles
from run_glue_grid import main
from tests.finetune.grids import CONFIG, NUM_TRIALS, arguments, elsewhere, outcome, output_of, write_config

REPOSITORY = Path(__file__).parents[2]


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_cell_is_run_once_and_reported(finished_grid: list[str]):
    results = outcome(output_of(finished_grid))
    keys = ("task_name", "learning_rate", "batch_size", "num_epochs", "initialization", "seed")
    cells = {tuple(trial[key] for key in keys) for trial in results["trials"]}
    assert len(cells) == len(results["trials"]) == NUM_TRIALS
    assert results["missing"] == results["failures"] == []
    assert results["tasks"].keys() == {"sst2", "stsb"}
    assert results["tasks"]["sst2"]["metric"] == "accuracy"
    assert "random_baseline" in results["tasks"]["stsb"]
    assert {path.name for path in output_of(finished_grid).iterdir()} >= {"report.md", "report.html", "scores.png"}


def test_the_models_of_the_best_configuration_score_what_the_table_says(finished_grid: list[str], glue_dir: Path):
    output_dir = output_of(finished_grid)
    summary = outcome(output_dir)["tasks"]["sst2"]
    folders = sorted((output_dir / "models" / "sst2").glob("*/*"))
    assert [folder.name for folder in folders] == ["seed-1", "seed-2"], (
        "of one configuration, and not of random weights"
    )
    assert f"lr{summary['best']['learning_rate']}-" in folders[0].parent.name
    rows = [line.split("\t") for line in (glue_dir / "SST-2" / "dev.tsv").read_text().splitlines()[1:]]
    for folder, score in zip(folders, summary["scores"], strict=True):
        classify = pipeline("text-classification", model=str(folder), tokenizer=str(folder))
        right = [classify(text)[0]["label"] == {"0": "negative", "1": "positive"}[label] for text, label in rows]
        assert sum(right) / len(right) == pytest.approx(score)


def test_a_finished_grid_runs_nothing_again_with_any_number_of_workers(finished_grid: list[str]):
    results = output_of(finished_grid) / "results.json"
    before = json.loads(results.read_text())
    finished = next(cell_of(trial) for trial in before["trials"] if trial["task_name"] == "stsb")
    TrialFiles(trial_folder(results.parent, finished), 1, None).save({"left": "by a kill after the result"})
    main([*finished_grid, "--num_workers", "1", "--tasks", "stsb"])
    assert json.loads(results.read_text()) == before, "who ran each trial, and when, too"
    assert not list(results.parent.rglob("checkpoint.pt"))


def test_the_report_command_renders_the_same_results(finished_grid: list[str], tmp_path: Path):
    copy = tmp_path / "G"
    shutil.copytree(output_of(finished_grid), copy)
    expected = (copy / "results.json").read_bytes()
    for name in ("results.json", "report.md", "report.html"):
        (copy / name).unlink()
    finetune_commands.report([str(copy)])
    assert (copy / "results.json").read_bytes() == expected
    assert "SST-2 (accuracy)" in (copy / "report.md").read_text()


def test_status_tells_what_is_done_and_the_best_so_far(finished_grid: list[str], capsys: pytest.CaptureFixture[str]):
    capsys.readouterr()
    finetune_commands.status([str(output_of(finished_grid))])
    line, table = capsys.readouterr().out.split("\n\n")
    best = outcome(output_of(finished_grid))["tasks"]["sst2"]["median"]
    assert line.startswith(f"{NUM_TRIALS} of {NUM_TRIALS} trials done, 0 running, 0 s left; best medians so far: ")
    assert f"SST-2 {100 * best:.1f}" in line
    assert f"| SST-2 | {NUM_TRIALS // 2} | {NUM_TRIALS // 2} | 0 | 0 | {100 * best:.1f} |" in table


def test_another_model_is_refused_for_any_task(
    finished_grid: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """Not only for the tasks that have been run with this one: a table has one model."""
    output_dir, other = tmp_path / "G", tmp_path / "hf"
    shutil.copytree(output_of(finished_grid), output_dir)
    shutil.copytree(model_folder, other)
    (other / "tokenizer_config.json").write_text(
        (other / "tokenizer_config.json").read_text().replace("{", '{"added": 1,', 1)
    )
    with sqlite3.connect(output_dir / "trials.db") as database:
        database.execute("delete from studies where study_name = 'stsb'")
    argv = elsewhere(finished_grid, output_dir)
    argv = [str(other) if argument == str(model_folder) else argument for argument in argv]
    assert "sst2 were run with another tokenizer configuration" in refusal([*argv, "--tasks", "stsb"], capsys)


def test_another_model_is_refused_and_nothing_recorded_changes(
    finished_grid: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "hf"
    shutil.copytree(model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.3}))
    recorded = content(output_of(finished_grid))
    argv = [str(other) if argument == str(model_folder) else argument for argument in finished_grid]
    assert "another model configuration" in refusal(argv, capsys)
    assert content(output_of(finished_grid)) == recorded


def test_two_runs_never_work_in_one_folder(finished_grid: list[str], capsys: pytest.CaptureFixture[str]):
    with only_writer(output_of(finished_grid)):
        assert f"process {os.getpid()} on" in refusal(finished_grid, capsys)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        run(lambda: main(argv))
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


OWN_TASK = {
    "task_name": "reviews",
    "train": "train.csv",
    "dev": "dev.csv",
    "sentence_columns": ["text"],
    "label_column": "stars",
    "metrics": ["accuracy"],
    "labels": [1, 2],
}


def _remove_weights(model: Path, glue: Path) -> None:
    (model / "model.safetensors").unlink()


def _damage_weights(model: Path, glue: Path) -> None:
    (model / "model.safetensors").write_bytes(b"not weights")


def _remove_tokenizer(model: Path, glue: Path) -> None:
    (model / "tokenizer.json").unlink()


def _remove_model_config(model: Path, glue: Path) -> None:
    (model / "config.json").unlink()


def _remove_task(model: Path, glue: Path) -> None:
    shutil.rmtree(glue / "STS-B")


def _swap_tasks(model: Path, glue: Path) -> None:
    shutil.copy(glue / "SST-2" / "dev.tsv", glue / "STS-B" / "dev.tsv")


def _wrong_label(model: Path, glue: Path) -> None:
    with (glue / "SST-2" / "train.tsv").open("a") as file:
        file.write("it was fine\t2\n")


def _nothing(model: Path, glue: Path) -> None:
    pass


def one_grid(**changes) -> dict:
    return {"grids": [{**CONFIG["grids"][0], **changes}]}


WRONG_INPUTS: dict[str, tuple[Callable[[Path, Path], None], dict, list[str], str]] = {
    "no weights": (_remove_weights, {}, [], "no weights"),
    "damaged weights": (_damage_weights, {}, [], "does not load"),
    "no tokenizer": (_remove_tokenizer, {}, [], "no tokenizer"),
    "no model configuration": (_remove_model_config, {}, [], "no config.json"),
    "no such model": (_nothing, {}, ["--model", "/nowhere/hf"], "neither a folder"),
    "no task folder": (_remove_task, {}, [], "STS-B/dev.tsv do not exist"),
    "another task's columns": (_swap_tasks, {}, [], "no column 'sentence1'"),
    "label outside the task": (_wrong_label, {}, [], "label '2' is not one of SST-2's"),
    "unknown key": (_nothing, {"num_seeds": 3}, [], "num_seeds"),
    "unknown key in a grid": (_nothing, one_grid(epochs=[3]), [], "epochs"),
    "empty axis": (_nothing, one_grid(learning_rate=[]), [], "grids[0].learning_rate is empty"),
    "no seeds": (_nothing, {"seeds": []}, [], "seeds is empty"),
    "wrong type": (_nothing, one_grid(batch_size=["many"]), [], "many"),
    "unknown task": (_nothing, one_grid(tasks=["sst3"]), [], "no task 'sst3'"),
    "unknown optimizer": (_nothing, one_grid(optimizer={"name": "sgd"}), [], "sgd"),
    "another optimizer's argument": (
        _nothing,
        one_grid(optimizer={"name": "adamw", "num_grads": 64}),
        [],
        "adamw has no argument num_grads",
    ),
    "no memory for so many gradients": (
        _nothing,
        one_grid(optimizer={"name": "mfac", "num_grads": 1_000_000}),
        [],
        "would fit",
    ),
    "precision twice": (_nothing, {"precision": ["bf16", "bf16"]}, [], "precision has a value twice"),
    "no steps": (_nothing, {"eval_steps": 0}, [], "eval_steps is 0"),
    "task twice": (_nothing, one_grid(tasks=["sst2", "sst2"]), [], "sst2 is in the grids more than once"),
    "task outside the grid": (_nothing, {}, ["--tasks", "rte"], "'rte', which is not in the grid"),
    "too long for the model": (_nothing, {"max_seq_length": 128}, [], "positions for 64 tokens"),
    "mnli_init without mnli": (_nothing, {"mnli_init": True}, [], "mnli is in no grid"),
    "mnli_init without models": (
        _nothing,
        {"mnli_init": "both", "keep_models": False, **one_grid(tasks=["mnli", "rte"])},
        [],
        "keep_models: false throws away",
    ),
    "rows of no task": (_nothing, {"max_train_rows": {"rte": 5}}, [], "max_train_rows has 'rte: 5'"),
    "fp16 without a GPU": (_nothing, {"precision": "fp16"}, [], "fp16 needs a GPU"),
    "two own tasks of one name": (
        _nothing,
        {"own_tasks": [OWN_TASK, OWN_TASK]},
        [],
        "more than one task 'reviews'",
    ),
}


@pytest.mark.parametrize("case", WRONG_INPUTS)
def test_wrong_input_ends_in_one_line_before_any_work(
    case: str, model_folder: Path, glue_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    spoil, changes, more, expected = WRONG_INPUTS[case]
    model, glue = tmp_path / "hf", tmp_path / "glue"
    shutil.copytree(model_folder, model)
    shutil.copytree(glue_dir, glue)
    spoil(model, glue)
    argv = arguments(write_config(tmp_path, **changes), model, tmp_path / "G", glue, *more)
    assert expected in refusal(argv, capsys)
    assert not (tmp_path / "G").exists()


def test_a_folder_with_something_else_in_it_is_left_alone(
    model_folder: Path, glue_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "G").mkdir()
    (tmp_path / "G" / "thesis.txt").write_text("mine")
    assert "not ours" in refusal(arguments(write_config(tmp_path), model_folder, tmp_path / "G", glue_dir), capsys)
    assert content(tmp_path / "G") == {"thesis.txt": b"mine"}


@pytest.mark.parametrize("path", sorted((REPOSITORY / "configs" / "glue").glob("*.yaml")), ids=lambda path: path.name)
def test_the_configurations_in_the_repository_are_valid(path: Path):
    parser = config_parser("test", "", GridConfig)
    config = take_config(parse(parser, ["--config", str(path)]), GridConfig)
    num_trials = sum(map(len, config.cells(["fp32"]).values()))
    assert len(config.seeds) == 5
    if path.name == "paper.yaml":
        assert num_trials == 6 * 24 * 5 + 3 * 4 * 5
