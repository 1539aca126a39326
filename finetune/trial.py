"""One fine-tuning run of one task with one set of hyperparameters and one seed."""

import itertools
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal
from typing import Protocol as Interface

import torch
from transformers import PreTrainedModel, get_scheduler

from finetune.batches import Batch, DeviceSplit
from finetune.inference import Precision, decide, logits_of, predict
from finetune.losses import MeanLoss, finite, loss_of
from finetune.metrics import compute
from finetune.model import Initialization
from finetune.optimizers import Optimizer
from finetune.tasks import Task
from finetune.trial_files import TrialFiles

MAX_GRADIENT_NORM: Final = 1.0  # run_glue's default, which the papers' fine-tuning used

ScoreEpoch = Literal["last", "best"]
Schedule = Literal["linear", "cosine", "constant"]


@dataclass(frozen=True)
class Cell:
    """One cell of the grid: everything that tells two trials apart."""

    task_name: str
    learning_rate: float
    batch_size: int
    num_epochs: int
    initialization: Initialization
    seed: int
    precision: Precision = "fp32"
    """Of the matrix products; weights and optimizer are float32."""
    optimizer: Optimizer = field(default_factory=Optimizer)

    @property
    def configuration(self) -> tuple[float, int, int]:
        """What the median over the seeds is taken of."""
        return self.learning_rate, self.batch_size, self.num_epochs

    @property
    def variant(self) -> str:
        """What is compared, and never searched for the best: ``AdamW, bf16``."""
        return f"{self.optimizer.title}, {self.precision}"

    def __str__(self) -> str:
        return (
            f"{self.task_name} ({self.initialization}, {self.variant}, learning rate {self.learning_rate:g}, batch"
            f" {self.batch_size}, {self.num_epochs} epochs, seed {self.seed})"
        )


@dataclass(frozen=True)
class Protocol:
    """What all trials have in common."""

    max_seq_length: int
    weight_decay: float
    warmup_proportion: float
    warmup_steps: int | None = None
    """Instead of the proportion."""
    lr_schedule: Schedule = "linear"
    max_gradient_norm: float = MAX_GRADIENT_NORM
    gradient_accumulation_steps: int = 1
    """Parts in which a batch passes through the model."""
    max_steps: int | None = None
    """Ends training earlier than the epochs would."""
    eval_steps: int | None = None
    """Optimizer steps between two evaluations, beside the one after each epoch."""
    score_epoch: ScoreEpoch = "last"
    compile: bool = False


class ClassifierSource(Interface):
    """What a trial starts from, such as an :class:`finetune.model.Encoder`."""

    def new_classifier(self, task: Task, initialization: Initialization, device: torch.device) -> PreTrainedModel:
        """A float32 classifier for ``task`` on ``device``; torch's random state decides what is drawn."""


def run_trial(
    task: Task,
    cell: Cell,
    protocol: Protocol,
    encoder: ClassifierSource,
    data: Mapping[str, DeviceSplit],
    device: torch.device,
    files: TrialFiles | None = None,
    on_step: Callable[[float], None] | None = None,
) -> tuple[dict[str, Any], PreTrainedModel]:
    """Fine-tune, and evaluate after each epoch; the score is the last epoch's, or the best one's if the protocol says.

    ``cell.seed`` decides the head (and a random encoder), the order of the rows, and dropout. On a CPU the same cell
    with the same number of threads gives the same score, whether it was interrupted or not.

    Args:
        task: what ``cell.task_name`` names.
        cell: hyperparameters, start and seed.
        protocol: what it has in common with all other trials.
        encoder: the weights to start from.
        data: the task's training split and evaluation splits, on ``device``.
        device: where to compute.
        files: where it keeps checkpoints and TensorBoard files, and goes on from the newest checkpoint.
        on_step: told after each step what share of all steps is done.

    Returns:
        The result and the classifier that has this score. The result: ``score`` (a fraction) and ``score_epoch_index``,
        ``epochs`` (``epoch``, ``train_loss``, ``eval_loss``, ``metrics`` of each split, ``seconds`` of training,
        ``eval_seconds``), ``evaluations`` between epochs (the same with ``step``, without seconds), ``seconds``,
        ``rows_per_second`` (training alone), ``device``, ``optimizer_bytes`` and, on a GPU, ``peak_memory_bytes``.

    Raises:
        TrialFailure: the loss is not a finite number.
    """
    torch.manual_seed(cell.seed)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    classifier = encoder.new_classifier(task, cell.initialization, device)
    trial = _Trial(task, cell, protocol, classifier, data, device, files, on_step)
    return trial.run(), trial.classifier


class Training:
    """A classifier with its optimizer and schedule: clipped gradients, linear warmup, decay."""

    def __init__(
        self, classifier: PreTrainedModel, cell: Cell, protocol: Protocol, data: DeviceSplit, device: torch.device
    ) -> None:
        self.steps_per_epoch = data.num_batches(cell.batch_size)
        self.num_steps = min(cell.num_epochs * self.steps_per_epoch, protocol.max_steps or math.inf)
        self.step_number = 0
        """Steps that are done."""
        self._classifier, self._cell, self._protocol = classifier, cell, protocol
        self.optimizer = cell.optimizer.build(parameter_groups(classifier, protocol.weight_decay), cell.learning_rate)
        warmup_steps = protocol.warmup_steps
        if warmup_steps is None:
            warmup_steps = math.ceil(protocol.warmup_proportion * self.num_steps)
        name = "constant_with_warmup" if protocol.lr_schedule == "constant" else protocol.lr_schedule
        self._schedule = get_scheduler(name, self.optimizer, warmup_steps, self.num_steps)
        self._scaler = torch.amp.GradScaler(device.type, enabled=cell.precision == "fp16")

    @property
    def learning_rate(self) -> float:
        """Of the next step."""
        return self._schedule.get_last_lr()[0]

    def step(self, batch: Batch) -> torch.Tensor:
        """One optimizer step; returns the mean loss of the batch, on the device."""
        mean_loss = torch.zeros((), device=batch.labels.device)
        for part in batch.split(self._protocol.gradient_accumulation_steps):
            logits = logits_of(self._classifier, part, self._cell.precision, self._protocol.compile)
            loss = loss_of(logits, part.labels) * (len(part.rows) / len(batch.rows))
            self._scaler.scale(loss).backward()
            mean_loss += loss.detach()
        self._scaler.unscale_(self.optimizer)
        torch.nn.utils.clip_grad_norm_(self._classifier.parameters(), self._protocol.max_gradient_norm or math.inf)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        self._schedule.step()
        self.optimizer.zero_grad()
        self.step_number += 1
        return mean_loss

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on; random numbers apart."""
        return {
            "classifier": self._classifier.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict(),
            "step_number": self.step_number,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self._classifier.load_state_dict(state["classifier"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._schedule.load_state_dict(state["schedule"])
        self._scaler.load_state_dict(state["scaler"])
        self.step_number = state["step_number"]


def parameter_groups(classifier: PreTrainedModel, weight_decay: float) -> list[dict[str, Any]]:
    """No weight decay on biases and LayerNorms, which are the parameters of one dimension."""
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    return [
        {"params": [parameter for parameter in parameters if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in parameters if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


class _Trial:
    """A trial on its way: what :func:`run_trial` does."""

    def __init__(
        self,
        task: Task,
        cell: Cell,
        protocol: Protocol,
        classifier: PreTrainedModel,
        data: Mapping[str, DeviceSplit],
        device: torch.device,
        files: TrialFiles | None,
        on_step: Callable[[float], None] | None,
    ) -> None:
        self.classifier = classifier
        self._task, self._cell, self._protocol = task, cell, protocol
        self._data, self._device, self._files, self._on_step = data, device, files, on_step
        self._training = Training(classifier, cell, protocol, data["train"], device)
        self._started = time.monotonic()
        self._seconds_before = 0.0  # of starts that were interrupted
        self._epochs: list[dict[str, Any]] = []
        self._evaluations: list[dict[str, Any]] = []
        self._best_weights: dict[str, torch.Tensor] | None = None
        self._epoch_seconds = 0.0  # of training, in the epoch that runs
        self._epoch_losses, self._recent_losses, self._logged_losses = MeanLoss(), MeanLoss(), MeanLoss()

    def run(self) -> dict[str, Any]:
        """Train from where the trial is to its end; returns its result."""
        self._resume()
        while self._training.step_number < self._training.num_steps:
            self._train_epoch(len(self._epochs) + 1)
        scored = self._epochs[-1] if self._protocol.score_epoch == "last" else self._best_epoch()
        if scored is not self._epochs[-1]:
            self.classifier.load_state_dict(self._best_weights)
        training_seconds = sum(epoch["seconds"] for epoch in self._epochs)
        num_rows = self._training.num_steps / self._training.steps_per_epoch * len(self._data["train"])
        on_gpu = self._device.type == "cuda"
        return {
            "score": self._score(scored),
            "score_epoch_index": scored["epoch"] - 1,
            "epochs": self._epochs,
            "evaluations": self._evaluations,
            "seconds": self._seconds,
            "rows_per_second": num_rows / training_seconds,
            "device": torch.cuda.get_device_name(self._device) if on_gpu else "cpu",
            "optimizer_bytes": _bytes_of(self._training.optimizer),
            "peak_memory_bytes": torch.cuda.max_memory_allocated(self._device) if on_gpu else None,
        }

    @property
    def _seconds(self) -> float:
        return self._seconds_before + time.monotonic() - self._started

    def _train_epoch(self, epoch: int) -> None:
        """The steps of an epoch that are left, and its evaluation."""
        training = self._training
        first = (epoch - 1) * training.steps_per_epoch
        last = min(first + training.steps_per_epoch, training.num_steps)
        batches = self._data["train"].training_batches(self._cell.batch_size, seed=[self._cell.seed, epoch])
        self.classifier.train()
        since = time.monotonic()
        for batch in itertools.islice(batches, training.step_number - first, last - first):
            loss = training.step(batch)
            for losses in (self._epoch_losses, self._recent_losses, self._logged_losses):
                losses.add(loss, len(batch.rows))
            if self._on_step:
                self._on_step(training.step_number / training.num_steps)
            if training.step_number < last and self._is_something_due():
                self._epoch_losses.state()  # waits for the device, so that the time is right
                self._epoch_seconds += time.monotonic() - since
                self._do_what_is_due()
                since = time.monotonic()
        train_loss = self._epoch_losses.mean()
        self._epoch_seconds += time.monotonic() - since
        self._end_epoch(epoch, train_loss)

    def _is_something_due(self) -> bool:
        files = self._files
        saving, logging = (files.save_steps, files.logging_steps) if files else (None, None)
        return any(self._is_due(every) for every in (self._protocol.eval_steps, saving, logging))

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self._training.step_number % every == 0

    def _do_what_is_due(self) -> None:
        """Between epochs."""
        if self._is_due(self._protocol.eval_steps):
            step = self._training.step_number
            epoch = {"step": step, "epoch": step / self._training.steps_per_epoch}
            self._evaluations.append({**epoch, "train_loss": self._recent_losses.mean(), **self._evaluate()})
            self._recent_losses = MeanLoss()
            self._write_evaluation(self._evaluations[-1])
            self.classifier.train()
        if self._files and self._is_due(self._files.logging_steps):
            self._write_training()
        if self._files and self._is_due(self._files.save_steps):
            self._save()

    def _end_epoch(self, epoch: int, train_loss: float) -> None:
        before = time.monotonic()
        evaluation = self._evaluate()
        seconds = {"seconds": self._epoch_seconds, "eval_seconds": time.monotonic() - before}
        self._epochs.append({"epoch": epoch, "train_loss": train_loss, **evaluation, **seconds})
        is_last = self._training.step_number == self._training.num_steps
        if self._protocol.score_epoch == "best" and self._best_epoch() is self._epochs[-1] and not is_last:
            self._best_weights = {name: weight.clone() for name, weight in self.classifier.state_dict().items()}
        if self._files and self._files.logging_steps:
            self._write_training()
            self._write_evaluation(self._epochs[-1])
        self._epoch_seconds = 0.0
        self._epoch_losses, self._recent_losses, self._logged_losses = MeanLoss(), MeanLoss(), MeanLoss()
        if self._files and self._files.save_steps and not is_last:
            self._save()

    def _evaluate(self) -> dict[str, Any]:
        """``eval_loss`` on the split that scores, and ``metrics`` on each evaluation split."""
        losses, metrics = {}, {}
        for split in self._task.evaluation_splits:
            data = self._data[split]
            logits, labels = predict(self.classifier, data, self._cell.precision, self._protocol.compile)
            losses[split] = finite(loss_of(logits, labels).item(), "evaluation")
            metrics[split] = compute(self._task.metrics, decide(self._task, logits), labels.numpy())
        return {"eval_loss": losses[self._task.evaluation_splits[0]], "metrics": metrics}

    def _score(self, evaluation: Mapping[str, Any]) -> float:
        return evaluation["metrics"][self._task.evaluation_splits[0]][self._task.selected_by]

    def _best_epoch(self) -> dict[str, Any]:
        """The first with the highest score."""
        return max(self._epochs, key=self._score)

    def _write_training(self) -> None:
        values = {"train/loss": self._logged_losses.mean(), "train/learning_rate": self._training.learning_rate}
        self._logged_losses = MeanLoss()
        self._files.write_scalars(self._training.step_number, values)

    def _write_evaluation(self, evaluation: Mapping[str, Any]) -> None:
        """As the Trainer names these curves."""
        if not (self._files and self._files.logging_steps):
            return
        values = {"eval/loss": evaluation["eval_loss"]}
        for split, metrics in evaluation["metrics"].items():
            prefix = "eval" if split == self._task.evaluation_splits[0] else f"eval_{split}"
            values.update({f"{prefix}/{name}": value for name, value in metrics.items()})
        self._files.write_scalars(self._training.step_number, values)

    def _save(self) -> None:
        self._files.save(
            {
                "training": self._training.state_dict(),
                "epochs": self._epochs,
                "evaluations": self._evaluations,
                "best_weights": self._best_weights,
                "seconds": self._seconds,
                "epoch_seconds": self._epoch_seconds,
                "epoch_losses": self._epoch_losses.state(),
                "recent_losses": self._recent_losses.state(),
                "random": torch.get_rng_state(),
                "cuda_random": torch.cuda.get_rng_state(self._device) if self._device.type == "cuda" else None,
            }
        )

    def _resume(self) -> None:
        state = self._files.load() if self._files else None
        if state is None:
            return
        self._training.load_state_dict(state["training"])
        self._epochs, self._evaluations = state["epochs"], state["evaluations"]
        self._best_weights = state["best_weights"]
        self._seconds_before, self._epoch_seconds = state["seconds"], state["epoch_seconds"]
        self._epoch_losses = MeanLoss.of(state["epoch_losses"])
        self._recent_losses = MeanLoss.of(state["recent_losses"])
        torch.set_rng_state(state["random"])
        if self._device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda_random"], self._device)


def _bytes_of(optimizer: torch.optim.Optimizer) -> int:
    """Of its state's tensors."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    return sum(tensor.nbytes for tensor in tensors)
