"""What the benchmarks share: the text they measure on, the table for people, the record that is kept."""

import gzip
import sys
from pathlib import Path
from typing import Any

from common.folders import provenance, write_json
from data_prep.config import DataConfig
from data_prep.documents import Source, read_documents

RESULTS = Path(__file__).parent / "results"
Targets = dict[str, tuple[str, float]]  # figure -> ("at least" or "at most", value)


def text_to_build(data: Path, folder: Path) -> tuple[DataConfig, int, str]:
    """The configuration, the text's size in bytes, and what it is.

    ``data`` holds wikitext/enwiki-2014-train.txt.gz and bert-base-uncased/vocab.txt; without them the demo's generated
    text stands in, and the figures say so.
    """
    text, vocabulary = data / "wikitext" / "enwiki-2014-train.txt.gz", data / "bert-base-uncased" / "vocab.txt"
    if text.exists() and vocabulary.exists():
        size = len(gzip.decompress(text.read_bytes()))
        return DataConfig([Source("text", str(text))], str(vocabulary)), size, "English Wikipedia"
    print(f"{text} or {vocabulary} is not there: the demo's generated text stands in", file=sys.stderr)
    documents = "\n\n".join(read_documents([Source("demo", megabytes=8)]))
    (folder / "demo.txt").write_text(documents, encoding="utf-8")
    config = DataConfig([Source("text", str(folder / "demo.txt"))], "train", vocab_size=2000)
    return config, len(documents.encode()), "generated (not comparable)"


def table(figures: dict[str, Any], targets: Targets) -> str:
    """For people: every figure, and beside it what it should be."""
    lines = []
    for name, value in figures.items():
        relation, target = targets.get(name, ("", None))
        met = "" if target is None else f"  {relation} {target:,}: {'yes' if meets(value, relation, target) else 'NO'}"
        lines.append(f"{name:<34}{value if isinstance(value, str) else f'{value:,}':>20}{met}")
    return "\n".join(lines)


def markdown(rows: list[list[str]]) -> str:
    """A table whose first row is its head."""
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(rows[0]) - 1) + "|", *lines[1:]])


def meets(value: float, relation: str, target: float) -> bool:
    """Whether a figure is where it should be."""
    return value >= target if relation == "at least" else value <= target


def misses(figures: dict[str, Any], targets: Targets) -> list[str]:
    """The figures that are not where they should be."""
    return [name for name, (relation, target) in targets.items() if not meets(figures[name], relation, target)]


def record(figures: dict[str, Any], device: str, name: str) -> Path:
    """Keep the figures with date and commit, versions and machine; returns where."""
    start = provenance()
    path = RESULTS / device / f"{start['started'][:10]}-{name}-{(start['commit'] or 'unknown')[:10]}.json"
    del start["command"]  # it names folders of this machine
    write_json(path, {**figures, "provenance": start})
    return path
