"""What a run measures: ``metrics.jsonl`` always, TensorBoard and W&B beside it, a progress bar. Rank 0 only."""

import contextlib
import json
import resource
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from common.folders import errors_of_writing
from pretrain.architecture import Architecture
from pretrain.batches import Workload
from pretrain.flops import model_flops
from pretrain.processes import Processes
from pretrain.run_record import METRICS_FILE
from pretrain.trackers import WandbTracker


class MetricsWriter:
    """Appends events to a run's record and moves its progress bar. On other ranks than 0 it does nothing.

    Args:
        folder: the run's folder.
        rank: of this process.
        total: the budget, in seconds or steps.
        unit: ``s`` or ``steps``.
        spent: what earlier parts of the run have spent of it.
        wandb: whether Weights & Biases gets the events too.
    """

    def __init__(self, folder: Path, rank: int, total: float, unit: str, spent: float, wandb: bool = False) -> None:
        self._active = rank == 0
        if not self._active:
            return
        self._folder = folder
        self._file = _open_at_a_new_line(folder / METRICS_FILE)
        self._board = SummaryWriter(str(folder / "tensorboard"))
        layout = "{l_bar}{bar}| {n:.0f}/{total:.0f} {unit}, {remaining} left{postfix}"
        self._bar = tqdm(desc="pretraining", total=total, unit=unit, initial=spent, bar_format=layout, disable=None)
        self._wandb = WandbTracker(folder, self.say) if wandb else None

    def write(self, event: str, step: int, elapsed_seconds: float, **values: Any) -> None:
        """Record one event; numbers also go to TensorBoard under ``event/name``."""
        if not self._active:
            return
        record = {"event": event, "step": step, "elapsed_seconds": round(elapsed_seconds, 3), **values}
        with errors_of_writing(self._folder):
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()
            numbers = {name: value for name, value in values.items() if isinstance(value, int | float)}
            for name, value in numbers.items():
                self._board.add_scalar(f"{event}/{name}", value, step, walltime=time.time())
        if self._wandb and numbers:
            self._wandb.log(event, step, record["elapsed_seconds"], numbers)

    def show(self, spent: float, **values: str) -> None:
        """Move the progress bar to ``spent`` of the budget."""
        if self._active:
            with contextlib.suppress(OSError):
                self._bar.set_postfix(values, refresh=False)
                self._bar.update(spent - self._bar.n)

    def say(self, line: str) -> None:
        """Print a line without disturbing the progress bar."""
        if self._active:
            with contextlib.suppress(OSError):  # whoever read it may be gone, and the run goes on
                self._bar.write(line)

    def close(self) -> None:
        """Close file, board, tracker and bar."""
        if self._active:
            if self._wandb:
                self._wandb.close()
            self._bar.close()
            self._board.close()
            self._file.close()


@dataclass(frozen=True)
class StepFigures:
    """Of a few steps, over all ranks."""

    losses: list[float]
    """Of each step."""
    loss: float
    """Over all their predictions, in nats."""
    sequences_per_second: float
    tokens_per_second: float
    """Real ones: padding is not counted."""
    flop_utilisation: float
    """The model's operations over what the hardware could do in that time, see :mod:`pretrain.flops`."""
    wait_share: float
    """Of the time, spent waiting for data; the mean over ranks."""
    memory_gigabytes: float
    """The most that rank 0 has held so far: on its GPU, or in the process where there is none."""

    def as_metrics(self) -> dict[str, float]:
        """For a line of the log."""
        digits = {"loss": 6, "flop_utilisation": 4, "wait_share": 4, "memory_gigabytes": 2}
        values = {name: value for name, value in asdict(self).items() if name != "losses"}
        return {name: round(value, digits.get(name, 1)) for name, value in values.items()}


def peak_memory_gigabytes() -> float:
    """The most memory this process has held so far."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_reserved() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


class StepAverages:
    """What the steps since the last line of the log have measured; losses stay on the device until then.

    Args:
        architecture: of the model, for its operations.
        peak_flops: operations a second that all processes' hardware could do, see :mod:`pretrain.flops`.
    """

    def __init__(self, architecture: Architecture, peak_flops: float) -> None:
        self._architecture = architecture
        self._peak_flops = peak_flops
        self._wait_seconds_before = 0.0
        self._reset()

    def _reset(self) -> None:
        self._loss_sums: list[torch.Tensor] = []
        self._workloads: list[Workload] = []
        self.start_clock()

    def start_clock(self) -> None:
        """Begin the time of the steps that come; none may have been counted since the last :meth:`flush`."""
        self._started = time.perf_counter()

    def add(self, loss_sum: torch.Tensor, workload: Workload) -> None:
        """Count one step: this rank's summed loss, all ranks' work."""
        self._loss_sums.append(loss_sum)
        self._workloads.append(workload)

    def flush(self, processes: Processes, wait_seconds: float) -> StepFigures | None:
        """The figures since the last call, None when no step was counted; every rank calls it.

        Args:
            processes: add up over ranks.
            wait_seconds: that this rank's steps have waited for data, since its start.
        """
        if not self._loss_sums:
            return None
        seconds = time.perf_counter() - self._started
        waited, self._wait_seconds_before = wait_seconds - self._wait_seconds_before, wait_seconds
        *loss_sums, waited_by_all = processes.sum(*torch.stack(self._loss_sums).tolist(), waited)
        work = Workload.sum(self._workloads)
        figures = StepFigures(
            losses=[total / max(1, step.predictions) for total, step in zip(loss_sums, self._workloads, strict=True)],
            loss=sum(loss_sums) / max(1, work.predictions),
            sequences_per_second=work.sequences / seconds,
            tokens_per_second=work.tokens / seconds,
            flop_utilisation=model_flops(self._architecture, work) / seconds / self._peak_flops,
            wait_share=waited_by_all / processes.world_size / seconds,
            memory_gigabytes=peak_memory_gigabytes(),
        )
        self._reset()
        return figures


def _open_at_a_new_line(path: Path) -> TextIO:
    """Open for appending, behind a line that a kill may have cut short."""
    cut_short = path.exists() and not path.read_bytes().endswith(b"\n")
    file = path.open("a", encoding="utf-8")
    if cut_short:
        file.write("\n")
    return file
