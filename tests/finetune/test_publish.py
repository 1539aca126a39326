"""What is published, against what a stand-in of the hub has received."""

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from finetune.kept_models import kept_folder
from finetune.model_record import read_record
from finetune.publish import publish_run, require_login
from finetune.results import median_cell_of
from finetune.trial import Cell
from tests.finetune.hub import TOKEN, Hub, running_hub
from tests.finetune.made_models import BASE_MODEL_PATH, made_record, write_model
from tests.finetune.made_results import grid, results_of, table_trial

CAUSE = "OSError: /home/someone/secret data/train.tsv & /mnt/disk7/cache/x.npy are gone"
PRETRAINING = {"steps": 7, "elapsed_seconds": 9.0, "training": {"seed": 1, "init_from": "/home/someone/bert"}}


@pytest.fixture(scope="module")
def grid_folder(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid of two tasks with its kept models, and a failure whose cause names paths."""
    folder = tmp_path_factory.mktemp("grid")
    base = shutil.copytree(model_folder, tmp_path_factory.mktemp("base") / "hf")
    (base / "pretraining.json").write_text(json.dumps(PRETRAINING))
    cells = {name: grid(name) for name in ("mrpc", "rte")}
    trials = {cell: {**table_trial(cell), "worker": "secret-host 12 worker 0"} for cell in cells["mrpc"] + cells["rte"]}
    results = results_of(cells, trials, [(cells["rte"][0], CAUSE)])
    (folder / "results.json").write_text(json.dumps(results))
    (folder / "report.html").write_text(
        f"<p>{CAUSE.replace('&', '&amp;')}</p><img src='data:image/png;base64,/a+/b/c'>"
    )
    for name, task in results["tasks"].items():
        cell = median_cell_of(name, task)
        write_model(kept_folder(folder, cell), made_record(cell, base_model_path=str(base)), base)
    return folder


@pytest.fixture
def model(model_folder: Path, tmp_path: Path) -> Path:
    """A tuned model alone, without the run that it is from."""
    return write_model(tmp_path / "model", made_record(Cell("mrpc", 1e-5, 32, 3, "pretrained", 1)), model_folder)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with running_hub(monkeypatch) as hub:
        yield hub


def listed(output: str) -> dict[str, tuple[int, str]]:
    """The files of a dry run: bytes and SHA-256 by name."""
    rows = re.findall(r"^\| (\S+) \| ([\d,]+) \| ([0-9a-f]{64}) \|$", output, flags=re.MULTILINE)
    return {name: (int(size.replace(",", "")), sha256) for name, size, sha256 in rows}


def test_what_is_sent_is_exactly_what_the_dry_run_shows(grid_folder: Path, hub: Hub, capsys):
    publish_run(grid_folder, "me/x", task_name="rte", license="mit", dry_run=True)
    output = capsys.readouterr().out
    assert hub.requests == []
    publish_run(grid_folder, "me/x", task_name="rte", license="mit")
    sent = {name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in hub.committed.items()}
    assert sent == listed(output)
    assert sent.keys() == {
        *("model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"),
        *("finetuning.json", "pretraining.json", "results.json", "report.html", "README.md"),
    }
    assert hub.committed["README.md"].decode() in output
    assert capsys.readouterr().out == f"{hub.endpoint}/me/x\n"


def test_the_model_is_the_tasks_median_seeds_byte_by_byte(grid_folder: Path, hub: Hub):
    publish_run(grid_folder, "me/x", task_name="rte")
    results = json.loads((grid_folder / "results.json").read_text())
    kept = kept_folder(grid_folder, median_cell_of("rte", results["tasks"]["rte"]))
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert hub.committed[name] == (kept / name).read_bytes()
    assert json.loads(hub.committed["pretraining.json"]) == {**PRETRAINING, "training": {"seed": 1}}


def test_nothing_of_this_machine_is_sent_but_what_failed_is(grid_folder: Path, hub: Hub, tmp_path: Path):
    publish_run(grid_folder, "me/x", task_name="rte")
    for name, content in hub.committed.items():
        text = content.decode("utf-8", errors="replace")
        for secret in ("/home/", "someone", "/mnt/", "secret-host", str(grid_folder.parent), TOKEN):
            assert secret not in text, f"{secret} in {name}"
    (failure,) = json.loads(hub.committed["results.json"])["failures"]
    assert failure["cause"].endswith("x.npy are gone")
    assert b"x.npy are gone" in hub.committed["report.html"]
    assert b"base64,/a+/b/c" in hub.committed["report.html"], "images are not texts"


def test_a_published_record_still_reads(model: Path, hub: Hub, tmp_path: Path):
    before = read_record(model)
    publish_run(model, "me/x")
    (tmp_path / "finetuning.json").write_bytes(hub.committed["finetuning.json"])
    after = read_record(tmp_path)
    assert (after.cell, after.metrics, after.base_model_path) == (before.cell, before.metrics, "run/hf")
    assert before.base_model_path == BASE_MODEL_PATH, "what lies here is not changed"


def test_a_users_own_files_are_named_without_their_folders(model_folder: Path, hub: Hub, tmp_path: Path):
    own = {
        "task_name": "reviews",
        "sentence_columns": ["text"],
        "label_column": "label",
        "metrics": ["accuracy"],
        "train": "/home/someone/train.csv",
        "dev": "../private/dev.csv",
        "labels": ["bad", "good"],
    }
    metrics = {"dev": {"accuracy": 0.5}}
    cell = Cell("mrpc", 1e-5, 32, 3, "pretrained", 1)
    record = made_record(cell, task_name="reviews", own_task=own, metrics=metrics, epochs=[], metric="accuracy")
    folder = write_model(tmp_path / "own", record, model_folder)
    publish_run(folder, "me/x")
    sent = json.loads(hub.committed["finetuning.json"])["own_task"]
    assert (sent["train"], sent["dev"]) == ("train.csv", "dev.csv")
    assert b"GLUE" not in hub.committed["README.md"]


def test_a_model_alone_is_sent_without_a_runs_files(model: Path, hub: Hub):
    publish_run(model, "x")
    assert not {"results.json", "report.html", "pretraining.json"} & hub.committed.keys()
    assert {"finetuning.json", "README.md", "model.safetensors"} < hub.committed.keys()


def test_a_pruned_model_takes_its_record_along(model: Path, hub: Hub):
    (model / "pruned_heads.json").write_text('{"heads": [2, 2], "removed": {"0": [1]}, "history": [{"0": [1]}]}')
    publish_run(model, "me/x")
    assert hub.committed["pruned_heads.json"] == (model / "pruned_heads.json").read_bytes()
    assert b"Pruned: 1 attention head fewer" in hub.committed["README.md"]


def test_a_public_repository_is_never_taken_for_a_private_one(model: Path, hub: Hub):
    with pytest.raises(UserError, match="exists on the hub and is public"):
        publish_run(model, "me/x", private=True)
    assert hub.committed == {}
    hub.is_private = True
    publish_run(model, "me/x", private=True)
    assert "README.md" in hub.committed


def one_line(error: pytest.ExceptionInfo[UserError]) -> str:
    message = str(error.value)
    assert "\n" not in message
    assert TOKEN not in message
    return message


def test_a_token_that_the_hub_does_not_know_is_one_line(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(UserError) as error:
        publish_run(model, "me/x")
    assert "does not know your token: run 'hf auth login'" in one_line(error)
    assert hub.committed == {}


def test_without_a_login_one_line_says_how_to_log_in(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(model / "no-token"))
    for command in (require_login, lambda: publish_run(model, "me/x")):
        with pytest.raises(UserError) as error:
            command()
        assert "nobody is logged in" in one_line(error)


def test_an_upload_that_breaks_off_is_one_line(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    hub.breaks_uploads = True
    with pytest.raises(UserError) as error:
        publish_run(model, "me/x")
    assert "the upload to me/x broke off (" in one_line(error)
    assert hub.committed == {}


def test_a_repository_of_others_is_one_line(model: Path, hub: Hub):
    with pytest.raises(UserError) as error:
        publish_run(model, "other/x")
    assert "does not let you write to other/x" in one_line(error)
    assert hub.committed == {}


def test_without_a_network_there_is_one_line(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError) as error:
        publish_run(model, "me/x")
    assert "can't be reached" in one_line(error)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"repo_id": "me/x"}, "has models of mrpc rte: name one with --task_name"),
        ({"repo_id": "me/x", "task_name": "cola"}, "has no model for --task_name cola"),
        ({"repo_id": "me//x", "task_name": "rte"}, "is no name of a repository"),
    ],
)
def test_what_can_not_be_published_is_told(options: dict[str, str], message: str, grid_folder: Path):
    with pytest.raises(UserError, match=message):
        publish_run(grid_folder, dry_run=True, **options)


def test_a_folder_without_a_whole_tuned_model_is_refused(model: Path, model_folder: Path, tmp_path: Path):
    with pytest.raises(UserError, match=r"has no finetuning\.json"):
        publish_run(model_folder, "me/x", dry_run=True)
    with pytest.raises(UserError, match="is tuned for mrpc, not for rte"):
        publish_run(model, "me/x", task_name="rte", dry_run=True)
    (model / "model.safetensors").unlink()
    with pytest.raises(UserError, match="or no weights"):
        publish_run(model, "me/x", dry_run=True)
