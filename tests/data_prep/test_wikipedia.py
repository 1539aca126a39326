"""Articles come out of a dump as a reader sees them, whatever the page; the expected texts are written by hand."""

import re
import time
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

import mwparserfromhell
import pytest

from common.errors import UserError
from data_prep.wikipedia import articles, dump_header, wikiextractor_documents

HEADER = """<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">
  <siteinfo>
    <sitename>Wikipedia</sitename>
    <dbname>dewiki</dbname>
    <generator>MediaWiki 1.43.0</generator>
    <case>first-letter</case>
    <namespaces>
      <namespace key="0" case="first-letter" />
      <namespace key="1" case="first-letter">Diskussion</namespace>
      <namespace key="6" case="first-letter">Datei</namespace>
      <namespace key="10" case="first-letter">Vorlage</namespace>
      <namespace key="14" case="first-letter">Kategorie</namespace>
    </namespaces>
  </siteinfo>
"""

HERON = """{{Short description|Large wading bird}}
{{Automatic taxobox
| name = Grey heron
| status_ref = <ref name="iucn">{{cite iucn |title=''Ardea cinerea'' |volume=2019}}</ref>
| image_caption = In [[Hyde Park, London|Hyde Park]], {{nowrap|[[London]]}}
| range_map_caption = {{leftlegend|#00FF00|Breeding|outline=gray}} {formula}
}}
The '''grey heron''' ('''''Ardea cinerea''''') is a [[wader (American)|wading]] bird of the [[heron]] family, native to
[[Europe]] and [[Asia]].<ref name="BTO">{{cite web |url=http://www.bto.org |title=Grey Heron}}</ref> It feeds on fish,
[[frog]]s &amp; [[:Category:Insects|insects]].<ref name="BTO" /><!-- see the talk page

before adding more --> It nests in [https://example.org/colonies colonies] [https://example.org/1].

[[File:Heron.jpg|thumb|upright=1.2|A heron stalking [[fish]] at [[Pak Thale]], {{nowrap|[[Siam]]}} ([[User:JJ|JJ]])]]
Adults ({{lang|la|adultus}}) are grey ({{IPA|x}}; from ''{{lang|la|cinis}}'') above {{convert|1|m|ft}}, and white below.

==Taxonomy==
{{Main|List of herons}}
===Etymology===
The name is ''ardea'', "heron", and ''cinerea'' &mdash; ''Heron'''s plumes.

=== Subspecies ===
Three are recognised:<ref name=ioc/>
* ''A. c. cinerea'' &ndash; [[Carl Linnaeus|Linnaeus]]: nominate
** ''A. c. jouyi'', Clark
# ''A. c. monicae'' &#8211; Jouanin &amp; Roux

==Gallery==
<gallery mode="packed">
File:Graureiher.jpg|A heron with [[fish]]
</gallery>

==Behaviour==
{| class="wikitable"
|+ Breeding pairs
! Country !! Pairs
|-
| [[Germany]] || 24,000 {{small|about}}
{| class="nested"
| inner
|}
|}
A colony of Müller's at 51&deg;&nbsp;N has 10<sup>6</sup>&nbsp;m<sup>2</sup>; the 1<sup>st</sup> has H<sub>2</sub>O.
It costs <math>E = \\frac{m}{{v}^{2}}</math> energy.<br />It flies slowly.

<blockquote>Stately and still.<p>So she stands.</blockquote>

==References==
{{Reflist|refs=
<ref name="ioc">{{cite web |title=Ibis, herons |url=http://www.worldbirdnames.org}}</ref>
}}

{{Authority control}}
[[Category:Herons|grey heron]]
[[de:Graureiher]]
[[zh-min-nan:Peh-leng-si]]
"""

HERON_TEXT = """Grey heron
The grey heron (Ardea cinerea) is a wading bird of the heron family, native to Europe and Asia. It feeds on fish, \
frogs & insects. It nests in colonies.
Adults are grey (from) above, and white below.
Taxonomy
Etymology
The name is ardea, "heron", and cinerea \u2014 Heron's plumes.
Subspecies
Three are recognised:
A. c. cinerea \u2013 Linnaeus: nominate
A. c. jouyi, Clark
A. c. monicae \u2013 Jouanin & Roux
Behaviour
A colony of Müller's at 51° N has 10⁶ m²; the 1st has H₂O. It costs energy. It flies slowly.
Stately and still.
So she stands."""


def page(title: str, source: str, namespace: int = 0, redirect: str = "") -> str:
    element = f"<redirect title={quoteattr(redirect)} />" if redirect else ""
    return f"""<page><title>{escape(title)}</title><ns>{namespace}</ns><id>7</id>{element}
    <revision><id>8</id><timestamp>2024-01-01T00:00:00Z</timestamp>
    <contributor><username>A</username><id>1</id></contributor><model>wikitext</model><format>text/x-wiki</format>
    <text bytes="{len(source.encode())}" xml:space="preserve">{escape(source)}</text></revision></page>
"""


def dump(*pages: str) -> bytes:
    return (HEADER + "".join(pages) + "</mediawiki>").encode()


def read(*pages: str) -> tuple[list[str], Counter[str]]:
    counts: Counter[str] = Counter()
    return list(articles(dump(*pages), counts)), counts


def shown(source: str) -> list[str]:
    """The paragraphs of an article."""
    documents, _ = read(page("T", source))
    return [paragraph for document in documents for paragraph in document.split("\n")[1:]]


def test_an_article_reads_as_on_the_page() -> None:
    assert read(page("Grey heron", HERON)) == ([HERON_TEXT], Counter())


def test_only_articles_count_as_articles() -> None:
    documents, counts = read(
        page("Diskussion:Fuchs", "Talk.", namespace=1),
        page("Reineke", "#WEITERLEITUNG [[Fuchs]]", redirect="Fuchs"),
        page("Vulpes", "#REDIRECT [[Fuchs]]"),  # as dumps before 2010 have it
        page("Fuchs", "Der '''Fuchs''' bellt."),
        page("Leer", "{{Nur Vorlage}}\n== Kopf ==\n[[Kategorie:X]]"),
        page("Vorlage:Infobox", "{{{1}}}", namespace=10),
        page("Liste", "#eins [[Fuchs]]\n"),
    )
    assert documents == ["Fuchs\nDer Fuchs bellt."]
    assert counts == {"other_namespaces": 2, "redirects": 3, "empty_articles": 1}


def test_of_a_pages_history_the_latest_revision_is_read() -> None:
    older, newer = page("A", "Old."), page("A", "New.")
    revision = newer[newer.index("<revision>") : newer.index("</page>")]
    assert read(older.replace("</page>", revision + "</page>"))[0] == ["A\nNew."]


def test_a_title_is_text_and_not_markup() -> None:
    assert read(page('AT&T "[[x]]" <b>', "It calls."))[0] == ['AT&T "[[x]]" <b>\nIt calls.']


@pytest.mark.parametrize("prefix", ["Datei", "datei", " DATEI ", "File", "Image", "image", "Kategorie", "Category"])
def test_files_and_categories_are_hidden_under_all_their_names(prefix: str) -> None:
    assert shown(f"One [[{prefix}:x y|thumb|A [[dog]] here]]two.") == ["One two."]


def test_a_file_is_known_by_its_ending_where_the_dump_does_not_name_the_namespace() -> None:
    assert shown("[[Bild:Hund.JPG|mini|Ein [[Hund]]]]Wau.") == ["Wau."]


def test_a_link_shows_its_text_and_one_with_a_colon_its_target() -> None:
    source = "[[a]] [[b|c]]s [[Vorlage:X]] [[:Kategorie:D]] [[:en:Fox|fox]] [[Re:Zero]] [[d#e]] [[f|''g'' &lt;]]"
    assert shown(source) == ["a cs Vorlage:X Kategorie:D fox Re:Zero d#e g <"]


def test_headings_stand_only_before_text() -> None:
    source = "==A==\n===B===\n====C====\n==D==\n===E===\nText.\n===F===\n{{x}}\n==G==\n* Item\n==H=="
    assert shown(source) == ["D", "E", "Text.", "G", "Item"]


def test_lines_of_one_paragraph_are_joined_and_items_are_not() -> None:
    assert shown("One\ntwo.\n\nThree\n* four\n** five\nsix\n:seven\n; eight\n----\nnine") == [
        "One two.", "Three", "four", "five", "six", "seven", "eight", "nine",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("''a'' '''b''' '''''c'''''", "a b c"),
        ("L'''Iliade'' est", "L'Iliade est"),
        ("Die ''Titanic'''s Reise", "Die Titanic's Reise"),
        ("'''Titanic''''s", "Titanic's"),
        ("rock 'n' roll, '90s", "rock 'n' roll, '90s"),
        ("''never closed", "never closed"),
    ],
)
def test_quotes_are_told_from_apostrophes(source: str, expected: str) -> None:
    assert shown(source) == [expected]


def test_what_nowiki_protects_is_text() -> None:
    assert shown("C<nowiki>++</nowiki>: <nowiki>[[a]] {{b}} ''c'' <ref>d</ref></nowiki><nowiki />.") == [
        "C++: [[a]] {{b}} ''c'' <ref>d</ref>."
    ]


def test_entities_are_unescaped_once_and_only_where_they_end() -> None:
    assert shown("a &lt;ref&gt; &amp;amp; &#x42;&#67; &apos; AT&T ?a=1&section=2 &nosuch;") == [
        "a <ref> &amp; BC ' AT&T ?a=1&section=2 &nosuch;"
    ]


def test_prose_reads_as_the_parsers_own_rendering() -> None:
    source = """The [[Thames|river]] rises at [[Thames Head]]&nbsp;&ndash; see [http://a.b here], <small>or
[[:de:Themse|there]]</small>, 3 &lt; 4, <span style="color:red">at [[Kemble]]</span> and flows to the [[sea]]s."""
    assert shown(source) == [" ".join(mwparserfromhell.parse(source).strip_code().split())]


BROKEN = ["{{Infobox\n| name = x\n| other = [[y]]\n", "{| class=x\n|-\n| cell\n! head", "[[File:a.jpg|thumb|", "{{{"]
BROKEN += ["}}", "|}", "<ref name=a>", "<ref name=", "</div>", "<math>", "__NOTOC__"]


@pytest.mark.parametrize("broken", BROKEN)
def test_what_is_never_closed_costs_no_more_than_itself(broken: str) -> None:
    paragraphs = shown(f"Before.\n\n{broken}\n\nAfter.")
    assert (paragraphs[0], paragraphs[-1]) == ("Before.", "After.")
    assert not re.search(r"[{}>]|\[\[|name = |cell|head|__", " ".join(paragraphs))


@pytest.mark.parametrize("line_length", [15_000, 200_000])
@pytest.mark.parametrize("unit", ["{{a|", "<p ", "[[File:a|", "{|\n|-\n| a\n", "<i><b>", "<ref>", "[http://a ", "{{"])
def test_a_pathological_page_costs_neither_the_block_nor_much_time(unit: str, line_length: int) -> None:
    start = time.perf_counter()
    line = unit * (line_length // len(unit))
    documents, counts = read(page("Bad", f"{line}\n\n{line}"), page("Good", "Fine."))
    assert documents[-1] == "Good\nFine."
    assert len(documents) + sum(counts.values()) == 2
    assert time.perf_counter() - start < 10  # the parser alone: up to hours


def test_a_page_that_the_parser_fails_on_is_counted(monkeypatch) -> None:
    parse = mwparserfromhell.parse

    def fails_on_bad(source: str, **options) -> object:
        if "bad" in source:
            raise mwparserfromhell.parser.ParserError("a bug")
        return parse(source, **options)

    monkeypatch.setattr(mwparserfromhell, "parse", fails_on_bad)
    assert read(page("A", "bad"), page("B", "good")) == (["B\ngood"], Counter(unparsed_articles=1))


BOMB = b"""<!DOCTYPE mediawiki [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c SYSTEM "file:///etc/passwd">]>"""


@pytest.mark.parametrize("declaration", [BOMB, b"<!DOCTYPE mediawiki>", b'<?xml version="1.0"?>' + BOMB])
def test_a_document_type_is_refused(declaration: bytes) -> None:
    block = declaration + dump(page("A", "entity")).replace(b"entity", b"&b;&c;")
    with pytest.raises(UserError, match="document type"):
        list(articles(block, Counter()))


def test_a_page_may_write_about_document_types() -> None:
    assert shown("It begins with <code>&lt;!DOCTYPE html&gt;</code> or <nowiki><!ENTITY x></nowiki>.") == [
        "It begins with <!DOCTYPE html> or <!ENTITY x>."
    ]


@pytest.mark.parametrize(
    "broken",
    [
        dump(page("A", "x"))[:-20],
        dump(page("A", "x"), "<page><title>B</title>"),
        dump(page("A", "x"), "<page><title>B</title><ns>none</ns></page>"),
        dump(page("A", "x"), page("B", "y").replace("<title>B</title>", "")),
        dump(page("A", "x"), "&nbsp;"),
        dump(page("A", "x"), "<surprise/>"),
        b"<html></html>",
        b"",
    ],
)
def test_malformed_xml_ends_in_one_line(broken: bytes) -> None:
    with pytest.raises(UserError, match=r"^the dump is malformed (after page 'A'|at its start): [^\n]+$"):
        list(articles(broken, Counter()))


def test_bytes_that_are_not_utf8_do_not_cost_the_block() -> None:
    block = dump(page("A", "caf#")).replace(b"caf#", b"caf\xe9")
    assert list(articles(block, Counter())) == ["A\ncaf\ufffd"]


def test_the_header_and_any_pages_are_a_dump() -> None:
    start = dump(page("A", "One."), page("B", "Two."))
    header = dump_header(start, Path("dump.xml"))
    assert b"<page>" not in header
    assert list(articles(header + page("C", "[[Datei:x|y]]Three.").encode() + b"</mediawiki>", Counter())) == [
        "C\nThree."
    ]
    assert list(articles(dump_header(HEADER.encode(), Path("empty.xml")) + b"</mediawiki>", Counter())) == []


@pytest.mark.parametrize("start", [b"", b"<html><body>", b"<mediawiki><page></page>", b"PK\x03\x04", b"<doc id='1'>"])
def test_what_is_no_dump_is_refused(start: bytes) -> None:
    with pytest.raises(UserError, match=r"my\.xml is not a MediaWiki XML dump"):
        dump_header(start, Path("my.xml"))


EXTRACTED = """<doc id="12" url="http://en.wikipedia.org/wiki?curid=12" title="Anarchism">
Anarchism

Anarchism is a philosophy &amp; a movement.
It holds 2 &lt; 3. \n
History.
Simon & Garfunkel sang; André listened.

</doc>
stray text
<doc id="13" url="http://en.wikipedia.org/wiki?curid=13" title="P&amp;O Line">
P&amp;O Line

Ships.
</doc>
<doc id="14" url="http://en.wikipedia.org/wiki?curid=14" title="Untold">
Its body does not repeat the title.
</doc>
"""


class DocumentParser(HTMLParser):
    """An independent reading: what stands inside <doc>, entities resolved."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.documents: list[str] = []
        self.title = None

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.title = dict(attrs)["title"]
        self.documents.append("")

    def handle_endtag(self, tag: str) -> None:
        body = [" ".join(line.split()) for line in self.documents[-1].splitlines() if line.strip()]
        self.documents[-1] = "\n".join(body if body[0] == self.title else [self.title, *body])
        self.title = None

    def handle_data(self, data: str) -> None:
        if self.title:
            self.documents[-1] += data


def test_wikiextractor_output_reads_as_an_html_parser_reads_it() -> None:
    parser = DocumentParser()
    parser.feed(EXTRACTED)
    documents = list(wikiextractor_documents(EXTRACTED))
    assert documents == parser.documents
    assert documents[1] == "P&O Line\nShips."
    assert len(documents) == 3


def test_wikiextractor_titles_may_hold_quotes_and_a_title_alone_is_no_document() -> None:
    quoted = '<doc id="1" url="u" title=""Weird Al" Yankovic">\n"Weird Al" Yankovic\n\nHe sings.\n</doc>\n'
    alone = '<doc id="2" url="u" title="Alone">\nAlone\n\n</doc>\n'
    cut_off = '<doc id="3" url="u" title="Cut">\nCut\n\nIt never en'
    assert list(wikiextractor_documents(quoted + alone + cut_off)) == ['"Weird Al" Yankovic\nHe sings.']
