"""Markdown tables from results, and their marked blocks in the docs.

<!-- benchmark: training_step-h100 -->      table of results/training_step-h100.json
<!-- benchmark: study-cifar10 epochs -->    another one of its module's TABLES
...
<!-- end -->
"""

import importlib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from benchmarks.core import RESULTS, ROOT, Row

BLOCK = re.compile(r"(<!-- benchmark: (\S+)(?: (\S+))? -->\n).*?(<!-- end -->)", flags=re.DOTALL)


@dataclass(frozen=True)
class Table:
    """A Markdown table.

    Attributes:
        columns: title -> `str.format` template of a row's keys; a cell with a missing value is empty, a column of such cells is omitted.
        rows: selects, joins or orders the rows of the result.
    """

    columns: Mapping[str, str]
    rows: Callable[[list[Row]], Iterable[Row]] = list

    def render(self, rows: list[Row]) -> str:
        shown = list(self.rows(rows))
        cells = {title: [_cell(template, row) for row in shown] for title, template in self.columns.items()}
        retained = {title: column for title, column in cells.items() if any(column)}
        if not retained:
            return ""
        head, *body = (f"| {' | '.join(line)} |\n" for line in [tuple(retained), *zip(*retained.values(), strict=True)])
        return "".join([head, "|", "---|" * len(retained), "\n", *body])


def _cell(template: str, row: Row) -> str:
    names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    return "" if any(row.get(name) is None for name in names) else template.format_map(row)


def load_rows(stem: str) -> list[Row]:
    """Rows of results/STEM.json."""
    return json.loads((RESULTS / f"{stem}.json").read_text())["rows"]


def render(stems: str, table: str = "main") -> str:
    """Table of a stored result, or of several joined by '+'."""
    module = importlib.import_module(f"benchmarks.{re.split('[-+]', stems)[0]}")
    return module.TABLES[table].render([row for stem in stems.split("+") for row in load_rows(stem)])


def rewritten(text: str) -> str:
    """A page with its tables written again."""
    return BLOCK.sub(lambda block: f"{block[1]}\n{render(block[2], block[3] or 'main')}\n{block[4]}", text)


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def update(check: bool) -> list[Path]:
    """Write the tables of README.md and docs/ from benchmarks/results/*.json; returns the pages whose tables differ(ed)."""
    changed = []
    for page in pages():
        text = page.read_text(encoding="utf-8")
        if (new := rewritten(text)) != text:
            changed.append(page)
            if not check:
                page.write_text(new, encoding="utf-8")
    return changed
