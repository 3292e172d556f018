"""Names that come from files are text in CSV and Markdown, whatever they are."""

import csv

import pytest

from mapet.evaluation.eval_context import MetricValue, ProtocolResult
from mapet.reports.evaluation import write_evaluation
from mapet.reports.render import code_block, code_span, format_csv

HOSTILE = [
    '=HYPERLINK("http://x")',
    "+1+cmd|' /C calc'!A0",
    "-2",
    "@SUM(A1)",
    "\t=1",
    "<img src=x onerror=alert(1)>",
    "a|b",
    "[x](javascript:y)",
    "`x`",
]


def test_names_are_no_formulas_of_a_spreadsheet():
    rows = list(csv.reader(format_csv([[name, -0.5, 3] for name in HOSTILE]).splitlines(keepends=True)))
    for name, (text, *numbers) in zip(HOSTILE, rows, strict=True):
        assert text == (f"'{name}" if name[0] in "=+-@\t" else name) and numbers == ["-0.5", "3"]


def test_names_are_no_markup_of_a_report(tmp_path):
    """Of classes, folders and backbones: read as GitHub does (CommonMark with tables), they are text."""
    result = ProtocolResult({"knn": MetricValue(0.5, 0.4, 0.6, "2 images")}, {"knn": dict.fromkeys(HOSTILE, (1, 2))})
    write_evaluation(tmp_path, {name: {"knn": result} for name in HOSTILE}, {name: name for name in HOSTILE})
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    page = MarkdownIt("commonmark").enable("table").render((tmp_path / "evaluation.md").read_text())
    assert "<img" not in page and "href" not in page and "&lt;img src=x onerror=alert(1)&gt;" in page
    assert page.count("<td>") >= len(HOSTILE) ** 2 and "<code>" not in page


def test_code_stays_code_whatever_backticks_it_has():
    MarkdownIt = pytest.importorskip("markdown_it").MarkdownIt
    for name in (HOSTILE[-1], "a`b", "``` ```", "plain"):
        assert MarkdownIt().render(code_span(name)) == f"<p><code>{name}</code></p>\n"
        text = f"a: {name}\n```\n# b"
        assert (
            MarkdownIt().render(code_block("yaml", text)) == f'<pre><code class="language-yaml">{text}\n</code></pre>\n'
        )
