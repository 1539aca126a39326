"""The sizes of a model: presets, what a configuration changes of them, and what the data decides."""

from dataclasses import dataclass
from typing import Literal

PRESETS = {  # layers, hidden size, heads, as in Devlin et al. 2019 and Turc et al. 2019; the FFN is four times as wide
    "bert-tiny": (2, 128, 2),
    "bert-mini": (4, 256, 4),
    "bert-small": (4, 512, 8),
    "bert-medium": (8, 512, 8),
    "bert-base": (12, 768, 12),
    "bert-large": (24, 1024, 16),
}
_VOCABULARY_MULTIPLE = 64  # matrix products are fastest at such sizes


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

    @property
    def num_parameters(self) -> int:
        """Of the model as exported: tied embeddings counted once, the vocabulary without padding."""
        hidden, intermediate = self.hidden_size, self.intermediate_size
        norm = 2 * hidden
        embeddings = hidden * (self.vocab_size + self.max_position_embeddings + self.type_vocab_size)
        attention = 4 * (hidden**2 + hidden)
        feed_forward = 2 * hidden * intermediate + intermediate + hidden
        layers = self.num_hidden_layers * (attention + feed_forward + 2 * norm)
        head = hidden**2 + hidden + norm + self.vocab_size
        return embeddings + layers + norm + head  # pre-LN's last LayerNorm is as large as post-LN's first


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
