"""Sources of text: each yields documents, one string each, in an order that never changes."""

import glob
import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Literal

from common.errors import UserError
from data_prep.demo_corpus import demo_documents


@dataclass(frozen=True)
class Source:
    """One source of documents."""

    kind: Literal["text", "huggingface", "demo"]
    """text: files with a blank line between documents; huggingface: a data set; demo: the generated corpus"""
    path: str | None = None
    """text: a file, a folder (its *.txt and *.txt.gz) or a glob; huggingface: the data set's id or folder"""
    config: str | None = None
    """huggingface: configuration of the data set"""
    split: str = "train"
    """huggingface: split of the data set"""
    revision: str | None = None
    """huggingface: commit, branch or tag to pin"""
    field: str = "text"
    """huggingface: column that holds the text"""
    rows_per_document: int = 1
    """huggingface: consecutive rows joined into one document, for sets of single sentences (BookCorpus)"""
    megabytes: float = 4.0
    """demo: size of the generated corpus in millions of characters"""
    seed: int = 42
    """demo: seed of the generated corpus"""

    def __post_init__(self) -> None:
        if self.kind in ("text", "huggingface") and not self.path:
            raise ValueError(f"a source of kind '{self.kind}' needs a path")


def read_documents(sources: list[Source]) -> Iterator[str]:
    """All documents of all sources, in order; never an empty one.

    Raises:
        UserError: a source does not exist or can't be read.
    """
    readers = {"text": _read_text, "huggingface": _read_huggingface, "demo": _read_demo}
    texts = chain.from_iterable(readers[source.kind](source) for source in sources)
    return (text for text in texts if text.strip())


def text_files(path: str) -> list[Path]:
    """The files that a text source's path stands for, sorted.

    Raises:
        UserError: there are none.
    """
    place = Path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        files = [file for file in place.iterdir() if file.name.endswith((".txt", ".txt.gz"))]
    else:
        files = [Path(name) for name in glob.glob(path, recursive=True)]
    files = sorted(file for file in files if file.is_file())
    if not files:
        there = "holds no *.txt or *.txt.gz file" if place.is_dir() else "matches no file"
        raise UserError(f"source path '{path}' {there}: give a file, a folder or a glob")
    return files


def _read_text(source: Source) -> Iterator[str]:
    for file in text_files(source.path or ""):
        opener = gzip.open if file.suffix == ".gz" else open
        try:
            with opener(file, "rt", encoding="utf-8", errors="replace") as lines:
                yield from _split_at_blank_lines(lines)
        except (OSError, EOFError) as error:
            raise UserError(f"can't read {file}: {error}") from None


def _split_at_blank_lines(lines: Iterator[str]) -> Iterator[str]:
    paragraphs: list[str] = []
    for line in lines:
        if line := line.strip():
            paragraphs.append(line)
        elif paragraphs:
            yield "\n".join(paragraphs)
            paragraphs = []
    if paragraphs:
        yield "\n".join(paragraphs)


def _read_huggingface(source: Source) -> Iterator[str]:
    import datasets  # here, because it takes seconds to import and most builds don't need it

    try:
        rows = datasets.load_dataset(
            source.path, source.config, split=source.split, revision=source.revision, streaming=True
        )
        texts = (row[source.field] for row in rows)
        while group := list(islice(texts, source.rows_per_document)):
            yield "\n".join(group)
    except KeyError:
        raise UserError(f"data set {source.path} has no column '{source.field}': set the source's field") from None
    except (OSError, ValueError, RuntimeError) as error:
        raise UserError(f"can't read data set {source.path} ({source.config}): {_first_line(error)}") from None


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _read_demo(source: Source) -> Iterator[str]:
    return demo_documents(source.seed, source.megabytes)
