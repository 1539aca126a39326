"""Text columns of tables: Parquet files, and the data sets that `datasets` loads."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import UserError
from data_prep.files import COMPRESSIONS, open_stream

_ROWS_AT_ONCE = 1000


def parquet_rows(path: Path, field: str) -> Iterator[tuple[list[str | None], int]]:
    """The texts of one column, in runs of rows, each with its share of the file's bytes.

    Raises:
        UserError: no such column, no text in it, or a damaged file.
    """
    import pyarrow.parquet  # here, because most builds don't need it

    try:
        with _seekable(path) as file:
            table = pyarrow.parquet.ParquetFile(file)
            if field not in table.schema_arrow.names:
                names = ", ".join(table.schema_arrow.names)
                raise UserError(f"{path} has no column '{field}', it has {names}: set the source's field")
            bytes_per_row = path.stat().st_size / max(1, table.metadata.num_rows)
            for batch in table.iter_batches(_ROWS_AT_ONCE, columns=[field]):
                yield _texts(batch.column(0), field, str(path)), round(bytes_per_row * len(batch))
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"can't read {path}: {_first_line(error)}") from None


@contextlib.contextmanager
def _seekable(path: Path) -> Iterator[Any]:
    """Parquet is read from its end: a compressed file is unpacked to a nameless temporary one first."""
    if path.suffix not in COMPRESSIONS:
        with path.open("rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as file, open_stream(path) as stream:
        shutil.copyfileobj(stream, file)
        file.seek(0)
        yield file


def dataset_rows(
    path: str, config: str | None, split: str, revision: str | None, field: str
) -> Iterator[list[str | None]]:
    """The texts of one column of a data set of the hub, of a folder of data files, or of one that was saved to disk.

    Raises:
        UserError: no such data set, configuration, split or column, or the hub can't be reached.
    """
    name = f"data set {path}" + (f" ({config})" if config else "")
    try:
        rows = _open_dataset(path, config, split, revision)
        if rows.column_names and field not in rows.column_names:
            raise UserError(f"{name} has no column '{field}', it has {', '.join(rows.column_names)}: set 'field'")
        for table in rows.select_columns([field]).with_format("arrow").iter(batch_size=_ROWS_AT_ONCE):
            yield _texts(table.column(field), field, name)
    except UserError:
        raise
    except KeyError as error:
        raise UserError(f"{name} has no split or column {error}: set the source's split or field") from None
    except Exception as error:  # whatever `datasets`, the hub's client and its transport raise
        raise UserError(f"can't read {name}: {_first_line(error)}") from None


def _open_dataset(path: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets  # here, because it takes seconds to import and most builds don't need it

    if is_saved_dataset(Path(path)):
        saved = datasets.load_from_disk(path)
        return saved[split] if isinstance(saved, datasets.DatasetDict) else saved
    return datasets.load_dataset(path, config, split=split, revision=revision, streaming=True)


def count_rows(path: str, config: str | None, split: str, revision: str | None) -> int | None:
    """Rows of a data set's split, where it tells them without being read."""
    if is_saved_dataset(Path(path)):
        return len(_open_dataset(path, config, split, revision))
    info = _split_info(path, config, split, revision)
    return info and info.num_examples


def dataset_size(path: str, config: str | None, split: str, revision: str | None) -> int | None:
    """Bytes of a data set's split, other columns included, where it tells them without being read."""
    if is_saved_dataset(Path(path)):
        return _open_dataset(path, config, split, revision).data.nbytes
    info = _split_info(path, config, split, revision)
    return info and info.num_bytes


def _split_info(path: str, config: str | None, split: str, revision: str | None) -> Any:
    import datasets

    try:
        builder = datasets.load_dataset_builder(path, config, revision=revision)
    except Exception as error:  # whatever `datasets`, the hub's client and its transport raise
        raise UserError(f"can't read data set {path}: {_first_line(error)}") from None
    return (builder.info.splits or {}).get(split)


def is_saved_dataset(folder: Path) -> bool:
    """Whether ``Dataset.save_to_disk`` or ``DatasetDict.save_to_disk`` made the folder."""
    return (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file()


def resolved_revision(path: str, revision: str | None) -> str | None:
    """The commit that a branch or tag of a data set stands for now; ``revision`` itself where the hub can't tell."""
    import huggingface_hub

    try:
        return huggingface_hub.HfApi().dataset_info(path, revision=revision, timeout=10).sha
    except Exception:  # offline: what is in the cache will do, or loading it tells what is wrong
        return revision


def _texts(column: Any, field: str, where: str) -> list[str | None]:
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    is_text = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    if not any(check(column.type) for check in is_text):
        raise UserError(f"column '{field}' of {where} holds {column.type}, not text: set the source's field")
    # As bytes, because nothing keeps a writer from storing what is not UTF-8.
    texts = column.cast(pa.large_binary()).to_pylist()
    return [None if text is None else text.decode("utf-8", "replace") for text in texts]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
