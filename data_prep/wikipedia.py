"""Wikipedia to plain text: pages of the official XML dump, and what WikiExtractor made of one.

A page is rewritten in two steps. Regular expressions take out what a reader never sees (templates, tables, references,
comments) and cut the rest into paragraphs; mwparserfromhell then reads each paragraph's links, tags and entities. The
parser alone would do, at half the speed, but its time grows with the square of what is left unclosed: one broken page
of 100 kB can take it minutes. Every expression here takes time in proportion to the page.
"""

import html
import io
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import ParseError

import mwparserfromhell
import mwxml
from mwparserfromhell.nodes import ExternalLink, HTMLEntity, Node, Tag, Text, Wikilink
from mwparserfromhell.wikicode import Wikicode
from mwxml.errors import MalformedXML

from common.errors import UserError

_HIDDEN_NAMESPACES = (6, 14)  # files and categories
_MALFORMED = (ParseError, MalformedXML, AssertionError, AttributeError, TypeError, ValueError)  # as mwxml says it
_LONGEST_PAGE = 4_000_000  # characters; MediaWiki itself saves up to 2 MB
_LONGEST_PARAGRAPH = 20_000
_DEEPEST_NESTING = 40  # of templates, as in MediaWiki

_REDIRECT = re.compile(r"\s*#[^\s\[]+\s*:?\s*\[\[")
_LANGUAGE_CODE = re.compile(r"[a-z]{2,3}(-[a-z]+)*|simple")
_MEDIA_FILE = re.compile(r".*\.(gif|jpe?g|mid|mp3|mp4|og[agv]|pdf|png|svg|tiff?|wav|webm|webp)\s*")
_HIDDEN_TAGS = frozenset(
    "categorytree ce chem gallery graph hiero imagemap includeonly indicator inputbox mapframe maplink math pre ref "
    "references score source syntaxhighlight table templatedata templatestyles timeline".split()
)
_KNOWN_TAGS = _HIDDEN_TAGS | frozenset(
    "abbr b big blockquote br caption center cite code dd del dfn div dl dt em font h1 h2 h3 h4 h5 h6 hr i ins kbd li "
    "noinclude nowiki ol onlyinclude p poem q rp rt ruby s samp section small span strike strong sub sup td th tr tt "
    "u ul var wbr".split()
)
_SPACING_TAGS = frozenset("br dd dt li".split())
_SCRIPTS = {
    "sup": str.maketrans("0123456789+-\u2212", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻"),
    "sub": str.maketrans("0123456789+-\u2212", "₀₁₂₃₄₅₆₇₈₉₊₋₋"),
}

# An element that is never closed must not be looked for again and again: its search ends where the next one begins.
_HIDDEN = re.compile(
    rf"<!--.*?(?:-->|\Z)|<(?P<tag>nowiki|{'|'.join(sorted(_HIDDEN_TAGS))})\b[^<>]*"
    r"(?:/>|>(?P<inside>[^<]*+(?:<(?!/?(?P=tag)\b)[^<]*+)*+)</(?P=tag)\s*>)",
    re.DOTALL | re.IGNORECASE,
)
# Templates and tables, with the quotes around one that alone is in italics: both pairs would look like a run of four.
_IN_BRACES = r"[^{}]*+(?:\{[^{}]*+\}[^{}]*+)*+"
_BRACES = re.compile(rf"(?P<quotes>'{{2,5}}|)(?:\{{\{{{_IN_BRACES}\}}\}}|\{{\|{_IN_BRACES}(?<=\|)\}})(?P=quotes)")
_REMAINS = re.compile(r"^[ \t]*(?:\{\||\||! ).*$|\{{2,}|\}{2,}|__[^\W\da-z_]+__", re.MULTILINE)
_NO_TAG = re.compile(r"<(?![/a-zA-Z][^<>]*>)")
_BLOCK_TAG = re.compile(r"</?(?:blockquote|center|div|dl|h[1-6]|hr|li|ol|p|poem|ul)\b[^<>]*>", re.IGNORECASE)
_OWN_LINE = re.compile(r"^(?:[*#:;]|=.*=[ \t]*$|----).*$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")
_HEADING = re.compile(r"(={1,6})(.+?)={1,6}")
_QUOTED_LINE, _QUOTES = re.compile(r"^.*''.*$", re.MULTILINE), re.compile(r"('{2,})")
_LONE_TAG = re.compile(rf"</?(?:{'|'.join(sorted(_KNOWN_TAGS))})\b[^<>]*>|\[\[|\]\]", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|\w{2,31});")
# What removed templates leave: `( )`, `(; born`, `town .`, with parentheses of ASCII or as wide as a CJK character.
_EMPTY_PARENTHESES = re.compile(r"\s+\([\s,;]*\)|\uff08[\s\uff0c\uff1b]*\uff09")
_AFTER_PARENTHESIS = re.compile(r"([(\uff08])[\s,;\uff0c\uff1b]+")
_BEFORE_PUNCTUATION = re.compile(r"\s+([,.)])(?=\s|$)")
_TITLE = re.compile(r'title="(.*)"')


class _Page(NamedTuple):
    """A page of a dump."""

    namespace: int
    title: str
    is_redirect: bool
    source: str


class _Paragraph(NamedTuple):
    """A paragraph, list item or heading, as plain text."""

    heading_level: int
    """1 to 6; 0 of any other"""
    text: str


class _UnparsedError(Exception):
    """A page's markup is beyond the parser."""


def dump_header(start: bytes, path: Path) -> bytes:
    """What stands before the pages of the dump that begins with ``start``: it names the wiki's namespaces.

    Raises:
        UserError: it is no dump; ``path`` is for the message.
    """
    header, end, _ = start.partition(b"<page>")[0].partition(b"</siteinfo>")
    if not end or b"<mediawiki" not in header:
        raise UserError(f"{path} is not a MediaWiki XML dump: give one of Wikimedia's pages-articles.xml.bz2 files")
    return header + end


def articles(dump: bytes, counts: Counter[str]) -> Iterator[str]:
    """The plain text of each article of a small, whole dump: its title, then one paragraph a line.

    Args:
        dump: a header as of :func:`dump_header`, whole pages, and ``</mediawiki>``.
        counts: is added to: ``other_namespaces`` (talk, templates and so on), ``redirects``, ``empty_articles`` (no
            text is left without the markup) and ``unparsed_articles`` (the parser fails, or the page has more than
            4 million characters or a paragraph of more than 20,000). None of these pages is returned.

    Raises:
        UserError: malformed XML, or XML that declares entities.
    """
    hidden_namespaces, pages = _read_dump(dump.decode("utf-8", "replace"))
    for page in pages:
        if page.namespace != 0:
            counts["other_namespaces"] += 1
        elif page.is_redirect:
            counts["redirects"] += 1
        else:
            try:
                paragraphs = _plain_paragraphs(page.source, hidden_namespaces)
            except _UnparsedError:
                counts["unparsed_articles"] += 1
                continue
            if paragraphs:
                yield "\n".join([page.title, *paragraphs])
            else:
                counts["empty_articles"] += 1


def wikiextractor_documents(text: str) -> Iterator[str]:
    """The documents of WikiExtractor's output: title, then one paragraph a line. A title alone is no document.

    What stands outside ``<doc ...>`` and ``</doc>`` is left out.
    """
    for record in text.split("</doc>")[:-1]:
        attributes, end, body = record.rpartition("<doc ")[2].partition(">\n")
        title = _TITLE.search(attributes)
        if end and title:
            lines = [line for line in map(str.strip, _unescaped(body).split("\n")) if line]
            name = _unescaped(title[1]).strip()
            paragraphs = lines[1:] if lines[:1] == [name] else lines
            if paragraphs:
                yield "\n".join([name, *paragraphs])


def _read_dump(xml: str) -> tuple[frozenset[str], list[_Page]]:
    """The names of the namespaces whose links a reader does not see, and all pages."""
    if "<!DOCTYPE" in xml or "<!ENTITY" in xml:  # what bombs are made of; text has it as &lt;!DOCTYPE
        raise UserError("the dump declares a document type or entities, which no MediaWiki dump does: get it again")
    pages: list[_Page] = []
    try:
        dump = mwxml.Dump.from_file(io.StringIO(xml))
        hidden = [name.name for name in dump.site_info.namespaces or [] if name.id in _HIDDEN_NAMESPACES]
        for page in dump.pages:
            pages.append(_page(page))
    except _MALFORMED as error:
        where = f"after page '{pages[-1].title}'" if pages else "at its start"
        reason = (str(error) or "no <mediawiki> and <siteinfo>").splitlines()[0]
        raise UserError(f"the dump is malformed {where}: {reason}; get it again") from None
    return frozenset(map(_normalized, [*hidden, "file", "image", "category"])), pages


def _page(page: mwxml.Page) -> _Page:
    latest = deque(page, maxlen=1)
    source = (latest[0].text or "") if latest else ""
    return _Page(page.namespace, page.title, page.redirect is not None or bool(_REDIRECT.match(source)), source)


def _plain_paragraphs(source: str, hidden_namespaces: frozenset[str]) -> list[str]:
    """What a reader sees of a page, without headings that nothing follows."""
    shown: list[str] = []
    headings: list[_Paragraph] = []
    for paragraph in _split(source):
        level, text = _plain_paragraph(paragraph, hidden_namespaces)
        if level:
            headings = [heading for heading in headings if heading.heading_level < level]
            headings.append(_Paragraph(level, text))
        elif text:
            shown += [heading.text for heading in headings if heading.text]
            shown.append(text)
            headings = []
    return shown


def _split(source: str) -> list[str]:
    """The source of each paragraph, list item and heading, without what is not shown."""
    if len(source) > _LONGEST_PAGE:
        raise _UnparsedError
    source = _innermost_first(_HIDDEN, _as_entities, source)
    source = _innermost_first(_BRACES, "", source)
    source = _REMAINS.sub("", source)
    source = _NO_TAG.sub("&lt;", source)
    source = _QUOTED_LINE.sub(_without_quotes, source)
    source = _BLOCK_TAG.sub("\n\n", source)
    return _BLANK_LINES.split(_OWN_LINE.sub(r"\n\g<0>\n", source))


def _innermost_first(pattern: re.Pattern[str], replacement: str | Callable[[re.Match[str]], str], source: str) -> str:
    for _ in range(_DEEPEST_NESTING):
        source, number = pattern.subn(replacement, source)
        if not number:
            break
    return source


def _as_entities(element: re.Match[str]) -> str:
    """Nothing of a hidden element; what ``<nowiki>`` protects, out of the reach of all that follows."""
    if (element["tag"] or "").lower() != "nowiki":
        return ""
    return "".join(f"&#{ord(character)};" for character in _unescaped(element["inside"] or ""))


def _without_quotes(line: re.Match[str]) -> str:
    """A line without the marks of ``''italics''`` and ``'''bold'''``; which apostrophes are not marks is decided as in
    MediaWiki (Parser::doQuotes)."""
    parts = _QUOTES.split(line[0])
    texts, lengths = parts[::2], [len(quotes) for quotes in parts[1::2]]
    apostrophes = [int(length == 4) + max(0, length - 5) for length in lengths]
    italic = sum(length == 2 or length >= 5 for length in lengths)
    bold = sum(length >= 3 for length in lengths)
    bolds = [index for index, length in enumerate(lengths) if length in (3, 4)]
    if italic % 2 and bold % 2 and bolds:
        apostrophes[min(bolds, key=lambda index: _apostrophe_rank(texts[index]))] += 1
    return "".join(text + "'" * number for text, number in zip(texts, [*apostrophes, 0], strict=True))


def _apostrophe_rank(before: str) -> int:
    """How unlikely quotes behind this text begin with an apostrophe: least after one letter (``l'''Iliade''``)."""
    if before.endswith(" "):
        return 2
    return 0 if before[-2:-1] == " " else 1


def _plain_paragraph(source: str, hidden_namespaces: frozenset[str]) -> _Paragraph:
    heading = _HEADING.fullmatch(source.strip())
    text = _parse(heading[2] if heading else source, hidden_namespaces)
    text = _EMPTY_PARENTHESES.sub("", " ".join(text.split()))
    text = _BEFORE_PUNCTUATION.sub(r"\1", _AFTER_PARENTHESIS.sub(r"\1", text))
    return _Paragraph(len(heading[1]) if heading else 0, text.strip())


def _parse(source: str, hidden_namespaces: frozenset[str]) -> str:
    if len(source) > _LONGEST_PARAGRAPH:
        raise _UnparsedError
    try:
        wikicode = mwparserfromhell.parse(source, skip_style_tags=True)
    except Exception as error:  # whatever outside text may do to its tokenizer: a page is lost, not the build
        raise _UnparsedError from error
    return _shown(wikicode, hidden_namespaces)


def _shown(wikicode: Wikicode, hidden_namespaces: frozenset[str]) -> str:
    """What a reader sees of parsed markup."""
    return "".join(_shown_node(node, hidden_namespaces) for node in wikicode.nodes)


def _shown_node(node: Node, hidden_namespaces: frozenset[str]) -> str:
    if isinstance(node, Text):
        return _unescaped(_LONE_TAG.sub("", node.value))
    if isinstance(node, Wikilink):
        return _shown_link(node, hidden_namespaces)
    if isinstance(node, Tag):
        return _shown_tag(node, hidden_namespaces)
    if isinstance(node, HTMLEntity):
        return html.unescape(str(node))
    if isinstance(node, ExternalLink):
        shown = node.title if node.brackets else node.url
        return _shown(shown, hidden_namespaces) if shown else ""
    return ""


def _shown_link(link: Wikilink, hidden_namespaces: frozenset[str]) -> str:
    prefix, colon, name = str(link.title).strip().partition(":")
    if colon and (
        _normalized(prefix) in hidden_namespaces
        or _LANGUAGE_CODE.fullmatch(prefix)
        or (prefix and _MEDIA_FILE.fullmatch(name.lower()))  # wikis have more names for files than a dump tells
    ):
        return ""
    if link.text is None:
        return _shown(link.title, hidden_namespaces).strip().removeprefix(":")
    return _shown(link.text, hidden_namespaces)


def _shown_tag(tag: Tag, hidden_namespaces: frozenset[str]) -> str:
    name = str(tag.tag).strip().lower()
    if name in _SPACING_TAGS:
        return " " + _shown(tag.contents, hidden_namespaces) if tag.contents else " "
    if name in _HIDDEN_TAGS or not tag.contents:
        return ""
    text = _shown(tag.contents, hidden_namespaces)
    digits = _SCRIPTS.get(name, {})
    return text.translate(digits) if all(ord(character) in digits for character in text) else text


def _normalized(namespace: str) -> str:
    return " ".join(namespace.replace("_", " ").split()).casefold()


def _unescaped(text: str) -> str:
    """Text with characters for its entities. Unlike :func:`html.unescape`, leaves ``?a=1&section=2`` alone."""
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)
