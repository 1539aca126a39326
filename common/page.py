"""Reports: headings, paragraphs, tables and plots as one self-contained HTML page, and the same as Markdown."""

import base64
import html
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from common.folders import atomic_path, write_text

if TYPE_CHECKING:  # pages without plots do without matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKDOWN_FILE = "report.md"
HTML_FILE = "report.html"

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff; max-width: 60rem; margin: 2rem auto;
       padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; } h2 { font-size: 1.2rem; margin-top: 2.2rem; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
th { border-bottom: 2px solid #888; white-space: normal; vertical-align: bottom; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; } figcaption, .note { color: #555; font-size: .9rem; }
"""


@dataclass(frozen=True)
class Plot:
    """A figure that the page embeds and that lies beside it as ``<name>.png``."""

    name: str
    heading: str
    figure: "Figure"
    caption: str
    """Its alternative text too."""

    @cached_property
    def png(self) -> bytes:
        """The image."""
        buffer = io.BytesIO()
        self.figure.savefig(buffer, format="png", dpi=144, bbox_inches="tight")
        return buffer.getvalue()

    @property
    def file_name(self) -> str:
        """Of the image beside the page."""
        return f"{self.name}.png"


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

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of strings; the first column is the row's name."""
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
        body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        self._parts.append(
            f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
        )

    def plot(self, plot: Plot) -> None:
        """A figure under its heading, embedded."""
        self.heading(plot.heading)
        data = base64.b64encode(plot.png).decode("ascii")
        caption = html.escape(plot.caption)
        image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
        self._parts.append(f"<figure>{image}<figcaption>{caption}</figcaption></figure>")

    def write(self, path: Path) -> None:
        """Write the page, whole or not at all."""
        write_text(
            path,
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{_STYLE}</style></head>\n<body>\n"
            + "\n".join(self._parts)
            + "\n</body></html>\n",
        )


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

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """A table of strings; the first column is the row's name."""
        self._parts.append(markdown_table(header, rows))

    def plot(self, plot: Plot) -> None:
        """A figure under its heading; the image lies beside the file."""
        self.heading(plot.heading)
        self._parts.append(f"![{plot.caption}]({plot.file_name})")

    def write(self, path: Path) -> None:
        """Write the file, whole or not at all."""
        write_text(path, "\n\n".join(self._parts) + "\n")


Document = Page | MarkdownPage


def write_documents(folder: Path, title: str, plots: Sequence[Plot], fill: Callable[[Document], None]) -> None:
    """Write ``report.html``, ``report.md`` and the images of ``plots``; ``fill`` adds the content to each document."""
    for plot in plots:
        with atomic_path(folder / plot.file_name) as temporary:
            temporary.write_bytes(plot.png)
    for document, file_name in ((Page(title), HTML_FILE), (MarkdownPage(title), MARKDOWN_FILE)):
        fill(document)
        document.write(folder / file_name)


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
