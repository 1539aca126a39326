"""Interchange with the trainers of NVIDIA's DeepLearningExamples and of 24hBERT, whose shards have one layout.

:func:`convert` writes a data folder's rows for them; :func:`index` makes a folder of theirs a data folder, with the
shards as they are. Their trainers choose files by name: NVIDIA's takes those with ``training`` in it, 24hBERT's those
with ``train``, and with ``test`` for validation.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tokenizers
from tqdm import tqdm

from common.errors import UserError
from common.folders import (
    atomic_path,
    claim_folder,
    errors_of_writing,
    only_writer,
    read_json,
    require_folder,
    sha256_of_file,
    write_json,
    write_text,
)
from data_prep.sequences import SPECIAL_TOKENS_PER_SEQUENCE
from data_prep.shards import (
    MANIFEST_FILE,
    SHARD_SUFFIXES,
    TOKENIZER_FOLDER,
    Manifest,
    Rows,
    Shard,
    Split,
    SplitReader,
    open_nvidia_shard,
    read_manifest,
    shard_files,
    write_nvidia_shard,
)
from data_prep.tokenizer import load_tokenizer, save_tokenizer, vocabulary_size

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_FILE_NAMES: dict[Split, str] = {"train": "training_shard_{:05d}.hdf5", "validation": "test_shard_{:05d}.hdf5"}
_HELD_OUT = re.compile(r"(?<![a-z])(test|valid|dev)")  # not the 'test' in 'latest'
_ROWS_AT_ONCE = 16384


@dataclass(frozen=True)
class Conversion:
    """What a converted folder is made of."""

    data_folder: str
    manifest_sha256: str


def convert(data_dir: Path, output_dir: Path) -> None:
    """Write the shards of ``data_dir`` to ``output_dir`` in NVIDIA's layout, or those that are not there yet.

    A ``vocab.txt`` lies beside them if the tokenizer is a WordPiece one.

    Raises:
        UserError: no data folder, or an output folder of something else.
    """
    manifest = read_manifest(data_dir)
    claim_folder(output_dir, Conversion(str(data_dir), manifest.sha256), may_change=("data_folder",))
    with errors_of_writing(output_dir), only_writer(output_dir):
        _write_vocabulary(load_tokenizer(str(manifest.tokenizer_folder)), output_dir / "vocab.txt")
        with tqdm(total=sum(shard.rows for shard in manifest.shards), desc="rows", disable=None) as bar:
            for split in _FILE_NAMES:
                _convert_split(manifest, split, output_dir, bar)


def _convert_split(manifest: Manifest, split: Split, output_dir: Path, bar: tqdm) -> None:
    reader = SplitReader(manifest, split)
    for shard, num_rows in enumerate(reader.shard_rows):
        path = output_dir / _FILE_NAMES[split].format(shard)
        if path.exists():
            bar.update(num_rows)
        else:
            write_nvidia_shard(path, _shard_rows(reader, shard, bar), num_rows)
    reader.close()


def _shard_rows(reader: SplitReader, shard: int, bar: tqdm) -> Iterator[Rows]:
    num_rows = reader.shard_rows[shard]
    for start in range(0, num_rows, _ROWS_AT_ONCE):
        rows = reader.read(shard, start, min(start + _ROWS_AT_ONCE, num_rows))
        yield rows
        bar.update(len(rows))


def _write_vocabulary(tokenizer: "PreTrainedTokenizerFast", path: Path) -> None:
    if isinstance(tokenizer.backend_tokenizer.model, tokenizers.models.WordPiece):
        ids = tokenizer.get_vocab()
        write_text(path, "".join(f"{token}\n" for token in sorted(ids, key=ids.__getitem__)))


def index(folder: Path, tokenizer_name: str) -> Manifest:
    """Make a folder of shards in NVIDIA's layout a data folder: every row is checked, and a manifest written last.

    Pairs of texts become one text, as our models have one segment only; the manifest's ``num_pairs`` tells how many.
    The shards tell neither documents (``num_documents`` is 0) nor which rows are copies of one sequence.

    Args:
        folder: the shards, told apart as training and validation by their names.
        tokenizer_name: the tokenizer that made them, as for :func:`data_prep.tokenizer.load_tokenizer`.

    Raises:
        UserError: no such shards, shards that don't fit each other or the tokenizer, or a folder of something else.
    """
    files = _find_shards(require_folder(folder, "shard folder"))
    tokenizer = load_tokenizer(tokenizer_name)
    max_seq_length, max_predictions_per_seq = _common_shape(list(files))
    if not os.access(folder, os.W_OK):
        raise UserError(f"can't write to {folder}, where the manifest goes: link the shards into a folder of yours")
    with only_writer(folder):
        shards, counts = _read_shards(files, tokenizer)
        content = {
            "indexed": True,
            "num_documents": 0,
            "num_sequences": counts["rows"],
            "num_validation_sequences": sum(shard.rows for shard in shards if shard.split == "validation"),
            "num_tokens": counts["tokens"] - SPECIAL_TOKENS_PER_SEQUENCE * counts["rows"] - counts["pairs"],
            "num_pairs": counts["pairs"],
            "padding_share": round(1 - counts["tokens"] / (counts["rows"] * max_seq_length), 4),
            "dupe_factor": 1,
            "max_seq_length": max_seq_length,
            "max_predictions_per_seq": max_predictions_per_seq,
            "vocab_size": vocabulary_size(tokenizer),
            "pad_token_id": tokenizer.pad_token_id,
            "tokenizer_sha256": _keep_tokenizer(tokenizer, folder / TOKENIZER_FOLDER, max_seq_length),
            "shards": [asdict(shard) for shard in shards],
        }
        _write_manifest(folder / MANIFEST_FILE, content)
    return read_manifest(folder)


def _find_shards(folder: Path) -> dict[Path, Split]:
    """The folder's shards, those to train on first."""
    paths = [folder / name for name in sorted(shard_files(folder))]
    if not paths:
        raise UserError(f"{folder} has no shards (files that end in {' or '.join(SHARD_SUFFIXES)})")
    splits = {path: _split_of(path) for path in paths}
    if "train" not in splits.values():
        raise UserError(f"{folder} has no shards to train on (files with 'train' in their names)")
    if "validation" not in splits.values():
        raise UserError(
            f"{folder} has no validation shard: rename one, for example {paths[-1].name} to test_{len(paths)}.hdf5"
        )
    return dict(sorted(splits.items(), key=lambda item: item[1]))


def _split_of(path: Path) -> Split:
    name = path.name.lower()
    if _HELD_OUT.search(name):
        return "validation"
    if "train" in name:
        return "train"
    raise UserError(f"{path}: training or validation? rename it, with 'train' or 'test' in its name")


def _common_shape(paths: list[Path]) -> tuple[int, int]:
    """(max_seq_length, max_predictions_per_seq) of all shards."""
    shapes = {path: _shape(path) for path in paths}
    first = paths[0]
    for path, (length, predictions) in shapes.items():
        if (length, predictions) != shapes[first]:
            raise UserError(
                f"{path} has rows of {length} tokens and {predictions} predictions, {first.name} of "
                f"{shapes[first][0]} and {shapes[first][1]}: keep shards of one kind in a folder"
            )
    return shapes[first]


def _shape(path: Path) -> tuple[int, int]:
    with open_nvidia_shard(path) as datasets:
        return datasets["input_ids"].shape[1], datasets["masked_lm_positions"].shape[1]


def _read_shards(files: dict[Path, Split], tokenizer: "PreTrainedTokenizerFast") -> tuple[list[Shard], Counter]:
    """Check every row; returns the shards, and how many ``rows``, ``tokens`` and ``pairs`` they hold."""
    shards, counts = [], Counter()
    with tqdm(desc="rows", unit=" rows", disable=None) as bar:
        for path, split in files.items():
            rows_before = counts["rows"]
            for chunk in _chunks(path):
                _check_rows(chunk, path, tokenizer)
                counts["rows"] += len(chunk["input_ids"])
                counts["tokens"] += int(chunk["input_mask"].sum())
                counts["pairs"] += int(chunk["segment_ids"].any(axis=1).sum())
                bar.update(len(chunk["input_ids"]))
            shards.append(Shard(path.name, split, counts["rows"] - rows_before, sha256_of_file(path)))
    return shards, counts


def _chunks(path: Path) -> Iterator[dict[str, np.ndarray]]:
    with open_nvidia_shard(path) as datasets:
        for start in range(0, len(datasets["input_ids"]), _ROWS_AT_ONCE):
            yield {name: dataset[start : start + _ROWS_AT_ONCE] for name, dataset in datasets.items()}


def _check_rows(rows: dict[str, np.ndarray], path: Path, tokenizer: "PreTrainedTokenizerFast") -> None:
    """Refuse rows that training could not read, or would read wrongly."""
    lengths = np.count_nonzero(rows["input_mask"], axis=1)[:, None]
    inside = np.arange(rows["input_mask"].shape[1]) < lengths
    ids = (rows["input_ids"], rows["masked_lm_ids"])
    size = vocabulary_size(tokenizer)
    wrong = {
        "an input_mask that is not ones, then zeros": (rows["input_mask"] != inside).any(),
        f"token ids beyond the tokenizer's {size} tokens; give the tokenizer that made the shards": any(
            ((array < 0) | (array >= size)).any() for array in ids
        ),
        f"rows that don't begin with the tokenizer's {tokenizer.cls_token}; give the tokenizer that made the shards": (
            rows["input_ids"][:, 0] != tokenizer.cls_token_id
        ).any(),
        "masked_lm_positions beyond the end of their rows": (
            (rows["masked_lm_positions"] < 0) | (rows["masked_lm_positions"] >= lengths)
        ).any(),
    }
    for what, found in wrong.items():
        if found:
            raise UserError(f"{path} has {what}")


def _keep_tokenizer(tokenizer: "PreTrainedTokenizerFast", folder: Path, max_seq_length: int) -> str:
    """Write the tokenizer, unless it is there; returns its SHA-256."""
    if not folder.exists():
        with atomic_path(folder) as temporary:
            save_tokenizer(tokenizer, temporary, max_seq_length)
    file = folder / "tokenizer.json"
    advice = f"{folder} is where the tokenizer goes, move what is there elsewhere"
    if read_json(file, advice) != json.loads(tokenizer.backend_tokenizer.to_str()):
        raise UserError(f"{file} is another tokenizer than the one given: {advice}")
    return sha256_of_file(file)


def _write_manifest(path: Path, content: dict[str, Any]) -> None:
    if path.exists() and read_json(path, "delete it") != content:
        raise UserError(f"{path} tells of other shards or another tokenizer: delete it to index the folder anew")
    write_json(path, content)
