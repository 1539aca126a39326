"""Single runs and replicates, against transformers' own pipeline and scikit-learn."""

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from sklearn.metrics import accuracy_score
from transformers import pipeline

from common.errors import UserError
from finetune.train import train
from finetune.train_flags import read_flags
from finetune.trial import Cell
from tests.finetune.conftest import BAD, GOOD, sentence, write_rows, write_small_tasks
from tests.finetune.made_models import made_record, write_model

REPOSITORY = Path(__file__).parents[2]
FLAGS = (
    "--task_name SST2 --do_train --do_eval --do_predict --max_seq_length 32 --per_device_train_batch_size 8"
    " --learning_rate 3e-3 --num_train_epochs 2 --num_seeds 2 --eval_steps 4 --logging_steps 2 --save_steps 5"
).split()


def run(*flags: str | Path) -> str:
    """What the command prints."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        train(read_flags([str(flag) for flag in flags]))
    return output.getvalue()


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows_of(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text().splitlines()[1:]]


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text())


@pytest.fixture(scope="module")
def glue_with_test_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, random = write_small_tasks(tmp_path_factory.mktemp("glue")), Random(1)
    texts = [sentence(random, random.choice((GOOD, BAD))) for _ in range(9)]
    write_rows(
        folder / "SST-2" / "test.tsv", [["index", "sentence"], *([str(i), text] for i, text in enumerate(texts))]
    )
    return folder


@pytest.fixture(scope="module")
def command(model_folder: Path, glue_with_test_set: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folders = ["--model_name_or_path", model_folder, "--glue_dir", glue_with_test_set]
    return [*FLAGS, *map(str, folders), "--output_dir", str(tmp_path_factory.mktemp("train") / "O")]


@pytest.fixture(scope="module")
def printed(command: list[str]) -> str:
    return run(*command)


@pytest.fixture(scope="module")
def trained(command: list[str], printed: str) -> Path:
    return Path(command[-1])


def test_a_pipeline_loads_the_model_with_real_label_names_and_scores_what_is_reported(
    trained: Path, glue_with_test_set: Path
):
    classify = pipeline("text-classification", model=str(trained))
    rows = rows_of(glue_with_test_set / "SST-2" / "dev.tsv")
    answers = [classify(text)[0]["label"] for text, _ in rows]
    accuracy = accuracy_score([{"0": "negative", "1": "positive"}[label] for _, label in rows], answers)
    assert read(trained, "eval_results.json")["eval_accuracy"] == pytest.approx(accuracy)


def test_the_model_is_the_median_seeds(trained: Path):
    summary = read(trained, "results.json")["tasks"]["sst2"]
    (kept,) = (trained / "models" / "sst2").glob(f"*/seed-{summary['median_seed']}/model.safetensors")
    assert (trained / "model.safetensors").read_bytes() == kept.read_bytes()
    assert read(trained, "finetuning.json")["cell"]["seed"] == summary["median_seed"]
    assert len(summary["scores"]) == 2


def test_predictions_are_the_label_names_of_the_test_sets_rows_in_their_order(trained: Path, glue_with_test_set: Path):
    classify = pipeline("text-classification", model=str(trained))
    texts = [text for _, text in rows_of(glue_with_test_set / "SST-2" / "test.tsv")]
    lines = (trained / "predict_results_sst2.txt").read_text().splitlines()
    assert lines[0] == "index\tprediction"
    assert lines[1:] == [f"{index}\t{classify(text)[0]['label']}" for index, text in enumerate(texts)]


def test_results_have_run_glues_names(trained: Path):
    train_results, eval_results = read(trained, "train_results.json"), read(trained, "eval_results.json")
    assert train_results.keys() >= {"epoch", "train_loss", "train_runtime", "train_samples_per_second"}
    assert eval_results.keys() >= {"epoch", "eval_loss", "eval_accuracy", "eval_runtime", "eval_samples"}
    assert (train_results["epoch"], train_results["train_samples"], eval_results["eval_samples"]) == (2.0, 48, 16)
    assert read(trained, "all_results.json") == train_results | eval_results


def test_replicates_times_and_curves_are_told(trained: Path, printed: str):
    assert "| best | mean | deviation |" in printed
    assert "seconds an epoch" in printed
    steps = [point["step"] for point in read(trained, "results.json")["trials"][0]["evaluations"]]
    assert steps == [4, 8], "6 steps an epoch: 12 is the end of the second"
    assert len(list((trained / "trials").rglob("events.out.tfevents.*"))) == 2, "one for each seed"


def test_the_same_command_trains_nothing_again(trained: Path, command: list[str]):
    before = content(trained)
    run(*command)
    after = content(trained)
    unchanged = [name for name in before if name not in ("provenance.json", ".lock") and "report" not in name]
    assert {name: after[name] for name in unchanged} == {name: before[name] for name in unchanged}


def test_a_model_as_it_is_scores_what_its_training_said(trained: Path, glue_with_test_set: Path, tmp_path: Path):
    run("--model_name_or_path", trained, "--do_eval", "--glue_dir", glue_with_test_set, "--output_dir", tmp_path / "E")
    then, now = read(trained, "eval_results.json"), read(tmp_path / "E", "eval_results.json")
    assert now["eval_accuracy"] == then["eval_accuracy"]
    assert now["eval_loss"] == pytest.approx(then["eval_loss"], rel=1e-5)
    assert not (tmp_path / "E" / "model.safetensors").exists()


def test_a_regression_as_it_is_is_scored_as_scipy_does(model_folder: Path, glue_with_test_set: Path, tmp_path: Path):
    record = made_record(Cell("stsb", 1e-5, 32, 3, "pretrained", 1), max_seq_length=32)
    model = write_model(tmp_path / "model", record, model_folder)
    run("--model_name_or_path", model, "--do_eval", "--glue_dir", glue_with_test_set, "--output_dir", tmp_path / "E")
    rows = [line.split("\t") for line in (glue_with_test_set / "STS-B" / "dev.tsv").read_text().splitlines()[1:]]
    similarity = pipeline("text-classification", model=str(model), function_to_apply="none")
    cut = {"truncation": True, "max_length": 32}
    scores = [similarity({"text": row[-3], "text_pair": row[-2]}, **cut)["score"] for row in rows]
    expected = spearmanr(scores, [float(row[-1]) for row in rows]).statistic
    assert read(tmp_path / "E", "eval_results.json")["eval_spearmanr"] == pytest.approx(expected, abs=1e-4)


def test_a_model_whose_labels_are_in_another_order_is_scored_by_their_names(
    trained: Path, glue_with_test_set: Path, tmp_path: Path
):
    other = tmp_path / "other"
    shutil.copytree(trained, other, ignore=shutil.ignore_patterns("models", "cache", "trials"))
    weights = load_file(other / "model.safetensors")
    swapped = {name: value.flip(0) if name.startswith("classifier") else value for name, value in weights.items()}
    save_file(swapped, other / "model.safetensors", metadata={"format": "pt"})
    config = read(other, "config.json")
    config |= {"id2label": {0: "positive", 1: "negative"}, "label2id": {"positive": 0, "negative": 1}}
    (other / "config.json").write_text(json.dumps(config))
    folders = ["--glue_dir", glue_with_test_set, "--output_dir", tmp_path / "E"]
    run("--model_name_or_path", other, "--do_eval", "--task_name", "sst2", *folders)
    expected = read(trained, "eval_results.json")["eval_accuracy"]
    assert read(tmp_path / "E", "eval_results.json")["eval_accuracy"] == expected != 0.5


def test_a_tuned_model_predicts_a_file_of_ones_own(trained: Path, tmp_path: Path):
    texts = ["the cat was good", "the film was dull and the lamp was bad"]
    (tmp_path / "test.csv").write_text("\n".join(["id,sentence", *(f"7,{text}" for text in texts)]) + "\n")
    run(
        "--model_name_or_path",
        trained,
        "--do_predict",
        "--test_file",
        tmp_path / "test.csv",
        "--output_dir",
        tmp_path / "P",
    )
    classify = pipeline("text-classification", model=str(trained))
    lines = (tmp_path / "P" / "predict_results_sst2.txt").read_text().splitlines()
    assert lines[1:] == [f"{index}\t{classify(text)[0]['label']}" for index, text in enumerate(texts)]


WRONG = {
    "no test set": (["--task_name", "stsb", "--do_train", "--do_predict"], "STS-B/test.tsv does not exist"),
    "no such model": (["--task_name", "sst2", "--model_name_or_path", "/nowhere"], "/nowhere"),
    "no rows": (["--task_name", "rte", "--max_seq_length", "32"], "RTE"),
    "fp16 without a GPU": (["--task_name", "sst2", "--fp16"], "fp16 needs a GPU"),
    "a model that was never tuned": (["--do_eval"], "finetuning.json"),
    "a head that is not there": (["--do_eval", "--task_name", "sst2"], "lacks weights"),
    "several tasks of one model": (["--do_eval", "--task_name", "sst2", "stsb"], "one task"),
    "too long": (["--task_name", "sst2", "--max_seq_length", "128"], "positions for 64"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_ends_in_one_line_and_nothing_is_written(
    case: str, model_folder: Path, glue_with_test_set: Path, tmp_path: Path
):
    flags, expected = WRONG[case]
    if case == "fp16 without a GPU" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    folders = ["--model_name_or_path", model_folder, "--glue_dir", glue_with_test_set, "--output_dir", tmp_path / "O"]
    with pytest.raises(UserError) as error:
        run(*folders, *flags)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "O").exists()


@pytest.mark.parametrize("flags", [["--do_train", "--max_seq_length", "32"], ["--do_eval"]])
def test_a_folder_of_something_else_is_left_alone(
    flags: list[str], trained: Path, glue_with_test_set: Path, tmp_path: Path
):
    (tmp_path / "thesis.txt").write_text("mine")
    folders = ["--model_name_or_path", trained, "--glue_dir", glue_with_test_set, "--output_dir", tmp_path]
    with pytest.raises(UserError, match="not ours"):
        run("--task_name", "sst2", *flags, *folders)
    assert content(tmp_path) == {"thesis.txt": b"mine"}


def test_without_a_login_nothing_is_trained_for_the_hub(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_file", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_environment", lambda: None)
    with pytest.raises(UserError, match="hf auth login"):
        run(*command[:-1], tmp_path / "O", "--push_to_hub")
    assert not (tmp_path / "O").exists()


@pytest.mark.slow
def test_own_data_are_a_task(model_folder: Path, glue_with_test_set: Path, tmp_path: Path):
    for split, name in (("train", "train"), ("dev", "validation")):
        rows = rows_of(glue_with_test_set / "SST-2" / f"{split}.tsv")
        lines = [f"{'good' if label == '1' else 'bad'},{text}" for text, label in rows]
        (tmp_path / f"{name}.csv").write_text("\n".join(["label,review", *lines]) + "\n")
    files = ["--train_file", tmp_path / "train.csv", "--validation_file", tmp_path / "validation.csv"]
    flags = "--max_seq_length 32 --learning_rate 3e-3 --num_train_epochs 1.5 --do_train --do_predict".split()
    more = ["--test_file", tmp_path / "validation.csv", "--output_dir", tmp_path / "O"]
    run("--model_name_or_path", model_folder, *files, *flags, *more)
    classify = pipeline("text-classification", model=str(tmp_path / "O"))
    assert classify("the cat was good")[0]["label"] in ("bad", "good")
    predictions = (tmp_path / "O" / "predict_results_own_data.txt").read_text().splitlines()[1:]
    assert len(predictions) == 16
    assert {line.split("\t")[1] for line in predictions} <= {"bad", "good"}
    assert read(tmp_path / "O", "train_results.json")["epoch"] == 1.5
    (tmp_path / "again").mkdir()
    more = ["--glue_dir", glue_with_test_set, "--output_dir", tmp_path / "again" / "O"]
    run("--model_name_or_path", tmp_path / "O", "--task_name", "sst2", "stsb", "--max_seq_length", "32", *more)
    for name in ("sst2", "stsb"):
        assert (tmp_path / "again" / "O" / name / "config.json").exists()


@contextlib.contextmanager
def started(flags: list[str], output_dir: Path) -> Iterator[subprocess.Popen]:
    """The command as a process group of its own, which does not outlive the test."""
    argv = [sys.executable, "-m", "finetune", "train", *flags, "--output_dir", str(output_dir)]
    process = subprocess.Popen(argv, cwd=REPOSITORY, start_new_session=True)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_killed_run_goes_on_from_its_checkpoint_to_the_same_weights(command: list[str], tmp_path: Path):
    flags = [*command[:-2], "--num_seeds", "1", "--num_train_epochs", "20"]
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    with started(flags, undisturbed) as process:
        assert process.wait(timeout=140) == 0
    with started(flags, killed):
        deadline = time.monotonic() + 140
        while not list(killed.rglob("checkpoint.pt")) and time.monotonic() < deadline:
            time.sleep(0.02)
    (checkpoint,) = killed.rglob("checkpoint.pt")
    assert 0 < torch.load(checkpoint, weights_only=True)["training"]["step_number"] < 120, "killed on the way"
    assert not (killed / "config.json").exists()
    with started(flags, killed) as process:
        assert process.wait(timeout=140) == 0
    first, second = ((folder / "model.safetensors").read_bytes() for folder in (undisturbed, killed))
    assert first == second
