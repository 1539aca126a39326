"""The record of a run tells what was kept and what kills destroyed."""

from pathlib import Path

import pytest

from pretrain.metrics import METRICS_FILE, curves, lost_seconds, read_metrics


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
