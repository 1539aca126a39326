"""The scores of a grid as tables: of medians, of replicates, of variants, and as a row for a LaTeX document.

Scores of different benchmarks, or of tasks started from MNLI and not, are never in one table of medians.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from finetune.metrics import METRIC_TITLES
from finetune.plots import START_NAMES, Configuration
from finetune.results import AVERAGED_COLUMNS, Column, Results, column_score

Table = tuple[list[str], list[list[str]]]
Summary = Mapping[str, Any]


def score_tables(results: Results) -> list[tuple[str, Table]]:
    """A title and a table of medians for each benchmark, and for each start of the tasks that can start from MNLI.

    Scores of different benchmarks or of different starts are never in one table.
    """
    return [(title, _score_table(results, names, start)) for title, names, start in score_groups(results)]


def score_groups(results: Results) -> list[tuple[str, list[str], str]]:
    """Title, complete tasks and start of each table of scores."""
    by_benchmark: dict[str, list[str]] = defaultdict(list)
    for name in results["tasks"]:
        by_benchmark[results["task_facts"][name]["benchmark"]].append(name)
    groups = []
    for benchmark, names in by_benchmark.items():
        tuned = [name for name in names if "mnli" in results["tasks"][name]["starts"]]
        plain = not tuned or any("pretrained" in results["tasks"][name]["starts"] for name in tuned)
        if plain:
            groups.append((f"{benchmark}: no task started from MNLI" if tuned else benchmark, names, "pretrained"))
        if tuned:
            titles = enumeration([results["task_facts"][name]["title"] for name in tuned])
            groups.append((f"{benchmark}: {titles} started from MNLI", names, "mnli"))
    return groups


def _score_table(results: Results, names: Sequence[str], start: str) -> Table:
    columns = _columns(results, names)
    tasks = [results["tasks"][column.task_name] for column in columns]
    summaries = [task["starts"].get(start) or task["starts"]["pretrained"] for task in tasks]
    header = ["", *(_column_title(results, column) for column in columns)]
    rows = [[results["model"], *map(_median, summaries, columns)]]
    of_baseline = all(
        "random_baseline" in task and summary["initialization"] == task["initialization"]
        for summary, task in zip(summaries, tasks, strict=True)
    )
    if of_baseline:
        baselines = [task["random_baseline"] for task in tasks]
        rows.append(["random weights", *map(_median, baselines, columns)])
        rows.append(["gain of pretraining", *(_gain(results, column) for column in columns)])
    average = results["averages"][start]
    if average is not None and results["task_facts"][names[0]]["is_glue"]:
        header.append("average")
        rows = [[*row, percent(average) if row is rows[0] else "-"] for row in rows]
    return header, rows


def _columns(results: Results, names: Sequence[str]) -> list[Column]:
    """Those of the average in the order of the paper's table, then the others, one per evaluation split."""
    facts = results["task_facts"]
    splits = [(name, split) for name in names for split in facts[name]["evaluation_splits"]]
    places = {column[1:]: column for column in AVERAGED_COLUMNS if facts.get(column.task_name, {}).get("is_glue")}
    others = [
        Column(facts[name]["title"] + (f" {split}" if len(facts[name]["evaluation_splits"]) > 1 else ""), name, split)
        for name, split in splits
        if (name, split) not in places
    ]
    return [column for key, column in places.items() if key in splits] + others


def _column_title(results: Results, column: Column) -> str:
    facts = results["task_facts"][column.task_name]
    majority = f"; majority {percent(facts['majority']['dev'])}" if facts["majority"] else ""
    return f"{column.title} ({METRIC_TITLES[facts['metric']]}{majority})"


def _median(summary: Mapping[str, Any], column: Column) -> str:
    return with_deviation(summary, column.split, summary["metric"])


def with_deviation(summary: Mapping[str, Any], split: str, metric: str) -> str:
    """``84.1 ± 0.3``: median and standard deviation over the seeds."""
    return f"{percent(summary['metrics'][split][metric])} ± {percent(summary['metrics_std'][split][metric])}"


def _gain(results: Results, column: Column) -> str:
    """Of a task's first split, the one that is scored."""
    if column.split != results["task_facts"][column.task_name]["evaluation_splits"][0]:
        return "-"
    gain = results["tasks"][column.task_name]["gain"]
    return f"{100 * gain['median']:+.1f}" + ("" if gain["above_scatter"] else " (no gain)")


def summaries(results: Results) -> list[tuple[str, Summary]]:
    """Task name and summary: each start of a task's first variant, random weights, its other variants."""
    found = []
    for name, task in results["tasks"].items():
        baseline = [task["random_baseline"]] if "random_baseline" in task else []
        _, *others = task["variants"].values()
        found += [(name, summary) for summary in (*task["starts"].values(), *baseline, *others)]
    return found


def replicates_table(results: Results) -> Table:
    """Best, mean and deviation over the seeds of every metric, as Hugging Face tells of ``run_flax_glue``."""
    header = ["task", "start", "variant", "split", "metric", "best", "mean", "deviation", "median"]
    rows = [
        [
            results["task_facts"][name]["title"],
            START_NAMES[summary["initialization"]],
            summary["variant"],
            split,
            METRIC_TITLES[metric] + (" (selects)" if metric == summary["metric"] and len(metrics) > 1 else ""),
            *(percent(statistic[key]) for key in ("best", "mean", "std", "median")),
        ]
        for name, summary in summaries(results)
        for split, metrics in summary["statistics"].items()
        for metric, statistic in metrics.items()
    ]
    return header, rows


def variants_table(results: Results) -> Table:
    """Score, time and memory of each task's variants, as Hugging Face tells of its runs in mixed precision.

    Each variant has its own best configuration, whose trials these are.
    """
    header = (
        "task,variant,metric,best,mean,deviation,configuration,seconds a trial,seconds an epoch,rows a second,speed,"
        "optimizer (MiB),peak (MiB)"
    ).split(",")
    rows = [
        [
            results["task_facts"][name]["title"],
            variant,
            METRIC_TITLES[summary["metric"]],
            *(percent(summary[key]) for key in ("max", "mean", "std")),
            str(Configuration.of(summary["best"])),
            *(figure(summary[key], ",.1f") for key in ("seconds_per_trial", "seconds_per_epoch")),
            figure(summary["rows_per_second"], ",.0f"),
            _speed(summary, next(iter(task["variants"].values()))),
            *(_mebibytes(summary[key]) for key in ("optimizer_bytes", "peak_memory_bytes")),
        ]
        for name, task in results["tasks"].items()
        if len(task["variants"]) > 1
        for variant, summary in task["variants"].items()
    ]
    return header, rows


def _speed(summary: Summary, first: Summary) -> str:
    """Rows a second relative to the task's first variant."""
    speeds = summary["rows_per_second"], first["rows_per_second"]
    return "-" if None in speeds else f"{speeds[0] / speeds[1]:.2f} x"


def figure(value: float | None, form: str) -> str:
    """A figure as a table prints it; ``-`` where it is not known."""
    return "-" if value is None else format(value, form)


def _mebibytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f}"


def percent(score: float) -> str:
    """A fraction as tables print it, times 100."""
    return f"{100 * score:.1f}"


def enumeration(names: Sequence[str]) -> str:
    """``RTE, MRPC and STS-B``."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def latex_row(results: Results) -> str:
    """The scores as a row of a LaTeX table with the columns of the paper's Table 3, ``--`` where one is missing.

    Comments above it say what the figures are. With both starts there are two rows, each under its own comments.
    """
    starts = {False: ["pretrained"], True: ["mnli"], "both": ["pretrained", "mnli"]}[results["mnli_init"]]
    return "\n".join(_latex_row(results, start) for start in starts)


def _latex_row(results: Results, start: str) -> str:
    scores = [column_score(results["tasks"], column, start) for column in AVERAGED_COLUMNS]
    scores.append(results["averages"][start])
    matched, mismatched, *cells = ["--" if score is None else percent(score) for score in scores]
    titles = ["MNLI-m/mm", *(column.title for column in AVERAGED_COLUMNS[2:]), "Avg"]
    started = "started from MNLI" if start == "mnli" else "not started from MNLI"
    comments = [
        "GLUE development set, not the test server; not comparable with published test scores",
        f"median of {len(results['seeds'])} seeds of the best configuration, selected on the same set, x 100;"
        f" RTE, MRPC, STS-B {started}",
        *(f"not the official rows: {deviation}" for deviation in deviations(results)),
        " & ".join(["model", *titles]),
    ]
    mnli = "--" if matched == "--" else f"{matched}/{mismatched}"
    row = " & ".join([_latex_text(results["model"]), mnli, *cells]) + r" \\"
    return "\n".join([*(f"% {comment}" for comment in comments), row])


def _latex_text(text: str) -> str:
    escapes = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    return "".join(escapes.get(letter, f"\\{letter}" if letter in "&%$#_{}" else letter) for letter in text)


def average_note(results: Results, start: str) -> str:
    """What the average is of, or which columns it lacks."""
    titles = [column.title for column in AVERAGED_COLUMNS]
    absent = [c.title for c in AVERAGED_COLUMNS if column_score(results["tasks"], c, start) is None]
    what = f"{enumeration(titles)}, as “How to Train BERT with an Academic Budget” forms it: MNLI twice, no WNLI"
    if absent:
        return f"No average: it is the mean of {what}. There is no median of {enumeration(absent)}."
    return f"Average: the mean of {what}."


def deviations(results: Results) -> list[str]:
    """Where a GLUE task's rows are not as many as the official ones."""
    return [
        f"{facts['title']}: {count['used']:,} of {count['official']:,} {_rows_of(split)}"
        for facts in results["task_facts"].values()
        if facts["is_glue"]
        for split, count in facts["rows"].items()
        if count["used"] != count["official"]
    ]


def _rows_of(split: str) -> str:
    return "training rows" if split == "train" else f"{split} rows"
