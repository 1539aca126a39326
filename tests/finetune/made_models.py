"""Tuned models that nobody tuned: a classifier with random weights, and the record of a trial made by hand."""

from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from finetune.model import Encoder
from finetune.model_record import ModelRecord, copy_pretraining, write_record
from finetune.tasks import find_task
from finetune.trial import Cell
from tests.finetune.made_results import PROTOCOL, trial

BASE_MODEL_PATH = "/home/someone/models/run/hf"


def made_record(cell: Cell, **changes: Any) -> ModelRecord:
    """Three epochs, of which the last one scores 0.75; from a model of a run here."""
    task, result = find_task(cell.task_name), trial(cell.task_name, 0.5, 0.7, 0.75)
    record = ModelRecord(
        base_model="run/hf",
        base_model_path=BASE_MODEL_PATH,
        task_name=cell.task_name,
        own_task=None,
        max_seq_length=128,
        rows=dict(task.official_rows),
        cell=asdict(cell),
        protocol=PROTOCOL,
        score=0.75,
        metric=task.selected_by,
        metrics=result["epochs"][-1]["metrics"],
        epochs=result["epochs"],
        seconds=12.5,
        device="cpu",
        versions={"torch": "2.11.0"},
    )
    return replace(record, **changes)


def write_model(folder: Path, record: ModelRecord, base_model: Path) -> Path:
    """A whole folder of this record: a classifier on the encoder of ``base_model``, its tokenizer and the record."""
    folder.mkdir(parents=True)
    classifier = Encoder(base_model).new_classifier(record.task, "pretrained", torch.device("cpu"))
    classifier.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base_model).save_pretrained(folder)
    write_record(folder, record)
    copy_pretraining(base_model, folder)
    return folder
