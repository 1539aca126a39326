"""The encoder and its sparse masked language modelling head.

Pre-LN is the layout of 24hBERT and of Hugging Face's ``megatron-bert``: a LayerNorm before each sublayer and one after
the last layer, none on the embeddings. Post-LN is BERT's own. QKV is one matrix product, attention is PyTorch's scaled
dot-product attention, and the head runs on the masked positions only.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

PRESETS = {  # layers, hidden size, heads, as in Devlin et al. 2019 and Turc et al. 2019; the FFN is four times as wide
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}
_VOCABULARY_MULTIPLE = 64  # matrix products are fastest at such sizes
_NEVER_PREDICTED = -1e4  # bias of the rows that only pad the vocabulary; exp() of it is 0 in every precision
NO_LABEL = -100


@dataclass(frozen=True)
class ModelConfig:
    """The architecture: a preset, any part of which can be set. Vocabulary and length come from the data."""

    preset: Literal["bert-tiny", "bert-mini", "bert-small", "bert-medium", "bert-base", "bert-large"] = "bert-large"
    """sizes to start from"""
    layer_norm: Literal["pre_ln", "post_ln"] = "pre_ln"
    """pre_ln as in 24hBERT, or post_ln, BERT's own"""
    num_hidden_layers: int | None = None
    """default: the preset's"""
    hidden_size: int | None = None
    """default: the preset's"""
    num_attention_heads: int | None = None
    """default: the preset's"""
    intermediate_size: int | None = None
    """width of the feed-forward layers; default: four times hidden_size"""
    hidden_dropout_prob: float = 0.1
    """dropout on embeddings and sublayers"""
    attention_probs_dropout_prob: float = 0.1
    """dropout on attention weights"""
    max_position_embeddings: int | None = None
    """longest sequence the model can ever take; default: the data's max_seq_length, all that it is trained for"""
    layer_norm_eps: float = 1e-12
    """added to the variance"""
    initializer_range: float = 0.02
    """standard deviation of the normal distribution that weights start from; biases start at zero"""

    def __post_init__(self) -> None:
        sizes = "num_hidden_layers hidden_size num_attention_heads intermediate_size max_position_embeddings".split()
        for name in sizes:
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"model.{name} must be at least 1, not {value}")
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"model.{name} must be from 0 to below 1, not {getattr(self, name)}")
        if self.layer_norm_eps <= 0 or self.initializer_range <= 0:
            raise ValueError("model.layer_norm_eps and model.initializer_range must be above 0")


@dataclass(frozen=True)
class Architecture:
    """All numbers of a model, resolved."""

    layer_norm: str
    num_hidden_layers: int
    hidden_size: int
    num_attention_heads: int
    intermediate_size: int
    hidden_dropout_prob: float
    attention_probs_dropout_prob: float
    max_position_embeddings: int
    layer_norm_eps: float
    initializer_range: float
    vocab_size: int
    pad_token_id: int
    type_vocab_size: int = 2

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding matrix inside training; export cuts the padding off."""
        return -(-self.vocab_size // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE


def resolve(config: ModelConfig, vocab_size: int, max_seq_length: int, pad_token_id: int) -> Architecture:
    """Fill a configuration up with its preset and with what the data says.

    Raises:
        ValueError: the sizes contradict each other.
    """
    layers, preset_hidden, heads = PRESETS[config.preset]
    hidden = preset_hidden if config.hidden_size is None else config.hidden_size
    architecture = Architecture(
        layer_norm=config.layer_norm,
        num_hidden_layers=layers if config.num_hidden_layers is None else config.num_hidden_layers,
        hidden_size=hidden,
        num_attention_heads=heads if config.num_attention_heads is None else config.num_attention_heads,
        intermediate_size=4 * hidden if config.intermediate_size is None else config.intermediate_size,
        hidden_dropout_prob=config.hidden_dropout_prob,
        attention_probs_dropout_prob=config.attention_probs_dropout_prob,
        max_position_embeddings=config.max_position_embeddings or max_seq_length,
        layer_norm_eps=config.layer_norm_eps,
        initializer_range=config.initializer_range,
        vocab_size=vocab_size,
        pad_token_id=pad_token_id,
    )
    if hidden % architecture.num_attention_heads:
        raise ValueError(
            f"hidden_size {hidden} is not divisible by num_attention_heads {architecture.num_attention_heads}"
        )
    if max_seq_length > architecture.max_position_embeddings:
        raise ValueError(
            f"the data's max_seq_length {max_seq_length} is over max_position_embeddings "
            f"{architecture.max_position_embeddings}"
        )
    return architecture


class Embeddings(nn.Module):
    """Word, position and token type embeddings; training uses token type 0 alone."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        size = architecture.hidden_size
        self.word = nn.Embedding(architecture.padded_vocab_size, size, padding_idx=architecture.pad_token_id)
        self.position = nn.Embedding(architecture.max_position_embeddings, size)
        self.token_type = nn.Embedding(architecture.type_vocab_size, size)
        post_ln = architecture.layer_norm == "post_ln"
        self.norm = nn.LayerNorm(size, architecture.layer_norm_eps) if post_ln else nn.Identity()
        self.dropout = nn.Dropout(architecture.hidden_dropout_prob)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        position = self.position.weight[: input_ids.shape[1]]
        return self.dropout(self.norm(self.word(input_ids) + self.token_type.weight[0] + position))


class Attention(nn.Module):
    """Multi-head self-attention with a fused QKV projection."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        size = architecture.hidden_size
        self.num_heads = architecture.num_attention_heads
        self.dropout_prob = architecture.attention_probs_dropout_prob
        self.qkv = nn.Linear(size, 3 * size)
        self.output = nn.Linear(size, size)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        batch, length, size = hidden.shape
        qkv = self.qkv(hidden).view(batch, length, 3, self.num_heads, size // self.num_heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        dropout = self.dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return self.output(context.transpose(1, 2).reshape(batch, length, size))


class Layer(nn.Module):
    """One encoder layer: attention and feed-forward, each with its residual."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        size, eps = architecture.hidden_size, architecture.layer_norm_eps
        self.pre_ln = architecture.layer_norm == "pre_ln"
        self.attention = Attention(architecture)
        self.attention_norm = nn.LayerNorm(size, eps)
        self.intermediate = nn.Linear(size, architecture.intermediate_size)
        self.output = nn.Linear(architecture.intermediate_size, size)
        self.output_norm = nn.LayerNorm(size, eps)
        self.dropout = nn.Dropout(architecture.hidden_dropout_prob)

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        if self.pre_ln:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), mask))
            return hidden + self.dropout(self._feed_forward(self.output_norm(hidden)))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, mask)))
        return self.output_norm(hidden + self.dropout(self._feed_forward(hidden)))

    def _feed_forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.output(F.gelu(self.intermediate(hidden)))


class MaskedLMHead(nn.Module):
    """Transform and decoder; the decoder's matrix is the word embeddings'."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.dense = nn.Linear(architecture.hidden_size, architecture.hidden_size)
        self.norm = nn.LayerNorm(architecture.hidden_size, architecture.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(architecture.padded_vocab_size))

    def forward(self, hidden: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embeddings, self.bias)


class MaskedLanguageModel(nn.Module):
    """The model as it is trained."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        self.architecture = architecture
        self.embeddings = Embeddings(architecture)
        self.layers = nn.ModuleList(Layer(architecture) for _ in range(architecture.num_hidden_layers))
        pre_ln = architecture.layer_norm == "pre_ln"
        size, eps = architecture.hidden_size, architecture.layer_norm_eps
        self.final_norm = nn.LayerNorm(size, eps) if pre_ln else nn.Identity()
        self.head = MaskedLMHead(architecture)
        self._initialize()

    @torch.no_grad()
    def _initialize(self) -> None:
        """Normal weights, zero biases, and nothing for [PAD] and for the rows that pad the vocabulary."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                module.weight.normal_(std=self.architecture.initializer_range)
            if isinstance(module, nn.Linear):
                module.bias.zero_()
        self.embeddings.word.weight[self.architecture.pad_token_id].zero_()
        self.embeddings.word.weight[self.architecture.vocab_size :].zero_()
        self.head.bias[self.architecture.vocab_size :] = _NEVER_PREDICTED

    def encode(self, input_ids: torch.Tensor, sequence_length: torch.Tensor) -> torch.Tensor:
        """Hidden states [batch, length, hidden] of rows [batch, length]; ``sequence_length`` [batch] tells padding."""
        column = torch.arange(input_ids.shape[1], device=input_ids.device)
        mask = (column < sequence_length[:, None])[:, None, None, :]
        hidden = self.embeddings(input_ids)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.final_norm(hidden)

    def predict(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [predictions, padded_vocab_size] at ``positions``, which count along the flattened batch."""
        return self.head(hidden.flatten(0, 1)[positions], self.embeddings.word.weight)

    def forward(
        self,
        input_ids: torch.Tensor,
        sequence_length: torch.Tensor,
        masked_lm_positions: torch.Tensor,
        masked_lm_ids: torch.Tensor,
    ) -> torch.Tensor:
        """The summed cross-entropy of the predictions, in nats (a float32 scalar).

        Args:
            input_ids: int64, [batch, length].
            sequence_length: int64, [batch].
            masked_lm_positions: int64, [predictions], along the flattened batch; unused ones may point anywhere.
            masked_lm_ids: int64, [predictions]: the original tokens, ``NO_LABEL`` where unused.
        """
        logits = self.predict(self.encode(input_ids, sequence_length), masked_lm_positions)
        return F.cross_entropy(logits.float(), masked_lm_ids, ignore_index=NO_LABEL, reduction="sum")
