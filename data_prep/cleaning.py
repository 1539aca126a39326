"""Raw documents to clean ones, with a count of everything that was mended or left out."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator

_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# What undecodable bytes became, and halves of surrogate pairs, which JSON lets through.
_INVALID = re.compile("[\ufffd\ud800-\udfff]")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x9f\ufeff]")
_UNUSUAL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\ufeff\ufffd\ud800-\udfff]")


def clean_documents(documents: Iterable[str], min_characters: int, counts: Counter[str]) -> Iterator[str]:
    """The documents without invalid and control characters, one paragraph a line, no blank lines.

    Empty documents and those with fewer than ``min_characters`` characters are left out. ``counts`` is added to:
    ``invalid_characters`` (bytes that are not UTF-8), ``control_characters``, ``empty_documents``, ``short_documents``.
    """
    for document in documents:
        if _UNUSUAL.search(document):
            document = _without_unusual(document, counts)
        document = "\n".join(line for line in map(str.strip, document.split("\n")) if line)
        if not document:
            counts["empty_documents"] += 1
        elif len(document) < min_characters:
            counts["short_documents"] += 1
        else:
            yield document


def _without_unusual(document: str, counts: Counter[str]) -> str:
    document = _LINE_ENDS.sub("\n", document)
    for name, characters in (("invalid_characters", _INVALID), ("control_characters", _CONTROL)):
        document, number = characters.subn("", document)
        counts.update({name: number} if number else {})
    return document
