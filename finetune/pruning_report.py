"""The report of a pruning: score, size and speed against heads kept, before and after each round."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from common.page import PANEL_WIDTH, Document, Plot, clean_axes, write_documents
from finetune.metrics import METRIC_TITLES

_MB: Final = 1e6
_BLUE: Final = "#1f6fb4"
_ORANGE: Final = "#d9772b"

Results = Mapping[str, Any]
State = Mapping[str, Any]


def write_pruning_report(folder: Path, results: Results) -> None:
    """Write ``report.md``, ``report.html`` and the figure into ``folder``, from the content of ``results.json``."""
    plots = [Plot("pruning", "Against heads kept", _panels(results), _CAPTION)]
    title = f"{results['title']}: {results['model']} without heads that it can do without"
    write_documents(folder, title, plots, lambda document: _add_content(document, results, plots))


_CAPTION: Final = (
    "Each line is a seed, from the model as it was through its rounds (score: development split, after fine-tuning"
    " again); the orange one is the model in this folder."
)

_IMPORTANCE: Final = (
    "of a head: the mean over the training rows of |dL/dg|, g a gate of 1 on its output (Michel, Levy, Neubig 2019),"
    " normalised within its layer; each layer keeps its most important head."
)

_HELD_OUT: Final = "from here on: the model itself was tuned on these rows too. The development split decides nothing."


def _add_content(document: Document, results: Results, plots: Sequence[Plot]) -> None:
    document.paragraph(_statement(results))
    document.table(*_rounds_table(results))
    if len(results["seeds"]) > 1:
        document.paragraph("Median ± standard deviation over the seeds; one that ended earlier counts as it ended.")
    for plot in plots:
        document.plot(plot)
    document.heading("Every seed")
    document.table(*_seeds_table(results))
    document.heading("How")
    document.facts(_facts(results))


def _statement(results: Results) -> str:
    """What has become of the model, in two sentences."""
    before, after = results["before"], _last(results, results["median_seed"])
    if after is before:
        return (
            "Nothing was removed from the median seed's model: not one head could go at a cost of at most"
            f" {results['plan']['tolerance']:g} (metric x 100) on held-out training rows."
        )
    speeds = [f"{after['rows_per_second'][size] / before['rows_per_second'][size]:.2f}" for size in ("1", "32")]
    return (
        f"The median seed's model keeps {after['num_heads']} of {before['num_heads']} heads: {_metric(results)}"
        f" {_percent(before)} before and {_percent(after)} after, on the development split."
        f" Its file has {_megabytes(after)} instead of {_megabytes(before)} MB, and it takes {speeds[0]} times as many"
        f" rows a second at batch 1, {speeds[1]} times as many at batch 32."
    )


def _rounds_table(results: Results) -> tuple[list[str], list[list[str]]]:
    rows = [["before", *_cells([results["before"]])]]
    for number in range(1, max(map(len, results["seeds"].values())) + 1):
        states = [[results["before"], *seed_states][: number + 1][-1] for seed_states in results["seeds"].values()]
        rows.append([f"after round {number}", *_cells(states)])
    return ["", *_columns(results)], rows


def _seeds_table(results: Results) -> tuple[list[str], list[list[str]]]:
    rows = [
        [f"seed {seed}, round {number}", *_cells([state])]
        for seed, states in results["seeds"].items()
        for number, state in enumerate(states, start=1)
    ]
    unchanged = [[f"seed {seed}: nothing removed", *_cells([results["before"]])] for seed in _unchanged(results)]
    return ["", *_columns(results)], rows + unchanged


def _unchanged(results: Results) -> list[str]:
    return [seed for seed, states in results["seeds"].items() if not states]


def _columns(results: Results) -> list[str]:
    return ["heads", "parameters", "file (MB)", _metric(results), "rows/s, batch 1", "rows/s, batch 32"]


def _cells(states: Sequence[State]) -> list[str]:
    """Medians and, of several, deviations."""
    return [
        _spread([state["num_heads"] for state in states], 0),
        _spread([state["parameters"] for state in states], 0),
        _spread([state["file_bytes"] / _MB for state in states], 1),
        _spread([100 * state["score"] for state in states], 1),
        *(_spread([state["rows_per_second"][size] for state in states], 1) for size in ("1", "32")),
    ]


def _spread(values: Sequence[float], digits: int) -> str:
    deviation = f" ± {statistics.stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.median(values):,.{digits}f}{deviation}"


def _facts(results: Results) -> dict[str, str]:
    plan = results["plan"]
    cell, rows = plan["cell"], results["rows"]
    held_out = round(plan["holdout"] * rows["train"])
    threads = f" (threads: {results['num_threads']})" if results["num_threads"] else ""
    how_many = (
        f"as many of the least important ones as cost no more than {plan['tolerance']:g} ({_metric(results)} x 100)"
        f" on {held_out:,} of {rows['train']:,} training rows, which the seed draws; found by bisection."
    )
    again = (
        f"on the other {rows['train'] - held_out:,} rows after each of up to {plan['rounds']} rounds: learning rate"
        f" {cell['learning_rate']:g}, batch {cell['batch_size']}, epochs: {cell['num_epochs']}, {cell['precision']};"
        " the last epoch's score counts."
    )
    return {
        "Importance": _IMPORTANCE,
        "How many": how_many,
        "Held out": _HELD_OUT,
        "Fine-tuned again": again,
        "Speed": f"in {cell['precision']} on {results['device']}{threads}, the same rows for all, of about the median"
        " length; each model is measured in turn, five times, and the median counts.",
        "Model before": f"{results['model']}, tuned from {results['base_model']}.",
    }


def _metric(results: Results) -> str:
    return METRIC_TITLES[results["metric"]]


def _percent(state: State) -> str:
    return f"{100 * state['score']:.1f}"


def _megabytes(state: State) -> str:
    return f"{state['file_bytes'] / _MB:,.1f}"


def _last(results: Results, seed: int) -> State:
    return [results["before"], *results["seeds"][str(seed)]][-1]


def _panels(results: Results) -> dict[str, Figure]:
    """Score, size and speed, each a panel; every seed a line."""
    return {
        "score": _panel(results, f"{_metric(results)}, development split", lambda state: 100 * state["score"]),
        "size": _panel(results, "file (MB)", lambda state: state["file_bytes"] / _MB),
        "speed at batch 1": _panel(results, "rows/s, batch 1", lambda state: state["rows_per_second"]["1"]),
        "speed at batch 32": _panel(results, "rows/s, batch 32", lambda state: state["rows_per_second"]["32"]),
    }


def _panel(results: Results, label: str, value) -> Figure:
    figure = Figure(figsize=(PANEL_WIDTH, 2.8), layout="constrained")
    axes: Axes = figure.subplots()
    for seed, states in results["seeds"].items():
        line = [results["before"], *states]
        is_median = int(seed) == results["median_seed"]
        axes.plot(
            [state["num_heads"] for state in line],
            [value(state) for state in line],
            color=_ORANGE if is_median else _BLUE,
            alpha=1.0 if is_median else 0.5,
            marker="o",
            markersize=3.5,
            linewidth=1.2,
            zorder=3 if is_median else 2,
        )
    axes.set_xlim(0, results["before"]["num_heads"] * 1.03)
    axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set_xlabel("attention heads kept", fontsize=8)
    axes.set_title(label, loc="left", fontsize=9, fontweight="bold")
    axes.tick_params(labelsize=7.5)
    clean_axes(axes)
    return figure
