"""Sequences are whole sentences of one document, in order, never too long."""

import numpy as np
import pytest

from data_prep.encoding import SentenceEncoder
from data_prep.sentences import sentence_splitter
from data_prep.sequences import SequenceRule, cut_at_sentences, target_lengths, tokenize_documents
from data_prep.tokenizer import train_wordpiece

DOCUMENTS = [
    "The heron waits in the reeds. It sees a fish! Does it move? No.\nA new paragraph starts here. It ends here.",
    "One sentence without an end",
    'Dr. Smith said "no." Then (after 3 days) he left. ' + "word " * 200 + ".",
]
KEYS = np.array([11, 12, 13], dtype=np.uint64)


@pytest.fixture(scope="module")
def tokenizer():
    return train_wordpiece(lambda: DOCUMENTS * 5, vocab_size=300).backend_tokenizer


def tokenize(tokenizer, rule: SequenceRule, which: slice = slice(None), splitter: str = "sentencex"):
    return tokenize_documents(
        DOCUMENTS[which], KEYS[which], sentence_splitter(splitter, "en"), SentenceEncoder(tokenizer), rule
    )


@pytest.mark.parametrize("splitter", ["sentencex", "newline", "none"])
def test_sentences_lose_nothing_but_space(splitter) -> None:
    split = sentence_splitter(splitter, "en")
    for document in DOCUMENTS:
        assert "".join("".join(split(document)).split()) == "".join(document.split())


def test_sentences_end_where_a_reader_ends_them() -> None:
    sentences = sentence_splitter("sentencex", "en")(DOCUMENTS[0])
    assert [sentence.strip() for sentence in sentences] == [
        "The heron waits in the reeds.",
        "It sees a fish!",
        "Does it move?",
        "No.",
        "A new paragraph starts here.",
        "It ends here.",
    ]
    assert len(sentence_splitter("newline", "en")(DOCUMENTS[0])) == 2


def test_sentences_of_languages_without_spaces_are_found() -> None:
    assert sentence_splitter("sentencex", "zh")("你好。这是一个句子!真的吗?是的。") == [
        "你好。",
        "这是一个句子!",
        "真的吗?",
        "是的。",
    ]


@pytest.mark.parametrize("splitter", ["sentencex", "newline", "none"])
def test_sequences_join_to_the_documents_own_tokens(splitter, tokenizer) -> None:
    result = tokenize(tokenizer, SequenceRule(16, short_seq_prob=0.3, seed=5), splitter=splitter)
    expected = [tokenizer.encode(document, add_special_tokens=False).ids for document in DOCUMENTS]
    assert result.tokens.tolist() == [token for ids in expected for token in ids]
    ends = np.cumsum(result.sequences_per_document)
    per_document = [part.sum() for part in np.split(result.sequence_lengths, ends[:-1])]
    assert per_document == [len(ids) for ids in expected]
    assert result.sequence_lengths.max() <= 14


def test_without_sentences_only_the_last_sequence_of_a_document_is_short(tokenizer) -> None:
    result = tokenize(tokenizer, SequenceRule(16, short_seq_prob=0.0, seed=5), splitter="none")
    ends = np.cumsum(result.sequences_per_document)
    for lengths in np.split(result.sequence_lengths, ends[:-1]):
        assert (lengths[:-1] == 14).all()


def test_a_sequence_ends_at_a_sentence_end() -> None:
    sentences = [5, 6, 4, 10, 3]
    assert cut_at_sentences(sentences, [14] * 9, max_tokens=14) == [11, 14, 3]


def test_a_sentence_that_is_too_long_is_cut_at_the_targets() -> None:
    assert cut_at_sentences([4, 30, 5], [10] * 9, max_tokens=10) == [4, 10, 10, 10, 5]
    assert cut_at_sentences([33, 5], [10, 3, 10, 10, 10], max_tokens=10) == [10, 3, 10, 10, 5]
    assert sum(cut_at_sentences([1000], [2, 7], max_tokens=10)) == 1000
    assert cut_at_sentences([33, 5], [10] * 9, max_tokens=10) == [10, 10, 10, 8]


def test_short_targets_have_the_stated_share() -> None:
    rule = SequenceRule(128, short_seq_prob=0.1, seed=3)
    targets = target_lengths(np.repeat(np.arange(200), 200), np.tile(np.arange(200), 200), rule)
    assert targets.min() >= 2
    assert targets.max() == 126
    assert abs((targets < 126).mean() - 0.1 * 124 / 125) < 5 * np.sqrt(0.09 / len(targets))


def test_documents_do_not_depend_on_their_neighbours(tokenizer) -> None:
    rule = SequenceRule(16, short_seq_prob=0.5, seed=5)
    together, alone = tokenize(tokenizer, rule), tokenize(tokenizer, rule, slice(2, 3))
    count = alone.sequences_per_document[0]
    np.testing.assert_array_equal(together.sequence_lengths[-count:], alone.sequence_lengths)
