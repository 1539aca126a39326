"""The optimizers and their parameter groups."""

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from common.errors import UserError
from pretrain.lamb import Lamb


@dataclass(frozen=True)
class OptimizerConfig:
    """Izsak et al. 2021, Table 4, by default."""

    name: Literal["adamw", "lamb", "adafactor", "muon"] = "adamw"
    """adamw: Adam with decoupled weight decay; lamb: You et al. 2020, for the largest batches; adafactor: Shazeer and
    Stern 2018, second moments by row and column, no first; muon: orthogonalised momentum for the encoder's and the
    head's matrices, AdamW for embeddings, biases and LayerNorms. All but adamw need ZeRO stage 0"""
    learning_rate: float = 2e-3
    """peak, at the end of the warmup; muon: of the parameters that AdamW updates; adafactor: as a share of each
    parameter's root mean square, usually 1e-2, and at no step above 1 / sqrt(step)"""
    muon_learning_rate: float = 0.02
    """muon: peak for the matrices, in units of the update's singular values, which are near 1"""
    weight_decay: float = 0.01
    """not on biases and LayerNorms"""
    adam_beta1: float = 0.9
    """decay of the gradient's mean; not in adafactor"""
    adam_beta2: float = 0.98
    """decay of the gradient's squares; not in adafactor, which has 1 - step^-0.8"""
    adam_epsilon: float = 1e-6
    """added to the denominator; not in adafactor"""
    muon_momentum: float = 0.95
    """muon: decay of the matrices' momentum"""

    def __post_init__(self) -> None:
        for name in ("learning_rate", "muon_learning_rate", "adam_epsilon"):
            if not 0 < (value := getattr(self, name)) < math.inf:
                raise ValueError(f"optimizer.{name} must be a finite number above 0, not {value}")
        for name in ("adam_beta1", "adam_beta2", "muon_momentum"):
            if not 0 <= (value := getattr(self, name)) < 1:
                raise ValueError(f"optimizer.{name} must be from 0 to below 1, not {value}")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optimizer.weight_decay must be a finite number from 0, not {self.weight_decay}")


def check_optimizer(config: OptimizerConfig, zero_stage: int, half_precision_weights: bool) -> None:
    """Refuse what DeepSpeed might run, but not as the optimizer's paper has it.

    ZeRO gives an optimizer flat parts of parameters, half precision gives it copies without Muon's marks. AdamW treats
    every element alone, so that it is the same on them.

    Raises:
        UserError: the optimizer needs whole float32 weights, and ``ds_config`` has none.
    """
    if config.name != "adamw" and (zero_stage or half_precision_weights):
        raise UserError(
            f"optimizer {config.name} needs whole float32 weights, and ds_config "
            + (f"has ZeRO stage {zero_stage}" if zero_stage else "has bf16 or fp16 weights")
            + ": take ds_config auto or a file with stage 0 and torch_autocast, or optimizer.name adamw"
        )


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """The optimizer of ``model``'s parameters, with weight decay on matrices and embeddings only.

    Every group has a ``peak_learning_rate``, a share of which the training step sets as ``lr``. A loaded state brings
    what the optimizer has gathered and no settings: those stay the configuration's.
    """
    optimizer = _muon(model, config) if config.name == "muon" else _one_rule_for_all(model, config)
    optimizer.register_load_state_dict_pre_hook(_keep_settings)
    return optimizer


def _one_rule_for_all(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    matrices = _group([p for p in model.parameters() if p.ndim >= 2], config.learning_rate, config.weight_decay)
    vectors = _group([p for p in model.parameters() if p.ndim < 2], config.learning_rate)
    match config.name:
        case "lamb":
            return Lamb([matrices, vectors | {"layer_adaptation": False}], lr=0.0, **_adam_settings(config))
        case "adafactor":
            return torch.optim.Adafactor([matrices, vectors], lr=0.0, foreach=True)
        case _:
            return torch.optim.AdamW([matrices, vectors], lr=0.0, **_adam_settings(config), fused=True)


def _muon(model: nn.Module, config: OptimizerConfig) -> torch.optim.Optimizer:
    """Muon for the matrices between embeddings and decoder; the decoder's own is the word embeddings'."""
    from pretrain.muon import Muon  # takes seconds, which only its users should spend

    hidden, embeddings, vectors = [], [], []
    for name, parameter in model.named_parameters():
        kind = vectors if parameter.ndim < 2 else embeddings if name.startswith("embeddings.") else hidden
        kind.append(parameter)
        if name.endswith("qkv.weight"):
            parameter.muon_num_heads = 3  # query, key and value are three matrices
    muon = {"lr": 0.0, "use_muon": True, "momentum": config.muon_momentum}
    adam = {"lr": 0.0, "use_muon": False, **_adam_settings(config)}
    return Muon(
        [
            _group(hidden, config.muon_learning_rate, config.weight_decay) | muon,
            _group(embeddings, config.learning_rate, config.weight_decay) | adam,
            _group(vectors, config.learning_rate) | adam,
        ]
    )


def _group(parameters: list[nn.Parameter], peak_learning_rate: float, weight_decay: float = 0.0) -> dict[str, Any]:
    return {"params": parameters, "peak_learning_rate": peak_learning_rate, "weight_decay": weight_decay}


def _adam_settings(config: OptimizerConfig) -> dict[str, Any]:
    return {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}


def _keep_settings(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(optimizer.param_groups, state_dict["param_groups"], strict=True)
    return state_dict | {"param_groups": [{**now, "params": saved["params"]} for now, saved in pairs]}
