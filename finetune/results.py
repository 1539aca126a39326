"""From recorded trials to ``results.json``: medians over seeds, the best configuration, the gain of pretraining."""

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from common.errors import UserError
from finetune.study import TrialStore
from finetune.tasks import TASKS, benchmark_title
from finetune.trial import Cell

Results = dict[str, Any]


def collect_results(store: TrialStore, cells: Mapping[str, Sequence[Cell]]) -> Results:
    """The content of ``results.json``, from the storage alone.

    Args:
        store: the trials.
        cells: the grid of each task; only tasks that have a study are reported.

    Returns:
        ``tasks`` (those with all their trials), ``trials`` (all finished ones), ``failures`` (attempts with their
        cause), ``missing`` (cells without a result, and why), ``benchmark`` and ``model``. Scores are fractions.

    Raises:
        UserError: no task has a study.
    """
    started = [name for name in cells if name in store.task_names()]
    if not started:
        raise UserError("no trial has been recorded: run run_glue_grid.py first")
    grid = [cell for name in started for cell in cells[name]]
    trials = {cell: result for name in started for cell, result in store.results(name).items()}
    failures = [failure for name in started for failure in store.failures(name)]
    causes = dict(failures)
    summaries = {name: _task_summary(store, name, cells[name], trials) for name in started}
    return {
        "benchmark": benchmark_title(started),
        "model": store.facts(started[0])["model"],
        "seeds": sorted({cell.seed for cell in grid}),
        "tasks": {name: summary for name, summary in summaries.items() if summary is not None},
        "missing": [{**asdict(cell), "cause": causes.get(cell, "not run")} for cell in grid if cell not in trials],
        "failures": [{**asdict(cell), "cause": cause, "succeeded_later": cell in trials} for cell, cause in failures],
        "trials": [{**asdict(cell), **trials[cell]} for cell in grid if cell in trials],
    }


def _task_summary(
    store: TrialStore, task_name: str, cells: Sequence[Cell], trials: Mapping[Cell, Mapping[str, Any]]
) -> dict[str, Any] | None:
    scores = {cell: trial["score"] for cell, trial in trials.items()}
    pretrained = summarize([cell for cell in cells if cell.initialization == "pretrained"], scores)
    if pretrained is None:
        return None
    task = TASKS[task_name]
    summary = {"synthetic": task.synthetic, "metric": task.selected_by, **pretrained}
    baseline = summarize([cell for cell in cells if cell.initialization == "random"], scores)
    if baseline is not None:
        summary["random_baseline"] = baseline
        summary["gain"] = _gain(pretrained, baseline)
    return {**summary, "rows": _rows(task_name, store.facts(task_name)["rows"])}


def summarize(cells: Iterable[Cell], scores: Mapping[Cell, float]) -> dict[str, Any] | None:
    """The configuration with the highest median over its seeds; None where there is no cell or a cell has no score.

    ``std`` is the sample standard deviation over the seeds. Of equal medians the first in the grid's order wins.
    """
    by_configuration: dict[tuple, list[float]] = defaultdict(list)
    for cell in cells:
        if cell not in scores:
            return None
        by_configuration[cell.learning_rate, cell.batch_size, cell.num_epochs].append(scores[cell])
    if not by_configuration:
        return None
    best = max(by_configuration, key=lambda configuration: statistics.median(by_configuration[configuration]))
    values = by_configuration[best]
    return {
        "best": dict(zip(("learning_rate", "batch_size", "num_epochs"), best, strict=True)),
        "median": statistics.median(values),
        "mean": statistics.fmean(values),
        "std": statistics.stdev(values) if len(values) > 1 else 0.0,
        "max": max(values),
        "min": min(values),
        "scores": values,
        "num_configurations": len(by_configuration),
    }


def _gain(pretrained: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """How far pretraining lifts the median, and whether that is more than the seeds' scatter."""
    difference = pretrained["median"] - baseline["median"]
    return {"median": difference, "above_scatter": difference > max(pretrained["std"], baseline["std"])}


def _rows(task_name: str, used: Mapping[str, int]) -> dict[str, dict[str, int | None]]:
    official = TASKS[task_name].official_rows
    return {split: {"used": rows, "official": official.get(split)} for split, rows in used.items()}
