"""Searches of real runs, from start to report."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from transformers import AutoModelForMaskedLM

from common.cli import config_parser, parse, take_config
from pretrain import coordinator
from pretrain.config import PretrainConfig
from pretrain.study import STUDY_NAME
from tests.pretrain.search_command import MADE, refused, run_command, write_config

REPOSITORY = Path(__file__).parents[2]
REAL = {
    **MADE,
    "pretrain": {
        **MADE["pretrain"],
        "model": {
            **MADE["pretrain"]["model"],
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
        "max_steps": 8,
        "log_interval": 1,
        "validation_interval": "50%",
        "checkpoint_interval": "50%",
    },
    "space": {"optimizer.learning_rate": [1e-9, 5e-3]},
    "rungs": [{"at": "50%", "keep": "top 50 %"}],
}


def search_for_real(config: Path, data_dir: Path, folder: Path, *more: object) -> subprocess.CompletedProcess:
    arguments = ["--config", config, "--data_dir", data_dir, "--output_dir", folder, *more]
    return subprocess.run(
        [sys.executable, "-m", "pretrain", "search", *map(str, arguments)],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=280,
    )


@pytest.fixture(scope="module")
def found(tmp_path_factory, data_dir) -> Path:
    """A search of two real runs, over."""
    folder = tmp_path_factory.mktemp("search")
    done = search_for_real(write_config(folder, **REAL), data_dir, folder / "S")
    assert done.returncode == 0, done.stdout[-3000:]
    return folder / "S"


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def test_the_winner_comes_back_from_its_checkpoint_and_its_loss_and_model_are_those_of_its_run(found: Path) -> None:
    results = json.loads((found / "results.json").read_text())
    dropped, winner = (found / "runs" / name / "run" for name in ("000", "001"))
    assert [event["step"] for event in events(dropped, "start")] == [0]
    assert [event["step"] for event in events(winner, "start")] == [0, 4]
    assert [event["step"] for event in events(winner, "train")] == list(range(1, 9)), "no step twice"
    assert results["best"]["final_loss"] == events(winner, "validation")[-1]["loss"]
    assert AutoModelForMaskedLM.from_pretrained(winner / "hf").config.hidden_size == 32
    assert not (dropped / "checkpoints").exists()


def test_the_winners_configuration_is_one_that_pretraining_takes(found: Path) -> None:
    parser = config_parser("run_pretraining.py", "", PretrainConfig)
    config = take_config(parse(parser, ["--config", str(found / "best.yaml")]), PretrainConfig)
    assert (config.optimizer.learning_rate, config.max_steps, config.pause_at) == (5e-3, 8, None)
    assert config.early_stop == []


def test_the_report_is_there_and_optuna_reads_the_study(found: Path) -> None:
    text = (found / "report.html").read_text()
    assert "run 001" in text
    assert {"values.png", "curves.png", "report.md"} <= {file.name for file in found.iterdir()}
    study = optuna.load_study(study_name=STUDY_NAME, storage=f"sqlite:///{found / 'trials.db'}")
    assert study.best_params == {"optimizer.learning_rate": 5e-3}
    assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]


def test_the_same_command_again_starts_nothing(found: Path, tmp_path, data_dir, monkeypatch) -> None:
    copy = shutil.copytree(found, tmp_path / "S")
    monkeypatch.setattr(coordinator, "Launch", None)
    config = found.parent / "search.yaml"
    assert run_command("search", "--config", config, "--data_dir", data_dir, "--output_dir", copy) == (0, "")
    assert run_command("status", copy) == (0, "")
    assert (copy / "best.yaml").read_bytes() == (found / "best.yaml").read_bytes()


def test_references_of_another_budget_are_refused(found: Path, tmp_path) -> None:
    copy = shutil.copytree(found, tmp_path / "S")
    reference = shutil.copytree(found / "runs" / "001" / "run", tmp_path / "longer")
    assert run_command("report", copy, "--references", reference)[0] == 0
    assert "longer" in (copy / "report.md").read_text()
    config = yaml.safe_load((reference / "config.yaml").read_text())
    (reference / "config.yaml").write_text(yaml.safe_dump({**config, "max_steps": 16}))
    before = (copy / "report.md").read_bytes()
    refused(run_command("report", copy, "--references", reference), "longer has another budget (16 steps")
    assert (copy / "report.md").read_bytes() == before


# --- longer ones ---


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_demo_takes_less_than_five_minutes_and_its_rungs_drop_and_resume_runs(tmp_path) -> None:
    data = tmp_path / "data"
    build = [sys.executable, "-m", "data_prep", "build", "--config", "configs/data/demo.yaml", "--output_dir", data]
    subprocess.run([*map(str, build)], cwd=REPOSITORY, check=True, capture_output=True)
    begun = time.monotonic()
    done = search_for_real(REPOSITORY / "configs" / "search" / "demo.yaml", data, tmp_path / "S")
    assert done.returncode == 0, done.stdout[-3000:]
    assert time.monotonic() - begun < 300
    results = json.loads((tmp_path / "S" / "results.json").read_text())
    assert len(results["runs"]) == 8
    assert all(rung["dropped"] >= 1 for rung in results["rungs"])
    resumed = [len(events(run, "start")) for run in sorted(tmp_path.glob("S/runs/*/run"))]
    assert resumed.count(2) >= len(results["finished"]) >= 1
    assert results["best"]["final_loss"] == min(run["final_loss"] for run in results["finished"])
    command = [sys.executable, "run_pretraining.py", "--config", tmp_path / "S" / "best.yaml", "--time_budget", "5s"]
    again = [*map(str, [*command, "--data_dir", data, "--output_dir", tmp_path / "again"])]
    subprocess.run(again, cwd=REPOSITORY, check=True, capture_output=True, timeout=120)
    assert json.loads((tmp_path / "again" / "summary.json").read_text())["stopped_by"] == "time_budget"


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "changes",
    [
        {"sampler": "tpe", "num_runs": 3, "rungs": []},
        {"sampler": "random", "num_runs": 4, "rungs": [], "hyperband": {"first": "25%", "reduction_factor": 2}},
    ],
    ids=["tpe", "random with Hyperband"],
)
def test_samplers_and_hyperband_by_config_alone(changes, tmp_path, data_dir) -> None:
    rates = {"low": 1e-6, "high": 1e-2, "log": True}
    pretrain = {**REAL["pretrain"], "max_steps": 40, "validation_interval": "12.5%"}
    config = {**REAL, "pretrain": pretrain, "space": {"optimizer.learning_rate": rates}, **changes}
    done = search_for_real(write_config(tmp_path, **config), data_dir, tmp_path / "S")
    assert done.returncode == 0, done.stdout[-3000:]
    results = json.loads((tmp_path / "S" / "results.json").read_text())
    assert len(results["runs"]) == changes["num_runs"]
    tried = [run["parameters"]["optimizer.learning_rate"] for run in results["runs"]]
    assert len(set(tried)) == len(tried)
    assert all(1e-6 <= rate <= 1e-2 for rate in tried)
    assert {run["state"] for run in results["runs"]} <= {"finished", *(["dropped"] if "hyperband" in changes else [])}
    for entry in results["finished"]:
        run = tmp_path / "S" / "runs" / entry["run"] / "run"
        assert entry["final_loss"] == events(run, "validation")[-1]["loss"]
    assert (tmp_path / "S" / "best.yaml").exists()
