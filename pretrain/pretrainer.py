"""One process's part of a pretraining run: steps until the budget ends, then the model folder."""

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.folders import errors_of_writing, write_json
from data_prep.shards import Manifest
from pretrain.architecture import Architecture
from pretrain.batch_plan import BatchPlan
from pretrain.batches import TrainingBatches, shape_of_micro_batches, validation_batches
from pretrain.budget import Budget, Decision, Director
from pretrain.checkpoint import Checkpoints, Setting, TrainState, latest_checkpoint, load_weights
from pretrain.config import PretrainConfig
from pretrain.ds_config import autocast_dtype
from pretrain.engine import PretrainEngine, Processes
from pretrain.export import export
from pretrain.flops import matrix_product_rate
from pretrain.init_from import load_pretrained
from pretrain.kernels import apply_kernels
from pretrain.metrics import MetricsWriter, StepAverages, StepFigures, curves, lost_seconds, read_metrics
from pretrain.micro_batch import MicroBatchTrials
from pretrain.model import MaskedLanguageModel
from pretrain.model_card import data_facts, software_facts
from pretrain.optimizer import build_optimizer
from pretrain.schedule import lr_multiplier

SUMMARY_FILE = "summary.json"
MODEL_FOLDER = "hf"
_MICRO_BATCH_SEARCH_SHARE = 0.02  # of the budget
_MICRO_BATCH_SEARCH_SECONDS = 120.0  # at most


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
        self._skipped_steps = state.skipped_steps if state else 0
        elapsed, step_seconds = (state.elapsed_seconds, state.step_seconds) if state else (0.0, 0.0)
        self._budget = Budget(config.budget_seconds, config.max_steps, config.schedule_scale, elapsed, step_seconds)
        validation, saving = config.cadences()
        for cadence in (validation, saving):
            cadence.skip_to(self._budget.progress(self._step))
        self._director = Director(self._budget, validation, saving, processes.cpu_group)
        self._checkpoints = Checkpoints(output_dir, manifest.tokenizer_folder, config.checkpoints_kept, processes.rank)
        self._facts = {"data": data_facts(manifest), "software": software_facts()}

    def prepare(self, checkpoint: Path | None) -> None:
        """Start the clock, then the model, the engine and the data; ``checkpoint`` is where to go on from."""
        if self._budget.has_room_for(self._step):  # otherwise only the closing is left, which does not count
            self._budget.start()
        spent = self._budget.spent(self._step)
        self._metrics = MetricsWriter(
            self._output_dir, self._processes.rank, self._budget.total, self._budget.unit, spent
        )
        self._metrics.write("start", self._step, self._state.elapsed_seconds if self._state else 0.0)
        self._prepare_model(checkpoint)
        self._batches = TrainingBatches(
            self._manifest,
            self._plan,
            self._shape,
            self._processes.rank,
            self._processes.device,
            self._config.seed,
            self._sequences_seen,
        )
        dtype = autocast_dtype(self._ds_config) or torch.float32
        peak_flops = matrix_product_rate(self._processes.device, dtype) * self._processes.world_size
        self._averages = StepAverages(self._architecture, peak_flops)
        self._metrics.say(f"matrix products in {str(dtype).removeprefix('torch.')}: {peak_flops / 1e12:.2f} TFLOP/s")

    def _prepare_model(self, checkpoint: Path | None) -> None:
        config, processes = self._config, self._processes
        torch.manual_seed(config.seed)
        model = MaskedLanguageModel(self._architecture)
        if config.init_from and not checkpoint:
            self._metrics.say(load_pretrained(model, config.init_from))
        model.to(processes.device)
        dtype = autocast_dtype(self._ds_config)
        self._trials = MicroBatchTrials(model, self._manifest, config.train_batch_size, processes.world_size, dtype)
        self._plan = BatchPlan(config.train_batch_size, self._micro_batch_size(), processes.world_size)
        self._shape = shape_of_micro_batches(self._manifest, self._plan)
        self._metrics.say(f"{self._plan} on {processes.hardware}; {self._shape}")
        kernels = apply_kernels(
            model, config.kernels, processes.device, dtype, self._shape.sequences, self._dropout_seed()
        )
        self._metrics.say(f"kernels: {kernels}")
        optimizer = build_optimizer(model, config.optimizer)
        self._engine = PretrainEngine(
            model, optimizer, self._ds_config, self._plan, config.gradient_clipping, processes
        )
        if checkpoint:
            load_weights(self._engine, checkpoint)

    def train(self) -> None:
        """Train until the budget ends, then write the model folder and the summary."""
        while not (decision := self._director.decide(self._step)).stop:
            self._train_step(decision)
            if decision.validate:
                self._timed("validate", self._validate)
            if decision.save:
                self._timed("save", self._save)
        self._close()

    def _micro_batch_size(self) -> int:
        """As configured, as the run had it before, or the fastest."""
        size = self._config.micro_batch_size
        if size != "auto":
            return size
        kept = self._state.micro_batch_size if self._state else 0
        if kept and self._config.train_batch_size % (kept * self._processes.world_size) == 0:
            return kept
        return self._search_micro_batch_size()

    def _search_micro_batch_size(self) -> int:
        """The fastest size that fits on all ranks."""
        started, sizes = time.perf_counter(), self._trials.sizes()
        budget = self._config.budget_seconds
        allowed = min(_MICRO_BATCH_SEARCH_SECONDS, _MICRO_BATCH_SEARCH_SHARE * budget) if budget else np.inf
        own = self._trials.speeds(allowed)
        largest, *speeds = self._smallest_over_ranks(max(own, default=0), *(own.get(size, 0.0) for size in sizes))
        if not largest:
            raise UserError("out of memory with micro-batches of one sequence: take a smaller model or max_seq_length")
        tried = {size: round(speed, 1) for size, speed in zip(sizes, speeds, strict=True) if speed}
        # Ranks of unequal memory may have tried no size in common: what fits the smallest fits all.
        fastest = max(tried, key=tried.__getitem__, default=int(largest))
        seconds = time.perf_counter() - started
        self._metrics.write(
            "micro_batch_search",
            self._step,
            self._budget.elapsed(),
            micro_batch_size=fastest,
            seconds=round(seconds, 3),
        )
        listed = ", ".join(f"{size}: {speed}" for size, speed in tried.items())
        self._metrics.say(
            f"micro_batch_size {fastest}, found in {seconds:.1f} s; sequences a second on a process by size: {listed}"
        )
        return fastest

    def _smallest_over_ranks(self, *values: float) -> list[float]:
        smallest = torch.tensor(values, dtype=torch.float64)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN, group=self._processes.cpu_group)
        return smallest.tolist()

    def _train_step(self, decision: Decision) -> None:
        started = time.perf_counter()
        multiplier = lr_multiplier(decision.schedule_position, self._config.warmup_proportion)
        batch = self._batches.next_batch()
        try:
            result = self._engine.train_step(
                batch.micro_batches, batch.workload.predictions, multiplier, self._dropout_seed()
            )
        except torch.OutOfMemoryError:
            result = None  # no more than this here: the exception holds the memory of the failed pass
        if result is None:
            raise self._out_of_memory()
        self._sequences_seen += self._plan.train_batch_size
        if not result.applied:
            self._skipped_steps += 1
            return
        self._step += 1
        self._progress, self._learning_rate = decision.progress, multiplier * self._config.optimizer.learning_rate
        self._averages.add(result.loss_sum, batch.workload)
        self._budget.record_step(time.perf_counter() - started)
        if self._step % self._config.log_interval == 0:
            self._log()

    def _out_of_memory(self) -> UserError:
        size = self._plan.micro_batch_size
        with torch.compiler.set_stance("force_eager"):  # the model may be compiled by now, for another size
            fits = self._trials.largest_that_fits(size, has_optimizer_state=self._step > 0)
        advice = f"{fits} fits" if fits else "nothing smaller fits: take a smaller model or max_seq_length"
        return UserError(f"out of memory with micro_batch_size {size}: {advice}")

    def _dropout_seed(self) -> int:
        """A seed of its own for every (run, step, rank): a resumed run needs no generator's state."""
        sequence = np.random.SeedSequence([self._config.seed, self._step, self._processes.rank])
        return int(sequence.generate_state(1)[0])

    def _log(self) -> None:
        """Write what the steps since the last line have measured; every rank calls it."""
        figures = self._averages.flush(self._engine, self._batches.wait_seconds)
        if not figures:
            return
        self._stop_if_diverged(figures)
        self._metrics.write(
            "train",
            self._step,
            self._budget.elapsed(),
            epoch=round(self._batches.epochs(self._sequences_seen), 4),
            learning_rate=self._learning_rate,
            progress=self._progress,
            skipped_steps=self._skipped_steps,
            **figures.as_metrics(),
        )
        rate = f"{figures.sequences_per_second:.0f}/s"
        self._metrics.show(self._budget.spent(self._step), loss=f"{figures.loss:.3f}", sequences=rate)

    def _stop_if_diverged(self, figures: StepFigures) -> None:
        first_logged = self._step - len(figures.losses) + 1
        for step, loss in enumerate(figures.losses, first_logged):
            if not np.isfinite(loss):
                raise self._divergence(f"the loss is {loss} at step {step}")

    def _divergence(self, what: str) -> UserError:
        kept = self._checkpoints.latest()
        good = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return UserError(f"{what}: training diverged; {good}; try a lower learning rate or a longer warmup")

    def _timed(self, action: str, function: Any) -> None:
        started = time.perf_counter()
        function()
        self._director.record(action, time.perf_counter() - started)
        self._averages.start_clock()  # the pause is no part of the steps' speed

    def _validate(self) -> float:
        self._log()  # stops a run that has diverged
        batches = validation_batches(self._manifest, self._shape, self._processes.rank, self._processes.world_size)
        loss = self._engine.evaluate(batches)
        if not np.isfinite(loss):
            raise self._divergence(f"the validation loss is {loss} after step {self._step}")
        elapsed = self._budget.elapsed()
        self._metrics.write("validation", self._step, elapsed, loss=loss, progress=self._budget.progress(self._step))
        self._metrics.say(f"step {self._step}, {elapsed:.0f} s: validation loss {loss:.4f}")
        return loss

    def _save(self) -> None:
        self._log()  # stops a run that has diverged before its weights replace good ones
        if not self._engine.has_finite_weights():
            raise self._divergence(f"weights are not finite after step {self._step}")
        self._checkpoints.save(self._engine, self._current_state(), self._record())
        self._metrics.write("checkpoint", self._step, self._budget.elapsed())

    def _current_state(self) -> TrainState:
        return TrainState(
            step=self._step,
            sequences_seen=self._sequences_seen,
            skipped_steps=self._skipped_steps,
            elapsed_seconds=self._budget.elapsed(),
            micro_batch_size=self._plan.micro_batch_size,
            step_seconds=self._budget.step_seconds,
            setting=self._setting,
        )

    def _figures(self) -> dict[str, Any]:
        """How far the run has come, in numbers."""
        return {
            "elapsed_seconds": round(self._budget.elapsed(), 3),
            "time_budget_seconds": self._config.budget_seconds,
            "max_steps": self._config.max_steps,
            "steps": self._step,
            "skipped_steps": self._skipped_steps,
            "sequences": self._sequences_seen,
            "epochs": round(self._batches.epochs(self._sequences_seen), 4),
            "lost_seconds": round(lost_seconds(self._output_dir), 3),
            "train_batch_size": self._plan.train_batch_size,
            "micro_batch_size": self._plan.micro_batch_size,
            "hardware": self._processes.hardware,
            "manifest_sha256": self._manifest.sha256,
        }

    def _record(self) -> dict[str, Any]:
        """What a checkpoint tells of the run so far; the exported model gets it."""
        config, dtype = self._config, autocast_dtype(self._ds_config) or torch.float32
        training = {
            "init_from": config.init_from and "/".join(Path(config.init_from).parts[-2:]),
            "optimizer": asdict(config.optimizer),
            "warmup_proportion": config.warmup_proportion,
            "gradient_clipping": config.gradient_clipping,
            "dropout": config.model.hidden_dropout_prob,
            "precision": str(dtype).removeprefix("torch."),
            "seed": config.seed,
        }
        return {**self._figures(), "training": training, **self._facts, **curves(read_metrics(self._output_dir))}

    def _close(self) -> None:
        """What follows the last step and is not counted: checkpoint, validation, export, summary."""
        started = time.perf_counter()
        self._budget.stop()
        self._batches.close()
        elapsed = self._budget.elapsed()
        self._save()
        validation_loss = self._validate()
        summary = {
            **self._figures(),
            "stopped_by": "max_steps" if self._config.max_steps else "time_budget",
            "validation_loss": validation_loss,
        }
        if self._processes.rank == 0:
            with errors_of_writing(self._output_dir):
                self._checkpoints.update_record({**summary, **self._record()})
            export(latest_checkpoint(self._output_dir), self._output_dir / MODEL_FOLDER)
            summary["closing_seconds"] = round(time.perf_counter() - started, 3)
            with errors_of_writing(self._output_dir):
                write_json(self._output_dir / SUMMARY_FILE, summary)
            self._metrics.say(
                f"{self._step} steps in {elapsed:.1f} s, validation loss {validation_loss:.4f}: "
                f"the model is in {self._output_dir / MODEL_FOLDER}"
            )
        self._metrics.close()
        self._engine.barrier()
