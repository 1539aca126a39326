"""A classifier's outputs and decisions."""

import functools
from collections.abc import Callable
from typing import Final, Literal

import numpy as np
import torch
from transformers import PreTrainedModel

from finetune.batches import Batch, DeviceSplit
from finetune.tasks import Task

EVALUATION_BATCH_SIZE: Final = 64

Precision = Literal["fp32", "bf16", "fp16"]
"""Of the matrix products; weights are float32."""


@torch.inference_mode()
def predict(
    classifier: PreTrainedModel,
    data: DeviceSplit,
    precision: Precision = "fp32",
    compiled: bool = False,
    batch_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits of all rows, in the split's order, and their labels.

    They are computed ``batch_size`` rows at a time, by default :data:`EVALUATION_BATCH_SIZE`.

    Returns:
        float32 [rows, outputs], and int64 or float32 [rows] or None, on the CPU.
    """
    classifier.eval()
    rows, logits, labels = [], [], []
    for batch in data.evaluation_batches(batch_size or EVALUATION_BATCH_SIZE):
        rows.append(batch.rows)
        logits.append(logits_of(classifier, batch, precision, compiled))
        labels.append(batch.labels)
    order = torch.from_numpy(np.argsort(np.concatenate(rows)))
    all_labels = None if labels[0] is None else torch.cat(labels).cpu()[order]
    return torch.cat(logits).cpu()[order], all_labels


def decide(task: Task, logits: torch.Tensor) -> np.ndarray:
    """Predicted class indices, or scores; [rows]."""
    return (logits.argmax(dim=-1) if task.labels else logits.squeeze(-1)).numpy()


def logits_of(classifier: PreTrainedModel, batch: Batch, precision: Precision, compiled: bool = False) -> torch.Tensor:
    """float32 [batch, outputs], in ``precision`` inside."""
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    device_type = batch.inputs["input_ids"].device.type
    with torch.autocast(device_type, dtype, enabled=precision != "fp32"):
        return _forward(compiled)(classifier, batch.inputs).float()


@functools.cache
def _forward(compiled: bool) -> Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor]:
    """Compiled, the graph serves every trial of the process: it is the function's, not one classifier's."""

    def forward(classifier: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return classifier(**inputs).logits

    return torch.compile(forward, dynamic=True) if compiled else forward
