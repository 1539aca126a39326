"""Build a data folder: text -> token files (pass 1) -> masked, globally shuffled shards (pass 2) -> manifest.

Everything appears under its name when it is whole, and the manifest comes last, so a build that was killed goes on
where it was, with the same bytes.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.folders import (
    atomic_path,
    check_folder,
    claim_folder,
    errors_of_writing,
    is_undamaged,
    only_writer,
    read_json,
    write_json,
)
from data_prep.config import TRAIN_A_TOKENIZER, DataConfig, row_rule, text_rule, vocabulary_of
from data_prep.corpus import Corpus, tokenize_corpus
from data_prep.documents import Block, read_blocks, total_bytes
from data_prep.executors import WorkPool, open_pool
from data_prep.progress import progress_bar
from data_prep.rows import RowRule, ShardTask, make_shard, note_shard, plan_shards
from data_prep.sequences import padding_share
from data_prep.shards import (
    MANIFEST_FILE,
    TOKENIZER_FOLDER,
    Shard,
    bytes_per_row,
    read_manifest,
    tokenizer_digests,
)
from data_prep.sources import Record, check_same_sources, check_same_versions, describe, pin_sources, require_text
from data_prep.tokenizer import load_tokenizer, save_tokenizer, train_on_sources, vocabulary_size

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
    recorded = _recorded_sources(output_dir)
    pinned = replace(config, sources=pin_sources(config.sources, recorded))
    sources = _check_input(pinned, output_dir, recorded)
    with errors_of_writing(output_dir):
        output_dir.mkdir(parents=True, exist_ok=True)
        with only_writer(output_dir):
            claim_folder(output_dir, config, _WHERE_IT_RUNS)
            _finish(pinned, output_dir, sources)
            shutil.rmtree(output_dir / "work", ignore_errors=True)
    return read_manifest(output_dir).content


def _recorded_sources(folder: Path) -> Record | None:
    """What an earlier run noted about the sources."""
    if (folder / MANIFEST_FILE).exists():
        manifest = _recorded_manifest(folder)
        return {key: manifest[key] for key in ("sources", "versions")}
    record = folder / "work" / _SOURCES_FILE
    return read_json(record, "give another --output_dir") if record.exists() else None


def _recorded_manifest(folder: Path) -> dict[str, Any]:
    advice = "delete it and build again"
    manifest = read_json(folder / MANIFEST_FILE, advice)
    if not isinstance(manifest, dict) or not {"sources", "versions", "shards", "tokenizer_files"} <= manifest.keys():
        raise UserError(f"{folder / MANIFEST_FILE} is damaged: {advice}")
    return manifest


def _check_input(config: DataConfig, folder: Path, recorded: Record | None) -> Record:
    """What is not there, or no longer what it was, is told before anything is written; returns what is there."""
    if recorded and (folder / MANIFEST_FILE).exists():
        try:
            sources = describe(config.sources)
        except UserError:  # a folder that is whole no longer needs them
            return recorded
        check_same_sources(recorded, sources, folder)
        return sources
    require_text(config.sources, folder)
    if config.tokenizer != TRAIN_A_TOKENIZER:
        tokenizer = load_tokenizer(config.tokenizer)
        vocabulary_of(tokenizer, config.whole_word_masking)
        _check_same_tokenizer(tokenizer, config.tokenizer, folder / TOKENIZER_FOLDER)
    sources = describe(config.sources)
    if recorded:
        check_same_sources(recorded, sources, folder)
        check_same_versions(recorded, sources, folder)
    return sources


def _check_same_tokenizer(tokenizer: "PreTrainedTokenizerFast", name: str, kept: Path) -> None:
    if kept.exists() and (load_tokenizer(str(kept)).backend_tokenizer.to_str() != tokenizer.backend_tokenizer.to_str()):
        raise UserError(f"{name} changed since {kept} was made of it: put it back, or give another --output_dir")


def _finish(config: DataConfig, output_dir: Path, sources: Record) -> None:
    """Make what is missing or damaged."""
    if not (output_dir / MANIFEST_FILE).exists():
        write_json(output_dir / MANIFEST_FILE, _make(config, output_dir, sources, None))
        return
    manifest = _recorded_manifest(output_dir)
    damaged = _damaged_files(output_dir, manifest)
    if damaged:
        for shard in manifest["shards"]:
            if shard["file"] not in damaged:
                note_shard(output_dir / "work", shard["file"], shard["sha256"])
        try:
            _make(config, output_dir, sources, manifest)
        except UserError:
            shutil.rmtree(output_dir / "work")  # it may hold the tokens of another text
            raise


def _damaged_files(folder: Path, manifest: dict[str, Any]) -> set[str]:
    """Shards and files of the tokenizer that are not as the manifest says."""
    digests = {shard["file"]: shard["sha256"] for shard in manifest["shards"]}
    digests |= {f"{TOKENIZER_FOLDER}/{name}": digest for name, digest in manifest["tokenizer_files"].items()}
    return {name for name, digest in digests.items() if not is_undamaged(folder / name, digest)}


def _make(config: DataConfig, output_dir: Path, sources: Record, manifest: dict[str, Any] | None) -> dict[str, Any]:
    """Both passes; with the ``manifest`` of an earlier build, to exactly what that says. Returns the manifest."""
    work = output_dir / "work"
    write_json(work / _SOURCES_FILE, sources)
    tokenizer = _prepare_tokenizer(config, output_dir / TOKENIZER_FOLDER, manifest)
    rule = row_rule(config, tokenizer)
    row_bytes = bytes_per_row(config.max_seq_length, config.max_predictions_per_seq, vocabulary_size(tokenizer))
    with open_pool(config.executor, config.num_workers, config.scheduler) as pool:
        corpus = _tokenize(config, output_dir, work, pool)
        tasks = plan_shards(corpus, config.dupe_factor, config.rows_per_shard)
        if manifest:
            tasks = _as_recorded(tasks, manifest, output_dir)
        _check_free_space(output_dir, tasks, row_bytes)
        shards = _make_shards(tasks, partial(make_shard, output_dir=output_dir, work=work, rule=rule), pool)
    return _manifest(config, corpus, output_dir, rule, shards, sources)


def _as_recorded(tasks: list[ShardTask], manifest: dict[str, Any], folder: Path) -> list[ShardTask]:
    """The tasks with the digests that have to come out."""
    recorded = {shard["file"]: shard for shard in manifest["shards"]}
    if {task.file: task.stop - task.start for task in tasks} != {name: s["rows"] for name, s in recorded.items()}:
        raise UserError(f"{folder} can't be mended: its sources are no longer the same text, so build anew elsewhere")
    return [replace(task, sha256=recorded[task.file]["sha256"]) for task in tasks]


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


def _prepare_tokenizer(config: DataConfig, folder: Path, manifest: dict[str, Any] | None) -> "PreTrainedTokenizerFast":
    """The folder's own tokenizer, put there first if it is not there or damaged."""
    if not folder.exists() or (manifest and tokenizer_digests(folder) != manifest["tokenizer_files"]):
        if config.tokenizer == TRAIN_A_TOKENIZER:
            tokenizer = train_on_sources(config.sources, config.vocab_size, config.min_document_characters)
        else:
            tokenizer = load_tokenizer(config.tokenizer)
        with atomic_path(folder) as temporary:
            save_tokenizer(tokenizer, temporary, config.max_seq_length)
            if manifest and tokenizer_digests(temporary) != manifest["tokenizer_files"]:
                raise UserError(f"{folder} can't be mended: {config.tokenizer} is no longer what it was made of")
    return load_tokenizer(str(folder))


def _manifest(
    config: DataConfig,
    corpus: Corpus,
    output_dir: Path,
    rule: RowRule,
    shards: list[Shard],
    sources: Record,
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
        "tokenizer_sha256": tokenizer_digests(output_dir / TOKENIZER_FOLDER)["tokenizer.json"],
        "tokenizer_files": tokenizer_digests(output_dir / TOKENIZER_FOLDER),
        "shards": [asdict(shard) for shard in shards],
        **sources,
        "config": {name: value for name, value in asdict(config).items() if name not in _WHERE_IT_RUNS},
    }
