"""Input files: found in an order that never changes, and read as one stream of bytes whatever their compression."""

import bz2
import contextlib
import gzip
import hashlib
import lzma
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from common.errors import UserError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

_OPENERS = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": zstd.open}
COMPRESSIONS = tuple(_OPENERS)
_DAMAGES = (OSError, EOFError, zlib.error, lzma.LZMAError, zstd.ZstdError)
_ENDS = 1 << 16


def find_files(path: str, endings: tuple[str, ...]) -> list[Path]:
    """The files that a source's path stands for, sorted: a file, a folder (all in it that end like ``endings``,
    compressed or not, at any depth) or a glob. Links to folders are not followed, so that a loop of them ends.

    Raises:
        UserError: there are none.
    """
    place = Path(path)
    try:
        if place.is_file():
            return [place]
        if place.is_dir():
            allowed = tuple(ending + compression for ending in endings for compression in ("", *COMPRESSIONS))
            files = [file for file in _files_below(place) if file.name.endswith(allowed)]
        else:
            files = list(Path(place.anchor).glob(str(place.relative_to(place.anchor))))
        files = sorted(file for file in files if file.is_file() and not file.name.startswith("."))
    except (OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"can't look for files at '{path}': {error}") from None
    if not files:
        kinds = " or ".join(f"*{ending}" for ending in endings)
        there = f"holds no {kinds} file" if place.is_dir() else "matches no file"
        raise UserError(f"source path '{path}' {there}: give a file, a folder or a glob")
    return files


def _files_below(folder: Path) -> list[Path]:
    """All files at any depth, hidden folders left out; a folder that can't be read is an error, not an omission."""

    def fail(error: OSError) -> None:
        raise error

    found = []
    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(where) / name for name in names]
    return found


class InputStream:
    """The decompressed bytes of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: BinaryIO = path.open("rb")
        except OSError as error:
            raise UserError(f"can't read {path}: {error.strerror}") from None
        self._bytes: Any = _OPENERS[path.suffix](self._file) if path.suffix in _OPENERS else self._file

    def read(self, size: int) -> bytes:
        """The next ``size`` bytes, fewer only at the end.

        Raises:
            UserError: the file is damaged, or no longer there.
        """
        parts = []
        while size > 0 and (part := self._read_some(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def _read_some(self, size: int) -> bytes:
        try:
            return self._bytes.read(size)
        except _DAMAGES as error:
            raise UserError(f"can't read {self.path} ({error or type(error).__name__}): it seems damaged") from None

    @property
    def position(self) -> int:
        """Bytes of the file, as it lies on disk, that are consumed."""
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._bytes.close()
        self._file.close()


@contextlib.contextmanager
def open_stream(path: Path) -> Iterator[InputStream]:
    """Open a file for reading, decompressed by its ending (.gz .bz2 .xz .zst)."""
    stream = InputStream(path)
    try:
        yield stream
    finally:
        stream.close()


def describe_file(path: Path) -> dict[str, Any]:
    """What tells, at once, whether a file is still the one it was: its size and a digest of its two ends.

    Raises:
        UserError: it can't be read.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(_ENDS)
            file.seek(max(0, size - _ENDS), os.SEEK_SET)
            digest = hashlib.sha256(head + file.read(_ENDS)).hexdigest()
    except OSError as error:
        raise UserError(f"can't read {path}: {error.strerror}") from None
    return {"file": str(path), "bytes": size, "sha256_of_ends": digest}
