"""The configuration of a pretraining run."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pretrain.architecture import ModelConfig
from pretrain.budget import Cadence, parse_duration, share_of_run
from pretrain.early_stop import TWENTY_FOUR_HOUR_BERT, StopRule
from pretrain.kernels import Kernels
from pretrain.optimizer import OptimizerConfig
from pretrain.schedule import Schedule

_LARGEST_BATCH = 2**20  # every process reads a step's rows into memory
_EARLY_SHARE = 0.05  # Izsak et al. 2021: validation is denser in the first 5 % of the run


@dataclass(frozen=True)
class PretrainConfig:
    """A pretraining run; the defaults are 24hBERT's."""

    model: ModelConfig = field(default_factory=ModelConfig)
    """the architecture"""
    init_from: str | None = None
    """a Hugging Face BERT or MegatronBert to go on from, folder or hub id: its sizes replace those of model"""
    time_budget: str | None = "24h"
    """wall-clock length of the run, like 90s, 30m, 24h or 3d; null with max_steps"""
    max_steps: int | None = None
    """length of the run in optimizer steps instead of time"""
    schedule_length: str | None = None
    """length of the learning rate's schedule when it is longer than the run; default: the budget"""
    schedule: Schedule = "linear"
    """the learning rate's way down after the warmup: linear, cosine, wsd (constant, then one minus a square root over
    the last fifth) or exponential"""
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
    """newest checkpoints to keep; the one with the best validation loss stays besides"""
    export_at: list[float] = field(default_factory=list)
    """shares of the budget at which the model is exported to exports/, like [0.25, 0.5, 0.75]"""
    early_stop: list[StopRule] | Literal["24hbert"] = field(default_factory=list)
    """rules (after, metric, bound) by which a run that does not do well ends; 24hbert: validation loss 6.0 after 3h"""
    pause_at: str | None = None
    """time or share of the run, like 12h or 50%, at which it validates, saves and leaves with exit code 75; with a
    later mark, or null, the same command goes on"""
    preemption_margin: str = "2m"
    """how long before the end of a Slurm allocation to save and leave"""
    hang_timeout: str = "10m"
    """for how long a process may keep the others waiting until it is taken to hang, which ends the run"""
    log_interval: int = 10
    """steps between lines of metrics.jsonl"""
    kernels: Kernels = "auto"
    """how the model's operations run; auto: compile on CUDA, eager on CPU; apex and deepspeed are experimental and have
    never run on real hardware"""
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
        if self.init_from and self.resume not in ("auto", "never"):
            raise ValueError("resume goes on from a checkpoint and init_from from a model: give one of them")
        if not 0 <= self.gradient_clipping < math.inf:
            raise ValueError(f"gradient_clipping must be at least 0, not {self.gradient_clipping}")
        if self.train_batch_size > _LARGEST_BATCH:
            raise ValueError(f"train_batch_size must be at most {_LARGEST_BATCH}, not {self.train_batch_size}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be from 0 to {2**32 - 1}, not {self.seed}")
        if marks := [mark for mark in self.export_at if not 0 < mark < 1]:
            raise ValueError(f"export_at {marks[0]} is not a share between 0 and 1")
        if len({f"{mark:.4g}" for mark in self.export_at}) < len(self.export_at):
            raise ValueError(f"export_at {self.export_at} names a share twice")
        for duration in (self.preemption_margin, self.hang_timeout):
            parse_duration(duration)
        if self.pause_share is not None and self.pause_share >= 1:
            raise ValueError(f"pause_at {self.pause_at} does not lie before the end of the run")
        for rule in self.stop_rules:
            if share_of_run(rule.after, self.budget_seconds) > 1:
                raise ValueError(f"early_stop after {rule.after} lies beyond the run of {self.time_budget}")
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

    @property
    def stop_rules(self) -> tuple[StopRule, ...]:
        """The rules for an early stop, a preset's resolved."""
        return TWENTY_FOUR_HOUR_BERT if self.early_stop == "24hbert" else tuple(self.early_stop)

    @property
    def pause_share(self) -> float | None:
        """``pause_at`` as a share of the run."""
        return None if self.pause_at is None else share_of_run(self.pause_at, self.budget_seconds)

    def cadences(self) -> tuple[Cadence, Cadence]:
        """When to validate, which is also where a rule wants to judge, and when to save."""
        seconds, early = self.budget_seconds, self.early_validation_interval
        judged = [share_of_run(rule.after, seconds) for rule in self.stop_rules if rule.metric == "validation_loss"]
        validation = Cadence(
            share_of_run(self.validation_interval, seconds),
            early and share_of_run(early, seconds),
            _EARLY_SHARE,
            judged,
        )
        return validation, Cadence(share_of_run(self.checkpoint_interval, seconds))
