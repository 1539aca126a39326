"""Whether the sources are still what they were when a build began."""

import importlib.metadata
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from common.errors import UserError
from data_prep.documents import Source, first_document
from data_prep.files import describe_file
from data_prep.tables import resolved_revision

Record = dict[str, Any]
"""``sources``: a description of every file and data set; ``versions``: of the libraries that turn text into tokens."""

_LIBRARIES = ("tokenizers", "sentencex", "mwparserfromhell", "mwxml")


def pin_sources(sources: Sequence[Source], recorded: Record | None) -> list[Source]:
    """The sources, those on the hub pinned to a commit: the recorded one, or the newest that the hub has now."""
    entries = recorded["sources"] if recorded else []
    commits = {_hub_name(entry): entry["revision"] for entry in entries if "dataset" in entry}
    pinned = []
    for source in sources:
        if is_on_hub(source):
            name = (source.path, source.config, source.split)
            commit = commits[name] if name in commits else resolved_revision(source.path or "", source.revision)
            source = replace(source, revision=commit)
        pinned.append(source)
    return pinned


def is_on_hub(source: Source) -> bool:
    """Whether it is a data set that has no files here."""
    return source.kind == "huggingface" and not Path(source.path or "").exists()


def _hub_name(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry.get(key) for key in ("dataset", "config", "split"))


def describe(sources: Sequence[Source]) -> Record:
    """What tells whether sources that are pinned are still the same, without reading them: each file's size and ends.

    Raises:
        UserError: a source is not there.
    """
    described: list[dict[str, Any]] = []
    for source in sources:
        if is_on_hub(source):
            names = {"dataset": source.path, "config": source.config, "split": source.split}
            described.append({**names, "revision": source.revision})
        elif source.kind == "huggingface":
            files = sorted(file for file in Path(source.path or "").rglob("*") if file.is_file())
            described += map(describe_file, files)
        else:
            described += map(describe_file, source.files)
    return {"sources": described, "versions": {name: importlib.metadata.version(name) for name in _LIBRARIES}}


def check_same_sources(recorded: Record, now: Record, folder: Path) -> None:
    """Refuse to go on in ``folder`` with other sources.

    Raises:
        UserError: with the first difference named.
    """
    if now["sources"] != recorded["sources"]:
        raise UserError(
            f"{folder} was made of other sources ({_difference(recorded['sources'], now['sources'])}): "
            "put them back to continue, or give another --output_dir"
        )


def check_same_versions(recorded: Record, now: Record, folder: Path) -> None:
    """Refuse to go on in ``folder`` with libraries that might make other tokens than it has already.

    Raises:
        UserError: with the first difference named.
    """
    for name, version in now["versions"].items():
        if version != recorded["versions"].get(name):
            raise UserError(
                f"{folder} was begun with {name} {recorded['versions'].get(name)}, this is {version}: "
                "install that version to continue, or give another --output_dir"
            )


def _difference(recorded: list[dict[str, Any]], now: list[dict[str, Any]]) -> str:
    """The first one, in words."""
    before, after = ({entry.get("file") or _hub_name(entry): entry for entry in side} for side in (recorded, now))
    for name in [*before, *after]:
        if name not in after:
            return f"{name} is gone"
        if name not in before:
            return f"{name} is new"
        if before[name] != after[name]:
            return f"{name} has changed"
    return "their order has changed"


def require_text(sources: Sequence[Source], output_dir: Path) -> None:
    """Every source must hold text, and none of them the output.

    Raises:
        UserError: a source is missing, damaged, empty, or would read what is written to ``output_dir``.
    """
    for source in sources:
        root = Path((source.path or "").partition("*")[0])
        reads_ours = source.kind in ("jsonl", "wikiextractor", "huggingface") and root.is_dir()
        if reads_ours and output_dir.resolve().is_relative_to(root.resolve()):
            raise UserError(f"{output_dir} lies inside the source {source}, which it would add to: give another folder")
        first_document(source)
