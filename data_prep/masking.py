"""Masking for masked language modelling, as a pure function of (seed, copy, sequence, position).

Of a sequence with n maskable tokens the k = min(max(1, round(masked_lm_prob * n)), max_predictions_per_seq) positions
with the smallest hashes are chosen; of these 80 % become [MASK], 10 % a random token, 10 % stay (Devlin et al. 2019,
3.1). With whole words, words are taken in the order of their first tokens' hashes as long as they fit into k (Devlin's
later code). No generator state: any row of any copy can be made alone, in any order, and always comes out the same.
"""

from dataclasses import dataclass

import numpy as np

from data_prep.hashing import hash_keys

_POSITION_DRAW = 21  # name of the draw, see hash_keys
_REPLACEMENT_DRAW, _TOKEN_DRAW = np.uint32(0x2545F491), np.uint32(0x9E3779B1)
_MASK_SHARE, _RANDOM_SHARE = 0.8, 0.1
_LAST = np.uint32(2**32 - 1)


@dataclass(frozen=True)
class Vocabulary:
    """What masking knows of the tokenizer."""

    cls_id: int
    sep_id: int
    pad_id: int
    mask_id: int
    special: np.ndarray
    """bool, shape [vocab_size]: tokens that are neither masked nor drawn as random replacements."""
    continues_word: np.ndarray
    """bool, shape [vocab_size]: tokens that go on with the word of the token before."""


@dataclass(frozen=True)
class MaskingRule:
    """How much is masked."""

    masked_lm_prob: tuple[float, ...]
    """For each copy."""
    max_predictions_per_seq: int
    whole_words: bool
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
        vocabulary: special tokens and word parts.
        rule: probabilities, limit, unit and seed.

    Returns:
        The rows with the masks in place, [rows, max_seq_length]; the masked positions in rising order, 0 where unused,
        [rows, max_predictions_per_seq]; the original tokens there, 0 where unused, same shape.
    """
    hashes = _position_hashes(sequence_index, copy_index, input_ids.shape[1], rule.seed)
    maskable = ~vocabulary.special[input_ids]
    number = _number_to_predict(maskable.sum(axis=1), copy_index, rule)
    if rule.whole_words:
        chosen = _choose_words(hashes, maskable, vocabulary.continues_word[input_ids], number)
    else:
        chosen = _choose_tokens(hashes, maskable, number)
    row, position = np.nonzero(chosen)
    slot = np.arange(len(row)) - np.searchsorted(row, np.arange(len(input_ids)))[row]
    original = input_ids[row, position]
    masked = input_ids.copy()
    masked[row, position] = _replacements(hashes[row, position], original, vocabulary)
    positions, labels = np.zeros((2, len(input_ids), rule.max_predictions_per_seq), dtype=np.int64)
    positions[row, slot], labels[row, slot] = position, original
    return masked, positions, labels


def _position_hashes(sequence_index: np.ndarray, copy_index: np.ndarray, length: int, seed: int) -> np.ndarray:
    """uint32, shape [rows, length]."""
    rows = hash_keys(seed, _POSITION_DRAW, copy_index, sequence_index) >> np.uint64(32)
    return _mix32(rows.astype(np.uint32)[:, None] ^ _mix32(np.arange(length, dtype=np.uint32) + np.uint32(1))[None, :])


def _mix32(value: np.ndarray) -> np.ndarray:
    """A bijection of uint32 whose output bits look random (Wellons, "hash-prospector", lowbias32)."""
    value = value ^ (value >> np.uint32(16))
    value *= np.uint32(0x7FEB352D)
    value ^= value >> np.uint32(15)
    value *= np.uint32(0x846CA68B)
    value ^= value >> np.uint32(16)
    return value


def _number_to_predict(num_maskable: np.ndarray, copy_index: np.ndarray, rule: MaskingRule) -> np.ndarray:
    """int64, shape [rows]."""
    share = np.array(rule.masked_lm_prob)[copy_index]
    number = np.clip(np.rint(share * num_maskable).astype(np.int64), 1, rule.max_predictions_per_seq)
    return np.minimum(number, num_maskable)


def _choose_tokens(hashes: np.ndarray, maskable: np.ndarray, number: np.ndarray) -> np.ndarray:
    """The ``number`` maskable positions of each row with the smallest hashes; bool, shape [rows, length]."""
    ranks = np.where(maskable, _distinct(hashes), _LAST)
    most = max(1, int(number.max(initial=0)))
    smallest = np.partition(ranks, most - 1, axis=1)[:, :most]
    smallest.sort(axis=1)
    largest_chosen = smallest[np.arange(len(ranks)), np.maximum(number, 1) - 1]
    return (ranks <= largest_chosen[:, None]) & maskable


def _distinct(hashes: np.ndarray) -> np.ndarray:
    """The hashes with the position in their lowest bits, so that no two of a row are equal."""
    length = hashes.shape[1]
    position_bits = np.uint32((1 << (length - 1).bit_length()) - 1)
    return (hashes & ~position_bits) | np.arange(length, dtype=np.uint32)[None, :]


def _choose_words(
    hashes: np.ndarray, maskable: np.ndarray, continues_word: np.ndarray, number: np.ndarray
) -> np.ndarray:
    """Whole words of at most ``number`` tokens a row, taken by hash; a word that no longer fits is passed over.

    A row whose words are all longer than ``number`` has none. bool, shape [rows, length].
    """
    rows, length = hashes.shape
    starts = maskable & ~(continues_word & np.roll(maskable, 1, axis=1))
    start_of = np.maximum.accumulate(np.where(starts, np.arange(length), 0), axis=1)
    in_word = np.flatnonzero(maskable)
    sizes = np.bincount(start_of.ravel()[in_word] + in_word // length * length, minlength=rows * length)
    sizes = sizes.reshape(rows, length)
    words_by_rank = np.argsort(np.where(starts, _distinct(hashes), _LAST), axis=1)
    taken = np.zeros((rows, length), dtype=bool)
    room, row = number.copy(), np.arange(rows)
    for word in words_by_rank[:, : int(starts.sum(axis=1).max(initial=0))].T:
        size = sizes[row, word]
        fits = (size > 0) & (size <= room)
        taken[row, word] |= fits
        room -= size * fits
    return np.take_along_axis(taken, start_of, axis=1) & maskable


def _replacements(hashes: np.ndarray, originals: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    """What stands at each masked position, [predictions]."""
    ordinary = np.flatnonzero(~vocabulary.special)
    draw = _mix32(hashes ^ _REPLACEMENT_DRAW) / 2.0**32
    random = (_mix32(hashes ^ _TOKEN_DRAW).astype(np.uint64) * np.uint64(len(ordinary))) >> np.uint64(32)
    replaced = np.where(draw < _MASK_SHARE + _RANDOM_SHARE, ordinary[random.astype(np.int64)], originals)
    return np.where(draw < _MASK_SHARE, vocabulary.mask_id, replaced)
