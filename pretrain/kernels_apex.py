"""NVIDIA apex's LayerNorm and dense kernels in place of PyTorch's. Experimental: never run on real hardware.

``FusedDenseGeluDense`` stays unused: its GELU is the tanh approximation, that of the model and of its export is exact.
"""

import torch
from apex.fused_dense import FusedDense
from apex.normalization import FusedLayerNorm
from torch import nn

from pretrain.model import MaskedLanguageModel


class _LayerNorm(FusedLayerNorm):
    """As PyTorch's under autocast: in the precision of its weights, where apex would round what comes in."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return super().forward(hidden.to(self.weight.dtype))


class _Dense(FusedDense):
    """For any number of dimensions; apex's kernels know two."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden.flatten(0, -2)).unflatten(0, hidden.shape[:-1])


def use_apex(model: MaskedLanguageModel) -> None:
    """Swap the modules of ``model``; parameters, their names and their order stay.

    Raises:
        ImportError: apex was built without its CUDA extensions.
    """
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm):
            _swap(model, name, _LayerNorm(module.normalized_shape, module.eps))
        elif isinstance(module, nn.Linear):
            _swap(model, name, _Dense(module.in_features, module.out_features))


def _swap(model: MaskedLanguageModel, name: str, fused: nn.Module) -> None:
    plain = model.get_submodule(name)
    fused.weight, fused.bias = plain.weight, plain.bias
    model.set_submodule(name, fused)
