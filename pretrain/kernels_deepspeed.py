"""DeepSpeed's transformer kernel in place of the encoder's layers. Experimental: never run on real hardware.

The kernel wants rows of their own for all sequences, so it computes padding, too, and its GELU is the tanh
approximation, at most 5e-4 from the exact one that an exported model has. It draws dropout from a generator of its own,
which no step seeds: a resumed run is not the uninterrupted one bit by bit.
"""

from typing import Any

import torch
from deepspeed.ops.transformer import transformer
from torch import nn
from torch.func import functional_call

from common.errors import UserError
from pretrain.architecture import Architecture
from pretrain.layout import Layout
from pretrain.model import Layer, MaskedLanguageModel

_MASKED = -1e4  # is added to attention scores; exp() of it is 0 in every precision


def use_deepspeed(
    model: MaskedLanguageModel, sequences: int, autocast_dtype: torch.dtype | None, dropout_seed: int
) -> None:
    """Have the layers of ``model`` compute with the kernel on their own parameters.

    Args:
        model: on a GPU.
        sequences: at most, in a micro-batch.
        autocast_dtype: of matrix products, None for that of the weights.
        dropout_seed: of this process.

    Raises:
        UserError: the kernel can't be built.
    """
    _build()
    dtype = autocast_dtype or model.head.bias.dtype
    settings = _settings(model.architecture) | {
        "batch_size": sequences,
        "seed": dropout_seed % 2**31,
        "fp16": dtype == torch.float16,
    }
    for layer in model.layers:
        kernel = transformer.DeepSpeedTransformerLayer(transformer.DeepSpeedTransformerConfig(**settings))
        _use_kernel(layer, kernel.to("meta"), dtype)  # it gets the layer's weights with every call and needs none


def _build() -> None:
    try:
        transformer.TransformerBuilder().load()
    except Exception as error:  # DeepSpeed, CUDA and compilers fail in ways of their own
        what = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(
            f"kernels deepspeed: DeepSpeed's transformer kernel can't be built here ({what[0]}): take kernels auto"
        ) from error


def _settings(architecture: Architecture) -> dict[str, Any]:
    return {
        "hidden_size": architecture.hidden_size,
        "intermediate_size": architecture.intermediate_size,
        "heads": architecture.num_attention_heads,
        "attn_dropout_ratio": architecture.attention_probs_dropout_prob,
        "hidden_dropout_ratio": architecture.hidden_dropout_prob,
        "num_hidden_layers": architecture.num_hidden_layers,
        "initializer_range": architecture.initializer_range,
        "layer_norm_eps": architecture.layer_norm_eps,
        "pre_layer_norm": architecture.layer_norm == "pre_ln",
    }


def _use_kernel(layer: Layer, kernel: nn.Module, dtype: torch.dtype) -> None:
    def forward(hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
        kernel.train(layer.training)
        weights = {name: parameter.to(dtype) for name, parameter in _weights(layer).items()}
        rows = layout.to_rows(hidden.to(dtype))
        mask = torch.where(layout.attention_mask, 0.0, _MASKED).to(dtype)
        return layout.from_rows(functional_call(kernel, weights, (rows, mask), strict=True))

    layer.forward = forward


def _weights(layer: Layer) -> dict[str, nn.Parameter]:
    """The layer's parameters by the kernel's names: ``attn_n`` is the LayerNorm between attention and feed-forward,
    ``norm`` the one at the layer's beginning (pre-LN) or end (post-LN)."""
    norms = (layer.attention_norm, layer.output_norm)
    edge, between = norms if layer.pre_ln else reversed(norms)
    modules = {
        "attn_qkv": layer.attention.qkv,
        "attn_o": layer.attention.output,
        "attn_n": between,
        "inter_": layer.intermediate,
        "output_": layer.output,
        "norm_": edge,
    }
    weights = {f"{prefix}w": module.weight for prefix, module in modules.items()}
    return weights | {f"{prefix}b": module.bias for prefix, module in modules.items()}
