"""Which kernels run the model's operations; weights and checkpoints are the same with all of them."""

from typing import Literal

import torch

from pretrain.model import MaskedLanguageModel

Kernels = Literal["auto", "eager", "compile"]


def apply_kernels(model: MaskedLanguageModel, kernels: Kernels, device: torch.device) -> str:
    """Have ``model`` run on ``kernels`` from now on; returns which ones these are."""
    if kernels == "auto":
        kernels = "compile" if device.type == "cuda" else "eager"
    if kernels == "compile":
        model.compile()
    return kernels
