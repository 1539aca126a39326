"""Documents to sentences."""

from collections.abc import Callable
from typing import Literal

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

    return lambda document: [line for part in sentencex.segment(language, document) for line in _lines(part)]


def _lines(text: str) -> list[str]:
    return [line for line in text.split("\n") if line.strip()]
