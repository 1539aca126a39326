"""Build a data folder: text -> token files (pass 1) -> masked, globally shuffled shards (pass 2) -> manifest.

Everything appears under its name when it is whole, and the manifest comes last, so a build that was killed goes on
where it was, with the same bytes.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.folders import (
    atomic_path,
    check_folder,
    claim_folder,
    only_writer,
    read_json,
    sha256_of_file,
    write_json,
)
from data_prep.config import TRAIN_A_TOKENIZER, DataConfig, row_rule, text_rule, vocabulary_of
from data_prep.corpus import Corpus, tokenize_corpus
from data_prep.documents import Block, describe_sources, first_document, read_blocks, total_bytes
from data_prep.executors import WorkPool, open_pool
from data_prep.progress import progress_bar
from data_prep.rows import RowRule, ShardTask, make_shard, note_shard, plan_shards
from data_prep.sequences import padding_share
from data_prep.shards import MANIFEST_FILE, TOKENIZER_FOLDER, Shard, bytes_per_row
from data_prep.tokenizer import load_tokenizer, save_tokenizer, train_on_sources

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SOURCES_FILE = "sources.json"
_WHERE_IT_RUNS = ("num_workers", "executor", "scheduler")


def build(config: DataConfig, output_dir: Path) -> dict[str, Any]:
    """Build the data folder ``output_dir``, or finish or mend an earlier one; returns the manifest's content.

    Raises:
        UserError: no text, a source or tokenizer that can't be read, a folder of another configuration or of other
            sources, a full disk, or a worker that died.
    """
    output_dir = output_dir.absolute()  # a cluster's workers start elsewhere
    check_folder(output_dir, config, _WHERE_IT_RUNS)
    sources = _check_sources(config, output_dir)
    claim_folder(output_dir, config, _WHERE_IT_RUNS)
    with only_writer(output_dir):
        try:
            if not _is_whole(output_dir):
                _build_shards(config, output_dir, output_dir / "work", sources)
            shutil.rmtree(output_dir / "work", ignore_errors=True)
        except OSError as error:
            raise UserError(
                f"can't write to {output_dir} ({error.strerror or str(error).splitlines()[0]}): "
                "mend that and run the same command again, which goes on from here"
            ) from None
    return _recorded(output_dir)


def _check_sources(config: DataConfig, folder: Path) -> list[dict[str, Any]]:
    """What is not there, or no longer what it was, is told before anything is written; returns what is there."""
    record = folder / "work" / _SOURCES_FILE
    if (folder / MANIFEST_FILE).exists():
        recorded = _recorded(folder)["sources"]
        try:
            sources = describe_sources(config.sources)
        except UserError:  # a folder that is whole no longer needs them
            return recorded
    else:
        for source in config.sources:
            first_document(source)
        if config.tokenizer != TRAIN_A_TOKENIZER:
            vocabulary_of(load_tokenizer(config.tokenizer), config.whole_word_masking)
        sources = describe_sources(config.sources)
        recorded = read_json(record, "give another --output_dir") if record.exists() else sources
    if sources != recorded:
        raise UserError(
            f"{folder} was made of other sources ({_difference(recorded, sources)}): "
            "put them back to continue, or give another --output_dir"
        )
    return sources


def _difference(recorded: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """The first one, in words."""
    before, after = ({(entry.get("file") or entry.get("dataset")): entry for entry in side} for side in (recorded, now))
    for name in [*before, *after]:
        if name not in after:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        if before[name] != after[name]:
            return f"{name} has changed"
    return "their order has changed"


def _is_whole(folder: Path) -> bool:
    """Whether every byte is as the manifest says. Of a folder that was whole once, what is damaged is removed, so
    that the passes make it again, and no more than that."""
    if not (folder / MANIFEST_FILE).exists():
        return False
    manifest = _recorded(folder)
    same_tokenizer = _tokenizer_sha256(folder) == manifest["tokenizer_sha256"]
    damaged = [shard for shard in manifest["shards"] if not _is_undamaged(folder, shard)]
    if same_tokenizer and not damaged:
        return True
    if not same_tokenizer:
        shutil.rmtree(folder / TOKENIZER_FOLDER, ignore_errors=True)
    for shard in manifest["shards"]:
        if shard in damaged:
            (folder / shard["file"]).unlink(missing_ok=True)
        else:
            note_shard(folder / "work", shard["file"], shard["sha256"])
    return False


def _is_undamaged(folder: Path, shard: dict[str, Any]) -> bool:
    path = folder / shard["file"]
    return path.is_file() and sha256_of_file(path) == shard["sha256"]


def _recorded(folder: Path) -> dict[str, Any]:
    return read_json(folder / MANIFEST_FILE, "delete it and build again")


def _tokenizer_sha256(folder: Path) -> str | None:
    file = folder / TOKENIZER_FOLDER / "tokenizer.json"
    return sha256_of_file(file) if file.exists() else None


def _build_shards(config: DataConfig, output_dir: Path, work: Path, sources: list[dict[str, Any]]) -> None:
    """Both passes, and the manifest."""
    write_json(work / _SOURCES_FILE, sources)
    tokenizer = _prepare_tokenizer(config, output_dir / TOKENIZER_FOLDER)
    rule = row_rule(config, tokenizer)
    row_bytes = bytes_per_row(config.max_seq_length, config.max_predictions_per_seq, len(tokenizer))
    with open_pool(config.executor, config.num_workers, config.scheduler) as pool:
        corpus = _tokenize(config, output_dir, work, pool)
        tasks = plan_shards(corpus, config.dupe_factor, config.rows_per_shard)
        _check_free_space(output_dir, tasks, row_bytes)
        shards = _make_shards(tasks, partial(make_shard, output_dir=output_dir, work=work, rule=rule), pool)
    write_json(output_dir / MANIFEST_FILE, _manifest(config, corpus, output_dir, rule, shards, sources))


def _tokenize(config: DataConfig, output_dir: Path, work: Path, pool: WorkPool) -> Corpus:
    with progress_bar("tokenise", total_bytes(config.sources), "B") as bar:

        def blocks() -> Iterator[Block]:
            for block in read_blocks(config.sources):
                yield block
                bar.update(block.bytes_read)

        return tokenize_corpus(
            blocks=blocks(),
            tokenizer_file=output_dir / TOKENIZER_FOLDER / "tokenizer.json",
            rule=text_rule(config),
            validation_fraction=config.validation_fraction,
            deduplicate=config.deduplicate,
            work=work,
            pool=pool,
        )


def _make_shards(tasks: list[ShardTask], make: Callable[[ShardTask], Shard], pool: WorkPool) -> list[Shard]:
    shards = []
    with progress_bar("mask and shuffle", sum(task.stop - task.start for task in tasks), " rows") as bar:
        for shard in pool.run_all(make, tasks):
            shards.append(shard)
            bar.update(shard.rows)
    return shards


def _check_free_space(folder: Path, tasks: list[ShardTask], row_bytes: int) -> None:
    missing = sum(task.stop - task.start for task in tasks if not (folder / task.file).exists()) * row_bytes
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise UserError(
            f"the shards still need {missing / 1e9:,.1f} GB in {folder}, where {free / 1e9:,.1f} GB are free: "
            "make room and run the same command again, which goes on from here"
        )


def _prepare_tokenizer(config: DataConfig, folder: Path) -> "PreTrainedTokenizerFast":
    """The folder's own tokenizer, put there first if this is the first run."""
    if not folder.exists():
        if config.tokenizer == TRAIN_A_TOKENIZER:
            tokenizer = train_on_sources(config.sources, config.vocab_size, config.min_document_characters)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        with atomic_path(folder) as temporary:
            save_tokenizer(tokenizer, temporary, config.max_seq_length)
    return load_tokenizer(str(folder))


def _manifest(
    config: DataConfig,
    corpus: Corpus,
    output_dir: Path,
    rule: RowRule,
    shards: list[Shard],
    sources: list[dict[str, Any]],
) -> dict[str, Any]:
    return {
        "num_documents": corpus.num_documents,
        "num_validation_documents": corpus.num_validation_documents,
        "num_sequences": corpus.num_sequences,
        "num_validation_sequences": corpus.num_validation_sequences,
        "num_tokens": corpus.num_tokens,
        "padding_share": round(padding_share(corpus.num_tokens, corpus.num_sequences, config.max_seq_length), 4),
        "cleaning": corpus.counts,
        "dupe_factor": config.dupe_factor,
        "max_seq_length": config.max_seq_length,
        "max_predictions_per_seq": config.max_predictions_per_seq,
        "vocab_size": len(rule.vocabulary.special),
        "pad_token_id": rule.vocabulary.pad_id,
        "tokenizer_sha256": _tokenizer_sha256(output_dir),
        "shards": [asdict(shard) for shard in shards],
        "sources": sources,
        "config": {name: value for name, value in asdict(config).items() if name not in _WHERE_IT_RUNS},
    }
