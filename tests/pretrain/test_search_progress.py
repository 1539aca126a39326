"""How far a search is, from runs made by hand, against hours worked out here."""

from dataclasses import replace
from datetime import datetime

import pytest

from pretrain.config import PretrainConfig
from pretrain.rungs import Rung
from pretrain.search_config import Hyperband, SearchConfig
from pretrain.search_progress import Progress, look
from tests.pretrain.made_search import BUDGET, CONFIG, FACTS, RUNS, SPACE, run

NOW = 1090.0
# Of the runs so far 6 of 7 were kept at 25 s; at 50 s it is one half.
RUNNING, PAUSED, WAITING = 25.0, 0.5 * 50, 25 + 6 / 7 * (25 + 0.5 * 50)


def progress(**options: float) -> Progress:
    return look(CONFIG, FACTS, RUNS, NOW, **options)


def test_the_hours_of_the_papers_search_are_told_before_it_begins() -> None:
    space = {"train_batch_size": [4096, 8192, 16384], "optimizer.learning_rate": [5e-4, 1e-3, 2e-3],
             "warmup_proportion": [0.0, 0.02, 0.04, 0.06], "schedule_length": ["1d", "3d", "9d"]}  # fmt: skip
    paper = SearchConfig(PretrainConfig(), space, [Rung("3h", "below 6.0"), Rung("12h", "top 50 %")])
    found = look(paper, {"gpus_per_run": 8, "places": 4}, [], NOW)
    assert found.counts == {"waiting": 108}
    assert found.gpu_hours_left == pytest.approx(108 * (12 + 12 / 2) * 8)
    assert found.seconds_left == pytest.approx(108 * 18 * 3600 / 4)
    assert found.end == pytest.approx(NOW + 108 * 18 * 3600 / 4)


def test_what_is_left_is_each_stretch_with_the_chance_that_the_run_gets_there() -> None:
    assert progress().gpu_hours_left == pytest.approx(2 * (RUNNING + PAUSED + WAITING) / 3600)


def test_a_bound_that_has_judged_no_run_is_taken_to_keep_all() -> None:
    config = SearchConfig(BUDGET, SPACE, [Rung("25s", "below 6.0")])
    assert look(config, FACTS, [run(0, "waiting")], NOW).gpu_hours_left == pytest.approx(2 * 8 * 100 / 3600)


def test_hours_spent_are_of_all_devices_and_all_runs() -> None:
    assert progress().gpu_hours_spent == pytest.approx(2 * (135 + 105 + 75 + 25 + 50 + 50 + 50) / 3600)


def test_every_start_to_come_adds_what_starts_have_taken_beside_the_budget() -> None:
    # Two runs of two starts each: 20 s beside 100 s and 30 s that were lost, 30 s beside 100 s: 12.5 s a start.
    ended = [replace(RUNS[0], launch_seconds=150.0), replace(RUNS[1], launch_seconds=130.0)]
    at_work = replace(RUNS[2], launch_seconds=60.0)  # its first start alone: what it has spent is of the second, too
    starts = 0.5 + (1 + 6 / 7 * 0.5)  # of the paused run and of the waiting one; the one at work needs none
    found = look(CONFIG, FACTS, [*ended, at_work, *RUNS[3:]], NOW)
    assert found.gpu_hours_left == pytest.approx(2 * (RUNNING + PAUSED + WAITING + 12.5 * starts) / 3600)


def test_time_left_is_for_as_many_at_a_time_as_run_now() -> None:
    both = [replace(entry, state="running") if entry.number == 7 else entry for entry in RUNS]
    assert progress().seconds_left == pytest.approx(RUNNING + PAUSED + WAITING)
    assert look(CONFIG, FACTS, both, NOW).seconds_left == pytest.approx(max((RUNNING + PAUSED + WAITING) / 2, WAITING))


def test_the_end_is_no_earlier_than_that_of_the_longest_run() -> None:
    config = SearchConfig(BUDGET, {"train_batch_size": [32, 64]})
    runs = [run(0, "running", config=config), run(1, "running", 5.0, 4.0, 3.0, config=config)]
    assert look(config, FACTS, runs, NOW).seconds_left == pytest.approx(100.0)


def test_configurations_that_are_yet_to_be_proposed_wait() -> None:
    config = SearchConfig(BUDGET, SPACE, sampler="tpe", num_runs=6)
    runs = [run(0, "running", 5.0, config=CONFIG)]
    found = look(config, FACTS, runs, NOW)
    assert found.counts == {"running": 1, "waiting": 5}
    assert found.gpu_hours_left == pytest.approx(2 * (75 + 5 * 100) / 3600)


def test_in_a_budget_of_steps_time_is_known_once_a_run_has_made_some() -> None:
    steps = PretrainConfig(time_budget=None, max_steps=40, validation_interval="25%", checkpoint_interval="25%",
                           early_validation_interval=None)  # fmt: skip
    config = SearchConfig(steps, {"train_batch_size": [32, 64]})
    before = look(config, FACTS, [run(0, "running", config=config), run(1, "waiting", config=config)], NOW)
    assert (before.gpu_hours_left, before.seconds_left, before.end) == (None, None, None)
    assert "nothing is known yet" in before.line()
    begun = run(0, "running", config=config, steps=10, elapsed_seconds=30.0)
    after = look(config, FACTS, [begun, run(1, "waiting", config=config)], NOW)
    assert after.gpu_hours_left == pytest.approx(2 * 3 * (30 + 40) / 3600)  # 3 s a step


def test_under_hyperband_a_run_is_expected_to_last_as_those_did_that_came_so_far() -> None:
    config = SearchConfig(BUDGET, SPACE, hyperband=Hyperband())
    ended = [run(0, "dropped", 5.0), run(1, "dropped", 5.0, 4.0), run(2, "finished", 5.0, 4.0, 3.0, 2.0)]
    others = [run(number, "failed") for number in range(4, 8)]
    found = look(config, FACTS, [*ended, run(3, "running", 5.0), *others], NOW)
    assert found.gpu_hours_left == pytest.approx(2 * ((50 - 25) + (100 - 25)) / 2 / 3600)


def test_one_line_tells_states_hours_end_and_best() -> None:
    line = progress().line()
    assert line.startswith("8 runs of 100s: 1 running, 1 paused, 1 waiting, 2 finished, 2 dropped, 1 diverged; ")
    spent, left = 2 * 490 / 3600, 2 * (RUNNING + PAUSED + WAITING) / 3600
    end = f"{datetime.fromtimestamp(NOW + 118):%Y-%m-%d %H:%M}"
    assert f"{spent:.3g} GPU-hours spent, about {left:.3g} left, end in 2 min ({end})" in line
    assert line.endswith("best loss 2.0000 (run 001)")
    assert "cost" not in line


def test_a_price_gives_the_cost_of_what_is_spent_and_left() -> None:
    found = progress(price_per_gpu_hour=1000.0)
    spent, left = 1000 * 2 * 490 / 3600, 1000 * 2 * (RUNNING + PAUSED + WAITING) / 3600
    assert f"spent (cost {spent:.1f})" in found.line()
    assert f"left (cost {left:.1f})" in found.line()
    header, rows = found.tables()[-1]
    assert header[-1] == "cost"
    assert {row[0]: row[-1] for row in rows}["finished"] == f"{1000 * 2 * 240 / 3600:.1f}"


def test_a_table_tells_what_runs_where_and_which_rung_comes_next() -> None:
    early = run(7, "running", place="node4, GPUs 2-3", started=1000.0, elapsed_seconds=12.0)
    (header, rows), (_, by_state) = look(CONFIG, FACTS, [*RUNS[:7], early], NOW).tables()
    assert header == ["run", "configuration", "where", "since", "spent", "next rung", "loss"]
    since = f"{datetime.fromtimestamp(1000.0):%Y-%m-%d %H:%M}, 2 min"
    assert rows == [
        ["002", "32 · 2e-3", "node3, GPUs 0-1", since, "75 %", "-", "2.700"],
        ["007", "64 · 1e-6", "node4, GPUs 2-3", since, "12 %", "25s: below 6.0", "-"],
    ]
    assert {row[0]: row[1] for row in by_state} == {
        "running": "2",
        "paused": "1",
        "finished": "2",
        "dropped": "2",
        "diverged": "1",
    }


def test_of_a_search_at_its_end_nothing_is_left() -> None:
    config = SearchConfig(BUDGET, {"train_batch_size": [32, 64]})
    ended = [replace(RUNS[0], launch_seconds=140.0), RUNS[3]]
    found = look(config, FACTS, ended, NOW)
    assert (found.gpu_hours_left, found.seconds_left) == (0.0, 0.0)
    assert "left" not in found.line()
    assert len(found.tables()) == 1
