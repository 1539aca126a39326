import shutil
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

from common.errors import UserError
from finetune.kept_models import KeptModels, kept_folder
from finetune.model import Encoder
from finetune.model_record import ModelRecord, read_record
from finetune.tasks import TASKS
from finetune.trial import Cell

CELLS = [Cell("sst2", rate, 8, 3, "pretrained", seed) for rate in (1e-5, 3e-5) for seed in (1, 2, 3)]


@pytest.fixture
def base_model(model_folder: Path, tmp_path: Path) -> Path:
    """A pretrained model with the record of its pretraining."""
    folder = shutil.copytree(model_folder, tmp_path / "base")
    (folder / "pretraining.json").write_text('{"steps": 7}')
    return folder


@pytest.fixture
def keep(base_model: Path, tmp_path: Path):
    """Saves one and the same classifier as the model of a cell."""
    torch.manual_seed(0)
    classifier = Encoder(base_model).new_classifier(TASKS["sst2"], "pretrained", torch.device("cpu"))
    tokenizer, models = AutoTokenizer.from_pretrained(base_model), KeptModels(tmp_path, CELLS)

    def save(cell: Cell, scores: dict[Cell, float]) -> torch.nn.Module:
        with models.locked():
            models.keep(cell, scores, classifier, tokenizer, record_of(cell, base_model))
            models.prune(scores)
        return classifier

    return save


def record_of(cell: Cell, base_model: Path) -> ModelRecord:
    return ModelRecord(
        base_model="run/hf",
        base_model_path=str(base_model),
        task_name="sst2",
        own_task=None,
        max_seq_length=32,
        rows={"train": 24, "dev": 12},
        cell=asdict(cell),
        protocol={},
        score=0.5,
        metric="accuracy",
        metrics={"dev": {"accuracy": 0.5}},
        epochs=[],
        seconds=1.0,
        device="cpu",
        versions={"torch": "2"},
    )


def kept(folder: Path) -> set[Cell]:
    return {cell for cell in CELLS if kept_folder(folder, cell).is_dir()}


def test_in_the_end_the_models_of_the_best_configuration_are_left(keep, tmp_path: Path):
    scores = {}
    for cell, score in zip(CELLS, (0.5, 0.6, 0.7, 0.9, 0.8, 0.1), strict=True):
        scores[cell] = score
        keep(cell, dict(scores))
    assert kept(tmp_path) == set(CELLS[3:])
    assert KeptModels(tmp_path, CELLS).median_model(scores) == kept_folder(tmp_path, CELLS[4])


def test_what_can_no_longer_be_best_is_not_even_saved(keep, tmp_path: Path):
    scores = dict(zip(CELLS, (0.5, 0.6, 0.7, 0.1, 0.2), strict=False))
    keep(CELLS[4], scores)
    assert kept(tmp_path) == set()
    assert KeptModels(tmp_path, CELLS).median_model(scores) is None, "a trial has no score yet"


def test_a_kept_model_loads_with_its_label_names_in_any_program(keep, tmp_path: Path):
    classifier = keep(CELLS[0], {CELLS[0]: 0.5})
    folder = kept_folder(tmp_path, CELLS[0])
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    loaded = AutoModelForSequenceClassification.from_pretrained(folder).state_dict()
    assert all(torch.equal(loaded[name], weight) for name, weight in classifier.state_dict().items())
    assert pipeline("text-classification", model=str(folder))("the cat was good")[0]["label"] in (
        "negative",
        "positive",
    )


def test_a_kept_model_says_how_it_was_made_and_how_its_base_model_was(keep, base_model: Path, tmp_path: Path):
    keep(CELLS[0], {CELLS[0]: 0.5})
    folder = kept_folder(tmp_path, CELLS[0])
    assert read_record(folder) == record_of(CELLS[0], base_model)
    assert read_record(folder).task is TASKS["sst2"]
    assert (folder / "pretraining.json").read_text() == '{"steps": 7}'
    with pytest.raises(UserError, match=r"has no finetuning\.json"):
        read_record(base_model)


def test_starts_and_values_have_folders_of_their_own(tmp_path: Path):
    changes = [{"initialization": "mnli"}, {"num_epochs": 5}, {"seed": 9}, {"precision": "bf16"}]
    others = [replace(CELLS[0], **change) for change in changes]
    assert len({kept_folder(tmp_path, cell) for cell in [*CELLS, *others]}) == len(CELLS) + 4
