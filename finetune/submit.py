"""From a grid's results and kept models to a submission: predict every test set, train nothing."""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import torch
from tqdm import tqdm

from common.errors import UserError
from common.folders import only_writer, provenance, read_json, sha256_of_file, write_json
from common.hub import weight_files
from common.page import markdown_table
from finetune.examples import Examples, read_split, require_files
from finetune.inference import Precision, decide
from finetune.kept_models import kept_folder
from finetune.predictor import Predictor
from finetune.results import cell_of, median_cell_of
from finetune.submission import SUBMITTED, write_submission
from finetune.tasks import HUB_DATASET, Task, TestSplit
from finetune.trial import Cell

SUBMISSION_FILE: Final = "submission.zip"
RECORD_FILE: Final = "submission.json"
Start = Literal["pretrained", "mnli"]
# The most frequent label of the official training rows (MNLI's and QNLI's are balanced), and the mean of STS-B's.
PLACEHOLDERS: Final[Mapping[str, str]] = {
    "cola": "1",
    "sst2": "1",
    "mrpc": "1",
    "stsb": "2.701",
    "qqp": "0",
    "mnli": "entailment",
    "qnli": "entailment",
    "rte": "entailment",
    "wnli": "0",
}

_RESULTS_FILE: Final = "results.json"
_LOG_SECONDS: Final = 60.0


@dataclass(frozen=True)
class SubmittedFile:
    """One file of the submission: whose test set it is, and the trial whose model predicts it."""

    task: Task
    split: TestSplit
    cell: Cell | None
    """None: no model does; the file is filled with a placeholder."""

    @property
    def name(self) -> str:
        """Such as ``CoLA.tsv``."""
        return self.split.submission_file

    @property
    def placeholder(self) -> str:
        """What stands in each row where no model predicts."""
        return PLACEHOLDERS[_trained_task(self.task)]


def submit(
    output_dir: Path,
    glue_dir: Path | None,
    start: Start | None = None,
    placeholders: bool = False,
    tasks: Sequence[Task] = SUBMITTED,
) -> Path:
    """Predict every test set with the grid's models; write ``submission.zip`` and, what it is, ``submission.json``.

    The models are those of the best configuration's median seed. Everything is read and checked before the first
    prediction. On a GPU the models run in the precision that they were trained in, on a CPU in float32.

    Args:
        output_dir: a grid's output folder, with its results and the models that it kept.
        glue_dir: folder of the official TSV files, one folder per task; None reads from the Hugging Face hub.
        start: what the tasks that MNLI helps started from: the pretrained model, or MNLI's. None where the grid ran
            only one of them.
        placeholders: fill the files of tasks without a result with their majority class, and say so.
        tasks: whose test sets the zip must hold.

    Returns:
        The zip.

    Raises:
        UserError: results, models or test sets are missing, or are not what the GLUE server takes.
    """
    results = read_json(output_dir / _RESULTS_FILE, "a submission is made from a grid's results; run the grid first")
    files = _plan(output_dir, results, _resolve_start(output_dir, results, start), placeholders, tasks)
    _check_kept(output_dir, files)
    zip_path = output_dir / SUBMISSION_FILE
    with only_writer(output_dir):
        require_files([(file.task, file.split.name) for file in files if file.cell], glue_dir)
        test_sets = {file.name: _read_test_set(file, glue_dir) for file in files if file.cell}
        predictions = _predict_all(output_dir, files, test_sets, results["protocol"]["max_seq_length"])
        write_submission(zip_path, predictions, tasks)
        records = [_record(file, predictions[file.name]) for file in files]
        facts = {
            "model": results["model"],
            "test_sets_from": HUB_DATASET if glue_dir is None else str(glue_dir),
            "zip_sha256": sha256_of_file(zip_path),  # tells whether this is the record of the zip that lies beside it
        }
        write_json(output_dir / RECORD_FILE, {**facts, "files": records, "made": provenance()})
    _show(zip_path, records)
    return zip_path


def _trained_task(task: Task) -> str:
    """The name of the task whose models predict ``task``'s test sets."""
    return task.predicted_by or task.task_name


def _resolve_start(output_dir: Path, results: Mapping[str, Any], start: Start | None) -> Start:
    of_grid: Start | None = {False: "pretrained", True: "mnli"}.get(results["mnli_init"])
    if start is None and of_grid is None:
        raise UserError(
            f"{output_dir} has trials started from MNLI's model and others: give --start mnli or --start pretrained"
        )
    if start is not None and of_grid is not None and start != of_grid:
        raise UserError(f"{output_dir} has no trials for --start {start}: its grid started from the {of_grid} model")
    return start or of_grid


def _plan(
    output_dir: Path, results: Mapping[str, Any], start: Start, placeholders: bool, tasks: Sequence[Task]
) -> list[SubmittedFile]:
    """The files in the zip's order, each with the trial that predicts it.

    Raises:
        UserError: tasks have no result, and no placeholders are wanted, or there would be nothing else.
    """
    summaries = results["tasks"]
    missing = [task for task in tasks if not task.predicted_by and task.task_name not in summaries]
    trained = [task for task in tasks if task.task_name in summaries]
    if missing and not (placeholders and trained):
        advice = "run them, or add --placeholders" if trained else "there would be nothing to submit"
        raise UserError(f"{output_dir} has no result of {', '.join(task.task_name for task in missing)}: {advice}")
    cells = {task.task_name: _median_cell(task.task_name, summaries[task.task_name], start) for task in trained}
    return [SubmittedFile(task, split, cells.get(_trained_task(task))) for task in tasks for split in task.test_splits]


def _median_cell(task_name: str, summary: Mapping[str, Any], start: Start) -> Cell:
    """The trial of the best configuration's median seed."""
    started = summary["starts"].get(start) or summary["starts"]["pretrained"]  # most tasks have only this one
    return median_cell_of(task_name, started)


def _check_kept(output_dir: Path, files: Sequence[SubmittedFile]) -> None:
    cells = dict.fromkeys(file.cell for file in files if file.cell)
    gone = [cell for cell in cells if not weight_files(kept_folder(output_dir, cell))]
    if len(gone) == len(cells):
        raise UserError(f"{output_dir} has kept no model: a submission needs a grid that ran with keep_models: true")
    if gone:
        more = f" and {len(gone) - 1} more" if len(gone) > 1 else ""
        raise UserError(f"the model of {gone[0]} is gone{more}: it belongs in {kept_folder(output_dir, gone[0])}")


def _read_test_set(file: SubmittedFile, glue_dir: Path | None) -> Examples:
    examples = read_split(file.task, file.split.name, glue_dir)
    if len(examples) != file.split.rows:
        where = HUB_DATASET if glue_dir is None else glue_dir / file.task.folder
        raise UserError(
            f"{where}: {file.task.title}'s {file.split.name} has {len(examples):,} rows, the official one that the"
            f" server scores has {file.split.rows:,}"
        )
    return examples


def _predict_all(
    output_dir: Path, files: Sequence[SubmittedFile], test_sets: Mapping[str, Examples], max_seq_length: int
) -> dict[str, list[str]]:
    """What stands in the rows of each file; every model is loaded once."""
    predictions = {file.name: [file.placeholder] * file.split.rows for file in files}
    predicted = [file for file in files if file.cell]
    refresh_seconds = 0.5 if sys.stderr.isatty() else _LOG_SECONDS
    num_rows = sum(file.split.rows for file in predicted)
    with tqdm(total=num_rows, unit="row", mininterval=refresh_seconds) as progress:
        for cell in dict.fromkeys(file.cell for file in predicted):
            of_cell = [file for file in predicted if file.cell == cell]
            model = _load(kept_folder(output_dir, cell), of_cell[0].task, max_seq_length, cell.precision)
            for file in of_cell:
                progress.set_description(file.name, refresh=False)
                predictions[file.name] = _predict(model, test_sets[file.name], file.task, progress.update)
    return predictions


def _load(folder: Path, task: Task, max_seq_length: int, precision: Precision) -> Predictor:
    """A kept model, on a GPU in the precision that it was trained in."""
    model = Predictor(folder, max_seq_length, precision if torch.cuda.is_available() else "fp32")
    if model.classifier.config.num_labels != task.num_labels:
        outputs = model.classifier.config.num_labels
        raise UserError(f"the model in {folder} has {outputs} outputs: it is not {task.title}'s")
    return model


def _predict(model: Predictor, examples: Examples, task: Task, progress: Callable[[int], object]) -> list[str]:
    """What a submission says of each row: a label's name, or a score in its range with three decimals."""
    predicted = decide(task, torch.from_numpy(model.logits(examples.sentences, progress=progress)))
    if task.labels:
        return [task.labels[index] for index in predicted]
    scores = np.abs(np.clip(predicted, *task.score_range))  # abs: -0.0 would be written with its sign
    return [f"{score:.3f}" for score in scores]


def _record(file: SubmittedFile, predictions: Sequence[str]) -> dict[str, Any]:
    """Where a file's rows come from, and what stands in them."""
    return {
        "file": file.name,
        "rows": len(predictions),
        "trial": asdict(file.cell) if file.cell else None,
        "placeholder": None if file.cell else file.placeholder,
        "predictions": _distribution(file.task, predictions),
    }


def _distribution(task: Task, predictions: Sequence[str]) -> dict[str, float]:
    if task.labels:
        return {label: predictions.count(label) for label in task.labels}
    scores = np.array(predictions, dtype=np.float64)
    return {"min": float(scores.min()), "mean": float(scores.mean().round(3)), "max": float(scores.max())}


def _show(zip_path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    rows = [[record["file"], f"{record['rows']:,}", _source(record), _shares(record)] for record in records]
    print(f"{markdown_table(['file', 'rows', 'from', 'predictions'], rows)}\n\n{zip_path}")
    filled = [record["file"] for record in records if record["trial"] is None]
    if filled:
        print(f"WARNING: PLACEHOLDERS, predicted by no model: {', '.join(filled)}", file=sys.stderr)


def _source(record: Mapping[str, Any]) -> str:
    return str(cell_of(record["trial"])) if record["trial"] else f"PLACEHOLDER {record['placeholder']}"


def _shares(record: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}: {value:,}" for name, value in record["predictions"].items())
