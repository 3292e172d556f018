"""Pages and model cards: Jinja templates; those of HTML escape what they are given and hold their styles and scripts."""

import base64
import hashlib
from datetime import datetime
from functools import cache, partial
from importlib.metadata import version
from importlib.resources import files

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup

from mapet.reports.blocks import Bold, Bullets, Code, Curves, Heading, Paragraph, Table

STYLES = ("vendor/uPlot.min.css", "web/style.css")
SCRIPTS = ("vendor/uPlot.iife.min.js", "web/charts.js", "web/step_through.js", "web/page.js")
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00")
"""Okabe and Ito's (2008), which the colour-blind can tell apart; the dashes help further."""
DASHES = ((), (6, 2), (2, 2), (6, 2, 2, 2))


def line_style(i: int) -> tuple[str, tuple[int, ...]]:
    """Return colour and dashes of the i-th line."""
    return COLORS[i % len(COLORS)], DASHES[i % len(DASHES)]


def render_run(live: bool, **content: object) -> str:
    """Fill run.html with its scripts.

    A content security policy tells the browser to run no script but the page's own and to connect nowhere, or, if `live`, to the
    page's server alone.
    """
    style, script = _inline(STYLES), _inline(SCRIPTS)
    connect = "'self'" if live else "'none'"
    policy = f"img-src data:; style-src {_source(style)}; script-src {_source(script)}; connect-src {connect}"
    return _render(
        "run.html", style, policy, **content, script=Markup(script), live=live, made=f"{datetime.now():%Y-%m-%d %H:%M}",
        version=version("mapet"),
    )  # fmt: skip


def render_study(**content: object) -> str:
    """Fill study.html, which has no scripts; drawings as SVG bring styles of their own."""
    return _render("study.html", _inline(STYLES[1:]), "style-src 'unsafe-inline'", **content)


def render_card(**content: object) -> str:
    """Fill model_card.md."""
    return _environment().get_template("model_card.md").render(**content).strip() + "\n"


def _render(template: str, style: str, policy: str, **content: object) -> str:
    """Fill a template of web/ that extends layout.html."""
    policy = f"default-src 'none'; {policy}; base-uri 'none'; form-action 'none'"
    return _environment().get_template(template).render(**content, style=Markup(style), policy=Markup(policy))


def render_part(macro: str, *arguments: object) -> str:
    """Fill a macro of macros.html."""
    return str(getattr(_environment().get_template("macros.html").module, macro)(*arguments))


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("mapet.reports", "web"), autoescape=select_autoescape(["html"]), trim_blocks=True, lstrip_blocks=True,
        undefined=StrictUndefined,
    )  # fmt: skip
    for kind in (Bold, Heading, Paragraph, Code, Bullets, Table, Curves):
        made.tests[kind.__name__.lower()] = lambda value, kind=kind: isinstance(value, kind)
    made.filters["yaml"] = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    made.policies["json.dumps_kwargs"] = {"separators": (",", ":")}
    return made


@cache
def _inline(names: tuple[str, ...]) -> str:
    """Return files of this package, one after the other, as they may stand in a style or script element."""
    text = "\n".join(files("mapet.reports").joinpath(name).read_text(encoding="utf-8") for name in names)
    return text.replace("</script", "<\\/script").replace("</style", "<\\/style")


def _source(text: str) -> str:
    """Name an inline script or style as a content security policy does."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
