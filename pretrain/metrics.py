"""What a run measures: ``metrics.jsonl`` always, TensorBoard beside it, a progress bar on a terminal. Rank 0 only."""

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from pretrain.engine import PretrainEngine

METRICS_FILE = "metrics.jsonl"


class MetricsWriter:
    """Appends events to a run's record and moves its progress bar. On other ranks than 0 it does nothing.

    Args:
        folder: the run's folder.
        rank: of this process.
        total: the budget, in seconds or steps.
        unit: ``s`` or ``steps``.
        spent: what earlier parts of the run have spent of it.
    """

    def __init__(self, folder: Path, rank: int, total: float, unit: str, spent: float) -> None:
        self._active = rank == 0
        if not self._active:
            return
        self._file = _open_at_a_new_line(folder / METRICS_FILE)
        self._board = SummaryWriter(str(folder / "tensorboard"))
        layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} {unit}, {remaining} left{postfix}"
        self._bar = tqdm(desc="pretraining", total=total, unit=unit, initial=spent, bar_format=layout, disable=None)

    def write(self, event: str, step: int, elapsed_seconds: float, **values: Any) -> None:
        """Record one event; numbers also go to TensorBoard under ``event/name``."""
        if not self._active:
            return
        record = {"event": event, "step": step, "elapsed_seconds": round(elapsed_seconds, 3), **values}
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()
        for name, value in values.items():
            if isinstance(value, int | float):
                self._board.add_scalar(f"{event}/{name}", value, step, walltime=time.time())

    def show(self, spent: float, **values: str) -> None:
        """Move the progress bar to ``spent`` of the budget."""
        if self._active:
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(spent - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line without disturbing the progress bar."""
        if self._active:
            self._bar.write(line)

    def close(self) -> None:
        """Close file, board and bar."""
        if self._active:
            self._bar.close()
            self._board.close()
            self._file.close()


class StepAverages:
    """Sums over the steps since the last line of the log; the loss stays on the device until then."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._reset()

    def _reset(self) -> None:
        self._loss_sum = torch.zeros((), device=self._device)
        self._predictions = self._sequences = 0
        self._latest: dict[str, float] = {}
        self._started = time.perf_counter()

    def add(
        self, loss_sum: torch.Tensor, predictions: int, sequences: int, learning_rate: float, progress: float
    ) -> None:
        """Count one step: this rank's summed loss, all ranks' predictions and sequences."""
        self._loss_sum += loss_sum
        self._predictions += predictions
        self._sequences += sequences
        self._latest = {"learning_rate": learning_rate, "progress": progress}

    def flush(self, engine: PretrainEngine) -> dict[str, float]:
        """Mean loss, speed, and the last step's learning rate and progress; nothing when no step was counted."""
        if not self._sequences:
            return {}
        (loss_sum,) = engine.sum_over_ranks(self._loss_sum.item())
        seconds = time.perf_counter() - self._started
        values = {
            "loss": loss_sum / self._predictions,
            **self._latest,
            "sequences_per_second": round(self._sequences / seconds, 2),
        }
        self._reset()
        return values


def _open_at_a_new_line(path: Path) -> TextIO:
    """Open for appending, behind a line that a kill may have cut short."""
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if cut_short:
        file.write("\n")
    return file


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The events of a run, in order, without those that a later start took back by going on from an earlier step."""
    events: list[dict[str, Any]] = []
    for event in _all_events(folder):
        if event["event"] == "start":
            events = [earlier for earlier in events if earlier["step"] <= event["step"]]
        events.append(event)
    return events


def lost_seconds(folder: Path) -> float:
    """Seconds of work that kills have destroyed: what the record shows beyond the point where each start went on."""
    lost = furthest = 0.0
    for event in _all_events(folder):
        if event["event"] == "start":
            lost += max(0.0, furthest - event["elapsed_seconds"])
            furthest = event["elapsed_seconds"]
        furthest = max(furthest, event["elapsed_seconds"])
    return lost


def _all_events(folder: Path) -> Iterator[dict[str, Any]]:
    """Every line of the record; one that a kill cut short is passed over."""
    path = folder / METRICS_FILE
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            yield json.loads(line)


def curves(events: list[dict[str, Any]], max_points: int = 500) -> dict[str, list[dict[str, float]]]:
    """Training and validation curves, thinned to at most about ``max_points`` points each, the last one always kept."""
    fields = {
        "train": ("elapsed_seconds", "step", "loss", "learning_rate"),
        "validation": ("elapsed_seconds", "step", "loss"),
    }
    result = {}
    for name, keys in fields.items():
        points = [{key: event[key] for key in keys} for event in events if event["event"] == name]
        stride = max(1, len(points) // max_points)
        result[name] = points[::-1][::stride][::-1]
    return result
