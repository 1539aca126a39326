"""Raw text goes in at one end and a report comes out at the other, through the commands that a user types."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
SOURCES = [{"kind": "demo", "megabytes": 0.1}]
DATA = {"sources": SOURCES, "tokenizer": "train", "vocab_size": 1500, "max_seq_length": 32, "dupe_factor": 2}
PRETRAIN = {
    "model": {"preset": "bert-tiny", "hidden_size": 32},
    "time_budget": None,
    "max_steps": 10,
    "train_batch_size": 32,
    "micro_batch_size": "auto",
    "validation_interval": "50%",
    "early_validation_interval": None,
    "checkpoint_interval": "50%",
}
GLUE = {
    "seeds": [1, 2],
    "max_seq_length": 32,
    "random_baseline": True,
    "grids": [{"tasks": ["demo_sentiment"], "learning_rate": [1e-3], "batch_size": [32], "num_epochs": [1]}],
}


def run(*command: str | Path) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, command)], cwd=REPOSITORY, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    for name, config in (("data", DATA), ("pretrain", PRETRAIN), ("glue", GLUE)):
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run("-m", "data_prep", "build", "--config", folder / "data.yaml", "--output_dir", folder / "D")
    run("-m", "data_prep", "demo_benchmark", "--output_dir", folder / "T")
    run(
        "run_pretraining.py",
        "--config",
        folder / "pretrain.yaml",
        "--data_dir",
        folder / "D",
        "--output_dir",
        folder / "R",
    )
    arguments = ["--model", folder / "R" / "hf", "--glue_dir", folder / "T", "--output_dir", folder / "G"]
    run("run_glue_grid.py", "--config", folder / "glue.yaml", *arguments)
    return folder


def test_text_becomes_scores(folder) -> None:
    results = json.loads((folder / "G" / "results.json").read_text())
    task = results["tasks"]["demo_sentiment"]
    assert 0 <= task["median"] <= 1
    assert task["best"] == {"learning_rate": 1e-3, "batch_size": 32, "num_epochs": 1}
    assert len(results["trials"]) == 4  # 2 seeds, pretrained and from random weights


def test_synthetic_scores_are_never_called_glue(folder) -> None:
    report = (folder / "G" / "report.md").read_text()
    assert "ynthetic" in report
    assert "not GLUE" in report
    assert "GLUE" not in report.replace("not GLUE", "")


def test_the_report_tells_how_the_model_was_pretrained(folder) -> None:
    curves = json.loads((folder / "G" / "pretraining.json").read_text())
    assert curves["steps"] == curves["train"][-1]["step"] == 10
    assert curves["validation"][-1]["loss"] == pytest.approx(curves["validation_loss"])
    assert (folder / "G" / "pretraining.png").stat().st_size > 5000


def test_every_folder_explains_itself(folder) -> None:
    for name in "DRG":
        config = yaml.safe_load((folder / name / "config.yaml").read_text())
        (start,) = json.loads((folder / name / "provenance.json").read_text())
        assert config["seed" if name != "G" else "seeds"] is not None
        assert start["versions"]["torch"]
        assert start["command"][0] in ("__main__.py", "run_pretraining.py", "run_glue_grid.py")


def test_an_automatic_micro_batch_divides_the_batch(folder) -> None:
    summary = json.loads((folder / "R" / "summary.json").read_text())
    assert 32 % summary["micro_batch_size"] == 0
    assert summary["stopped_by"] == "max_steps"
