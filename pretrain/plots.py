"""The figures of a report on runs: loss and learning rate, throughput, and where the time went."""

import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator, ScalarFormatter

from common.page import clean_axes, time_unit
from pretrain.runs import Run

# Okabe and Ito's colours, which people with any colour vision can tell apart.
COLOURS: Final = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS: Final = "osD^vPX"
GREY: Final = "#777777"
_PARTS: Final = {  # of Run.spent_seconds
    "training": "#0072B2",
    "data_wait": "#D55E00",
    "validation": "#009E73",
    "checkpoints": "#CC79A7",
    "exports": "#56B4E9",
    "compile": "#E69F00",
    "micro_batch_search": "#F0E442",
    "starting": "#BBBBBB",
}
_SIZES: Final = {"markersize": 3.5, "linewidth": 1.2}
_MOST_MARKERS: Final = 30
_THROUGHPUT_POINTS: Final = 150
_PANEL_WIDTH: Final = 7.2  # inches
_MARGIN_WIDTH: Final = 1.4  # inches, for the published losses' names


@dataclass(frozen=True)
class PublishedLoss:
    """A row of Table 2 of Izsak, Berchansky, Levy (EMNLP 2021): 24 hours on 8 Titan-V."""

    name: str
    train_batch_size: int
    learning_rate: float
    warmup_percent: float
    schedule_days: float
    loss: float
    """Validation loss in nats, after 24 hours."""


PUBLISHED_HOURS: Final = 24
PUBLISHED: Final = (
    PublishedLoss("24hBERT", 4096, 2e-3, 6.0, 1.0, 1.717),
    PublishedLoss("BERT-base settings", 256, 1e-4, 11.1, 3.0, 2.050),
    PublishedLoss("BERT-large settings", 256, 1e-4, 11.1, 8.3, 2.318),
)
PUBLISHED_SEARCH: Final = (
    PublishedLoss("24hBERT, 1st of its search", 4096, 2e-3, 6.0, 1.0, 1.717),
    PublishedLoss("24hBERT, 2nd", 4096, 1e-3, 2.0, 1.0, 1.717),
    PublishedLoss("24hBERT, 3rd", 4096, 1e-3, 6.0, 1.0, 1.720),
    PublishedLoss("24hBERT, 4th", 8192, 1e-3, 6.0, 1.0, 1.722),
    PublishedLoss("24hBERT, 5th", 4096, 2e-3, 4.0, 1.0, 1.723),
    *PUBLISHED[1:],
)
"""All rows of that table: the best of its 108 configurations, and BERT's own settings."""


def shows_published(runs: Sequence[Run]) -> bool:
    """Whether the published losses fit the time axis of these runs: one has gone on for about as long."""
    return max(run.elapsed_seconds for run in runs) >= 0.95 * PUBLISHED_HOURS * 3600


def losses_figure(runs: Sequence[Run]) -> Figure:
    """Validation loss against time, and the learning rate under it.

    The loss has a logarithmic axis: runs differ at its low end, where a linear one would have them as one line.
    """
    published = shows_published(runs)
    figure = Figure(figsize=(_PANEL_WIDTH + _MARGIN_WIDTH * published, 5.0), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=(5, 2))
    unit, unit_seconds = _unit(runs)
    for run, style in _styled(runs):
        times = [point.elapsed_seconds / unit_seconds for point in run.validation]
        every = -(-len(times) // _MOST_MARKERS) or 1
        losses.plot(times, [point.loss for point in run.validation], markevery=every, **style)
        times = [point.elapsed_seconds / unit_seconds for point in run.train]
        rates.plot(times, [point.learning_rate for point in run.train], **{**style, "marker": ""})
    log_losses(losses)
    if published:
        _mark_published(losses, unit_seconds)
    losses.set_ylabel("validation loss (nats, log scale)")
    rates.set_ylabel("learning rate")
    rates.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    rates.set_ylim(bottom=0)
    _finish(figure, runs, unit, unit_seconds)
    return figure


def log_losses(axes: Axes) -> None:
    """A logarithmic axis of losses, which are read as plain numbers."""
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
    axes.tick_params(axis="y", labelsize=8)
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_locator(NullLocator())


def throughput_figure(runs: Sequence[Run]) -> Figure:
    """Sequences a second over time: medians of neighbouring points where there are very many."""
    figure = Figure(figsize=(_PANEL_WIDTH, 3.0), layout="constrained")
    axes = figure.subplots()
    unit, unit_seconds = _unit(runs)
    for run, style in _styled(runs):
        stride = -(-len(run.train) // _THROUGHPUT_POINTS)
        groups = [run.train[start : start + stride] for start in range(0, len(run.train), stride or 1)]
        times = [statistics.fmean(point.elapsed_seconds for point in group) / unit_seconds for group in groups]
        speeds = [statistics.median(point.sequences_per_second for point in group) for group in groups]
        axes.plot(times, speeds, markevery=0.1, **style)
    axes.set_ylabel("sequences a second")
    axes.set_ylim(bottom=0)
    _finish(figure, runs, unit, unit_seconds)
    return figure


def spent_figure(runs: Sequence[Run]) -> Figure:
    """A bar for each run: the parts of its time; what does not count against the budget is named beside it.

    Args:
        runs: those that tell of the parts; at least one.
    """
    figure = Figure(figsize=(_PANEL_WIDTH, 1.1 + 0.42 * len(runs)), layout="constrained")
    axes = figure.subplots()
    for place, run in enumerate(runs):
        left, total = 0.0, sum(run.spent_seconds.values()) or 1.0
        for part, colour in _PARTS.items():
            share = 100 * run.spent_seconds.get(part, 0.0) / total
            axes.barh(place, share, 0.62, left, color=colour, edgecolor="white", linewidth=0.4)
            left += share
        beside = f"of {duration(run.elapsed_seconds)}\n+ closing {duration(run.closing_seconds)}"
        beside += f", lost {duration(run.lost_seconds)}" if run.lost_seconds else ""
        axes.annotate(beside, (100, place), (5, 0), textcoords="offset points", va="center", fontsize=7.5)
    present = [part for part in _PARTS if any(run.spent_seconds.get(part) for run in runs)]
    handles = [axes.barh(0, 0, color=_PARTS[part]) for part in present]
    labels = [part.replace("_", " ") for part in present]
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    axes.set_yticks(range(len(runs)), [plain_label(run.name) for run in runs], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the elapsed time (%)")
    clean_axes(axes, grid="x")
    return figure


def duration(seconds: float) -> str:
    """In the unit that suits its length."""
    if seconds >= 2 * 3600:
        return f"{seconds / 3600:.2f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 120 else f"{seconds:.1f} s"


def _unit(runs: Sequence[Run]) -> tuple[str, float]:
    return time_unit(max(run.elapsed_seconds for run in runs))


def _styled(runs: Sequence[Run]) -> list[tuple[Run, dict[str, Any]]]:
    """Every run with a look of its own: colours and markers first, then other lines."""
    looks = itertools.product(("-", "--", ":", "-."), zip(COLOURS, _MARKERS, strict=True))
    return [
        (run, {"color": colour, "marker": marker, "linestyle": line, "label": plain_label(run.name), **_SIZES})
        for run, (line, (colour, marker)) in zip(runs, itertools.cycle(looks), strict=False)
    ]


def _finish(figure: Figure, runs: Sequence[Run], unit: str, unit_seconds: float) -> None:
    """What the figures over time have in common: the budgets' ends, the time axis, the legend above."""
    longest = max(run.elapsed_seconds for run in runs)
    budgets = {run.time_budget_seconds for run in runs if 0 < (run.time_budget_seconds or 0) <= 1.1 * longest}
    reach = 1.02 * max(longest, *budgets, 0)
    for axes in figure.axes:
        for budget in budgets:
            axes.axvline(budget / unit_seconds, color=GREY, linewidth=0.9, linestyle=":", zorder=0)
        clean_axes(axes)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if budgets:
        handles.append(figure.axes[0].axvline(budgets.pop() / unit_seconds, color=GREY, linewidth=0.9, linestyle=":"))
        labels.append("end of the time budget")
    figure.axes[-1].set_xlim(0, reach / unit_seconds)
    figure.axes[-1].set_xlabel(f"wall-clock time ({unit})")
    figure.legend(handles, labels, loc="outside upper left", ncols=3, frameon=False, fontsize=8)


def _mark_published(axes: Axes, unit_seconds: float) -> None:
    """The published losses where their 24 hours end, named in the right margin, each name clear of the next."""
    place = PUBLISHED_HOURS * 3600 / unit_seconds
    axes.plot([place] * len(PUBLISHED), [published.loss for published in PUBLISHED], "k*", markersize=8, linestyle="")
    axes.get_ylim()  # settles the limits before heights are taken from them
    height = -1.0
    for published in PUBLISHED:
        _, own_height = axes.transAxes.inverted().transform(axes.transData.transform((place, published.loss)))
        height = max(own_height, height + 0.06)
        axes.annotate(
            f"{published.loss:.3f} {published.name}",
            (place, published.loss),
            (1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=7.5,
            arrowprops={"arrowstyle": "-", "color": GREY, "linewidth": 0.6},
        )
    axes.text(1.04, height + 0.07, "published:", transform=axes.transAxes, va="center", fontsize=7.5, style="italic")


def plain_label(name: str) -> str:
    """A name as it is: without TeX, and in the legend even if it begins with an underscore."""
    name = name.replace("$", r"\$")
    return f"\N{ZERO WIDTH SPACE}{name}" if name.startswith("_") else name
