"""What goes wrong while training ends in one line that helps, and never costs a good checkpoint."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch

from common.errors import UserError
from data_prep.shards import read_manifest
from pretrain.architecture import ModelConfig, resolve
from pretrain.batch_plan import BatchPlan
from pretrain.batches import TrainingBatches, shape_of_micro_batches
from pretrain.config import PretrainConfig
from pretrain.ds_config import load_ds_config
from pretrain.early_stop import StopRule
from pretrain.engine import PretrainEngine
from pretrain.micro_batch import MicroBatchTrials
from pretrain.model import MaskedLanguageModel
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.processes import Processes, start_processes, stop_processes
from pretrain.run_record import read_metrics
from pretrain.train import pretrain
from pretrain.validation import Validation

TINY = ModelConfig(preset="bert-tiny", hidden_size=32, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def config(**changes) -> PretrainConfig:
    settings = {
        "model": TINY,
        "time_budget": None,
        "max_steps": 40,
        "train_batch_size": 24,
        "micro_batch_size": 12,
        "validation_interval": "100%",
        "early_validation_interval": None,
        "checkpoint_interval": "5%",
        "optimizer": OptimizerConfig(learning_rate=1e-3),
    }
    return PretrainConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def processes() -> Iterator[Processes]:
    """One for all tests: DeepSpeed starts once in a process. It describes itself in the environment, which others must
    not inherit."""
    with mock.patch.dict(os.environ):
        processes = start_processes()
        yield processes
        stop_processes()


@pytest.fixture(autouse=True)
def started(processes, monkeypatch) -> None:
    monkeypatch.setattr("pretrain.train.start_processes", lambda _: processes)
    monkeypatch.setattr("pretrain.train.stop_processes", lambda: None)


@pytest.mark.parametrize("log_interval", [1, 10])
def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(log_interval, data_dir, tmp_path) -> None:
    diverging = config(optimizer=OptimizerConfig(learning_rate=1e30), log_interval=log_interval, warmup_proportion=0.0)
    with pytest.raises(
        UserError, match=r"(the loss is (nan|inf) at|weights are not finite after) step \d+: training div"
    ):
        pretrain(diverging, data_dir, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["stopped_by"] == "diverged"
    assert "training diverged" in summary["stopped_because"]


def test_a_full_disk_is_told_in_one_line(data_dir, tmp_path, monkeypatch) -> None:
    def no_space(*_):
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 1088 vs 982")

    monkeypatch.setattr(PretrainEngine, "save", no_space)
    with pytest.raises(UserError, match=r"can't write to .*run"):
        pretrain(config(), data_dir, tmp_path / "run")


def test_shards_with_other_tokens_than_the_manifest_tells_are_refused(data_dir, tmp_path) -> None:
    data = shutil.copytree(data_dir, tmp_path / "data")
    content = json.loads((data / "manifest.json").read_text())
    (data / "manifest.json").write_text(json.dumps({**content, "vocab_size": 400}))
    with pytest.raises(UserError, match=r"shards hold token \d+, the manifest's vocabulary has 400"):
        pretrain(config(), data, tmp_path / "run")


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(data_dir, tmp_path, monkeypatch) -> None:
    run, real, calls = tmp_path / "run", PretrainEngine.train_step, []

    def spoil_the_weights_after_step_ten(engine, *arguments):
        result = real(engine, *arguments)
        calls.append(result)
        if len(calls) == 10:
            with torch.no_grad():
                engine.model.head.bias[0] = torch.nan
        return result

    monkeypatch.setattr(PretrainEngine, "train_step", spoil_the_weights_after_step_ten)
    with pytest.raises(UserError, match=r"step 1\d.*last good checkpoint is .*step-0000000[0-9]"):
        pretrain(config(log_interval=1), data_dir, run)
    checkpoint = run / "checkpoints" / (run / "checkpoints" / "latest").read_text().strip()
    weights = torch.load(checkpoint / "mp_rank_00_model_states.pt", weights_only=True)["module"]
    assert all(tensor.isfinite().all() for tensor in weights.values())


@pytest.mark.slow
def test_gradients_that_overflow_at_every_loss_scale_stop_the_run(data_dir, tmp_path) -> None:
    hopeless = config(
        model=ModelConfig(preset="bert-tiny", hidden_size=32, initializer_range=1e4), ds_config="ds_configs/fp16.json"
    )
    with pytest.raises(UserError, match="overflow in fp16 even at the smallest loss scale: training diverged"):
        pretrain(hopeless, data_dir, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["stopped_by"] == "diverged"


def test_another_runs_checkpoint_goes_on_in_a_folder_of_its_own_and_without_its_end(data_dir, tmp_path) -> None:
    rule = [StopRule("20%", "train_loss", 0.1)]
    stopped = config(max_steps=10, early_stop=rule, log_interval=1, validation_interval="10%")
    assert pretrain(stopped, data_dir, tmp_path / "stopped") == "early_stop"
    settings = {"resume": str(tmp_path / "stopped"), "export_at": [0.05, 0.5]}
    assert pretrain(config(max_steps=10, **settings), data_dir, tmp_path / "further") == "max_steps"
    starts = [event["step"] for event in read_metrics(tmp_path / "further") if event["event"] == "start"]
    assert starts == [2]
    assert [path.name for path in (tmp_path / "further" / "exports").iterdir()] == ["50-percent"]
    (tmp_path / "further" / "summary.json").unlink()
    with pytest.raises(UserError, match="resume is 'never'"):
        pretrain(config(max_steps=10, **{**settings, "resume": "never"}), data_dir, tmp_path / "further")


def test_a_disk_that_is_full_for_the_record_is_told_in_one_line(data_dir, tmp_path, monkeypatch) -> None:
    def no_space(*_, **__) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", no_space)
    with pytest.raises(UserError, match=r"can't write to .*run \(No space left on device\)"):
        pretrain(config(log_interval=1), data_dir, tmp_path / "run")


@pytest.mark.parametrize(
    ("batch", "size", "fitting", "words"),
    [
        (64, 32, 8, "8 fits"),
        (64, 32, 3, "2 fits"),
        (40, 20, 12, "8 fits"),
        (125, 25, 24, "5 fits"),
        (64, 32, 0, "nothing smaller fits"),
    ],
)
def test_out_of_memory_says_what_would_fit(batch, size, fitting, words, data_dir, tmp_path, monkeypatch) -> None:
    def run_out(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(PretrainEngine, "train_step", run_out)
    monkeypatch.setattr(MicroBatchTrials, "seconds_of_a_pass", lambda _, size: 1.0 if size <= fitting else None)
    with pytest.raises(UserError, match=f"out of memory with micro_batch_size {size}: {words}"):
        pretrain(config(train_batch_size=batch, micro_batch_size=size), data_dir, tmp_path / "run")


@pytest.mark.parametrize(("batch", "fitting", "expected"), [(40, 4, 4), (24, 1, 1), (125, 24, 5), (64, 100, 64)])
def test_the_search_finds_what_fits_whatever_divides_the_batch(batch, fitting, expected, data_dir, monkeypatch) -> None:
    manifest = read_manifest(data_dir)
    model = MaskedLanguageModel(resolve(TINY, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id))
    trials = MicroBatchTrials(model, manifest, batch, world_size=1, autocast_dtype=None)
    monkeypatch.setattr(trials, "seconds_of_a_pass", lambda size: 1.0 if size <= fitting else None)
    assert max(trials.speeds(seconds_allowed=1e9)) == expected


def test_a_step_that_overflows_is_skipped_and_the_loss_scale_survives_a_resume(data_dir, tmp_path, processes) -> None:
    manifest = read_manifest(data_dir)
    plan = BatchPlan(24, 12, 1)
    shape = shape_of_micro_batches(manifest, plan)
    batches = TrainingBatches(manifest, plan, shape, 0, torch.device("cpu"), 42, 0)
    batch = batches.next_batch()
    batches.close()
    engines = []
    for _ in range(2):
        torch.manual_seed(0)
        model = MaskedLanguageModel(resolve(TINY, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id))
        optimizer = build_optimizer(model, OptimizerConfig())
        ds_config = load_ds_config("ds_configs/fp16.json")
        engines.append(PretrainEngine(model, optimizer, ds_config, plan, 1.0, processes))
    engine, resumed = engines
    engine._loss_scaler.load_state_dict({**engine._loss_scaler.state_dict(), "scale": 2.0**40})
    before = [parameter.clone() for parameter in engine.model.parameters()]
    outcomes = []
    while len(outcomes) < 60 and not (outcomes and outcomes[-1]):
        result = engine.train_step(batch.micro_batches, batch.workload.predictions, 1.0, 0)
        outcomes.append(result.applied)
        unchanged = all(map(torch.equal, engine.model.parameters(), before))
        assert unchanged != result.applied
    assert outcomes[-1]
    assert len(outcomes) > 5
    engine.save(tmp_path, "overflowed")
    resumed.load(tmp_path, "overflowed")
    assert resumed._loss_scaler.get_scale() == engine._loss_scaler.get_scale() < 2.0**40


@pytest.mark.parametrize(("micro_batch_size", "expected"), [("auto", [8, 16, 32]), (32, None)])
def test_the_micro_batch_search_tells_what_it_tried_and_is_made_once(
    micro_batch_size, expected, data_dir, tmp_path, monkeypatch, capsys
) -> None:
    tried = []
    monkeypatch.setattr(
        MicroBatchTrials,
        "seconds_of_a_pass",
        lambda _, size: tried.append(size) or (size / {8: 1, 16: 2}.get(size, 1.5)),
    )
    run, settings = tmp_path / "run", config(train_batch_size=64, micro_batch_size=micro_batch_size, max_steps=2)
    pretrain(settings, data_dir, run)
    printed = capsys.readouterr().out
    if expected is None:
        assert tried == []
        return
    assert tried == expected
    assert "micro_batch_size 16, found in" in printed
    assert "8: 1.0, 16: 2.0, 32: 1.5" in printed
    tried.clear()
    (run / "summary.json").unlink()
    pretrain(settings, data_dir, run)
    assert tried == [], "kept for resumes"


def test_real_passes_time_every_size_and_leave_no_gradient(data_dir) -> None:
    manifest = read_manifest(Path(data_dir))
    model = MaskedLanguageModel(resolve(TINY, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id))
    trials = MicroBatchTrials(model, manifest, train_batch_size=64, world_size=2, autocast_dtype=None)
    speeds = trials.speeds(seconds_allowed=60.0)
    assert trials.sizes() == [1, 2, 4, 8, 16, 32]
    assert list(speeds) == [8, 16, 32][: len(speeds)]
    assert all(speed > 0 for speed in speeds.values())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_validation_that_an_interruption_cut_short_is_made_up_for_before_training_goes_on(
    data_dir, tmp_path, monkeypatch
) -> None:
    rule = StopRule("25%", "validation_loss", 1.0)
    judged = config(validation_interval="25%", checkpoint_interval="100%", early_stop=[rule])
    validate = Validation.run

    def interrupted(*arguments):
        os.kill(os.getpid(), signal.SIGUSR1)
        return validate(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Validation, "run", interrupted)
        for _ in range(2):  # the second time in making up for the first
            assert pretrain(judged, data_dir, tmp_path / "run") == "SIGUSR1"
    assert pretrain(judged, data_dir, tmp_path / "run") == "early_stop"
    events = read_metrics(tmp_path / "run")
    assert [event["step"] for event in events if event["event"] == "validation"] == [10]
    assert max(event["step"] for event in events) == 10, "the rule has judged where it stands"
