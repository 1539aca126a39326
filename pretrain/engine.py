"""DeepSpeed: precision, gradient accumulation, communication, checkpoint files. Nothing else imports it."""

import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Checkpoints are data, not programs: DeepSpeed's own torch.load calls obey this, too.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import deepspeed
import pydantic
import torch
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from common.errors import UserError
from pretrain.batch_plan import BatchPlan
from pretrain.model import MaskedLanguageModel
from pretrain.packing import MicroBatch
from pretrain.processes import Processes

_LOSS_SCALE_AT_MINIMUM = "loss scale already at minimum"  # DeepSpeed's words
_MINIMUM_LOSS_SCALE = 1.0


class StuckLossScaleError(Exception):
    """Gradients overflow in fp16 even at the smallest loss scale."""


@dataclass(frozen=True)
class StepResult:
    """What a training step came to."""

    loss_sum: torch.Tensor
    """Over this rank's predictions: a detached scalar on the device."""
    applied: bool
    """False where fp16 gradients overflowed, so that the weights stayed as they were. The same on all ranks."""
    ended_one: bool
    """Whether a step has ended in this call: on a CPU this one, on a GPU the one before, if there was one."""


def _initialize(
    model: MaskedLanguageModel, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # DeepSpeed would compile a shared-memory op for CPU processes here. A kill meanwhile leaves a lock file at which
    # every later start waits for ever; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it even where nothing has been launched
    try:
        deepspeed.init_distributed()  # the processes have met by now: DeepSpeed joins what they have
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except (pydantic.ValidationError, DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses ds_config: {' '.join(str(error).split())}") from None
    return engine


class PretrainEngine:
    """The model on DeepSpeed's engine, one method a training step.

    On a GPU a step is queued while the one before still runs, so that the device never waits for the host; a step's
    call returns when the one before has ended. On a CPU it returns when the step has.
    """

    def __init__(
        self,
        model: MaskedLanguageModel,
        optimizer: torch.optim.Optimizer,
        ds_config: dict[str, Any],
        plan: BatchPlan,
        gradient_clipping: float,
        processes: Processes,
    ) -> None:
        self._processes = processes
        self._on_gpu = processes.device.type == "cuda"
        self._step_before: torch.cuda.Event | None = None
        """The end of the step that the device may still run."""
        self._engine = _initialize(
            model,
            optimizer,
            {
                **ds_config,
                "train_batch_size": plan.train_batch_size,
                "train_micro_batch_size_per_gpu": plan.micro_batch_size,
                "gradient_accumulation_steps": plan.gradient_accumulation_steps,
                "gradient_clipping": gradient_clipping,
                # A rank may need a micro-batch more than another, so a step ends when we say so, not after a count.
                "managed_gradient_accumulation": False,
                "steps_per_print": 2**62,
            },
        )

    @property
    def model(self) -> MaskedLanguageModel:
        """The model, with this rank's current weights."""
        return self._engine.module

    @property
    def processes(self) -> Processes:
        """Whom it computes with."""
        return self._processes

    def train_step(
        self, micro_batches: Iterable[MicroBatch], num_predictions: int, lr_multiplier: float, dropout_seed: int
    ) -> StepResult:
        """One optimizer step over this rank's ``micro_batches``, however many these are.

        The gradient is that of the mean loss over all ``num_predictions`` predictions of the step on all ranks, not a
        mean of means. ``dropout_seed`` makes the step repeatable without any generator's state.

        Args:
            micro_batches: of this rank.
            num_predictions: of the whole step, over all ranks.
            lr_multiplier: share of each parameter group's peak learning rate.
            dropout_seed: of this rank and step.

        Raises:
            StuckLossScaleError: gradients overflow in fp16 whatever the loss scale.
        """
        self._engine.train()
        torch.manual_seed(dropout_seed)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr_multiplier * group["peak_learning_rate"]
        scale = self._processes.world_size / max(1, num_predictions)  # DeepSpeed takes the mean over ranks
        total = torch.zeros((), device=self._processes.device)
        for micro_batch in micro_batches:
            loss_sum = self._engine(*micro_batch.model_inputs(self._processes.device))
            self._engine.backward(loss_sum * scale, scale_wrt_gas=False)
            total += loss_sum.detach()
        applied = self._update()
        return StepResult(total, applied, self._wait_for_the_step_before() if self._on_gpu else True)

    @property
    def is_busy(self) -> bool:
        """Whether the device may still run a step."""
        return self._step_before is not None

    def _wait_for_the_step_before(self) -> bool:
        """Whether there was one."""
        before, self._step_before = self._step_before, torch.cuda.Event()
        self._step_before.record()
        if before:
            before.synchronize()
        return before is not None

    def finish(self) -> bool:
        """Wait for the step that the device may still run; whether there was one."""
        before, self._step_before = self._step_before, None
        if before:
            before.synchronize()
        return before is not None

    def _update(self) -> bool:
        """Let the optimizer step; False where fp16 gradients overflowed and the loss scale went down instead."""
        scaler = self._loss_scaler
        scale_before = scaler.get_scale() if scaler else 0.0
        try:
            self._engine.step()
        except Exception as error:
            if _LOSS_SCALE_AT_MINIMUM not in str(error):
                raise
            raise StuckLossScaleError from None
        if scaler and scaler.get_scale() < _MINIMUM_LOSS_SCALE:
            raise StuckLossScaleError
        return self._engine.was_step_applied() and not (scaler and scaler.get_scale() < scale_before)

    @property
    def _loss_scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss in fp16 at ZeRO stage 0; from stage 1 on, DeepSpeed's optimizer does."""
        return self._engine.torch_autocast_z0_gradscaler

    @torch.no_grad()
    def evaluate(self, micro_batches: Iterable[MicroBatch]) -> tuple[float, float]:
        """The summed loss in nats over this rank's ``micro_batches``, and how many predictions are right."""
        self._engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self._processes.device)
        for micro_batch in micro_batches:
            inputs = micro_batch.model_inputs(self._processes.device)
            totals += torch.stack(self._engine(*inputs, count_correct=True)).double()
        loss_sum, correct = totals.tolist()
        return loss_sum, correct

    @torch.no_grad()
    def has_finite_weights(self) -> bool:
        """Whether no weight is NaN or infinite. All ranks hold the same."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self.model.parameters()])
        return bool(torch.isfinite(torch.stack(norms)).all())

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's checkpoint files to ``folder/tag``; every rank calls it."""
        scaler = self._loss_scaler
        ours = {"loss_scaler": scaler.state_dict()} if scaler else {}
        self._engine.save_checkpoint(str(folder), tag=tag, client_state=ours, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read them again; every rank calls it."""
        # Plain values in DeepSpeed's ZeRO files, the only names in them that are not torch's own.
        torch.serialization.add_safe_globals([fragment_address, ZeroStageEnum, LossScaler, DynamicLossScaler])
        _, ours = self._engine.load_checkpoint(str(folder), tag=tag)
        if self._loss_scaler and "loss_scaler" in ours:
            self._loss_scaler.load_state_dict(ours["loss_scaler"])
