"""Run by test_weight_files.py in two processes: one step and a checkpoint at every ZeRO stage and precision.

Beside each checkpoint it leaves the float32 weights that DeepSpeed itself gathers from its live engine.
"""

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param
from safetensors.torch import save_file

from pretrain.architecture import ModelConfig, resolve
from pretrain.model import MaskedLanguageModel
from pretrain.processes import leave

_BF16 = {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}}
SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {"zero_optimization": {"stage": 0}},
    "autocast": {"zero_optimization": {"stage": 0}, "torch_autocast": {"enabled": True, "dtype": "bfloat16"}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "bf16_zero1": {"zero_optimization": {"stage": 1}, **_BF16},
}


def new_model() -> MaskedLanguageModel:
    """Sizes that no number of processes divides."""
    torch.manual_seed(0)
    config = ModelConfig(hidden_size=30, num_hidden_layers=2, num_attention_heads=3, intermediate_size=37)
    return MaskedLanguageModel(resolve(config, vocab_size=101, max_seq_length=9, pad_token_id=0)).eval()


def save_after_one_step(folder: Path, name: str) -> None:
    model = new_model()
    groups = [{"params": [p for p in model.parameters() if (p.ndim < 2) == small]} for small in (False, True)]
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=torch.optim.AdamW(groups, lr=1e-2),
        config={**SETTINGS[name], "train_batch_size": 2, "train_micro_batch_size_per_gpu": 1},
    )
    positions = torch.tensor([2, 5])
    loss = engine(torch.arange(1, 10)[None], torch.tensor([9]), positions, torch.tensor([3, 100]))
    engine.backward(loss)
    engine.step()
    engine.save_checkpoint(str(folder), tag=name, save_latest=False)
    weights = {}
    for key, parameter in engine.module.named_parameters():
        gathered = safe_get_full_fp32_param(parameter)
        weights[key] = (parameter.detach() if gathered is None else gathered).float().clone()
    if torch.distributed.get_rank() == 0:
        save_file(weights, folder / f"{name}.safetensors")
    engine.destroy()


if __name__ == "__main__":
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    for setting in SETTINGS:
        save_after_one_step(Path(sys.argv[1]), setting)
    leave(0)
