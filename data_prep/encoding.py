"""Sentences to token ids: exactly what `tokenizers` gives, several times as fast for tokenizers of BERT's kind.

Such a tokenizer treats every word between two spaces alone, and text repeats its words. So each new word is encoded
once, and a sentence is put together from the ids of its words.
"""

import json
from collections.abc import Iterable

import numpy as np
import tokenizers

from data_prep.shards import token_type

_CACHE_CHARACTERS = 3_000_000  # of distinct words; about 60 MB of memory
_WORDS_AT_ONCE = 500


class SentenceEncoder:
    """Encodes sentences without adding special tokens; keeps the words that it has met, up to a limit."""

    def __init__(self, tokenizer: tokenizers.Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.dtype = token_type(1 + max(tokenizer.get_vocab().values()))
        self._words: dict[str, bytes] = {}
        self._cached_characters = 0
        self._separator = _separator(tokenizer) if _treats_words_alone(tokenizer) else None

    def encode(self, sentences: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The ids of all sentences, one after the other, [num_tokens]; and how many each has, int64 [num_sentences]."""
        encoded = self._by_word(sentences) if self._separator else self._encode(sentences)
        lengths = np.fromiter(map(len, encoded), dtype=np.int64, count=len(encoded)) // np.dtype(self.dtype).itemsize
        return np.frombuffer(b"".join(encoded), dtype=self.dtype), lengths

    def _encode(self, texts: list[str]) -> list[bytes]:
        # With a space before, as byte-level and SentencePiece vocabularies write a word that is not a text's first.
        spaced = [f" {text.strip()}".rstrip() for text in texts]
        encodings = self._tokenizer.encode_batch_fast(spaced, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=self.dtype).tobytes() for encoding in encodings]

    def _by_word(self, sentences: list[str]) -> list[bytes]:
        words = [sentence.split() for sentence in sentences]
        self._learn(set().union(*words).difference(self._words))
        ids_of = self._words.__getitem__
        encoded = [b"".join(map(ids_of, sentence)) for sentence in words]
        if self._cached_characters > _CACHE_CHARACTERS:
            self._words.clear()
            self._cached_characters = 0
        return encoded

    def _learn(self, new_words: Iterable[str]) -> None:
        """Encode many words in one text, with a special token between: far cheaper than one by one."""
        text, number = self._separator
        words = sorted(new_words)
        groups = [words[start : start + _WORDS_AT_ONCE] for start in range(0, len(words), _WORDS_AT_ONCE)]
        joined = self._tokenizer.encode_batch_fast([text.join(group) for group in groups], add_special_tokens=False)
        for group, encoding in zip(groups, joined, strict=True):
            ids = np.array(encoding.ids, dtype=self.dtype)
            ends = np.append(np.flatnonzero(ids == number), len(ids))
            if len(ends) != len(group):  # one of the words holds the special token itself
                self._words.update(zip(group, self._encode(group), strict=True))
                continue
            starts = np.insert(ends[:-1] + 1, 0, 0)
            self._words.update(
                (word, ids[start:end].tobytes())
                for word, start, end in zip(group, starts.tolist(), ends.tolist(), strict=True)
            )
        self._cached_characters += sum(map(len, words))


def _treats_words_alone(tokenizer: tokenizers.Tokenizer) -> bool:
    """Whether encoding a text is encoding its words, one after the other, as BERT's normaliser, splitter and WordPiece
    do: each looks no further than the next space."""
    parts = json.loads(tokenizer.to_str())
    kinds = [(parts[name] or {}).get("type") for name in ("normalizer", "pre_tokenizer", "model")]
    no_space_inside = all(not any(map(str.isspace, token["content"])) for token in parts["added_tokens"])
    return kinds == ["BertNormalizer", "BertPreTokenizer", "WordPiece"] and no_space_inside


def _separator(tokenizer: tokenizers.Tokenizer) -> tuple[str, int] | None:
    """A special token, between spaces, and its id; None if there is none."""
    unknown = json.loads(tokenizer.to_str())["model"]["unk_token"]  # stands in texts for what it does not know
    for number, token in tokenizer.get_added_tokens_decoder().items():
        if token.special and token.content != unknown:
            return f" {token.content} ", number
    return None
