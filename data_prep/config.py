"""The configuration of a data folder, and the rules that follow from it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

from data_prep.corpus import TextRule
from data_prep.documents import Source
from data_prep.masking import MaskingRule, Vocabulary
from data_prep.rows import RowRule
from data_prep.sentences import SentenceSplitter
from data_prep.sequences import SequenceRule
from data_prep.tokenizer import continues_word, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TRAIN_A_TOKENIZER = "train"
BERT_MASKED_LM_PROB = 0.15


@dataclass(frozen=True)
class DataConfig:
    """What a data folder is made of."""

    sources: list[Source]
    """where the text comes from, read in this order"""
    tokenizer: str
    """hub id, folder, tokenizer.json, vocab.txt, or 'train' for a new WordPiece vocabulary from the sources"""
    vocab_size: int = 30522
    """tokens of a vocabulary that is trained here"""
    sentence_splitter: SentenceSplitter = "sentencex"
    """where a sequence may end: sentencex (rules of the language), newline (one sentence a line), none (anywhere)"""
    language: str = "en"
    """language code, for sentencex"""
    min_document_characters: int = 1
    """shorter documents are left out"""
    deduplicate: bool = False
    """leave out documents whose text came before, character by character"""
    max_seq_length: int = 128
    """tokens of a row, [CLS] and [SEP] counted"""
    dupe_factor: int = 10
    """masked copies of each training sequence"""
    masked_lm_prob: float | list[float] = BERT_MASKED_LM_PROB
    """share of a sequence's tokens to predict; a list: one for each copy (validation then takes 0.15)"""
    max_predictions_per_seq: int = 20
    """at most this many predictions a sequence"""
    whole_word_masking: bool = False
    """mask all tokens of a word, or none"""
    short_seq_prob: float = 0.1
    """share of sequences that aim at a random shorter length"""
    validation_fraction: float = 0.005
    """share of the documents that is held out"""
    rows_per_shard: int = 500_000
    """rows of a shard file, at most: all are equally large"""
    num_workers: int = 2
    """worker processes; the result does not depend on it"""
    executor: Literal["processes", "dask"] = "processes"
    """where work units run: processes of this machine, or a Dask cluster that sees the same files"""
    scheduler: str | None = None
    """dask: address of the scheduler, such as tcp://10.0.0.1:8786"""
    seed: int = 42
    """of every draw"""

    def __post_init__(self) -> None:
        several = isinstance(self.masked_lm_prob, list)
        checks = {
            "sources: give at least one": bool(self.sources),
            "max_seq_length must be from 8 to 65535": 8 <= self.max_seq_length < 2**16,
            "dupe_factor must be from 1 to 10000": 1 <= self.dupe_factor <= 10_000,
            "masked_lm_prob must lie between 0 and 1": all(0 < share < 1 for share in self.copy_masked_lm_prob),
            "masked_lm_prob: give one number, or one for each of the dupe_factor copies": not several
            or len(self.copy_masked_lm_prob) == self.dupe_factor,
            "max_predictions_per_seq must be from 1 to below max_seq_length": 1
            <= self.max_predictions_per_seq
            < self.max_seq_length,
            "short_seq_prob must lie between 0 and 1": 0 <= self.short_seq_prob <= 1,
            "validation_fraction must lie between 0 and 0.5": 0 < self.validation_fraction < 0.5,
            "rows_per_shard must be at least 1": self.rows_per_shard >= 1,
            "num_workers must be at least 1": self.num_workers >= 1,
            "vocab_size must be from 100 to 2147483647": 100 <= self.vocab_size < 2**31,
            "min_document_characters must be at least 1": self.min_document_characters >= 1,
            "executor dask needs the address of its scheduler": self.executor != "dask" or bool(self.scheduler),
            "seed must be from 0 to 4294967295": 0 <= self.seed < 2**32,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)

    @property
    def copy_masked_lm_prob(self) -> tuple[float, ...]:
        """The share of tokens to predict in each copy."""
        if isinstance(self.masked_lm_prob, list):
            return tuple(self.masked_lm_prob)
        return (self.masked_lm_prob,) * self.dupe_factor

    @property
    def validation_masked_lm_prob(self) -> float:
        """The share of tokens to predict in validation: the same in every run that shall be compared."""
        return BERT_MASKED_LM_PROB if isinstance(self.masked_lm_prob, list) else self.masked_lm_prob


def text_rule(config: DataConfig) -> TextRule:
    """How the configuration turns records into sequences."""
    return TextRule(
        sequences=SequenceRule(config.max_seq_length, config.short_seq_prob, config.seed),
        sentence_splitter=config.sentence_splitter,
        language=config.language,
        min_document_characters=config.min_document_characters,
    )


def row_rule(config: DataConfig, tokenizer: "PreTrainedTokenizerFast") -> RowRule:
    """How the configuration turns sequences into rows."""

    def masking(masked_lm_prob: tuple[float, ...]) -> MaskingRule:
        return MaskingRule(masked_lm_prob, config.max_predictions_per_seq, config.whole_word_masking, config.seed)

    return RowRule(
        max_seq_length=config.max_seq_length,
        dupe_factor=config.dupe_factor,
        training=masking(config.copy_masked_lm_prob),
        validation=masking((config.validation_masked_lm_prob,)),
        vocabulary=vocabulary_of(tokenizer, config.whole_word_masking),
        seed=config.seed,
    )


def vocabulary_of(tokenizer: "PreTrainedTokenizerFast", whole_words: bool) -> Vocabulary:
    """What masking knows of a tokenizer.

    Raises:
        UserError: with ``whole_words``, a tokenizer that does not tell where words begin.
    """
    special = np.ones(vocabulary_size(tokenizer), dtype=bool)  # ids that no token has are as good as special
    special[list(tokenizer.get_vocab().values())] = False
    special[tokenizer.all_special_ids] = True
    return Vocabulary(
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        special=special,
        continues_word=continues_word(tokenizer) if whole_words else np.zeros_like(special),
    )
