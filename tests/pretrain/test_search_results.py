"""Results of a search from runs made by hand, against figures worked out here."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from common.cli import config_parser, parse, take_config
from common.errors import UserError
from pretrain.config import PretrainConfig
from pretrain.rungs import Rung
from pretrain.search_config import Range, SearchConfig
from pretrain.search_results import (
    best_config,
    check_references,
    make_results,
    ranked,
    titles,
    value_text,
    verdict_at,
    write_best,
)
from tests.pretrain.made_search import BUDGET, CONFIG, FACTS, RUNS, SPACE, reference, run


def results() -> dict[str, Any]:
    return make_results(CONFIG, FACTS, RUNS, [reference()])


def test_only_finished_runs_are_ranked_by_their_final_loss() -> None:
    assert [entry["run"] for entry in results()["finished"]] == ["001", "000"]
    best = results()["best"]
    assert (best["run"], best["final_loss"], best["perplexity"]) == ("001", 2.0, pytest.approx(7.38905609893))
    assert best["parameters"] == {"train_batch_size": 32, "optimizer.learning_rate": 1e-3}


def test_of_equal_losses_the_first_run_wins() -> None:
    tied = [run(number, "finished", 5.0, 3.0, 2.5, 2.0, final_loss=2.0) for number in (5, 2, 7)]
    assert [entry.number for entry in ranked(tied)] == [2, 5, 7]


def test_losses_by_value_are_of_finished_runs_and_keep_the_order_of_the_space() -> None:
    values = results()["values"]
    assert [(group["value"], group["losses"]) for group in values["train_batch_size"]] == [(32, [2.0, 2.25]), (64, [])]
    assert [group["value"] for group in values["optimizer.learning_rate"]] == SPACE["optimizer.learning_rate"]
    both, none = values["train_batch_size"]
    assert (both["median"], both["mean"], both["min"]) == (2.125, 2.125, 2.0)
    assert (none["median"], none["mean"], none["min"]) == (None, None, None)


def test_of_a_range_the_values_that_were_tried_come_in_rising_order() -> None:
    config = SearchConfig(BUDGET, {"optimizer.learning_rate": Range(1e-4, 1e-2, True)}, sampler="random", num_runs=3)
    tried = [
        run(number, "finished", 3.0, config=config, parameters={"optimizer.learning_rate": rate}, final_loss=rate)
        for number, rate in enumerate((2e-3, 5e-4, 1e-3))
    ]
    found = make_results(config, FACTS, tried, [])
    assert [group["value"] for group in found["values"]["optimizer.learning_rate"]] == [5e-4, 1e-3, 2e-3]
    assert found["search"]["space"]["optimizer.learning_rate"] == {"low": 1e-4, "high": 1e-2, "log": True}


def test_every_rung_tells_who_reached_it_and_what_became_of_them() -> None:
    below, top = results()["rungs"]
    # All but the waiting run have validated at 25 s, one was above 6.0; five have come to the pause.
    counted = {"reached": 7, "kept": 6, "dropped": 1, "open": 0}
    assert below == {"at": "25s", "keep": "below 6.0", "mark": 0.25, **counted}
    counted = {"reached": 5, "kept": 3, "dropped": 1, "open": 1}
    assert top == {"at": "50s", "keep": "top 50 %", "mark": 0.5, **counted}


def test_a_bound_judges_the_first_validation_at_or_behind_its_mark() -> None:
    below = Rung("25s", "below 6.0")
    before = run(0, "running", elapsed_seconds=30.0, curve=((24.9, 7.0),))  # the mark is passed, the loss still to come
    assert verdict_at(CONFIG, before, below) is None
    assert verdict_at(CONFIG, replace(before, curve=((25.0, 5.0),)), below) == "kept"
    assert verdict_at(CONFIG, replace(before, curve=((25.0, 7.0),), state="dropped"), below) == "dropped"


def test_a_run_dropped_by_a_bound_behind_a_pause_was_kept_at_the_pause() -> None:
    config = SearchConfig(BUDGET, SPACE, [Rung("50s", "top 50 %"), Rung("75s", "below 2.0")])
    dropped = run(0, "dropped", 5.0, 3.0, 2.5)
    assert [verdict_at(config, dropped, rung) for rung in config.rungs] == ["kept", "dropped"]


def test_a_budget_in_steps_has_its_marks_and_curves_in_steps() -> None:
    config = SearchConfig(PretrainConfig(time_budget=None, max_steps=40, validation_interval="25%",
                          early_validation_interval=None, checkpoint_interval="25%"), SPACE,
                          [Rung("50%", "below 3.0")])  # fmt: skip
    runs = [run(0, "dropped", curve=((20, 3.5),), steps=20, elapsed_seconds=999.0)]
    found = make_results(config, FACTS, runs, [reference(budget="40 steps", time_budget_seconds=None)])
    assert (found["rungs"][0]["reached"], found["rungs"][0]["dropped"]) == (1, 1)
    assert (found["search"]["unit"], found["search"]["total"]) == ("steps", 40)
    assert found["runs"][0]["share_spent"] == 0.5
    assert found["references"][0]["curve"] == [[200, 4.0], [400, 3.5]]


def test_hours_count_every_device_and_what_was_lost() -> None:
    hours = results()["gpu_hours"]
    expected = {
        "finished": 2 * (100 + 5 + 30 + 100 + 5),
        "dropped": 2 * (25 + 50),
        "diverged": 2 * 50,
        "failed": 0,
        "unfinished": 2 * (75 + 50),
        "lost": 2 * 30,
    }
    expected["total"] = sum(expected.values()) - expected["lost"]
    assert hours == {name: pytest.approx(seconds / 3600) for name, seconds in expected.items()}


def test_results_are_strict_json_though_a_run_diverged() -> None:
    found = results()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["runs"][6]["curve"] == [[25.0, 5.8]]


def test_the_best_configuration_is_a_run_of_its_own_without_rungs(tmp_path: Path) -> None:
    file = write_best(CONFIG, RUNS, tmp_path)
    assert file == tmp_path / "best.yaml"
    arguments = parse(config_parser("run_pretraining.py", "", PretrainConfig), ["--config", str(file)])
    written = take_config(arguments, PretrainConfig)
    expected = replace(BUDGET, train_batch_size=32, optimizer=replace(BUDGET.optimizer, learning_rate=1e-3))
    assert written == expected == best_config(CONFIG, RUNS)
    header = file.read_text().splitlines()[0]
    assert tmp_path.name in header
    assert "run 001" in header
    assert "2.0000" in header


def test_before_a_run_has_finished_there_is_no_best_one(tmp_path: Path) -> None:
    assert best_config(CONFIG, RUNS[2:]) is None
    assert write_best(CONFIG, RUNS[2:], tmp_path) is None
    assert not list(tmp_path.iterdir())
    assert make_results(CONFIG, FACTS, RUNS[2:], [])["best"] is None


CPU = {"hardware": "2 processes on 4 cores of AMD EPYC 9654"}


@pytest.mark.parametrize(
    ("facts", "fields"),
    [
        ({}, {}),
        ({}, {"budget": "100.0s"}),
        (CPU, {"hardware": "2 x CPU, 2 threads each"}),
    ],
)
def test_a_reference_of_the_same_data_budget_and_hardware_is_taken(facts: dict, fields: dict) -> None:
    check_references(CONFIG, {**FACTS, **facts}, [reference(**fields)])


@pytest.mark.parametrize(
    ("facts", "fields", "named"),
    [
        ({}, {"manifest_sha256": "b" * 64}, r"another data folder \(manifest bbbbbbbb, the search's is aaaaaaaa\)"),
        ({}, {"budget": "2m"}, r"another budget \(2m, the search's is 100s\)"),
        ({}, {"budget": "100 steps"}, r"another budget \(100 steps, the search's is 100s\)"),
        ({}, {"hardware": "4 x NVIDIA H200"}, r"other hardware \(4 x NVIDIA H200, the search's is 2 x NVIDIA H200\)"),
        (CPU, {"hardware": "1 x CPU, 4 threads each"}, "other hardware"),
        (CPU, {"hardware": "2 x CPU, 1 thread each"}, "other hardware"),
        ({}, {"hardware": None}, "no checkpoint yet"),
    ],
)
def test_any_other_reference_is_refused_with_the_difference_named(facts: dict, fields: dict, named: str) -> None:
    with pytest.raises(UserError, match=f"bert-base-settings has {named}"):
        check_references(CONFIG, {**FACTS, **facts}, [reference(**fields)])


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (4096, "4096"),
        (2e-3, "2e-3"),
        (1.5e-4, "1.5e-4"),
        (0.06, "0.06"),
        (0.0, "0"),
        (0.02, "0.02"),
        (123456.0, "123456"),
        ("3d", "3d"),
        (None, "null"),
        (True, "true"),
        (1, "1"),
    ],
)
def test_values_are_written_as_people_write_them(value: Any, text: str) -> None:
    assert value_text(value) == text


def test_hyperparameters_go_by_the_last_part_of_their_name_where_that_is_theirs_alone() -> None:
    names = ["optimizer.learning_rate", "model.name", "optimizer.name"]
    assert list(titles(names).values()) == ["learning rate", "model.name", "optimizer.name"]
