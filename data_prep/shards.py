"""The shard format and the folder around it: HDF5 files and a manifest that lists them.

A shard holds, contiguous and uncompressed, for N rows of one split:

    input_ids            uint16 or uint32  [N, max_seq_length]           masks in place, [PAD] behind the sequence
    sequence_length      uint16            [N]                           [CLS] and [SEP] counted
    masked_lm_positions  uint8 or uint16   [N, max_predictions_per_seq]  0 = unused ([CLS] is never masked)
    masked_lm_ids        uint16 or uint32  [N, max_predictions_per_seq]  the original tokens, 0 = unused

The manifest is written last: a folder without one is incomplete.

Read and written too is the layout of NVIDIA's DeepLearningExamples (PyTorch/LanguageModeling/BERT,
``create_pretraining_data.py`` and ``run_pretraining.py``), which 24hBERT shares (IntelLabs/academic-budget-bert). All
datasets are compressed with gzip:

    input_ids, masked_lm_positions, masked_lm_ids  int32  as above
    input_mask                                     int8   [N, max_seq_length]  1 where there is a token
    segment_ids                                    int8   [N, max_seq_length]  1 in the second text of a pair
    next_sentence_labels                           int8   [N]                  0 or 1; we write 0 and read none
"""

import contextlib
import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np

from common.errors import UserError
from common.folders import atomic_path, read_json, require_folder, sha256_of_file

MANIFEST_FILE = "manifest.json"
TOKENIZER_FOLDER = "tokenizer"
SHARD_SUFFIXES = (".h5", ".hdf5")
Split = Literal["train", "validation"]

_OPEN_FILES = 16  # at once, of what may be thousands of shards
_NVIDIA_FIELDS = ("input_ids", "input_mask", "segment_ids", "masked_lm_positions", "masked_lm_ids")
_NVIDIA_BLOCK_ROWS = 16384  # several times the rows that a chunk of such a file spans, so that few are unpacked twice
_GZIP_CHUNK_ROWS = 512
# Against gzip's usual level 4 without the shuffle filter, which is a part of HDF5: 1.7 times as fast to write, 9 %
# smaller, and no slower to read.
_GZIP = {"compression": "gzip", "compression_opts": 1, "shuffle": True}


@dataclass(frozen=True)
class RowSizes:
    """What rows hold, int64 [N] each."""

    tokens: np.ndarray
    """[CLS] and [SEP] counted."""
    predictions: np.ndarray


@dataclass(frozen=True)
class Rows:
    """Consecutive rows of a split; shapes as in the module's docstring."""

    input_ids: np.ndarray
    sequence_length: np.ndarray
    masked_lm_positions: np.ndarray
    masked_lm_ids: np.ndarray

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: slice | np.ndarray) -> "Rows":
        return Rows(*(getattr(self, name)[index] for name in FIELDS))

    @property
    def sizes(self) -> RowSizes:
        """What each row holds."""
        return row_sizes(self.sequence_length, self.masked_lm_positions)


FIELDS = tuple(Rows.__dataclass_fields__)


def row_sizes(sequence_length: np.ndarray, masked_lm_positions: np.ndarray) -> RowSizes:
    """Sizes of rows, from their columns."""
    return RowSizes(sequence_length.astype(np.int64), np.count_nonzero(masked_lm_positions, axis=1))


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

    @property
    def remedy(self) -> str:
        """What to do about files that are missing or not as they were."""
        if self.content.get("indexed"):
            return "put back what was indexed, or delete manifest.json and run `python -m data_prep index` again"
        return "run `python -m data_prep build` again, which makes just what is missing or damaged"


def shard_files(folder: Path) -> set[str]:
    """Names of all files in a folder that look like shards."""
    return {path.name for path in folder.iterdir() if path.suffix in SHARD_SUFFIXES and not path.name.startswith(".")}


def tokenizer_digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file of a tokenizer."""
    return {path.name: sha256_of_file(path) for path in sorted(folder.iterdir()) if path.is_file()}


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check that the tokenizer beside it is the one that made the shards.

    Raises:
        UserError: no such folder, an incomplete one, a damaged manifest or another tokenizer.
    """
    require_folder(folder, "data folder")
    advice = (
        "the data folder is not complete, run `python -m data_prep build` on it, "
        "or `python -m data_prep index` if its shards are NVIDIA's or 24hBERT's"
    )
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
        raise UserError(f"{tokenizer_file} is missing or not the tokenizer that made the shards: {manifest.remedy}")
    return manifest


def token_type(vocab_size: int) -> type[np.unsignedinteger]:
    """The type of token ids in a shard."""
    return np.uint16 if vocab_size <= 2**16 else np.uint32


def position_type(max_seq_length: int) -> type[np.unsignedinteger]:
    """The type of positions in a shard."""
    return np.uint8 if max_seq_length <= 2**8 else np.uint16


def bytes_per_row(max_seq_length: int, max_predictions_per_seq: int, vocab_size: int) -> int:
    """Size of a row, in a shard and in memory."""
    token, position, length = (
        np.dtype(kind).itemsize for kind in (token_type(vocab_size), position_type(max_seq_length), np.uint16)
    )
    return max_seq_length * token + length + max_predictions_per_seq * (position + token)


def write_shard(path: Path, rows: Iterable[Rows], num_rows: int, sha256: str | None = None) -> str:
    """Write ``num_rows`` rows, which arrive in chunks, to one shard, whole or not at all; returns its SHA-256.

    Raises:
        OSError: the disk is full.
        UserError: it does not come out with the ``sha256`` that is expected.
    """
    with atomic_path(path) as temporary:
        chunks = iter(rows)
        first = next(chunks)
        places = _lay_out(temporary, first, num_rows)
        with temporary.open("r+b", buffering=0) as file:
            # HDF5 does not survive a full disk, so the room is asked for here and filled without its help.
            os.posix_fallocate(file.fileno(), 0, temporary.stat().st_size)
            start = 0
            for chunk in itertools.chain([first], chunks):
                for name, array in vars(chunk).items():
                    file.seek(places[name] + start * array[0].nbytes)
                    file.write(np.ascontiguousarray(array).data)
                start += len(chunk)
        digest = sha256_of_file(temporary)
        if sha256 not in (None, digest):
            raise UserError(
                f"shard {path} can't be made again as it was: the sources or libraries changed, so build anew elsewhere"
            )
        return digest


def _lay_out(path: Path, example: Rows, num_rows: int) -> dict[str, int]:
    """Make the file with room for all rows; returns where each dataset's bytes begin."""
    places = {}
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    properties.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    properties.set_obj_track_times(False)  # the same rows make the same bytes
    with h5py.File(path, "w") as file:
        for name, array in vars(example).items():
            space = h5py.h5s.create_simple((num_rows, *array.shape[1:]))
            dataset = h5py.h5d.create(file.id, name.encode(), h5py.h5t.py_create(array.dtype), space, properties)
            places[name] = dataset.get_offset()
    return places


def write_nvidia_shard(path: Path, rows: Iterable[Rows], num_rows: int) -> None:
    """Write ``num_rows`` rows, which arrive in chunks, in NVIDIA's layout, whole or not at all."""
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        start = 0
        for chunk in map(_to_nvidia, rows):
            for name, array in chunk.items():
                if start == 0:
                    shape, chunk_rows = (num_rows, *array.shape[1:]), min(_GZIP_CHUNK_ROWS, num_rows)
                    file.create_dataset(name, shape, array.dtype, chunks=(chunk_rows, *shape[1:]), **_GZIP)
                file[name][start : start + len(array)] = array
            start += len(chunk["input_ids"])


def _to_nvidia(rows: Rows) -> dict[str, np.ndarray]:
    inside = np.arange(rows.input_ids.shape[1]) < rows.sequence_length[:, None]
    return {
        "input_ids": rows.input_ids.astype(np.int32),
        "input_mask": inside.astype(np.int8),
        "segment_ids": np.zeros(inside.shape, dtype=np.int8),
        "masked_lm_positions": rows.masked_lm_positions.astype(np.int32),
        "masked_lm_ids": rows.masked_lm_ids.astype(np.int32),
        "next_sentence_labels": np.zeros(len(rows), dtype=np.int8),
    }


@contextlib.contextmanager
def open_nvidia_shard(path: Path) -> Iterator[dict[str, h5py.Dataset]]:
    """The datasets of a shard in NVIDIA's layout, by name; their contents are not checked.

    Raises:
        UserError: it is not an HDF5 file, not in this layout, or turns out to be damaged while it is read.
    """
    try:
        with h5py.File(path, "r") as file:
            datasets = {name: file[name] for name in _NVIDIA_FIELDS if isinstance(file.get(name), h5py.Dataset)}
            if missing := [name for name in _NVIDIA_FIELDS if name not in datasets]:
                raise UserError(f"{path} is not a shard in NVIDIA's or 24hBERT's layout: it has no {missing[0]}")
            _check_shapes(path, {name: dataset.shape for name, dataset in datasets.items()})
            yield datasets
    except OSError as error:
        raise UserError(f"{path} is not an HDF5 file, or damaged ({error})") from None


def _check_shapes(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    length, predictions = shapes["input_ids"][1:], shapes["masked_lm_positions"][1:]
    columns = dict.fromkeys(("input_ids", "input_mask", "segment_ids"), length)
    columns |= dict.fromkeys(("masked_lm_positions", "masked_lm_ids"), predictions)
    rows = shapes["input_ids"][:1]
    fit = len(length) == len(predictions) == 1 and all(shapes[name] == rows + columns[name] for name in columns)
    if not fit or rows == (0,):
        described = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise UserError(f"the datasets of {path} are empty or don't fit together: {described}")


class SplitReader:
    """Rows of one split by their number in the order of its shards. Open it in the process that reads, never across a
    fork.

    Raises:
        UserError: a shard is missing, damaged, or has other rows than the manifest says.
    """

    def __init__(self, manifest: Manifest, split: Split) -> None:
        self._manifest = manifest
        self._shards = manifest.of_split(split)
        for shard in self._shards:
            _open(manifest, shard).close()
        self._file = lru_cache(maxsize=_OPEN_FILES)(lambda shard: _open(manifest, self._shards[shard]))
        self._read_nvidia_block = lru_cache(maxsize=2)(self._unpack_nvidia_block)
        self._starts = np.cumsum([0] + [shard.rows for shard in self._shards])
        self.num_rows = int(self._starts[-1])
        if not self.num_rows:
            raise UserError(f"data folder {manifest.folder} has no {split} rows")

    @property
    def shard_rows(self) -> list[int]:
        """Rows of each shard."""
        return np.diff(self._starts).tolist()

    def read(self, shard: int, start: int, stop: int) -> Rows:
        """Rows [start, stop) of one shard."""
        file = self._file(shard)
        if not _is_nvidia(file):
            return Rows(*(file[name][start:stop] for name in FIELDS))
        size = _NVIDIA_BLOCK_ROWS
        return concatenate(
            [
                self._read_nvidia_block(shard, first)[max(start - first, 0) : stop - first]
                for first in range(start - start % size, stop, size)
            ]
        )

    def _unpack_nvidia_block(self, shard: int, first: int) -> Rows:
        """Rows from ``first`` on as ours: unpacked by the block, as a chunk of the file spans thousands of rows."""
        file, block = self._file(shard), slice(first, first + _NVIDIA_BLOCK_ROWS)
        token, position = token_type(self._manifest.vocab_size), position_type(self._manifest.max_seq_length)
        return Rows(
            input_ids=file["input_ids"][block].astype(token),
            sequence_length=file["input_mask"][block].sum(axis=1).astype(np.uint16),
            masked_lm_positions=file["masked_lm_positions"][block].astype(position),
            masked_lm_ids=file["masked_lm_ids"][block].astype(token),
        )

    def read_sizes(self, shard: int, start: int, stop: int) -> RowSizes:
        """What rows [start, stop) of one shard hold, without reading their tokens."""
        file = self._file(shard)
        if _is_nvidia(file):
            return self.read(shard, start, stop).sizes
        return row_sizes(file["sequence_length"][start:stop], file["masked_lm_positions"][start:stop])

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
        self._file.cache_clear()  # h5py closes a file that nothing refers to


def _open(manifest: Manifest, shard: Shard) -> h5py.File:
    path = manifest.folder / shard.file
    try:
        file = h5py.File(path, "r")
        rows = {len(file[name]) for name in (_NVIDIA_FIELDS if _is_nvidia(file) else FIELDS)}
    except FileNotFoundError:
        raise UserError(f"shard {path} is missing: {manifest.remedy}") from None
    except (OSError, KeyError) as error:
        if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE, errno.EACCES):
            raise UserError(f"can't open shard {path}: {os.strerror(error.errno)}") from None
        raise UserError(f"shard {path} is damaged ({error}): {manifest.remedy}") from None
    widths = [file[name].shape[1:] for name in ("input_ids", "masked_lm_positions")]
    if widths != [(manifest.max_seq_length,), (manifest.max_predictions_per_seq,)]:
        raise UserError(
            f"shard {path} has rows of {widths[0][0]} tokens and {widths[1][0]} predictions, the manifest says "
            f"{manifest.max_seq_length} and {manifest.max_predictions_per_seq}: {manifest.remedy}"
        )
    if rows != {shard.rows}:
        raise UserError(f"shard {path} has {sorted(rows)} rows, the manifest says {shard.rows}: {manifest.remedy}")
    return file


def _is_nvidia(file: h5py.File) -> bool:
    return "input_mask" in file
