"""``python -m finetune train``: a task, or a user's own data, trained once or with several seeds, or a model as it is.

Training is a grid of one configuration. What Hugging Face's run_glue writes is written beside what a grid writes.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from common.errors import UserError
from common.folders import (
    check_folder,
    claim_folder,
    errors_of_writing,
    only_writer,
    read_json,
    write_json,
    write_text,
)
from common.page import markdown_table
from finetune.examples import Examples, read_split, read_texts, require_files
from finetune.grid import run_grid
from finetune.inference import decide
from finetune.kept_models import kept_folder
from finetune.losses import loss_of
from finetune.metrics import compute
from finetune.model import find_model
from finetune.model_record import ModelRecord, place_model, read_record
from finetune.predictor import Predictor
from finetune.publish import publish_run, require_login
from finetune.ranks import this_rank
from finetune.recorded import RESULTS_FILE
from finetune.results import Results, median_cell_of
from finetune.run_tables import times_table
from finetune.score_tables import replicates_table, variants_table
from finetune.tasks import Task, find_task, own_task
from finetune.train_flags import Request
from finetune.trial import Cell

_MAY_CHANGE: Final = ("evaluates", "predicts", "test_file", "max_predict_rows")  # of what is done with one model
# run_glue's names, where ours are others; the means that it adds
_METRIC_NAMES: Final = {"matthews": "matthews_correlation", "spearman": "spearmanr"}
_MODEL_FLAG: Final = "--model_name_or_path"
_WITH_COMBINED_SCORE: Final = ("mrpc", "qqp", "stsb")

TestSets = Mapping[str, Examples]
"""The rows of each test set by what run_glue calls it."""


def train(request: Request) -> None:
    """Do what was asked for, and go on where an interrupted start of the same has stopped.

    Raises:
        UserError: bad input, before any work; or trials without a result.
    """
    if request.config is None:
        _use_as_it_is(request)
        return
    config = request.config
    find_model(request.model, _MODEL_FLAG)
    tasks = {name: config.tasks[name] for name in config.task_names}
    test_sets = {name: _read_test_sets(request, task) for name, task in tasks.items()}
    if request.repo_id:
        require_login()
    run_grid(config, request.model, request.output_dir, request.glue_dir, tasks=[])
    if not this_rank().coordinates:
        return
    results = read_json(request.output_dir / RESULTS_FILE, "what the trials have brought")
    with errors_of_writing(request.output_dir), only_writer(request.output_dir):
        for name, task in tasks.items():
            folder = request.output_dir / name if len(tasks) > 1 else request.output_dir
            place_model(_kept_model(request, median_cell_of(name, results["tasks"][name])), folder)
            record = read_record(folder)
            _write_results(folder, {"train": _train_results(record), "eval": _eval_results(record)})
            if test_sets[name]:
                _predict(Predictor(folder, precision=record.cell["precision"]), task, test_sets[name], folder)
    _show(results)
    if request.repo_id:
        publish_run(request.output_dir, request.repo_id)


def _kept_model(request: Request, cell: Cell) -> Path:
    folder = kept_folder(request.output_dir, cell)
    if not folder.is_dir():
        raise UserError(f"{folder} is gone, the model that was kept there: train again in another --output_dir")
    return folder


def _show(results: Results) -> None:
    """The tables that a grid's command doesn't print."""
    tables = {"Time": times_table(results)}
    if len(results["seeds"]) > 1:
        tables = {"Replicates": replicates_table(results), **tables}
    if len(results["variants"]) > 1:
        tables = {"Variants": variants_table(results), **tables}
    for title, table in tables.items():
        print(f"\n{title}\n\n{markdown_table(*table)}")


# --- what run_glue writes ---


def _train_results(record: ModelRecord) -> dict[str, Any]:
    epochs, num_rows = record.epochs, record.rows["train"]
    seconds = sum(epoch["seconds"] for epoch in epochs)
    num_steps, num_epochs = _length(record)
    shares = [min(1.0, num_epochs - place) for place in range(len(epochs))]  # the last one may have been cut short
    return {
        "epoch": num_epochs,
        "train_loss": float(np.average([epoch["train_loss"] for epoch in epochs], weights=shares)),
        "train_runtime": seconds,
        "train_samples": num_rows,
        "train_samples_per_second": num_epochs * num_rows / seconds,
        "train_steps_per_second": num_steps / seconds,
    }


def _length(record: ModelRecord) -> tuple[int, float]:
    """Optimizer steps that were made, and the epochs that they are."""
    steps_per_epoch = math.ceil(record.rows["train"] / record.cell["batch_size"])
    num_steps = min(len(record.epochs) * steps_per_epoch, record.protocol["max_steps"] or math.inf)
    return num_steps, num_steps / steps_per_epoch


def _eval_results(record: ModelRecord) -> dict[str, Any]:
    """Of the epoch that scores."""
    epochs = record.epochs if record.protocol["score_epoch"] == "best" else reversed(record.epochs)
    scored = next(epoch for epoch in epochs if epoch["metrics"] == record.metrics)
    evaluation = _evaluation(record.task, scored["metrics"], scored["eval_loss"], scored["eval_seconds"], record.rows)
    return {"epoch": min(float(scored["epoch"]), _length(record)[1]), **evaluation}


def _evaluation(
    task: Task,
    metrics: Mapping[str, Mapping[str, float]],
    loss: float,
    seconds: float,
    rows: Mapping[str, int],
) -> dict[str, Any]:
    """In run_glue's names; of MNLI's second set, which has no loss, they end in ``_mm``."""
    results: dict[str, Any] = {"eval_loss": loss}
    for split, suffix in zip(task.evaluation_splits, ("", "_mm"), strict=False):
        for name, value in metrics[split].items():
            results[f"eval_{_METRIC_NAMES.get(name, name)}{suffix}"] = value
        results[f"eval_samples{suffix}"] = rows[split]
    if task.task_name in _WITH_COMBINED_SCORE:
        results["eval_combined_score"] = float(np.mean(list(metrics[task.evaluation_splits[0]].values())))
    num_rows = sum(rows[split] for split in task.evaluation_splits)
    return results | {"eval_runtime": seconds, "eval_samples_per_second": num_rows / seconds}


def _write_results(folder: Path, results: Mapping[str, Mapping[str, Any]]) -> None:
    for name, values in results.items():
        write_json(folder / f"{name}_results.json", values)
    write_json(
        folder / "all_results.json", {key: value for values in results.values() for key, value in values.items()}
    )


# --- test sets ---


def _read_test_sets(request: Request, task: Task) -> TestSets:
    """What is to be predicted, read before anything is trained.

    Raises:
        UserError: there is no test set, or it can't be read.
    """
    if not request.predicts:
        return {}
    if request.test_file:
        return {task.task_name: read_texts(task, request.test_file).first(request.max_predict_rows)}
    if not task.test_splits:
        hint = "give your own rows by --test_file" if task.own else "leave --do_predict out"
        raise UserError(f"--do_predict: {task.task_name} has no test set: {hint}")
    require_files([(task, split.name) for split in task.test_splits], request.glue_dir)
    sets = {split.name: read_split(task, split.name, request.glue_dir) for split in task.test_splits}
    names = [task.task_name, "mnli-mm"]
    return {
        name: examples.first(request.max_predict_rows) for name, examples in zip(names, sets.values(), strict=False)
    }


def _predict(predictor: Predictor, task: Task, test_sets: TestSets, folder: Path) -> None:
    """Write ``predict_results_<name>.txt``: the label's name, or the score, of each row."""
    for name, examples in test_sets.items():
        outputs = decide(task, torch.from_numpy(predictor.logits(examples.sentences)))
        texts = [predictor.labels[index] for index in outputs] if predictor.labels else [f"{x:.3f}" for x in outputs]
        lines = ["index\tprediction", *(f"{index}\t{text}" for index, text in enumerate(texts))]
        write_text(folder / f"predict_results_{name}.txt", "\n".join(lines) + "\n")


# --- a model as it is ---


def _use_as_it_is(request: Request) -> None:
    """Score and predict without training.

    Raises:
        UserError: the model is not a classifier of the task, or rows are missing.
    """
    folder = find_model(request.model, _MODEL_FLAG)
    task = _task_as_it_is(request, folder)
    test_sets = _read_test_sets(request, task)
    splits = _read_evaluation_splits(request, task) if request.evaluates else {}
    predictor = Predictor(folder, request.max_seq_length, request.precision)
    order = _order_of_labels(folder, task, predictor.labels)
    check_folder(request.output_dir, request, _MAY_CHANGE)
    with errors_of_writing(request.output_dir):
        request.output_dir.mkdir(parents=True, exist_ok=True)
        with only_writer(request.output_dir):
            claim_folder(request.output_dir, request, _MAY_CHANGE)
            if splits:
                results = _evaluate(predictor, order, task, splits)
                _write_results(request.output_dir, {"eval": results})
                print(markdown_table(["", task.title], [[name, f"{value:,.4g}"] for name, value in results.items()]))
            _predict(predictor, task, test_sets, request.output_dir)


def _task_as_it_is(request: Request, folder: Path) -> Task:
    if len(request.task_names) > 1:
        raise UserError("--task_name: a model as it is has one task: name it, or add --do_train")
    task = find_task(request.task_names[0]) if request.task_names else read_record(folder).task
    if task.own and request.validation_file:
        return own_task(replace(task.own, dev=str(request.validation_file)))
    return task


def _read_evaluation_splits(request: Request, task: Task) -> dict[str, Examples]:
    require_files([(task, split) for split in task.evaluation_splits], request.glue_dir)
    return {
        split: read_split(task, split, request.glue_dir).first(request.max_eval_rows)
        for split in task.evaluation_splits
    }


def _order_of_labels(folder: Path, task: Task, labels: Sequence[str] | None) -> list[int]:
    """The place of each of the task's labels among the model's outputs, which others may have in another order."""
    if len(labels or [""]) != task.num_labels:
        raise UserError(f"the model in {folder} has {len(labels or [''])} outputs, {task.title} {task.num_labels}")
    if not task.labels:
        return [0]
    found = list(labels or ())
    for names in (task.output_names, task.labels or ()):
        for spelt in (str, str.lower):  # others may write them in capitals
            theirs, ours = [spelt(label) for label in found], [spelt(name) for name in names]
            if sorted(theirs) == sorted(ours):
                return [theirs.index(name) for name in ours]
    if labels and not all(label.startswith("LABEL_") for label in labels):
        raise UserError(f"the model in {folder} tells {', '.join(labels)} apart, not {', '.join(task.output_names)}")
    return list(range(task.num_labels))


def _evaluate(predictor: Predictor, order: list[int], task: Task, splits: Mapping[str, Examples]) -> dict[str, Any]:
    started = time.monotonic()
    logits = {split: torch.from_numpy(predictor.logits(rows.sentences))[:, order] for split, rows in splits.items()}
    seconds = time.monotonic() - started
    labels = {split: torch.tensor(rows.labels) for split, rows in splits.items()}
    metrics = {split: compute(task.metrics, decide(task, logits[split]), labels[split].numpy()) for split in splits}
    first = task.evaluation_splits[0]
    loss = loss_of(logits[first], labels[first]).item()
    return _evaluation(task, metrics, loss, seconds, {split: len(rows) for split, rows in splits.items()})
