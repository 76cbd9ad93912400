"""Pages for people: one self-contained HTML file each, light and dark, built from a few kinds of blocks.

A page is a headline, a lead, notes, and sections; a section is a title and blocks. Everything that a block says is
text, never markup. Figures are inline SVG (figures.py), pictures are PNG inside the page.
"""

import base64
import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jinja2 import Environment, FunctionLoader, StrictUndefined
from numpy.typing import NDArray
from PIL import Image

from ray_app.errors import ConfigError, StoreError
from ray_app.store.atomic import write_file

Outcome = Literal["beats", "unsure", "loses", "plain"]
"""Colour next to the headline: good, uncertain, bad, none."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A table cell that is more than its text."""

    text: str
    """Its words."""
    kind: Literal["", "good", "bad"] = ""
    """Colour."""
    href: str = ""
    """Relative link."""
    quiet: str = ""
    """Second line in small print."""


@dataclass(frozen=True, slots=True)
class Row:
    """A table row."""

    name: str | Cell
    """Heading of the row."""
    cells: Sequence[str | Cell]
    """One for each further column."""
    kind: str = ""
    """`adapter`, `context`, `lift` or `interval`: its look."""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings."""

    heads: Sequence[str]
    """Heading of each column; the first is that of the row names."""
    rows: Sequence[Row]
    """Lines of the table."""
    caption: str = ""
    """Meaning of the numbers."""
    key: str = ""
    """Heading of the highlighted column."""
    wrapped: str = ""
    """Heading of a column of words, which wrap."""
    block: str = field(default="table", init=False)


@dataclass(frozen=True, slots=True)
class Facts:
    """Names and values."""

    lines: Sequence[tuple[str, str]]
    """One fact each."""
    block: str = field(default="facts", init=False)


@dataclass(frozen=True, slots=True)
class Figure:
    """An inline SVG."""

    svg: str
    """From `figures.svg`."""
    alt: str
    """Text for readers who do not see it."""
    caption: str
    """Line below it."""
    block: str = field(default="figure", init=False)


@dataclass(frozen=True, slots=True)
class Pictures:
    """A row of pictures with one caption."""

    pictures: Sequence[dict[str, Any]]
    """From `picture`."""
    caption: str
    """Line above them."""
    strong: str = ""
    """First words of the caption."""
    columns: Literal["", "four", "many"] = ""
    """Three columns, four, or as many as fit."""
    block: str = field(default="pictures", init=False)


@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph in small print."""

    text: str
    """Its words."""
    href: str = ""
    """Relative link that the text is."""
    block: str = field(default="text", init=False)


@dataclass(frozen=True, slots=True)
class Marked:
    """A paragraph of pieces, each plain or coloured."""

    pieces: Sequence[tuple[str, Literal["", "good", "bad"]]]
    """Text and colour of each piece."""
    block: str = field(default="marked", init=False)


@dataclass(frozen=True, slots=True)
class Group:
    """Blocks under a heading of their own: side by side with other groups, or folded away."""

    title: str
    """Heading, or summary of what is folded."""
    blocks: Sequence["Block"]
    """Blocks inside."""
    block: Literal["group", "fold"] = "group"


Block = Table | Facts | Figure | Pictures | Text | Marked | Group


@dataclass(frozen=True, slots=True)
class Section:
    """A heading with its blocks."""

    title: str
    """Heading."""
    blocks: Sequence[Block]
    """In their order."""
    columns: bool = False
    """Groups side by side where the window is wide."""


def page(
    title: str,
    headline: str,
    lead: str,
    notes: Iterable[Mapping[str, Any]],
    sections: Iterable[Section],
    outcome: Outcome = "plain",
) -> str:
    """A page as HTML. `notes`: lines to read with the numbers, each with `text` and `warning`."""
    folder = resources.files("ray_app.reports") / "templates"
    loader = FunctionLoader(lambda name: folder.joinpath(name).read_text(encoding="utf-8"))
    templates = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    return templates.get_template("page.html.j2").render(
        title=title,
        headline=headline,
        lead=lead,
        notes=list(notes),
        sections=list(sections),
        outcome=outcome,
    )


def picture(name: str, alt: str, pixels: NDArray[np.uint8]) -> dict[str, Any]:
    """A picture of shape (H, W, 3) or (H, W) for `Pictures`."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    png = base64.b64encode(buffer.getvalue()).decode("ascii")
    return {"name": name, "alt": alt, "png": png, "width": pixels.shape[1], "height": pixels.shape[0]}


def flat_rows(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested values as facts with dotted names."""
    lines: list[tuple[str, str]] = []
    for name, value in values.items():
        if isinstance(value, Mapping):
            lines += flat_rows(value, f"{prefix}{name}.")
        elif isinstance(value, list | tuple):
            lines.append((f"{prefix}{name}", " ".join(map(str, value))))
        else:
            lines.append((f"{prefix}{name}", "none" if value is None else str(value)))
    return lines


def require_suffix(flag: str, path: Path | None, suffix: str) -> None:
    """ConfigError if the file that a flag names has another suffix; called before the work starts."""
    if path and path.suffix.lower() != suffix:
        raise ConfigError(f"{flag} {path}: end its name in {suffix}.")


def write_output(flag: str, path: Path, data: bytes) -> None:
    """Write the file that a flag names; an existing one is replaced. StoreError: it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, data)
    except OSError as error:
        raise StoreError(f"{flag} {path} cannot be written: {error.strerror}.") from error
