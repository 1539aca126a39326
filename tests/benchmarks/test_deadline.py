"""The deadline's figures, from a run's record made by hand."""

import json

import pytest

from benchmarks.deadline import judge
from benchmarks.launches import LaunchedRun


def test_error_and_last_learning_rate_are_counted_in_steps(tmp_path) -> None:
    steps = [{"event": "train", "step": n, "elapsed_seconds": 1 + 0.5 * n, "learning_rate": 0.0} for n in range(1, 18)]
    steps[-1]["learning_rate"] = 0.02 * 0.1
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    (tmp_path / "config.yaml").write_text("warmup_proportion: 0.5\noptimizer: {learning_rate: 0.02}\n")
    (tmp_path / "summary.json").write_text(json.dumps({"elapsed_seconds": 9.5, "closing_seconds": 1.0, "steps": 17}))
    figures = judge(LaunchedRun(tmp_path, []), budget_seconds=10.0)
    assert figures["error_seconds"] == -0.5
    assert figures["error_steps"] == -1.0
    # Half of the ten seconds bring the peak down to zero, so that a step of half a second takes a tenth off.
    assert figures["last_learning_rate_steps"] == figures["last_learning_rate_slow_steps"] == pytest.approx(1.0)
