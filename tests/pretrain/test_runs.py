"""Runs of real processes: any launcher, any number of ranks, killed and resumed, always the same model and budget."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, pipeline

from pretrain.run_record import read_metrics

REPOSITORY = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
CONFIG = """\
model: {preset: bert-tiny, hidden_size: 32, hidden_dropout_prob: 0.0, attention_probs_dropout_prob: 0.0}
time_budget: null
max_steps: 24
train_batch_size: 24
micro_batch_size: 4
optimizer: {learning_rate: 5.0e-3}
warmup_proportion: 0.1
validation_interval: 50%
early_validation_interval: null
checkpoint_interval: 25%
log_interval: 1
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.yaml"
    path.write_text(CONFIG, encoding="utf-8")
    return path


def command(launcher: list[str], config: Path, data_dir: Path, run: Path, *overrides: str) -> list[str]:
    arguments = ["--config", config, "--data_dir", data_dir, "--output_dir", run, *overrides]
    return [*launcher, "run_pretraining.py", *map(str, arguments)]


def deepspeed(port: int) -> list[str]:
    return [str(BIN / "deepspeed"), "--num_gpus", "2", "--master_port", str(port)]


def torchrun(port: int) -> list[str]:
    return [str(BIN / "torchrun"), "--nproc_per_node", "2", "--master_port", str(port)]


def finish(arguments: list[str], code: int = 0) -> None:
    done = subprocess.run(arguments, cwd=REPOSITORY, capture_output=True, text=True, timeout=200)
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-3000:]


def kill_at_first_checkpoint(arguments: list[str], run: Path) -> None:
    """Start a run and send SIGKILL to all its processes once it has a checkpoint to go on from."""
    process = subprocess.Popen(
        arguments, cwd=REPOSITORY, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "latest").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    # The launcher puts each rank into a session of its own: the run's folder is in every command line.
    subprocess.run(["pkill", "-9", "-f", f"output_dir {run}"], check=False)
    process.wait()
    assert (run / "checkpoints" / "latest").exists()
    assert not (run / "summary.json").exists(), "the run was over before it could be killed"


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "hf" / "model.safetensors")


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


@pytest.fixture(scope="module")
def uninterrupted(config, data_dir, tmp_path_factory) -> Path:
    """Two ranks under the deepspeed launcher."""
    run = tmp_path_factory.mktemp("runs") / "uninterrupted"
    finish(command(deepspeed(29_871), config, data_dir, run))
    return run


def test_one_process_and_two_train_the_same_model(uninterrupted, config, data_dir, tmp_path) -> None:
    run = tmp_path / "alone"
    finish(command([sys.executable], config, data_dir, run))
    alone, together = weights(run), weights(uninterrupted)
    assert alone.keys() == together.keys()
    for name in alone:
        torch.testing.assert_close(alone[name], together[name], rtol=0, atol=2e-4, msg=name)
    assert summary(run)["validation_loss"] == pytest.approx(summary(uninterrupted)["validation_loss"], abs=1e-4)


def test_a_run_that_was_killed_and_then_paused_ends_with_exactly_the_uninterrupted_weights(
    config, uninterrupted, data_dir, tmp_path, free_port
) -> None:
    run = tmp_path / "killed"
    arguments = command(torchrun(free_port), config, data_dir, run)
    kill_at_first_checkpoint(arguments, run)
    finish([*arguments, "--pause_at", "70%"], code=1)  # torchrun's, whatever the processes' own
    paused = summary(run)
    assert (paused["stopped_by"], paused["stopped_because"], paused["steps"]) == ("pause", "pause_at 70%", 17)
    finish(arguments)
    starts = [event["step"] for event in read_metrics(run) if event["event"] == "start"]
    assert starts[-1] == 17
    assert 0 < starts[-2] < 17
    judged = {event["step"]: event["loss"] for event in read_metrics(run) if event["event"] == "validation"}
    assert judged[17] == paused["validation_loss"]
    expected = weights(uninterrupted)
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, expected[name]), name
    steps = [event["step"] for event in read_metrics(run) if event["event"] == "train"]
    assert steps == list(range(1, 25))


@pytest.mark.slow
def test_a_killed_run_goes_on_with_another_number_of_processes(
    config, uninterrupted, data_dir, tmp_path, free_port
) -> None:
    run = tmp_path / "fewer"
    kill_at_first_checkpoint(command(torchrun(free_port), config, data_dir, run), run)
    finish(command([sys.executable], config, data_dir, run))
    expected = weights(uninterrupted)
    for name, tensor in weights(run).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=2e-4, msg=name)


@pytest.fixture(scope="module")
def budgeted(config, data_dir, tmp_path_factory) -> Path:
    """A run of 10 seconds on two ranks, killed once on the way."""
    run = tmp_path_factory.mktemp("runs") / "budgeted"
    overrides = ["--time_budget", "10s", "--max_steps", "null", "--checkpoint_interval", "10%"]
    arguments = command(deepspeed(29_872), config, data_dir, run, *overrides)
    kill_at_first_checkpoint(arguments, run)
    finish(arguments)
    return run


def test_a_killed_run_keeps_its_budget_within_a_step(budgeted) -> None:
    events = [event for event in read_metrics(budgeted) if event["event"] == "train"]
    steps = [later["elapsed_seconds"] - sooner["elapsed_seconds"] for sooner, later in pairwise(events)]
    elapsed = summary(budgeted)["elapsed_seconds"]
    assert elapsed <= 10.0 + max(steps)
    assert elapsed >= 10.0 - 3 * max(steps)
    resume = [event for event in read_metrics(budgeted) if event["event"] == "start"][-1]
    assert resume["step"] > 0
    assert summary(budgeted)["steps"] == events[-1]["step"] > resume["step"]


def test_the_learning_rate_follows_the_clock_to_zero(budgeted) -> None:
    events = [event for event in read_metrics(budgeted) if event["event"] == "train"]
    for event in events:
        progress = event["progress"]
        expected = 5e-3 * (progress / 0.1 if progress < 0.1 else (1 - progress) / 0.9)
        assert event["learning_rate"] == pytest.approx(expected, rel=1e-6)
    assert events[-1]["progress"] > 0.8
    assert events[-1]["learning_rate"] == min(event["learning_rate"] for event in events if event["progress"] > 0.1)


def test_the_export_loads_in_transformers_and_fills_masks(budgeted) -> None:
    folder = budgeted / "hf"
    model, report = AutoModelForMaskedLM.from_pretrained(folder, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(model).__name__ == "MegatronBertForMaskedLM"
    classifier = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(classifier.bert.embeddings.word_embeddings.weight, model.bert.embeddings.word_embeddings.weight)
    filled = pipeline("fill-mask", model=model, tokenizer=AutoTokenizer.from_pretrained(folder))(
        "The old sailor saw a heron by the [MASK]."
    )
    assert len(filled) == 5
    assert {path.suffix for path in folder.iterdir()} <= {".json", ".safetensors", ".txt", ".md"}, "no pickled file"


def test_a_finished_run_is_left_alone(budgeted, config, data_dir) -> None:
    before = {path: path.stat().st_mtime_ns for path in budgeted.rglob("*") if path.is_file()}
    overrides = ["--time_budget", "10s", "--max_steps", "null", "--checkpoint_interval", "10%"]
    finish(command([sys.executable], config, data_dir, budgeted, *overrides))
    assert {path: path.stat().st_mtime_ns for path in budgeted.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_a_run_that_does_not_do_well_ends_early_with_all_that_it_has_come_to(config, data_dir, tmp_path) -> None:
    run = tmp_path / "hopeless"
    rule = "[{after: 50%, metric: train_loss, bound: 0.1}]"
    options = ["--early_stop", rule, "--export_at", "[0.25, 0.9]", "--max_steps", "8", "--checkpoint_interval", "100%"]
    finish(command(deepspeed(29_873), config, data_dir, run, *options))
    ended = summary(run)
    assert (ended["stopped_by"], ended["steps"]) == ("early_stop", 4)
    assert "train_loss has come down to" in ended["stopped_because"]
    assert sum(ended["spent_seconds"].values()) == pytest.approx(ended["elapsed_seconds"], abs=0.05)
    assert [path.name for path in (run / "exports").iterdir()] == ["25-percent"]
    early = AutoModelForMaskedLM.from_pretrained(run / "exports" / "25-percent")
    assert not torch.equal(early.bert.encoder.ln.weight, weights(run)["bert.encoder.ln.weight"])
    assert json.loads((run / "exports" / "25-percent" / "pretraining.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_a_sharded_checkpoint_resumes_on_as_many_processes_only(config, data_dir, tmp_path, free_port) -> None:
    run = tmp_path / "zero1"
    overrides = ["--ds_config", "ds_configs/bf16_zero1.json", "--max_steps", "4"]
    finish(command(torchrun(free_port), config, data_dir, run, *overrides))
    trained = weights(run)
    (run / "summary.json").unlink()
    refused = subprocess.run(
        command([sys.executable], config, data_dir, run, *overrides), cwd=REPOSITORY, capture_output=True, text=True
    )
    assert refused.returncode == 2
    assert "start 2 processes, not 1" in refused.stderr.splitlines()[-1]
    finish(command(torchrun(free_port), config, data_dir, run, *overrides))
    for name, tensor in weights(run).items():
        assert torch.equal(tensor, trained[name]), name
