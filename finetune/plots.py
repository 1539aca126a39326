"""The report's figures: every seed's score, the grid's medians, and how pretraining went.

All of them are drawn from the content of ``results.json`` alone. A task's panel is a small figure of its own, so that a
page can lay panels out as its width allows; each variant has its own.
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
GREY: Final = "#777777"
SMALL: Final = 7.5  # points
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


class Group(NamedTuple):
    """The trials that a panel shows: one task's, from one start, in one variant."""

    task_name: str
    start: str
    variant: str
    title: str


def groups(results: Results, starts: Sequence[str] = ("pretrained", "mnli")) -> list[Group]:
    """What has trials, task by task."""
    present = {(trial["task_name"], trial["initialization"], trial["variant"]) for trial in results["trials"]}
    from_start = {"pretrained": "", "mnli": " from MNLI", "random": " from random weights"}
    several = len(results["variants"]) > 1
    return [
        Group(name, start, variant, f"{title}{from_start[start]}" + (f", {variant}" if several else ""))
        for name, title in _titles(results).items()
        for variant in results["variants"]
        for start in starts
        if (name, start, variant) in present
    ]


def by_configuration(results: Results, group: Group) -> dict[Configuration, list[Trial]]:
    """The group's trials, one per seed, in the grid's order."""
    trials: dict[Configuration, list[Trial]] = defaultdict(list)
    for trial in results["trials"]:
        if (trial["task_name"], trial["initialization"], trial["variant"]) == group[:3]:
            trials[Configuration.of(trial)].append(trial)
    return trials


def chosen(results: Results, group: Group) -> Configuration | None:
    """The group's best configuration; None where its task is not complete, or it has no summary of its own."""
    task = results["tasks"].get(group.task_name)
    if task is None:
        return None
    of_first = {**task["starts"], "random": task.get("random_baseline")}
    summary = of_first.get(group.start) if group.variant == task["variant"] else task["variants"].get(group.variant)
    if summary is None or summary["initialization"] != group.start:
        return None
    return Configuration.of(summary["best"])


def scores_panels(results: Results) -> Panels:
    """A panel per task and variant, a line per configuration: every seed a point, the median a stroke."""
    panels: dict[tuple[str, str], list[Group]] = defaultdict(list)
    for group in groups(results, tuple(START_NAMES)):
        panels[group.task_name, group.variant].append(group)
    several = len(results["variants"]) > 1
    titles = _titles(results)
    return {
        (title := titles[name] + (f", {variant}" if several else "")): _scores_panel(title, results, of_panel)
        for (name, variant), of_panel in panels.items()
    }


def grid_panels(results: Results) -> Panels:
    """Median per learning rate x (batch size, epochs), for every task and start with more than one configuration."""
    panels = {}
    for group in groups(results):
        trials = by_configuration(results, group)
        if len(trials) > 1:
            metric = metric_title(results, group.task_name)
            panels[group.title] = _grid_panel(
                group.title, metric, len(results["seeds"]), trials, chosen(results, group)
            )
    return panels


def _titles(results: Results) -> dict[str, str]:
    """Of the tasks that have trials."""
    facts = results["task_facts"]
    names = dict.fromkeys(trial["task_name"] for trial in results["trials"])
    return {name: facts[name]["title"] + (" (synthetic)" if facts[name]["synthetic"] else "") for name in names}


def new_panel(height: float) -> Figure:
    """An empty panel, ``height`` inches high."""
    return Figure(figsize=(PANEL_WIDTH, height), layout="constrained")


def draw_title(axes: Axes, text: str) -> None:
    """A panel's title, wrapped to its width."""
    lines = [part for line in text.split("\n") for part in textwrap.wrap(line, _TITLE_WIDTH)]
    axes.set_title("\n".join(lines), loc="left", fontsize=9, fontweight="bold")
    axes.tick_params(labelsize=SMALL)


def draw_legend(figure: Figure, axes: Axes) -> None:
    """What the colours of ``axes`` mean, above the panel."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=SMALL)


def metric_title(results: Results, task_name: str) -> str:
    """The metric that selects a configuration, as tables and axes name it."""
    return METRIC_TITLES[results["task_facts"][task_name]["metric"]]


def _scores_panel(title: str, results: Results, of_panel: Sequence[Group]) -> Figure:
    """``of_panel``: the groups of one task and variant, which differ in their start."""
    trials_of = [by_configuration(results, group) for group in of_panel]
    configurations = list(dict.fromkeys(configuration for trials in trials_of for configuration in trials))
    line_height = _LINE_HEIGHT * (1 + 0.6 * (len(of_panel) - 1))
    figure = new_panel(max(2.5, 1.0 + line_height * len(configurations)))
    axes = figure.subplots()
    for index, (group, trials) in enumerate(zip(of_panel, trials_of, strict=True)):
        label = START_NAMES[group.start]
        for line, configuration in enumerate(configurations):
            scores = [100 * trial["score"] for trial in trials.get(configuration, ())]
            if scores:
                place = line + 0.8 / len(of_panel) * (index - (len(of_panel) - 1) / 2)
                _score_group(axes, place, 0.3 / len(of_panel), scores, group.start, label)
                label = None  # one entry in the legend
    draw_title(axes, title)
    axes.set_xlabel(f"{metric_title(results, of_panel[0].task_name)} x 100", fontsize=8)
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
    _mark_best(axes, chosen(results, of_panel[0]), configurations)
    if len(of_panel) > 1:
        draw_legend(figure, axes)
    return figure


def _score_group(axes: Axes, place: float, reach: float, scores: Sequence[float], start: str, label: str | None):
    """One configuration's seeds, each a little lower, so that equal scores stay visible, and their median."""
    places = np.linspace(place - reach, place + reach, len(scores)) if len(scores) > 1 else [place]
    axes.scatter(
        scores, places, s=14, color=_COLOURS[start], marker=_MARKERS[start], alpha=0.75, linewidths=0, label=label
    )
    median = statistics.median(scores)
    axes.vlines(median, place - 1.3 * reach, place + 1.3 * reach, color=_COLOURS[start], linewidth=1.6)


def _mark_best(axes: Axes, best: Configuration | None, configurations: Sequence[Configuration]) -> None:
    """A band behind the chosen configuration's line, and its name in bold."""
    if best is None or len(configurations) == 1:
        return
    line = configurations.index(best)
    axes.axhspan(line - 0.5, line + 0.5, color="#f0f0f0", linewidth=0, zorder=0)
    axes.get_yticklabels()[line].set_fontweight("bold")


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
    figure = new_panel(1.3 + 0.32 * len(rates))
    axes = figure.subplots()
    axes.set_facecolor("#dddddd")
    axes.imshow(np.ma.masked_invalid(medians), cmap="cividis", aspect="auto")
    _write_medians(axes, medians)
    if best:
        place = columns.index(best[1:]) - 0.47, rates.index(best.learning_rate) - 0.45
        axes.add_patch(Rectangle(place, 0.94, 0.9, fill=False, edgecolor="#d62728", linewidth=2))
    draw_title(axes, f"{title}\nmedian {metric} x 100")
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

    losses.plot(times(train), [event["loss"] for event in train], color=GREY, linewidth=0.9, label="training")
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
            axes.axvline(budget / seconds_per_unit, color=GREY, linewidth=0.8, linestyle=":")
        losses.plot([], [], color=GREY, linewidth=0.8, linestyle=":", label="time budget")
    losses.set_ylabel("masked LM loss (nats)")
    losses.legend(frameon=False)
    rates.set_ylabel("learning rate")
    rates.set_xlabel(f"wall-clock time ({unit})")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes in (losses, rates):
        clean_axes(axes)
    return figure
