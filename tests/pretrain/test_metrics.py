"""The record of a run tells what was kept and what kills destroyed."""

from pathlib import Path

import pytest
import torch

from pretrain.architecture import ModelConfig, resolve
from pretrain.batches import Workload
from pretrain.flops import model_flops
from pretrain.metrics import StepAverages
from pretrain.run_record import METRICS_FILE, curves, lost_seconds, read_metrics


@pytest.fixture
def killed_twice(tmp_path) -> Path:
    """Checkpoint at step 4; killed at step 7, resumed, killed again at step 5 before any other checkpoint."""
    lines = [
        f'{{"event": "train", "step": {s}, "elapsed_seconds": {s}, "loss": 1, "learning_rate": 0}}' for s in range(1, 8)
    ]
    resume = '{"event": "start", "step": 4, "elapsed_seconds": 4}'
    again = '{"event": "train", "step": 5, "elapsed_seconds": 5, "loss": 2, "learning_rate": 0}'
    cut_short = '{"event": "train", "st'
    (tmp_path / METRICS_FILE).write_text("\n".join([*lines, cut_short, resume, again, resume, again]) + "\n")
    return tmp_path


def test_events_that_a_resume_took_back_are_gone(killed_twice) -> None:
    events = [event for event in read_metrics(killed_twice) if event["event"] == "train"]
    assert [event["step"] for event in events] == [1, 2, 3, 4, 5]
    assert events[-1]["loss"] == 2


def test_lost_work_is_summed_over_all_kills(killed_twice) -> None:
    assert lost_seconds(killed_twice) == (7 - 4) + (5 - 4)


def test_curves_are_thinned_and_keep_the_last_point() -> None:
    events = [{"event": "train", "step": s, "elapsed_seconds": s, "loss": 0, "learning_rate": 0} for s in range(10_001)]
    points = curves(events, max_points=100)["train"]
    assert len(points) <= 102
    assert points[-1]["step"] == 10_000


class TwoRanks:
    """The other rank measured the same."""

    world_size = 2

    def sum(self, *values: float) -> list[float]:
        return [2 * value for value in values]


@pytest.fixture
def averages() -> StepAverages:
    architecture = resolve(ModelConfig(preset="bert-tiny"), 100, 64, 0)
    return StepAverages(architecture, peak_flops=1e12)


def test_the_logged_loss_is_the_mean_over_predictions_not_over_steps(averages) -> None:
    averages.add(torch.tensor(30.0), Workload(8, 100, 2000, predictions=10))
    averages.add(torch.tensor(10.0), Workload(8, 900, 9000, predictions=90))
    figures = averages.flush(TwoRanks(), wait_seconds=0.0)
    assert figures.losses == pytest.approx([6.0, 2 / 9])
    assert figures.loss == pytest.approx(80 / 100)
    assert averages.flush(TwoRanks(), wait_seconds=0.0) is None


def test_speed_utilisation_and_wait_are_shares_of_the_same_time(averages, monkeypatch) -> None:
    clock = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr("pretrain.metrics.time.perf_counter", lambda: next(clock))
    averages._reset()
    work = Workload(64, 5000, 400_000, 700)
    averages.add(torch.tensor(1.0), work)
    figures = averages.flush(TwoRanks(), wait_seconds=0.4)
    assert figures.sequences_per_second == 16.0
    assert figures.tokens_per_second == 1250.0
    assert figures.wait_share == pytest.approx(0.1)
    expected = model_flops(resolve(ModelConfig(preset="bert-tiny"), 100, 64, 0), work) / 4.0 / 1e12
    assert figures.flop_utilisation == pytest.approx(expected)
    assert figures.memory_gigabytes > 0
    assert set(figures.as_metrics()) >= {"loss", "sequences_per_second", "tokens_per_second", "flop_utilisation"}
