"""The order of all rows is an exact shuffle of (copy, sequence) pairs in which neither documents nor copies cluster."""

from itertools import pairwise

import numpy as np
import pytest
from scipy.stats import kstest

from data_prep.corpus import Corpus
from data_prep.masking import MaskingRule, Vocabulary
from data_prep.rows import RowRule, make_rows

DOCUMENTS, SEQUENCES_A_DOCUMENT, HELD_OUT, COPIES, TOKENS = 300, 8, 100, 6, 20
FIRST_ID = 10  # ids below are special


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    """Every token of a sequence is the sequence's number, so that a row tells where it comes from."""
    number = DOCUMENTS * SEQUENCES_A_DOCUMENT
    tokens = np.append(np.repeat(np.arange(number) + FIRST_ID, TOKENS), np.zeros(30)).astype(np.uint16)
    return Corpus(tokens, np.arange(number + 1) * TOKENS, DOCUMENTS, 0, number, HELD_OUT, number * TOKENS, {})


@pytest.fixture(scope="module")
def rule() -> RowRule:
    special = np.arange(FIRST_ID + DOCUMENTS * SEQUENCES_A_DOCUMENT) < FIRST_ID
    vocabulary = Vocabulary(1, 2, 0, 3, special, np.zeros_like(special))
    masking = MaskingRule((0.15,) * COPIES, 5, False, 1)
    return RowRule(32, COPIES, masking, masking, vocabulary, seed=1)


@pytest.fixture(scope="module")
def sequence_of_row(corpus, rule) -> np.ndarray:
    """The training rows' sequences, in the rows' order."""
    number = (corpus.num_sequences - HELD_OUT) * COPIES
    rows = make_rows(corpus, "train", np.arange(number), rule)
    masked = rows.masked_lm_positions > 0
    restored = rows.input_ids.copy()
    restored[np.nonzero(masked)[0], rows.masked_lm_positions[masked]] = rows.masked_lm_ids[masked]
    assert (restored[:, 1 : TOKENS + 1] == restored[:, [1]]).all()
    assert (rows.sequence_length == TOKENS + 2).all()
    return restored[:, 1].astype(int) - FIRST_ID


def test_every_sequence_comes_once_a_copy_and_held_out_ones_never(sequence_of_row, corpus) -> None:
    counts = np.bincount(sequence_of_row, minlength=corpus.num_sequences)
    assert (counts[:-HELD_OUT] == COPIES).all()
    assert not counts[-HELD_OUT:].any()


def test_validation_holds_each_held_out_sequence_once(corpus, rule) -> None:
    rows = make_rows(corpus, "validation", np.arange(HELD_OUT), rule)
    first_unmasked = np.where(rows.masked_lm_positions[:, 0] == 1, rows.masked_lm_ids[:, 0], rows.input_ids[:, 1])
    assert sorted(first_unmasked - FIRST_ID) == list(range(corpus.num_sequences - HELD_OUT, corpus.num_sequences))


def gap_share(places: np.ndarray, total: int) -> list[float]:
    """Distances of places that follow each other in the text, as a uniform number if they are drawn at random."""
    return [1 - (1 - abs(a - b) / total) ** 2 for a, b in pairwise(places.tolist())]


def test_sequences_of_a_document_lie_anywhere(sequence_of_row) -> None:
    total = len(sequence_of_row)
    document = sequence_of_row // SEQUENCES_A_DOCUMENT
    together = np.mean(document[1:] == document[:-1])
    chance = (SEQUENCES_A_DOCUMENT * COPIES - 1) / total
    assert abs(together - chance) < 5 * np.sqrt(chance / total)
    first_copy = {sequence: row for row, sequence in reversed(list(enumerate(sequence_of_row)))}
    ordered = np.array([first_copy[sequence] for sequence in sorted(first_copy)])
    # The first of six copies lies in the front of the data; its rank among all first copies is uniform.
    ranks = np.argsort(np.argsort(ordered))
    assert kstest(gap_share(ranks, len(ranks)), "uniform").pvalue > 1e-4


def test_copies_of_a_sequence_lie_anywhere(sequence_of_row) -> None:
    total = len(sequence_of_row)
    places = np.argsort(sequence_of_row, kind="stable").reshape(-1, COPIES)
    shuffled = np.random.default_rng(0).permuted(places, axis=1)  # the sort put them in order
    gaps = [gap for row in shuffled for gap in gap_share(row[:2], total)]
    assert kstest(gaps, "uniform").pvalue > 1e-4
    assert kstest(places.ravel() / total, "uniform").pvalue > 1e-4


def test_any_rows_can_be_made_alone(corpus, rule) -> None:
    whole = make_rows(corpus, "train", np.arange(3000), rule)
    some = np.array([2999, 5, 1234])
    alone = make_rows(corpus, "train", some, rule)
    for name, array in vars(alone).items():
        np.testing.assert_array_equal(array, getattr(whole, name)[some])
