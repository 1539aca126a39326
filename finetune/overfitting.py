"""Overfitting: validation loss rises while training loss falls.

A run is said to overfit when its validation loss is lowest before its last epoch and its training loss is lower after
the last epoch than it was there. It overfits *from* the epoch after the one with the lowest validation loss: no later
epoch comes back to that loss. The metric is no part of this: a classifier that grows more certain of its mistakes may
still make fewer of them.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Epoch = Mapping[str, Any]
"""``epoch`` (from 1), ``train_loss``, ``eval_loss`` and ``metrics``, as a trial's result has them."""


def turning_point(epochs: Sequence[Epoch]) -> Epoch | None:
    """The epoch after which a run overfits, the one with the lowest validation loss (of equals the last); or None."""
    lowest = min(reversed(epochs), key=lambda epoch: epoch["eval_loss"])
    last = epochs[-1]
    return lowest if last is not lowest and last["train_loss"] < lowest["train_loss"] else None


@dataclass(frozen=True)
class Overfitting:
    """How one configuration's runs overfit, which differ in their seed."""

    num_runs: int
    from_epochs: tuple[int, ...]
    """Of each run that does, the first epoch behind its turning point, in ascending order."""
    eval_loss: tuple[float, float]
    """At the turning point and after the last epoch: medians over the runs that overfit."""
    train_loss: tuple[float, float]
    """At the same epochs."""
    score: tuple[float, float]
    """The metric that selects, at the same epochs, a fraction."""

    def __str__(self) -> str:
        first, last = self.from_epochs[0], self.from_epochs[-1]
        epochs = f"epoch {first}" if first == last else f"epoch {first} to {last}"
        return f"{len(self.from_epochs)} of {self.num_runs} {'seeds' if self.num_runs > 1 else 'seed'} from {epochs} on"


def overfitting(trials: Sequence[Mapping[str, Any]], split: str, metric: str) -> Overfitting | None:
    """How the runs of one configuration overfit; None if no run does.

    Args:
        trials: their results.
        split: the evaluation split that scores.
        metric: the one that selects.
    """
    runs = [(trial["epochs"], point) for trial in trials if (point := turning_point(trial["epochs"]))]
    if not runs:
        return None

    def medians(value: Callable[[Epoch], float]) -> tuple[float, float]:
        return (
            statistics.median(value(point) for _, point in runs),
            statistics.median(value(epochs[-1]) for epochs, _ in runs),
        )

    return Overfitting(
        num_runs=len(trials),
        from_epochs=tuple(sorted(epochs[epochs.index(point) + 1]["epoch"] for epochs, point in runs)),
        eval_loss=medians(lambda epoch: epoch["eval_loss"]),
        train_loss=medians(lambda epoch: epoch["train_loss"]),
        score=medians(lambda epoch: epoch["metrics"][split][metric]),
    )
