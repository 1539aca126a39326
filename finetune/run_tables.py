"""The trials of a grid as tables: their time, how they overfit, which failed and which are missing."""

import statistics
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, Final

from common.page import time_unit
from finetune.overfitting import Overfitting, overfitting
from finetune.plots import START_NAMES, Configuration, Group, by_configuration, chosen, groups, rate_text
from finetune.results import Results
from finetune.score_tables import Table, percent

_CELL_HEADER: Final = ("task", "start", "variant", "learning rate", "batch", "epochs")


def number(count: int, what: str) -> str:
    """``1 trial``, ``2 trials``."""
    return f"{count:,} {what}" + ("s" if count != 1 else "")


def configuration_texts(values: Mapping[str, Any]) -> list[str]:
    """Learning rate, batch size and epochs."""
    return [rate_text(values["learning_rate"]), str(values["batch_size"]), str(values["num_epochs"])]


def _cell_texts(results: Results, cell: Mapping[str, Any]) -> list[str]:
    """Under :data:`_CELL_HEADER`."""
    title = results["task_facts"][cell["task_name"]]["title"]
    return [title, START_NAMES[cell["initialization"]], cell["variant"], *configuration_texts(cell)]


def missing_table(results: Results) -> Table:
    """The cells without a result, seeds of the same cause together."""
    seeds: dict[tuple[str, ...], list[str]] = defaultdict(list)
    for cell in results["missing"]:
        seeds[*_cell_texts(results, cell), cell["cause"]].append(str(cell["seed"]))
    rows = [[*cell, ", ".join(numbers), cause] for (*cell, cause), numbers in seeds.items()]
    return [*_CELL_HEADER, "seeds", "cause"], rows


def failures_table(results: Results) -> Table:
    """Every attempt that failed."""
    rows = [
        [
            *_cell_texts(results, failure),
            str(failure["seed"]),
            "succeeded" if failure["succeeded_later"] else "missing",
            failure["cause"],
        ]
        for failure in results["failures"]
    ]
    return [*_CELL_HEADER, "seed", "then", "cause"], rows


def times_table(results: Results) -> Table:
    """Time of each task's trials: sums, and medians a trial, an epoch and an evaluation."""
    by_task: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for trial in results["trials"]:
        by_task[trial["task_name"]].append(trial)
    total = sum(trial["seconds"] for trial in results["trials"])
    unit, unit_seconds = time_unit(total)
    rows = []
    for name, trials in by_task.items():
        seconds = [trial["seconds"] for trial in trials]
        epochs = [epoch for trial in trials for epoch in trial["epochs"]]
        an_epoch = [statistics.median(epoch[key] for epoch in epochs) for key in ("seconds", "eval_seconds")]
        speed = statistics.median(trial["rows_per_second"] for trial in trials)
        time = [f"{sum(seconds) / unit_seconds:,.2f}", f"{100 * sum(seconds) / total:.1f} %"]
        medians = [f"{value:,.1f}" for value in (statistics.median(seconds), *an_epoch)]
        rows.append([results["task_facts"][name]["title"], f"{len(trials):,}", *time, *medians, f"{speed:,.0f}"])
    rows.append(["all", f"{len(results['trials']):,}", f"{total / unit_seconds:,.2f}", "100.0 %", *[""] * 4])
    header = ["task", "trials", f"time ({unit})", "share", "seconds a trial", "seconds an epoch"]
    return [*header, "seconds an evaluation", "training rows a second"], rows


def overfitting_sentence(results: Results) -> str:
    """Of each chosen configuration, how many seeds overfit and from which epoch on."""
    return "; ".join(
        f"{group.title} ({configuration}): {found or f'none of {num_runs}'}"
        for group, configuration, num_runs, found in _configurations(results)
        if configuration == chosen(results, group)
    )


def overfitting_table(results: Results) -> Table:
    """The configurations of which a seed overfits; the chosen ones have a star."""
    rows = []
    for group, configuration, _, found in _configurations(results):
        if found:
            star = " *" if configuration == chosen(results, group) else ""
            first, last = found.from_epochs[0], found.from_epochs[-1]
            rate, *others = configuration_texts(configuration._asdict())
            row = [
                *(results["task_facts"][group.task_name]["title"], START_NAMES[group.start], group.variant),
                *(f"{rate}{star}", *others),
                f"{len(found.from_epochs)} of {found.num_runs}",
                str(first) if first == last else f"{first} to {last}",
                *(f"{before:.3f} to {after:.3f}" for before, after in (found.eval_loss, found.train_loss)),
                f"{percent(found.score[0])} to {percent(found.score[1])}",
            ]
            rows.append(row)
    figures = ["seeds that overfit", "from epoch", "validation loss", "training loss", "score x 100"]
    return [*_CELL_HEADER, *figures], rows


def _configurations(results: Results) -> Iterator[tuple[Group, Configuration, int, Overfitting | None]]:
    """Every configuration with the number of its runs, and how they overfit."""
    for group in groups(results, tuple(START_NAMES)):
        facts = results["task_facts"][group.task_name]
        for configuration, trials in by_configuration(results, group).items():
            found = overfitting(trials, facts["evaluation_splits"][0], facts["metric"])
            yield group, configuration, len(trials), found
