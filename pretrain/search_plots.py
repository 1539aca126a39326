"""The figures of a search: final losses by value, every run's curve, and the importance of each hyperparameter.

All of them are drawn from the content of ``results.json`` alone.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.page import PANEL_WIDTH, clean_axes, time_unit
from pretrain.plots import COLOURS, GREY, log_losses, plain_label
from pretrain.search_results import Results, parameters_text, titles, value_text

_NUM_NAMED: Final = 3  # of the best runs' curves
_WIDTH: Final = 8.4  # inches, of a figure without panels
_GOLDEN: Final = (math.sqrt(5) - 1) / 2  # its multiples lie evenly between 0 and 1, however many there are
_JITTER: Final = 0.34  # of the distance between two values
_DIVERGED: Final = "#C00000"
_DASHES: Final = ("--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
_LOSS: Final = "final validation loss (nats)"


def value_panels(results: Results) -> dict[str, Figure]:
    """Figure 1 of the paper: a panel for each hyperparameter, each finished run a point, the medians strokes."""
    losses = [run["final_loss"] for run in results["finished"]]
    if not losses:
        return {}
    margin = 0.06 * (max(losses) - min(losses)) or 0.01
    panels = {}
    for name, title in titles(results["search"]["space"]).items():
        figure = Figure(figsize=(PANEL_WIDTH, 3.2), layout="constrained")
        axes = figure.subplots()
        domain = results["search"]["space"][name]
        if isinstance(domain, Mapping):
            _scatter(axes, results["values"][name], domain)
        else:
            _strips(axes, results["values"][name])
        axes.set_ylim(min(losses) - margin, max(losses) + margin)
        axes.yaxis.set_major_locator(MaxNLocator(7))
        axes.set_title(plain_label(title), loc="left", fontsize=9, fontweight="bold")
        axes.set_ylabel(_LOSS, fontsize=8)
        axes.tick_params(labelsize=8)
        clean_axes(axes)
        panels[title] = figure
    return panels


def _strips(axes: Axes, groups: Sequence[Mapping[str, Any]]) -> None:
    """A column of points for each value of a list, side by side so that equal losses stay visible."""
    for place, group in enumerate(groups):
        offsets = [_JITTER * (2 * (index * _GOLDEN % 1) - 1) for index in range(len(group["losses"]))]
        places = [place + offset * min(1.0, len(offsets) / 8) for offset in offsets]
        axes.scatter(places, group["losses"], s=16, color=COLOURS[0], alpha=0.6, linewidths=0, clip_on=False)
        if group["median"] is not None:
            axes.hlines(group["median"], place - 0.4, place + 0.4, color=COLOURS[1], linewidth=1.8)
    labels = [f"{value_text(group['value'])}\n({len(group['losses'])})" for group in groups]
    axes.set_xticks(range(len(groups)), [plain_label(label) for label in labels])
    axes.set_xlim(-0.6, len(groups) - 0.4)


def _scatter(axes: Axes, groups: Sequence[Mapping[str, Any]], domain: Mapping[str, Any]) -> None:
    """Of a range: the losses over the values that were tried."""
    points = [(group["value"], loss) for group in groups for loss in group["losses"]]
    axes.scatter(*zip(*points, strict=True), s=16, color=COLOURS[0], alpha=0.6, linewidths=0, clip_on=False)
    if domain["log"]:
        axes.set_xscale("log")
    axes.set_xlim(domain["low"], domain["high"])


def curves_figure(results: Results) -> Figure | None:
    """Figure 2 of the paper: validation loss over the run, and beside it what the better half does in the second half.

    None before the first validation.
    """
    drawn = [run for run in results["runs"] if run["curve"]] + [run for run in results["references"] if run["curve"]]
    if not drawn:
        return None
    ends = _better_half(results)
    figure = Figure(figsize=(_WIDTH, 4.6), layout="constrained")
    whole, *zoomed = figure.subplots(1, 2 if ends else 1, squeeze=False, width_ratios=(3, 2) if ends else None)[0]
    unit, scale = _axis_unit(results)
    total = results["search"]["total"] / scale
    losses = [loss for run in drawn if run.get("state") != "diverged" for _, loss in run["curve"]]
    losses = losses or [loss for run in drawn for _, loss in run["curve"]]
    whole.set_ylim(0.97 * min(losses), 1.03 * max(losses))
    whole.set_xlim(0, 1.02 * total)
    log_losses(whole)
    whole.set_ylabel("validation loss (nats, log scale)")
    for axes in zoomed:
        low, high = min(ends), max(ends)
        margin = 0.05 * (high - low) or 0.01
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlim(total / 2, 1.01 * total)
        axes.set_title("second half, at the scale of the better finished runs", loc="left", fontsize=8)
    for axes in (whole, *zoomed):
        _draw_curves(axes, results, scale)
        _draw_rungs(axes, results, total, named=axes is whole)
        axes.tick_params(labelsize=8)
        axes.set_xlabel("steps" if unit == "steps" else f"time of its budget ({unit})")
        clean_axes(axes)
    handles, labels = whole.get_legend_handles_labels()  # the best run is drawn last, but named first
    figure.legend(handles[::-1], labels[::-1], loc="outside upper left", ncols=2, frameon=False, fontsize=7.5)
    return figure


def _axis_unit(results: Results) -> tuple[str, float]:
    if results["search"]["unit"] == "steps":
        return "steps", 1.0
    return time_unit(results["search"]["total"])


def _better_half(results: Results) -> list[float]:
    """The losses of the better half of the finished runs in the second half of their budget."""
    best = [run["run"] for run in results["finished"][: (len(results["finished"]) + 1) // 2]]
    half = results["search"]["total"] / 2
    return [loss for run in results["runs"] if run["run"] in best for place, loss in run["curve"] if place >= half]


def _draw_curves(axes: Axes, results: Results, scale: float) -> None:
    """What was dropped lies at the back, the best run in front."""
    runs = {run["run"]: run for run in results["runs"] if run["curve"]}
    states = {state: [run for run in runs.values() if run["state"] == state] for state in ("dropped", "diverged")}
    others = [run for run in runs.values() if run["state"] not in (*states, "finished")]
    _draw_group(axes, states["dropped"], scale, "dropped", color="#b5b5b5", marker="|", markersize=6)
    _draw_group(axes, states["diverged"], scale, "diverged", color="#e0b0b0", marker="x", markeredgecolor=_DIVERGED)
    _draw_group(axes, others, scale, "not at its end", color=COLOURS[5], marker=".")
    references = [run for run in results["references"] if run["curve"]]
    for run, line in zip(references[::-1], itertools.cycle(_DASHES), strict=False):
        loss = "" if run["final_loss"] is None else f": {run['final_loss']:.3f}"
        label = plain_label(run["name"] + loss)
        axes.plot(*_points(run, scale), color="black", linestyle=line, linewidth=1.3, label=label)
    ranked = [runs[run["run"]] for run in results["finished"] if run["run"] in runs]
    for rank, run in reversed(list(enumerate(ranked))):
        axes.plot(*_points(run, scale), zorder=3, **_finished_style(rank, len(ranked), run))


def _finished_style(rank: int, num_finished: int, run: Mapping[str, Any]) -> dict[str, Any]:
    """The best runs have colours and names of their own, the others' darkness tells their rank."""
    if rank < _NUM_NAMED:
        label = f"{run['run']}: {run['final_loss']:.3f} ({parameters_text(run['parameters'])})"
        return {"color": COLOURS[rank], "linewidth": 1.8, "label": plain_label(label)}
    colour = matplotlib.colormaps["viridis"](0.9 * rank / (num_finished - 1))
    label = "finished, the darker the better" if rank == num_finished - 1 else None
    return {"color": colour, "linewidth": 0.9, "label": label}


def _draw_group(
    axes: Axes, runs: Sequence[Mapping[str, Any]], scale: float, label: str, *, color: Any, **mark: Any
) -> None:
    """Thin lines with a mark where each ends; a diverged run that has left the figure has it at the edge."""
    low, high = axes.get_ylim()
    for index, run in enumerate(runs):
        places, losses = _points(run, scale)
        axes.plot(places, losses, color=color, linewidth=0.7, zorder=1)
        within = axes.get_xlim()[0] <= places[-1] and losses[-1] >= low
        if within and (losses[-1] <= high or run["state"] == "diverged"):
            axes.plot(places[-1], min(losses[-1], high), color=color, zorder=4, clip_on=False, **mark)
        if index == 0:
            axes.plot([], [], color=color, linewidth=0.7, label=label, **mark)


def _points(run: Mapping[str, Any], scale: float) -> tuple[list[float], list[float]]:
    return [place / scale for place, _ in run["curve"]], [loss for _, loss in run["curve"]]


def _draw_rungs(axes: Axes, results: Results, total: float, named: bool) -> None:
    """A line where each rung lies, with its rule along it."""
    for rung in results["rungs"]:
        place = rung["mark"] * total
        axes.axvline(place, color=GREY, linewidth=0.9, linestyle=":", zorder=0)
        if named:
            text, at_top = f"{rung['at']}: {rung['keep']}", axes.get_xaxis_transform()
            axes.text(place + 0.008 * total, 0.99, text, transform=at_top, rotation=90, va="top", fontsize=7.5)


def importance_figure(results: Results) -> Figure | None:
    """A bar for each hyperparameter, the most important one on top; None where it is not known."""
    shares = sorted(results["importance"].items(), key=lambda item: item[1])
    if not shares:
        return None
    names = titles(results["search"]["space"])
    figure = Figure(figsize=(6.0, 0.9 + 0.34 * len(shares)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh([plain_label(names[name]) for name, _ in shares], [100 * share for _, share in shares], 0.62)
    for bar in bars:
        bar.set_color(COLOURS[0])
    axes.bar_label(bars, fmt="%.0f %%", padding=4, fontsize=8)
    axes.set_xlabel("importance (%)")
    axes.set_xlim(0, 1.12 * 100 * shares[-1][1] or 1.0)
    clean_axes(axes, grid="x")
    return figure
