"""Benchmarks run, and the tables of the docs are those of their results."""

import argparse
import importlib
import json
import re

import pytest

from benchmarks import tables
from benchmarks.__main__ import NAMES
from benchmarks.core import RESULTS, run_info
from benchmarks.tables import Table

FIELDS = {"name", "command", "date", "commit", "source", "machine", "versions", "data", "seeds", "rows"}
MEASURED = {"performance", "results", "evaluation", "tokenizers", "scaling", "robustness"}


def smoke(name, folder):
    """Result of a benchmark's smallest setting."""
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    return module.run(parser.parse_args([word.format(scratch=folder) for word in module.SMOKE]))


@pytest.mark.parametrize("name", ["flops", "tokenizer"])
def test_runs(name, tmp_path):
    result = smoke(name, tmp_path)
    module = importlib.import_module(f"benchmarks.{name}")
    assert any(table.render(result.rows) for table in module.TABLES.values())
    assert set(json.loads(json.dumps(run_info(name, result)))) == FIELDS


@pytest.mark.parametrize("name", NAMES)
def test_options_of_the_smallest_setting_exist(name):
    module = importlib.import_module(f"benchmarks.{name}")
    parser = argparse.ArgumentParser()
    module.add_arguments(parser)
    parser.parse_args(module.SMOKE)
    assert module.__doc__ and module.TABLES


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.json")), ids=lambda path: path.stem)
def test_results_say_where_they_come_from(path):
    result = json.loads(path.read_text())
    assert set(result) == FIELDS
    assert result["name"] == path.stem.partition("-")[0] in NAMES
    assert result["command"].startswith(f"python -m benchmarks {result['name']}")
    assert result["rows"] and result["date"] and result["machine"] and result["versions"]


def test_tables_of_the_docs_are_those_of_the_results():
    assert tables.update(check=True) == []


def test_every_result_is_shown():
    shown = {
        stem
        for page in tables.pages()
        for block in tables.BLOCK.findall(page.read_text())
        for stem in block[1].split("+")
    }
    assert shown == {path.stem for path in RESULTS.glob("*.json")}


@pytest.mark.parametrize("page", tables.pages(), ids=lambda path: path.stem)
def test_tables_of_measured_numbers_are_generated_or_say_why_not(page):
    """A table with a column of decimals lies in a block, or a comment says where its numbers are from."""
    text = tables.BLOCK.sub("", page.read_text())
    for found in re.finditer(r"(?:^\|.*\n)+", text, flags=re.M):
        if page.stem in MEASURED and len(re.findall(r"\| \**\d+\.\d", found[0])) > 2:
            before = text[: found.start()].rstrip().rpartition("\n")[2]
            assert before.startswith("<!-- no benchmark: "), found[0][:200]


def test_table():
    table = Table({"name": "{name}", "value": "{value:.1f}", "none": "{missing:.1f}"})
    rows = [{"name": "a", "value": 1.25}, {"name": "b", "value": None}]
    assert table.render(rows) == "| name | value |\n|---|---|\n| a | 1.2 |\n| b |  |\n"
    assert table.render([]) == ""
