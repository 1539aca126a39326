"""A plan as people read it: a table of candidates, the recommended one in full, and how sure all of it is."""

import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from pathlib import Path

from common.folders import write_json, write_text
from pretrain.forecast import Forecast
from pretrain.hardware import GOOD_UTILISATION, MODEST_UTILISATION
from pretrain.plan import STEPS_AIMED_AT, TOKENS_A_PARAMETER, Plan, Row

_FEW_STEPS = 5
_WIDTH = 120
_PASSES_OF_BERT = 40  # over its text: Devlin et al. 2019, appendix A.2
_HEAD = "model,parameters,sequences a step,micro-batch,step,steps,tokens a parameter,text passes,memory,remark".split(
    ","
)

_RULE = (
    "The rule: the largest model that sees {tokens:.0f} tokens a parameter, then the batch with the number of "
    "steps nearest to {steps:,}. It is a rule of thumb, not a measurement: nothing here has compared the losses "
    "of two candidates. The {tokens:.0f} are Hoffmann et al.'s (2022) for causal language models, which learn "
    "from every token; a masked one is asked for about 15 % of them, so it may want more. At such a budget one "
    "point is known of masked ones: 24hBERT (Izsak et al. 2021) took BERT-large for 94 million sequences of at "
    "most 128 tokens, 27 to 36 a parameter, and {steps:,} steps of 4,096 sequences; 8,192 did about as well "
    "(validation loss 1.722 and 1.717). A token that comes again in another pass counts like a new one, and learning "
    "rates stay as configured."
)
_CLOSE = (
    "Not sure: by this rule {models} may as well be better, within a factor of two of the line. Run both for a "
    "tenth of the budget and compare."
)
_CLEAR = "No other model here is within a factor of two of the rule's line."
_MEASURED = (
    "Times, memory and disk are from trials of the real run on this machine, {seconds:.0f} s each. What changes "
    "later is not in them: other work on the machine, clocks that fall with heat, steps that fp16 skips."
)
_COMPUTED = (
    "Computed, not measured: a step is assumed to reach {modest:.0%} to {good:.0%} of the maker's rate for dense "
    "matrix products (24hBERT's on a Titan-V, NVIDIA's on an A100), with the model's operations and the data's "
    "own lengths; a minute to start, one and a half to compile; memory by weights, gradients, moments and "
    "activations. Communication between GPUs is left out: on paper it is 1 to 3 % of a step over NVLink, 11 % "
    "over PCIe (docs/performance.md)."
)


def describe_plan(plan: Plan) -> str:
    """The whole of it, as Markdown that reads as plain text, too."""
    processes = f"{plan.num_gpus} process{'es' if plan.num_gpus > 1 else ''} on this machine"
    machine = f"{plan.num_gpus} x {plan.gpu}" if plan.gpu else processes
    recommendation = plan.recommendation
    row, close = recommendation.row, recommendation.close
    told = _COMPUTED if plan.gpu else _MEASURED
    sure = [
        _RULE.format(tokens=TOKENS_A_PARAMETER, steps=STEPS_AIMED_AT),
        _CLOSE.format(models=" and ".join(close)) if close else _CLEAR,
        told.format(seconds=plan.trial_seconds, modest=MODEST_UTILISATION, good=GOOD_UTILISATION),
    ]
    parts = [
        f"# What {plan.time_budget} on {machine} buys",
        _table([_HEAD, *(_cells(row, plan) for row in plan.rows)]),
        f"## Recommended: {row.model}, {row.train_batch_size:,} sequences a step",
        recommendation.reason,
        _details(row, plan),
        f"    {row.options}",
        "## How sure",
        *(textwrap.fill(paragraph, _WIDTH) for paragraph in sure),
    ]
    return "\n\n".join(parts)


def write_plan(plan: Plan, text: str, folder: Path) -> None:
    """Keep it as ``plan.md`` and ``plan.json``."""
    write_text(folder / "plan.md", text + "\n")
    write_json(folder / "plan.json", asdict(plan))


def _cells(row: Row, plan: Plan) -> list[str]:
    parameters = f"{row.parameters / 1e6:,.1f} M" if row.parameters else ""
    head, batch = [row.model, parameters], f"{row.train_batch_size:,}"
    if not row.forecasts:
        return [*head, batch, "", "", "", "", "", "", row.failure or ""]
    return [
        *head,
        batch,
        str(row.forecasts[0].micro_batch_size),
        _span(row, lambda forecast: forecast.durations.step, _seconds),
        _span(row, lambda forecast: forecast.course.steps, "{:,.0f}".format),
        _span(row, lambda forecast: forecast.tokens_per_parameter, _figure),
        _span(row, _passes, _figure),
        _bytes(row.forecasts[0].memory_bytes),
        "; ".join(_remarks(row.forecasts[0], plan)),
    ]


def _remarks(forecast: Forecast, plan: Plan) -> list[str]:
    remarks = []
    if forecast.timed_steps is not None and forecast.timed_steps < _FEW_STEPS:
        remarks.append(f"from {forecast.timed_steps} steps: uncertain")
    if _passes(forecast) > _PASSES_OF_BERT:
        remarks.append(f"more than BERT's own {_PASSES_OF_BERT} passes over its text")
    if plan.free_bytes is not None and forecast.peak_disk_bytes > plan.free_bytes:
        remarks.append(f"needs {_bytes(forecast.peak_disk_bytes)} of disk, {_bytes(plan.free_bytes)} are free")
    return remarks


def _passes(forecast: Forecast) -> float:
    """Over the text where its copies are known, else over the rows."""
    return forecast.epochs if forecast.text_passes is None else forecast.text_passes


def _details(row: Row, plan: Plan) -> str:
    """Name and value, a line each."""
    copies = plan.sample.dupe_factor
    over_rows = _span(row, lambda forecast: forecast.epochs, _figure)
    over_text = _span(row, lambda forecast: forecast.text_passes, _figure) if copies else "unknown"
    per_sequence = f"{plan.sample.tokens_per_sequence:.1f} a sequence"
    first = row.forecasts[0]
    free = "" if plan.free_bytes is None else f"; {_bytes(plan.free_bytes)} are free"
    lines = {
        "steps": _span(row, lambda forecast: forecast.course.steps, "{:,.0f}".format),
        "sequences": _span(row, lambda forecast: forecast.sequences, _count),
        "tokens": f"{_span(row, lambda forecast: forecast.tokens, _count)} ({per_sequence}, without padding)",
        "epochs": f"{over_rows} over {plan.sample.train_rows:,} rows"
        + (f" = {over_text} over the text, of which there are {copies} masked copies" if copies else ""),
        "padding": f"{first.padding_share:.1%} of the computed positions",
        "time": _where_time_goes(first) + (" (at the lower utilisation)" if plan.gpu else ""),
        "memory": f"{_bytes(first.memory_bytes)} a device",
        "disk": f"{_bytes(first.disk_bytes)}, while a checkpoint is written {_bytes(first.peak_disk_bytes)}{free}",
        "closing": _span(row, lambda forecast: forecast.durations.closing, _seconds) + " after the budget",
        "end": _span(row, lambda forecast: forecast.wall_seconds, _end) + " if started now",
    }
    if plan.price_per_gpu_hour is not None:
        cost = _span(row, lambda forecast: forecast.cost, "{:,.2f}".format)
        lines["cost"] = f"{cost} at {plan.price_per_gpu_hour:,.2f} an hour and GPU"
    return "\n".join(f"    {name:<12}{value}" for name, value in lines.items())


def _where_time_goes(forecast: Forecast) -> str:
    durations, course = forecast.durations, forecast.course
    return (
        f"start {_seconds(durations.starting)}, first step {_seconds(durations.first_step)}, other steps "
        f"{_seconds(durations.step)} each, {course.validations} validations {_seconds(durations.validation)} each, "
        f"{course.checkpoints} checkpoints {_seconds(durations.checkpoint)} each"
    )


def _span(row: Row, value: Callable, text: Callable[[float], str]) -> str:
    """One figure, or the lower and the upper one."""
    values = [value(forecast) for forecast in row.forecasts]
    texts = list(dict.fromkeys(text(value) for value in values))
    return " to ".join(texts)


def _seconds(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:,.1f} ms"
    return f"{seconds:,.1f} s" if seconds < 600 else f"{seconds / 60:,.0f} min"


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _count(number: float) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million")):
        if number >= unit:
            return f"{number / unit:,.1f} {name}"
    return f"{number:,.0f}"


def _bytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _end(wall_seconds: float) -> str:
    return f"{datetime.now().astimezone() + timedelta(seconds=wall_seconds):%Y-%m-%d %H:%M}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown with aligned columns; the first line is the head."""
    widths = [max(3, *map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = len(rows[0][-1])  # remarks are as long as they are
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
