"""A budgeted run from end to end, killed once on the way: what the GPU benchmark says about whole runs."""

import contextlib
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForMaskedLM

from benchmarks.gpu_timing import say
from common.folders import read_json
from pretrain.run_record import read_metrics
from pretrain.schedule import lr_multiplier

_REPOSITORY = Path(__file__).parent.parent
_PEAK_LEARNING_RATE = 1e-3
_WARMUP_PROPORTION = 0.06
_POLL_SECONDS = 0.02
_PATIENCE = 3  # times the budget, and _START_SECONDS besides, until a run that shows nothing is taken to hang
_START_SECONDS = 600


def build_demo_data(folder: Path, megabytes: float, max_seq_length: int, environment: Mapping[str, str]) -> Path:
    """A data folder of the demo's generated text, through the command that a user types."""
    say("data folder of generated text ...")
    sources = f'[{{"kind": "demo", "megabytes": {megabytes}}}]'
    arguments = ["--sources", sources, "--tokenizer", "train", "--vocab_size", "2000", "--dupe_factor", "4"]
    arguments += ["--max_seq_length", str(max_seq_length), "--output_dir", str(folder)]
    command = [sys.executable, "-m", "data_prep", "build", *arguments]
    subprocess.run(command, cwd=_REPOSITORY, env=environment, stdout=subprocess.DEVNULL, check=True)
    return folder


def run_config(preset: str, hidden_size: int | None, train_batch_size: int, seconds: int) -> dict[str, Any]:
    """The configuration of the run: everything that costs time is in it, and often."""
    return {
        "model": {"preset": preset, "hidden_size": hidden_size},
        "time_budget": f"{seconds}s",
        "train_batch_size": train_batch_size,
        "micro_batch_size": "auto",
        "optimizer": {"learning_rate": _PEAK_LEARNING_RATE},
        "warmup_proportion": _WARMUP_PROPORTION,
        "validation_interval": "35%",
        "early_validation_interval": None,
        "checkpoint_interval": "35%",
        "log_interval": 1,
    }


class BudgetedRun:
    """Start, kill at the first checkpoint, start again, look at what is there.

    Args:
        config: of the run, see :func:`run_config`.
        data: the data folder.
        folder: an empty one.
        environment: of the processes, without anything that a launcher has set.
    """

    def __init__(self, config: dict[str, Any], data: Path, folder: Path, environment: Mapping[str, str]) -> None:
        self._budget = float(config["time_budget"].removesuffix("s"))
        self._run = folder / "run"
        self._log = folder / "log.txt"
        self._environment = environment
        (folder / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
        arguments = ["--config", folder / "config.yaml", "--data_dir", data.resolve(), "--output_dir", self._run]
        self._command = [sys.executable, "run_pretraining.py", *map(str, arguments)]

    def measure(self) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Figures and checks."""
        say(f"a run of {self._budget:.0f} s, killed on the way ...")
        with self._started() as process:
            self._wait(process, until=(self._run / "checkpoints" / "latest").exists)
        say("the same run, resumed ...")
        with self._started() as process:
            self._wait(process, until=lambda: process.poll() == 0)
        summary, events = read_json(self._run / "summary.json", "of the run"), read_metrics(self._run)
        steps = [event for event in events if event["event"] == "train"]
        return self._figures(summary, steps), self._checks(summary, steps, _slowest_step(events))

    @contextlib.contextmanager
    def _started(self) -> Iterator[subprocess.Popen]:
        """In a process group of its own, which is killed when it is left."""
        options = {"cwd": _REPOSITORY, "env": self._environment, "start_new_session": True}
        with self._log.open("ab") as log:
            process = subprocess.Popen(self._command, stdout=log, stderr=log, **options)
            try:
                yield process
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()

    def _wait(self, process: subprocess.Popen, until: Callable[[], bool]) -> None:
        deadline = time.monotonic() + _PATIENCE * self._budget + _START_SECONDS
        while not until():
            ended = process.poll() is not None
            if (ended and not until()) or time.monotonic() > deadline:
                how = f"ended with exit code {process.returncode}" if ended else "hangs"
                raise RuntimeError(f"the run {how}\n{self._log.read_text(errors='replace')[-1000:]}")
            time.sleep(_POLL_SECONDS)

    def _figures(self, summary: dict[str, Any], steps: list[dict[str, Any]]) -> dict[str, Any]:
        medians = {
            f"run_{name}": statistics.median(event[name] for event in steps)
            for name in ("sequences_per_second", "tokens_per_second", "flop_utilisation", "wait_share")
        }
        kept = ("steps", "micro_batch_size", "lost_seconds", "closing_seconds", "validation_loss")
        return {
            "run_budget_seconds": self._budget,
            "run_unused_seconds": round(self._budget - summary["elapsed_seconds"], 3),
            "run_last_learning_rate_share": round(steps[-1]["learning_rate"] / _PEAK_LEARNING_RATE, 5),
            **{f"run_{name}": summary[name] for name in kept},
            **medians,
        }

    def _checks(self, summary: dict[str, Any], steps: list[dict[str, Any]], slowest: float) -> list[dict[str, Any]]:
        last = steps[-1]
        scheduled = _PEAK_LEARNING_RATE * lr_multiplier(last["progress"], _WARMUP_PROPORTION)
        starts = read_json(self._run / "provenance.json", "of the run")
        found = {
            "run: deadline kept to the step": abs(self._budget - summary["elapsed_seconds"]) <= slowest,
            "run: the learning rate is the schedule's to the end": abs(last["learning_rate"] - scheduled) < 1e-9,
            "run: the last learning rate is zero within a step's share": last["learning_rate"] / _PEAK_LEARNING_RATE
            <= slowest / self._budget / (1 - _WARMUP_PROPORTION),
            "run: resumed from its checkpoint": len(starts) == 2 and _is_consecutive([step["step"] for step in steps]),
            "run: the exported model loads and predicts": _predicts(self._run / "hf"),
        }
        return [{"check": what, "agrees": agrees} for what, agrees in found.items()]


def _slowest_step(events: list[dict[str, Any]]) -> float:
    """In seconds, without those right after a start, which compile."""
    gaps = (
        later["elapsed_seconds"] - earlier["elapsed_seconds"]
        for earlier, later in pairwise(events)
        if later["event"] == "train" and earlier["event"] in ("train", "validation", "checkpoint")
    )
    return max(gaps, default=0.0)


def _is_consecutive(steps: list[int]) -> bool:
    return steps == list(range(1, len(steps) + 1))


def _predicts(folder: Path) -> bool:
    model = AutoModelForMaskedLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(1, 9)[None]).logits
    return logits.shape[-1] == model.config.vocab_size and bool(logits.isfinite().all())
