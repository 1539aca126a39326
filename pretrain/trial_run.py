"""A trial: the first minute of a run, by the run's own command in real processes, and what it says of the rest."""

import contextlib
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from common.errors import UserError
from common.folders import read_json, write_text
from pretrain.config import PretrainConfig
from pretrain.forecast import Durations, Estimate
from pretrain.launch import PROGRAM, as_yaml, last_word
from pretrain.run_record import METRICS_FILE, read_metrics
from pretrain.summary import MODEL_FOLDER, SUMMARY_FILE

_FEWEST_STEPS = 5  # besides the first one
_PATIENCE_SECONDS = 600.0  # for start, compilation and closing, beyond twice the trial's budget
_LEAVING_SECONDS = 60.0  # that a launcher has to end its processes in


@dataclass(frozen=True)
class Trial:
    """What is tried."""

    config: PretrainConfig
    """The run that is planned."""
    data_dir: Path
    num_processes: int
    seconds: float
    """Of the trial's budget."""

    def run(self, folder: Path) -> Estimate:
        """Make the trial, in runs below ``folder``; where start and compilation leave too few steps, once again with
        twice their time more.

        Raises:
            UserError: it failed; the message is the run's own last word.
        """
        estimate = self._run(folder / "first")
        if estimate.timed_steps < _FEWEST_STEPS:
            longer = self.seconds + 2 * estimate.durations.until_steady
            estimate = replace(self, seconds=longer)._run(folder / "second")
        if estimate.timed_steps < 1:
            taken = estimate.durations.until_steady
            raise UserError(f"start and first step took {taken:.1f} s, all of the trial: give a longer --trial_seconds")
        return estimate

    def _run(self, folder: Path) -> Estimate:
        config = trial_config(self.config, self.seconds)
        timeout = _PATIENCE_SECONDS + 2 * self.seconds
        return read_estimate(folder, run_to_its_end(config, self.data_dir, folder, self.num_processes, timeout))


def run_to_its_end(config: PretrainConfig, data_dir: Path, folder: Path, num_processes: int, timeout: float) -> float:
    """Make a run in ``folder`` by run_pretraining.py, in processes of its own; how many seconds the command took.

    Raises:
        UserError: it failed; the message is the run's own last word.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    file, output = folder.with_suffix(".yaml"), folder.with_suffix(".txt")
    write_text(file, as_yaml(config))
    arguments = ["--config", file, "--data_dir", data_dir, "--output_dir", folder]
    started = time.perf_counter()
    returncode = _finish([*_launcher(num_processes), str(PROGRAM), *map(str, arguments)], output, timeout)
    if returncode or not (folder / SUMMARY_FILE).exists():
        raise UserError(last_word(output.read_text(errors="replace"), returncode))
    return time.perf_counter() - started


def trial_config(config: PretrainConfig, seconds: float) -> PretrainConfig:
    """The run's own beginning: ``seconds`` of it at its learning rates, with one validation and one checkpoint."""
    return replace(
        config,
        time_budget=f"{seconds:.2f}s",
        schedule_length=(config.schedule_length or config.time_budget) if seconds <= config.budget_seconds else None,
        validation_interval="50%",
        early_validation_interval=None,
        checkpoint_interval="50%",
        export_at=[],
        early_stop=[],
        resume="never",
    )


def _launcher(num_processes: int) -> list[str]:
    if num_processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_processes}"]


def _finish(command: list[str], output: Path, timeout: float) -> int:
    """The command's return code, once it and all that it has started have ended."""
    with output.open("w") as file:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)
        try:
            return process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise UserError(f"not at its end after {timeout:.0f} s: give a longer --trial_seconds") from None
        finally:
            process.terminate()  # a launcher takes its processes with it
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_LEAVING_SECONDS)
            process.kill()


def read_estimate(run: Path, wall_seconds: float) -> Estimate:
    """What the finished run in ``run``, whose command took ``wall_seconds``, says of a longer one like it."""
    summary = read_json(run / SUMMARY_FILE, "the trial did not come to its end")
    events = read_metrics(run)
    spent = summary["spent_seconds"]
    timed_steps = summary["steps"] + summary["skipped_steps"] - 1
    validations, checkpoints = (
        [event["seconds"] for event in events if event["event"] == name] for name in ("validation", "checkpoint")
    )
    closing = summary["closing_seconds"]
    durations = Durations(
        launch=max(0.0, wall_seconds - summary["elapsed_seconds"] - closing),
        starting=spent["starting"],
        micro_batch_search=spent["micro_batch_search"],
        first_step=spent["compile"],
        step=(spent["training"] + spent["data_wait"]) / max(1, timed_steps),
        first_validation=validations[0],
        validation=validations[-1],
        checkpoint=checkpoints[-1],
        export=max(0.0, closing - validations[-1] - checkpoints[-1]),
        closing=closing,
    )
    logs = folder_bytes(run / "tensorboard") + (run / METRICS_FILE).stat().st_size
    newest = max((run / "checkpoints").glob("step-*"))
    return Estimate(
        durations,
        micro_batch_size=summary["micro_batch_size"],
        memory_bytes=1e9
        * max((event["memory_gigabytes"] for event in events if event["event"] == "train"), default=0.0),
        checkpoint_bytes=folder_bytes(newest),
        model_bytes=folder_bytes(run / MODEL_FOLDER),
        log_line_bytes=logs / len(events),
        timed_steps=timed_steps,
    )


def folder_bytes(folder: Path) -> int:
    """Of all files below it."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
