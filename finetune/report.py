"""The report of a grid: tables of scores, what was run, and plots, as Markdown and as one self-contained page."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from common.folders import read_json
from common.page import Document, Plot, write_documents
from finetune.metrics import METRIC_TITLES
from finetune.plots import pretraining_figure, scores_figure
from finetune.results import Results
from finetune.tasks import TASKS, benchmark_title

PRETRAINING_FILE: Final = "pretraining.json"

# Izsak, Berchansky, Levy: How to Train BERT with an Academic Budget (EMNLP 2021), Table 3.
_PUBLISHED_HEADER: Final = "MNLI-m/mm QNLI QQP RTE SST-2 MRPC CoLA STS-B average".split()
_PUBLISHED: Final = {
    "BERT-base": "84.6/84.0 90.6 72.0 69.1 92.8 86.1 55.1 84.3 79.8".split(),
    "BERT-large": "86.0/85.2 92.6 72.0 72.9 94.5 89.1 60.9 87.0 82.2".split(),
    "24hBERT": "84.4/83.8 90.6 70.7 57.7 93.0 87.5 57.1 82.0 78.5".split(),
}

Table = tuple[list[str], list[list[str]]]


def write_report(folder: Path, results: Results) -> None:
    """Write ``report.md``, ``report.html`` and the plots into ``folder``.

    Args:
        folder: the grid's output folder; its ``pretraining.json``, if there, is plotted.
        results: the content of ``results.json``.
    """
    plots = _plots(folder, results)

    def fill(document: Document) -> None:
        _add_scores(document, results)
        for plot in plots:
            document.plot(plot)
        _add_configurations(document, results)
        _add_rows(document, results)
        _add_failures(document, results)
        _add_published(document, results)

    write_documents(folder, f"{results['benchmark']}: {results['model']}", plots, fill)


def _plots(folder: Path, results: Results) -> list[Plot]:
    plots = []
    if results["trials"]:
        caption = "Every seed's score on the development split, by configuration and start; the line is their median."
        plots.append(Plot("scores", "Every seed", scores_figure(results["trials"]), caption))
    if (folder / PRETRAINING_FILE).exists():
        pretraining = read_json(folder / PRETRAINING_FILE, "the record of pretraining, copied from the model")
        caption = _pretraining_caption(pretraining)
        plots.append(Plot("pretraining", "Pretraining", pretraining_figure(pretraining), caption))
    return plots


def _groups(results: Results) -> list[list[str]]:
    """Complete tasks, those of GLUE and the synthetic ones apart."""
    groups = [[name for name in results["tasks"] if TASKS[name].synthetic == synthetic] for synthetic in (False, True)]
    return [group for group in groups if group]


def score_tables(results: Results) -> list[tuple[str, Table]]:
    """A title and a table for GLUE and for the synthetic benchmark, where they have complete tasks."""
    return [(benchmark_title(group), _score_table(results, group)) for group in _groups(results)]


def _score_table(results: Results, task_names: Sequence[str]) -> Table:
    tasks = [results["tasks"][name] for name in task_names]
    header = ["", *(f"{TASKS[name].title} ({METRIC_TITLES[results['tasks'][name]['metric']]})" for name in task_names)]
    rows = [[results["model"], *(_median(task) for task in tasks)]]
    if any("random_baseline" in task for task in tasks):
        rows.append(["random weights", *(_median(task.get("random_baseline")) for task in tasks)])
        rows.append(["gain of pretraining", *(_gain(task.get("gain")) for task in tasks)])
    return header, rows


def _median(summary: Mapping[str, Any] | None) -> str:
    return f"{_percent(summary['median'])} ± {_percent(summary['std'])}" if summary else "not run to the end"


def _gain(gain: Mapping[str, Any] | None) -> str:
    if gain is None:
        return "not known"
    return f"{100 * gain['median']:+.1f}" + ("" if gain["above_scatter"] else " (no gain)")


def _percent(score: float) -> str:
    return f"{100 * score:.1f}"


def _add_scores(document: Document, results: Results) -> None:
    tables = score_tables(results)
    for title, (header, rows) in tables:
        if len(tables) > 1:
            document.heading(title)
        document.table(header, rows)
    if results["missing"]:
        names = ", ".join(dict.fromkeys(TASKS[cell["task_name"]].title for cell in results["missing"]))
        document.paragraph(f"Not complete, so without a median: {names} ({len(results['missing'])} trials missing).")
    document.paragraph(
        f"Development split, scores x 100: median ± sample standard deviation over {len(results['seeds'])} seeds of the"
        " configuration with the highest median. The configuration is selected on the split that it is reported on."
        " No task starts from another task's model."
    )
    if any("gain" in task for task in results["tasks"].values()):
        document.paragraph(
            "Random weights: the same architecture, grid and seeds without pretraining. Gain: the difference of the"
            " medians; “no gain” where it is not above the larger of the two standard deviations."
        )


def _add_configurations(document: Document, results: Results) -> None:
    rows = [
        _configuration_row(name, start, summary, len(results["seeds"]))
        for name, task in results["tasks"].items()
        for start, summary in (("pretrained", task), ("random weights", task.get("random_baseline")))
        if summary is not None
    ]
    if rows:
        document.heading("The chosen configurations")
        header = ["task", "start", "mean", "best", "worst", "learning rate", "batch", "epochs", "grid x seeds"]
        document.table(header, rows)


def _configuration_row(task_name: str, start: str, summary: Mapping[str, Any], num_seeds: int) -> list[str]:
    best = summary["best"]
    return [
        TASKS[task_name].title,
        start,
        *(_percent(summary[name]) for name in ("mean", "max", "min")),
        f"{best['learning_rate']:.1e}",
        str(best["batch_size"]),
        str(best["num_epochs"]),
        f"{summary['num_configurations']} x {num_seeds}",
    ]


def _add_rows(document: Document, results: Results) -> None:
    if not results["tasks"]:
        return
    document.heading("Rows")
    names = list(results["tasks"])
    rows = {name: results["tasks"][name]["rows"] for name in names}
    scored = {name: rows[name][TASKS[name].evaluation_splits[0]] for name in names}
    document.table(
        ["task", "training rows", "scored rows"],
        [[TASKS[name].title, _row_count(rows[name]["train"]), _row_count(scored[name])] for name in names],
    )
    others = [
        TASKS[name].title
        for name in names
        if not TASKS[name].synthetic and any(count["used"] != count["official"] for count in rows[name].values())
    ]
    if others:
        document.paragraph(f"Not the official rows, so not GLUE scores: {', '.join(others)}.")


def _row_count(rows: Mapping[str, int | None]) -> str:
    if rows["official"] is None:
        return f"{rows['used']:,} (synthetic)"
    return f"{rows['used']:,} of {rows['official']:,}"


def _add_failures(document: Document, results: Results) -> None:
    if not results["failures"]:
        return
    document.heading("Failed trials")
    header = ["task", "start", "learning rate", "batch", "epochs", "seed", "cause", "then"]
    names = ("task_name", "initialization", "learning_rate", "batch_size", "num_epochs", "seed", "cause")
    document.table(
        header,
        [
            [*(str(failure[name]) for name in names), "succeeded" if failure["succeeded_later"] else "missing"]
            for failure in results["failures"]
        ],
    )


def _add_published(document: Document, results: Results) -> None:
    if all(TASKS[name].synthetic for name in results["tasks"]):
        return
    document.heading("Published, test set")
    document.table(["", *_PUBLISHED_HEADER], [[name, *scores] for name, scores in _PUBLISHED.items()])
    document.paragraph(
        "For orientation only: scores on GLUE's hidden test sets from Table 3 of “How to Train BERT with an Academic"
        " Budget” (Izsak, Berchansky, Levy, EMNLP 2021), not comparable with scores on the development split. QQP and"
        " MRPC: F1, CoLA: Matthews, STS-B: Spearman, others: accuracy."
    )


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
