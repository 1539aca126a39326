"""A trained model as a Hugging Face folder that loads anywhere, without remote code.

Pre-LN is exactly ``megatron-bert``, post-LN ``bert``. The rows that pad the vocabulary are cut off, and the export ends
with a comparison of logits.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import BertConfig, BertForMaskedLM, MegatronBertConfig, MegatronBertForMaskedLM, PreTrainedModel

from common.folders import atomic_path, write_json
from data_prep.shards import Manifest
from pretrain.architecture import Architecture
from pretrain.model import MaskedLanguageModel

PRETRAINING_FILE = "pretraining.json"
_PARITY_TOLERANCE = 1e-4  # of the largest logit; float32 rounding is two orders smaller


def export(model: MaskedLanguageModel, manifest: Manifest, folder: Path, pretraining: dict[str, Any]) -> None:
    """Write a model folder, whole or not at all; ``pretraining`` (budget, losses, curves) goes into it as JSON.

    Raises:
        RuntimeError: the exported model's logits differ from the trained model's, which is a bug.
    """
    trained = MaskedLanguageModel(model.architecture)
    trained.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in model.state_dict().items()})
    exported = to_hugging_face(trained)
    _check_parity(trained, exported)
    transformers.utils.logging.disable_progress_bar()
    with atomic_path(folder) as temporary:
        exported.save_pretrained(temporary)
        shutil.copytree(manifest.tokenizer_folder, temporary, dirs_exist_ok=True)
        write_json(temporary / PRETRAINING_FILE, pretraining)


def to_hugging_face(model: MaskedLanguageModel) -> PreTrainedModel:
    """The same model as ``MegatronBertForMaskedLM`` or ``BertForMaskedLM``, in evaluation mode."""
    architecture = model.architecture
    pre_ln = architecture.layer_norm == "pre_ln"
    config = hugging_face_config(architecture)
    exported = (MegatronBertForMaskedLM if pre_ln else BertForMaskedLM)(config).to(model.head.bias.dtype)
    exported.load_state_dict(_hugging_face_weights(model, "megatron-bert" if pre_ln else "bert"))
    return exported.eval()


def hugging_face_config(architecture: Architecture) -> BertConfig | MegatronBertConfig:
    """The architecture in Hugging Face's words."""
    config_class = MegatronBertConfig if architecture.layer_norm == "pre_ln" else BertConfig
    same_names = (
        "vocab_size num_hidden_layers hidden_size num_attention_heads intermediate_size hidden_dropout_prob "
        "attention_probs_dropout_prob max_position_embeddings layer_norm_eps initializer_range pad_token_id "
        "type_vocab_size"
    )
    return config_class(hidden_act="gelu", **{name: getattr(architecture, name) for name in same_names.split()})


def _hugging_face_weights(model: MaskedLanguageModel, model_type: str) -> dict[str, torch.Tensor]:
    vocab_size = model.architecture.vocab_size
    word_embeddings = model.embeddings.word.weight[:vocab_size]
    bias = model.head.bias[:vocab_size]
    weights = {
        "bert.embeddings.word_embeddings.weight": word_embeddings,
        "bert.embeddings.position_embeddings.weight": model.embeddings.position.weight,
        "bert.embeddings.token_type_embeddings.weight": model.embeddings.token_type.weight,
        **_module("cls.predictions.transform.dense", model.head.dense),
        **_module("cls.predictions.transform.LayerNorm", model.head.norm),
        "cls.predictions.decoder.weight": word_embeddings,
        "cls.predictions.decoder.bias": bias,
        "cls.predictions.bias": bias,
    }
    if model_type == "megatron-bert":
        weights.update(_module("bert.encoder.ln", model.final_norm))
        attention_norm, output_norm = "attention.ln", "ln"
    else:
        weights.update(_module("bert.embeddings.LayerNorm", model.embeddings.norm))
        attention_norm, output_norm = "attention.output.LayerNorm", "output.LayerNorm"
    for index, layer in enumerate(model.layers):
        prefix = f"bert.encoder.layer.{index}"
        qkv = zip(layer.attention.qkv.weight.chunk(3), layer.attention.qkv.bias.chunk(3), strict=True)
        for name, (weight, layer_bias) in zip(("query", "key", "value"), qkv, strict=True):
            weights[f"{prefix}.attention.self.{name}.weight"] = weight
            weights[f"{prefix}.attention.self.{name}.bias"] = layer_bias
        weights.update(_module(f"{prefix}.attention.output.dense", layer.attention.output))
        weights.update(_module(f"{prefix}.{attention_norm}", layer.attention_norm))
        weights.update(_module(f"{prefix}.intermediate.dense", layer.intermediate))
        weights.update(_module(f"{prefix}.output.dense", layer.output))
        weights.update(_module(f"{prefix}.{output_norm}", layer.output_norm))
    return {name: tensor.detach() for name, tensor in weights.items()}


def _module(name: str, module: nn.Module) -> dict[str, torch.Tensor]:
    return {f"{name}.weight": module.weight, f"{name}.bias": module.bias}


@torch.no_grad()
def _check_parity(trained: MaskedLanguageModel, exported: PreTrainedModel) -> None:
    """Compare logits on random tokens, one row of them padded."""
    architecture = trained.architecture
    length = min(architecture.max_position_embeddings, 32)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, architecture.vocab_size, (2, length), generator=generator)
    sequence_length = torch.tensor([length, length // 2])
    real = torch.arange(length) < sequence_length[:, None]
    input_ids[~real] = architecture.pad_token_id
    trained.eval()
    hidden = trained.encode(input_ids, sequence_length)
    ours = trained.predict(hidden, real.flatten().nonzero().squeeze(1))[:, : architecture.vocab_size]
    theirs = exported(input_ids=input_ids, attention_mask=real.long()).logits[real]
    difference = (ours - theirs).abs().max() / ours.abs().max().clamp_min(1.0)
    if not difference < _PARITY_TOLERANCE:
        raise RuntimeError(f"the exported model's logits differ from the trained model's by {difference:.1e}")
