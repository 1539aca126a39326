"""Masking for masked language modelling, as a pure function of (seed, copy, sequence, position).

Of a sequence with n maskable tokens the k = min(max(1, round(masked_lm_prob * n)), max_predictions_per_seq) positions
with the smallest hashes are chosen; of these 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2019,
3.1). No generator state: any row of any copy can be made alone, in any order, and always comes out the same.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.hashing import below, hash_keys, mix, uniform

_POSITION_DRAW, _REPLACEMENT_DRAW, _TOKEN_DRAW = 21, 22, 23  # names of the draws, see hash_keys
_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1


@dataclass(frozen=True)
class Vocabulary:
    """What masking knows of the tokenizer."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    special: np.ndarray
    """bool, shape [vocab_size]: tokens that are neither masked nor drawn as random replacements."""


@dataclass(frozen=True)
class MaskingRule:
    """How much is masked."""

    masked_lm_prob: float
    max_predictions_per_seq: int
    seed: int


def mask_rows(
    input_ids: np.ndarray,
    sequence_index: np.ndarray,
    copy_index: np.ndarray,
    vocabulary: Vocabulary,
    rule: MaskingRule,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mask rows of token ids.

    Args:
        input_ids: unmasked rows with special tokens and padding, shape [rows, max_seq_length].
        sequence_index: number of each row's sequence in the corpus, shape [rows].
        copy_index: number of each row's copy, shape [rows].
        vocabulary: special tokens.
        rule: probability, limit and seed.

    Returns:
        The rows with the masks in place, [rows, max_seq_length]; the masked positions in rising order, 0 where unused,
        [rows, max_predictions_per_seq]; the original tokens there, 0 where unused, same shape.
    """
    hashes = _position_hashes(sequence_index, copy_index, input_ids.shape[1], rule.seed)
    positions, used = _choose_positions(input_ids, hashes, vocabulary, rule)
    labels = np.where(used, np.take_along_axis(input_ids, positions, axis=1), 0)
    replacements = _replacements(np.take_along_axis(hashes, positions, axis=1), labels, vocabulary)
    masked = input_ids.copy()
    # Unused slots point at position 0, [CLS]: write back what is there.
    first = np.broadcast_to(input_ids[:, :1], positions.shape)
    np.put_along_axis(masked, positions, np.where(used, replacements, first).astype(masked.dtype), axis=1)
    return masked, positions, labels


def _position_hashes(sequence_index: np.ndarray, copy_index: np.ndarray, length: int, seed: int) -> np.ndarray:
    """uint64, shape [rows, length]."""
    rows = hash_keys(seed, _POSITION_DRAW, copy_index, sequence_index)
    return hash_keys(rows[:, None], np.arange(length)[None, :])


def _choose_positions(
    input_ids: np.ndarray, hashes: np.ndarray, vocabulary: Vocabulary, rule: MaskingRule
) -> tuple[np.ndarray, np.ndarray]:
    """The chosen positions in rising order and which slots are used, both [rows, max_predictions_per_seq]."""
    slots = min(rule.max_predictions_per_seq, input_ids.shape[1])
    maskable = ~vocabulary.special[input_ids]
    number = np.rint(rule.masked_lm_prob * maskable.sum(axis=1)).astype(np.int64)
    number = np.clip(number, 1, slots) * maskable.any(axis=1)
    keys = np.where(maskable, hashes, np.uint64(2**64 - 1))
    smallest = np.argpartition(keys, slots - 1, axis=1)[:, :slots]
    order = np.argsort(np.take_along_axis(keys, smallest, axis=1), axis=1)
    chosen = np.take_along_axis(smallest, order, axis=1)
    used = np.arange(slots) < number[:, None]
    in_text_order = np.sort(np.where(used, chosen, input_ids.shape[1]), axis=1)
    positions = np.where(used, in_text_order, 0)
    unused_slots = ((0, 0), (0, rule.max_predictions_per_seq - slots))
    return np.pad(positions, unused_slots), np.pad(used, unused_slots)


def _replacements(hashes: np.ndarray, labels: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """What stands at each masked position, [rows, max_predictions_per_seq]."""
    ordinary = np.flatnonzero(~vocabulary.special)
    draw = uniform(mix(hashes ^ np.uint64(_REPLACEMENT_DRAW)))
    random_token = ordinary[below(mix(hashes ^ np.uint64(_TOKEN_DRAW)), len(ordinary)).astype(np.int64)]
    replaced = np.where(draw < _MASK_SHARE + _RANDOM_SHARE, random_token, labels)
    return np.where(draw < _MASK_SHARE, vocabulary.mask_id, replaced)
