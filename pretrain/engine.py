"""DeepSpeed: processes, precision, gradient accumulation, communication, checkpoint files. Nothing else imports it."""

import logging
import os
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Checkpoints are data, not programs: DeepSpeed's own torch.load calls obey this, too.
os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"

import deepspeed
import pydantic
import torch
import torch.distributed as dist
from deepspeed.runtime.config import DeepSpeedConfigError
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from common.errors import UserError
from pretrain.batch_plan import BatchPlan
from pretrain.model import MaskedLanguageModel
from pretrain.packing import MicroBatch

_LOSS_SCALE_AT_MINIMUM = "loss scale already at minimum"  # DeepSpeed's words
_MINIMUM_LOSS_SCALE = 1.0
_STUCK_LOSS_SCALE = (
    "gradients overflow in fp16 even at the smallest loss scale: training diverged; try a lower learning rate, a "
    "longer warmup, or a ds_config with bf16"
)


@dataclass(frozen=True)
class Processes:
    """This process among the others."""

    rank: int
    world_size: int
    device: torch.device
    cpu_group: dist.ProcessGroup
    """For decisions and sums on the CPU, which never wait for the GPU."""

    @property
    def hardware(self) -> str:
        """What the run computes on, in a few words."""
        if self.device.type == "cpu":
            threads = torch.get_num_threads()
            name = f"CPU, {threads} thread{'s' if threads > 1 else ''} each"
        else:
            name = torch.cuda.get_device_name(self.device)
        return f"{self.world_size} x {name}"


def start_processes() -> Processes:
    """Join the other processes of this run; one process when no launcher (deepspeed, torchrun) has set any up."""
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if "RANK" not in os.environ:
        single = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(single, MASTER_PORT=str(_free_port()))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank)
        device = torch.device("cuda", local_rank)
    else:
        device = torch.device("cpu")
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1")))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    # DeepSpeed would compile a shared-memory op for CPU processes here. A kill meanwhile leaves a lock file at which
    # every later start waits for ever; gloo does the same work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()
    return Processes(dist.get_rank(), dist.get_world_size(), device, dist.new_group(backend="gloo"))


def stop_processes() -> None:
    """Leave the other processes in good order."""
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class StepResult:
    """What a training step came to."""

    loss_sum: torch.Tensor
    """Over this rank's predictions: a detached scalar on the device."""
    applied: bool
    """False where fp16 gradients overflowed, so that the weights stayed as they were. The same on all ranks."""


def _initialize(
    model: MaskedLanguageModel, optimizer: torch.optim.Optimizer, config: dict[str, Any]
) -> deepspeed.DeepSpeedEngine:
    try:
        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
    except (pydantic.ValidationError, DeepSpeedConfigError) as error:
        raise UserError(f"DeepSpeed refuses ds_config: {' '.join(str(error).split())}") from None
    return engine


class PretrainEngine:
    """The model on DeepSpeed's engine, one method a training step."""

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
    def world_size(self) -> int:
        """Number of processes."""
        return self._processes.world_size

    def train_step(
        self, micro_batches: list[MicroBatch], num_predictions: int, lr_multiplier: float, dropout_seed: int
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
            UserError: gradients overflow in fp16 whatever the loss scale.
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
        if self._processes.device.type == "cuda":
            torch.cuda.synchronize()  # the clock is read next, and queued work is not done work
        return StepResult(total, applied)

    def _update(self) -> bool:
        """Let the optimizer step; False where fp16 gradients overflowed and the loss scale went down instead."""
        scaler = self._loss_scaler
        scale_before = scaler.get_scale() if scaler else 0.0
        try:
            self._engine.step()
        except Exception as error:
            if _LOSS_SCALE_AT_MINIMUM not in str(error):
                raise
            raise UserError(_STUCK_LOSS_SCALE) from None
        if scaler and scaler.get_scale() < _MINIMUM_LOSS_SCALE:
            raise UserError(_STUCK_LOSS_SCALE)
        return self._engine.was_step_applied() and not (scaler and scaler.get_scale() < scale_before)

    @property
    def _loss_scaler(self) -> torch.amp.GradScaler | None:
        """What scales the loss in fp16 at ZeRO stage 0; from stage 1 on, DeepSpeed's optimizer does."""
        return self._engine.torch_autocast_z0_gradscaler

    @torch.no_grad()
    def evaluate(self, batches: Iterable[tuple[MicroBatch, int]]) -> float:
        """Mean loss in nats over all predictions of ``batches`` (and how many each has) on all ranks."""
        self._engine.eval()
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._processes.device)
        total_predictions = 0
        for micro_batch, num_predictions in batches:
            loss_sum += self._engine(*micro_batch.model_inputs(self._processes.device)).double()
            total_predictions += num_predictions
        totals = self.sum_over_ranks(loss_sum.item(), total_predictions)
        return totals[0] / max(1.0, totals[1])

    @torch.no_grad()
    def has_finite_weights(self) -> bool:
        """Whether no weight is NaN or infinite. All ranks hold the same."""
        norms = torch._foreach_norm([parameter.detach() for parameter in self.model.parameters()])
        return bool(torch.isfinite(torch.stack(norms)).all())

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value's sum over all ranks."""
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self._processes.cpu_group)
        return totals.tolist()

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

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._processes.cpu_group)
