"""One fine-tuning run of one task with one set of hyperparameters and one seed."""

import functools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, get_linear_schedule_with_warmup

from finetune.batches import Batch, DeviceSplit
from finetune.metrics import compute
from finetune.model import Encoder, Initialization
from finetune.tasks import Task

MAX_GRADIENT_NORM: Final = 1.0  # run_glue's default, which the papers' fine-tuning used
EVALUATION_BATCH_SIZE: Final = 64

Precision = Literal["fp32", "bf16", "fp16"]
ScoreEpoch = Literal["last", "best"]


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

    @property
    def configuration(self) -> tuple[float, int, int]:
        """What the median over the seeds is taken of."""
        return self.learning_rate, self.batch_size, self.num_epochs

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
    precision: Precision
    """Of the matrix products; weights and optimizer are float32."""
    score_epoch: ScoreEpoch = "last"
    compile: bool = False


def run_trial(
    task: Task,
    cell: Cell,
    protocol: Protocol,
    encoder: Encoder,
    data: Mapping[str, DeviceSplit],
    device: torch.device,
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Fine-tune, and evaluate after each epoch; the score is the last epoch's, or the best one's if the protocol says.

    ``cell.seed`` decides the head (and a random encoder), the order of the rows, and dropout. On a CPU the same cell
    with the same number of threads gives the same score.

    Args:
        task: what ``cell.task_name`` names.
        cell: hyperparameters, start and seed.
        protocol: what it has in common with all other trials.
        encoder: the weights to start from.
        data: the task's training split and evaluation splits, on ``device``.
        device: where to compute.

    Returns:
        The result and the classifier that has this score. The result: ``score`` (a fraction) and ``score_epoch_index``,
        ``epochs`` (``epoch``, ``train_loss``, ``eval_loss``, ``metrics`` of each split), ``seconds``,
        ``rows_per_second`` (training alone) and ``device``.

    Raises:
        TrialFailure: the loss is not a finite number.
    """
    started = time.monotonic()
    torch.manual_seed(cell.seed)
    classifier = encoder.new_classifier(task, cell.initialization, device)
    training = Training(classifier, cell, protocol, data["train"], device)
    epochs: list[dict[str, Any]] = []
    training_seconds, best_weights = 0.0, None
    for epoch in range(1, cell.num_epochs + 1):
        epoch_started = time.monotonic()
        train_loss = training.epoch(epoch)
        training_seconds += time.monotonic() - epoch_started
        epochs.append({"epoch": epoch, "train_loss": train_loss, **_evaluate_all(classifier, task, protocol, data)})
        if protocol.score_epoch == "best" and _best_epoch(task, epochs) is epochs[-1] and epoch < cell.num_epochs:
            best_weights = {name: weight.clone() for name, weight in classifier.state_dict().items()}
    scored = epochs[-1] if protocol.score_epoch == "last" else _best_epoch(task, epochs)
    if scored is not epochs[-1]:
        classifier.load_state_dict(best_weights)
    result = {
        "score": _score(task, scored),
        "score_epoch_index": scored["epoch"] - 1,
        "epochs": epochs,
        "seconds": time.monotonic() - started,
        "rows_per_second": cell.num_epochs * len(data["train"]) / training_seconds,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
    }
    return result, classifier


def _score(task: Task, epoch: Mapping[str, Any]) -> float:
    return epoch["metrics"][task.evaluation_splits[0]][task.selected_by]


def _best_epoch(task: Task, epochs: list[dict[str, Any]]) -> dict[str, Any]:
    """The first with the highest score."""
    return max(epochs, key=lambda epoch: _score(task, epoch))


class Training:
    """A classifier with its optimizer and schedule: AdamW, linear warmup and decay, clipped gradients."""

    def __init__(
        self, classifier: PreTrainedModel, cell: Cell, protocol: Protocol, data: DeviceSplit, device: torch.device
    ) -> None:
        self._classifier, self._cell, self._protocol, self._data = classifier, cell, protocol, data
        groups = parameter_groups(classifier, protocol.weight_decay)
        self._optimizer = torch.optim.AdamW(groups, lr=cell.learning_rate, fused=True)  # half a small model's time
        num_steps = cell.num_epochs * data.num_batches(cell.batch_size)
        warmup_steps = math.ceil(protocol.warmup_proportion * num_steps)
        self._schedule = get_linear_schedule_with_warmup(self._optimizer, warmup_steps, num_steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=protocol.precision == "fp16")

    def epoch(self, epoch: int) -> float:
        """One pass over the training rows; returns their mean loss."""
        self._classifier.train()
        losses, num_rows = [], []
        for batch in self._data.training_batches(self._cell.batch_size, seed=[self._cell.seed, epoch]):
            losses.append(self.step(batch))
            num_rows.append(len(batch.rows))
        total = torch.stack(losses).double().cpu() @ torch.tensor(num_rows, dtype=torch.float64)
        return _finite(total.item() / len(self._data), "training")

    def step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; returns the mean loss of the batch, on the device."""
        loss = _loss(logits_of(self._classifier, batch, self._protocol), batch.labels)
        self._scaler.scale(loss).backward()
        self._scaler.unscale_(self._optimizer)
        torch.nn.utils.clip_grad_norm_(self._classifier.parameters(), MAX_GRADIENT_NORM)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        self._schedule.step()
        self._optimizer.zero_grad()
        return loss.detach()


def parameter_groups(classifier: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """No weight decay on biases and LayerNorms, which are the parameters of one dimension."""
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _evaluate_all(
    classifier: PreTrainedModel, task: Task, protocol: Protocol, data: Mapping[str, DeviceSplit]
) -> dict[str, Any]:
    """``eval_loss`` on the split that scores, and ``metrics`` on each evaluation split."""
    evaluations = {split: _evaluate(classifier, task, protocol, data[split]) for split in task.evaluation_splits}
    return {
        "eval_loss": evaluations[task.evaluation_splits[0]][0],
        "metrics": {split: metrics for split, (_, metrics) in evaluations.items()},
    }


def _evaluate(
    classifier: PreTrainedModel, task: Task, protocol: Protocol, data: DeviceSplit
) -> tuple[float, dict[str, float]]:
    logits, labels = predict(classifier, data, protocol)
    loss = _finite(_loss(logits, labels).item(), "evaluation")
    return loss, compute(task.metrics, decide(task, logits), labels.numpy())


@torch.inference_mode()
def predict(
    classifier: PreTrainedModel, data: DeviceSplit, protocol: Protocol
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The logits of all rows, in the split's order, and their labels.

    Returns:
        float32 [rows, outputs], and int64 or float32 [rows] or None, on the CPU.
    """
    classifier.eval()
    rows, logits, labels = [], [], []
    for batch in data.evaluation_batches(EVALUATION_BATCH_SIZE):
        rows.append(batch.rows)
        logits.append(logits_of(classifier, batch, protocol))
        labels.append(batch.labels)
    order = torch.from_numpy(np.argsort(np.concatenate(rows)))
    all_labels = None if labels[0] is None else torch.cat(labels).cpu()[order]
    return torch.cat(logits).cpu()[order], all_labels


def decide(task: Task, logits: torch.Tensor) -> np.ndarray:
    """Predicted class indices, or scores; [rows]."""
    return (logits.argmax(dim=-1) if task.labels else logits.squeeze(-1)).numpy()


def logits_of(classifier: PreTrainedModel, batch: Batch, protocol: Protocol) -> torch.Tensor:
    """float32 [batch, outputs], in the protocol's precision inside."""
    dtype = torch.float16 if protocol.precision == "fp16" else torch.bfloat16
    device_type = batch.inputs["input_ids"].device.type
    with torch.autocast(device_type, dtype, enabled=protocol.precision != "fp32"):
        return _forward(protocol.compile)(classifier, batch.inputs).float()


@functools.cache
def _forward(compiled: bool) -> Callable[[PreTrainedModel, dict[str, torch.Tensor]], torch.Tensor]:
    """Compiled, the graph serves every trial of the process: it is the function's, not one classifier's."""

    def forward(classifier: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        return classifier(**inputs).logits

    return torch.compile(forward, dynamic=True) if compiled else forward


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error for scores, cross-entropy for classes."""
    if labels.is_floating_point():
        return functional.mse_loss(logits.squeeze(-1), labels)
    return functional.cross_entropy(logits, labels)


def _finite(loss: float, what: str) -> float:
    if not math.isfinite(loss):
        raise TrialFailure(f"the {what} loss is {loss}: the learning rate is too high, or the weights are damaged")
    return loss
