"""The tokenizer of a data folder: loaded from wherever the user has one, or trained on the sources.

`transformers` is imported where it is used: it takes seconds and 200 MB, and workers can do without.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers
from tokenizers.processors import TemplateProcessing

from common.errors import UserError
from common.folders import atomic_path, check_folder, claim_folder
from data_prep.documents import Source, first_document, read_documents
from data_prep.progress import progress_bar

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

ALPHABET_SIZE = 1000
BERT_MAX_LENGTH = 512
_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}


def load_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Load a tokenizer from a hub id, a folder, a ``tokenizer.json`` or a BERT ``vocab.txt``.

    A ``vocab.txt`` is taken as uncased when no ordinary token of it has an upper-case letter.

    Raises:
        UserError: there is no such tokenizer, or it lacks a special token that masking needs.
    """
    try:
        tokenizer = _load(name)
    except Exception as error:  # tokenizers raises nothing more specific
        raise UserError(
            f"can't load tokenizer '{name}' ({str(error).strip().splitlines()[0]}): "
            "give a hub id, a folder, a tokenizer.json or a vocab.txt"
        ) from None
    missing = [token for token in _SPECIAL_TOKENS if getattr(tokenizer, f"{token}_id") is None]
    if missing:
        raise UserError(f"tokenizer '{name}' has no {', '.join(missing)}: a masked language model needs it")
    if tokenizer("")["input_ids"] != [tokenizer.cls_token_id, tokenizer.sep_token_id]:
        tokenizer.backend_tokenizer.post_processor = _bert_template(tokenizer)
    return tokenizer


def _bert_template(tokenizer: "PreTrainedTokenizerFast") -> TemplateProcessing:
    """[CLS] and [SEP] around what it encodes, as in pretraining, for a tokenizer that adds none by itself."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    return TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )


def _load(name: str) -> "PreTrainedTokenizerFast":
    from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

    path = Path(name)
    if path.suffix in (".txt", ".json") and not path.is_file():
        raise OSError("no such file")
    if path.suffix == ".txt":
        tokens = path.read_text(encoding="utf-8").splitlines()
        if missing := set(_SPECIAL_TOKENS.values()).difference(tokens):
            raise ValueError(f"it has no {', '.join(sorted(missing))}")
        cased = any(token != token.lower() for token in tokens if not token.startswith("["))
        return BertTokenizer(vocab=name, do_lower_case=not cased)
    if path.suffix == ".json":
        vocabulary = tokenizers.Tokenizer.from_file(name).get_vocab()
        special = {key: token for key, token in _SPECIAL_TOKENS.items() if token in vocabulary}
        inputs = ["input_ids", "token_type_ids", "attention_mask"]  # BERT's
        return PreTrainedTokenizerFast(tokenizer_file=name, model_input_names=inputs, **special)
    return AutoTokenizer.from_pretrained(name, use_fast=True)


def train_wordpiece(
    texts: Callable[[], Iterable[str]], vocab_size: int, lowercase: bool = True, alphabet_size: int = ALPHABET_SIZE
) -> "PreTrainedTokenizerFast":
    """Train a WordPiece vocabulary of at most ``vocab_size`` tokens; the same text gives the same bytes.

    ``texts`` is called twice and read as a stream; memory grows with the number of different words only. Characters
    beyond the ``alphabet_size`` most frequent ones are unknown to the vocabulary, and never fill more than half of it.
    """
    from transformers import BertTokenizer

    trainer = tokenizers.BertWordPieceTokenizer(lowercase=lowercase)
    # The trainer numbers single characters in the order of a randomly seeded hash map, and that order decides ties
    # among merges: numbering them first, as if they were special tokens, makes the vocabulary reproducible.
    alphabet = _alphabet(trainer.normalize(text) for text in texts())
    alphabet = alphabet[: min(alphabet_size, (vocab_size - len(_SPECIAL_TOKENS)) // 4)]
    first_tokens = [*_SPECIAL_TOKENS.values(), *alphabet, *(f"##{character}" for character in alphabet)]
    trainer.train_from_iterator(texts(), vocab_size=vocab_size, special_tokens=first_tokens, show_progress=False)
    return BertTokenizer(vocab=trainer.get_vocab(with_added_tokens=True), do_lower_case=lowercase)


def train_on_sources(
    sources: list[Source],
    vocab_size: int,
    min_document_characters: int,
    lowercase: bool = True,
    alphabet_size: int = ALPHABET_SIZE,
) -> "PreTrainedTokenizerFast":
    """:func:`train_wordpiece` on everything that the sources hold."""
    with progress_bar("train a tokenizer, in two passes", None, " documents") as bar:

        def texts() -> Iterator[str]:
            for document in read_documents(sources, min_document_characters):
                yield document
                bar.update()

        return train_wordpiece(texts, vocab_size, lowercase, alphabet_size)


@dataclass(frozen=True)
class TokenizerConfig:
    """What a vocabulary is made of."""

    sources: list[Source]
    """where the text comes from"""
    vocab_size: int = 30522
    """tokens, special ones included"""
    lowercase: bool = True
    """whether case and accents are dropped, as in BERT's uncased models"""
    alphabet_size: int = ALPHABET_SIZE
    """characters to know, the most frequent ones; Chinese and Japanese need several thousand"""
    min_document_characters: int = 1
    """shorter documents are left out"""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources: give at least one")
        if self.vocab_size < 100 or self.alphabet_size < 1:
            raise ValueError("vocab_size must be at least 100, alphabet_size at least 1")


def make_tokenizer(config: TokenizerConfig, folder: Path) -> None:
    """Train a tokenizer into ``folder``, whole or not at all; nothing to do if it is there already.

    Raises:
        UserError: no text, or a folder of another configuration or of something else.
    """
    check_folder(folder, config)
    if (folder / "tokenizer.json").exists():
        return
    for source in config.sources:
        first_document(source)
    with atomic_path(folder) as temporary:
        claim_folder(temporary, config)
        tokenizer = train_on_sources(
            config.sources, config.vocab_size, config.min_document_characters, config.lowercase, config.alphabet_size
        )
        save_tokenizer(tokenizer, temporary, BERT_MAX_LENGTH)


def _alphabet(texts: Iterable[str]) -> list[str]:
    """All characters, the most frequent first, in a fixed order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    characters = [character for character in counts if not character.isspace()]
    return sorted(characters, key=lambda character: (-counts[character], character))


def vocabulary_size(tokenizer: "PreTrainedTokenizerFast") -> int:
    """Ids from 0 to the largest one that the tokenizer gives, those included that no token has."""
    return 1 + max(tokenizer.get_vocab().values())


def continues_word(tokenizer: "PreTrainedTokenizerFast") -> np.ndarray:
    """Which tokens go on with the word of the token before; bool, shape [vocab_size].

    Raises:
        UserError: the tokenizer marks neither the beginning nor the continuation of words.
    """
    tokens = np.array(tokenizer.convert_ids_to_tokens(list(range(vocabulary_size(tokenizer)))), dtype=str)
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    if model["type"] == "WordPiece":
        return np.char.startswith(tokens, model["continuing_subword_prefix"])
    for mark in ("Ġ", "▁"):  # a space before, in byte-level and in SentencePiece vocabularies
        starts = np.char.startswith(tokens, mark)
        if starts.any():
            return ~starts
    raise UserError("whole_word_masking needs a tokenizer that marks where words begin, this one doesn't: leave it off")


def save_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path, max_seq_length: int) -> None:
    """Write ``tokenizer.json`` and its configuration to ``folder``.

    Raises:
        OSError: it can't be written.
    """
    tokenizer.model_max_length = max_seq_length
    try:
        tokenizer.save_pretrained(os.fspath(folder))
    except Exception as error:  # tokenizers raises nothing more specific
        raise OSError(str(error).splitlines()[0]) from None
