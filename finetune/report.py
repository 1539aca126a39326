"""The report of a grid: scores, what was run and how, and figures, as Markdown and as one self-contained page.

Everything is told from the content of ``results.json``, so that it can be told again at any time.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.folders import read_json
from common.page import Document, Plot, time_unit, write_documents
from finetune.config import STARTED_FROM_MNLI
from finetune.metrics import METRIC_TITLES
from finetune.plots import (
    START_NAMES,
    curves_panels,
    grid_panels,
    pretraining_figure,
    rate_text,
    scores_panels,
)
from finetune.published import DEVELOPMENT_SET, TEST_SET
from finetune.results import Results
from finetune.score_tables import (
    average_note,
    deviations,
    enumeration,
    percent,
    score_groups,
    score_tables,
    with_deviation,
)

PRETRAINING_FILE: Final = "pretraining.json"


def write_report(folder: Path, results: Results) -> None:
    """Write ``report.md``, ``report.html`` and the figures into ``folder``.

    Args:
        folder: the grid's output folder; its ``pretraining.json``, if there, is plotted.
        results: the content of ``results.json``.
    """
    plots = _plots(folder, results)
    title = f"{results['benchmark']}: {results['model']}"
    write_documents(folder, title, plots, lambda document: add_content(document, results, plots))


def add_content(document: Document, results: Results, plots: Sequence[Plot] = ()) -> None:
    """All that the report says, in reading order, with ``plots`` where they belong."""
    _add_statement(document, results)
    _add_scores(document, results)
    _add_missing(document, results)
    if any(facts["is_glue"] for facts in results["task_facts"].values()):
        for published in (TEST_SET, DEVELOPMENT_SET):
            document.heading(published.heading)
            document.table(published.header, published.rows)
            document.paragraph(published.source)
    _add_configurations(document, results)
    _add_metrics(document, results)
    for plot in plots:
        document.plot(plot)
    _add_times(document, results)
    _add_rows(document, results)
    _add_failures(document, results)
    _add_protocol(document, results)


_CAPTIONS: Final = {
    "scores": "Every seed's score on the development split, by configuration; the stroke is their median. The"
    " configuration in bold has the highest median.",
    "grid": "Median over the seeds of each configuration; the frame is around the chosen one, grey ones lack a seed."
    " Each panel has its own colours, dark for its lowest median, bright for its highest. Tasks with one configuration"
    " are left out.",
    "curves": "After each epoch, with the chosen configuration (learning rate · batch · epochs): thin lines are seeds,"
    " thick ones the median over them. Training loss is the mean over the epoch, with dropout.",
}


def _plots(folder: Path, results: Results) -> list[Plot]:
    panels = {
        ("scores", "Every seed"): scores_panels(results),
        ("grid", "The grid"): grid_panels(results),
        ("curves", "Learning curves"): curves_panels(results),
    }
    plots = [Plot(name, heading, figures, _CAPTIONS[name]) for (name, heading), figures in panels.items() if figures]
    if (folder / PRETRAINING_FILE).exists():
        pretraining = read_json(folder / PRETRAINING_FILE, "the record of pretraining, copied from the model")
        caption = _pretraining_caption(pretraining)
        plots.append(Plot("pretraining", "Pretraining", pretraining_figure(pretraining), caption))
    return plots


def _add_statement(document: Document, results: Results) -> None:
    done, missing = len(results["trials"]), len(results["missing"])
    titles = [facts["title"] for facts in results["task_facts"].values()]
    document.paragraph(
        f"{results['model']} fine-tuned on {enumeration(titles)}: the median score over {len(results['seeds'])} seeds"
        f" of each task's best configuration on the development split, with every trial behind it ({done:,} of"
        f" {done + missing:,} are done)."
    )


def _add_scores(document: Document, results: Results) -> None:
    groups, tables = score_groups(results), score_tables(results)
    for (title, names, start), (_, (header, rows)) in zip(groups, tables, strict=True):
        if len(tables) > 1:
            document.heading(title)
        document.table(header, rows)
        if results["task_facts"][names[0]]["is_glue"]:
            document.paragraph(average_note(results, start))
    if len(tables) > 1:
        document.heading("About these scores")
    document.paragraph(_score_note(results))
    if any("gain" in task for task in results["tasks"].values()):
        document.paragraph(
            "Random weights: the same architecture, grid and seeds without pretraining. Gain: the difference of the"
            " medians; “no gain” where it is not above the larger of the two standard deviations."
        )
    if others := deviations(results):
        document.paragraph(f"Not the official rows, so not GLUE scores: {'; '.join(others)}.")
    for facts in results["task_facts"].values():
        if facts["majority"]:
            document.paragraph(_majority_note(facts))


def _score_note(results: Results) -> str:
    epoch = {
        "last": "The score is the last epoch's.",
        "best": "The score is the best epoch's, chosen on the same split too, which makes it higher than a test would.",
    }[results["protocol"]["score_epoch"]]
    return (
        f"Development split, scores x 100: median ± sample standard deviation over {len(results['seeds'])} seeds of the"
        " configuration with the highest median. The configuration is selected on the split that it is reported on."
        f" {epoch} {_start_note(results)}"
    )


def _start_note(results: Results) -> str:
    facts = results["task_facts"]
    titles = [facts[name]["title"] for name in STARTED_FROM_MNLI if name in facts]
    if not results["mnli_init"] or not titles:
        return "No task starts from another task's model."
    tuned = "the model tuned on MNLI (the median seed of its best configuration)"
    if results["mnli_init"] == "both":
        return f"{enumeration(titles)}: once from the pretrained model, once from {tuned}, a table each."
    return f"{enumeration(titles)}: started from {tuned}."


def _majority_note(facts: Mapping[str, Any]) -> str:
    majority = facts["majority"]
    return (
        f"{facts['title']}: always giving the majority's answer scores {percent(majority['dev'])} on the development"
        f" split and {percent(majority['test'])} on the test server. A score at or below that says nothing about the"
        " model. Most development rows share their text with a training row of the opposite answer, so that a model"
        " that has learned these by heart scores far below it."
    )


def _add_missing(document: Document, results: Results) -> None:
    if not results["missing"]:
        return
    titles = dict.fromkeys(results["task_facts"][cell["task_name"]]["title"] for cell in results["missing"])
    document.heading("Missing trials")
    document.paragraph(
        f"Not complete, so without a median: {', '.join(titles)} ({_trials(len(results['missing']))} missing)."
    )
    seeds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for cell in results["missing"]:
        seeds[*_cell_texts(results, cell), cell["cause"]].append(str(cell["seed"]))
    rows = [[*cell, ", ".join(numbers), cause] for (*cell, cause), numbers in seeds.items()]
    document.table(["task", "start", "learning rate", "batch", "epochs", "seeds", "cause"], rows)


def _trials(number: int) -> str:
    return f"{number:,} trial" + ("s" if number != 1 else "")


def _cell_texts(results: Results, cell: Mapping[str, Any]) -> list[str]:
    """Task, start and hyperparameters."""
    title = results["task_facts"][cell["task_name"]]["title"]
    return [title, START_NAMES[cell["initialization"]], *_configuration_texts(cell)]


def _configuration_texts(values: Mapping[str, Any]) -> list[str]:
    return [rate_text(values["learning_rate"]), str(values["batch_size"]), str(values["num_epochs"])]


def _add_configurations(document: Document, results: Results) -> None:
    rows = [
        [
            results["task_facts"][name]["title"],
            START_NAMES[summary["initialization"]],
            *(percent(summary[key]) for key in ("median", "mean", "std", "max", "min")),
            str(summary["median_seed"]),
            *_configuration_texts(summary["best"]),
            f"{summary['num_configurations']} x {len(results['seeds'])}",
        ]
        for name, summary in _summaries(results)
    ]
    if rows:
        document.heading("The chosen configurations")
        header = "task,start,median,mean,deviation,best,worst,median seed,learning rate,batch,epochs,grid x seeds"
        document.table(header.split(","), rows)


def _summaries(results: Results) -> list[tuple[str, Mapping[str, Any]]]:
    """Each task with each of its starts, random weights last."""
    return [
        (name, summary)
        for name, task in results["tasks"].items()
        for summary in (*task["starts"].values(), task.get("random_baseline"))
        if summary is not None
    ]


def _add_metrics(document: Document, results: Results) -> None:
    """Of the tasks that have more metrics than the one in the tables of scores."""
    rows = [
        [
            results["task_facts"][name]["title"],
            START_NAMES[summary["initialization"]],
            split,
            METRIC_TITLES[metric] + (" (selects)" if metric == summary["metric"] else ""),
            with_deviation(summary, split, metric),
        ]
        for name, summary in _summaries(results)
        for split, metrics in summary["metrics"].items()
        for metric in metrics
        if len(metrics) > 1
    ]
    if rows:
        document.heading("Tasks with several metrics")
        document.table(["task", "start", "split", "metric", "median ± deviation"], rows)


def _add_times(document: Document, results: Results) -> None:
    if not results["trials"]:
        return
    by_task: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for trial in results["trials"]:
        by_task[trial["task_name"]].append(trial)
    total = sum(trial["seconds"] for trial in results["trials"])
    unit, unit_seconds = time_unit(total)
    rows = []
    for name, trials in by_task.items():
        seconds = [trial["seconds"] for trial in trials]
        speed = statistics.median(trial["rows_per_second"] for trial in trials)
        time = [f"{sum(seconds) / unit_seconds:,.2f}", f"{100 * sum(seconds) / total:.1f} %"]
        medians = [f"{statistics.median(seconds):,.1f}", f"{speed:,.0f}"]
        rows.append([results["task_facts"][name]["title"], f"{len(trials):,}", *time, *medians])
    rows.append(["all", f"{len(results['trials']):,}", f"{total / unit_seconds:,.2f}", "100.0 %", "", ""])
    document.heading("Time")
    document.table(["task", "trials", f"time ({unit})", "share", "seconds a trial", "training rows a second"], rows)
    document.paragraph(
        "Time: the sum of the trials' own time, training and evaluation, not what a clock on the wall shows where"
        " several workers run. Seconds and rows a second: medians over the trials; evaluation is no part of rows a"
        " second."
    )


def _add_rows(document: Document, results: Results) -> None:
    document.heading("Rows")
    rows = [
        [
            facts["title"],
            _row_count(facts["rows"]["train"]),
            ", ".join(_row_count(facts["rows"][split]) for split in facts["evaluation_splits"]),
            f"{facts['tokens_per_row']:.1f}",
        ]
        for facts in results["task_facts"].values()
    ]
    document.table(["task", "training rows", "development rows", "tokens a training row"], rows)


def _row_count(rows: Mapping[str, int | None]) -> str:
    return f"{rows['used']:,}" if rows["official"] is None else f"{rows['used']:,} of {rows['official']:,}"


def _add_failures(document: Document, results: Results) -> None:
    if not results["failures"]:
        return
    document.heading("Failed trials")
    document.table(
        ["task", "start", "learning rate", "batch", "epochs", "seed", "then", "cause"],
        [
            [
                *_cell_texts(results, failure),
                str(failure["seed"]),
                "succeeded" if failure["succeeded_later"] else "missing",
                failure["cause"],
            ]
            for failure in results["failures"]
        ],
    )


def _add_protocol(document: Document, results: Results) -> None:
    document.heading("How it was run")
    protocol = results["protocol"]
    facts = {
        "Model": f"{results['model']}, SHA-256 of the weights {results['model_sha256']}",
        "Seeds": ", ".join(map(str, results["seeds"])) + ": they decide the head, the order of the rows, and dropout",
        "Input": f"at most {protocol['max_seq_length']} tokens a row, longer ones are cut",
        "Optimizer": f"AdamW, weight decay {protocol['weight_decay']:g}, learning rate rising over the first"
        f" {100 * protocol['warmup_proportion']:g} % of the steps, then falling linearly to 0",
        "Precision": ", ".join(results["precisions"]),
        "Score": f"of the {protocol['score_epoch']} epoch, on the development split",
    }
    if trials := results["trials"]:
        devices = Counter(trial["device"] for trial in trials)
        finished = sorted(trial["finished_at"] for trial in trials)
        facts["Devices"] = ", ".join(f"{device} ({_trials(count)})" for device, count in devices.items())
        facts["Finished"] = f"first trial {finished[0]}, last trial {finished[-1]}"
        facts["Versions"] = _versions(trials)
    document.facts(facts)


def _versions(trials: Sequence[Mapping[str, Any]]) -> str:
    """Each library with its version, or all of them where trials had different ones."""
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for trial in trials:
        for library, version in trial["versions"].items():
            found[library][version] = None
    return ", ".join(f"{library} {' and '.join(versions)}" for library, versions in found.items())


def _pretraining_caption(pretraining: Mapping[str, Any]) -> str:
    budget = pretraining.get("time_budget_seconds")
    loss = pretraining.get("validation_loss")
    facts = [
        f"{pretraining['elapsed_seconds']:,.0f} s" + (f" of a budget of {budget:,.0f} s" if budget else ""),
        f"{pretraining['steps']:,} steps, {pretraining['sequences']:,} sequences",
        f"final validation loss {loss:.3f}" if loss is not None else "no validation",
        f"on {pretraining['hardware']}",
    ]
    return f"Pretraining: {'; '.join(facts)}."
