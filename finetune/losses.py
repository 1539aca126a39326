"""The loss of a batch, and its mean over a stretch of training."""

import math

import torch
from torch.nn import functional


class TrialFailure(Exception):
    """A run that cannot give a score; the message is its cause."""


def loss_of(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean squared error for scores, cross-entropy for classes."""
    if labels.is_floating_point():
        return functional.mse_loss(logits.squeeze(-1), labels)
    return functional.cross_entropy(logits, labels)


def finite(loss: float, what: str) -> float:
    """The loss itself.

    Raises:
        TrialFailure: it is not a finite number.
    """
    if not math.isfinite(loss):
        raise TrialFailure(f"the {what} loss is {loss}: the learning rate is too high, or the weights are damaged")
    return loss


class MeanLoss:
    """The mean loss of a stretch of training; the device is only waited for when it is asked."""

    def __init__(self) -> None:
        self._total, self._num_rows = 0.0, 0
        self._waiting: list[tuple[torch.Tensor, int]] = []

    def add(self, loss: torch.Tensor, num_rows: int) -> None:
        """A step's mean loss over so many rows."""
        self._waiting.append((loss, num_rows))

    def mean(self) -> float:
        """Over all rows so far."""
        total, num_rows = self.state()
        return finite(total / num_rows, "training")

    def state(self) -> list[float]:
        """Sum over the rows, and their number."""
        if self._waiting:
            losses, num_rows = zip(*self._waiting, strict=True)
            numbers = torch.tensor(num_rows, dtype=torch.float64)
            self._total += (torch.stack(losses).double().cpu() @ numbers).item()
            self._num_rows += sum(num_rows)
            self._waiting = []
        return [self._total, self._num_rows]

    @classmethod
    def of(cls, state: list[float]) -> "MeanLoss":
        """As :meth:`state` told it."""
        losses = cls()
        losses._total, losses._num_rows = state
        return losses
