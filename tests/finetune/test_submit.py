"""A submission against Hugging Face's own tokenizer and forward pass, one row at a time."""

import csv
import io
import json
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from common.errors import UserError
from finetune.kept_models import kept_folder
from finetune.optimizers import Optimizer
from finetune.submission import SUBMITTED, check_submission
from finetune.submit import submit
from finetune.tasks import TASKS, Task
from finetune.trial import Cell, Protocol

NUM_ROWS, BATCH_SIZE = 10, 4
MAX_SEQ_LENGTH = 16  # some rows are longer
BEST = {"learning_rate": 3e-5, "batch_size": 16, "num_epochs": 3}
MEDIAN_SEED, OTHER_SEED = 2, 1
BINARY, ENTAILMENT = ["0", "1"], ["entailment", "not_entailment"]
THREE_WAY = ["entailment", "neutral", "contradiction"]
PAIR = ["sentence1", "sentence2"]
# file: the task whose model predicts it, its labels, its official test set, that one's columns, those with the text
FILES = {
    "CoLA.tsv": ("cola", BINARY, "CoLA/test.tsv", ["index", "sentence"], ["sentence"]),
    "SST-2.tsv": ("sst2", BINARY, "SST-2/test.tsv", ["index", "sentence"], ["sentence"]),
    "MRPC.tsv": (
        "mrpc",
        BINARY,
        "MRPC/test.tsv",
        ["index", "#1 ID", "#2 ID", "#1 String", "#2 String"],
        ["#1 String", "#2 String"],
    ),
    "STS-B.tsv": (
        "stsb",
        None,
        "STS-B/test.tsv",
        ["index", "genre", "filename", "year", "old_index", "source1", "source2", *PAIR],
        PAIR,
    ),
    "QQP.tsv": ("qqp", BINARY, "QQP/test.tsv", ["id", "question1", "question2"], ["question1", "question2"]),
    "MNLI-m.tsv": ("mnli", THREE_WAY, "MNLI/test_matched.tsv", ["index", "promptID", "pairID", "genre", *PAIR], PAIR),
    "MNLI-mm.tsv": (
        "mnli",
        THREE_WAY,
        "MNLI/test_mismatched.tsv",
        ["index", "promptID", "pairID", "genre", *PAIR],
        PAIR,
    ),
    "QNLI.tsv": ("qnli", ENTAILMENT, "QNLI/test.tsv", ["index", "question", "sentence"], ["question", "sentence"]),
    "RTE.tsv": ("rte", ENTAILMENT, "RTE/test.tsv", ["index", *PAIR], PAIR),
    "WNLI.tsv": ("wnli", BINARY, "WNLI/test.tsv", ["index", *PAIR], PAIR),
    "AX.tsv": ("mnli", THREE_WAY, "AX/diagnostic.tsv", ["index", *PAIR], PAIR),
}
WORDS = "the was and a cat dog film book house tree good great fine bad poor awful".split()


def with_rows(num_rows: int) -> tuple[Task, ...]:
    """The submitted tasks with test sets of this length."""
    return tuple(
        replace(task, test_splits=tuple(replace(split, rows=num_rows) for split in task.test_splits))
        for task in SUBMITTED
    )


TASKS_HERE = with_rows(NUM_ROWS)
COLA_AND_RTE = tuple(task for task in TASKS_HERE if task.task_name in ("cola", "rte"))


def cell(task_name: str, initialization: str = "pretrained", seed: int = MEDIAN_SEED) -> Cell:
    return Cell(task_name, **BEST, initialization=initialization, seed=seed, precision="bf16")


def keep_model(output_dir: Path, of: Cell, tokenizer_folder: Path, number: int) -> None:
    """A classifier that tells rows apart: large weights, and outputs that are 0 on average, or 2.5 for a score."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=32,
        initializer_range=1.0,
        num_labels=TASKS[of.task_name].num_labels,
    )
    torch.manual_seed(number)
    model = BertForSequenceClassification(config).eval()
    random = Random(number)
    texts = [" ".join(random.choices(WORDS, k=random.randint(1, 12))) for _ in range(20)]
    with torch.inference_mode():
        mean = model(**tokenizer(texts, padding=True, return_tensors="pt")).logits.mean(dim=0)
    with torch.no_grad():
        model.classifier.bias.copy_(-mean + (2.5 if config.num_labels == 1 else 0.0))
    folder = kept_folder(output_dir, of)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def starts(*initializations: str) -> dict[str, Any]:
    """A task's entry in results.json, as far as a submission goes."""
    same = {"best": BEST, "median_seed": MEDIAN_SEED, "precision": "bf16", "optimizer": {"name": "adamw"}}
    return {"starts": {name: {**same, "initialization": name} for name in initializations}}


def write_results(output_dir: Path, tasks: Mapping[str, Any], mnli_init: bool | str = False) -> None:
    protocol = Protocol(MAX_SEQ_LENGTH, weight_decay=0.1, warmup_proportion=0.06)
    results = {"model": "run/hf", "mnli_init": mnli_init, "protocol": asdict(protocol), "tasks": tasks}
    (output_dir / "results.json").write_text(json.dumps(results), encoding="utf-8")


def edit_results(output_dir: Path, **changes: Any) -> None:
    path = output_dir / "results.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}), encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def several_batches_on_the_cpu() -> Iterator[None]:
    """So that rows change places, and float32 predicts whatever precision the grid had."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.inference.EVALUATION_BATCH_SIZE", BATCH_SIZE)
        patch.setattr("torch.cuda.is_available", lambda: False)
        yield


@pytest.fixture(scope="module")
def test_sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Official test sets of ``NUM_ROWS`` rows each, of 1 to 24 words in an order that is not by length."""
    folder, random = tmp_path_factory.mktemp("test-sets"), Random(0)
    for _, _, path, columns, texts in FILES.values():
        (folder / path).parent.mkdir(exist_ok=True)
        rows = [columns]
        for number in range(NUM_ROWS):
            row = dict.fromkeys(columns, "-") | {columns[0]: str(number)}
            rows.append(
                [*(row | {text: " ".join(random.choices(WORDS, k=random.randint(1, 12))) for text in texts}).values()]
            )
        (folder / path).write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def finished_grid(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """A grid of all tasks with the models of two seeds of CoLA, and RTE started both ways."""
    output_dir = tmp_path_factory.mktemp("grid")
    names = dict.fromkeys(name for name, *_ in FILES.values())
    cells = [*map(cell, names), cell("cola", seed=OTHER_SEED), cell("rte", "mnli")]
    for number, of in enumerate(cells):
        keep_model(output_dir, of, model_folder, number)
    write_results(output_dir, {**{name: starts("pretrained") for name in names}, "rte": starts("pretrained", "mnli")})
    edit_results(output_dir, mnli_init="both")
    return output_dir


@pytest.fixture
def grid(finished_grid: Path, tmp_path: Path) -> Path:
    """A copy to break."""
    return Path(shutil.copytree(finished_grid, tmp_path / "grid"))


@pytest.fixture(scope="module")
def submission(finished_grid: Path, test_sets: Path) -> Path:
    return submit(finished_grid, test_sets, "pretrained", tasks=TASKS_HERE)


def rows_of(zip_path: Path, name: str) -> list[str]:
    with zipfile.ZipFile(zip_path) as archive, archive.open(name) as file:
        rows = list(csv.DictReader(io.TextIOWrapper(file, "utf-8", newline=""), delimiter="\t"))
    assert [int(row["index"]) for row in rows] == list(range(len(rows)))
    return [row["prediction"] for row in rows]


def by_hugging_face(folder: Path, test_set: Path, texts: list[str], labels: list[str] | None) -> list[str]:
    """Each row alone, through Hugging Face's tokenizer and model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    header, *lines = test_set.read_text(encoding="utf-8").splitlines()
    predictions = []
    for line in lines:
        row = dict(zip(header.split("\t"), line.split("\t"), strict=True))
        inputs = tokenizer(
            *(row[text] for text in texts), truncation=True, max_length=MAX_SEQ_LENGTH, return_tensors="pt"
        )
        with torch.inference_mode():
            logits = model(**inputs).logits[0]
        predictions.append(labels[int(logits.argmax())] if labels else str(min(max(logits.item(), 0.0), 5.0)))
    return predictions


def test_a_submission_passes_the_check_and_shows_what_it_is_made_of(
    grid: Path, test_sets: Path, submission: Path, capsys: pytest.CaptureFixture
) -> None:
    check_submission(submission, TASKS_HERE)
    again = submit(grid, test_sets, "pretrained", tasks=TASKS_HERE)
    assert again.read_bytes() == submission.read_bytes()
    output = capsys.readouterr()
    assert (
        "| AX.tsv | 10 | mnli (pretrained, AdamW, bf16, learning rate 3e-05, batch 16, 3 epochs, seed 2) | entailment: "
        in output.out
    )
    assert str(again) in output.out
    assert "PLACEHOLDER" not in output.out + output.err


@pytest.mark.parametrize("name", FILES)
def test_each_row_says_what_hugging_face_predicts_with_the_median_seeds_model(
    name: str, finished_grid: Path, test_sets: Path, submission: Path
) -> None:
    task_name, labels, path, _, texts = FILES[name]
    predictions = rows_of(submission, name)
    expected = by_hugging_face(kept_folder(finished_grid, cell(task_name)), test_sets / path, texts, labels)
    if labels:
        assert predictions == expected
    else:
        assert [*map(float, predictions)] == pytest.approx([*map(float, expected)], abs=0.0006)
    assert len(set(predictions)) > 1, "a model that predicts one class tells nothing"


def test_the_record_tells_trial_and_predictions_of_each_file_and_whose_record_it_is(submission: Path) -> None:
    record = json.loads((submission.parent / "submission.json").read_text())
    assert record["zip_sha256"] == sha256(submission.read_bytes()).hexdigest()
    assert [file["file"] for file in record["files"]] == list(FILES)
    files = {file["file"]: file for file in record["files"]}
    assert files["AX.tsv"]["trial"] == {
        "task_name": "mnli",
        **BEST,
        "initialization": "pretrained",
        "precision": "bf16",
        "optimizer": asdict(Optimizer()),
        "seed": MEDIAN_SEED,
    }
    assert files["RTE.tsv"]["predictions"]["entailment"] == rows_of(submission, "RTE.tsv").count("entailment")
    scores = [float(score) for score in rows_of(submission, "STS-B.tsv")]
    assert files["STS-B.tsv"]["predictions"]["max"] == max(scores)


def test_of_two_starts_the_chosen_one_is_submitted(grid: Path, test_sets: Path, submission: Path) -> None:
    path = submit(grid, test_sets, "mnli", tasks=COLA_AND_RTE)
    of_mnli = by_hugging_face(kept_folder(grid, cell("rte", "mnli")), test_sets / "RTE/test.tsv", PAIR, ENTAILMENT)
    assert rows_of(path, "RTE.tsv") == of_mnli != rows_of(submission, "RTE.tsv")
    assert rows_of(path, "CoLA.tsv") == rows_of(submission, "CoLA.tsv")


def test_of_two_starts_one_must_be_chosen(grid: Path, test_sets: Path) -> None:
    with pytest.raises(UserError, match="give --start mnli or --start pretrained"):
        submit(grid, test_sets, tasks=COLA_AND_RTE)


def test_a_start_that_the_grid_has_not_run_is_refused_and_its_own_is_the_default(grid: Path, test_sets: Path) -> None:
    write_results(grid, {"cola": starts("pretrained"), "rte": starts("mnli")}, mnli_init=True)
    with pytest.raises(UserError, match="no trials for --start pretrained"):
        submit(grid, test_sets, "pretrained", tasks=COLA_AND_RTE)
    submit(grid, test_sets, tasks=COLA_AND_RTE)
    record = json.loads((grid / "submission.json").read_text())
    assert [file["trial"]["initialization"] for file in record["files"]] == ["pretrained", "mnli"]


def test_missing_tasks_are_named_and_filled_only_on_request(
    grid: Path, test_sets: Path, capsys: pytest.CaptureFixture
) -> None:
    write_results(grid, {"cola": starts("pretrained")})
    with pytest.raises(UserError, match=r"no result of sst2, mrpc, stsb, qqp, mnli, qnli, rte, wnli: .*--placeholders"):
        submit(grid, test_sets, tasks=TASKS_HERE)
    path = submit(grid, test_sets, placeholders=True, tasks=TASKS_HERE)
    check_submission(path, TASKS_HERE)
    filled = {"SST-2": "1", "MRPC": "1", "STS-B": "2.701", "QQP": "0", "WNLI": "0"}
    filled |= dict.fromkeys(("MNLI-m", "MNLI-mm", "QNLI", "RTE", "AX"), "entailment")
    assert {name: set(rows_of(path, f"{name}.tsv")) for name in filled} == {name: {filled[name]} for name in filled}
    assert len(set(rows_of(path, "CoLA.tsv"))) == 2
    output = capsys.readouterr()
    assert "| AX.tsv | 10 | PLACEHOLDER entailment |" in output.out
    assert "WARNING: PLACEHOLDERS" in output.err
    assert all(f"{name}.tsv" in output.err for name in filled)
    assert "CoLA" not in output.err.split("PLACEHOLDERS")[1]
    files = {file["file"]: file for file in json.loads((grid / "submission.json").read_text())["files"]}
    assert (files["QQP.tsv"]["trial"], files["QQP.tsv"]["placeholder"]) == (None, "0")


def test_placeholders_alone_are_no_submission(grid: Path, test_sets: Path) -> None:
    write_results(grid, {})
    with pytest.raises(UserError, match="nothing to submit"):
        submit(grid, test_sets, placeholders=True, tasks=TASKS_HERE)


@pytest.mark.parametrize("placeholders", [False, True])
def test_a_model_that_is_gone_is_named_and_never_filled(grid: Path, test_sets: Path, placeholders: bool) -> None:
    shutil.rmtree(kept_folder(grid, cell("rte")))
    with pytest.raises(UserError, match=r"the model of rte \(pretrained.* seed 2\) is gone: it belongs in .*seed-2"):
        submit(grid, test_sets, "pretrained", placeholders, COLA_AND_RTE)


def test_a_grid_that_kept_no_model_is_refused(grid: Path, test_sets: Path) -> None:
    shutil.rmtree(grid / "models")
    with pytest.raises(UserError, match="has kept no model"):
        submit(grid, test_sets, "pretrained", tasks=COLA_AND_RTE)


def break_results(grid: Path) -> None:
    (grid / "results.json").unlink()


def put_in_another_tasks_model(grid: Path) -> None:
    shutil.copytree(kept_folder(grid, cell("mnli")), kept_folder(grid, cell("rte")), dirs_exist_ok=True)


def edit_weights(grid: Path, edit: Any) -> None:
    path = kept_folder(grid, cell("rte")) / "model.safetensors"
    weights = load_file(path)
    edit(weights)
    save_file(weights, path, metadata={"format": "pt"})


def take_the_head(grid: Path) -> None:
    edit_weights(grid, lambda weights: weights.pop("classifier.weight"))


def put_in_nan(grid: Path) -> None:
    edit_weights(grid, lambda weights: weights["classifier.bias"].fill_(torch.nan))


def cut_the_weights(grid: Path) -> None:
    path = kept_folder(grid, cell("rte")) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_results, r"results.json does not exist: .*run the grid first"),
        (put_in_another_tasks_model, "has 3 outputs: it is not RTE's"),
        (take_the_head, r"lacks weights \(such as classifier.weight\)"),
        (put_in_nan, "does not predict finite numbers"),
        (cut_the_weights, "does not load"),
    ],
)
def test_a_damaged_grid_is_refused_and_leaves_the_earlier_submission(
    grid: Path, test_sets: Path, damage: Any, message: str
) -> None:
    (grid / "submission.zip").write_bytes(b"an earlier one")
    damage(grid)
    with pytest.raises(UserError, match=message):
        submit(grid, test_sets, "pretrained", tasks=COLA_AND_RTE)
    assert (grid / "submission.zip").read_bytes() == b"an earlier one"


def test_a_test_set_of_another_length_is_refused_before_any_prediction(
    grid: Path, test_sets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetune.submit.Predictor", None)  # cannot be called
    path = Path(shutil.copytree(test_sets, grid / "tsv")) / "RTE" / "test.tsv"
    path.write_text(path.read_text().rsplit("\n", 2)[0] + "\n")
    with pytest.raises(UserError, match=r"RTE's test has 9 rows, the official one .* has 10"):
        submit(grid, grid / "tsv", "pretrained", tasks=COLA_AND_RTE)
