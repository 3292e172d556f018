"""The long ones: the tutorial from its first line to its last, the notebooks, the site."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.test_docs import ROOT

TUTORIAL = ROOT / "docs" / "tutorial.md"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
MOST_BYTES = 500_000
MAPET = f'mapet() {{ "{sys.executable}" -m mapet "$@"; }}\n'


def without_numbers(text: str) -> str:
    """A line as it is on every machine: numbers, units of time and precision omitted."""
    return re.sub(r"\d[\d,.]*( s| min| h| days)?\b|float32|bfloat16", "#", re.sub(r" +", " ", text)).strip()


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])}


@pytest.mark.slow
def test_tutorial(tmp_path):
    """Its blocks run in order as they stand, print what it shows but for numbers, and it learns."""
    printed = ""
    fences = re.findall(r"^```(python|yaml|bash|text)\n(.*?)^```", TUTORIAL.read_text(), flags=re.S | re.M)
    for kind, text in fences:
        if kind == "yaml":
            (tmp_path / re.match(r"# (\S+),", text)[1]).write_text(text)
        elif kind != "text":
            command = ["bash", "-euc", MAPET + text] if kind == "bash" else [sys.executable, "-c", text]
            done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            printed += done.stdout
    lines = {without_numbers(line) for line in printed.splitlines()}
    shown = [line for kind, text in fences if kind == "text" for line in text.splitlines()]
    assert len(shown) > 20
    for line in shown:
        assert without_numbers(line) in lines, line
    rows = [json.loads(line) for line in (tmp_path / "runs/digits/pretrain/metrics.jsonl").read_text().splitlines()]
    last = [row for row in rows if "loss" in row][-1]
    assert (
        last["loss"] < last["unigram_entropy"] - 0.8 and last["token_accuracy"] > last["majority_token_accuracy"] + 0.05
    )
    probe = json.loads((tmp_path / "runs/digits/run.json").read_text())["results"]["evaluation"]
    for measure, margin in {"logistic": 0, "knn": 0.15}.items():
        assert probe["pretrained"][measure] > probe["untrained"][measure] + margin


def test_the_tutorial_reader_can_fail():
    assert without_numbers("epoch 30: loss 2.053, 5 min") == without_numbers("epoch 1:  loss 12.5, 40 s")
    assert without_numbers("unreadable: 0") != without_numbers("readable: 0")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_stored_with_its_outputs(path):
    """Run from top to bottom without an error, with figures, and small."""
    assert path.stat().st_size < MOST_BYTES
    cells = json.loads(path.read_text())["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 1
    assert sum(cell["cell_type"] == "markdown" for cell in cells) >= 5
    for statement in (node for cell in code for node in ast.walk(ast.parse("".join(cell["source"])))):
        if isinstance(statement, ast.ImportFrom) and (statement.module or "").startswith("mapet"):
            module = importlib.import_module(statement.module)
            assert all(hasattr(module, name.name) for name in statement.names), ast.unparse(statement)
    assert "/home/" not in path.read_text() and "/work/" not in path.read_text()


def test_there_are_three_notebooks():
    assert len(NOTEBOOKS) == 3


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    if "transformers" in path.read_text():
        pytest.importorskip("transformers")
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    nbclient.NotebookClient(nbformat.read(path, 4), timeout=600, kernel_name="python3").execute()


@pytest.mark.slow
def test_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=ROOT, env=environment() | {"NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    api = Path(tmp_path / "site" / "api.html").read_text()
    for option in ("mask_ratio", "drop_path", "max_unreadable", "teacher_image_size"):  # own and inherited fields
        assert f">{option}<" in api or f"{option}:" in re.sub("<[^>]+>", "", api), option
