"""A pretraining run: everything checked first, then steps until the budget ends, then the model folder."""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from common.errors import UserError
from common.folders import check_folder, claim_folder, only_writer, write_json
from data_prep.shards import Manifest, SplitReader, read_manifest
from pretrain.batches import BatchPlan, TrainingBatches, validation_batches
from pretrain.budget import Budget, Cadence, Decision, Director, parse_duration, share_of_run
from pretrain.checkpoint import Checkpoints, Setting, TrainState, check_resumable, load_weights, read_state
from pretrain.engine import (
    PretrainEngine,
    Processes,
    autocast_dtype,
    load_ds_config,
    start_processes,
    stop_processes,
    zero_stage,
)
from pretrain.export import export
from pretrain.metrics import MetricsWriter, StepAverages, curves, lost_seconds, read_metrics
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
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
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
    try:
        architecture = resolve(config.model, manifest.vocab_size, manifest.max_seq_length, manifest.pad_token_id)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    ds_config = load_ds_config(config.ds_config)
    check_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
    if (output_dir / SUMMARY_FILE).exists():
        print(f"{output_dir} is complete: the model is in {output_dir / MODEL_FOLDER}")
        return
    checkpoint = _find_checkpoint(config, output_dir)
    state = read_state(checkpoint) if checkpoint else None
    processes = start_processes()
    try:
        setting = Setting(manifest.sha256, asdict(architecture), zero_stage(ds_config), processes.world_size)
        # What doesn't fit is refused before anything is written.
        if checkpoint and state:
            check_resumable(checkpoint, state.setting, setting)
        smallest = 1 if config.micro_batch_size == "auto" else config.micro_batch_size
        BatchPlan(config.train_batch_size, smallest, processes.world_size)
        with _claimed(output_dir, config, processes.rank):
            run = Pretrainer(config, architecture, ds_config, manifest, output_dir, setting, state, processes)
            run.prepare(checkpoint)
            run.train()
    finally:
        stop_processes()


@contextlib.contextmanager
def _claimed(output_dir: Path, config: PretrainConfig, rank: int) -> Iterator[None]:
    """Rank 0 writes, and alone."""
    if rank:
        yield
        return
    claim_folder(output_dir, config, _MAY_CHANGE_ON_RESUME)
    with only_writer(output_dir):
        yield


def _find_checkpoint(config: PretrainConfig, output_dir: Path) -> Path | None:
    """The checkpoint to go on from; None for a fresh start."""
    own = _checkpoints(config, output_dir, rank=0).latest()
    if own and config.resume == "never":
        raise UserError(f"{output_dir} has checkpoints and resume is 'never': give another --output_dir")
    return own or (None if config.resume in ("auto", "never") else Path(config.resume))


def _checkpoints(config: PretrainConfig, output_dir: Path, rank: int) -> Checkpoints:
    return Checkpoints(output_dir / "checkpoints", config.checkpoints_kept, rank)


class Pretrainer:
    """One process's part of a run: :meth:`prepare`, then :meth:`train`."""

    def __init__(
        self,
        config: PretrainConfig,
        architecture: Architecture,
        ds_config: dict[str, Any],
        manifest: Manifest,
        output_dir: Path,
        setting: Setting,
        state: TrainState | None,
        processes: Processes,
    ) -> None:
        self._config = config
        self._architecture = architecture
        self._ds_config = ds_config
        self._manifest = manifest
        self._output_dir = output_dir
        self._setting = setting
        self._processes = processes
        self._state = state
        self._step = state.step if state else 0
        self._sequences_seen = state.sequences_seen if state else 0
        elapsed, step_seconds = (state.elapsed_seconds, state.step_seconds) if state else (0.0, 0.0)
        self._budget = Budget(config.budget_seconds, config.max_steps, config.schedule_scale, elapsed, step_seconds)
        validation, saving = config.cadences()
        for cadence in (validation, saving):
            cadence.skip_to(self._budget.progress(self._step))
        self._director = Director(self._budget, validation, saving, processes.cpu_group)
        self._checkpoints = _checkpoints(config, output_dir, processes.rank)
        self._averages = StepAverages(processes.device)

    def prepare(self, checkpoint: Path | None) -> None:
        """Start the clock, then the model, the engine and the data; ``checkpoint`` is where to go on from."""
        if self._budget.has_room_for(self._step):  # otherwise only the closing is left, which does not count
            self._budget.start()
        spent = self._budget.spent(self._step)
        self._metrics = MetricsWriter(
            self._output_dir, self._processes.rank, self._budget.total, self._budget.unit, spent
        )
        self._metrics.write("start", self._step, self._state.elapsed_seconds if self._state else 0.0)
        torch.manual_seed(self._config.seed)
        model = MaskedLanguageModel(self._architecture).to(self._processes.device)
        self._plan = self._plan_batches(model)
        self._metrics.say(f"{self._plan} on {self._processes.hardware}")
        if self._config.kernels == "compile" or (
            self._config.kernels == "auto" and self._processes.device.type == "cuda"
        ):
            model.compile()
        optimizer = build_optimizer(model, self._config.optimizer)
        self._engine = PretrainEngine(
            model, optimizer, self._ds_config, self._plan, self._config.gradient_clipping, self._processes
        )
        if checkpoint:
            load_weights(self._engine, checkpoint)
        self._batches = TrainingBatches(
            self._manifest, self._plan, self._processes.rank, self._config.seed, self._sequences_seen
        )

    def train(self) -> None:
        """Train until the budget ends, then write the model folder and the summary."""
        while not (decision := self._director.decide(self._step)).stop:
            self._train_step(decision)
            if decision.validate:
                self._timed("validate", self._validate)
            if decision.save:
                self._timed("save", self._save)
        self._close()

    def _plan_batches(self, model: MaskedLanguageModel) -> BatchPlan:
        world_size, batch_size = self._processes.world_size, self._config.train_batch_size
        size = self._config.micro_batch_size
        if size == "auto":
            size = self._state.micro_batch_size if self._state else 0
            if not size or batch_size % (size * world_size):
                size = self._search_micro_batch_size(model, batch_size // world_size)
        return BatchPlan(batch_size, size, world_size)

    def _search_micro_batch_size(self, model: MaskedLanguageModel, rank_batch_size: int) -> int:
        """The fastest size on rank 0, for all ranks."""
        dtype = autocast_dtype(self._ds_config)
        speeds = find_micro_batch_size(model, self._manifest, rank_batch_size, self._processes.device, dtype)
        if not speeds:
            raise UserError("out of memory at the smallest micro-batch: take a smaller model or max_seq_length")
        fastest = torch.tensor(max(speeds, key=speeds.__getitem__))
        torch.distributed.broadcast(fastest, src=0, group=self._processes.cpu_group)
        tried = ", ".join(f"{size}: {speed:.0f}" for size, speed in speeds.items())
        self._metrics.say(f"micro_batch_size {fastest}; sequences a second by size: {tried}")
        return int(fastest)

    def _train_step(self, decision: Decision) -> None:
        started = time.perf_counter()
        learning_rate = self._config.optimizer.learning_rate * lr_multiplier(
            decision.schedule_position, self._config.warmup_proportion
        )
        batch = self._batches.next_batch()
        loss_sum = self._engine.train_step(batch.rows, batch.num_predictions, learning_rate, self._dropout_seed())
        self._step += 1
        self._sequences_seen += self._plan.train_batch_size
        self._averages.add(
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
        values = self._averages.flush(self._engine)
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
        self._log()  # stops a run that has diverged before its weights replace good ones
        self._checkpoints.save(self._engine, self._current_state())
        self._metrics.write("checkpoint", self._step, self._budget.elapsed())

    def _current_state(self) -> TrainState:
        return TrainState(
            step=self._step,
            sequences_seen=self._sequences_seen,
            elapsed_seconds=self._budget.elapsed(),
            micro_batch_size=self._plan.micro_batch_size,
            step_seconds=self._budget.step_seconds,
            setting=self._setting,
        )

    def _close(self) -> None:
        """What follows the last step and is not counted: checkpoint, validation, export, summary."""
        started = time.perf_counter()
        self._budget.stop()
        self._log()
        self._batches.close()
        elapsed = self._budget.elapsed()
        self._checkpoints.save(self._engine, self._current_state())
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
