"""Reports as a list of blocks, which become Markdown here and HTML in web/study.html."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Bold(str):
    """A table entry that stands out."""


class Heading(NamedTuple):
    """A title: level 1 for the report's, 2 for a section's."""

    text: str
    level: int = 2


class Paragraph(NamedTuple):
    """Text on one line."""

    text: str


class Code(NamedTuple):
    """Text as it is."""

    text: str


class Bullets(NamedTuple):
    """A list of sentences."""

    lines: Sequence[str]


class Table(NamedTuple):
    """Rows of text under a row of names."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]


class Curves(NamedTuple):
    """Line charts with a common legend; Markdown only names them.

    Attributes:
        names: of the lines.
        panels: caption -> SVG.
    """

    title: str
    names: Sequence[str]
    panels: Mapping[str, str]


Block = Heading | Paragraph | Code | Bullets | Table | Curves


def to_markdown(blocks: Sequence[Block]) -> str:
    """Render blocks, with nothing in their text that Markdown would take for its own."""
    return "\n\n".join(map(_markdown, blocks)) + "\n"


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Render a table whose entries are Markdown already."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def escape_markdown(text: str) -> str:
    """Put text on one line and escape what Markdown would take for its own."""
    escaped = re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]<>|&]", r"\\\g<0>", " ".join(text.split()))
    return f"**{escaped}**" if isinstance(text, Bold) else escaped


def _markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {escape_markdown(text)}"
        case Paragraph(text):
            return escape_markdown(text)
        case Code(text):
            return f"````\n{text}\n````"
        case Bullets(lines):
            return "\n".join(f"- {escape_markdown(line)}" for line in lines)
        case Table(head, rows):
            return markdown_table([*map(escape_markdown, head)], [[*map(escape_markdown, row)] for row in rows])
        case Curves(title):
            return f"- {escape_markdown(title)}: drawn in report.html"
