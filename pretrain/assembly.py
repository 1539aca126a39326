"""What a run trains with, put together: the model, its micro-batches, its kernels, the optimizer, the engine."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.errors import UserError
from data_prep.shards import Manifest
from pretrain.architecture import Architecture
from pretrain.batch_plan import BatchPlan, MicroBatchShape
from pretrain.batches import shape_of_micro_batches
from pretrain.budget import Budget
from pretrain.checkpoint import Setting, TrainState, load_weights
from pretrain.config import PretrainConfig
from pretrain.ds_config import autocast_dtype
from pretrain.engine import PretrainEngine
from pretrain.init_from import load_pretrained
from pretrain.kernels import apply_kernels
from pretrain.metrics import MetricsWriter
from pretrain.micro_batch import MicroBatchTrials, choose_micro_batch_size
from pretrain.model import MaskedLanguageModel
from pretrain.optimizer import build_optimizer
from pretrain.processes import Processes


@dataclass(frozen=True)
class Assembly:
    """One process's part of it."""

    engine: PretrainEngine
    plan: BatchPlan
    shape: MicroBatchShape
    trials: MicroBatchTrials
    """To find out what would fit where memory ends."""

    def out_of_memory(self, has_optimizer_state: bool) -> UserError:
        """What a step that found no memory says: which micro-batch would fit."""
        size = self.plan.micro_batch_size
        with torch.compiler.set_stance("force_eager"):  # the model may be compiled by now, for another size
            fits = self.trials.largest_that_fits(size, has_optimizer_state)
        advice = f"{fits} fits" if fits else "nothing smaller fits: take a smaller model or max_seq_length"
        return UserError(f"out of memory with micro_batch_size {size}: {advice}")


def dropout_seed(seed: int, step: int, rank: int) -> int:
    """A seed of its own for every (run, step, rank): a resumed run needs no generator's state."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1)[0])


def assemble(
    config: PretrainConfig,
    ds_config: dict[str, Any],
    manifest: Manifest,
    setting: Setting,
    state: TrainState | None,
    checkpoint: Path | None,
    processes: Processes,
    budget: Budget,
    metrics: MetricsWriter,
) -> Assembly:
    """Put it together, as ``checkpoint`` (whose ``state`` is given, too) has left it; every rank calls it.

    Raises:
        UserError: memory, a package or a compiler is missing.
    """
    step = state.step if state else 0
    torch.manual_seed(config.seed)
    model = MaskedLanguageModel(Architecture(**setting.architecture))
    if config.init_from and not checkpoint:
        metrics.say(load_pretrained(model, config.init_from))
    model.to(processes.device)
    dtype = autocast_dtype(ds_config)
    trials = MicroBatchTrials(model, manifest, config.train_batch_size, processes.world_size, dtype)
    size = _kept_size(config, state, processes) or _search(trials, config, step, processes, budget, metrics)
    plan = BatchPlan(config.train_batch_size, size, processes.world_size)
    shape = shape_of_micro_batches(manifest, plan)
    metrics.say(f"{plan} on {processes.hardware}; {shape}")
    seed = dropout_seed(config.seed, step, processes.rank)
    metrics.say(f"kernels: {apply_kernels(model, config.kernels, processes.device, dtype, shape.sequences, seed)}")
    optimizer = build_optimizer(model, config.optimizer)
    engine = PretrainEngine(model, optimizer, ds_config, plan, config.gradient_clipping, processes)
    if checkpoint:
        load_weights(engine, checkpoint)
    return Assembly(engine, plan, shape, trials)


def _kept_size(config: PretrainConfig, state: TrainState | None, processes: Processes) -> int | None:
    """The size of a micro-batch as configured, or as the run had it before if that still divides the batch."""
    if config.micro_batch_size != "auto":
        return config.micro_batch_size
    kept = state.micro_batch_size if state else 0
    return kept if kept and config.train_batch_size % (kept * processes.world_size) == 0 else None


def _search(
    trials: MicroBatchTrials,
    config: PretrainConfig,
    step: int,
    processes: Processes,
    budget: Budget,
    metrics: MetricsWriter,
) -> int:
    """The fastest size."""
    budget.charge("starting")
    started = time.perf_counter()
    choice = choose_micro_batch_size(trials, processes, config.budget_seconds)
    seconds = time.perf_counter() - started
    budget.charge("micro_batch_search")
    metrics.write("micro_batch_search", step, budget.elapsed(), micro_batch_size=choice.size, seconds=round(seconds, 3))
    metrics.say(f"micro_batch_size {choice.size}, found in {seconds:.1f} s; {choice}")
    return choice.size
