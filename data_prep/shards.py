"""The shard format and the folder around it: HDF5 files and a manifest that lists them.

A shard holds, contiguous and uncompressed, for N rows of one split:

    input_ids            uint16 or uint32  [N, max_seq_length]           masks in place, [PAD] behind the sequence
    sequence_length      uint16            [N]                           [CLS] and [SEP] counted
    masked_lm_positions  uint8 or uint16   [N, max_predictions_per_seq]  0 = unused ([CLS] is never masked)
    masked_lm_ids        uint16 or uint32  [N, max_predictions_per_seq]  the original tokens, 0 = unused

The manifest is written last: a folder without one is incomplete.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from common.errors import UserError
from common.folders import atomic_path, read_json, require_folder, sha256_of_file

MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
Split = Literal["train", "validation"]


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a split; shapes as in the module's docstring."""

    input_ids: np.ndarray
    sequence_length: np.ndarray
    masked_lm_positions: np.ndarray
    masked_lm_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: slice) -> "Rows":
        return Rows(*(getattr(self, name)[index] for name in FIELDS))


FIELDS = tuple(Rows.__dataclass_fields__)


def concatenate(parts: list[Rows]) -> Rows:
    """Rows one after the other."""
    if len(parts) == 1:
        return parts[0]
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in FIELDS))


@dataclass(frozen=True)
class Shard:
    """One line of the manifest."""

    file: str
    split: Split
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A complete data folder. ``content`` is the manifest file as read; the fields are what training needs of it."""

    folder: Path
    shards: tuple[Shard, ...]
    vocab_size: int
    max_seq_length: int
    max_predictions_per_seq: int
    pad_token_id: int
    tokenizer_sha256: str
    content: dict[str, Any]

    @property
    def tokenizer_folder(self) -> Path:
        """Where the tokenizer's files lie."""
        return self.folder / TOKENIZER_FOLDER

    def of_split(self, split: Split) -> list[Shard]:
        """The split's shards, in order."""
        return [shard for shard in self.shards if shard.split == split]

    @property
    def sha256(self) -> str:
        """What identifies this data set."""
        return sha256_of_file(self.folder / MANIFEST_FILE)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check that the tokenizer beside it is the one that made the shards.

    Raises:
        UserError: no such folder, an incomplete one, a damaged manifest or another tokenizer.
    """
    require_folder(folder, "data folder")
    advice = "the data folder is not complete, run `python -m data_prep build` on it"
    content = read_json(folder / MANIFEST_FILE, advice)
    try:
        manifest = Manifest(
            folder=folder,
            shards=tuple(Shard(**shard) for shard in content["shards"]),
            content=content,
            vocab_size=content["vocab_size"],
            max_seq_length=content["max_seq_length"],
            max_predictions_per_seq=content["max_predictions_per_seq"],
            pad_token_id=content["pad_token_id"],
            tokenizer_sha256=content["tokenizer_sha256"],
        )
    except (KeyError, TypeError) as error:
        raise UserError(f"{folder / MANIFEST_FILE} is not a manifest of ours ({error!r}): {advice}") from None
    tokenizer_file = manifest.tokenizer_folder / "tokenizer.json"
    if not tokenizer_file.is_file() or sha256_of_file(tokenizer_file) != manifest.tokenizer_sha256:
        raise UserError(f"{tokenizer_file} is missing or not the tokenizer that made the shards: run build again")
    return manifest


def write_shard(path: Path, rows: Iterator[Rows], num_rows: int) -> str:
    """Write ``num_rows`` rows, which arrive in chunks, to one shard, whole or not at all; returns its SHA-256."""
    with atomic_path(path) as temporary:
        with h5py.File(temporary, "w") as file:
            start = 0
            for chunk in rows:
                for name in FIELDS:
                    array = getattr(chunk, name)
                    if start == 0:
                        file.create_dataset(name, shape=(num_rows, *array.shape[1:]), dtype=array.dtype)
                    file[name][start : start + len(chunk)] = array
                start += len(chunk)
        return sha256_of_file(temporary)


class SplitReader:
    """Rows of one split by their number in the order of its shards. Open it in the process that reads, never across a
    fork.

    Raises:
        UserError: a shard is missing, damaged, or has other rows than the manifest says.
    """

    def __init__(self, manifest: Manifest, split: Split) -> None:
        self._files = [_open(manifest, shard) for shard in manifest.of_split(split)]
        self._starts = np.cumsum([0] + [shard.rows for shard in manifest.of_split(split)])
        self.num_rows = int(self._starts[-1])
        if not self.num_rows:
            raise UserError(f"data folder {manifest.folder} has no {split} rows")

    @property
    def shard_rows(self) -> list[int]:
        """Rows of each shard."""
        return np.diff(self._starts).tolist()

    def read(self, shard: int, start: int, stop: int) -> Rows:
        """Rows [start, stop) of one shard."""
        file = self._files[shard]
        return Rows(*(file[name][start:stop] for name in FIELDS))

    def count_predictions(self, shard: int, start: int, stop: int) -> int:
        """Predictions in rows [start, stop) of one shard."""
        return int(np.count_nonzero(self._files[shard]["masked_lm_positions"][start:stop]))

    def read_range(self, start: int, stop: int) -> Rows:
        """Rows [start, stop) of the split, across shards."""
        parts = []
        while start < stop:
            shard = int(np.searchsorted(self._starts, start, side="right")) - 1
            end = min(stop, int(self._starts[shard + 1]))
            parts.append(self.read(shard, start - int(self._starts[shard]), end - int(self._starts[shard])))
            start = end
        return concatenate(parts)

    def close(self) -> None:
        """Close the files."""
        for file in self._files:
            file.close()


def _open(manifest: Manifest, shard: Shard) -> h5py.File:
    path = manifest.folder / shard.file
    advice = "delete it and run `python -m data_prep build` again, which makes just what is missing"
    try:
        file = h5py.File(path, "r")
        rows = {len(file[name]) for name in FIELDS}
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: run `python -m data_prep build` again") from None
    except (OSError, KeyError) as error:
        raise UserError(f"shard {path} is damaged ({error}): {advice}") from None
    if rows != {shard.rows}:
        raise UserError(f"shard {path} has {sorted(rows)} rows, the manifest says {shard.rows}: {advice}")
    return file
