"""One process's part of a pretraining run: steps until the budget ends, then the model folder."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from common.folders import errors_of_writing
from data_prep.shards import Manifest
from pretrain.architecture import Architecture
from pretrain.assembly import assemble, dropout_seed
from pretrain.batches import TrainingBatches
from pretrain.budget import Budget
from pretrain.checkpoint import Checkpoints, Setting, TrainState, latest_checkpoint
from pretrain.config import PretrainConfig
from pretrain.director import Decision, Director
from pretrain.ds_config import autocast_dtype
from pretrain.early_stop import EarlyStop
from pretrain.export import export
from pretrain.flops import matrix_product_rate
from pretrain.interruptions import INTERRUPTIONS, Interruptions
from pretrain.metrics import MetricsWriter, StepAverages
from pretrain.model_card import run_facts
from pretrain.packing import MicroBatch
from pretrain.processes import Processes
from pretrain.run_record import curves, lost_seconds, read_metrics
from pretrain.schedule import lr_multiplier
from pretrain.summary import DIVERGED, MODEL_FOLDER, write_summary
from pretrain.validation import Validation, ValidationFigures
from pretrain.watch import Phase, Watch

EXPORTS_FOLDER = "exports"
_GRACE_SECONDS = 30.0  # launchers kill so long after SIGTERM


class Diverged(UserError):
    """The loss or the weights are no numbers any more."""


class Pretrainer:
    """One process's part of a run: :meth:`prepare`, then :meth:`train`."""

    def __init__(
        self,
        config: PretrainConfig,
        ds_config: dict[str, Any],
        manifest: Manifest,
        output_dir: Path,
        setting: Setting,
        state: TrainState | None,
        processes: Processes,
        watch: Watch,
        interruptions: Interruptions,
        wandb: bool,
    ) -> None:
        self._config = config
        self._ds_config = ds_config
        self._manifest = manifest
        self._output_dir = output_dir
        self._setting = setting
        self._processes = processes
        self._watch = watch
        self._state = state
        self._wandb = wandb
        self._step = state.step if state else 0
        self._sequences_seen = state.sequences_seen if state else 0
        self._skipped_steps = state.skipped_steps if state else 0
        self._validated: tuple[int, ValidationFigures] | None = None
        self._stopped_early = state.stopped_early if state else None
        self._early_stop = EarlyStop(config.stop_rules, config.budget_seconds, state.best if state else {})
        spent, durations = (state.spent_seconds, state.durations) if state else ({}, {})
        in_flight = int(processes.device.type == "cuda")
        length = (config.budget_seconds, config.max_steps, config.schedule_scale)
        self._budget = Budget(*length, spent, durations, in_flight)
        cadences = config.cadences()
        for cadence in cadences:
            cadence.skip_to(self._budget.progress(self._step))
        marks = {n: mark for n, mark in enumerate(config.export_at, 1) if not self._export_folder(n).exists()}
        asked = interruptions.pending
        self._director = Director(self._budget, *cadences, marks, asked, processes.maximum, processes.rank, durations)
        self._checkpoints = Checkpoints(output_dir, manifest.tokenizer_folder, config.checkpoints_kept, processes.rank)
        self._facts = run_facts(config, autocast_dtype(ds_config) or torch.float32, manifest)

    def prepare(self, checkpoint: Path | None) -> None:
        """Start the clock, then the model, the engine and the data; ``checkpoint`` is where to go on from."""
        if not self._stopped_early:
            self._budget.start(self._step)
        spent = self._budget.spent(self._step)
        self._metrics = MetricsWriter(
            self._output_dir, self._processes.rank, self._budget.total, self._budget.unit, spent, self._wandb
        )
        self._metrics.write("start", self._step, self._state.elapsed_seconds if self._state else 0.0)
        given = (self._config, self._ds_config, self._manifest, self._setting, self._state, checkpoint)
        self._assembly = assemble(*given, self._processes, self._budget, self._metrics)
        self._engine, self._plan = self._assembly.engine, self._assembly.plan
        self._batches = TrainingBatches(
            self._manifest,
            self._plan,
            self._assembly.shape,
            self._processes.rank,
            self._processes.device,
            self._config.seed,
            self._sequences_seen,
        )
        self._validation = Validation(self._manifest, self._plan, self._engine)
        dtype = autocast_dtype(self._ds_config) or torch.float32
        peak_flops = matrix_product_rate(self._processes.device, dtype) * self._processes.world_size
        self._averages = StepAverages(Architecture(**self._setting.architecture), peak_flops)
        self._metrics.say(f"matrix products in {str(dtype).removeprefix('torch.')}: {peak_flops / 1e12:.2f} TFLOP/s")
        self._budget.started()

    def train(self) -> str:
        """Train until the budget ends, then write the model folder and the summary; or leave early, all saved.

        Returns:
            why the run has ended, one of the values of ``stopped_by`` in ``summary.json``.

        Raises:
            Diverged: the last good checkpoint is kept.
        """
        try:
            stopped_by = self._train_until_stopped()
            if stopped_by in INTERRUPTIONS:
                self._leave(stopped_by)
            else:
                self._close(stopped_by)
        except Diverged as error:
            self._write_summary(DIVERGED, str(error))
            raise
        finally:
            self._batches.close()
            self._metrics.close()
        self._processes.barrier()
        return stopped_by

    def _train_until_stopped(self) -> str:
        while not self._stopped_early:
            self._watch.enter("training", self._step)
            decision = self._director.decide(self._step)
            if decision.stopped_by:
                return decision.stopped_by
            self._train_step(decision)
            if decision.validate:
                self._interrupt("validate", self._validate)
            if decision.save:
                self._interrupt("save", self._save)
            if decision.export:
                self._interrupt("export", lambda number=decision.export: self._export(number))
        return "early_stop"

    def _train_step(self, decision: Decision) -> None:
        started = time.perf_counter()
        multiplier = lr_multiplier(decision.schedule_position, self._config.warmup_proportion, self._config.schedule)
        self._watch.enter("training", self._step, "reading data")
        batch = self._batches.next_batch()
        self._budget.charge("data_wait")
        seed = dropout_seed(self._config.seed, self._step, self._processes.rank)
        try:
            micro_batches = self._told(batch.micro_batches)
            result = self._engine.train_step(micro_batches, batch.workload.predictions, multiplier, seed)
        except torch.OutOfMemoryError:
            result = None  # no more than this here: the exception holds the memory of the failed pass
        if result is None:
            raise self._out_of_memory()
        self._budget.charge("training" if self._budget.is_warmed_up else "compile")
        self._sequences_seen += self._plan.train_batch_size
        if result.is_timed:
            self._budget.record_step(time.perf_counter() - started)
        if not result.applied:
            self._skipped_steps += 1
            return
        self._step += 1
        self._progress, self._learning_rate = decision.progress, multiplier * self._config.optimizer.learning_rate
        self._averages.add(result.loss_sum, batch.workload)
        if self._step % self._config.log_interval == 0:
            self._log()

    def _told(self, micro_batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """Each of them is a sign of life: a step may be long."""
        for micro_batch in micro_batches:
            self._watch.enter("training", self._step)
            yield micro_batch

    def _out_of_memory(self) -> UserError:
        size = self._plan.micro_batch_size
        with torch.compiler.set_stance("force_eager"):  # the model may be compiled by now, for another size
            fits = self._assembly.trials.largest_that_fits(size, has_optimizer_state=self._step > 0)
        advice = f"{fits} fits" if fits else "nothing smaller fits: take a smaller model or max_seq_length"
        return UserError(f"out of memory with micro_batch_size {size}: {advice}")

    def _write(self, event: str, **values: Any) -> None:
        self._metrics.write(event, self._step, self._budget.elapsed(), **values)

    def _log(self) -> None:
        """Write what the steps since the last line have measured; every rank calls it."""
        figures = self._averages.flush(self._processes, self._batches.wait_seconds)
        if not figures:
            return
        for step, loss in enumerate(figures.losses, self._step - len(figures.losses) + 1):
            if not np.isfinite(loss):
                raise self._divergence(f"the loss is {loss} at step {step}")
        self._write(
            "train",
            epoch=round(self._batches.epochs(self._sequences_seen), 4),
            learning_rate=self._learning_rate,
            progress=self._progress,
            skipped_steps=self._skipped_steps,
            **figures.as_metrics(),
        )
        self._stopped_early = self._stopped_early or self._early_stop.check("train_loss", figures.loss, self._progress)
        self._metrics.show(
            self._budget.spent(self._step),
            loss=f"{figures.loss:.3f}",
            lr=f"{self._learning_rate:.2e}",
            sequences=f"{figures.sequences_per_second:.0f}/s",
            utilisation=f"{figures.flop_utilisation:.0%}",
        )

    def _divergence(self, what: str) -> Diverged:
        kept = self._checkpoints.latest()
        good = f"the last good checkpoint is {kept}" if kept else "there is no checkpoint yet"
        return Diverged(f"{what}: training diverged; {good}; try a lower learning rate or a longer warmup")

    def _interrupt(self, action: str, function: Callable[[], Any]) -> None:
        """Do something else between steps, on time that is counted as its own."""
        self._engine.finish()
        self._log()  # stops a run that has diverged
        self._budget.charge("training")
        self._watch.enter("validation" if action == "validate" else "saving", self._step)
        started = time.perf_counter()
        function()
        self._director.record(action, time.perf_counter() - started)
        self._averages.start_clock()  # the pause is no part of the steps' speed

    def _validate(self, phase: Phase = "validation") -> None:
        def go_on() -> bool:
            self._watch.enter(phase, self._step)
            return phase == "closing" or not self._director.interrupted()

        started = time.perf_counter()
        figures = self._validation.run(go_on)
        self._budget.charge("validation")
        if figures is None:
            return
        if not np.isfinite(figures.loss):
            raise self._divergence(f"the validation loss is {figures.loss} after step {self._step}")
        self._validated = self._step, figures
        progress = self._budget.progress(self._step)
        self._write(
            "validation",
            loss=figures.loss,
            accuracy=round(figures.accuracy, 6),
            perplexity=round(figures.perplexity, 4),
            progress=progress,
            seconds=round(time.perf_counter() - started, 3),
        )
        self._metrics.say(
            f"step {self._step}, {self._budget.elapsed():.0f} s: validation loss {figures.loss:.4f}, "
            f"perplexity {figures.perplexity:.2f}, accuracy {figures.accuracy:.2%}"
        )
        if phase != "closing":
            self._stopped_early = self._early_stop.check("validation_loss", figures.loss, progress)

    def _save(self) -> None:
        if not self._engine.has_finite_weights():
            raise self._divergence(f"weights are not finite after step {self._step}")
        started = time.perf_counter()
        if not self._checkpoints.save(self._engine, self._step, self._current_state, self._record()):
            return
        self._budget.charge("checkpoints")
        seconds = time.perf_counter() - started
        self._write("checkpoint", progress=self._budget.progress(self._step), seconds=round(seconds, 3))
        if seconds + self._budget.step_seconds > _GRACE_SECONDS:
            self._metrics.say(
                f"a step and a checkpoint take {seconds + self._budget.step_seconds:.0f} s, and launchers kill "
                f"{_GRACE_SECONDS:.0f} s after SIGTERM: have SIGUSR1 sent earlier, see docs/running.md"
            )

    def _export_folder(self, number: int) -> Path:
        return self._output_dir / EXPORTS_FOLDER / f"{100 * self._config.export_at[number - 1]:g}-percent"

    def _export(self, number: int) -> None:
        """The model at a mark of ``export_at``, from a checkpoint made for it."""
        self._save()
        started = time.perf_counter()
        folder = self._export_folder(number)
        if self._processes.rank == 0:
            export(latest_checkpoint(self._output_dir), folder)
        self._processes.barrier()
        self._budget.charge("exports")
        seconds = round(time.perf_counter() - started, 3)
        mark = self._config.export_at[number - 1]
        self._write("export", mark=mark, folder=str(folder.relative_to(self._output_dir)), seconds=seconds)
        self._metrics.say(f"step {self._step}: the model after {mark:.0%} of the budget is in {folder}")

    def _current_state(self) -> TrainState:
        self._budget.charge("checkpoints")
        validated_here = self._validated is not None and self._validated[0] == self._step
        return TrainState(
            step=self._step,
            sequences_seen=self._sequences_seen,
            skipped_steps=self._skipped_steps,
            spent_seconds=self._budget.spent_seconds(),
            micro_batch_size=self._plan.micro_batch_size,
            durations={**self._budget.durations(), **self._director.durations()},
            validation_loss=self._validated[1].loss if validated_here else None,
            best=self._early_stop.best,
            stopped_early=self._stopped_early,
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
            "world_size": self._processes.world_size,
            "hardware": self._processes.hardware,
            "manifest_sha256": self._manifest.sha256,
        }

    def _record(self) -> dict[str, Any]:
        """What a checkpoint tells of the run so far; the exported model gets it."""
        return {**self._figures(), **self._facts, **curves(read_metrics(self._output_dir))}

    def _leave(self, stopped_by: str) -> None:
        """Save, so that the same command goes on from here."""
        self._engine.finish()
        self._log()
        if self._step:
            self._watch.enter("saving", self._step)
            self._budget.charge("training")
            self._save()
        self._budget.stop()
        self._write_summary(stopped_by, None)
        self._metrics.say(
            f"stopped by {stopped_by} after step {self._step}, {self._budget.elapsed():.1f} s spent, all saved: "
            "the same command goes on"
        )

    def _close(self, stopped_by: str) -> None:
        """What follows the last step and is not counted: checkpoint, validation, export, summary."""
        self._engine.finish()
        self._log()
        self._budget.stop()
        started = time.perf_counter()
        self._watch.enter("closing", self._step)
        self._save()
        self._validate("closing")
        _, figures = self._validated
        final = {"validation_loss": figures.loss, "validation_accuracy": round(figures.accuracy, 6)}
        model_folder = self._output_dir / MODEL_FOLDER
        if self._processes.rank == 0:
            with errors_of_writing(self._output_dir):
                self._checkpoints.set_validation_loss(figures.loss)
                self._checkpoints.update_record({**self._record(), **final, "stopped_by": stopped_by})
            export(latest_checkpoint(self._output_dir), model_folder)
        closing = {"closing_seconds": round(time.perf_counter() - started, 3)}
        self._write_summary(stopped_by, self._stopped_early, **final, **closing)
        self._metrics.say(
            f"{self._step} steps in {self._budget.elapsed():.1f} s, validation loss {figures.loss:.4f}: "
            f"the model is in {model_folder}"
        )

    def _write_summary(self, stopped_by: str, because: str | None, **values: Any) -> None:
        self._write("stop", stopped_by=stopped_by)
        if because:
            self._metrics.say(f"{stopped_by}: {because}")
        if self._processes.rank:
            return
        spent = {activity: round(seconds, 3) for activity, seconds in self._budget.spent_seconds().items()}
        with errors_of_writing(self._output_dir):
            write_summary(
                self._output_dir,
                {
                    **self._figures(),
                    "stopped_by": stopped_by,
                    "stopped_because": because,
                    "spent_seconds": spent,
                    "validation_loss": None,
                    "validation_accuracy": None,
                    "closing_seconds": 0.0,
                    **values,
                },
            )
        self._watch.enter("done", self._step)
