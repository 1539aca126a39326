"""One process's part of a pretraining run: steps until the budget ends, then the model folder."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

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
from pretrain.early_stop import Diverged, EarlyStop
from pretrain.engine import StuckLossScaleError
from pretrain.export import export
from pretrain.exports import Exports
from pretrain.flops import matrix_product_rate
from pretrain.interruptions import INTERRUPTIONS, Interruptions
from pretrain.metrics import MetricsWriter, StepAverages
from pretrain.model_card import run_facts
from pretrain.packing import MicroBatch
from pretrain.processes import Processes
from pretrain.run_record import PAUSE, curves, lost_seconds, read_metrics
from pretrain.schedule import lr_multiplier
from pretrain.summary import DIVERGED, MODEL_FOLDER, write_summary
from pretrain.validation import Validation, ValidationFigures
from pretrain.watch import Phase, Watch

_GRACE_SECONDS = 30.0  # launchers kill so long after SIGTERM


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
        checkpoint: Path | None,
        processes: Processes,
        watch: Watch,
        interruptions: Interruptions,
        wandb: bool,
    ) -> None:
        self._config, self._ds_config, self._manifest = config, ds_config, manifest
        self._output_dir, self._setting = output_dir, setting
        self._processes, self._watch = processes, watch
        self._state, self._checkpoint, self._wandb = state, checkpoint, wandb
        self._step = state.step if state else 0
        self._sequences_seen = state.sequences_seen if state else 0
        self._skipped_steps = state.skipped_steps if state else 0
        self._validated: tuple[int, ValidationFigures] | None = None
        self._validation_due = bool(state and state.validation_due)
        self._running_since: float | None = None
        self._checkpoints = Checkpoints(
            output_dir, manifest.tokenizer_folder, config.checkpoints_kept, processes.rank, checkpoint
        )
        # Another run's rules are not this one's.
        judged = state if checkpoint and self._checkpoints.owns(checkpoint) else None
        self._stopped_early = judged.stopped_early if judged else None
        self._early_stop = EarlyStop(config.stop_rules, config.budget_seconds, judged.best if judged else {})
        spent, durations = (state.spent_seconds, state.durations) if state else ({}, {})
        in_flight = int(processes.device.type == "cuda")
        length = (config.budget_seconds, config.max_steps, config.schedule_scale)
        self._budget = Budget(*length, spent, durations, in_flight, config.pause_share)
        self._progress = self._budget.progress(self._step)
        cadences = config.cadences()
        for cadence in cadences:
            cadence.skip_to(self._progress)
        self._exports = Exports(output_dir, config.export_at)
        marks = self._exports.to_come(self._progress)
        agree = (interruptions.pending, processes.maximum, processes.rank)
        self._director = Director(self._budget, *cadences, marks, *agree, durations)
        self._facts = run_facts(config, autocast_dtype(ds_config) or torch.float32, manifest)

    def prepare(self) -> None:
        """Start the clock, then the model, the engine and the data."""
        if not self._stopped_early:
            self._budget.start(self._step)
        length = (self._budget.total, self._budget.unit, self._budget.spent(self._step))
        self._metrics = MetricsWriter(self._output_dir, self._processes.rank, *length, self._wandb)
        facts = {"hardware": self._processes.hardware, "manifest_sha256": self._manifest.sha256}
        self._metrics.write("start", self._step, self._state.elapsed_seconds if self._state else 0.0, **facts)
        given = (self._config, self._ds_config, self._manifest, self._setting, self._state, self._checkpoint)
        self._assembly = assemble(*given, self._processes, self._budget, self._metrics)
        self._watch.enter("starting", self._step)
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
            if stopped_by in (PAUSE, *INTERRUPTIONS):
                self._leave(stopped_by)
            else:
                stopped_by = self._close(stopped_by)
        except Diverged as error:
            self._write_summary(DIVERGED, str(error))
            raise
        finally:
            self._batches.close()
            self._metrics.close()
        self._watch.enter("done", self._step)
        self._processes.barrier()
        return stopped_by

    def _train_until_stopped(self) -> str:
        if self._validation_due:
            self._interrupt("validate", self._validate)  # a rule may be waiting for it
        while not self._stopped_early:
            self._watch.enter("training", self._step)
            decision = self._director.decide(self._step)
            if decision.stopped_by == PAUSE and not self._is_validated():
                self._interrupt("validate", self._validate)  # a rule or a signal may end the run before the pause
                continue
            if decision.stopped_by:
                self._log()  # which may still end it early
                return "early_stop" if self._stopped_early else decision.stopped_by
            if not self._train_step(decision):
                continue
            if decision.validate:
                self._interrupt("validate", self._validate)
            if decision.save:
                self._interrupt("save", self._save)
            if decision.export:
                self._interrupt("export", lambda number=decision.export: self._export(number))
        return "early_stop"

    def _train_step(self, decision: Decision) -> bool:
        """Whether the weights have changed; not so where fp16 gradients overflowed."""
        if self._running_since is None:
            self._running_since = time.perf_counter()
        multiplier = lr_multiplier(decision.schedule_position, self._config.warmup_proportion, self._config.schedule)
        self._budget.charge("training")
        self._watch.enter("training", self._step, "reading data")
        batch = self._batches.next_batch()
        self._budget.charge("data_wait")
        seed = dropout_seed(self._config.seed, self._step, self._processes.rank)
        try:
            micro_batches = self._told(batch.micro_batches)
            result = self._engine.train_step(micro_batches, batch.workload.predictions, multiplier, seed)
        except StuckLossScaleError:
            raise self._divergence("gradients overflow in fp16 even at the smallest loss scale") from None
        except torch.OutOfMemoryError:
            result = None  # no more than this here: the exception holds the memory of the failed pass
        if result is None:
            raise self._assembly.out_of_memory(has_optimizer_state=self._step > 0)
        self._budget.charge("training" if self._budget.is_warmed_up else "compile")
        self._sequences_seen += self._plan.train_batch_size
        if result.ended_one:
            self._record_step()
        if not result.applied:
            self._skipped_steps += 1
            return False
        self._step += 1
        self._progress, self._learning_rate = decision.progress, multiplier * self._config.optimizer.learning_rate
        self._averages.add(result.loss_sum, batch.workload)
        if self._step % self._config.log_interval == 0:
            self._log()
        return True

    def _record_step(self) -> None:
        """A step has ended; on a GPU the next one may run by now."""
        now = time.perf_counter()
        self._budget.record_step(now - self._running_since)
        self._running_since = now if self._engine.is_busy else None

    def _told(self, micro_batches: list[MicroBatch]) -> Iterator[MicroBatch]:
        """Each of them is a sign of life: a step may be long."""
        for micro_batch in micro_batches:
            self._watch.enter("training", self._step)
            yield micro_batch

    def _write(self, event: str, **values: Any) -> None:
        self._metrics.write(event, self._step, self._budget.elapsed(), **values)

    def _log(self) -> None:
        """Write what the steps since the last line have measured; every rank calls it."""
        if self._engine.finish():  # its loss is asked for
            self._record_step()
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
        self._judge("train_loss", figures.loss, self._progress)
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

    def _interrupt(self, action: str, function: Callable[[], bool]) -> None:
        """Do something else between steps, on time that is counted as its own; it tells whether it was done."""
        self._log()  # stops a run that has diverged
        self._budget.charge("training")
        self._watch.enter("validation" if action == "validate" else "saving", self._step)
        started = time.perf_counter()
        if function():
            self._director.record(action, time.perf_counter() - started)
        self._averages.start_clock()  # the pause is no part of the steps' speed

    def _validate(self, phase: Phase = "validation") -> bool:
        """False where it was given up."""

        def go_on() -> bool:
            self._watch.enter(phase, self._step)
            return phase == "closing" or not self._director.interrupted()

        started = time.perf_counter()
        figures = self._validation.run(go_on)
        self._budget.charge("validation")
        self._validation_due = figures is None
        if figures is None:
            return False
        if not np.isfinite(figures.loss):
            raise self._divergence(f"the validation loss is {figures.loss} after step {self._step}")
        self._validated = self._step, figures
        seconds = round(time.perf_counter() - started, 3)
        self._write("validation", **figures.as_metrics(), progress=self._progress, seconds=seconds)
        self._metrics.say(f"step {self._step}, {self._budget.elapsed():.0f} s: {figures}")
        self._judge("validation_loss", figures.loss, 1.0 if phase == "closing" else self._progress)
        return True

    def _is_validated(self) -> bool:
        """Whether these very weights have been."""
        return self._validated is not None and self._validated[0] == self._step

    def _judge(self, metric: str, loss: float, progress: float) -> None:
        """Early stop: loss and progress are the same on all ranks, and so is what follows."""
        self._stopped_early = self._stopped_early or self._early_stop.check(metric, loss, progress)

    def _save(self) -> bool:
        """False where this step is saved already."""
        if not self._engine.has_finite_weights():
            raise self._divergence(f"weights are not finite after step {self._step}")
        started = time.perf_counter()
        if not self._checkpoints.save(self._engine, self._step, self._current_state, self._record()):
            return False
        self._budget.charge("checkpoints")
        seconds = time.perf_counter() - started
        self._write("checkpoint", progress=self._progress, seconds=round(seconds, 3))
        if seconds + self._budget.step_seconds > _GRACE_SECONDS:
            self._metrics.say(
                f"a step and a checkpoint take {seconds + self._budget.step_seconds:.0f} s, and launchers kill "
                f"{_GRACE_SECONDS:.0f} s after SIGTERM: have SIGUSR1 sent earlier, see docs/running.md"
            )
        return True

    def _export(self, number: int) -> bool:
        """The model at a mark of ``export_at``, from a checkpoint made for it."""
        self._save()
        started = time.perf_counter()
        if self._processes.rank == 0:
            self._exports.write(number)
        self._processes.barrier()
        self._budget.charge("exports")
        self._write("export", **self._exports.facts(number), seconds=round(time.perf_counter() - started, 3))
        self._metrics.say(f"step {self._step}: the model is in {self._exports.folder(number)}")
        return True

    def _current_state(self) -> TrainState:
        self._budget.charge("checkpoints")
        return TrainState(
            step=self._step,
            sequences_seen=self._sequences_seen,
            skipped_steps=self._skipped_steps,
            spent_seconds=self._budget.spent_seconds(),
            micro_batch_size=self._plan.micro_batch_size,
            durations={**self._budget.durations(), **self._director.durations()},
            validation_loss=self._validated[1].loss if self._is_validated() else None,
            best=self._early_stop.best,
            stopped_early=self._stopped_early,
            setting=self._setting,
            validation_due=self._validation_due,
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
        if self._step:
            self._watch.enter("saving", self._step)
            self._budget.charge("training")
            self._save()
        self._budget.stop()
        if stopped_by == PAUSE:
            self._write_summary(PAUSE, f"pause_at {self._config.pause_at}", **self._validated[1].as_summary())
        else:
            self._write_summary(stopped_by, None)
        saved = "all saved" if self._step else "nothing to save yet"
        self._metrics.say(
            f"stopped by {stopped_by} after step {self._step}, {self._budget.elapsed():.1f} s spent, {saved}: "
            "the same command goes on"
        )

    def _close(self, stopped_by: str) -> str:
        """What follows the last step and is not counted: checkpoint, validation, export, summary; why it has ended."""
        self._budget.stop()
        started = time.perf_counter()
        self._watch.enter("closing", self._step)
        self._save()
        if not self._is_validated():
            self._validate("closing")  # which may judge what had no time for a validation of its own
        stopped_by = "early_stop" if self._stopped_early else stopped_by
        _, figures = self._validated
        final = figures.as_summary()
        if self._processes.rank == 0:
            with errors_of_writing(self._output_dir):
                self._checkpoints.set_validation_loss(figures.loss)
                self._checkpoints.update_record({**self._record(), **final, "stopped_by": stopped_by})
            export(latest_checkpoint(self._output_dir), self._output_dir / MODEL_FOLDER)
        closing = {"closing_seconds": round(time.perf_counter() - started, 3)}
        self._write_summary(stopped_by, self._stopped_early, **final, **closing)
        self._metrics.say(
            f"{self._step} steps in {self._budget.elapsed():.1f} s, validation loss {figures.loss:.4f}: "
            f"the model is in {self._output_dir / MODEL_FOLDER}"
        )
        for mark in self._exports.missing().values():
            self._metrics.say(f"export_at {mark:g} has no folder: the run ended before there was time for it")
        return stopped_by

    def _write_summary(self, stopped_by: str, because: str | None, **values: Any) -> None:
        self._write("stop", stopped_by=stopped_by)
        if because:
            self._metrics.say(f"{stopped_by}: {because}")
        if self._processes.rank == 0:
            ended = {**self._figures(), "stopped_by": stopped_by, "stopped_because": because, **values}
            with errors_of_writing(self._output_dir):
                write_summary(self._output_dir, ended, self._budget.spent_seconds())
