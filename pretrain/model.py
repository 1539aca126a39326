"""The encoder and its sparse masked language modelling head.

Pre-LN is the layout of 24hBERT and of Hugging Face's ``megatron-bert``: a LayerNorm before each sublayer and one after
the last layer, none on the embeddings. Post-LN is BERT's own. QKV is one matrix product, attention is PyTorch's scaled
dot-product attention, and the head runs on the masked positions only.

Hidden states are ``[slots, hidden]`` in a packed micro-batch and ``[sequences, length, hidden]`` in a padded one; what
differs between the two is in ``layout.py`` alone.
"""

import torch
import torch.nn.functional as F
from torch import nn

from pretrain.architecture import Architecture
from pretrain.layout import Layout, PackedLayout, PaddedLayout

_NEVER_PREDICTED = -1e4  # logit of the rows that only pad the vocabulary; exp() of it is 0 in every precision
NO_LABEL = -100


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

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        embedded = self.word(input_ids) + self.token_type.weight[0] + self.position(position_ids)
        return self.dropout(self.norm(embedded))


class Attention(nn.Module):
    """Multi-head self-attention with a fused QKV projection."""

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        size = architecture.hidden_size
        self.num_heads = architecture.num_attention_heads
        self.dropout_prob = architecture.attention_probs_dropout_prob
        self.qkv = nn.Linear(size, 3 * size)
        self.output = nn.Linear(size, size)

    def forward(self, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
        qkv = layout.to_rows(self.qkv(hidden))
        query, key, value = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout_prob if self.training else 0.0
        context = F.scaled_dot_product_attention(query, key, value, layout.attention_mask, dropout)
        return self.output(layout.from_rows(context.transpose(1, 2).flatten(2)))


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

    def forward(self, hidden: torch.Tensor, layout: Layout) -> torch.Tensor:
        if self.pre_ln:
            hidden = hidden + self.dropout(self.attention(self.attention_norm(hidden), layout))
            return hidden + self.dropout(self._feed_forward(self.output_norm(hidden)))
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, layout)))
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
        padding = torch.arange(architecture.padded_vocab_size) >= architecture.vocab_size
        self.register_buffer("padding", padding, persistent=False)

    def forward(self, hidden: torch.Tensor, word_embeddings: torch.Tensor) -> torch.Tensor:
        # Not in the parameter itself: optimizers that go by its size (Adafactor, LAMB) would take huge steps.
        bias = self.bias.masked_fill(self.padding, _NEVER_PREDICTED)
        return F.linear(self.norm(F.gelu(self.dense(hidden))), word_embeddings, bias)


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

    def encode(
        self, input_ids: torch.Tensor, sequence_length: torch.Tensor, max_seq_length: int | None = None
    ) -> torch.Tensor:
        """Hidden states of ``input_ids``, in the shape of these; arguments as in :meth:`forward`."""
        if input_ids.ndim == 2:
            layout: Layout = PaddedLayout(sequence_length, input_ids.shape[1])
        else:
            layout = PackedLayout(sequence_length, max_seq_length, len(input_ids))
        hidden = self.embeddings(input_ids, layout.position_ids)
        for layer in self.layers:
            hidden = layer(hidden, layout)
        return self.final_norm(hidden)

    def predict(self, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Logits [predictions, padded_vocab_size] at ``positions``, which count along the flattened micro-batch."""
        return self.head(hidden.reshape(-1, hidden.shape[-1])[positions], self.embeddings.word.weight)

    def forward(
        self,
        input_ids: torch.Tensor,
        sequence_length: torch.Tensor,
        masked_lm_positions: torch.Tensor,
        masked_lm_ids: torch.Tensor,
        max_seq_length: int | None = None,
        count_correct: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """The summed cross-entropy of the predictions, in nats (a scalar, in float32 or better).

        With ``count_correct`` also how many predictions are right (a scalar).

        Args:
            input_ids: int64; packed [slots], the sequences end to end and the last slot unused; padded [sequences,
                length].
            sequence_length: int64, [sequences]; 0 for one that is not there.
            masked_lm_positions: int64, [predictions], along the flattened ``input_ids``; an unused one may point
                anywhere.
            masked_lm_ids: int64, [predictions]: the original tokens, ``NO_LABEL`` where unused.
            max_seq_length: packed only: the longest that a sequence can be.
            count_correct: whether to count them.
        """
        hidden = self.encode(input_ids, sequence_length, max_seq_length)
        logits = self.predict(hidden, masked_lm_positions)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        loss_sum = F.cross_entropy(logits, masked_lm_ids, ignore_index=NO_LABEL, reduction="sum")
        if not count_correct:
            return loss_sum
        return loss_sum, (logits.argmax(dim=-1) == masked_lm_ids).sum()
