"""What becomes of a document: trained on, held out, or left out as a duplicate, decided by its text alone."""

import numpy as np
import pytest

from common.errors import UserError
from data_prep import corpus
from data_prep.corpus import decide_fates, document_keys


def table(texts: list[str]) -> np.ndarray:
    documents = np.zeros(len(texts), dtype=corpus._DOCUMENT)
    documents["key"] = document_keys(texts)
    documents["sequences"] = 1
    return documents


def fates(texts: list[str], fraction: float = 0.1, deduplicate: bool = False, seed: int = 1) -> np.ndarray:
    documents = table(texts)
    decide_fates(documents, fraction, deduplicate, seed)
    return documents["fate"]


TEXTS = [f"document {number}" for number in range(1000)]


@pytest.mark.parametrize(("fraction", "number"), [(0.1, 100), (0.0333, 33), (0.001, 8), (0.49, 490)])
def test_exactly_the_share_asked_for_is_held_out(fraction, number) -> None:
    assert (fates(TEXTS, fraction) == corpus._HELD_OUT).sum() == number


def test_the_choice_is_the_texts_not_the_orders(monkeypatch) -> None:
    held_out = set(np.array(TEXTS)[fates(TEXTS) == corpus._HELD_OUT])
    assert held_out == set(np.array(TEXTS[::-1])[fates(TEXTS[::-1]) == corpus._HELD_OUT])
    assert held_out != set(np.array(TEXTS)[fates(TEXTS, seed=2) == corpus._HELD_OUT])
    monkeypatch.setattr(corpus, "_DOCUMENTS_AT_ONCE", 7)
    assert held_out == set(np.array(TEXTS)[fates(TEXTS) == corpus._HELD_OUT])


@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_duplicates_are_left_out_but_for_the_first(at_once, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "_DOCUMENTS_AT_ONCE", at_once)
    texts = TEXTS[:50] + TEXTS[20:40] + TEXTS
    left_out = fates(texts, deduplicate=True) == corpus._DUPLICATE
    kept = [text for text, out in zip(texts, left_out, strict=True) if not out]
    assert kept == list(dict.fromkeys(texts))


@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_a_text_that_is_trained_on_is_never_held_out(at_once, monkeypatch) -> None:
    monkeypatch.setattr(corpus, "_DOCUMENTS_AT_ONCE", at_once)
    texts = TEXTS + TEXTS[:900] * 3
    fate = fates(texts, fraction=0.02)
    held_out = set(np.array(texts)[fate == corpus._HELD_OUT])
    trained_on = set(np.array(texts)[fate != corpus._HELD_OUT])
    assert len(held_out) == 50  # half of the hundred that come once
    assert not held_out & trained_on
    assert not (fate == corpus._DUPLICATE).any()


def test_documents_without_tokens_are_not_held_out() -> None:
    documents = table(TEXTS)
    documents["sequences"][:900] = 0
    decide_fates(documents, 0.05, False, 1)
    assert np.flatnonzero(documents["fate"] == corpus._HELD_OUT).min() >= 900


@pytest.mark.parametrize("texts", [["one"], ["one"] * 5])
def test_too_few_different_documents_are_refused(texts) -> None:
    with pytest.raises(UserError, match="at least two different documents"):
        fates(texts)
