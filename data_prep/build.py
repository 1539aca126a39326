"""Build a data folder: text -> token files (pass 1) -> masked, globally shuffled shards (pass 2) -> manifest.

Pass 2 makes each shard from its slice of one permutation over all (copy, sequence) pairs: gather, mask, write. Shards
are independent of each other and appear under their names when they are whole, so a build that was killed goes on
where it was, with the same bytes.
"""

import multiprocessing
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from common.errors import UserError
from common.folders import atomic_path, claim_folder, only_writer, read_json, sha256_of_file, write_json
from data_prep.corpus import Corpus, load_corpus, run_all, tokenize_corpus
from data_prep.documents import Source, read_documents
from data_prep.masking import MaskingRule, Vocabulary, mask_rows
from data_prep.sequences import SPECIAL_TOKENS_PER_SEQUENCE, SequenceRule
from data_prep.shards import MANIFEST_FILE, TOKENIZER_FOLDER, Rows, Shard, Split, write_shard
from data_prep.shuffle import Permutation
from data_prep.tokenizer import load_tokenizer, save_tokenizer, train_wordpiece

TRAIN_A_TOKENIZER = "train"
_ROWS_AT_ONCE = 8192


@dataclass(frozen=True)
class DataConfig:
    """What a data folder is made of."""

    sources: list[Source]
    """where the text comes from, read in this order"""
    tokenizer: str
    """hub id, folder, tokenizer.json, vocab.txt, or 'train' for a new WordPiece vocabulary from the sources"""
    vocab_size: int = 30522
    """tokens of a vocabulary that is trained here"""
    max_seq_length: int = 128
    """tokens of a row, [CLS] and [SEP] counted"""
    dupe_factor: int = 10
    """masked copies of each training sequence"""
    masked_lm_prob: float = 0.15
    """share of a sequence's tokens to predict"""
    max_predictions_per_seq: int = 20
    """at most this many predictions a sequence"""
    short_seq_prob: float = 0.1
    """share of sequences that aim at a random shorter length"""
    validation_fraction: float = 0.005
    """share of the documents that is held out"""
    rows_per_shard: int = 500_000
    """rows of a shard file"""
    num_workers: int = 2
    """worker processes; the result does not depend on it"""
    seed: int = 42
    """of every draw"""

    def __post_init__(self) -> None:
        checks = {
            "sources: give at least one": bool(self.sources),
            "max_seq_length must be from 8 to 65535": 8 <= self.max_seq_length < 2**16,
            "dupe_factor must be at least 1": self.dupe_factor >= 1,
            "masked_lm_prob must lie between 0 and 1": 0 < self.masked_lm_prob < 1,
            "max_predictions_per_seq must be at least 1": self.max_predictions_per_seq >= 1,
            "short_seq_prob must lie between 0 and 1": 0 <= self.short_seq_prob <= 1,
            "validation_fraction must lie between 0 and 0.5": 0 < self.validation_fraction < 0.5,
            "rows_per_shard must be at least 1": self.rows_per_shard >= 1,
            "num_workers must be at least 1": self.num_workers >= 1,
            "vocab_size must be from 100 to 2147483647": 100 <= self.vocab_size < 2**31,
            "seed must be from 0 to 4294967295": 0 <= self.seed < 2**32,
        }
        for message, holds in checks.items():
            if not holds:
                raise ValueError(message)


def build(config: DataConfig, output_dir: Path) -> dict[str, Any]:
    """Build the data folder ``output_dir``, or finish one that was interrupted; returns the manifest's content.

    Raises:
        UserError: no text, a source or tokenizer that can't be read, or a folder of another configuration.
    """
    work = output_dir / "work"
    complete = _is_complete(output_dir)
    if not complete:
        _check_sources(config)
    claim_folder(output_dir, config, may_change=("num_workers",))
    with only_writer(output_dir):
        if not complete:
            _remove_damaged(output_dir)
            _build_shards(config, output_dir, work)
        shutil.rmtree(work, ignore_errors=True)
    return read_json(output_dir / MANIFEST_FILE, "the manifest was just there")


def _check_sources(config: DataConfig) -> None:
    """What is not there is told before anything is written."""
    for source in config.sources:
        if next(read_documents([source]), None) is None:
            raise UserError(f"source {source.path or source.kind} holds no text")
    if config.tokenizer != TRAIN_A_TOKENIZER:
        load_tokenizer(config.tokenizer)


def _is_complete(folder: Path) -> bool:
    """Whether everything that the manifest names is there; that it is undamaged, only :func:`verify` can tell."""
    if not (folder / MANIFEST_FILE).exists():
        return False
    manifest = _recorded(folder)
    tokenizer_is_there = _tokenizer_sha256(folder) == manifest["tokenizer_sha256"]
    return tokenizer_is_there and all((folder / shard["file"]).exists() for shard in manifest["shards"])


def _remove_damaged(folder: Path) -> None:
    """Of a folder that was complete once, remove what is not as it was, so that it is made again."""
    if not (folder / MANIFEST_FILE).exists():
        return
    manifest = _recorded(folder)
    if _tokenizer_sha256(folder) != manifest["tokenizer_sha256"]:
        shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    for shard in manifest["shards"]:
        path = folder / shard["file"]
        if path.exists() and sha256_of_file(path) != shard["sha256"]:
            path.unlink()


def _recorded(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST_FILE, "delete it and build again")


def _tokenizer_sha256(folder: Path) -> str | None:
    file = folder / TOKENIZER_FOLDER / "tokenizer.json"
    return sha256_of_file(file) if file.exists() else None


def _build_shards(config: DataConfig, output_dir: Path, work: Path) -> None:
    """Both passes, and the manifest."""
    vocabulary = _vocabulary(_prepare_tokenizer(config, output_dir / TOKENIZER_FOLDER))
    window = 2 * config.num_workers
    # 'spawn': a forked copy of a process with tokenizer threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.num_workers, context, initializer=_leave_ctrl_c_to_parent) as executor:
        corpus = _tokenize(config, output_dir, work, executor, window)
        tasks = _plan_shards(config, corpus)
        make = partial(_make_shard, output_dir=output_dir, work=work, vocabulary=vocabulary, config=config)
        shards = list(tqdm(run_all(executor, make, tasks, window), "shards", len(tasks), disable=None))
    write_json(output_dir / MANIFEST_FILE, _manifest(config, corpus, output_dir, vocabulary, shards))


def _leave_ctrl_c_to_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _tokenize(config: DataConfig, output_dir: Path, work: Path, executor: Executor, window: int) -> Corpus:
    return tokenize_corpus(
        documents=tqdm(read_documents(config.sources), "documents", unit=" docs", disable=None),
        tokenizer_file=output_dir / TOKENIZER_FOLDER / "tokenizer.json",
        rule=SequenceRule(config.max_seq_length, config.short_seq_prob, config.seed),
        validation_fraction=config.validation_fraction,
        work=work,
        executor=executor,
        window=window,
    )


def _prepare_tokenizer(config: DataConfig, folder: Path) -> PreTrainedTokenizerFast:
    """The folder's own tokenizer, put there first if this is the first run."""
    if not folder.exists():
        if config.tokenizer == TRAIN_A_TOKENIZER:
            tokenizer = train_wordpiece(read_documents(config.sources), config.vocab_size)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        with atomic_path(folder) as temporary:
            save_tokenizer(tokenizer, temporary, config.max_seq_length)
    return load_tokenizer(str(folder))


def _vocabulary(tokenizer: PreTrainedTokenizerFast) -> Vocabulary:
    special = np.zeros(len(tokenizer), dtype=bool)
    special[tokenizer.all_special_ids] = True
    return Vocabulary(
        cls_id=tokenizer.cls_token_id,
        sep_id=tokenizer.sep_token_id,
        pad_id=tokenizer.pad_token_id,
        mask_id=tokenizer.mask_token_id,
        special=special,
    )


@dataclass(frozen=True)
class ShardTask:
    """One shard to make: rows [start, stop) of the split's order."""

    file: str
    split: Split
    start: int
    stop: int


def _plan_shards(config: DataConfig, corpus: Corpus) -> list[ShardTask]:
    held_out = int(corpus.held_out.sum())
    training = len(corpus.held_out) - held_out
    if not (training and held_out):
        raise UserError("too little text: no sequence is left for " + ("validation" if training else "training"))
    tasks = []
    for split, num_rows in (("train", training * config.dupe_factor), ("validation", held_out)):
        for number, start in enumerate(range(0, num_rows, config.rows_per_shard)):
            stop = min(start + config.rows_per_shard, num_rows)
            tasks.append(ShardTask(f"{split}-{number:05d}.h5", split, start, stop))
    return tasks


def _make_shard(task: ShardTask, output_dir: Path, work: Path, vocabulary: Vocabulary, config: DataConfig) -> Shard:
    path = output_dir / task.file
    if path.exists():
        digest = sha256_of_file(path)
    else:
        chunks = _shard_rows(task, load_corpus(work), vocabulary, config)
        digest = write_shard(path, chunks, task.stop - task.start)
    return Shard(task.file, task.split, task.stop - task.start, digest)


def _shard_rows(task: ShardTask, corpus: Corpus, vocabulary: Vocabulary, config: DataConfig) -> Iterator[Rows]:
    """Gather and mask the shard's rows, a chunk at a time."""
    in_split = np.flatnonzero(corpus.held_out == (task.split == "validation"))
    copies = config.dupe_factor if task.split == "train" else 1
    permutation = Permutation(len(in_split) * copies, config.seed)
    rule = MaskingRule(config.masked_lm_prob, config.max_predictions_per_seq, config.seed)
    for start in range(task.start, task.stop, _ROWS_AT_ONCE):
        order = permutation(np.arange(start, min(start + _ROWS_AT_ONCE, task.stop)))
        copy_index, row = np.divmod(order, len(in_split))
        sequence = in_split[row]
        start_token, length = corpus.start[sequence], corpus.length[sequence]
        input_ids = _gather(corpus.tokens, start_token, length, vocabulary, config.max_seq_length)
        masked, positions, labels = mask_rows(input_ids, sequence, copy_index, vocabulary, rule)
        yield Rows(
            input_ids=masked,
            sequence_length=(length + SPECIAL_TOKENS_PER_SEQUENCE).astype(np.uint16),
            masked_lm_positions=positions.astype(np.uint8 if config.max_seq_length <= 256 else np.uint16),
            masked_lm_ids=labels.astype(corpus.tokens.dtype),
        )


def _gather(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, vocabulary: Vocabulary, max_seq_length: int
) -> np.ndarray:
    """Rows ``[CLS] tokens [SEP] [PAD]...``, shape [len(starts), max_seq_length]."""
    column = np.arange(max_seq_length - 1)[None, :]
    inside = column < lengths[:, None]
    where = np.minimum(starts[:, None] + column, len(tokens) - 1)
    rows = np.full((len(starts), max_seq_length), vocabulary.pad_id, dtype=tokens.dtype)
    rows[:, 0] = vocabulary.cls_id
    rows[:, 1:] = np.where(inside, tokens[where], vocabulary.pad_id)
    rows[np.arange(len(starts)), lengths + 1] = vocabulary.sep_id
    return rows


def _manifest(
    config: DataConfig, corpus: Corpus, output_dir: Path, vocabulary: Vocabulary, shards: list[Shard]
) -> dict[str, Any]:
    num_sequences = len(corpus.length)
    real_tokens = int(corpus.length.sum()) + SPECIAL_TOKENS_PER_SEQUENCE * num_sequences
    return {
        "num_documents": corpus.num_documents,
        "num_sequences": num_sequences,
        "num_validation_sequences": int(corpus.held_out.sum()),
        "num_tokens": int(corpus.length.sum()),
        "padding_share": round(1 - real_tokens / (num_sequences * config.max_seq_length), 4),
        "dupe_factor": config.dupe_factor,
        "max_seq_length": config.max_seq_length,
        "max_predictions_per_seq": config.max_predictions_per_seq,
        "vocab_size": len(vocabulary.special),
        "pad_token_id": vocabulary.pad_id,
        "tokenizer_sha256": _tokenizer_sha256(output_dir),
        "shards": [asdict(shard) for shard in shards],
        "config": {name: value for name, value in asdict(config).items() if name != "num_workers"},
    }
