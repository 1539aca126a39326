"""DeepSpeed: processes, precision, gradient accumulation, communication, checkpoint files. Nothing else imports it."""

import json
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
import torch
import torch.distributed as dist
from deepspeed.utils.tensor_fragment import fragment_address

from common.errors import UserError
from data_prep.shards import Rows
from pretrain.batches import BatchPlan, model_inputs
from pretrain.model import MaskedLanguageModel

DS_CONFIGS = Path(__file__).parent.parent / "ds_configs"
_OWNED_ELSEWHERE = (
    "train_batch_size",
    "train_micro_batch_size_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "optimizer",
    "scheduler",
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


def load_ds_config(name: str) -> dict[str, Any]:
    """Read a DeepSpeed configuration; ``auto`` picks bf16, fp16 or cpu by the hardware.

    Raises:
        UserError: there is no such file, or it holds what this project's own configuration says.
    """
    path = DS_CONFIGS / f"{_hardware_precision()}.json" if name == "auto" else Path(name)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        known = ", ".join(sorted(file.name for file in DS_CONFIGS.glob("*.json")))
        raise UserError(f"ds_config {name} can't be read: give 'auto' or a file; ds_configs/ has {known}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"ds_config {path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise UserError(f"ds_config {path} is not a JSON object of DeepSpeed's settings")
    foreign = [key for key in _OWNED_ELSEWHERE if key in config]
    if foreign:
        raise UserError(f"ds_config {path} sets {', '.join(foreign)}: set it in the pretraining configuration instead")
    return config


def _hardware_precision() -> str:
    if not torch.cuda.is_available():
        return "cpu"
    return "bf16" if torch.cuda.get_device_capability() >= (8, 0) else "fp16"


def zero_stage(ds_config: dict[str, Any]) -> int:
    """What DeepSpeed shards: 0 nothing, 1 the optimizer's state."""
    return ds_config.get("zero_optimization", {}).get("stage", 0)


def autocast_dtype(ds_config: dict[str, Any]) -> torch.dtype | None:
    """The type that matrix products run in, None for float32."""
    autocast = ds_config.get("torch_autocast", {})
    for precision, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if ds_config.get(precision, {}).get("enabled"):
            return dtype
    return getattr(torch, autocast["dtype"]) if autocast.get("enabled") else None


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
        self._plan = plan
        self._processes = processes
        self._engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config={
                **ds_config,
                "train_batch_size": plan.train_batch_size,
                "train_micro_batch_size_per_gpu": plan.micro_batch_size,
                "gradient_accumulation_steps": plan.gradient_accumulation_steps,
                "gradient_clipping": gradient_clipping,
                "steps_per_print": 2**62,
            },
        )

    @property
    def model(self) -> MaskedLanguageModel:
        """The model, with this rank's current weights."""
        return self._engine.module

    def train_step(self, rows: Rows, num_predictions: int, learning_rate: float, dropout_seed: int) -> torch.Tensor:
        """One optimizer step over this rank's ``rows``.

        The gradient is that of the mean loss over all ``num_predictions`` predictions of the step on all ranks, not a
        mean of means. ``dropout_seed`` makes the step repeatable without any generator's state.

        Returns:
            The summed loss of this rank's predictions, a detached scalar on the device.
        """
        self._engine.train()
        torch.manual_seed(dropout_seed)
        for group in self._engine.optimizer.param_groups:
            group["lr"] = learning_rate
        size = self._plan.micro_batch_size
        scale = self._plan.world_size / num_predictions  # DeepSpeed takes the mean over ranks
        total = torch.zeros((), device=self._processes.device)
        for start in range(0, len(rows), size):
            loss_sum = self._engine(*model_inputs(rows[start : start + size], size, self._processes.device))
            self._engine.backward(loss_sum * scale, scale_wrt_gas=False)
            self._engine.step()
            total += loss_sum.detach()
        if self._processes.device.type == "cuda":
            torch.cuda.synchronize()  # the clock is read next, and queued work is not done work
        return total

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Rows]) -> float:
        """Mean loss in nats over all predictions of ``batches`` on all ranks."""
        self._engine.eval()
        size = self._plan.micro_batch_size
        loss_sum = torch.zeros((), dtype=torch.float64, device=self._processes.device)
        num_predictions = 0
        for rows in batches:
            loss_sum += self._engine(*model_inputs(rows, size, self._processes.device)).double()
            num_predictions += int((rows.masked_lm_positions > 0).sum())
        totals = self.sum_over_ranks(loss_sum.item(), num_predictions)
        return totals[0] / totals[1]

    def sum_over_ranks(self, *values: float) -> list[float]:
        """Each value's sum over all ranks."""
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self._processes.cpu_group)
        return totals.tolist()

    def save(self, folder: Path, tag: str) -> None:
        """Write DeepSpeed's checkpoint files to ``folder/tag``; every rank calls it."""
        self._engine.save_checkpoint(str(folder), tag=tag, save_latest=False)

    def load(self, folder: Path, tag: str) -> None:
        """Read them again; every rank calls it."""
        # A plain dataclass in DeepSpeed's ZeRO files, the only name in them that is not torch's own.
        torch.serialization.add_safe_globals([fragment_address])
        self._engine.load_checkpoint(str(folder), tag=tag)

    def barrier(self) -> None:
        """Wait for all ranks."""
        dist.barrier(group=self._processes.cpu_group)
