"""Reports: headings, paragraphs, tables and plots as one self-contained HTML page, and the same as Markdown."""

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from common.folders import atomic_path, write_text

if TYPE_CHECKING:  # pages without plots do without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"

PANEL_WIDTH = 4.0
"""Inches: a panel is as wide as a phone, three stand side by side on a desktop."""

_PANEL_DPI = 180
_PANELS_PER_ROW = 3
_LONG_CELL = 40  # characters; a longer cell is wrapped
_FIGURE = re.compile(r"[-+]?\d|-$")
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 70rem; margin: 2rem auto;
       padding: 0 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .6rem; }
p, ul, figcaption { max-width: 46rem; } ul { padding-left: 1.2rem; }
.scroll { overflow-x: auto; background: linear-gradient(90deg, #fff0, #fff 50%) right / 2rem 100% no-repeat local,
          linear-gradient(90deg, #0000, #0003) right / .7rem 100% no-repeat scroll; } /* a shadow where more is */
table { border-collapse: separate; border-spacing: 0; font-size: .92rem; font-variant-numeric: tabular-nums;
        overflow-wrap: break-word; }
th, td { padding: .3rem .6rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; } th span { white-space: nowrap; }
td.long:not(:first-child) { white-space: normal; min-width: 16rem; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 4rem; max-width: 11rem;
                                 position: sticky; left: 0; background: #fff; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption { color: #555; font-size: .9rem; }
.panels { display: flex; flex-wrap: wrap; gap: .8rem 1rem; align-items: flex-start; }
.panels img { width: 22rem; } .panels + figcaption { margin-top: .6rem; }
"""
_STYLE += "".join(f".text-{place} :is(th, td):nth-child({place}) {{ text-align: left; }}\n" for place in range(2, 21))


@dataclass(frozen=True)
class Plot:
    """A figure, or several panels, that the page embeds and that lie beside it as one image, ``<name>.png``."""

    name: str
    heading: str
    figure: "Figure | Mapping[str, Figure]"
    """Panels, by what each shows, are :data:`PANEL_WIDTH` wide; the page lays them out as its width allows."""
    caption: str
    """A single figure's alternative text too."""

    @cached_property
    def images(self) -> dict[str, bytes]:
        """What the page embeds: alternative text to image (PNG)."""
        if isinstance(self.figure, Mapping):
            return {f"{self.heading}: {title}": _png(panel, _PANEL_DPI) for title, panel in self.figure.items()}
        return {self.caption: _png(self.figure, 144, bbox_inches="tight")}

    @property
    def png(self) -> bytes:
        """All of it as one image."""
        images = list(self.images.values())
        return images[0] if len(images) == 1 else _side_by_side(images)

    @property
    def file_name(self) -> str:
        """Of the image beside the page."""
        return f"{self.name}.png"


def _png(figure: "Figure", dpi: int, **options: str) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, **options)
    return buffer.getvalue()


def _side_by_side(images: Sequence[bytes]) -> bytes:
    """Images of the same width as one, in rows from left to right on white."""
    from matplotlib.image import imread, imsave  # pages without plots do without

    arrays = [imread(io.BytesIO(image)) for image in images]
    rows = [arrays[start : start + _PANELS_PER_ROW] for start in range(0, len(arrays), _PANELS_PER_ROW)]
    height, width = sum(max(len(array) for array in row) for row in rows), arrays[0].shape[1]
    canvas = np.ones((height, width * len(rows[0]), arrays[0].shape[2]), dtype=arrays[0].dtype)
    top = 0
    for row in rows:
        for column, array in enumerate(row):
            canvas[top : top + len(array), width * column : width * (column + 1)] = array
        top += max(len(array) for array in row)
    buffer = io.BytesIO()
    imsave(buffer, canvas, format="png")
    return buffer.getvalue()


class Page:
    """Collects parts in reading order; :meth:`write` makes the file."""

    def __init__(self, title: str) -> None:
        self.title = title
        self._parts: list[str] = [f"<h1>{html.escape(title)}</h1>"]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"<h2>{html.escape(text)}</h2>")

    def paragraph(self, text: str) -> None:
        """Plain text, escaped."""
        self._parts.append(f"<p>{html.escape(text)}</p>")

    def facts(self, facts: Mapping[str, str]) -> None:
        """A list of names and what there is to say of each."""
        items = "".join(
            f"<li><strong>{html.escape(name)}:</strong> {html.escape(text)}</li>" for name, text in facts.items()
        )
        self._parts.append(f"<ul>{items}</ul>")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of strings; the first column is the row's name. Columns without figures are set to the left."""
        texts = [
            f"text-{place}"
            for place, column in enumerate(zip(*rows, strict=True), start=1)
            if not any(_FIGURE.match(cell) for cell in column)
        ]
        head = "".join(f"<th>{_unbroken(html.escape(cell))}</th>" for cell in header)
        body = "".join("<tr>" + "".join(map(_html_cell, row)) + "</tr>" for row in rows)
        self._parts.append(
            f'<div class="scroll"><table class="{" ".join(texts)}"><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>"
        )

    def plot(self, plot: Plot) -> None:
        """A figure under its heading, embedded."""
        self.heading(plot.heading)
        images = "".join(
            f'<img alt="{html.escape(text)}" src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
            for text, png in plot.images.items()
        )
        if isinstance(plot.figure, Mapping):
            images = f'<div class="panels">{images}</div>'
        self._parts.append(f"<figure>{images}<figcaption>{html.escape(plot.caption)}</figcaption></figure>")

    @property
    def text(self) -> str:
        """The whole file."""
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n"
        )


def _html_cell(cell: str) -> str:
    return f"<td{' class=long' if len(cell) > _LONG_CELL else ''}>{html.escape(cell)}</td>"


def _unbroken(text: str) -> str:
    """A header's words may stand under each other, but "SST-2" is one word."""
    return " ".join(f"<span>{word}</span>" if "-" in word else word for word in text.split(" "))


class MarkdownPage:
    """The Markdown counterpart of :class:`Page`."""

    def __init__(self, title: str) -> None:
        self._parts = [f"# {title}"]

    def heading(self, text: str) -> None:
        """A section's heading."""
        self._parts.append(f"## {text}")

    def paragraph(self, text: str) -> None:
        """Plain text."""
        self._parts.append(text)

    def facts(self, facts: Mapping[str, str]) -> None:
        """A list of names and what there is to say of each."""
        self._parts.append("\n".join(f"- **{name}:** {text}" for name, text in facts.items()))

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of strings; the first column is the row's name."""
        self._parts.append(markdown_table(header, rows))

    def plot(self, plot: Plot) -> None:
        """A figure under its heading; the image lies beside the file."""
        self.heading(plot.heading)
        self._parts.append(f"![{plot.caption}]({plot.file_name})")

    @property
    def text(self) -> str:
        """The whole file."""
        return "\n\n".join(self._parts) + "\n"


Document = Page | MarkdownPage


def write_documents(folder: Path, title: str, plots: Sequence[Plot], fill: Callable[[Document], None]) -> None:
    """Write ``report.html``, ``report.md`` and the images of ``plots``; ``fill`` adds the content to each document."""
    for plot in plots:
        with atomic_path(folder / plot.file_name) as temporary:
            temporary.write_bytes(plot.png)
    for document, file_name in ((Page(title), HTML_FILE), (MarkdownPage(title), MARKDOWN_FILE)):
        fill(document)
        write_text(folder / file_name, document.text)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table as Markdown: first column left, the others right."""
    lines = ["| " + " | ".join(header) + " |", "|---|" + "---:|" * (len(header) - 1)]
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines)


def time_unit(seconds: float) -> tuple[str, float]:
    """The unit that suits a time axis of this length, and its seconds."""
    if seconds >= 2 * 3600:
        return "hours", 3600.0
    return ("minutes", 60.0) if seconds >= 120 else ("seconds", 1.0)


def clean_axes(axes: "Axes", grid: str = "y") -> None:
    """No frame, and a quiet grid along one axis, behind the data."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
