"""Masking is BERT's, and a pure function of (seed, copy, sequence, position)."""

import numpy as np
import pytest

from data_prep.masking import MaskingRule, Vocabulary, mask_rows

VOCABULARY_SIZE, LENGTH = 1000, 128
PAD, UNK, CLS, SEP, MASK = range(5)
RULE = MaskingRule(masked_lm_prob=0.15, max_predictions_per_seq=20, seed=1)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    special = np.zeros(VOCABULARY_SIZE, dtype=bool)
    special[: MASK + 1] = True
    return Vocabulary(cls_id=CLS, sep_id=SEP, pad_id=PAD, mask_id=MASK, special=special)


@pytest.fixture(scope="module")
def rows() -> tuple[np.ndarray, np.ndarray]:
    """4,000 rows of random tokens of random length, and their lengths."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(1, LENGTH - 1, size=4000)
    ids = generator.integers(MASK + 1, VOCABULARY_SIZE, size=(4000, LENGTH)).astype(np.uint16)
    ids[np.arange(LENGTH) > lengths[:, None]] = PAD
    ids[:, 0] = CLS
    ids[np.arange(4000), lengths + 1] = SEP
    return ids, lengths


def apply(ids: np.ndarray, vocabulary: Vocabulary, sequence=None, copy=0, rule: MaskingRule = RULE):
    sequence = np.arange(len(ids)) if sequence is None else sequence
    return mask_rows(ids, sequence, np.broadcast_to(copy, len(ids)), vocabulary, rule)


def test_labels_restore_the_original_rows(rows, vocabulary) -> None:
    ids, _ = rows
    masked, positions, labels = apply(ids, vocabulary)
    restored = masked.copy()
    for row in range(len(ids)):
        used = positions[row] > 0
        restored[row, positions[row][used]] = labels[row][used]
    np.testing.assert_array_equal(restored, ids)


def test_the_number_of_predictions_is_the_stated_formula(rows, vocabulary) -> None:
    ids, lengths = rows
    _, positions, _ = apply(ids, vocabulary)
    expected = [min(max(1, round(0.15 * int(length))), 20) for length in lengths]
    assert (positions > 0).sum(axis=1).tolist() == expected


def test_special_tokens_are_never_masked_nor_drawn(rows, vocabulary) -> None:
    ids, _ = rows
    masked, positions, labels = apply(ids, vocabulary)
    used = positions > 0
    assert (labels[used] > MASK).all()
    changed = masked != ids
    assert set(np.unique(masked[changed])) & set(range(MASK + 1)) == {MASK}


def test_positions_rise_and_are_distinct(rows, vocabulary) -> None:
    ids, _ = rows
    _, positions, _ = apply(ids, vocabulary)
    for row in positions:
        used = row[row > 0]
        assert (np.diff(used.astype(int)) > 0).all()
        assert (row[len(used) :] == 0).all()


def test_replacements_are_80_10_10(rows, vocabulary) -> None:
    ids, _ = rows
    masked, positions, labels = apply(ids, vocabulary)
    used = positions > 0
    seen = np.take_along_axis(masked, positions, axis=1)[used]
    number = used.sum()
    share_mask, share_same = (seen == MASK).mean(), (seen == labels[used]).mean()
    five_sigma = 5 * np.sqrt(0.8 * 0.2 / number)
    assert abs(share_mask - 0.8) < five_sigma
    assert abs(share_same - 0.1) < five_sigma  # a random token is the original one time in a thousand


def test_every_position_is_equally_likely(vocabulary) -> None:
    ids = np.full((20_000, 34), 500, dtype=np.uint16)
    ids[:, 0], ids[:, -1] = CLS, SEP
    _, positions, _ = apply(ids, vocabulary)
    counts = np.bincount(positions[positions > 0], minlength=34)[1:33]
    expected = counts.sum() / 32
    chi_squared = ((counts - expected) ** 2 / expected).sum()
    assert chi_squared < 75  # 31 degrees of freedom: p < 1e-5


def test_a_row_comes_out_the_same_in_any_company(rows, vocabulary) -> None:
    ids, _ = rows
    whole = apply(ids, vocabulary, copy=3)
    some = np.array([7, 3999, 0, 1234])
    alone = apply(ids[some], vocabulary, sequence=some, copy=3)
    for all_rows, few_rows in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(all_rows[some], few_rows)


def test_copies_and_seeds_differ(rows, vocabulary) -> None:
    ids, lengths = rows
    long = ids[lengths > 60]
    _, first, _ = apply(long, vocabulary, copy=0)
    _, second, _ = apply(long, vocabulary, copy=1)
    _, reseeded, _ = apply(long, vocabulary, rule=MaskingRule(0.15, 20, seed=2))
    assert (first != second).any(axis=1).all()
    assert (first != reseeded).any(axis=1).all()


def test_a_row_without_maskable_tokens_has_no_predictions(vocabulary) -> None:
    ids = np.array([[CLS, UNK, SEP] + [PAD] * 29], dtype=np.uint16)
    masked, positions, labels = apply(ids, vocabulary)
    np.testing.assert_array_equal(masked, ids)
    assert not positions.any()
    assert not labels.any()
