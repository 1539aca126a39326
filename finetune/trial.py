"""One fine-tuning run of one task with one set of hyperparameters and one seed."""

import math
import time
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from finetune.data import TokenizedSplit, TokenizedTask, evaluation_batches, num_batches, training_batches
from finetune.metrics import compute
from finetune.model import Encoder, Initialization
from finetune.tasks import TASKS, Task

MAX_GRADIENT_NORM: Final = 1.0  # run_glue's default, which the papers' fine-tuning used
EVALUATION_BATCH_SIZE: Final = 64


class TrialFailure(Exception):
    """A run that cannot give a score; the message is its cause."""


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: everything that tells two trials apart."""

    task_name: str
    learning_rate: float
    batch_size: int
    num_epochs: int
    initialization: Initialization
    seed: int

    def __str__(self) -> str:
        return (
            f"{self.task_name} ({self.initialization}, learning rate {self.learning_rate:g}, batch {self.batch_size},"
            f" {self.num_epochs} epochs, seed {self.seed})"
        )


@dataclass(frozen=True)
class Protocol:
    """What all trials have in common."""

    max_seq_length: int
    weight_decay: float
    warmup_proportion: float


def run_trial(cell: Cell, protocol: Protocol, encoder: Encoder, data: TokenizedTask, device: torch.device) -> dict:
    """Fine-tune and evaluate after each epoch; the score is the last epoch's.

    ``cell.seed`` decides the head (and a random encoder), the order of the rows, and dropout. On a CPU the same cell
    with the same number of threads gives the same score.

    Returns:
        ``score``, ``epochs`` (``epoch``, ``train_loss``, ``eval_loss``, ``metrics`` of each split), ``seconds``,
        ``rows_per_second`` (training alone) and ``device``; scores are fractions.

    Raises:
        TrialFailure: the loss is not a finite number.
    """
    started = time.monotonic()
    task, training_data = TASKS[cell.task_name], data.splits["train"]
    torch.manual_seed(cell.seed)
    classifier = encoder.new_classifier(task, cell.initialization, device)
    groups = _parameter_groups(classifier, protocol.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=cell.learning_rate, fused=True)  # half a small model's time on a CPU
    num_steps = cell.num_epochs * num_batches(training_data, cell.batch_size)
    warmup_steps = math.ceil(protocol.warmup_proportion * num_steps)
    scheduler = get_linear_schedule_with_warmup(optimizer, warmup_steps, num_steps)
    epochs, training_seconds = [], 0.0
    for epoch in range(1, cell.num_epochs + 1):
        epoch_started = time.monotonic()
        batches = training_batches(training_data, cell.batch_size, data.pad_token_id, seed=[cell.seed, epoch])
        train_loss = _train_epoch(classifier, optimizer, scheduler, batches, device)
        training_seconds += time.monotonic() - epoch_started
        epochs.append({"epoch": epoch, "train_loss": train_loss, **_evaluate_all(classifier, task, data, device)})
    return {
        "score": epochs[-1]["metrics"][task.evaluation_splits[0]][task.selected_by],
        "epochs": epochs,
        "seconds": time.monotonic() - started,
        "rows_per_second": cell.num_epochs * len(training_data) / training_seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }


def _parameter_groups(classifier: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """No weight decay on biases and LayerNorms, which are the parameters of one dimension."""
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _train_epoch(classifier, optimizer, scheduler, batches, device) -> float:
    """One pass over the training rows; returns their mean loss."""
    classifier.train()
    total_loss, num_rows = torch.zeros((), device=device), 0
    for batch in batches:
        labels = batch.labels.to(device)
        loss = _loss(_logits(classifier, batch.inputs, device), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), MAX_GRADIENT_NORM)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        total_loss += loss.detach() * len(labels)
        num_rows += len(labels)
    return _finite(total_loss.item() / num_rows, "training")


def _evaluate_all(classifier: PreTrainedModel, task: Task, data: TokenizedTask, device: torch.device) -> dict[str, Any]:
    """``eval_loss`` on the split that scores, and ``metrics`` on each evaluation split."""
    evaluations = {
        split: _evaluate(classifier, task, data.splits[split], data.pad_token_id, device)
        for split in task.evaluation_splits
    }
    return {
        "eval_loss": evaluations[task.evaluation_splits[0]][0],
        "metrics": {split: metrics for split, (_, metrics) in evaluations.items()},
    }


@torch.inference_mode()
def _evaluate(
    classifier: PreTrainedModel, task: Task, data: TokenizedSplit, pad_token_id: int, device: torch.device
) -> tuple[float, dict[str, float]]:
    classifier.eval()
    predictions = np.empty_like(data.labels)
    total_loss = torch.zeros((), device=device)
    for batch in evaluation_batches(data, EVALUATION_BATCH_SIZE, pad_token_id):
        logits, labels = _logits(classifier, batch.inputs, device), batch.labels.to(device)
        total_loss += _loss(logits, labels) * len(labels)
        predicted = logits.argmax(dim=-1) if task.labels else logits.squeeze(-1)
        predictions[batch.rows] = predicted.cpu().numpy()
    loss = _finite(total_loss.item() / len(data), "evaluation")
    return loss, compute(task.metrics, predictions, np.asarray(data.labels))


def _logits(classifier: PreTrainedModel, inputs: dict[str, torch.Tensor], device: torch.device) -> torch.Tensor:
    """float32 [batch, labels]; bfloat16 inside where a GPU has it."""
    inputs = {name: tensor.to(device, non_blocking=True) for name, tensor in inputs.items()}
    bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16):
        return classifier(**inputs).logits.float()


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared error for scores, cross-entropy for classes."""
    if labels.is_floating_point():
        return functional.mse_loss(logits.squeeze(-1), labels)
    return functional.cross_entropy(logits, labels)


def _finite(loss: float, what: str) -> float:
    if not math.isfinite(loss):
        raise TrialFailure(f"the {what} loss is {loss}: the learning rate is too high, or the weights are damaged")
    return loss
