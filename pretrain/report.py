"""The report on one or several runs: tables and figures as Markdown, as one self-contained page and as images."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from common.errors import UserError
from common.folders import errors_of_writing
from common.page import HTML_FILE, MARKDOWN_FILE, Document, Plot, write_documents
from pretrain.plots import (
    PUBLISHED,
    PUBLISHED_HOURS,
    PublishedLoss,
    duration,
    losses_figure,
    shows_published,
    spent_figure,
    throughput_figure,
)
from pretrain.run_record import COMPLETE
from pretrain.runs import Run, read_runs

UNKNOWN: Final = "-"
_PLOTS: Final = ("losses", "throughput", "time")


def write_report(run_folders: Sequence[Path], output_dir: Path, price_per_gpu_hour: float | None = None) -> None:
    """Write ``report.md``, ``report.html`` and the images into ``output_dir``; an earlier report there is replaced.

    Args:
        run_folders: of runs that have ended, were stopped or are still going.
        output_dir: a folder of its own, made if need be.
        price_per_gpu_hour: of one device, in any currency; without it there is no cost.

    Raises:
        UserError: a run can't be read, the price is none, or the output folder holds something else.
    """
    check_price(price_per_gpu_hour)
    _check_replaceable(output_dir)
    runs = read_runs(run_folders)
    plots = _plots(runs)

    def fill(document: Document) -> None:
        _add_results(document, runs)
        for plot in plots:
            document.plot(plot)
        _add_parts(document, runs)
        _add_settings(document, runs)
        _add_cost(document, runs, price_per_gpu_hour)
        add_published(document, PUBLISHED)

    title = f"Pretraining: {runs[0].name}" if len(runs) == 1 else f"Pretraining: {len(runs)} runs"
    with errors_of_writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        write_documents(output_dir, title, plots, fill)


def check_price(price_per_gpu_hour: float | None) -> None:
    """Refuse what is no price.

    Raises:
        UserError: it is negative, or no number.
    """
    if price_per_gpu_hour is not None and not 0 <= price_per_gpu_hour < math.inf:
        raise UserError(f"price_per_gpu_hour must be at least 0, not {price_per_gpu_hour}")


def _check_replaceable(folder: Path) -> None:
    """Refuse to write over what is not an earlier report."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: give another --output_dir")
    ours = {MARKDOWN_FILE, HTML_FILE, *(f"{name}.png" for name in _PLOTS)}
    present = {path.name for path in folder.glob("[!.]*")}
    if foreign := sorted(present - ours):
        raise UserError(f"{folder} holds {foreign[0]}, which is no part of such a report: give another --output_dir")


def _plots(runs: Sequence[Run]) -> list[Plot]:
    losses, throughput, time = _PLOTS
    caption = "Validation loss against wall-clock time, and the learning rate under it."
    if shows_published(runs):
        caption += " Stars: published losses, of other data and hardware; see the end of this report."
    plots = [
        Plot(losses, "Loss against time", losses_figure(runs), caption),
        Plot(
            throughput,
            "Throughput",
            throughput_figure(runs),
            "Sequences a second while steps are made: validation and checkpoints are no part of it.",
        ),
    ]
    if ended := [run for run in runs if run.spent_seconds]:
        caption = "Shares of the time that counts against the budget, and what does not count beside them."
        plots.append(Plot(time, "Where the time went", spent_figure(ended), caption))
    return plots


def _add_results(document: Document, runs: Sequence[Run]) -> None:
    header = ["run", "validation loss", "perplexity", "accuracy", "steps", "sequences", "epochs", "time", "stopped by"]
    document.table(header, [[run.name, *_validation(run), *_course(run)] for run in runs])
    document.paragraph(
        "Validation loss: mean cross-entropy of the held-out set's masked tokens, in nats; perplexity: its exponential;"
        " accuracy: share of these tokens that are predicted right. Losses of other data, tokenizers or held-out sets"
        f" can't be compared with these. “{UNKNOWN}”: not recorded, or not yet."
    )
    for run in runs:
        for note in _notes(run):
            document.paragraph(note)
    if warning := _held_out_warning(runs):
        document.paragraph(warning)


def _validation(run: Run) -> list[str]:
    """Loss, perplexity and accuracy at the end, or at the last validation so far with its step."""
    if run.final_loss is not None:
        return [f"{run.final_loss:.4f}", perplexity(run.final_loss), _percent(run.final_accuracy)]
    if not run.validation:
        return [UNKNOWN] * 3
    last = run.validation[-1]
    return [f"{last.loss:.4f} (step {last.step:,})", perplexity(last.loss), _percent(last.accuracy)]


def _course(run: Run) -> list[str]:
    return [
        f"{run.steps:,}",
        f"{run.sequences:,}",
        UNKNOWN if run.epochs is None else f"{run.epochs:.3g}",
        duration(run.elapsed_seconds),
        run.stopped_by or "no end yet",
    ]


def _notes(run: Run) -> list[str]:
    if run.stopped_by is None:
        last = f"step {run.steps:,}, {duration(run.elapsed_seconds)}"
        phase = f"; the phase is {run.phase}" if run.phase else ""
        return [f"{run.name} has no summary: it is still going, or was killed. Its record ends at {last}{phase}."]
    notes = [f"{run.name}: {run.stopped_because}"] if run.stopped_because else []
    if run.stopped_by not in COMPLETE:
        notes.append(f"{run.name} has not come to its end ({run.stopped_by}); the same command goes on with it.")
    return notes


def _held_out_warning(runs: Sequence[Run]) -> str | None:
    """Which runs have losses of which text, where these differ."""
    names: dict[str | None, list[str]] = {}
    for run in runs:
        names.setdefault(run.manifest_sha256, []).append(run.name)
    if len(names) < 2:
        return None
    groups = [
        f"{', '.join(group)} ({f'manifest {sha256[:8]}' if sha256 else 'data folder not known yet'})"
        for sha256, group in names.items()
    ]
    return (
        "Warning: these runs are of different data folders, so their losses are of different held-out text and can't"
        f" be compared: {'; '.join(groups)}."
    )


def _add_parts(document: Document, runs: Sequence[Run]) -> None:
    parts = list(dict.fromkeys(part for run in runs for part, seconds in run.spent_seconds.items() if seconds))
    if not parts:
        return
    header = ["run", *(part.replace("_", " ") for part in parts), "elapsed", "closing", "lost"]
    rows = [
        [
            run.name,
            *(duration(run.spent_seconds.get(part, 0.0)) for part in parts),
            *map(duration, (run.elapsed_seconds, run.closing_seconds, run.lost_seconds)),
        ]
        for run in runs
        if run.spent_seconds
    ]
    document.table(header, rows)
    untold = [run.name for run in runs if not run.spent_seconds]
    document.paragraph(
        "Closing: the last checkpoint, validation and export, after the budget's end. Lost: work that kills have"
        " destroyed. Neither counts against the budget."
        + (f" The parts are not known yet of: {', '.join(untold)}." if untold else "")
    )


def _add_settings(document: Document, runs: Sequence[Run]) -> None:
    document.heading("Settings")
    header = ["run", "model", "parameters", "hardware", "budget", "train batch", "peak learning rate"]
    rows = [
        [
            run.name,
            run.model or UNKNOWN,
            f"{run.architecture.num_parameters / 1e6:,.1f} M" if run.architecture else UNKNOWN,
            run.hardware or UNKNOWN,
            run.budget,
            f"{run.train_batch_size:,}",
            f"{run.learning_rate:g}",
        ]
        for run in runs
    ]
    document.table(header, rows)


def _add_cost(document: Document, runs: Sequence[Run], price: float | None) -> None:
    document.heading("Speed and cost")
    header = ["run", "sequences a second", "utilisation", "GPU-hours", *(["cost"] if price is not None else [])]
    rows = []
    for run in runs:
        hours = run.device_hours
        row = [run.name, _median_speed(run), _percent(run.median_of("flop_utilisation")), amount(hours)]
        if price is not None:
            row.append(amount(hours and price * hours))
        rows.append(row)
    document.table(header, rows)
    document.paragraph(
        "Sequences a second and utilisation (the model's operations over what the hardware could do in that time) are"
        " medians over the lines of the log. GPU-hours: number of devices, as of the last start, x (elapsed + closing"
        " + lost) time; without a GPU, a device is a process."
        + (f" Cost: GPU-hours x {price:g} per GPU-hour, in that price's currency." if price is not None else "")
        + " Not counted: time between starts, the start of the processes before the clock runs, preparing the data,"
        " storage."
    )


def add_published(document: Document, published: Sequence[PublishedLoss]) -> None:
    """A section on losses of the paper, with what forbids to compare them."""
    document.heading("Published")
    header = ["", "validation loss", "train batch", "peak learning rate", "warmup", "schedule"]
    rows = [
        [
            row.name,
            f"{row.loss:.3f}",
            f"{row.train_batch_size:,}",
            f"{row.learning_rate:g}",
            f"{row.warmup_percent:g} %",
            f"{row.schedule_days:g} d",
        ]
        for row in published
    ]
    document.table(header, rows)
    document.paragraph(
        f"For orientation only: after {PUBLISHED_HOURS} hours on 8 Titan-V (12 GB), from Table 2 of “How to Train BERT"
        " with an Academic Budget” (Izsak, Berchansky, Levy, EMNLP 2021). They are losses of that paper's own data,"
        " tokenizer and held-out set: not comparable with those of this report."
    )


def _median_speed(run: Run) -> str:
    speed = run.median_of("sequences_per_second")
    return UNKNOWN if speed is None else f"{speed:,.1f}"


def amount(value: float | None) -> str:
    """Of hours or money."""
    if value is None:
        return UNKNOWN
    return f"{value:,.2f}" if value >= 1 else f"{value:.3g}"


def perplexity(loss: float) -> str:
    """The exponential of a loss in nats."""
    return f"{math.exp(loss):,.2f}" if loss < 100 else "over e^100"


def _percent(share: float | None) -> str:
    return UNKNOWN if share is None else f"{100 * share:.1f} %"
