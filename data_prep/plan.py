"""What a build will take and give, told before the work from a sample of the real sources."""

import resource
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import tokenizers

from common.errors import UserError
from data_prep.config import TRAIN_A_TOKENIZER, DataConfig, row_rule, text_rule
from data_prep.corpus import Corpus, document_keys
from data_prep.documents import Block, Source, parse_block, read_blocks, total_bytes
from data_prep.encoding import SentenceEncoder
from data_prep.rows import RowRule, make_rows
from data_prep.sentences import sentence_splitter
from data_prep.sequences import TokenizedDocuments, padding_share, tokenize_documents
from data_prep.shards import bytes_per_row, write_shard
from data_prep.tables import count_rows
from data_prep.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILES_A_SOURCE = 4
_ROWS_TO_TIME = 8192


@dataclass(frozen=True)
class Plan:
    """Estimates for the whole build."""

    num_documents: float
    num_sequences: float
    num_tokens: float
    padding_share: float
    rows: float
    """To train on, all copies."""
    shard_bytes: float
    work_bytes: float
    """Of token files, while the build runs."""
    memory_bytes: float
    """Of all processes together."""
    seconds: float
    sampled_bytes: float
    """Of text, over all sources."""

    def describe(self, config: DataConfig, num_gpus: int, sequences_per_second: float) -> str:
        """A table for people; ``sequences_per_second`` is what one GPU trains."""
        hours = self.rows / (num_gpus * sequences_per_second) / 3600
        lines = {
            "sample": f"{self.sampled_bytes / 1e6:,.1f} MB of text",
            "documents": f"{self.num_documents:,.0f}" + (" with all duplicates" if config.deduplicate else ""),
            "sequences": f"{self.num_sequences:,.0f} of at most {config.max_seq_length} tokens",
            "tokens": f"{self.num_tokens:,.0f}",
            "padding": f"{self.padding_share:.1%}",
            "rows to train on": f"{self.rows:,.0f} ({config.dupe_factor} masked copies)",
            "time": f"{_duration(self.seconds)} with {config.num_workers} workers like this machine's",
            "disk": f"{_gigabytes(self.shard_bytes)} of shards, {_gigabytes(self.work_bytes)} more meanwhile",
            "memory": f"at most {_gigabytes(self.memory_bytes)} for {config.num_workers} workers and their parent",
            "training": f"{hours:,.1f} hours on {num_gpus} GPUs at {sequences_per_second:,.0f} sequences/s each "
            "before a row comes twice",
        }
        return "\n".join(f"{name:<18}{value}" for name, value in lines.items())


def make_plan(config: DataConfig, sample_megabytes: float) -> Plan:
    """Tokenise and mask a sample of every source, and extrapolate.

    Raises:
        UserError: a source or the tokenizer can't be read, or there is no text.
    """
    tokenizer = _tokenizer(config, sample_megabytes)
    samples = [_sample(source, config, sample_megabytes, tokenizer) for source in config.sources]
    rule = row_rule(config, tokenizer)
    itemsize = samples[0].tokenized.tokens.itemsize
    rows_per_second = _rows_per_second(samples[0].tokenized, rule)
    total = {
        name: sum(getattr(sample, name) / sample.share for sample in samples)
        for name in ("num_documents", "num_sequences", "num_tokens", "seconds", "reading_seconds")
    }
    rows = total["num_sequences"] * config.dupe_factor
    row_bytes = bytes_per_row(config.max_seq_length, config.max_predictions_per_seq, vocabulary_size(tokenizer))
    return Plan(
        num_documents=total["num_documents"],
        num_sequences=total["num_sequences"],
        num_tokens=total["num_tokens"],
        padding_share=padding_share(total["num_tokens"], total["num_sequences"], config.max_seq_length),
        rows=rows,
        shard_bytes=rows * row_bytes,
        work_bytes=2 * itemsize * total["num_tokens"] + 2 * 8 * total["num_sequences"],  # units, then the joined files
        memory_bytes=(config.num_workers + 1) * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        # One process reads, while the workers do the rest.
        seconds=max(total["reading_seconds"], total["seconds"] / config.num_workers)
        + rows / rows_per_second / config.num_workers,
        sampled_bytes=sum(sample.size for sample in samples),
    )


@dataclass(frozen=True)
class _Sample:
    """A few blocks of one source, tokenised."""

    tokenized: TokenizedDocuments
    share: float
    """Of the source."""
    size: int
    """Bytes of text."""
    reading_seconds: float
    seconds: float
    """Of everything else."""

    @property
    def num_documents(self) -> int:
        return len(self.tokenized.sequences_per_document)

    @property
    def num_sequences(self) -> int:
        return len(self.tokenized.sequence_lengths)

    @property
    def num_tokens(self) -> int:
        return len(self.tokenized.tokens)


def _sample(source: Source, config: DataConfig, megabytes: float, tokenizer: "PreTrainedTokenizerFast") -> _Sample:
    rule = text_rule(config)
    encoder = SentenceEncoder(tokenizers.Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()))
    split = sentence_splitter(rule.sentence_splitter, rule.language)
    began = time.perf_counter()
    blocks = list(_blocks(source, megabytes))
    start = time.perf_counter()
    documents = [text for block in blocks for text in parse_block(block, rule.min_document_characters, Counter())]
    tokenized = tokenize_documents(documents, document_keys(documents)[:, 0], split, encoder, rule.sequences)
    if not len(tokenized.tokens):
        raise UserError(f"the sample of source {source} holds no text: give a larger --sample_megabytes")
    return _Sample(
        tokenized,
        share=_share(source, blocks),
        size=sum(map(_size, blocks)),
        reading_seconds=start - began,
        seconds=time.perf_counter() - start,
    )


def _blocks(source: Source, megabytes: float) -> Iterator[Block]:
    """The first blocks of a few files that are spread over all of them; of a data set, its first blocks."""
    files = source.files
    if sum(file.stat().st_size for file in files) <= megabytes * 1e6:
        files = []  # all of it, in its own order
    chosen = files[:: -(-len(files) // _FILES_A_SOURCE)] if files else []
    for part in [replace(source, path=str(file)) for file in chosen] or [source]:
        size = 0.0
        for block in read_blocks([part]):
            yield block
            size += _size(block)
            if size >= megabytes * 1e6 / max(1, len(chosen)):
                break


def _size(block: Block) -> int:
    records = block.records
    return len(records) if isinstance(records, bytes) else sum(len(record or "") for record in records)


def _share(source: Source, blocks: list[Block]) -> float:
    total = total_bytes([source])
    if total:
        return min(1.0, sum(block.bytes_read for block in blocks) / total)
    rows = count_rows(source.path or "", source.config, source.split, source.revision)
    if not rows:
        raise UserError(f"data set {source} does not tell how many rows it has, so nothing can be planned: build it")
    return min(1.0, sum(len(block.records) for block in blocks) / rows)


def _tokenizer(config: DataConfig, megabytes: float) -> "PreTrainedTokenizerFast":
    """The configured one, or one that is trained on the sample, which stands in for it."""
    if config.tokenizer != TRAIN_A_TOKENIZER:
        return load_tokenizer(config.tokenizer)

    def texts() -> Iterator[str]:
        for source in config.sources:
            for block in _blocks(source, megabytes):
                yield from parse_block(block, config.min_document_characters, Counter())

    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(train_wordpiece(texts, config.vocab_size), Path(folder), config.max_seq_length)
        return load_tokenizer(folder)


def _rows_per_second(tokenized: TokenizedDocuments, rule: RowRule) -> float:
    """Rows that one process gathers, masks and writes a second."""
    room = np.zeros(rule.max_seq_length, dtype=tokenized.tokens.dtype)
    starts = np.append(0, np.cumsum(tokenized.sequence_lengths))
    corpus = Corpus(np.append(tokenized.tokens, room), starts, 0, 0, len(starts) - 1, 0, len(tokenized.tokens), {})
    rows = min(_ROWS_TO_TIME, corpus.num_sequences * rule.dupe_factor)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_shard(Path(folder) / "sample.h5", iter([make_rows(corpus, "train", np.arange(rows), rule)]), rows)
    return rows / (time.perf_counter() - start)


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def _gigabytes(size: float) -> str:
    return f"{size / 1e9:,.1f} GB" if size >= 1e8 else f"{size / 1e6:,.1f} MB"
