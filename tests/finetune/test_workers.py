"""A worker in this process, on trials that fail in every way."""

from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

import finetune.workers as workers
from finetune.examples import read_task
from finetune.losses import TrialFailure
from finetune.study import TrialStore
from finetune.tasks import TASKS
from finetune.tokens import tokenize_split
from finetune.trial import Cell, Protocol, run_trial
from finetune.workers import CANNOT_WRITE, Assignment, Worker

CELLS = [Cell("sst2", rate, 8, 1, "pretrained", seed) for rate in (1e-3, 3e-3) for seed in (1, 2)]


@pytest.fixture
def assignment(model_folder: Path, glue_dir: Path, tmp_path: Path) -> Assignment:
    tokenizer, task, cache = AutoTokenizer.from_pretrained(model_folder), TASKS["sst2"], tmp_path / "cache"
    folders = {
        split: tokenize_split(examples, task, tokenizer, "words", 32, cache)
        for split, examples in read_task(task, glue_dir).items()
    }
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    store = TrialStore(url)
    store.open_study("sst2", {}, {})
    store.enqueue_missing("sst2", dict.fromkeys(CELLS, 1.0))
    protocol = Protocol(32, 0.1, 0.06)
    return Assignment(
        name="worker 0",
        storage_url=url,
        output_dir=tmp_path,
        model_folder=model_folder,
        model_name="run/hf",
        protocol=protocol,
        keep_models=True,
        save_steps=None,
        logging_steps=None,
        tasks={"sst2": task},
        cells={"sst2": CELLS},
        split_folders={"sst2": folders},
        num_threads=1,
        device="cpu",
    )


def test_a_failing_trial_is_tried_once_more_and_the_rest_goes_on(assignment: Assignment, monkeypatch):
    attempts: list[Cell] = []

    def sometimes_fails(task, cell, *arguments):
        attempts.append(cell)
        if cell == CELLS[0]:
            raise TrialFailure("the training loss is nan")
        if cell == CELLS[1] and attempts.count(cell) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory\nwith many lines")
        return run_trial(task, cell, *arguments)

    monkeypatch.setattr(workers, "run_trial", sometimes_fails)
    Worker(assignment).run()
    store = TrialStore(assignment.storage_url)
    assert [attempts.count(cell) for cell in CELLS] == [2, 2, 1, 1]
    assert store.results("sst2").keys() == set(CELLS[1:])
    assert store.results("sst2")[CELLS[1]]["attempt"] == 2
    causes = ["the training loss is nan", "the training loss is nan", "OutOfMemoryError: CUDA out of memory"]
    assert sorted(cause for _, cause in store.failures("sst2")) == sorted(causes)


def test_a_worker_that_cannot_save_leaves_and_its_trial_is_no_failure(assignment: Assignment, monkeypatch):
    class Left(Exception):
        pass

    def leave(code: int, message: str) -> None:
        raise Left(code, message)

    monkeypatch.setattr(workers, "_leave", leave)
    monkeypatch.setattr(workers.KeptModels, "keep", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(Left, match="No space left") as leaving:
        Worker(assignment).run()
    assert leaving.value.args[0] == CANNOT_WRITE
    store = TrialStore(assignment.storage_url)
    assert (len(store.running(["sst2"])), store.results("sst2"), store.failures("sst2")) == (1, {}, [])


def test_every_trial_tells_who_ran_it_when_and_with_what(assignment: Assignment):
    Worker(assignment).run()
    for cell, result in TrialStore(assignment.storage_url).results("sst2").items():
        assert result["worker"] == "worker 0", cell
        assert result["versions"].keys() >= {"torch", "transformers"}
        assert result["device"] == "cpu"
        assert result["seconds"] > 0 < result["rows_per_second"]
        assert result["finished_at"].endswith("+00:00")
