"""Encoding word by word gives exactly what the tokenizer gives for the whole sentence."""

import numpy as np
import pytest
import tokenizers
from transformers import BertTokenizer

from data_prep.encoding import SentenceEncoder
from data_prep.tokenizer import train_wordpiece

ODD_SENTENCES = [
    "",
    "   ",
    "Plain words, with (punctuation) - and numbers 3.14!",
    "Ünïcödé naïve façade É\u0301 ﬁ ligature ΣΊΣΥΦΟΣ ǅ İstanbul",
    "中文字符 mixed 日本語とかな 한국어 text",
    "שלום עולם مرحبا بالعالم",
    "a\u00a0b\u2003c\u3000d\u2028e\u200bf\u00adg\ufeffh",
    "[MASK] in the[SEP]middle of[CLS] [UNK]text",
    "emoji 👩‍👩‍👧 and 🏴󠁧󠁢󠁥󠁮󠁧󠁿 flags",
    "x" * 150 + " " + "ab" * 40_000,
    "the the the THE The",
]


def random_sentences(number: int) -> list[str]:
    """Words of random characters of all planes that text may hold after cleaning."""
    generator = np.random.default_rng(0)
    ranges = [(0x20, 0x7F), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x5FF), (0x600, 0x6FF), (0x1E00, 0x206F)]
    ranges += [(0x3000, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xAD00), (0x1F600, 0x1F64F), (0xFE00, 0xFFEF)]
    sentences = []
    for _ in range(number):
        low, high = ranges[generator.integers(len(ranges))]
        codes = np.where(generator.random(60) < 0.15, 0x20, generator.integers(low, high, 60))
        sentences.append("".join(map(chr, codes)))
    return sentences


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def tokenizer(request) -> tokenizers.Tokenizer:
    texts = [*ODD_SENTENCES, *random_sentences(200)]
    return train_wordpiece(lambda: texts, vocab_size=4000, lowercase=request.param).backend_tokenizer


def reference(tokenizer: tokenizers.Tokenizer, sentences: list[str]) -> list[list[int]]:
    return [tokenizer.encode(sentence, add_special_tokens=False).ids for sentence in sentences]


def encoded(encoder: SentenceEncoder, sentences: list[str]) -> list[list[int]]:
    ids, lengths = encoder.encode(sentences)
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])]


def test_every_sentence_is_encoded_as_the_tokenizer_does(tokenizer) -> None:
    sentences = [*ODD_SENTENCES, *random_sentences(2000)]
    encoder = SentenceEncoder(tokenizer)
    assert encoded(encoder, sentences) == reference(tokenizer, sentences)
    assert encoded(encoder, sentences[::-1]) == reference(tokenizer, sentences[::-1])  # from the words met before


def test_the_words_kept_are_bounded_and_forgetting_changes_nothing(tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("data_prep.encoding._CACHE_CHARACTERS", 500)
    encoder = SentenceEncoder(tokenizer)
    for sentence in random_sentences(300):
        assert encoded(encoder, [sentence]) == reference(tokenizer, [sentence])
        assert sum(map(len, encoder._words)) <= 500 + len(sentence)


@pytest.mark.parametrize("kind", ["ByteLevel", "Metaspace", "Whitespace"])
def test_other_tokenizers_give_a_texts_own_tokens_sentence_by_sentence(kind) -> None:
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="[UNK]"))
    options = {"ByteLevel": {"add_prefix_space": False}, "Metaspace": {"prepend_scheme": "first"}}.get(kind, {})
    tokenizer.pre_tokenizer = getattr(tokenizers.pre_tokenizers, kind)(**options)
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=500, special_tokens=["[UNK]", "[MASK]"], show_progress=False)
    tokenizer.train_from_iterator(ODD_SENTENCES, trainer)
    sentences = ["The heron waits. ", "It sees a fish! ", "Does it move? ", "No."]
    ids, lengths = SentenceEncoder(tokenizer).encode(sentences)
    whole = tokenizer.encode(" " + "".join(sentences), add_special_tokens=False)
    assert ids.tolist() == whole.ids
    assert len(lengths) == 4
    assert lengths.min() > 1


def test_ids_beyond_16_bits_are_kept() -> None:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"w{number}" for number in range(70_000))]
    tokenizer = BertTokenizer(vocab={word: number for number, word in enumerate(words)}).backend_tokenizer
    assert encoded(SentenceEncoder(tokenizer), ["w69999 w3"]) == [[70_004, 8]]
