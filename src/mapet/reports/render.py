"""Jinja templates in web/: pages, which escape what they are given and hold their styles and scripts, and Markdown."""

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files
from shlex import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mapet.errors import option

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's (2008), which the color-blind can tell apart; the dashes help further."""
DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))
LOOKS = [(COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]) for i in range(12)]
"""Color and dashes of lines, taken in turn."""


class Bold(str):
    """A table entry that stands out."""


def render(template: str, **content: object) -> str:
    """Fill a template of web/."""
    return _environment().get_template(template).render(**content).strip() + "\n"


def render_part(template: str, macro: str, *arguments: object) -> str:
    """Fill a macro of a template."""
    return str(getattr(_environment().get_template(template).module, macro)(*arguments))


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out text as a table."""
    lines = [[*map(escape_markdown, head)], ["---"] * len(head), *([*map(escape_markdown, row)] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escape_markdown(text: str) -> str:
    """Put text on one line and escape what Markdown would take for its own."""
    escaped = re.sub(r"(?<!\w)_|_(?!\w)|[\\`*\[\]<>|&]", r"\\\g<0>", " ".join(text.split()))
    return f"**{escaped}**" if isinstance(text, Bold) else escaped


def number(value: float) -> str:
    """'1,437', '0.8070', '34.2': as many digits as tell."""
    return f"{value:,.0f}" if float(value).is_integer() or abs(value) >= 1000 else f"{value:.4g}"


def percent(value: float) -> str:
    """'5.3%', as the terminal has it."""
    return f"{value:.1%}"


def span(seconds: float) -> str:
    """'45 s', '3 min 20 s', '5 h 12 min'."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def value_text(value: object) -> str:
    """Write a value of a config or description as YAML has it, on one line."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={value_text(part)}" for key, part in value.items()) or "none"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:.6g}" if isinstance(value, float) else "none" if value is None else str(value)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("mapet.reports", "web"), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    made.globals |= {"inline": _inline, "source": _source, "looks": LOOKS, "table": markdown_table}
    made.globals |= {"version": version("mapet"), "now": datetime.now, "option": option}
    made.filters |= {"md": escape_markdown, "yaml": partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)}
    made.filters |= {"number": number, "percent": percent, "span": span, "quote": quote}
    made.tests["bold"] = lambda text: isinstance(text, Bold)
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made


@cache
def _inline(*names: str) -> Markup:
    """Return files of this package, one after the other, as they may stand in a style or script element."""
    text = "\n".join(files("mapet.reports").joinpath(name).read_text(encoding="utf-8") for name in names)
    return Markup(text.replace("</script", "<\\/script").replace("</style", "<\\/style"))


def _source(text: str) -> Markup:
    """Name an inline script or style as a content security policy does."""
    return Markup(f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'")
