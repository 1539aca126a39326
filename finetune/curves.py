"""Learning curves: losses and metric of every run, after each epoch and where it was evaluated between epochs."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from common.page import PANEL_WIDTH, clean_axes
from finetune.metrics import METRIC_TITLES
from finetune.plots import (
    GREY,
    SMALL,
    START_NAMES,
    Configuration,
    Panels,
    Trial,
    by_configuration,
    chosen,
    draw_legend,
    draw_title,
    groups,
    new_panel,
)
from finetune.results import Results

_ORANGE, _BLUE = "#d9772b", "#1f6fb4"
_COLUMNS: Final = 3  # small pairs of axes side by side
_ROW_HEIGHT: Final = 1.35  # inches of a pair: its title, losses above, metric below
_TOP, _BOTTOM, _LEFT, _RIGHT = 0.62, 0.3, 0.36, 0.06  # inches around all pairs
_TINY: Final = 5.5  # points


class Curve(NamedTuple):
    """One quantity of one run."""

    epochs: list[float]
    values: list[float]


class Curves(NamedTuple):
    """Those of one configuration's runs, a curve for each seed."""

    train_loss: list[Curve]
    """Means over an epoch, at its end."""
    train_loss_between: list[Curve]
    """Means since the evaluation before, where a run was evaluated between epochs."""
    eval_loss: list[Curve]
    score: list[Curve]
    """x 100."""


def curves_of(trials: Sequence[Trial], facts: Mapping[str, Any]) -> Curves:
    """The curves of one configuration's trials; ``facts`` are the task's."""
    split, metric = facts["evaluation_splits"][0], facts["metric"]
    measured = [sorted([*trial["evaluations"], *trial["epochs"]], key=lambda point: point["epoch"]) for trial in trials]
    return Curves(
        [_curve(trial["epochs"], lambda point: point["train_loss"]) for trial in trials],
        [_curve(trial["evaluations"], lambda point: point["train_loss"]) for trial in trials if trial["evaluations"]],
        [_curve(points, lambda point: point["eval_loss"]) for points in measured],
        [_curve(points, lambda point: 100 * point["metrics"][split][metric]) for points in measured],
    )


def _curve(points: Sequence[Mapping[str, Any]], value) -> Curve:
    return Curve([point["epoch"] for point in points], [value(point) for point in points])


def chosen_panels(results: Results) -> Panels:
    """A panel for the best configuration of every complete task, start and variant; not for random weights."""
    panels = {}
    for group in groups(results):
        best = chosen(results, group)
        if best is not None:
            facts = results["task_facts"][group.task_name]
            panels[group.title] = _large_panel(f"{group.title}\n{best}", facts, by_configuration(results, group)[best])
    return panels


def other_panels(results: Results) -> Panels:
    """A panel of small curves for every task, start and variant: all configurations without a panel of their own."""
    panels = {}
    for group in groups(results, tuple(START_NAMES)):
        shown = None if group.start == "random" else chosen(results, group)
        others = {best: trials for best, trials in by_configuration(results, group).items() if best != shown}
        if others:
            panels[group.title] = _small_panel(group.title, results["task_facts"][group.task_name], others)
    return panels


def _large_panel(title: str, facts: Mapping[str, Any], trials: Sequence[Trial]) -> Figure:
    """Loss above, metric below: a thin line for each seed, a thick one for the median over them."""
    figure = new_panel(3.5)
    losses, scores = figure.subplots(2, 1, sharex=True)
    curves, metric = curves_of(trials, facts), METRIC_TITLES[facts["metric"]]
    _draw_seeds(losses, scores, curves, marker_size=2.0)
    for axes, label, colour, marker, lines in (
        (losses, "training loss", GREY, "s", curves.train_loss),
        (losses, "validation loss", _ORANGE, "o", curves.eval_loss),
        (scores, metric, _BLUE, "o", curves.score),
    ):
        medians = [statistics.median(values) for values in zip(*(line.values for line in lines), strict=True)]
        axes.plot(lines[0].epochs, medians, color=colour, linewidth=2, marker=marker, markersize=4, label=label)
    draw_title(losses, title)
    losses.set_ylabel("loss" if facts["labels"] is None else "loss (nats)", fontsize=8)
    losses.set_ylim(bottom=0)
    scores.set_ylabel(f"{metric} x 100", fontsize=8)
    scores.set_xlabel("epoch", fontsize=8)
    scores.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    scores.set_xlim(curves.eval_loss[0].epochs[0] - 0.4, curves.eval_loss[0].epochs[-1] + 0.4)
    scores.tick_params(labelsize=SMALL)
    for axes in (losses, scores):
        clean_axes(axes)
    draw_legend(figure, losses)
    return figure


def _draw_seeds(losses: Axes, scores: Axes, curves: Curves, marker_size: float) -> None:
    """A thin line for each seed; training losses between epochs are points, since they are means over less."""
    for axes, colour, marker, lines in (
        (losses, GREY, "s", curves.train_loss),
        (losses, _ORANGE, "o", curves.eval_loss),
        (scores, _BLUE, "o", curves.score),
    ):
        for line in lines:
            axes.plot(*line, color=colour, linewidth=0.7, alpha=0.45, marker=marker, markersize=marker_size)
    for line in curves.train_loss_between:
        losses.plot(*line, color=GREY, linestyle="", alpha=0.6, marker="s", markersize=marker_size, markeredgewidth=0)


def _small_panel(title: str, facts: Mapping[str, Any], trials_of: Mapping[Configuration, Sequence[Trial]]) -> Figure:
    """A pair of small axes for each configuration, losses above and metric below, with scales in common.

    Their places are computed and not left to a layout engine, which would take minutes for all of a large grid's.
    """
    rows = -(-len(trials_of) // _COLUMNS)
    height = _TOP + _BOTTOM + rows * _ROW_HEIGHT
    figure = Figure(figsize=(PANEL_WIDTH, height))
    pairs = [_pair(figure, height, index) for index in range(len(trials_of))]
    for (losses, scores), (configuration, trials) in zip(pairs, trials_of.items(), strict=True):
        _draw_seeds(losses, scores, curves_of(trials, facts), marker_size=1.2)
        losses.set_title(str(configuration), loc="left", fontsize=_TINY + 0.5, pad=2)
        scores.set_xlim(0, configuration.num_epochs + 0.4)
    _share_scales(pairs)
    figure.text(0.02, 1 - 0.08 / height, title, va="top", fontsize=9, fontweight="bold")
    metric = f"{METRIC_TITLES[facts['metric']]} x 100"
    names = {"training loss": GREY, "validation loss": _ORANGE, metric: _BLUE}
    handles = [Line2D([], [], color=colour, label=name, linewidth=1.5) for name, colour in names.items()]
    place = (0.0, 1 - 0.24 / height)
    figure.legend(handles=handles, loc="upper left", bbox_to_anchor=place, ncols=3, frameon=False, fontsize=SMALL)
    figure.text(0.5, 0.06 / height, "epoch", ha="center", fontsize=SMALL)
    return figure


def _pair(figure: Figure, height: float, index: int) -> tuple[Axes, Axes]:
    """Axes of losses, and below them of the metric, at the configuration's place in the panel."""
    row, column = divmod(index, _COLUMNS)
    gap = 0.08
    width = (PANEL_WIDTH - _LEFT - _RIGHT - (_COLUMNS - 1) * gap) / _COLUMNS
    left, top = _LEFT + column * (width + gap), height - _TOP - row * _ROW_HEIGHT
    axes_height = (_ROW_HEIGHT - 0.35) / 2
    boxes = [(left, top - part * (axes_height + 0.05) - axes_height) for part in (0, 1)]
    pair = [figure.add_axes((x / PANEL_WIDTH, y / height, width / PANEL_WIDTH, axes_height / height)) for x, y in boxes]
    for axes in pair:
        clean_axes(axes)
        axes.tick_params(labelsize=_TINY, length=1.5, pad=1.5, labelleft=column == 0)
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True, min_n_ticks=1))
    pair[0].tick_params(labelbottom=False)
    return pair[0], pair[1]


def _share_scales(pairs: Sequence[tuple[Axes, Axes]]) -> None:
    """One scale for all losses, from 0, and one for all scores, so that configurations compare at a glance."""
    highest_loss = max(losses.get_ylim()[1] for losses, _ in pairs)
    lowest, highest = min(s.get_ylim()[0] for _, s in pairs), max(s.get_ylim()[1] for _, s in pairs)
    for losses, scores in pairs:
        losses.set_ylim(0, highest_loss)
        losses.set_xlim(scores.get_xlim())
        scores.set_ylim(lowest, highest)
