"""Masking is BERT's, and a pure function of (seed, copy, sequence, position)."""

from dataclasses import replace

import numpy as np
import pytest

from data_prep.masking import MaskingRule, Vocabulary, mask_rows

VOCABULARY_SIZE, LENGTH = 1000, 128
PAD, UNK, CLS, SEP, MASK = range(5)
COPIES = 4
RULE = MaskingRule((0.15,) * COPIES, max_predictions_per_seq=20, whole_words=False, seed=1)
WHOLE_WORDS = replace(RULE, whole_words=True)


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    special = np.zeros(VOCABULARY_SIZE, dtype=bool)
    special[: MASK + 1] = True
    continues_word = np.arange(VOCABULARY_SIZE) % 3 == 0  # a third of the tokens are word parts
    return Vocabulary(CLS, SEP, PAD, MASK, special, continues_word & ~special)


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


@pytest.mark.parametrize("rule", [RULE, WHOLE_WORDS])
def test_labels_restore_the_original_rows(rule, rows, vocabulary) -> None:
    ids, _ = rows
    masked, positions, labels = apply(ids, vocabulary, rule=rule)
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


@pytest.mark.parametrize("rule", [RULE, WHOLE_WORDS])
def test_special_tokens_are_never_masked_nor_drawn(rule, rows, vocabulary) -> None:
    ids, _ = rows
    masked, positions, labels = apply(ids, vocabulary, rule=rule)
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
    _, reseeded, _ = apply(long, vocabulary, rule=replace(RULE, seed=2))
    assert (first != second).any(axis=1).all()
    assert (first != reseeded).any(axis=1).all()


def test_a_row_without_maskable_tokens_has_no_predictions(vocabulary) -> None:
    ids = np.array([[CLS, UNK, SEP] + [PAD] * 29], dtype=np.uint16)
    masked, positions, labels = apply(ids, vocabulary)
    np.testing.assert_array_equal(masked, ids)
    assert not positions.any()
    assert not labels.any()


def words_of(row: np.ndarray, vocabulary: Vocabulary) -> list[list[int]]:
    """A row's words as lists of positions, read off one token at a time."""
    words: list[list[int]] = []
    for position, token in enumerate(row):
        if vocabulary.special[token]:
            continue
        goes_on = vocabulary.continues_word[token] and words and words[-1][-1] == position - 1
        if goes_on:
            words[-1].append(position)
        else:
            words.append([position])
    return words


def test_whole_words_are_masked_wholly_or_not_at_all(rows, vocabulary) -> None:
    ids, lengths = rows
    _, positions, _ = apply(ids, vocabulary, rule=WHOLE_WORDS)
    for row, length, chosen in zip(ids[:500], lengths, positions, strict=False):
        masked = set(chosen[chosen > 0].tolist())
        words = words_of(row, vocabulary)
        partly = [word for word in words if 0 < len(masked.intersection(word)) < len(word)]
        room = min(max(1, round(0.15 * int(length))), 20) - len(masked)
        assert not partly
        # A word that would still have fitted was not passed over.
        assert room >= 0
        assert all(len(word) > room or masked.intersection(word) for word in words)


def test_whole_words_of_one_token_are_equally_likely(vocabulary) -> None:
    ids = np.full((20_000, 34), 500, dtype=np.uint16)  # 500 begins a word
    ids[:, 0], ids[:, -1] = CLS, SEP
    _, positions, _ = apply(ids, vocabulary, rule=WHOLE_WORDS)
    counts = np.bincount(positions[positions > 0], minlength=34)[1:33]
    expected = counts.sum() / 32
    assert ((counts - expected) ** 2 / expected).sum() < 75  # 31 degrees of freedom: p < 1e-5


def test_each_copy_has_its_own_probability(rows, vocabulary) -> None:
    ids, lengths = rows
    rule = replace(RULE, masked_lm_prob=(0.1, 0.3), max_predictions_per_seq=60)
    for copy, share in enumerate(rule.masked_lm_prob):
        _, positions, _ = apply(ids, vocabulary, copy=copy, rule=rule)
        expected = [max(1, round(share * int(length))) for length in lengths]
        assert (positions > 0).sum(axis=1).tolist() == expected


@pytest.mark.parametrize("length", [512, 4096])
def test_long_rows_are_masked_evenly(length, vocabulary) -> None:
    ids = np.full((60, length), 500, dtype=np.uint16)
    ids[:, 0], ids[:, -1] = CLS, SEP
    _, positions, _ = apply(ids, vocabulary, rule=replace(RULE, max_predictions_per_seq=length))
    assert ((positions > 0).sum(axis=1) == round(0.15 * (length - 2))).all()
    halves = np.bincount((positions[positions > 0] >= length // 2).astype(int))
    assert abs(halves[0] / halves.sum() - 0.5) < 5 * 0.5 / np.sqrt(halves.sum())
