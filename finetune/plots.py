"""The report's figures: every seed's score, the grid's medians, learning curves, and how pretraining went.

All of them are drawn from the content of ``results.json`` alone. A task's panel is a small figure of its own, so that a
page can lay panels out as its width allows.
"""

import statistics
import textwrap
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from common.page import PANEL_WIDTH, clean_axes, time_unit
from finetune.metrics import METRIC_TITLES
from finetune.results import Results

START_NAMES: Final = {"pretrained": "pretrained", "mnli": "MNLI model", "random": "random weights"}
_COLOURS: Final = {"pretrained": "#1f6fb4", "mnli": "#009e73", "random": "#d9772b"}
_MARKERS: Final = {"pretrained": "o", "mnli": "^", "random": "s"}
_GREY: Final = "#777777"
_SMALL: Final = 7.5  # points
_LINE_HEIGHT: Final = 0.17  # inches of a configuration's line
_MANY_COLUMNS: Final = 8
_TITLE_WIDTH: Final = 42  # characters

Trial = Mapping[str, Any]
Panels = dict[str, Figure]


class Configuration(NamedTuple):
    """The hyperparameters of a trial."""

    learning_rate: float
    batch_size: int
    num_epochs: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Configuration":
        """Those of a trial, or of a summary's ``best``."""
        return cls(*(values[name] for name in cls._fields))

    def __str__(self) -> str:
        return f"{rate_text(self.learning_rate)} · {self.batch_size} · {self.num_epochs}"


def rate_text(learning_rate: float) -> str:
    """``5e-5`` for 0.00005."""
    mantissa, exponent = f"{learning_rate:e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def scores_panels(results: Results) -> Panels:
    """A panel per task, a line per configuration: every seed a point, the median a stroke."""
    return {title: _scores_panel(title, results, name) for name, title in _titles(results).items()}


def grid_panels(results: Results) -> Panels:
    """Median per learning rate x (batch size, epochs), for every task and start with more than one configuration."""
    panels = {}
    for name, start, title in _tasks_and_starts(results):
        groups = _by_configuration(results, name, start)
        if len(groups) > 1:
            summary = results["tasks"].get(name)
            best = Configuration.of(summary["starts"][start]["best"]) if summary else None
            panels[title] = _grid_panel(title, _metric(results, name), len(results["seeds"]), groups, best)
    return panels


def curves_panels(results: Results) -> Panels:
    """Losses and metric after each epoch, of the best configuration's seeds, for every complete task and start."""
    panels = {}
    for name, start, title in _tasks_and_starts(results):
        if name in results["tasks"]:
            best = Configuration.of(results["tasks"][name]["starts"][start]["best"])
            trials = _by_configuration(results, name, start)[best]
            panels[title] = _curves_panel(f"{title}\n{best}", results["task_facts"][name], trials)
    return panels


def _titles(results: Results) -> dict[str, str]:
    """Of the tasks that have trials."""
    facts = results["task_facts"]
    names = dict.fromkeys(trial["task_name"] for trial in results["trials"])
    return {name: facts[name]["title"] + (" (synthetic)" if facts[name]["synthetic"] else "") for name in names}


def _tasks_and_starts(results: Results) -> list[tuple[str, str, str]]:
    """Task, start and title of what has trials; random weights are left out."""
    present = {(trial["task_name"], trial["initialization"]) for trial in results["trials"]}
    return [
        (name, start, f"{title} from MNLI" if start == "mnli" else title)
        for name, title in _titles(results).items()
        for start in ("pretrained", "mnli")
        if (name, start) in present
    ]


def _by_configuration(results: Results, task_name: str, start: str) -> dict[Configuration, list[Trial]]:
    groups: dict[Configuration, list[Trial]] = defaultdict(list)
    for trial in results["trials"]:
        if (trial["task_name"], trial["initialization"]) == (task_name, start):
            groups[Configuration.of(trial)].append(trial)
    return groups


def _panel(height: float) -> Figure:
    """An empty panel, ``height`` inches high."""
    return Figure(figsize=(PANEL_WIDTH, height), layout="constrained")


def _title(axes: Axes, text: str) -> None:
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, _TITLE_WIDTH)]
    axes.set_title("\n".join(lines), loc="left", fontsize=9, fontweight="bold")
    axes.tick_params(labelsize=_SMALL)


def _legend(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=_SMALL)


def _scores_panel(title: str, results: Results, task_name: str) -> Figure:
    groups = {start: _by_configuration(results, task_name, start) for start in START_NAMES}
    groups = {start: group for start, group in groups.items() if group}
    configurations = list(dict.fromkeys(configuration for group in groups.values() for configuration in group))
    line_height = _LINE_HEIGHT * (1 + 0.6 * (len(groups) - 1))
    figure = _panel(max(2.5, 1.0 + line_height * len(configurations)))
    axes = figure.subplots()
    for index, (start, group) in enumerate(groups.items()):
        label = START_NAMES[start]
        for line, configuration in enumerate(configurations):
            scores = [100 * trial["score"] for trial in group.get(configuration, ())]
            if scores:
                place = line + 0.8 / len(groups) * (index - (len(groups) - 1) / 2)
                _score_group(axes, place, 0.3 / len(groups), scores, start, label)
                label = None  # one entry in the legend
    _title(axes, title)
    axes.set_xlabel(f"{_metric(results, task_name)} x 100", fontsize=8)
    axes.set_ylabel("learning rate · batch · epochs", fontsize=8)
    axes.set_yticks(range(len(configurations)), [str(configuration) for configuration in configurations])
    axes.set_ylim(len(configurations) - 0.4, -0.6)
    axes.xaxis.set_major_locator(MaxNLocator(7))
    axes.tick_params(axis="y", length=0)
    clean_axes(axes, grid="x")
    axes.hlines(
        np.arange(0.5, len(configurations) - 1),
        0,
        1,
        "#eeeeee",
        linewidth=0.6,
        transform=axes.get_yaxis_transform(),
        zorder=0,
    )
    _mark_best(axes, results["tasks"].get(task_name), configurations)
    if len(groups) > 1:
        _legend(figure, axes)
    return figure


def _score_group(axes: Axes, place: float, reach: float, scores: Sequence[float], start: str, label: str | None):
    """One configuration's seeds, each a little lower, so that equal scores stay visible, and their median."""
    places = np.linspace(place - reach, place + reach, len(scores)) if len(scores) > 1 else [place]
    axes.scatter(
        scores, places, s=14, color=_COLOURS[start], marker=_MARKERS[start], alpha=0.75, linewidths=0, label=label
    )
    median = statistics.median(scores)
    axes.vlines(median, place - 1.3 * reach, place + 1.3 * reach, color=_COLOURS[start], linewidth=1.6)


def _mark_best(axes: Axes, summary: Mapping[str, Any] | None, configurations: Sequence[Configuration]) -> None:
    """A band behind the chosen configuration's line, and its name in bold."""
    if summary is None or len(configurations) == 1:
        return
    line = configurations.index(Configuration.of(summary["best"]))
    axes.axhspan(line - 0.5, line + 0.5, color="#f0f0f0", linewidth=0, zorder=0)
    axes.get_yticklabels()[line].set_fontweight("bold")


def _metric(results: Results, task_name: str) -> str:
    return METRIC_TITLES[results["task_facts"][task_name]["metric"]]


def _grid_panel(
    title: str, metric: str, num_seeds: int, groups: Mapping[Configuration, Sequence[Trial]], best: Configuration | None
) -> Figure:
    """A configuration that lacks a seed has no median, and a grey field; ``best`` has a frame."""
    rates = sorted({configuration.learning_rate for configuration in groups})
    columns = sorted({(configuration.batch_size, configuration.num_epochs) for configuration in groups})
    medians = np.full((len(rates), len(columns)), np.nan)
    for configuration, trials in groups.items():
        if len(trials) == num_seeds:
            place = rates.index(configuration.learning_rate), columns.index(configuration[1:])
            medians[place] = 100 * statistics.median(trial["score"] for trial in trials)
    figure = _panel(1.3 + 0.32 * len(rates))
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")
    axes.imshow(np.ma.masked_invalid(medians), cmap="cividis", aspect="auto")
    _write_medians(axes, medians)
    if best:
        place = columns.index(best[1:]) - 0.47, rates.index(best.learning_rate) - 0.45
        axes.add_patch(Rectangle(place, 0.94, 0.9, fill=False, edgecolor="#d62728", linewidth=2))
    _title(axes, f"{title}\nmedian {metric} x 100")
    labels = [f"{batch} · {epochs}" for batch, epochs in columns]
    axes.set_xticks(range(len(columns)), labels, rotation=90 if len(columns) > _MANY_COLUMNS else 0)
    axes.set_yticks(range(len(rates)), [rate_text(rate) for rate in rates])
    axes.tick_params(length=0)
    axes.set_xlabel("batch · epochs", fontsize=8)
    axes.set_ylabel("learning rate", fontsize=8)
    axes.spines[:].set_visible(False)
    return figure


def _write_medians(axes: Axes, medians: np.ndarray) -> None:
    """Each field's figure, readable on its colour."""
    finite = medians[np.isfinite(medians)]
    middle = (finite.min() + finite.max()) / 2 if finite.size else 0.0
    size = 8 if medians.shape[1] <= _MANY_COLUMNS else 6
    for (line, column), median in np.ndenumerate(medians):
        text = f"{median:.1f}" if np.isfinite(median) else "none"
        colour = "white" if median <= middle else "black"
        axes.text(column, line, text, ha="center", va="center", fontsize=size, color=colour)


def _curves_panel(title: str, facts: Mapping[str, Any], trials: Sequence[Trial]) -> Figure:
    """Loss above, metric below: a thin line for each seed, a thick one for the median over them."""
    figure = _panel(3.5)
    losses, scores = figure.subplots(2, 1, sharex=True)
    split, metric = facts["evaluation_splits"][0], facts["metric"]
    epochs = [epoch["epoch"] for epoch in trials[0]["epochs"]]
    series = (
        (losses, "training loss", _GREY, "s", [[epoch["train_loss"] for epoch in trial["epochs"]] for trial in trials]),
        (losses, "validation loss", "#d9772b", "o", [[e["eval_loss"] for e in trial["epochs"]] for trial in trials]),
        (
            scores,
            METRIC_TITLES[metric],
            "#1f6fb4",
            "o",
            [[100 * epoch["metrics"][split][metric] for epoch in trial["epochs"]] for trial in trials],
        ),
    )
    for axes, label, colour, marker, lines in series:
        for line in lines:
            axes.plot(epochs, line, color=colour, linewidth=0.7, alpha=0.45, marker=marker, markersize=2)
        medians = [statistics.median(values) for values in zip(*lines, strict=True)]
        axes.plot(epochs, medians, color=colour, linewidth=2, marker=marker, markersize=4, label=label)
    _title(losses, title)
    losses.set_ylabel("loss" if facts["labels"] is None else "loss (nats)", fontsize=8)
    losses.set_ylim(bottom=0)
    scores.set_ylabel(f"{METRIC_TITLES[metric]} x 100", fontsize=8)
    scores.set_xlabel("epoch", fontsize=8)
    scores.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    scores.set_xlim(epochs[0] - 0.4, epochs[-1] + 0.4)
    scores.tick_params(labelsize=_SMALL)
    for axes in (losses, scores):
        clean_axes(axes)
    _legend(figure, losses)
    return figure


def pretraining_figure(pretraining: Mapping[str, Any]) -> Figure:
    """Loss against time, the learning rate under it, and where the time budget ends.

    Args:
        pretraining: the content of ``pretraining.json``.
    """
    budget = pretraining.get("time_budget_seconds")
    unit, seconds_per_unit = time_unit(budget or pretraining["elapsed_seconds"])
    figure = Figure(figsize=(7.2, 4.4), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    train, validation = pretraining["train"], pretraining["validation"]

    def times(events: Sequence[Mapping[str, Any]]) -> list[float]:
        return [event["elapsed_seconds"] / seconds_per_unit for event in events]

    losses.plot(times(train), [event["loss"] for event in train], color=_GREY, linewidth=0.9, label="training")
    losses.plot(
        times(validation),
        [event["loss"] for event in validation],
        color=_COLOURS["pretrained"],
        marker="o",
        markersize=3.5,
        label="validation",
    )
    rates.plot(times(train), [event["learning_rate"] for event in train], color=_COLOURS["random"], linewidth=1.2)
    if budget:
        for axes in (losses, rates):
            axes.axvline(budget / seconds_per_unit, color=_GREY, linewidth=0.8, linestyle=":")
        losses.plot([], [], color=_GREY, linewidth=0.8, linestyle=":", label="time budget")
    losses.set_ylabel("masked LM loss (nats)")
    losses.legend(frameon=False)
    rates.set_ylabel("learning rate")
    rates.set_xlabel(f"wall-clock time ({unit})")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, rates):
        clean_axes(axes)
    return figure
