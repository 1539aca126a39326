"""Classifiers that no one has trained, with the records of those that were."""

from pathlib import Path

import torch
from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

from finetune.model_record import ModelRecord, write_record


def make_model(
    folder: Path, tokenizer_folder: Path, labels: list[str], task_name: str | None = None, hidden_size: int = 16
) -> Path:
    """A BERT with large random weights, so that its outputs differ, and the record of ``task_name``."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=32,
        initializer_range=2 / hidden_size**0.5,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    torch.manual_seed(1)
    BertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if task_name:
        write_record(folder, record_of(task_name))
    return folder


def record_of(task_name: str) -> ModelRecord:
    """As a trial writes it, as far as a model's use goes."""
    return ModelRecord(
        base_model="run/hf",
        base_model_path="/nowhere",
        task_name=task_name,
        own_task=None,
        max_seq_length=12,
        rows={"train": 48, "dev": 16},
        cell={},
        protocol={},
        score=0.5,
        metric="accuracy",
        metrics={},
        epochs=[],
        seconds=1.0,
        device="cpu",
        versions={},
    )
