"""Jinja templates of web/ (HTML, which escapes its values and inlines its styles and scripts, and Markdown), and text formats."""

import base64
import csv
import hashlib
import io
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import version
from importlib.resources import files
from shlex import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mapet.config.base import dump_yaml
from mapet.config.shared import format_teachers
from mapet.errors import option
from mapet.files import escape_formula
from mapet.studies.statistics import format_condition, format_p_value
from mapet.training.metrics import format_duration

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's palette (2008), whose colors differ for the color-blind, too."""
DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))
NUM_LINE_STYLES = 12
LINE_STYLES = [(COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i in range(NUM_LINE_STYLES)]
"""Color and dashes (lengths in pixels) of the lines of a plot, taken in turn."""


class Bold(str):
    """A table cell in bold."""


def render(template: str, **content: object) -> str:
    """Render the Jinja template of this file name in reports/web/ with these variables; the text ends with one newline.

    In templates named *.html the values are escaped. A variable that the template uses and `content` lacks raises UndefinedError.
    """
    return _environment().get_template(template).render(**content).strip() + "\n"


def render_macro(template: str, macro: str, *arguments: object) -> str:
    """Render the named macro of the Jinja template of this file name in reports/web/, called with `arguments`."""
    return str(getattr(_environment().get_template(template).module, macro)(*arguments))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Format a Markdown table of a head and rows of equally many texts, in which Markdown's characters are escaped (`Bold` is kept)."""
    header, *body = ([escape_markdown(cell) for cell in row] for row in (head, *rows))
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *body))


def format_csv(rows: Iterable[Iterable[object]]) -> str:
    """Format rows as CSV. A text that a spreadsheet would take for a formula, because of its first character, gets a ' before it."""
    file = io.StringIO()
    for row in rows:
        csv.writer(file, lineterminator="\n").writerow(map(escape_formula, row))
    return file.getvalue()


def code_span(text: object) -> str:
    """Format text as inline code of Markdown, on one line, whatever backticks it has."""
    line = " ".join(str(text).split()).replace("|", "\\|")
    return f"`{line}`" if "`" not in line else f"{_fence(line, 1)} {line} {_fence(line, 1)}"


def code_block(language: str, text: str) -> str:
    """Format text as a code block of Markdown, whatever backticks it has."""
    return f"{_fence(text, 3)}{language}\n{text.rstrip()}\n{_fence(text, 3)}\n"


def _fence(text: str, least: int) -> str:
    """Return a run of at least `least` backticks that is longer than any in the text."""
    return "`" * max(least, *(1 + len(run) for run in re.findall("`*", text)))


def escape_markdown(text: str) -> str:
    """Put text on one line and escape Markdown's special characters with backslashes; a `Bold` text becomes **text**.

    Underscores between letters, as in option names, have no meaning in Markdown and are not escaped.
    """
    escaped = re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]<>|&]", r"\\\g<0>", " ".join(text.split()))
    return f"**{escaped}**" if isinstance(text, Bold) else escaped


def format_number(value: float) -> str:
    """Format a number: whole ones and those from 1,000 on as integers, others with four significant digits: '1,437', '0.807'."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def format_percent(fraction: float) -> str:
    """Format a fraction: 0.053 is '5.3%'."""
    return f"{fraction:.1%}"


def format_value(value: object) -> str:
    """Format the value of an option on one line: '[0.4, 0.8]', 'true', '0.0015'; None is 'none'.

    A mapping is 'depth=2, num_heads=2', or 'none' if it is empty; floats have six significant digits; items are formatted alike.
    """
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={format_value(part)}" for key, part in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(format_value, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}"
    return "none" if value is None else str(value)


@cache
def _environment() -> Environment:
    """Return the Jinja environment of the templates in reports/web/, with the functions, filters and tests that they use.

    Values are escaped in *.html alone; an undefined variable is an error; JSON has no spaces. Its filter `md` escapes Markdown.
    """
    environment = Environment(
        loader=PackageLoader("mapet.reports", "web"), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    environment.globals |= {"inline": _inline, "source_hash": _source_hash, "line_styles": LINE_STYLES}
    environment.globals |= {
        "table": markdown_table,
        "code": code_block,
        "version": version("mapet"),
        "now": datetime.now,
        "option": option,
    }
    environment.filters |= {"md": escape_markdown, "code": code_span, "quote": quote, "value": format_value}
    environment.filters |= {"number": format_number, "percent": format_percent, "duration": format_duration}
    environment.filters |= {"condition": format_condition, "p_value": format_p_value}
    environment.filters |= {"yaml": dump_yaml, "joined": format_teachers}
    environment.tests["bold"] = lambda text: isinstance(text, Bold)
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return environment


@cache
def _inline(*names: str) -> Markup:
    """Return the text of style sheets or scripts, one after the other, for a <style> or <script> element.

    Closing tags within the text are written with a backslash, so that they don't end the element.

    Args:
        names: paths below mapet/reports, e.g. 'web/style.css'.
    """
    text = "\n".join(files("mapet.reports").joinpath(name).read_text(encoding="utf-8") for name in names)
    return Markup(text.replace("</script", "<\\/script").replace("</style", "<\\/style"))


def _source_hash(text: str) -> Markup:
    """Return the source expression, 'sha256-...', by which a Content-Security-Policy allows the inline script or style `text`."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
