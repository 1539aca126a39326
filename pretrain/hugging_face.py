"""Our model and Hugging Face's are the same one under other names: one table of names, used in both directions.

Pre-LN is exactly ``megatron-bert``, post-LN ``bert``. Inside, the vocabulary is padded with rows that are never
predicted: they are cut off on the way out, and on the way in they stay as a new model has them.
"""

import re
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    MegatronBertConfig,
    MegatronBertForMaskedLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from common.errors import UserError
from pretrain.architecture import Architecture
from pretrain.model import MaskedLanguageModel

CONFIG_CLASSES: dict[str, type[PreTrainedConfig]] = {"pre_ln": MegatronBertConfig, "post_ln": BertConfig}
MODEL_CLASSES: dict[str, type[PreTrainedModel]] = {"pre_ln": MegatronBertForMaskedLM, "post_ln": BertForMaskedLM}
LAYER_NORMS = {config_class.model_type: layer_norm for layer_norm, config_class in CONFIG_CLASSES.items()}

_SAME_NAMES = (
    "vocab_size num_hidden_layers hidden_size num_attention_heads intermediate_size hidden_dropout_prob "
    "attention_probs_dropout_prob max_position_embeddings layer_norm_eps initializer_range pad_token_id type_vocab_size"
).split()

# Our modules and theirs; * is the layer's number. Several of theirs lie one below the other in ours.
_LAYER = "bert.encoder.layer.*"
_MODULES = {
    "embeddings.word": ["bert.embeddings.word_embeddings"],
    "embeddings.position": ["bert.embeddings.position_embeddings"],
    "embeddings.token_type": ["bert.embeddings.token_type_embeddings"],
    "layers.*.attention.qkv": [f"{_LAYER}.attention.self.{part}" for part in ("query", "key", "value")],
    "layers.*.attention.output": [f"{_LAYER}.attention.output.dense"],
    "layers.*.intermediate": [f"{_LAYER}.intermediate.dense"],
    "layers.*.output": [f"{_LAYER}.output.dense"],
    "head.dense": ["cls.predictions.transform.dense"],
    "head.norm": ["cls.predictions.transform.LayerNorm"],
    "head": ["cls.predictions.decoder"],
}
_NORMS = {
    "pre_ln": {
        "layers.*.attention_norm": [f"{_LAYER}.attention.ln"],
        "layers.*.output_norm": [f"{_LAYER}.ln"],
        "final_norm": ["bert.encoder.ln"],
    },
    "post_ln": {
        "embeddings.norm": ["bert.embeddings.LayerNorm"],
        "layers.*.attention_norm": [f"{_LAYER}.attention.output.LayerNorm"],
        "layers.*.output_norm": [f"{_LAYER}.output.LayerNorm"],
    },
}
_TIED = {  # names under which Hugging Face has the same tensor once more
    "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
    "cls.predictions.bias": "cls.predictions.decoder.bias",
}
_OF_VOCABULARY = ("embeddings.word.weight", "head.bias")
_PARITY_TOLERANCE = 1e-4  # of the largest logit; float32 rounding is two orders smaller


def hugging_face_names(name: str, layer_norm: str) -> list[str]:
    """Hugging Face's names for our parameter ``name``: of one tensor, or of several that ours holds in this order."""
    module, kind = name.rsplit(".", 1)
    number = "".join(re.findall(r"\d+", module))
    theirs = (_MODULES | _NORMS[layer_norm])[re.sub(r"\d+", "*", module)]
    return [f"{their_module.replace('*', number)}.{kind}" for their_module in theirs]


def to_hugging_face(model: MaskedLanguageModel) -> PreTrainedModel:
    """The same model as ``MegatronBertForMaskedLM`` or ``BertForMaskedLM``, in evaluation mode."""
    architecture = model.architecture
    exported = MODEL_CLASSES[architecture.layer_norm](hugging_face_config(architecture)).to(model.head.bias.dtype)
    weights = {}
    for name, tensor in model.state_dict().items():
        names = hugging_face_names(name, architecture.layer_norm)
        rows = _rows(name, tensor, architecture)
        weights.update(zip(names, tensor[:rows].chunk(len(names)), strict=True))
    exported.load_state_dict(weights | {copy: weights[original] for copy, original in _TIED.items()})
    return exported.eval()


def from_hugging_face(reference: PreTrainedModel, architecture: Architecture) -> MaskedLanguageModel:
    """The same model as ours, on the CPU, in the precision of ``reference`` and in evaluation mode.

    Args:
        reference: a ``MegatronBertForMaskedLM`` or ``BertForMaskedLM`` with a decoder tied to its embeddings.
        architecture: of ``reference``, see :func:`architecture_of`; only the dropouts may be others.
    """
    theirs = reference.state_dict()
    model = MaskedLanguageModel(architecture).to(reference.dtype)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            parts = [theirs[their_name] for their_name in hugging_face_names(name, architecture.layer_norm)]
            tensor[: _rows(name, tensor, architecture)].copy_(torch.cat(parts))
    return model.eval()


def _rows(name: str, tensor: torch.Tensor, architecture: Architecture) -> int:
    """How many rows of our parameter Hugging Face has: all, but for those that pad the vocabulary."""
    return architecture.vocab_size if name in _OF_VOCABULARY else len(tensor)


def hugging_face_config(architecture: Architecture) -> PreTrainedConfig:
    """The architecture in Hugging Face's words."""
    same: dict[str, Any] = {name: getattr(architecture, name) for name in _SAME_NAMES}
    return CONFIG_CLASSES[architecture.layer_norm](hidden_act="gelu", **same)


def architecture_of(config: PreTrainedConfig) -> Architecture:
    """The architecture that a configuration of type ``bert`` or ``megatron-bert`` describes."""
    return Architecture(
        layer_norm=LAYER_NORMS[config.model_type], **{name: getattr(config, name) for name in _SAME_NAMES}
    )


@torch.no_grad()
def check_parity(model: MaskedLanguageModel, reference: PreTrainedModel) -> None:
    """Compare the logits of two models on the CPU, both in evaluation mode, on random tokens, one row of them padded.

    Raises:
        RuntimeError: they differ, which is a bug.
    """
    architecture = model.architecture
    length = min(architecture.max_position_embeddings, 32)
    generator = torch.Generator().manual_seed(0)
    input_ids = torch.randint(1, architecture.vocab_size, (2, length), generator=generator)
    sequence_length = torch.tensor([length, length - length // 2])
    real = torch.arange(length) < sequence_length[:, None]
    input_ids[~real] = architecture.pad_token_id
    hidden = model.encode(input_ids, sequence_length)
    ours = model.predict(hidden, real.flatten().nonzero().squeeze(1))[:, : architecture.vocab_size]
    theirs = reference(input_ids=input_ids, attention_mask=real.long()).logits[real]
    difference = (ours - theirs).abs().max() / ours.abs().max().clamp_min(1.0)
    if not difference < _PARITY_TOLERANCE:
        raise RuntimeError(f"our logits differ from those of {type(reference).__name__} by {difference:.1e}")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer whose files are in ``folder``.

    Raises:
        UserError: they are damaged.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(f"the tokenizer in {folder} does not load ({first_line(error)})") from None


def first_line(error: Exception) -> str:
    """What an error of another library says, as part of a line of ours."""
    return str(error).strip().split("\n", 1)[0]
