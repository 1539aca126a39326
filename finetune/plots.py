"""The report's two plots: every seed's score, and how pretraining went."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from common.page import clean_axes, time_unit
from finetune.metrics import METRIC_TITLES
from finetune.tasks import TASKS

_COLOURS: Final = {"pretrained": "#1f6fb4", "random": "#d9772b"}
_NAMES: Final = {"pretrained": "pretrained", "random": "random weights"}
_GREY: Final = "#777777"
_PANELS_PER_ROW: Final = 3


def scores_figure(trials: Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per task, one column per configuration: every seed a point, the median a line.

    Args:
        trials: as in ``results.json``; at least one.
    """
    task_names = list(dict.fromkeys(trial["task_name"] for trial in trials))
    num_columns = min(_PANELS_PER_ROW, len(task_names))
    num_rows = -(-len(task_names) // num_columns)
    figure = Figure(figsize=(3.6 * num_columns, 3.2 * num_rows), layout="constrained")
    panels = list(figure.subplots(num_rows, num_columns, squeeze=False).flat)
    for axes, task_name in zip(panels, task_names, strict=False):
        _score_panel(axes, task_name, [trial for trial in trials if trial["task_name"] == task_name])
    for axes in panels[len(task_names) :]:
        axes.remove()
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2, frameon=False)
    return figure


def _score_panel(axes: Axes, task_name: str, trials: Sequence[Mapping[str, Any]]) -> None:
    configurations = list(dict.fromkeys(_configuration(trial) for trial in trials))
    initializations = [name for name in _COLOURS if any(trial["initialization"] == name for trial in trials)]
    for index, initialization in enumerate(initializations):
        colour, label = _COLOURS[initialization], _NAMES[initialization]
        for column, configuration in enumerate(configurations):
            scores = [
                100 * trial["score"]
                for trial in trials
                if trial["initialization"] == initialization and _configuration(trial) == configuration
            ]
            if scores:
                place = column + 0.36 * (index - (len(initializations) - 1) / 2)
                _score_group(axes, place, scores, colour, label)
                label = None  # one entry in the legend
    task = TASKS[task_name]
    axes.set_title(task.title + (" (synthetic)" if task.synthetic else ""), loc="left", fontsize=10)
    axes.set_ylabel(f"{METRIC_TITLES[task.selected_by]} x 100")
    many = len(configurations) > 4
    labels = [configuration.replace("\n", ", ") for configuration in configurations] if many else configurations
    axes.set_xticks(range(len(configurations)), labels, fontsize=7, rotation=90 if many else 0)
    axes.set_xlim(-0.6, len(configurations) - 0.4)
    clean_axes(axes)


def _score_group(axes: Axes, place: float, scores: Sequence[float], colour: str, label: str | None) -> None:
    """The seeds of one configuration side by side, so that equal scores stay visible, and their median."""
    offsets = [0.05 * (index - (len(scores) - 1) / 2) for index in range(len(scores))]
    places = [place + offset for offset in offsets]
    axes.scatter(places, scores, s=18, color=colour, alpha=0.75, linewidths=0, label=label)
    axes.hlines(statistics.median(scores), place - 0.15, place + 0.15, color=colour, linewidth=1.5)


def _configuration(trial: Mapping[str, Any]) -> str:
    return f"lr {trial['learning_rate']:.1e}\nbatch {trial['batch_size']}\nepochs {trial['num_epochs']}"


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
