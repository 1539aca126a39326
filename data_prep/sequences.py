"""Documents to token sequences: whole sentences of one document, up to the length that the model takes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from data_prep.encoding import SentenceEncoder
from data_prep.hashing import below, hash_keys, uniform

SPECIAL_TOKENS_PER_SEQUENCE = 2  # [CLS] ... [SEP]
_SENTENCES_AT_ONCE = 20_000
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
    """Token ids of all sequences, one after the other; uint16 or uint32, shape [num_tokens]."""
    sequence_lengths: np.ndarray
    """Tokens of each sequence; int64, shape [num_sequences]."""
    sequences_per_document: np.ndarray
    """int64, shape [num_documents]."""


def tokenize_documents(
    documents: list[str],
    document_keys: np.ndarray,
    split_sentences: Callable[[str], list[str]],
    encoder: SentenceEncoder,
    rule: SequenceRule,
) -> TokenizedDocuments:
    """Tokenise documents and cut each into sequences.

    ``document_keys`` (uint64, [num_documents]) tell documents apart: their short sequences are drawn by them.
    """
    sentences = [split_sentences(document) for document in documents]
    num_sentences = np.array([len(of_document) for of_document in sentences], dtype=np.int64)
    flat = [sentence for of_document in sentences for sentence in of_document]
    groups = [flat[start : start + _SENTENCES_AT_ONCE] for start in range(0, len(flat), _SENTENCES_AT_ONCE)]
    tokens, sentence_lengths = zip(*map(encoder.encode, groups or [[]]), strict=True)
    lengths, counts = _cut_documents(np.concatenate(sentence_lengths), num_sentences, document_keys, rule)
    return TokenizedDocuments(np.concatenate(tokens), lengths, counts)


def _cut_documents(
    sentence_lengths: np.ndarray, num_sentences: np.ndarray, document_keys: np.ndarray, rule: SequenceRule
) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of all sequences, and how many each document has; both int64."""
    ends = np.cumsum(num_sentences)
    tokens_before = np.append(0, np.cumsum(sentence_lengths))
    num_tokens = tokens_before[ends] - tokens_before[ends - num_sentences]
    # About as many sequences as a document can make: its sentences, and a few more of those that are too long.
    bounds = num_sentences + num_tokens // rule.max_tokens + 1
    index = np.arange(bounds.sum()) - np.repeat(np.cumsum(bounds) - bounds, bounds)
    targets = target_lengths(np.repeat(document_keys, bounds), index, rule)
    per_document = [
        cut_at_sentences(of_document, of_targets, rule.max_tokens)
        for of_document, of_targets in zip(_runs(sentence_lengths, num_sentences), _runs(targets, bounds), strict=True)
    ]
    lengths = [length for sequences in per_document for length in sequences]
    return np.array(lengths, dtype=np.int64), np.array([len(sequences) for sequences in per_document], dtype=np.int64)


def _runs(values: np.ndarray, counts: np.ndarray) -> Iterator[list[int]]:
    """Consecutive runs of ``values``, as long as ``counts`` says."""
    flat, ends = values.tolist(), np.cumsum(counts).tolist()
    return (flat[start:end] for start, end in zip([0, *ends], ends, strict=False))


def target_lengths(document_keys: np.ndarray, index: np.ndarray, rule: SequenceRule) -> np.ndarray:
    """The lengths that a document's sequences number ``index`` aim at: all the room, or seldom a random shorter one."""
    short = uniform(hash_keys(rule.seed, _SHORT_DRAW, document_keys, index)) < rule.short_seq_prob
    random_length = 2 + below(hash_keys(rule.seed, _LENGTH_DRAW, document_keys, index), rule.max_tokens - 1)
    return np.where(short, random_length.astype(np.int64), rule.max_tokens)


def cut_at_sentences(sentence_lengths: list[int], targets: list[int], max_tokens: int) -> list[int]:
    """Lengths of the consecutive sequences that a document's sentences make.

    A sequence ends at the sentence that would carry it past its target. A sentence longer than ``max_tokens`` is cut
    at the targets; what remains of it goes on with the next sentence. Targets that run out begin again.
    """
    lengths: list[int] = []
    current = 0
    for sentence in sentence_lengths:
        if current and current + sentence > targets[len(lengths) % len(targets)]:
            lengths.append(current)
            current = 0
        while sentence > max_tokens:
            lengths.append(targets[len(lengths) % len(targets)])
            sentence -= lengths[-1]
        current += sentence
    if current:
        lengths.append(current)
    return lengths


def padding_share(num_tokens: int, num_sequences: int, max_seq_length: int) -> float:
    """Share of a row's positions that is neither text nor [CLS] nor [SEP]."""
    return 1 - (num_tokens + SPECIAL_TOKENS_PER_SEQUENCE * num_sequences) / (num_sequences * max_seq_length)
