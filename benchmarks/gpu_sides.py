"""Whose step the GPU benchmark times: this project's in DeepSpeed's engine, in a bare loop, and Hugging Face's."""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, Protocol

import torch
from torch import nn
from transformers import BertForMaskedLM

from pretrain.architecture import Architecture
from pretrain.batch_plan import BatchPlan
from pretrain.batches import Batch
from pretrain.ds_config import DS_CONFIGS, autocast_dtype, load_ds_config
from pretrain.engine import PretrainEngine
from pretrain.hugging_face import hugging_face_config
from pretrain.kernels import Kernels, apply_kernels
from pretrain.model import NO_LABEL, MaskedLanguageModel
from pretrain.optimizer import OptimizerConfig, build_optimizer
from pretrain.packing import MicroBatch
from pretrain.processes import Processes

_LEARNING_RATE = 1e-4


@dataclass(frozen=True)
class Hardware:
    """Where everything runs, and in which precision."""

    processes: Processes
    ds_config: str
    """Of the runs that are measured; the bare loop and Hugging Face's take its precision."""

    @property
    def device(self) -> torch.device:
        """The GPU, or the CPU in a self-check."""
        return self.processes.device

    @cached_property
    def dtype(self) -> torch.dtype:
        """Of the matrix products."""
        return autocast_dtype(load_ds_config(self.ds_config)) or torch.float32

    def autocast(self) -> torch.autocast:
        """Matrix products in :attr:`dtype`, weights in float32."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


class Side(Protocol):
    """One who trains."""

    def step(self, batch: Batch) -> None:
        """One optimizer step."""


class InEngine:
    """The step as a pretraining run makes it."""

    def __init__(self, model: MaskedLanguageModel, ds_config: str, plan: BatchPlan, processes: Processes) -> None:
        optimizer = build_optimizer(model, OptimizerConfig(learning_rate=_LEARNING_RATE))
        self._engine = PretrainEngine(model, optimizer, load_ds_config(ds_config), plan, 0.0, processes)

    def step(self, batch: Batch) -> None:
        """As in a run."""
        self._engine.train_step(batch.micro_batches, batch.workload.predictions, 1.0, dropout_seed=0)


class InBareLoop:
    """The same model without DeepSpeed: autocast, backward passes, the optimizer."""

    def __init__(self, model: nn.Module, hardware: Hardware) -> None:
        self._model = model.train()
        self._hardware = hardware
        self._optimizer = build_optimizer(model, OptimizerConfig(learning_rate=_LEARNING_RATE))
        for group in self._optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"]

    def step(self, batch: Batch) -> None:
        """Gradients of all micro-batches, then the update."""
        self.accumulate(batch)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        if self._hardware.device.type == "cuda":
            torch.cuda.synchronize(self._hardware.device)

    def accumulate(self, batch: Batch) -> None:
        """Forward and backward passes alone."""
        for micro_batch in batch.micro_batches:
            with self._hardware.autocast():
                loss = self._share_of_loss(micro_batch, batch)
            loss.backward()

    def _share_of_loss(self, micro_batch: MicroBatch, batch: Batch) -> torch.Tensor:
        loss_sum = self._model(*micro_batch.model_inputs(self._hardware.device))
        return loss_sum / batch.workload.predictions


class HuggingFace(InBareLoop):
    """``BertForMaskedLM`` in the same loop: dense head, rows padded to the full length, a mean of means."""

    def _share_of_loss(self, micro_batch: MicroBatch, batch: Batch) -> torch.Tensor:
        ids, lengths, positions, values, _ = micro_batch.model_inputs(self._hardware.device)
        mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
        labels = torch.full_like(ids, NO_LABEL).flatten().index_put((positions,), values).view_as(ids)
        return self._model(input_ids=ids, attention_mask=mask, labels=labels).loss / len(batch.micro_batches)


def new_model(architecture: Architecture, kernels: Kernels, hardware: Hardware, sequences: int) -> MaskedLanguageModel:
    """With the same first weights each time.

    Args:
        architecture: of the model.
        kernels: that it will run on.
        hardware: where, and in which precision.
        sequences: in a micro-batch.
    """
    torch.manual_seed(0)
    model = MaskedLanguageModel(architecture).to(hardware.device)
    apply_kernels(model, kernels, hardware.device, hardware.dtype, sequences, dropout_seed=0)
    return model


def hugging_face_model(architecture: Architecture, kernels: Kernels, device: torch.device) -> nn.Module:
    """BERT's own layout, which is as much work as pre-LN; attention by ``scaled_dot_product_attention``."""
    model = BertForMaskedLM(hugging_face_config(replace(architecture, layer_norm="post_ln"))).to(device)
    model.set_attn_implementation("sdpa")
    if kernels == "compile":
        model.compile(dynamic=False)
    return model


@dataclass(frozen=True)
class Variant:
    """A way to train."""

    name: str
    loop: Literal["engine", "bare", "hugging_face"]
    kernels: Kernels = "compile"
    zero_stage: int = 0

    def build(self, architecture: Architecture, plan: BatchPlan, hardware: Hardware) -> Side:
        """With fresh weights."""
        if self.loop == "hugging_face":
            return HuggingFace(hugging_face_model(architecture, self.kernels, hardware.device), hardware)
        model = new_model(architecture, self.kernels, hardware, plan.micro_batch_size)
        if self.loop == "bare":
            return InBareLoop(model, hardware)
        ds_config = str(DS_CONFIGS / "bf16_zero1.json") if self.zero_stage else hardware.ds_config
        return InEngine(model, ds_config, plan, hardware.processes)


OURS = Variant("ours", "engine")
OURS_EAGER = Variant("ours, eager", "engine", "eager")
OURS_ZERO1 = Variant("ours, ZeRO 1", "engine", zero_stage=1)
BARE = Variant("bare loop", "bare")
BARE_EAGER = Variant("bare loop, eager", "bare", "eager")
HUGGING_FACE = Variant("Hugging Face", "hugging_face")
HUGGING_FACE_EAGER = Variant("Hugging Face, eager", "hugging_face", "eager")
