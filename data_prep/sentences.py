"""Documents to sentences."""

import re
from collections.abc import Callable
from typing import Literal

_LONGEST_LINE = 4_000
# Behind an end of a sentence if there is one, or a space, or anywhere.
_PART_OF_LINE = re.compile(rf".{{1,{_LONGEST_LINE}}}(?:(?<=[。！？.!?])|(?<=\s)|\Z)|.{{1,{_LONGEST_LINE}}}")  # noqa: RUF001
SentenceSplitter = Literal["sentencex", "newline", "none"]


def sentence_splitter(name: SentenceSplitter, language: str) -> Callable[[str], list[str]]:
    """A function from a document to its sentences, none of them empty.

    Args:
        name: ``sentencex``: Wikimedia's rule-based splitter, for 244 languages, which also cuts at line ends;
            ``newline``: one sentence a line, already split; ``none``: the document is one sentence.
        language: code of the language, for ``sentencex``; it takes English rules for one that it does not know.
    """
    if name == "none":
        return lambda document: [document]
    if name == "newline":
        return _lines

    import sentencex

    def split(document: str) -> list[str]:
        # Line by line, and no line at any length: the splitter's time may grow with the square of what it is given.
        parts = [part for line in document.split("\n") for part in _short_parts(line)]
        return [sentence for part in parts for sentence in sentencex.segment(language, part) if sentence.strip()]

    return split


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]


def _short_parts(line: str) -> list[str]:
    if len(line) <= _LONGEST_LINE:
        return [line]
    return [part[0] for part in _PART_OF_LINE.finditer(line)]
