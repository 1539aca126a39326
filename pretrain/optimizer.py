"""The optimizer and its parameter groups."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class OptimizerConfig:
    """Izsak et al. 2021, Table 4, by default."""

    name: Literal["adamw"] = "adamw"
    """adamw: Adam with decoupled weight decay"""
    learning_rate: float = 2e-3
    """peak, at the end of the warmup"""
    weight_decay: float = 0.01
    """not on biases and LayerNorms"""
    adam_beta1: float = 0.9
    """decay of the gradient's mean"""
    adam_beta2: float = 0.98
    """decay of the gradient's squares"""
    adam_epsilon: float = 1e-6
    """added to the denominator"""


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and embeddings only. The learning rate is set at every step."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True
    )
