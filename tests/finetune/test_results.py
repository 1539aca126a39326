"""``results.json`` from trials made by hand, against figures worked out here, by NumPy, or published."""

import json
import statistics

import numpy as np
import pytest

from finetune.results import cell_of
from finetune.trial import Cell
from tests.finetune.made_results import (
    SCORES,
    TABLE_3,
    TABLE_3_TASKS,
    glue_results,
    grid,
    results_of,
    table_trial,
    trial,
)


def test_the_best_configuration_has_the_highest_median_not_the_highest_score():
    summary = results_of({"rte": grid("rte")})["tasks"]["rte"]
    assert summary["best"] == {"learning_rate": 3e-5, "batch_size": 32, "num_epochs": 2}
    assert (summary["median"], summary["max"], summary["min"]) == (0.60, 0.70, 0.58)
    assert summary["mean"] == pytest.approx(1.88 / 3)
    assert summary["std"] == pytest.approx(np.std([0.60, 0.58, 0.70], ddof=1))
    assert summary["scores"] == [0.60, 0.58, 0.70]
    assert summary["num_configurations"] == 3
    assert summary["seconds"] == 9 * 12.5


def test_of_equal_medians_the_first_in_the_grids_order_wins():
    cells = grid("rte", rates=(3e-5, 1e-5))
    trials = {cell: trial("rte", 0.5 + 0.1 * (cell.seed - 2)) for cell in cells}
    assert results_of({"rte": cells}, trials)["tasks"]["rte"]["best"]["learning_rate"] == 3e-5


@pytest.mark.parametrize(
    ("scores", "seed"),
    [
        ((0.7, 0.5, 0.6), 3),  # the median itself
        ((0.7, 0.5, 0.6, 0.4), 2),  # of two in the middle the lower
        ((0.6, 0.5, 0.5, 0.4, 0.5), 2),  # of equal ones the first
        ((0.9,), 1),
    ],
)
def test_the_median_seed_is_the_one_whose_score_is_the_median(scores: tuple[float, ...], seed: int):
    cells = [Cell("rte", 1e-5, 32, 1, "pretrained", number) for number in range(1, len(scores) + 1)]
    trials = {cell: trial("rte", score) for cell, score in zip(cells, scores, strict=True)}
    for order in (cells, cells[::-1]):  # the order in which the seeds are listed decides nothing
        summary = results_of({"rte": order}, trials)["tasks"]["rte"]
        assert summary["median_seed"] == seed
        assert summary["scores"] == list(scores)


def test_metrics_are_of_the_epoch_that_scores_on_every_split():
    cells = [Cell("mnli", 5e-5, 32, 3, "pretrained", seed) for seed in (1, 2, 3)]
    best = {1: 0.80, 2: 0.84, 3: 0.82}
    trials = {
        cell: trial("mnli", 0.5, best[cell.seed], 0.6, score_epoch=1, mismatched=best[cell.seed] - 0.1)
        for cell in cells
    }
    summary = results_of({"mnli": cells}, trials)["tasks"]["mnli"]
    assert summary["median"] == summary["metrics"]["dev_matched"]["accuracy"] == 0.82
    assert summary["metrics"]["dev_mismatched"]["accuracy"] == pytest.approx(0.72)
    assert summary["metrics_std"]["dev_mismatched"]["accuracy"] == pytest.approx(0.02)


def test_a_missing_trial_leaves_no_median_of_its_task_and_is_named_with_its_cause():
    cells = {"rte": grid("rte"), "cola": grid("cola")}
    lost, never_run = cells["rte"][0], cells["rte"][5]
    trials = {cell: table_trial(cell) for cell in cells["rte"] + cells["cola"] if cell not in (lost, never_run)}
    results = results_of(cells, trials, failures=[(lost, "out of memory"), (lost, "NaN")])
    assert list(results["tasks"]) == ["cola"]
    told = [(entry["task_name"], entry["learning_rate"], entry["seed"], entry["cause"]) for entry in results["missing"]]
    assert told == [("rte", 1e-5, 1, "NaN"), ("rte", 2e-5, 3, "not run")]
    assert len(results["trials"]) == 16


def test_a_failure_tells_whether_the_trial_succeeded_later():
    cells = grid("rte")
    results = results_of({"rte": cells}, failures=[(cells[0], "out of memory")])
    assert [(entry["seed"], entry["succeeded_later"]) for entry in results["failures"]] == [(1, True)]
    assert results["missing"] == []


def test_results_are_plain_json_with_every_trial():
    results = results_of({"rte": grid("rte") + grid("rte", "random")}, rows={"rte": {"train": 463}})
    assert json.loads(json.dumps(results)) == results
    assert len(results["trials"]) == 18
    assert results["tasks"]["rte"]["random_baseline"]["median"] == pytest.approx(0.3)
    assert results["tasks"]["rte"]["gain"] == {"median": pytest.approx(0.3), "above_scatter": True}
    assert results["task_facts"]["rte"]["rows"]["train"] == {"used": 463, "official": 2490}


@pytest.mark.parametrize("model", TABLE_3)
def test_the_average_is_the_papers(model: str):
    *scores, average = TABLE_3[model]
    assert 100 * glue_results(scores)["averages"]["pretrained"] == pytest.approx(average, abs=0.05)


def test_the_average_with_starts_from_mnli_takes_rte_mrpc_and_stsb_from_there():
    averages = glue_results(TABLE_3["24hBERT"][:-1], lift=0.09)["averages"]
    assert averages["mnli"] - averages["pretrained"] == pytest.approx(3 * 0.09 / 9)


@pytest.mark.parametrize("name", sorted(set(TABLE_3_TASKS)))
def test_there_is_no_average_without_one_of_its_tasks(name: str):
    complete = glue_results(TABLE_3["24hBERT"][:-1])
    cells: dict[str, list[Cell]] = {}
    trials = {}
    for record in complete["trials"]:
        cell = cell_of(record)
        cells.setdefault(cell.task_name, []).append(cell)
        trials[cell] = record
    trials.pop(cells[name][1])
    assert results_of(cells, trials)["averages"] == {"pretrained": None, "mnli": None}


def test_each_start_has_a_summary_of_its_own_and_the_pretrained_one_is_the_tasks():
    task = results_of({"rte": grid("rte") + grid("rte", "mnli")}, mnli_init="both")["tasks"]["rte"]
    assert {start: summary["median"] for start, summary in task["starts"].items()} == {
        "pretrained": 0.60,
        "mnli": pytest.approx(0.70),
    }
    assert (task["initialization"], task["median"]) == ("pretrained", 0.60)


def test_where_a_task_is_only_started_from_mnli_this_is_its_summary():
    results = results_of({"rte": grid("rte", "mnli")}, mnli_init=True)
    task = results["tasks"]["rte"]
    assert (task["initialization"], list(task["starts"])) == ("mnli", ["mnli"])
    assert results["averages"] == {"pretrained": None, "mnli": None}


def test_the_majority_of_wnli_is_told_of_the_official_rows_alone():
    assert results_of({"wnli": grid("wnli")})["task_facts"]["wnli"]["majority"]["dev"] == pytest.approx(
        0.5634, abs=1e-4
    )
    assert results_of({"wnli": grid("wnli")}, rows={"wnli": {"dev": 50}})["task_facts"]["wnli"]["majority"] is None
    assert results_of({"rte": grid("rte")})["task_facts"]["rte"]["majority"] is None


def test_the_summary_does_not_depend_on_the_order_in_which_trials_finish():
    cells = grid("rte")
    trials = {cell: table_trial(cell) for cell in cells}
    backwards = dict(reversed(trials.items()))
    assert results_of({"rte": cells}, trials) == results_of({"rte": cells}, backwards)
    assert statistics.median(SCORES[3e-5]) == results_of({"rte": cells}, backwards)["tasks"]["rte"]["median"]
