"""The kill test: its plan hits everything, its checks see what is wrong, and real runs pass it."""

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from benchmarks.kill_checks import allowance, check_end, longest_step
from benchmarks.kill_runs import PHASES, TARGETS
from benchmarks.kills import wishes_of
from benchmarks.launches import LaunchedRun, step_seconds

REPOSITORY = Path(__file__).parents[2]
WHOLE_BUT_FOR_FILES = {"the newest checkpoint is of step 0", "there is no model"}


def test_twenty_kills_are_every_target_in_every_phase() -> None:
    runs = wishes_of(20, random.Random(0))
    wishes = [wish for run in runs for wish in run]
    assert Counter((wish.phase, wish.target) for wish in wishes) == Counter(
        (phase, target) for phase in PHASES for target in TARGETS
    )
    for run in runs:
        phases = [wish.phase for wish in run]
        assert phases == sorted(phases, key=lambda phase: phase == "closing"), "a run that is closing trains no more"


def train(step: int, elapsed_seconds: float) -> dict:
    return {"event": "train", "step": step, "elapsed_seconds": elapsed_seconds}


def ended_run(folder: Path, events: list[dict], **summary) -> LaunchedRun:
    """What a run of four seconds and three steps leaves behind, without checkpoints and model."""
    folder.mkdir()
    ended = {"stopped_by": "time_budget", "steps": 3, "elapsed_seconds": 3.9, "lost_seconds": 0.0}
    ended["spent_seconds"] = {"starting": 1.0, "training": 2.9}
    (folder / "summary.json").write_text(json.dumps(ended | summary))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    return LaunchedRun(folder, [])


START = {"event": "start", "step": 0, "elapsed_seconds": 0.0}
STEPS = [START, train(1, 2.0), train(2, 2.9), train(3, 3.9)]


@pytest.mark.parametrize(
    ("events", "summary", "found"),
    [
        (STEPS, {}, None),
        (STEPS, {"elapsed_seconds": 5.5, "spent_seconds": {"training": 5.5}}, "the budget is passed by 1.500 s"),
        (STEPS, {"elapsed_seconds": 2.5, "spent_seconds": {"training": 2.5}}, "1.500 s of the budget are unused"),
        (STEPS, {"spent_seconds": {"training": 2.0}}, "the parts of the time spent sum up to 2.000 s"),
        ([*STEPS[:3], train(2, 3.0), train(3, 3.9)], {}, "a step is missing or there twice"),
        ([START, train(1, 2.0), train(3, 3.0), train(4, 3.9)], {}, "a step is missing or there twice"),
        ([START, train(1, 2.0), train(2, 4.0), train(3, 3.9)], {}, "time runs backwards"),
    ],
)
def test_the_check_of_the_end_sees_what_is_wrong(events, summary, found, tmp_path) -> None:
    figures, wrong = check_end(ended_run(tmp_path / "run", events, **summary), budget_seconds=4.0)
    assert figures["starts"] == 1
    others = set(wrong) - WHOLE_BUT_FOR_FILES
    assert set(wrong) >= WHOLE_BUT_FOR_FILES
    assert others == set() if found is None else [line.startswith(found) for line in others] == [True]


def test_a_run_that_was_interrupted_is_not_complete(tmp_path) -> None:
    run = ended_run(tmp_path / "run", STEPS, stopped_by="launcher_died")
    run.log.write_text("stopped\n")
    assert check_end(run, 4.0) == ({}, ["the run is not complete: stopped"])


def test_pauses_are_no_steps_but_a_start_is_part_of_its_first() -> None:
    validation = {"event": "validation", "step": 2, "elapsed_seconds": 4.0, "seconds": 1.1}
    events = [*STEPS[:3], validation, train(3, 5.0)]
    assert step_seconds(events) == pytest.approx([0.9])
    assert longest_step(events) == pytest.approx(0.9)
    assert allowance(events) == pytest.approx(2.0 + 1.1)


def kill(*arguments: str, seconds: int) -> dict:
    command = [sys.executable, "benchmarks/kills.py", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_twenty_kills_in_all_phases_lose_nothing() -> None:
    figures = kill("--kills", "20", seconds=2900)
    assert figures["kills"] >= 20
    assert all(figures[f"kills_in_{phase}"] >= 3 for phase in PHASES)
    assert figures["kills_of_rank_0"]
    assert figures["kills_of_rank_1"]
    assert figures["kills_of_deepspeed"]
    assert figures["kills_of_launch_py"]
    assert figures["checks_failed"] == 0
