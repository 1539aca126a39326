"""Optimizers and precisions are axes that are compared: each has its own best configuration, the first one is told."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.config import Grid, GridConfig
from finetune.optimizers import Optimizer
from finetune.results import cell_of, median_cell_of
from finetune.selection import by_group
from finetune.study import TrialStore
from finetune.trial import Cell
from tests.finetune.made_results import grid, results_of, table_trial, trial

MFAC = Optimizer("mfac", num_grads=64)
VALUES = {"learning_rate": [1e-4], "batch_size": [32], "num_epochs": [1]}


def config(**changes) -> GridConfig:
    sections = [Grid(["qqp", "rte"], **VALUES), Grid(["qqp"], **VALUES, optimizer=MFAC)]
    return GridConfig(**{"grids": sections, "seeds": [1, 2], **changes})


def test_a_task_may_be_in_several_lists_with_an_optimizer_each():
    cells = config().cells(["fp32", "bf16"])
    variants = {name: list(dict.fromkeys(cell.variant for cell in task_cells)) for name, task_cells in cells.items()}
    mfac = "M-FAC 64 gradients"
    assert variants == {
        "qqp": ["AdamW, fp32", "AdamW, bf16", f"{mfac}, fp32", f"{mfac}, bf16"],
        "rte": ["AdamW, fp32", "AdamW, bf16"],
    }
    assert all(len(group) == 2 for group in by_group(cells["qqp"]).values()), "a seed each"
    with pytest.raises(ValueError, match="qqp is in the grids more than once with M-FAC 64 gradients"):
        config(grids=[*config().grids, Grid(["qqp"], **VALUES, optimizer=Optimizer("mfac", num_grads=64, damp=1e-6))])


def test_the_first_variant_is_the_tasks_and_no_variant_is_chosen_for_its_score():
    first = grid("mrpc")
    second = [replace(cell, precision="bf16") for cell in first]
    trials = {cell: table_trial(cell) for cell in first}
    better = {1e-5: 0.8, 2e-5: 0.7, 3e-5: 0.6}
    trials |= {cell: {**trial("mrpc", better[cell.learning_rate]), "seconds": 5.0} for cell in second}
    results = results_of({"mrpc": first + second}, trials)
    task = results["tasks"]["mrpc"]
    assert results["variants"] == list(task["variants"]) == ["AdamW, fp32", "AdamW, bf16"]
    assert (task["variant"], task["median"], task["best"]["learning_rate"]) == ("AdamW, fp32", 0.60, 3e-5)
    bf16 = task["variants"]["AdamW, bf16"]
    assert (bf16["median"], bf16["best"]["learning_rate"], bf16["num_configurations"]) == (0.8, 1e-5, 3)
    assert (task["seconds_per_trial"], bf16["seconds_per_trial"]) == (12.5, 5.0)
    assert median_cell_of("mrpc", bf16) in second


def test_statistics_are_of_every_metric_at_the_epoch_that_scores():
    summary = results_of({"mrpc": grid("mrpc")})["tasks"]["mrpc"]
    scores = [0.60, 0.58, 0.70]  # of F1; accuracy is 0.01 lower
    for metric, shift in (("f1", 0.0), ("accuracy", -0.01)):
        assert summary["statistics"]["dev"][metric] == pytest.approx(
            {
                "best": 0.70 + shift,
                "mean": np.mean(scores) + shift,
                "std": np.std(scores, ddof=1),
                "median": 0.60 + shift,
            }
        )


def test_a_cell_comes_back_from_storage_and_results_with_its_optimizer(tmp_path: Path):
    cells = [
        Cell("rte", 1e-4, 32, 1, "pretrained", 1, "bf16", optimizer)
        for optimizer in (MFAC, replace(MFAC, gradient_dtype="bf16"), Optimizer(adam_beta2=0.98))
    ]
    store = TrialStore(f"sqlite:///{tmp_path / 'trials.db'}")
    store.open_study("rte", {}, {})
    store.enqueue_missing("rte", dict.fromkeys(cells, 1.0))
    store.enqueue_missing("rte", dict.fromkeys(cells, 1.0))
    assert [attempt.cell for attempt in store.waiting(["rte"])] == cells
    results = results_of({"rte": cells}, {cell: trial("rte", 0.5) for cell in cells})
    assert [cell_of(record) for record in results["trials"]] == cells
