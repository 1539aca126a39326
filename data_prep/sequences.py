"""Documents to token sequences: whole sentences of one document, up to the length that the model takes."""

import re
from dataclasses import dataclass

import numpy as np
import tokenizers

from data_prep.hashing import below, hash_keys, uniform

SPECIAL_TOKENS_PER_SEQUENCE = 2  # [CLS] ... [SEP]
_SENTENCE_END = re.compile(r"(?:(?<=[.!?])|(?<=[.!?][\"')\]]))\s+(?=[\"'(\[]*[A-Z0-9])|\n+")
_SHORT_DRAW, _LENGTH_DRAW = 11, 12  # names of the draws, see hash_keys


@dataclass(frozen=True)
class SequenceRule:
    """How documents become sequences."""

    max_seq_length: int
    """Tokens, [CLS] and [SEP] counted."""
    short_seq_prob: float
    """Share of sequences that aim at a random shorter length (Devlin et al. 2019, A.2)."""
    seed: int

    @property
    def max_tokens(self) -> int:
        """Room for text, in tokens."""
        return self.max_seq_length - SPECIAL_TOKENS_PER_SEQUENCE


@dataclass(frozen=True)
class TokenizedDocuments:
    """The sequences of consecutive documents, without [CLS] and [SEP]."""

    tokens: np.ndarray
    """Token ids of all sequences, one after the other; integers, shape [num_tokens]."""
    sequence_lengths: np.ndarray
    """Tokens of each sequence; int64, shape [num_sequences]."""
    sequences_per_document: np.ndarray
    """int64, shape [num_documents]."""


def split_sentences(document: str) -> list[str]:
    """Cut at line ends, and behind . ! ? before a capital or a digit."""
    return [sentence for sentence in (part.strip() for part in _SENTENCE_END.split(document)) if sentence]


def tokenize_documents(
    documents: list[str], first_document: int, tokenizer: tokenizers.Tokenizer, rule: SequenceRule
) -> TokenizedDocuments:
    """Tokenise documents and cut each into sequences.

    ``first_document`` is the number of the first one in the whole corpus: short sequences are drawn by that number.
    """
    tokens: list[int] = []
    lengths: list[int] = []
    counts: list[int] = []
    for number, document in enumerate(documents, start=first_document):
        encodings = tokenizer.encode_batch_fast(split_sentences(document), add_special_tokens=False)
        sentences = [encoding.ids for encoding in encodings]
        sentence_lengths = [len(ids) for ids in sentences]
        bound = len(sentences) + sum(sentence_lengths) // rule.max_tokens + 1
        targets = target_lengths(number, bound, rule)
        document_lengths = cut_at_sentences(sentence_lengths, targets.tolist(), rule.max_tokens)
        for ids in sentences:
            tokens.extend(ids)
        lengths.extend(document_lengths)
        counts.append(len(document_lengths))
    return TokenizedDocuments(
        tokens=np.array(tokens, dtype=token_dtype(tokenizer.get_vocab_size())),
        sequence_lengths=np.array(lengths, dtype=np.int64),
        sequences_per_document=np.array(counts, dtype=np.int64),
    )


def token_dtype(vocab_size: int) -> type[np.unsignedinteger]:
    """The smallest type that holds every token id."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def target_lengths(document: int, count: int, rule: SequenceRule) -> np.ndarray:
    """The lengths that a document's first ``count`` sequences aim at: all the room, or seldom a random shorter one."""
    index = np.arange(count)
    short = uniform(hash_keys(rule.seed, _SHORT_DRAW, document, index)) < rule.short_seq_prob
    random_length = 2 + below(hash_keys(rule.seed, _LENGTH_DRAW, document, index), rule.max_tokens - 1)
    return np.where(short, random_length.astype(np.int64), rule.max_tokens)


def cut_at_sentences(sentence_lengths: list[int], targets: list[int], max_tokens: int) -> list[int]:
    """Lengths of the consecutive sequences that a document's sentences make.

    A sequence ends at the sentence that would carry it past its target. A sentence longer than ``max_tokens`` is cut
    into full sequences; what remains of it goes on with the next sentence.
    """
    lengths: list[int] = []
    current = 0
    for sentence in sentence_lengths:
        if current and current + sentence > targets[len(lengths)]:
            lengths.append(current)
            current = 0
        full, rest = divmod(sentence, max_tokens)
        if full and current + sentence > max_tokens:
            lengths.extend([max_tokens] * full)
            current = rest
        else:
            current += sentence
    if current:
        lengths.append(current)
    return lengths
