import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

import finetune.__main__ as finetune_commands
from common.cli import config_parser, parse, run, take_config
from common.folders import only_writer
from finetune.grid import GridConfig
from finetune.study import TrialStore
from run_glue_grid import main

REPOSITORY = Path(__file__).parents[2]
CONFIG = {
    "seeds": [1, 2],
    "max_seq_length": 32,
    "grids": [{"tasks": ["sst2", "stsb"], "learning_rate": [3e-3], "batch_size": [8], "num_epochs": [6]}],
    "random_baseline": True,
    "num_workers": 2,
}
NUM_TRIALS = 2 * 2 * 2


def write_config(folder: Path, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "grid.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def arguments(config: Path, model: Path, output_dir: Path, glue_dir: Path, *more: str) -> list[str]:
    folders = ["--model", str(model), "--output_dir", str(output_dir), "--glue_dir", str(glue_dir)]
    return ["--config", str(config), *folders, *more]


def outcome(output_dir: Path) -> dict:
    """What a grid found out, without how long it took."""
    results = json.loads((output_dir / "results.json").read_text())
    for trial in results["trials"]:
        del trial["seconds"], trial["rows_per_second"]
    return results


@pytest.fixture(scope="module")
def finished(model_folder: Path, glue_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The arguments of a grid that ran to its end."""
    folder = tmp_path_factory.mktemp("grid")
    argv = arguments(write_config(folder), model_folder, folder / "G", glue_dir)
    main(argv)
    return argv


def output_of(argv: list[str]) -> Path:
    return Path(argv[argv.index("--output_dir") + 1])


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_cell_is_run_once_and_reported(finished: list[str]):
    results = outcome(output_of(finished))
    keys = ("task_name", "learning_rate", "batch_size", "num_epochs", "initialization", "seed")
    cells = {tuple(trial[key] for key in keys) for trial in results["trials"]}
    assert len(cells) == len(results["trials"]) == NUM_TRIALS
    assert results["missing"] == results["failures"] == []
    assert results["tasks"].keys() == {"sst2", "stsb"}
    assert results["tasks"]["sst2"]["metric"] == "accuracy"
    assert "random_baseline" in results["tasks"]["stsb"]
    assert {path.name for path in output_of(finished).iterdir()} >= {"report.md", "report.html", "scores.png"}


def test_a_finished_grid_runs_nothing_again_with_any_number_of_workers(finished: list[str]):
    before = outcome(output_of(finished))
    started = time.monotonic()
    main([*finished, "--num_workers", "1", "--tasks", "stsb"])
    assert outcome(output_of(finished)) == before
    assert time.monotonic() - started < 5, "no worker should have been started"


def test_the_report_command_renders_the_same_results(finished: list[str], tmp_path: Path):
    copy = tmp_path / "G"
    shutil.copytree(output_of(finished), copy)
    expected = (copy / "results.json").read_bytes()
    for name in ("results.json", "report.md", "report.html"):
        (copy / name).unlink()
    finetune_commands.report([str(copy)])
    assert (copy / "results.json").read_bytes() == expected
    assert "SST-2 (accuracy)" in (copy / "report.md").read_text()


def test_another_model_is_refused_and_nothing_recorded_changes(
    finished: list[str], model_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    other = tmp_path / "hf"
    shutil.copytree(model_folder, other)
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "hidden_dropout_prob": 0.3}))
    how_run_last = ("config.yaml", "provenance.json")
    recorded = {name: data for name, data in content(output_of(finished)).items() if name not in how_run_last}
    argv = [str(other) if argument == str(model_folder) else argument for argument in finished]
    assert "another model configuration" in refusal(argv, capsys)
    assert {name: content(output_of(finished))[name] for name in recorded} == recorded


def test_two_runs_never_work_in_one_folder(finished: list[str], capsys: pytest.CaptureFixture[str]):
    with only_writer(output_of(finished)):
        assert f"process {os.getpid()} on" in refusal(finished, capsys)


def refusal(argv: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a command ends."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ending:
        run(lambda: main(argv))
    assert ending.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


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
    "no task folder": (_remove_task, {}, [], "STS-B/train.tsv does not exist"),
    "another task's columns": (_swap_tasks, {}, [], "no column 'sentence1'"),
    "label outside the task": (_wrong_label, {}, [], "label '2' is not one of SST-2's"),
    "unknown key": (_nothing, {"num_seeds": 3}, [], "num_seeds"),
    "unknown key in a grid": (_nothing, one_grid(epochs=[3]), [], "epochs"),
    "empty axis": (_nothing, one_grid(learning_rate=[]), [], "grids[0].learning_rate is empty"),
    "no seeds": (_nothing, {"seeds": []}, [], "seeds is empty"),
    "wrong type": (_nothing, one_grid(batch_size=["many"]), [], "many"),
    "unknown task": (_nothing, one_grid(tasks=["sst3"]), [], "no task 'sst3'"),
    "task twice": (_nothing, one_grid(tasks=["sst2", "sst2"]), [], "sst2 is in the grids more than once"),
    "task outside the grid": (_nothing, {}, ["--tasks", "rte"], "'rte', which is not in the grid"),
    "too long for the model": (_nothing, {"max_seq_length": 128}, [], "positions for 64 tokens"),
    "not available": (_nothing, {"mnli_init": True}, [], "mnli_init"),
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
    num_trials = sum(map(len, config.cells().values()))
    assert len(config.seeds) == 5
    if path.name == "paper.yaml":
        assert num_trials == 6 * 24 * 5 + 3 * 4 * 5


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def wait_until(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="reads /proc")
def test_a_killed_grid_continues_where_it_was_and_ends_in_the_same_table(
    finished: list[str], model_folder: Path, glue_dir: Path, tmp_path: Path
):
    output_dir = tmp_path / "G"
    argv = arguments(write_config(tmp_path), model_folder, output_dir, glue_dir)

    def kill_when_finished(num_finished: int) -> list[int]:
        """Start the grid, kill its coordinator when so many trials are recorded, and return its children."""
        command = [sys.executable, str(REPOSITORY / "run_glue_grid.py"), *argv]
        with (tmp_path / "log").open("a") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=REPOSITORY)
        wait_until(lambda: process.poll() is not None or num_done() >= num_finished, 90, "trials")
        assert process.poll() is None, "the grid ended before it could be killed"
        pids = children(process.pid)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        return pids

    def num_done() -> int:
        return store().num_trials(["sst2", "stsb"])[0] if (output_dir / "cache").exists() else 0

    def store() -> TrialStore:
        return TrialStore(f"sqlite:///{output_dir / 'trials.db'}", tmp_path / "claim.lock")

    orphans = kill_when_finished(3)
    assert orphans
    wait_until(lambda: not any(map(is_running, orphans)), 10, "the workers to end with their parent")
    recorded = {cell: result for name in ("sst2", "stsb") for cell, result in store().results(name).items()}
    assert 3 <= len(recorded) < NUM_TRIALS
    main(argv)
    assert outcome(output_dir) == outcome(output_of(finished))
    after = {cell: result for name in ("sst2", "stsb") for cell, result in store().results(name).items()}
    assert {cell: after[cell] for cell in recorded} == recorded, "with the seconds that each took: none ran again"
