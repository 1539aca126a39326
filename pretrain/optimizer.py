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

    def __post_init__(self) -> None:
        if self.learning_rate <= 0 or self.weight_decay < 0 or self.adam_epsilon <= 0:
            raise ValueError("optimizer: learning_rate and adam_epsilon must be above 0, weight_decay not below")
        if not (0 <= self.adam_beta1 < 1 and 0 <= self.adam_beta2 < 1):
            raise ValueError("optimizer: adam_beta1 and adam_beta2 must be from 0 to below 1")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """AdamW with weight decay on matrices and embeddings only. The learning rate is set at every step."""
    groups = [
        {"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups, lr=0.0, betas=(config.adam_beta1, config.adam_beta2), eps=config.adam_epsilon, fused=True
    )
