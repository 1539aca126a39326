"""A tuned model as int8: the folder, and what that changes in score, size and latency, measured on this CPU."""

import contextlib
import importlib.metadata
import itertools
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from matplotlib.figure import Figure

from common.errors import UserError
from common.folders import check_folder, claim_folder, errors_of_writing, only_writer, processor_name, write_json
from common.hub import save, weight_files
from common.page import PANEL_WIDTH, Document, Plot, clean_axes, write_documents
from finetune.batches import Batch, DeviceSplit
from finetune.examples import Examples, read_split
from finetune.heads import read_pruned_heads
from finetune.inference import decide
from finetune.metrics import METRIC_TITLES, compute
from finetune.model import find_model, load_tokenizer
from finetune.model_record import ModelRecord, copy_pretraining, placed_model, write_record
from finetune.predictor import Predictor
from finetune.quantization import is_quantized, num_int8_weights, quantize, require_torchao
from finetune.tasks import Task, find_task
from finetune.tokens import tokenize, typical_rows

RESULTS_FILE: Final = "results.json"
BATCH_SIZES: Final = (1, 32)
_RECORDED_PACKAGES: Final = ("torch", "torchao", "transformers")
_WARM_UP: Final = 3
_REPETITIONS: Final = range(5, 31)  # how often each is timed: at least, at most
_SECONDS: Final = 30.0  # of timing, when there are enough repetitions
_FASTER: Final = 0.95  # of the time; medians of the same model differ by less than this
_COLOURS: Final = {"float32": "#1f6fb4", "int8": "#d9772b"}

Forward = Callable[..., Any]
Results = dict[str, Any]


@dataclass(frozen=True)
class QuantizeConfig:
    """What a quantised model's folder is made of."""

    model: str
    task_name: str
    glue_dir: str | None
    compiled: bool


def quantize_model(
    model: str, output_dir: Path, glue_dir: Path | None, task_name: str | None = None, compiled: bool = True
) -> None:
    """Make ``output_dir`` the quantised model's folder, with ``results.json`` and a report of what that changes.

    Everything is checked before anything is written; the model appears when it has been measured.

    Args:
        model: folder of a tuned classifier, or a hub id.
        output_dir: becomes a Hugging Face folder that transformers loads, with torchao.
        glue_dir: folder of the official TSV files, one folder per task; None reads from the Hugging Face hub.
        task_name: whose development split measures a model that has no record of its task.
        compiled: whether to time both models compiled too.

    Raises:
        UserError: the model is quantised or pruned or is not of this task, rows or torchao are missing, or the folder
            is something else's.
    """
    folder = find_model(model)
    _check_form(folder)
    before = Predictor(folder, device="cpu")
    task = _task(before, task_name)
    config = QuantizeConfig(str(folder), task.task_name, str(glue_dir) if glue_dir else None, compiled)
    check_folder(output_dir, config)
    examples = {split: _read(task, split, glue_dir, before.record) for split in task.evaluation_splits}
    claim_folder(output_dir, config)
    with only_writer(output_dir), errors_of_writing(output_dir):
        with placed_model(output_dir) as made:
            save(made, quantize(folder), load_tokenizer(folder))
            copy_pretraining(folder, made)
            after = Predictor(made, before.max_seq_length, device="cpu")
            results = _measure(before, after, task, examples, compiled)
            _write_record(before, made, results["int8"]["metrics"], task)
        write_json(output_dir / RESULTS_FILE, results)
        write_quantization_report(output_dir, results)
    print(f"{statement(results)}\n{output_dir}: the quantised model, {RESULTS_FILE} and the report")


def _read(task: Task, split: str, glue_dir: Path | None, record: ModelRecord | None) -> Examples:
    """The rows that the model was measured on when it was tuned: all, or as many of the first ones."""
    examples = read_split(task, split, glue_dir)
    return examples.first(record.rows[split]) if record else examples


def _check_form(folder: Path) -> None:
    if is_quantized(folder):
        raise UserError(f"{folder} is quantised already")
    if read_pruned_heads(folder):
        raise UserError(
            f"{folder} is pruned, and transformers has no int8 form of that: make its full-size form by"
            " python -m finetune prune --full_size, and quantise that"
        )
    require_torchao()


def _task(model: Predictor, task_name: str | None) -> Task:
    recorded = model.record.task if model.record else None
    if recorded is None and task_name is None:
        raise UserError(f"{model.folder} has no record of its task: give --task_name")
    task = find_task(task_name) if recorded is None else recorded
    if task_name not in (None, task.task_name):
        raise UserError(f"--task_name {task_name}: {model.folder} was tuned for {task.task_name}")
    if (outputs := model.classifier.config.num_labels) != task.num_labels:
        raise UserError(f"the model in {model.folder} has {outputs} outputs: it is not {task.title}'s")
    return task


def _write_record(before: Predictor, folder: Path, metrics: Mapping[str, Mapping[str, float]], task: Task) -> None:
    """The model's own record, with the scores that the quantised one has."""
    if before.record:
        score = metrics[task.evaluation_splits[0]][task.selected_by]
        write_record(folder, replace(before.record, score=score, metrics=metrics))


# --- measuring ---


def _measure(
    before: Predictor, after: Predictor, task: Task, examples: Mapping[str, Examples], compiled: bool
) -> Results:
    """The content of ``results.json``; latency first, because a compiler that doesn't work shows there."""
    print("timing both models", flush=True)
    rows = _typical_rows(before, examples[task.evaluation_splits[0]])
    modes = ("eager", "compiled") if compiled else ("eager",)
    seconds = {mode: {str(size): _latencies(before, after, rows, size, mode) for size in BATCH_SIZES} for mode in modes}
    results = {
        "task": {"name": task.task_name, "title": task.title, "metrics": list(task.metrics)},
        "rows": {split: len(rows) for split, rows in examples.items()},
        "timed_tokens": int(rows.lengths.max()),
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: importlib.metadata.version(name) for name in _RECORDED_PACKAGES},
    }
    for place, (name, model) in enumerate((("float32", before), ("int8", after))):
        print(f"scoring {name} on {sum(results['rows'].values()):,} rows", flush=True)
        results[name] = {
            "metrics": {split: _metrics(model, task, rows) for split, rows in examples.items()},
            "file_bytes": sum(path.stat().st_size for path in weight_files(model.folder)),
            "parameters": model.classifier.num_parameters(),
            "int8_weights": num_int8_weights(model.classifier),
            "seconds": {mode: {size: times[place] for size, times in seconds[mode].items()} for mode in modes},
        }
    return results


def _metrics(model: Predictor, task: Task, examples: Examples) -> dict[str, float]:
    predicted = decide(task, torch.from_numpy(model.logits(examples.sentences)))
    return compute(task.metrics, predicted, np.asarray(examples.labels))


def _typical_rows(model: Predictor, examples: Examples) -> DeviceSplit:
    """As many rows as the largest batch has, of about the median length."""
    tokens = tokenize(examples, load_tokenizer(model.folder), model.max_seq_length)
    return DeviceSplit(typical_rows(tokens, max(BATCH_SIZES)), torch.device("cpu"))


def _latencies(
    before: Predictor, after: Predictor, rows: DeviceSplit, batch_size: int, mode: str
) -> tuple[float, float]:
    """Median seconds of one batch with each model; they take turns, so that what else the machine does hits both."""
    batches = list(rows.evaluation_batches(batch_size))
    batch = batches[len(batches) // 2]
    forwards = [model.classifier for model in (before, after)]
    if mode == "compiled":
        forwards = [torch.compile(forward, dynamic=False) for forward in forwards]
    with torch.inference_mode(), _compiling(mode):
        return _take_turns(forwards, batch)


def _take_turns(forwards: Sequence[Forward], batch: Batch) -> tuple[float, float]:
    for forward in forwards:
        for _ in range(_WARM_UP):
            forward(**batch.inputs)
    times: list[list[float]] = [[] for _ in forwards]
    started = time.perf_counter()
    for repetition in itertools.count(1):
        for forward, of_model in zip(forwards, times, strict=True):
            before = time.perf_counter()
            forward(**batch.inputs)
            of_model.append(time.perf_counter() - before)
        is_late = time.perf_counter() - started > _SECONDS
        if repetition == _REPETITIONS[-1] or (is_late and repetition in _REPETITIONS):
            return statistics.median(times[0]), statistics.median(times[1])


@contextlib.contextmanager
def _compiling(mode: str) -> Iterator[None]:
    """Without what the compiler says of torchao's tensors, and in one line where it doesn't work."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Int8Tensor does not implement _stable_hash_for_caching")
        try:
            yield
        except torch._dynamo.exc.TorchDynamoException as error:
            reason = " ".join(str(error).split("\n")[:2])  # which part failed, and how
            raise UserError(f"torch.compile does not work here ({reason}): add --no_compile") from None


# --- the report ---


def statement(results: Results) -> str:
    """What quantisation has brought, in sentences; the first one is of speed."""
    ratios = {_place(mode, size): times[1] / times[0] for mode, size, times in _timed(results)}
    faster = [f"{place} ({1 / ratio:.2f} times as fast)" for place, ratio in ratios.items() if ratio < _FASTER]
    slower = [f"{place} ({1 / ratio:.2f} times as fast)" for place, ratio in ratios.items() if ratio >= _FASTER]
    before, after = results["float32"], results["int8"]
    split, metric = next(iter(results["rows"])), results["task"]["metrics"][0]
    scores = [f"{100 * of['metrics'][split][metric]:.2f}" for of in (before, after)]
    speed = (
        f"int8 is faster than float32 here {', '.join(faster)}" if faster else "int8 is not faster than float32 here"
    )
    if faster and slower:
        speed += f", and not faster {', '.join(slower)}"
    elif slower:
        speed += f": {', '.join(slower)}"
    share = 1 - after["int8_weights"] / after["parameters"]
    return (
        f"{speed}. Its {METRIC_TITLES[metric]} x 100 on {split} is {scores[1]} instead of {scores[0]}. Its file has"
        f" {_megabytes(after)} instead of {_megabytes(before)} MB: {share:.0%} of the parameters, embeddings above all,"
        " stay float32."
    )


def write_quantization_report(folder: Path, results: Results) -> None:
    """Write ``report.md``, ``report.html`` and the figure into ``folder``."""
    plot = Plot(
        "quantization",
        "Latency and size",
        {title: _bars_panel(title, groups, unit) for title, unit, groups in _panels(results)},
        "Milliseconds for one batch, median, and megabytes of the file of weights, before and after.",
    )

    def fill(document: Document) -> None:
        document.paragraph(statement(results))
        document.table(["", "float32", "int8", "int8 against float32"], _rows(results))
        document.facts(_facts(results))
        document.plot(plot)

    write_documents(folder, f"{results['task']['title']}: int8 weights and activations", [plot], fill)


def _facts(results: Results) -> dict[str, str]:
    rows = ", ".join(f"{number:,} of {split}" for split, number in results["rows"].items())
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    return {
        "What is int8": "the weights of all linear layers, with one scale a row, and their inputs, with one scale a"
        " token; embeddings, biases and LayerNorms are float32",
        "Device": f"CPU ({results['processor']}), {results['threads']} threads",
        "Scores": f"of both models, on the same device; rows: {rows}",
        "Latency": f"a batch of rows of median length ({results['timed_tokens']} tokens), all of the same rows; the two"
        f" models take turns, {_REPETITIONS[0]} to {_REPETITIONS[-1]} times, and the median counts",
        "Versions": versions,
    }


def _timed(results: Results) -> list[tuple[str, str, tuple[float, float]]]:
    """Mode, batch size, and seconds before and after."""
    before, after = results["float32"]["seconds"], results["int8"]["seconds"]
    return [(mode, size, (before[mode][size], after[mode][size])) for mode in before for size in before[mode]]


def _place(mode: str, size: str) -> str:
    return f"{mode} at batch {size}"


def _megabytes(of: Mapping[str, Any]) -> str:
    return f"{of['file_bytes'] / 1e6:.1f}"


def _rows(results: Results) -> list[list[str]]:
    before, after = results["float32"], results["int8"]
    rows = []
    for split, metrics in before["metrics"].items():
        for name, score in metrics.items():
            quantized = after["metrics"][split][name]
            rows.append(
                [
                    f"{METRIC_TITLES[name]} x 100, {split}",
                    f"{100 * score:.2f}",
                    f"{100 * quantized:.2f}",
                    f"{100 * (quantized - score):+.2f} points",
                ]
            )
    size = f"{after['file_bytes'] / before['file_bytes']:.2f} times"
    rows.append(["file of weights, MB", _megabytes(before), _megabytes(after), size])
    rows.append(["parameters", *(f"{of['parameters']:,}" for of in (before, after)), ""])
    rows.append(["of them int8", *(f"{of['int8_weights']:,}" for of in (before, after)), ""])
    for mode, batch_size, times in _timed(results):
        figures = [f"{1000 * seconds:.1f}" for seconds in times]
        rows.append([f"{_place(mode, batch_size)}, ms", *figures, f"{times[1] / times[0]:.2f} times"])
    return rows


def _panels(results: Results) -> list[tuple[str, str, dict[str, tuple[float, float]]]]:
    """Title, unit, and by group the figures before and after."""
    panels = []
    for batch_size in map(str, BATCH_SIZES):
        timed = {mode: times for mode, size, times in _timed(results) if size == batch_size}
        milliseconds = {mode: (1000 * before, 1000 * after) for mode, (before, after) in timed.items()}
        panels.append((f"latency, batch {batch_size}", "ms", milliseconds))
    sizes = tuple(results[name]["file_bytes"] / 1e6 for name in _COLOURS)
    return [*panels, ("file of weights", "MB", {"": sizes})]


def _bars_panel(title: str, groups: Mapping[str, tuple[float, float]], unit: str) -> Figure:
    """A group of two bars each, float32 and int8, with their figures."""
    figure = Figure(figsize=(PANEL_WIDTH, 2.6), layout="constrained")
    axes = figure.subplots()
    for place, (name, colour) in enumerate(_COLOURS.items()):
        heights = [values[place] for values in groups.values()]
        bars = axes.bar([index + 0.4 * (place - 0.5) for index in range(len(groups))], heights, 0.36, color=colour)
        axes.bar_label(bars, [f"{name}\n{height:,.1f}" for height in heights], fontsize=8)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_title(title, loc="left", fontsize=9, fontweight="bold")
    axes.set_ylabel(unit, fontsize=8)
    axes.margins(x=0.2, y=0.25)
    axes.tick_params(labelsize=8)
    clean_axes(axes)
    return figure
