"""The tokenizer of a data folder: loaded from wherever the user has one, or trained on the sources."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import tokenizers
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerFast

from common.errors import UserError

_SPECIAL_TOKENS = {
    "pad_token": "[PAD]",
    "unk_token": "[UNK]",
    "cls_token": "[CLS]",
    "sep_token": "[SEP]",
    "mask_token": "[MASK]",
}

_ALPHABET_SIZE = 1000


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
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


def _bert_template(tokenizer: PreTrainedTokenizerFast) -> TemplateProcessing:
    """[CLS] and [SEP] around what it encodes, as in pretraining, for a tokenizer that adds none by itself."""
    cls, sep = tokenizer.cls_token, tokenizer.sep_token
    return TemplateProcessing(
        single=f"{cls} $A {sep}",
        pair=f"{cls} $A {sep} $B:1 {sep}:1",
        special_tokens=[(cls, tokenizer.cls_token_id), (sep, tokenizer.sep_token_id)],
    )


def _load(name: str) -> PreTrainedTokenizerFast:
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


def train_wordpiece(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train an uncased WordPiece vocabulary of at most ``vocab_size`` tokens; the same text gives the same bytes."""
    documents = list(documents)
    trainer = tokenizers.BertWordPieceTokenizer(lowercase=True)
    # The trainer numbers single characters in the order of a randomly seeded hash map, and that order decides ties
    # among merges: numbering them first, as if they were special tokens, makes the vocabulary reproducible.
    alphabet = _alphabet(trainer.normalize(document) for document in documents)
    first_tokens = [*_SPECIAL_TOKENS.values(), *alphabet, *(f"##{character}" for character in alphabet)]
    trainer.train_from_iterator(documents, vocab_size=vocab_size, special_tokens=first_tokens, show_progress=False)
    return BertTokenizer(vocab=trainer.get_vocab(with_added_tokens=True), do_lower_case=True)


def _alphabet(texts: Iterable[str]) -> list[str]:
    """The most frequent characters, in a fixed order."""
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(text)
    characters = [character for character in counts if not character.isspace()]
    return sorted(characters, key=lambda character: (-counts[character], character))[:_ALPHABET_SIZE]


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, max_seq_length: int) -> None:
    """Write ``tokenizer.json`` and its configuration to ``folder``."""
    tokenizer.model_max_length = max_seq_length
    tokenizer.save_pretrained(os.fspath(folder))
