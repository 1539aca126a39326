"""A pretraining run: everything checked first, then steps until the budget ends, then the model folder."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoTokenizer

from common.errors import UserError
from common.folders import check_folder, claim_folder, write_json
from data_prep.shards import Manifest, SplitReader, read_manifest
from pretrain.batches import BatchPlan, TrainingBatches, validation_batches
from pretrain.budget import Budget, Cadence, Decision, Director, parse_duration, share_of_run
from pretrain.checkpoint import Checkpoints, TrainState, load_weights, read_state
from pretrain.engine import (
    PretrainEngine,
    Processes,
    autocast_dtype,
    load_ds_config,
    start_processes,
    stop_processes,
)
from pretrain.export import export
from pretrain.metrics import MetricsWriter, curves, lost_seconds, read_metrics
from pretrain.micro_batch import find_micro_batch_size
from pretrain.model import Architecture, MaskedLanguageModel, ModelConfig, resolve
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.schedule import lr_multiplier

SUMMARY_FILE = "summary.json"
MODEL_FOLDER = "hf"
_EARLY_SHARE = 0.05  # Izsak et al. 2021: validation is denser in the first 5 % of the run
_MAY_CHANGE_ON_RESUME = ("resume", "kernels", "ds_config", "micro_batch_size", "log_interval", "checkpoints_kept")


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run; the defaults are 24hBERT's."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """the architecture"""
    time_budget: str | None = "24h"
    """wall-clock length of the run, like 90s, 30m, 24h or 3d; null with max_steps"""
    max_steps: int | None = None
    """length of the run in optimizer steps instead of time"""
    schedule_length: str | None = None
    """length of the learning rate's schedule when it is longer than the run; default: the budget"""
    train_batch_size: int = 4096
    """sequences a step over all processes"""
    micro_batch_size: int | Literal["auto"] = "auto"
    """sequences a forward and backward pass on one GPU; auto finds the fastest that fits"""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """the optimizer and its peak learning rate"""
    warmup_proportion: float = 0.06
    """share of the schedule in which the learning rate rises"""
    gradient_clipping: float = 0.0
    """largest norm of the gradient; 0: off"""
    validation_interval: str = "30m"
    """time or share of the run between validations, like 30m or 10%"""
    early_validation_interval: str | None = "10m"
    """the same in the first 5 % of the run; null: no difference"""
    checkpoint_interval: str = "30m"
    """time or share of the run between checkpoints"""
    checkpoints_kept: int = 2
    """newest checkpoints to keep"""
    log_interval: int = 10
    """steps between lines of metrics.jsonl"""
    kernels: Literal["auto", "eager", "compile"] = "auto"
    """how the model's operations run; auto: compile on CUDA, eager on CPU"""
    ds_config: str = "auto"
    """DeepSpeed JSON (precision, ZeRO, communication); auto: bf16, fp16 or cpu by the hardware"""
    resume: str = "auto"
    """auto: from the run's newest checkpoint if it has one; never; or the path of another run's checkpoint"""
    seed: int = 42
    """of initialisation, dropout and the order of later epochs"""

    def __post_init__(self) -> None:
        if (self.time_budget is None) == (self.max_steps is None):
            raise ValueError("give either time_budget or max_steps, and null for the other")
        if not 0 <= self.warmup_proportion < 1:
            raise ValueError(f"warmup_proportion {self.warmup_proportion} is not a share from 0 to below 1")
        for name in ("max_steps", "train_batch_size", "micro_batch_size", "checkpoints_kept", "log_interval"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        if self.schedule_scale < 1:
            raise ValueError(f"schedule_length {self.schedule_length} is shorter than time_budget {self.time_budget}")
        self.cadences()

    @property
    def budget_seconds(self) -> float | None:
        """The budget by the clock, None for a run of ``max_steps``."""
        return None if self.time_budget is None else parse_duration(self.time_budget)

    @property
    def schedule_scale(self) -> float:
        """Length of the schedule over length of the run."""
        if self.schedule_length is None:
            return 1.0
        if self.budget_seconds is None:
            raise ValueError("schedule_length needs a time_budget")
        return parse_duration(self.schedule_length) / self.budget_seconds

    def cadences(self) -> tuple[Cadence, Cadence]:
        """When to validate and when to save."""
        seconds, early = self.budget_seconds, self.early_validation_interval
        validation = Cadence(
            share_of_run(self.validation_interval, seconds), early and share_of_run(early, seconds), _EARLY_SHARE
        )
        return validation, Cadence(share_of_run(self.checkpoint_interval, seconds))


def pretrain(config: PretrainConfig, data_dir: Path, output_dir: Path) -> None:
    """Run, or resume, one pretraining run in ``output_dir``; every process of the run calls it.

    Raises:
        UserError: data, configuration, hardware or output folder don't fit.
    """
    manifest = read_manifest(data_dir)
    for split in ("train", "validation"):
        SplitReader(manifest, split).close()
    architecture = _architecture(config, manifest)
    ds_config = load_ds_config(config.ds_config)
    check_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
    if (output_dir / SUMMARY_FILE).exists():
        print(f"{output_dir} is complete: the model is in {output_dir / MODEL_FOLDER}")
        return
    checkpoint, state = _find_checkpoint(config, output_dir, manifest)
    processes = start_processes()
    try:
        # A batch that does not divide is refused before anything is written.
        BatchPlan(
            config.train_batch_size,
            1 if config.micro_batch_size == "auto" else config.micro_batch_size,
            processes.world_size,
        )
        if processes.rank == 0:
            claim_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
        Pretrainer(config, architecture, ds_config, manifest, output_dir, checkpoint, state, processes).run()
    finally:
        stop_processes()


def _architecture(config: PretrainConfig, manifest: Manifest) -> Architecture:
    tokenizer = AutoTokenizer.from_pretrained(manifest.tokenizer_folder)
    try:
        return resolve(config.model, manifest.vocab_size, manifest.max_seq_length, tokenizer.pad_token_id)
    except ValueError as error:
        raise UserError(f"model: {error}") from None


def _find_checkpoint(
    config: PretrainConfig, output_dir: Path, manifest: Manifest
) -> tuple[Path | None, TrainState | None]:
    """The checkpoint to go on from and its state; (None, None) for a fresh start."""
    own = _checkpoints(config, output_dir, rank=0).latest()
    if own and config.resume == "never":
        raise UserError(f"{output_dir} has checkpoints and resume is 'never': give another --output_dir")
    checkpoint = own or (None if config.resume in ("auto", "never") else Path(config.resume))
    if checkpoint is None:
        return None, None
    return checkpoint, read_state(checkpoint, manifest.sha256)


def _checkpoints(config: PretrainConfig, output_dir: Path, rank: int) -> Checkpoints:
    return Checkpoints(output_dir / "checkpoints", config.checkpoints_kept, rank)


class Pretrainer:
    """One process's part of a run: prepared by the constructor, done by :meth:`run`."""

    def __init__(
        self,
        config: PretrainConfig,
        architecture: Architecture,
        ds_config: dict[str, Any],
        manifest: Manifest,
        output_dir: Path,
        checkpoint: Path | None,
        state: TrainState | None,
        processes: Processes,
    ) -> None:
        self._config = config
        self._manifest = manifest
        self._output_dir = output_dir
        self._processes = processes
        self._step = state.step if state else 0
        self._sequences_seen = state.sequences_seen if state else 0
        elapsed = state.elapsed_seconds if state else 0.0
        self._budget = Budget(config.budget_seconds, config.max_steps, config.schedule_scale, elapsed)
        self._budget.start()
        spent = self._budget.spent(self._step)
        self._metrics = MetricsWriter(output_dir, processes.rank, self._budget.total, self._budget.unit, spent)
        if state:
            self._metrics.write("resume", self._step, elapsed)
        torch.manual_seed(config.seed)
        model = MaskedLanguageModel(architecture).to(processes.device)
        self._plan = self._plan_batches(model, ds_config, state)
        self._metrics.say(f"{self._plan} on {processes.hardware}")
        if config.kernels == "compile" or (config.kernels == "auto" and processes.device.type == "cuda"):
            model.compile()
        optimizer = build_optimizer(model, config.optimizer)
        self._engine = PretrainEngine(model, optimizer, ds_config, self._plan, config.gradient_clipping, processes)
        self._checkpoints = _checkpoints(config, output_dir, processes.rank)
        if checkpoint:
            load_weights(self._engine, checkpoint)
        self._batches = TrainingBatches(manifest, self._plan, processes.rank, config.seed, self._sequences_seen)
        validation, saving = config.cadences()
        for cadence in (validation, saving):
            cadence.skip_to(self._budget.progress(self._step) if state else 0.0)
        self._director = Director(self._budget, validation, saving, processes.cpu_group)
        self._since_log = _SinceLog(processes.device)

    def run(self) -> None:
        """Train until the budget ends, then write the model folder and the summary."""
        while not (decision := self._director.decide(self._step)).stop:
            self._train_step(decision)
            if decision.validate:
                self._timed("validate", self._validate)
            if decision.save:
                self._timed("save", self._save)
        self._close()

    def _plan_batches(
        self, model: MaskedLanguageModel, ds_config: dict[str, Any], state: TrainState | None
    ) -> BatchPlan:
        world_size, batch_size = self._processes.world_size, self._config.train_batch_size
        size = self._config.micro_batch_size
        if size == "auto" and state:
            size = state.micro_batch_size
        elif size == "auto":
            speeds = find_micro_batch_size(
                model, self._manifest, batch_size // world_size, self._processes.device, autocast_dtype(ds_config)
            )
            if not speeds:
                raise UserError("out of memory at the smallest micro-batch: take a smaller model or max_seq_length")
            fastest = torch.tensor(max(speeds, key=speeds.__getitem__))
            torch.distributed.broadcast(fastest, src=0, group=self._processes.cpu_group)
            size = int(fastest)
            tried = ", ".join(f"{tried_size}: {speed:.0f}" for tried_size, speed in speeds.items())
            self._metrics.say(f"micro_batch_size {size}; sequences a second by size: {tried}")
        return BatchPlan(batch_size, size, world_size)

    def _train_step(self, decision: Decision) -> None:
        started = time.perf_counter()
        learning_rate = self._config.optimizer.learning_rate * lr_multiplier(
            decision.schedule_position, self._config.warmup_proportion
        )
        batch = self._batches.next_batch()
        loss_sum = self._engine.train_step(batch.rows, batch.num_predictions, learning_rate, self._dropout_seed())
        self._step += 1
        self._sequences_seen += self._plan.train_batch_size
        self._since_log.add(
            loss_sum, batch.num_predictions, self._plan.train_batch_size, learning_rate, decision.progress
        )
        self._budget.record_step(time.perf_counter() - started)
        if self._step % self._config.log_interval == 0:
            self._log()

    def _dropout_seed(self) -> int:
        """A seed of its own for every (run, step, rank): a resumed run needs no generator's state."""
        sequence = np.random.SeedSequence([self._config.seed, self._step, self._processes.rank])
        return int(sequence.generate_state(1)[0])

    def _log(self) -> None:
        """Write what the steps since the last line have measured; every rank calls it."""
        values = self._since_log.flush(self._engine)
        if not values:
            return
        if not torch.isfinite(torch.tensor(values["loss"])):
            raise UserError(
                f"the loss is {values['loss']} at step {self._step}: training diverged; the last good checkpoint is "
                f"{self._checkpoints.latest()}; try a lower learning rate"
            )
        elapsed = self._budget.elapsed()
        self._metrics.write(
            "train", self._step, elapsed, epoch=round(self._batches.epochs(self._sequences_seen), 4), **values
        )
        rate = f"{values['sequences_per_second']:.0f}/s"
        self._metrics.show(self._budget.spent(self._step), loss=f"{values['loss']:.3f}", sequences=rate)

    def _timed(self, action: str, function: Any) -> None:
        started = time.perf_counter()
        function()
        self._director.record(action, time.perf_counter() - started)

    def _validate(self) -> float:
        size, processes = self._plan.micro_batch_size, self._processes
        rows = validation_batches(self._manifest, size, processes.rank, processes.world_size)
        loss = self._engine.evaluate(rows)
        elapsed = self._budget.elapsed()
        self._metrics.write("validation", self._step, elapsed, loss=loss, progress=self._budget.progress(self._step))
        self._metrics.say(f"step {self._step}, {elapsed:.0f} s: validation loss {loss:.4f}")
        return loss

    def _save(self) -> None:
        self._checkpoints.save(self._engine, self._state(self._budget.elapsed()))
        self._metrics.write("checkpoint", self._step, self._budget.elapsed())

    def _state(self, elapsed_seconds: float) -> TrainState:
        return TrainState(
            step=self._step,
            sequences_seen=self._sequences_seen,
            elapsed_seconds=elapsed_seconds,
            micro_batch_size=self._plan.micro_batch_size,
            manifest_sha256=self._manifest.sha256,
        )

    def _close(self) -> None:
        """What follows the last step and is not counted: checkpoint, validation, export, summary."""
        started = time.perf_counter()
        self._budget.stop()
        self._log()
        self._batches.close()
        elapsed = self._budget.elapsed()
        self._checkpoints.save(self._engine, self._state(elapsed))
        validation_loss = self._validate()
        summary = {
            "elapsed_seconds": round(elapsed, 3),
            "time_budget_seconds": self._config.budget_seconds,
            "max_steps": self._config.max_steps,
            "stopped_by": "max_steps" if self._config.max_steps else "time_budget",
            "steps": self._step,
            "sequences": self._sequences_seen,
            "epochs": round(self._batches.epochs(self._sequences_seen), 4),
            "validation_loss": validation_loss,
            "lost_seconds": round(lost_seconds(self._output_dir), 3),
            "train_batch_size": self._plan.train_batch_size,
            "micro_batch_size": self._plan.micro_batch_size,
            "hardware": self._processes.hardware,
            "manifest_sha256": self._manifest.sha256,
        }
        if self._processes.rank == 0:
            pretraining = {**summary, **curves(read_metrics(self._output_dir))}
            export(self._engine.model, self._manifest, self._output_dir / MODEL_FOLDER, pretraining)
            summary["closing_seconds"] = round(time.perf_counter() - started, 3)
            write_json(self._output_dir / SUMMARY_FILE, summary)
            self._metrics.say(
                f"{self._step} steps in {elapsed:.1f} s, validation loss {validation_loss:.4f}: "
                f"the model is in {self._output_dir / MODEL_FOLDER}"
            )
        self._metrics.close()
        self._engine.barrier()


class _SinceLog:
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
