"""From recorded trials to ``results.json``: medians over seeds, the best configuration, averages, what is missing."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Final, NamedTuple

from finetune.config import STARTED_FROM_MNLI
from finetune.optimizers import Optimizer
from finetune.selection import Group, best_cells, by_configuration, by_group, median_cell
from finetune.tasks import Task, benchmark_title
from finetune.trial import Cell

Results = dict[str, Any]


class Column(NamedTuple):
    """A column of a score table: one evaluation split of one task."""

    title: str
    task_name: str
    split: str


# The columns of Table 3 of "How to Train BERT with an Academic Budget", whose mean is its average.
AVERAGED_COLUMNS: Final = (
    Column("MNLI-m", "mnli", "dev_matched"),
    Column("MNLI-mm", "mnli", "dev_mismatched"),
    Column("QNLI", "qnli", "dev"),
    Column("QQP", "qqp", "dev"),
    Column("RTE", "rte", "dev"),
    Column("SST-2", "sst2", "dev"),
    Column("MRPC", "mrpc", "dev"),
    Column("CoLA", "cola", "dev"),
    Column("STS-B", "stsb", "dev"),
)
_STARTS: Final = ("pretrained", "mnli")  # the first that a task has is what its summary is about
# Accuracy of always giving the majority's answer: 40 of 71 development rows; on the test server.
_MAJORITY: Final = {"wnli": {"dev": 40 / 71, "test": 0.651}}


def make_results(
    tasks: Mapping[str, Task],
    facts: Mapping[str, Any],
    cells: Mapping[str, Sequence[Cell]],
    trials: Mapping[Cell, dict[str, Any]],
    failures: Sequence[tuple[Cell, str]],
) -> Results:
    """The content of ``results.json``; all scores are fractions.

    Args:
        tasks: the tasks by name, at least those of ``cells``.
        facts: ``model``, ``model_sha256``, ``mnli_init`` (false, true or "both"), ``protocol``, ``precisions``, and for
            each task ``rows`` (a count for each split), ``limited_rows`` (of splits cut short, how many rows there are)
            and ``tokens_per_row`` (a mean).
        cells: the grid of each task that is reported.
        trials: the results of the finished cells.
        failures: the attempts that failed, with their cause.

    Returns:
        ``benchmark``, ``model``, ``model_sha256``, ``mnli_init``, ``protocol``, ``precisions``, ``variants`` (the first
        of a task is the primary one, which summaries and averages are of) and ``seeds`` of the grid; ``task_facts``,
        what the report needs to know of each task; ``tasks``, the summary of each task that has *all* its trials;
        ``averages``, as the paper forms them, without and with RTE, MRPC and STS-B started from MNLI, None where a task
        is missing; ``missing`` (cells without a result, and why), ``failures`` and ``trials``.
    """
    grid = [cell for task_cells in cells.values() for cell in task_cells]
    causes = dict(failures)
    complete = {name: task_cells for name, task_cells in cells.items() if all(cell in trials for cell in task_cells)}
    summaries = {name: _task_summary(tasks[name], task_cells, trials) for name, task_cells in complete.items()}
    return {
        "benchmark": benchmark_title([tasks[name] for name in cells]),
        **{name: facts[name] for name in ("model", "model_sha256", "mnli_init", "protocol", "precisions")},
        "variants": list(dict.fromkeys(cell.variant for cell in grid)),
        "seeds": sorted({cell.seed for cell in grid}),
        "task_facts": {name: _task_facts(tasks[name], facts) for name in cells},
        "tasks": summaries,
        "averages": {start: _average(summaries, start) for start in _STARTS},
        "missing": [{**_record(cell), "cause": causes.get(cell, "not run")} for cell in grid if cell not in trials],
        "failures": [{**_record(cell), "cause": cause, "succeeded_later": cell in trials} for cell, cause in failures],
        "trials": [{**_record(cell), **trials[cell]} for cell in grid if cell in trials],
    }


def _record(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "variant": cell.variant}


def cell_of(record: Mapping[str, Any]) -> Cell:
    """The cell that a record of ``results.json`` is about: a trial, a missing one, or a failure."""
    values = {name: record[name] for name in Cell.__dataclass_fields__}
    return Cell(**{**values, "optimizer": Optimizer(**record["optimizer"])})


def median_cell_of(task_name: str, summary: Mapping[str, Any]) -> Cell:
    """The cell of a summary's best configuration and median seed."""
    same = {name: summary[name] for name in ("initialization", "precision")}
    optimizer = Optimizer(**summary["optimizer"])
    return Cell(task_name, **summary["best"], **same, optimizer=optimizer, seed=summary["median_seed"])


def _task_facts(task: Task, facts: Mapping[str, Any]) -> dict[str, Any]:
    limited = facts["limited_rows"][task.task_name]
    rows = {
        split: {"used": used, "official": task.official_rows.get(split, limited.get(split))}
        for split, used in facts["rows"][task.task_name].items()
    }
    official_dev = all(rows[split]["used"] == rows[split]["official"] for split in task.evaluation_splits)
    return {
        "title": task.title,
        "benchmark": benchmark_title([task]),
        "metric": task.selected_by,
        "metrics": list(task.metrics),
        "labels": list(task.labels) if task.labels else None,
        "synthetic": task.synthetic,
        "is_glue": task.is_glue,
        "evaluation_splits": list(task.evaluation_splits),
        "rows": rows,
        "tokens_per_row": facts["tokens_per_row"][task.task_name],
        "majority": _MAJORITY.get(task.task_name) if official_dev else None,
    }


def _task_summary(task: Task, cells: Sequence[Cell], trials: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """Of the primary variant each start's summary; that of the first start on the top level too, and its gain over
    random weights. Of each variant the first start's summary.
    """
    groups = by_group(cells)
    variants = list(dict.fromkeys(group.variant for group in groups))
    summaries = {group: _group_summary(task, group_cells, trials) for group, group_cells in groups.items()}

    def of_variant(variant: str) -> dict[str, Any]:
        return {start: summaries[start, variant] for start in _STARTS if (start, variant) in summaries}

    starts = of_variant(variants[0])
    primary = next(iter(starts.values()))
    summary = {**primary, "starts": starts}
    summary["variants"] = {variant: next(iter(of_variant(variant).values())) for variant in variants}
    baseline = summaries.get(Group("random", variants[0]))
    if baseline is not None:
        summary["random_baseline"] = baseline
        summary["gain"] = _gain(primary, baseline)
    return summary


def _group_summary(task: Task, cells: Sequence[Cell], trials: Mapping[Cell, dict[str, Any]]) -> dict[str, Any]:
    """The configuration with the highest median over its seeds, all of which have a result.

    ``std`` is the sample standard deviation over the seeds; ``scores`` are in the order of the seeds; ``metrics``,
    ``metrics_std`` and ``statistics`` are of the epoch that scores; times and memory are medians over the seeds. Of
    equal medians the first in the grid's order wins.
    """
    score_of = {cell: trials[cell]["score"] for cell in cells}
    best = best_cells(cells, score_of)
    chosen = sorted(best, key=lambda cell: cell.seed)
    scores, results = [score_of[cell] for cell in chosen], [trials[cell] for cell in chosen]
    return {
        "initialization": chosen[0].initialization,
        "variant": chosen[0].variant,
        "precision": chosen[0].precision,
        "optimizer": asdict(chosen[0].optimizer),
        "metric": task.selected_by,
        "best": dict(zip(("learning_rate", "batch_size", "num_epochs"), chosen[0].configuration, strict=True)),
        "median": statistics.median(scores),
        "mean": statistics.fmean(scores),
        "std": _deviation(scores),
        "max": max(scores),
        "min": min(scores),
        "scores": scores,
        "median_seed": median_cell(best, score_of).seed,
        "metrics": _over_seeds(task, results, statistics.median),
        "metrics_std": _over_seeds(task, results, _deviation),
        "statistics": _over_seeds(task, results, _statistics),
        "num_configurations": len(by_configuration(cells)),
        "seconds": sum(trials[cell]["seconds"] for cell in cells),
        **_costs(results),
    }


def _statistics(values: Sequence[float]) -> dict[str, float]:
    median, mean = statistics.median(values), statistics.fmean(values)
    return {"best": max(values), "mean": mean, "std": _deviation(values), "median": median}


def _costs(results: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
    """Medians over these trials; of the peak of memory None where it is not known."""
    peaks = [result["peak_memory_bytes"] for result in results]
    return {
        "seconds_per_trial": statistics.median(result["seconds"] for result in results),
        "seconds_per_epoch": statistics.median(epoch["seconds"] for result in results for epoch in result["epochs"]),
        "eval_seconds_per_epoch": statistics.median(
            epoch["eval_seconds"] for result in results for epoch in result["epochs"]
        ),
        "rows_per_second": statistics.median(result["rows_per_second"] for result in results),
        "optimizer_bytes": statistics.median(result["optimizer_bytes"] for result in results),
        "peak_memory_bytes": None if None in peaks else statistics.median(peaks),
    }


def _over_seeds(task: Task, trials: Sequence[Mapping[str, Any]], statistic) -> dict[str, dict[str, float]]:
    """``statistic`` of every metric of every evaluation split, at the epoch that scores."""
    metrics = [trial["epochs"][trial["score_epoch_index"]]["metrics"] for trial in trials]
    return {
        split: {name: statistic([values[split][name] for values in metrics]) for name in task.metrics}
        for split in task.evaluation_splits
    }


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _gain(pretrained: Mapping[str, Any], baseline: Mapping[str, Any]) -> dict[str, Any]:
    """How far pretraining lifts the median, and whether that is more than the seeds' scatter."""
    difference = pretrained["median"] - baseline["median"]
    return {"median": difference, "above_scatter": difference > max(pretrained["std"], baseline["std"])}


def _average(summaries: Mapping[str, Any], start: str) -> float | None:
    """The mean of the averaged columns; ``start`` is that of the tasks that can start from MNLI."""
    scores = [column_score(summaries, column, start) for column in AVERAGED_COLUMNS]
    return None if None in scores else statistics.fmean(scores)


def column_score(summaries: Mapping[str, Any], column: Column, start: str) -> float | None:
    """The median of a column; None where its task is not complete or never had this start.

    Args:
        summaries: ``tasks`` of the results.
        column: which.
        start: "pretrained", or "mnli" where the tasks that can are to have started from MNLI's model.
    """
    wanted = start if column.task_name in STARTED_FROM_MNLI else "pretrained"
    summary = summaries.get(column.task_name, {"starts": {}})["starts"].get(wanted)
    return summary and summary["metrics"][column.split][summary["metric"]]
